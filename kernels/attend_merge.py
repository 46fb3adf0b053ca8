"""Merge the partial results of each query: softmax-weighted by their log-sum-exps.

The partials of a query lie side by side, so a program of one warp streams a few queries' rows; the kernel is bound by
memory, and small programs keep many loads in flight.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .attend_lists import CHUNK_FIELDS
from .launches import Work
from .triton_tools import LN2, power_of_two

_CHUNK_FIELDS = tl.constexpr(CHUNK_FIELDS)

QUERIES = 4  # queries per program


@triton.jit
def merge_rows(
    PART, PART_LSE, slot, size, OUT, LSE, to, inside, QUERIES: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr
):
    """Rows ``slot .. slot + size`` [QUERIES] of the buffer to rows ``to`` of the output; no rows give 0 and -inf."""
    d = tl.arange(0, D)
    most = tl.max(size)
    peak = tl.full([QUERIES], float("-inf"), tl.float32)
    for j in range(most):
        peak = tl.maximum(peak, tl.load(PART_LSE + slot + j, mask=j < size, other=float("-inf")))
    safe = tl.where(peak > float("-inf"), peak, 0.0)
    acc = tl.zeros([QUERIES, D], tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    for j in range(most):
        weight = tl.exp2(tl.load(PART_LSE + slot + j, mask=j < size, other=float("-inf")) - safe)
        rows = tl.load(PART + (slot + j)[:, None].to(tl.int64) * D + d[None, :], mask=(j < size)[:, None], other=0.0)
        acc += weight[:, None] * rows.to(tl.float32)  # [QUERIES, D]
        total += weight
    empty = total == 0.0
    out = acc / tl.where(empty, 1.0, total)[:, None]
    store = inside[:, None] & (d < HEAD_DIM)[None, :]
    tl.store(OUT + to[:, None] * HEAD_DIM + d[None, :], out.to(OUT.dtype.element_ty), mask=store)
    lse = tl.where(empty, float("-inf"), (safe + tl.log2(tl.where(empty, 1.0, total))) * LN2)
    tl.store(LSE + to, lse, mask=inside)


@triton.jit
def merge_chunk(
    chunk, PART, PART_LSE, PLACE, CHUNKS, OUT, LSE, tokens,
    QUERIES: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """This program's queries of one chunk."""
    info = CHUNKS + chunk * _CHUNK_FIELDS
    head, first, last = tl.load(info).to(tl.int64), tl.load(info + 1), tl.load(info + 2)
    s = first + tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    inside = s < last
    to = head * tokens + s
    slot = tl.load(PLACE + to * 2, mask=inside, other=0)
    size = tl.load(PLACE + to * 2 + 1, mask=inside, other=0)
    merge_rows(PART, PART_LSE, slot, size, OUT, LSE, to, inside, QUERIES, HEAD_DIM, D)


@triton.jit(do_not_specialize=["first_head", "last_head", "turn", "ring", "tokens"])
def merge_chunks(
    PART, PART_LSE, PLACE, CHUNKS, FIRST_CHUNK, OUT, LSE, first_head, last_head, turn, ring, tokens,
    QUERIES: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Merge chunk ``turn * ring + program_id(1)`` of a group of heads, if it exists."""
    chunk = tl.load(FIRST_CHUNK + first_head) + turn * ring + tl.program_id(1)
    if chunk < tl.load(FIRST_CHUNK + last_head):
        merge_chunk(chunk, PART, PART_LSE, PLACE, CHUNKS, OUT, LSE, tokens, QUERIES, HEAD_DIM, D)


@triton.jit(do_not_specialize=["tokens"])
def merge_last(
    PART, PART_LSE, PLACE, CHUNKS, TOTALS, OUT, LSE, tokens,
    QUERIES: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Merge the last chunk, which a kernel that merges while it attends leaves over."""
    chunk = tl.load(TOTALS + 1) - 1
    if chunk >= 0:
        merge_chunk(chunk, PART, PART_LSE, PLACE, CHUNKS, OUT, LSE, tokens, QUERIES, HEAD_DIM, D)


@triton.jit(do_not_specialize=["rows"])
def refuse(
    TOTALS, OUT, LSE, rows, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, HAS_LSE: tl.constexpr
):  # fmt: skip
    """Fill the result with NaN where the selection had more pairs than the lists could hold."""
    if tl.load(TOTALS + 2) != 0:
        row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        d = tl.arange(0, D)
        nan = tl.full([BLOCK, D], float("nan"), tl.float32)
        store = (row < rows)[:, None] & (d < HEAD_DIM)[None, :]
        tl.store(OUT + row[:, None] * HEAD_DIM + d[None, :], nan.to(OUT.dtype.element_ty), mask=store)
        if HAS_LSE:
            tl.store(LSE + row, tl.full([BLOCK], float("nan"), tl.float32), mask=row < rows)


def refuse_results(work: Work, totals: Tensor, out: Tensor, lse: Tensor | None) -> None:
    """NaN instead of ``out`` and ``lse`` [B, H, S, (D)] where the lists of ``totals`` were too small."""
    head_dim = out.shape[-1]
    rows = out.numel() // head_dim
    work.launch(
        refuse, (triton.cdiv(rows, 64),), totals, out, out if lse is None else lse, rows,
        BLOCK=64, HEAD_DIM=head_dim, D=power_of_two(head_dim), HAS_LSE=lse is not None, num_warps=4,
    )  # fmt: skip
