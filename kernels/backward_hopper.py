"""Gradients of attention to the selected boxes on Hopper (compute capability 9.0), by two kernels in Gluon."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .attend_hopper import describe, padded
from .attend_pack import PackedKeys
from .backward_inputs import Inputs
from .hopper_keys import PART_KEYS, PARTS, hopper_gradients_of_keys
from .hopper_queries import BLOCK, hopper_gradients_of_queries
from .launches import Work
from .triton_tools import LOG2E
from .turns import Turn

__all__ = ["describe", "keys_per_block", "launch_keys", "launch_queries", "padded"]


class Shape(NamedTuple):
    """How a program is made up, by padded head size."""

    key_stages: int  # steps of 64 queries in shared memory
    query_stages: int  # blocks of 64 keys and of values in shared memory


# All of shared memory. The registers of the three warpgroups add up to 504; fewer for those who sum, and the assembler
# has the tensor cores wait for each product.
SHAPES = {64: Shape(8, 8), 128: Shape(4, 3)}
KEY_REGISTERS = 232, 40  # sum, gather
QUERY_REGISTERS = 240, 24  # sum, feed


def keys_per_block(q: Tensor) -> int:
    """Of the packed keys that :func:`hopper_gradients_of_queries` reads."""
    return BLOCK


def launch_keys(work: Work, inputs: Inputs, dk: Tensor, dv: Tensor) -> None:
    """Fill ``dk`` and ``dv``, but for masked keys."""
    q, k, v, dout, lse, delta, lists, geometry, scale, masked = inputs
    batch, heads, tokens, head_dim = q.shape
    dim = padded(head_dim)
    boxes = geometry.num_key_boxes
    blocks = triton.cdiv(max(geometry.box_size, geometry.num_condition), PARTS * PART_KEYS)
    strides = [stride // 8 for x in (q, k, v, dout) for stride in x.stride()[:3]]
    sums, gathers = KEY_REGISTERS
    work.launch(
        hopper_gradients_of_keys, (boxes * blocks, batch * k.shape[1]), q, k, v, dout, lse, delta, lists.keys, lists.span,
        lists.entries, lists.start, lists.total, lists.totals, dk, dv, *strides, head_dim // 8, heads, inputs.group,
        tokens, boxes, blocks, masked, scale * LOG2E, D=dim, STAGES=SHAPES[dim].key_stages, SUM_REGISTERS=sums,
        GATHER_REGISTERS=gathers, num_warps=4,
    )  # fmt: skip


def launch_queries(work: Work, inputs: Inputs, turn: Turn, packed: PackedKeys, part: Tensor) -> None:
    """Partial gradients of the queries of one turn."""
    q, _, _, dout, lse, delta, lists, _, scale, _ = inputs
    dim = part.shape[1]
    strides = [stride // 8 for x in (q, dout) for stride in x.stride()[:3]]
    sums, feeds = QUERY_REGISTERS
    programs = torch.cuda.get_device_properties(q.device).multi_processor_count
    work.launch(
        hopper_gradients_of_queries, (programs,), q, dout, lse, delta, packed.keys, packed.values,
        lists.entries, lists.place, lists.tiles, lists.chunks, lists.first_chunk, part, *strides, q.shape[-1] // 8,
        scale * LOG2E, turn.first, turn.last, turn.number, turn.ring, q.shape[1], inputs.group, q.shape[2],
        packed.rows, packed.stride, D=dim, STAGES=SHAPES[dim].query_stages, SUM_REGISTERS=sums,
        FEED_REGISTERS=feeds, num_warps=4,
    )  # fmt: skip
