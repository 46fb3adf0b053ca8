"""Selection with a pool per query: one kernel, a query's whole row of gates in registers.

The cut-off is found bit by bit on the order keys: 32 sums over the row, exact whatever the values, where sorting a row
would take more steps and memory. Tile: as many queries as keep 4,096 gates a program (a key and a weight of 16 entries
a thread at 8 warps) and at least 16, which the tensor cores need; from 1,024 boxes upwards 16 warps share the longer
rows. The product goes over head_dim in chunks, so that the means of 2,048 boxes still fit in shared memory, where they
are kept once: nothing is loaded ahead. Source: arXiv 2506.23858, sections 3.3 and 3.4.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .implementations import MAX_ROW_BOXES as MAX_BOXES
from .launches import Work
from .partition import WORD_BITS, Geometry
from .select_cut import RANGE_FLOOR, SUM_FLOOR
from .select_gate import SIZES, order_key
from .select_means import Means
from .triton_tools import box_of_token, float_of, power_of_two

TILE = 4096  # gates in registers
MEANS = 65536  # bytes of the means in shared memory, where 16 components do not need more


@triton.jit(do_not_specialize=[*SIZES, "amount_low", "amount_high"])
def _select_rows(
    q, means, sizes, words, stride_qb, stride_qh, stride_qs,
    amount_low, amount_high, prefix, num_video, heads, group, num_words, rows, columns, bt, bh, bw, box_rows, box_columns,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BOXES: tl.constexpr, CHUNK: tl.constexpr,
    TERMS: tl.constexpr, RESCALE: tl.constexpr, TOPK: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    sample = row // heads
    n = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    live = n < num_video
    own = box_of_token(n, rows, columns, bt, bh, bw, box_rows, box_columns)
    lines = q + sample * stride_qb + (row - sample * heads) * stride_qh + (prefix + n).to(tl.int64) * stride_qs
    padded = num_words * 32
    plane = padded * DIM
    means += (row // group) * TERMS * plane
    box = tl.arange(0, BOXES)
    exists = box < padded
    gate = tl.zeros([BLOCK_Q, BOXES], tl.float32)
    for term in tl.static_range(TERMS):
        if RESCALE != 1.0:
            gate *= 1.0 / RESCALE
        for start in range(0, DIM, CHUNK):
            dims = start + tl.arange(0, CHUNK)
            read = live[:, None] & (dims < HEAD_DIM)[None, :]
            query = tl.load(lines[:, None] + dims[None, :], mask=read, other=0.0)  # [BLOCK_Q, CHUNK]
            at = means + (TERMS - 1 - term) * plane + box[None, :] * DIM + dims[:, None]
            mean = tl.load(at, mask=exists[None, :], other=0.0)  # [CHUNK, BOXES]
            gate = tl.dot(query, mean, gate, input_precision="ieee")

    filled = tl.load(sizes + sample * padded + box, mask=exists, other=0) > 0
    mine = own[:, None] == box[None, :]
    valid = filled[None, :] & live[:, None]
    other = valid & (own[:, None] != box[None, :])
    low = tl.min(tl.where(valid, gate, float("inf")), 1)
    width = tl.max(tl.where(valid, gate, float("-inf")), 1).to(tl.float64) - low.to(tl.float64)
    flat = (width > RANGE_FLOOR) == 0
    wanted = float_of(amount_low, amount_high)
    if TOPK:
        weight = tl.where(other, 1.0, 0.0)
        total = tl.full([BLOCK_Q], 1.0, tl.float64)
        need = wanted + tl.zeros([BLOCK_Q], tl.float64)
    else:
        weight = tl.where(valid, tl.where(flat[:, None], 1.0, gate - tl.where(flat, 0.0, low)[:, None]), 0.0)
        total = tl.sum(weight, 1).to(tl.float64) + SUM_FLOOR * tl.where(flat, 1.0, width)
        need = tl.maximum(wanted - tl.sum(tl.where(mine, weight, 0.0), 1).to(tl.float64) / total, 0.0)
        weight = tl.where(other, weight, 0.0)
    # No number has the key 0, which stands for entries that cannot be taken. [BLOCK_Q, BOXES]
    one = tl.full([1, 1], 1, tl.uint32)
    key = tl.where(other, tl.where(flat[:, None], one, order_key(gate)), one - one)

    # The largest key from which upwards the weights reach what is needed; 0 where all together do not.
    cut = tl.zeros([BLOCK_Q], tl.uint32)
    bit = tl.full([BLOCK_Q], 2147483648, tl.uint32)
    for _ in range(0, 32):
        trial = cut | bit
        upwards = key >= trial[:, None]
        enough = tl.sum(tl.where(upwards, weight, 0.0), 1).to(tl.float64) / total >= need
        cut = tl.where(enough & (tl.max(upwards.to(tl.int32), 1) > 0), trial, cut)
        bit = bit >> 1
    above = key > cut[:, None]
    tied = (key == cut[:, None]) & other
    held = tl.sum(tl.where(above, weight, 0.0), 1).to(tl.float64)
    each = tl.max(tl.where(tied, weight, 0.0), 1).to(tl.float64)
    rank = tl.cumsum(tied.to(tl.int32), 1) - 1
    short = (held[:, None] + rank.to(tl.float64) * each[:, None]) / total[:, None] < need[:, None]
    chosen = mine | above | (tied & ((rank == 0) | short))
    bits = tl.reshape(chosen.to(tl.int32), [BLOCK_Q, BOXES // 32, 32]) << tl.arange(0, 32)[None, None, :]
    word = tl.arange(0, BOXES // 32)
    out = words + ((row * num_video + n) * num_words)[:, None] + word[None, :]
    tl.store(out, tl.sum(bits, 2), mask=live[:, None] & (word < num_words)[None, :])


def select_rows(
    work: Work, q: torch.Tensor, means: Means, words: torch.Tensor, geometry: Geometry, group: int,
    amount: tuple[int, int], *,
    topk: bool,
) -> None:  # fmt: skip
    """Fill ``words`` [B, H, N, W]; ``amount``: bits, low and high, of the threshold or the number of others."""
    if geometry.num_boxes > MAX_BOXES:
        raise NotImplementedError(
            f"pool 'query_head' supports up to {MAX_BOXES} boxes, not {geometry.num_boxes}: use larger blocks"
        )
    batch, heads = q.shape[:2]
    boxes = max(WORD_BITS, power_of_two(geometry.num_boxes))
    block_q = max(16, TILE // boxes)
    chunk = min(means.dim, max(16, MEANS // (boxes * q.element_size())), 16 if means.num_terms == 1 else means.dim)
    work.launch(
        _select_rows, (triton.cdiv(geometry.num_video, block_q), batch * heads),
        q, means.terms, means.sizes, words, *q.stride()[:3],
        *amount, geometry.prefix, geometry.num_video, heads, group, geometry.num_words,
        *geometry.grid[1:], *geometry.block, *geometry.counts[1:],
        HEAD_DIM=q.shape[3], DIM=means.dim, BLOCK_Q=block_q, BOXES=boxes, CHUNK=chunk, TERMS=means.num_terms,
        RESCALE=means.rescale, TOPK=topk, num_warps=8 if boxes < 1024 else 16, num_stages=1,
    )  # fmt: skip
