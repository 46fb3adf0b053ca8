"""Turns: what the portable forward and both backwards do at a time, a few packed heads and a bounded number of chunks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import triton
from torch import Tensor

from . import attend_lists
from .attend_lists import Lists
from .attend_pack import PackedKeys, packed_rows
from .launches import is_dynamic
from .partition import Geometry


class Plan(NamedTuple):
    """How the scratch memory is divided."""

    together: int  # heads of keys that are packed at a time
    chunk_pairs: int
    ring: int  # chunks of partial results at a time


class Turn(NamedTuple):
    """Chunks ``number * ring`` to ``number * ring + ring`` of heads ``first`` to ``last``, whose keys are packed."""

    first: int
    last: int
    number: int
    ring: int
    tiles: int  # at most


def plan(
    q: Tensor, k: Tensor, geometry: Geometry, *, block: int, dim: int, row_bytes: int, head_capacity: int, scratch: int
) -> Plan:
    """For keys packed in blocks of ``block`` rows and partial results of ``dim`` elements and ``row_bytes`` bytes."""
    kv_heads = q.shape[0] * k.shape[1]
    packed_head = 2 * packed_rows(geometry, block)[1] * dim * q.element_size()
    slack = attend_lists.GROUP * geometry.num_key_boxes + attend_lists.ROUNDING
    if is_dynamic(kv_heads):  # all heads at a time, a chunk of each; planned for one sample
        rows = max(scratch - k.shape[1] * packed_head, scratch // 3) // row_bytes
        chunk_pairs = max(min(head_capacity, rows // q.shape[1] - slack), slack)
        return Plan(kv_heads, chunk_pairs, q.shape[0] * q.shape[1])
    together = max(1, min(kv_heads, scratch // 3 // packed_head))
    rows = max(scratch - together * packed_head, scratch // 3) // row_bytes
    rows = min(rows, (2**31 - 1) // dim)  # the kernels for Hopper count elements in 32 bits
    chunk_pairs = max(min(head_capacity, rows - slack), slack)
    ring = max(1, min(together * (q.shape[1] // k.shape[1]), rows // (chunk_pairs + slack)))
    return Plan(together, chunk_pairs, ring)


def turns(
    q: Tensor, k: Tensor, geometry: Geometry, room: Plan, lists: Lists, packed: PackedKeys,
    *, capacity: int, head_capacity: int,
) -> Iterator[Turn]:  # fmt: skip
    """All turns, one after the other; each group of heads is packed before its first."""
    kv_heads, group = q.shape[0] * k.shape[1], q.shape[1] // k.shape[1]
    ring = room.ring
    if is_dynamic(kv_heads):
        packed.fill(0, kv_heads)
        tiles = ring * (lists.slots // attend_lists.TILE + geometry.num_key_boxes + 1)
        for number in range(triton.cdiv(head_capacity, lists.chunk_pairs)):
            yield Turn(0, kv_heads * group, number, ring, tiles)
        return
    for first in range(0, kv_heads, room.together):
        count = min(room.together, kv_heads - first)
        packed.fill(first, count)
        heads = count * group
        pairs = min(heads * head_capacity, capacity)
        chunks = min(heads * triton.cdiv(head_capacity, lists.chunk_pairs), heads + pairs // lists.chunk_pairs)
        tiles = min(ring * lists.slots, pairs) // attend_lists.TILE + ring * geometry.num_key_boxes
        for number in range(triton.cdiv(chunks, ring)):
            yield Turn(first * group, (first + count) * group, number, ring, tiles)
