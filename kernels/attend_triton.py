"""Attention to the selected boxes in portable Triton, for every architecture that Triton compiles for.

Keys and values of a few heads at a time are packed into box order (``attend_pack``). One program takes one tile of
queries through one box; a tile's rows are gathered by index.

Tiles of 128 queries by 64 keys with 4 warps leave room for two programs per multiprocessor, which hide each other's
gathers; larger key blocks spill (head sizes of 128 in 16 bits), and so do blocks of 64 where the operands of a product
lie in registers. arXiv 2506.23858, section 3.1.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import attend_lists
from .attend_lists import CHUNK_FIELDS, RANK_BITS, TILE, TILE_FIELDS
from .attend_merge import QUERIES, merge_chunks, refuse_results
from .attend_pack import PackedKeys
from .launches import Work, compute_capability
from .partition import Geometry
from .triton_tools import LOG2E, power_of_two
from .turns import plan, turns

_RANK_BITS = tl.constexpr(RANK_BITS)
_RANK_MASK = tl.constexpr(2**RANK_BITS - 1)
_TILE_FIELDS = tl.constexpr(TILE_FIELDS)
_CHUNK_FIELDS = tl.constexpr(CHUNK_FIELDS)

# (bytes of an element, padded head size) -> keys per block, warps, stages. Smaller heads take the entry of 64.
# Tensor cores that read shared memory: compute capability 9 and 10.
SHARED_OPERANDS = {
    (2, 64): (64, 4, 3), (2, 128): (64, 4, 2), (2, 256): (32, 8, 2),
    (4, 64): (32, 4, 2), (4, 128): (32, 8, 2), (4, 256): (16, 8, 1),
}  # fmt: skip
# All others: operands lie in registers, and some parts have only 99 KiB of shared memory.
REGISTER_OPERANDS = {
    (2, 64): (32, 4, 3), (2, 128): (32, 8, 2), (2, 256): (16, 8, 2),
    (4, 64): (16, 8, 2), (4, 128): (16, 8, 2), (4, 256): (16, 8, 1),
}  # fmt: skip


def padded(head_dim: int) -> int:
    """The head size of the portable kernels."""
    return max(16, power_of_two(head_dim))


def reads_shared_operands(device: torch.device) -> bool:
    """Whether tensor cores take their operands from shared memory."""
    return device.type == "cpu" or compute_capability(device)[0] in (9, 10)


def tile_shape(q: Tensor) -> tuple[int, int, int]:
    """Keys per block, warps and stages for the tensor's device, dtype and head size."""
    shapes = SHARED_OPERANDS if reads_shared_operands(q.device) else REGISTER_OPERANDS
    return shapes[q.element_size(), max(64, power_of_two(q.shape[-1]))]


@triton.jit
def packed_block(packed, row, BLOCK: tl.constexpr, D: tl.constexpr):
    """``BLOCK`` packed rows [BLOCK, D] behind a tensor descriptor, or behind a plain pointer where there is none."""
    if isinstance(packed, tl.tensor_descriptor):
        rows = packed.load([row, 0])
    else:
        at = packed + row.to(tl.int64) * D
        rows = tl.load(at + tl.arange(0, BLOCK)[:, None] * D + tl.arange(0, D)[None, :])
    return rows


@triton.jit
def attend_block(q, peak, total, acc, keys, values, row, left, scale, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """One block of keys through the running softmax of a tile of queries (base 2)."""
    k = packed_block(keys, row, BLOCK, q.shape[1])
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [TILE, BLOCK]
    if MASKED:
        scores = tl.where(tl.arange(0, BLOCK)[None, :] < left, scores, float("-inf"))
    new = tl.maximum(peak, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - new[:, None])
    decay = tl.exp2(peak - new)
    total = total * decay + tl.sum(weights, 1)
    v = packed_block(values, row, BLOCK, q.shape[1])
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return new, total, acc


@triton.jit(do_not_specialize=["first_head", "last_head", "turn", "ring", "heads", "group", "tokens", "packed_rows",
                               "stride"])  # fmt: skip
def attend_tiles(
    Q, keys, values, ENTRIES, PLACE, TILES, CHUNKS, FIRST_CHUNK, PART, PART_LSE, q_batch, q_head, q_token, scale,
    first_head, last_head, turn, ring, heads, group, tokens, packed_rows, stride,
    TILE: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of chunks ``turn * ring`` to ``turn * ring + ring`` of a group of heads."""
    scale = tl.cast(scale, tl.float32)  # Inductor passes a float64
    chunk = tl.load(FIRST_CHUNK + first_head) + turn * ring
    end = tl.minimum(chunk + ring, tl.load(FIRST_CHUNK + last_head))
    if chunk < end:
        tile = tl.load(CHUNKS + chunk * _CHUNK_FIELDS + 3) + tl.program_id(0)
        if tile < tl.load(CHUNKS + (end - 1) * _CHUNK_FIELDS + 4):
            info = TILES + tile * _TILE_FIELDS
            head, first, last = tl.load(info).to(tl.int64), tl.load(info + 1), tl.load(info + 2)
            size, box = tl.load(info + 4), tl.load(info + 6)
            at = first + tl.arange(0, TILE)
            inside = at < last
            entry = tl.load(ENTRIES + at, mask=inside, other=0)
            s = (entry >> _RANK_BITS).to(tl.int64)
            slot = tl.load(PLACE + (head * tokens + s) * 2, mask=inside, other=0) + (entry & _RANK_MASK)
            d = tl.arange(0, D)
            base = Q + (head // heads) * q_batch + (head % heads) * q_head
            q = tl.load(base + s[:, None] * q_token + d[None, :], mask=(d < HEAD_DIM)[None, :], other=0.0)  # [TILE, D]
            row = ((head - first_head) // group).to(tl.int32) * packed_rows + box * stride
            peak = tl.full([TILE], float("-inf"), tl.float32)
            total = tl.zeros([TILE], tl.float32)
            acc = tl.zeros([TILE, D], tl.float32)
            whole = size // BLOCK
            for j in tl.range(0, whole, num_stages=STAGES):
                peak, total, acc = attend_block(
                    q, peak, total, acc, keys, values, row + j * BLOCK, BLOCK, scale, BLOCK, False
                )
            if size > whole * BLOCK:
                left = size - whole * BLOCK
                peak, total, acc = attend_block(
                    q, peak, total, acc, keys, values, row + whole * BLOCK, left, scale, BLOCK, True
                )
            acc = acc / total[:, None]
            tl.store(PART + slot[:, None].to(tl.int64) * D + d[None, :], acc.to(PART.dtype.element_ty),
                     mask=inside[:, None])  # fmt: skip
            tl.store(PART_LSE + slot, peak + tl.log2(total), mask=inside)


def attention(
    work: Work, q: Tensor, k: Tensor, v: Tensor, words: Tensor, key_mask: Tensor, out: Tensor, lse: Tensor,
    geometry: Geometry, scale: float, *, capacity: int, head_capacity: int, scratch: int,
) -> None:  # fmt: skip
    """Fill ``out`` and ``lse`` of one group of samples; ``capacity`` pairs in all, ``head_capacity`` of a head.

    About ``scratch`` bytes of buffers.
    """
    _, heads, tokens, head_dim = q.shape
    group = heads // k.shape[1]
    dim = padded(head_dim)
    block, warps, stages = tile_shape(q)
    head_capacity = min(head_capacity, tokens * geometry.num_key_boxes)
    row_bytes = dim * q.element_size() + 4
    room = plan(
        q, k, geometry, block=block, dim=dim, row_bytes=row_bytes, head_capacity=head_capacity, scratch=scratch
    )  # fmt: skip
    lists = attend_lists.build(
        work, words, key_mask, geometry,
        capacity=capacity, head_capacity=head_capacity, chunk_pairs=room.chunk_pairs, ring=room.ring,
    )  # fmt: skip
    new = partial(work.empty, dtype=q.dtype)
    packed = PackedKeys(work, k, v, lists.keys, lists.span, geometry, block=block, dim=dim, together=room.together)
    part, part_lse = new(room.ring * lists.slots, dim), new(room.ring * lists.slots, dtype=torch.float32)
    for turn in turns(q, k, geometry, room, lists, packed, capacity=capacity, head_capacity=head_capacity):
        bounds = turn.first, turn.last, turn.number, turn.ring
        work.launch(
            attend_tiles, (turn.tiles,), q, packed.keys, packed.values, lists.entries, lists.place, lists.tiles,
            lists.chunks, lists.first_chunk, part, part_lse, *q.stride()[:3], scale * LOG2E, *bounds, heads, group,
            tokens, packed.rows, packed.stride, TILE=TILE, BLOCK=block, HEAD_DIM=head_dim, D=dim, STAGES=stages,
            num_warps=warps,
        )  # fmt: skip
        work.launch(
            merge_chunks, (triton.cdiv(tokens, QUERIES), turn.ring), part, part_lse, lists.place, lists.chunks,
            lists.first_chunk, out, lse, *bounds, tokens, QUERIES=QUERIES, HEAD_DIM=head_dim, D=dim, num_warps=1,
        )  # fmt: skip
    refuse_results(work, lists.totals, out, lse)
