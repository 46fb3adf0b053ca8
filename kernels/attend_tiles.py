"""Attention where the queries of a tile all selected the same boxes, in portable Triton: no partial results, no merge.

One program takes one tile of queries of one head through every key that it attends to and writes its rows of the result.
Keys and values lie packed by box (``attend_pack``), so a tile's work is a list of key blocks, written by a small kernel
before: whole blocks from the front, the ragged last blocks of boxes, which need a mask, from the back. Each kind is one
flat loop, whatever the number of boxes, and its loads run ahead from box to box. The longest tiles of a head start first,
so that the last ones to run are short.

128 queries by 64 keys with 4 warps leave room for two programs per multiprocessor: one's softmax runs beside the other's
products. The head size is known at compile time: without it rows would be read and written two bytes at a time. Float32
has no tensor cores of its accuracy; there a tile is cut into programs of fewer queries, which keep within the registers.

The condition tokens are one more box, which every tile selects; condition queries make tiles of their own behind the
others, which attend to everything. arXiv 2506.23858, section 3.1.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attend_lists import list_all_keys
from .attend_pack import PackedKeys, packed_rows
from .attend_triton import attend_block, reads_shared_operands
from .launches import Work, is_dynamic
from .partition import Geometry
from .triton_tools import LN2, LOG2E, power_of_two, tile_in_box, token_in_box

STEP = 8  # blocks of each of 32 boxes that are listed at a time

# (bytes of an element, padded head size) -> queries of a program, keys per block, warps, stages.
SHARED_OPERANDS = {
    (2, 64): (128, 64, 4, 3), (2, 128): (128, 64, 4, 2), (2, 256): (128, 32, 8, 2),
    (4, 64): (64, 16, 8, 2), (4, 128): (32, 16, 8, 2), (4, 256): (16, 16, 8, 1),
}  # fmt: skip
REGISTER_OPERANDS = SHARED_OPERANDS | {
    (2, 64): (128, 32, 4, 3), (2, 128): (128, 32, 8, 2), (2, 256): (64, 16, 8, 2),
}  # fmt: skip


def program_shape(q: Tensor) -> tuple[int, int, int, int]:
    """Queries of a program, keys per block, warps and stages for the tensor's device, dtype and head size."""
    shapes = SHARED_OPERANDS if reads_shared_operands(q.device) else REGISTER_OPERANDS
    return shapes[q.element_size(), max(64, power_of_two(q.shape[-1]))]


@triton.jit(do_not_specialize=["first_head", "heads", "tiles", "num_boxes", "boxes", "stride", "most", "masked"])
def list_blocks(
    WORDS, SPAN, BLOCKS, COUNT, first_head, heads, tiles, num_boxes, boxes, stride, most, masked,
    BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Key blocks of one tile. Whole ones: first row. Ragged ones, backwards from the end: first row + number of keys."""
    tile, of_group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    head = first_head + of_group
    span = SPAN + (head // heads) * masked * boxes * 2
    words = (num_boxes + 31) // 32
    program = of_group * tl.num_programs(0) + tile
    out = BLOCKS + program * most
    whole, ragged = 0, 0
    for w in range(0, (boxes + 31) // 32):
        c = w * 32 + tl.arange(0, 32)
        # A tile of condition queries attends to every box, every tile to the condition tokens.
        word = tl.load(WORDS + (head * tiles + tile) * words + w, mask=(tile < tiles) & (w < words), other=-1)
        on = (c < boxes) & ((((word >> tl.arange(0, 32)) & 1) != 0) | (c == num_boxes))
        size = tl.load(span + 2 * c + 1, mask=on, other=0)
        blocks = size // BLOCK
        at = whole + tl.cumsum(blocks, 0) - blocks
        for j0 in range(0, tl.max(blocks, 0), STEP):
            j = j0 + tl.arange(0, STEP)
            row = (c * stride)[:, None] + (j * BLOCK)[None, :]
            tl.store(out + at[:, None] + j[None, :], row, mask=j[None, :] < blocks[:, None])
        left = size - blocks * BLOCK
        some = (left > 0).to(tl.int32)
        back = ragged + tl.cumsum(some, 0) - some
        tl.store(out + most - 1 - back, c * stride + size, mask=some > 0)
        whole += tl.sum(blocks, 0)
        ragged += tl.sum(some, 0)
    tl.store(COUNT + program * 2, whole)
    tl.store(COUNT + program * 2 + 1, ragged)


@triton.jit(do_not_specialize=["tiles"])
def order_tiles(COUNT, ORDER, tiles, BLOCK: tl.constexpr):
    """Tiles of one head by their number of blocks, longest first."""
    first = tl.program_id(1).to(tl.int64) * tiles
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    count = COUNT + (first + tile) * 2
    inside = tile < tiles
    mine = tl.load(count, mask=inside, other=0) + tl.load(count + 1, mask=inside, other=0)
    place = tl.zeros([BLOCK], tl.int32)
    for start in range(0, tiles, BLOCK):
        other = start + tl.arange(0, BLOCK)
        count = COUNT + (first + other) * 2
        theirs = tl.load(count, mask=other < tiles, other=-1) + tl.load(count + 1, mask=other < tiles, other=0)
        earlier = (theirs[None, :] > mine[:, None]) | (
            (theirs[None, :] == mine[:, None]) & (other[None, :] < tile[:, None])
        )
        place += tl.sum(earlier.to(tl.int32), 1)
    tl.store(ORDER + first + place, tile, mask=inside)


_LAYOUT = [
    "tiles", "parts", "prefix", "suffix", "frames", "rows", "columns", "bt", "bh", "bw", "box_rows", "box_columns",
]  # fmt: skip


@triton.jit(do_not_specialize=_LAYOUT)
def list_queries(
    QUERIES, tiles, parts, prefix, suffix, frames, rows, columns, bt, bh, bw, box_rows, box_columns, TILE: tl.constexpr
):
    """Places of one tile's queries in the sequence, -1 behind the last; the same for every head."""
    tile = tl.program_id(0)
    r = tl.arange(0, TILE)
    t0, h0, w0, eh, ew, first, last = tile_in_box(tile, parts, frames, rows, columns, bt, bh, bw, box_rows, box_columns)
    s = prefix + token_in_box(first + r, t0, h0, w0, eh, ew, rows, columns)
    inside = first + r < last
    if tile >= tiles:
        r += (tile - tiles) * TILE
        s = tl.where(r < prefix, r, r + frames * rows * columns)
        inside = r < prefix + suffix
    tl.store(QUERIES + tile * TILE + tl.arange(0, TILE), tl.where(inside, s, -1))


@triton.jit(do_not_specialize=["first_head", "heads", "group", "tokens", "packed_rows", "most"])
def attend_queries(
    Q, keys, values, QUERIES, BLOCKS, COUNT, ORDER, OUT, LSE, q_batch, q_head, q_token, scale,
    first_head, heads, group, tokens, packed_rows, most,
    TILE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """``ROWS`` queries of one tile of one head of a group: all of their keys, and their rows of the result."""
    PARTS: tl.constexpr = TILE // ROWS
    scale = tl.cast(scale, tl.float32)  # Inductor passes a float64
    of_group = tl.program_id(1)
    first = of_group.to(tl.int64) * (tl.num_programs(0) // PARTS)
    tile = tl.load(ORDER + first + tl.program_id(0) // PARTS)
    program = first + tile
    whole, ragged = tl.load(COUNT + program * 2), tl.load(COUNT + program * 2 + 1)
    head = first_head + of_group.to(tl.int64)
    at = tile * TILE + tl.program_id(0) % PARTS * ROWS
    s = tl.load(QUERIES + at + tl.arange(0, ROWS)).to(tl.int64)
    d = tl.arange(0, D)
    here = (s >= 0)[:, None] & (d < HEAD_DIM)[None, :]
    lines = Q + (head // heads) * q_batch + (head % heads) * q_head + s * q_token
    q = tl.load(lines[:, None] + d[None, :], mask=here, other=0.0)  # [ROWS, D]
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    start = (of_group // group) * packed_rows
    block = BLOCKS + program * most
    for i in tl.range(0, whole, num_stages=STAGES):
        row = start + tl.load(block + i)
        peak, total, acc = attend_block(q, peak, total, acc, keys, values, row, BLOCK, scale, BLOCK, False)
    for i in tl.range(0, ragged, num_stages=STAGES):
        end = tl.load(block + most - 1 - i)
        left = end % BLOCK
        peak, total, acc = attend_block(q, peak, total, acc, keys, values, start + end - left, left, scale, BLOCK, True)
    empty = total == 0.0  # no key at all
    total = tl.where(empty, 1.0, total)
    acc = acc / total[:, None]
    to = head * tokens + s
    tl.store(OUT + to[:, None] * HEAD_DIM + d[None, :], acc.to(OUT.dtype.element_ty), mask=here)
    lse = tl.where(empty, float("-inf"), (peak + tl.log2(total)) * LN2)
    tl.store(LSE + to, lse, mask=s >= 0)


def attention(
    work: Work, q: Tensor, k: Tensor, v: Tensor, words: Tensor, key_mask: Tensor, out: Tensor, lse: Tensor,
    geometry: Geometry, scale: float, *, tile: int, scratch: int,
) -> None:  # fmt: skip
    """Fill ``out`` [B, H, S, D] and ``lse`` [B, H, S] from the tiles' bit sets ``words`` [B, H, M, W].

    About ``scratch`` bytes of buffers, or what one head of keys needs.
    """
    batch, heads, tokens, head_dim = q.shape
    kv_heads = k.shape[1]
    group, dim = heads // kv_heads, max(16, power_of_two(head_dim))
    most_rows, block, warps, stages = program_shape(q)
    program_rows = min(tile, most_rows)
    stride, rows = packed_rows(geometry, block)
    asking = geometry.by_tile(tile)
    tiles = asking.num_video
    all_tiles = tiles + triton.cdiv(geometry.num_condition, tile)  # those of condition queries behind the others
    most = rows // block  # blocks that a tile may attend to

    kv_bytes = 2 * rows * dim * q.element_size() + group * all_tiles * (most + 3) * 4
    dynamic = is_dynamic(batch)  # then all heads are done at a time
    turns = 1 if dynamic else triton.cdiv(batch * kv_heads, max(1, scratch // kv_bytes))
    together = triton.cdiv(batch * kv_heads, turns)  # kv heads at a time
    listed, span = list_all_keys(work, key_mask, geometry, batch)
    packed = PackedKeys(work, k, v, listed, span, geometry, block=block, dim=dim, together=together)
    new = partial(work.empty, dtype=torch.int32)
    blocks, count = new(together * group, all_tiles, most), new(together * group, all_tiles, 2)
    queries, order = new(all_tiles, tile), new(together * group, all_tiles)
    work.launch(
        list_queries, (all_tiles,), queries, tiles, asking.block[0], geometry.prefix, geometry.suffix,
        *geometry.grid, *geometry.block, *geometry.counts[1:], TILE=tile, num_warps=4,
    )  # fmt: skip
    for first in (0,) if dynamic else range(0, batch * kv_heads, together):
        some = min(together, batch * kv_heads - first)
        packed.fill(first, some)
        work.launch(
            list_blocks, (all_tiles, some * group), words, span, blocks, count, first * group, heads, tiles,
            geometry.num_boxes, span.shape[1], stride, most, int(span.shape[0] > 1),
            BLOCK=block, STEP=STEP, num_warps=1,
        )  # fmt: skip
        work.launch(
            order_tiles, (triton.cdiv(all_tiles, 64), some * group), count, order, all_tiles, BLOCK=64, num_warps=4
        )
        work.launch(
            attend_queries, (all_tiles * tile // program_rows, some * group), q, packed.keys, packed.values, queries, blocks,
            count, order, out, lse, *q.stride()[:3], scale * LOG2E, first * group, heads, group, tokens, rows, most,
            TILE=tile, ROWS=program_rows, BLOCK=block, HEAD_DIM=head_dim, D=dim, STAGES=stages, num_warps=warps,
        )  # fmt: skip
