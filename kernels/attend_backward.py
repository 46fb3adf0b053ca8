"""Gradients of attention to the selected boxes: lists as in the forward, then keys and values, then queries.

Each gradient of a key is summed by one program over the whole list of queries that selected its box. A query's are left
by its tiles as partial results, a bounded number of chunks at a time, and added up in their order: no atomics, the same
bits every time. ``backward_triton`` and ``backward_hopper`` have the kernels. arXiv 2506.23858, section 3.1.
"""

from __future__ import annotations

from types import ModuleType

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import attend_lists
from .attend_lists import CHUNK_FIELDS
from .attend_merge import refuse_results
from .attend_pack import PackedKeys
from .backward_inputs import Inputs
from .launches import Work
from .partition import Geometry
from .triton_tools import power_of_two
from .turns import plan, turns

QUERIES = 4  # queries per program that adds up

_CHUNK_FIELDS = tl.constexpr(CHUNK_FIELDS)


@triton.jit(do_not_specialize=["heads", "tokens"])
def multiply_rows(
    DOUT, OUT, DLSE, DELTA, o_batch, o_head, o_token, heads, tokens,
    HAS_DLSE: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Sums of ``dout * out`` over each row, less the gradient of its log-sum-exp."""
    head = tl.program_id(0).to(tl.int64)
    s = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, D)
    inside = (s < tokens)[:, None] & (d < HEAD_DIM)[None, :]
    dout_at = (head // heads) * o_batch + (head % heads) * o_head + s.to(tl.int64)[:, None] * o_token + d[None, :]
    dout = tl.load(DOUT + dout_at, mask=inside, other=0.0).to(tl.float32)  # [ROWS, D]
    row = head * tokens + s
    out = tl.load(OUT + row[:, None] * HEAD_DIM + d[None, :], mask=inside, other=0.0).to(tl.float32)
    delta = tl.sum(dout * out, 1)
    if HAS_DLSE:
        delta -= tl.load(DLSE + row, mask=s < tokens, other=0.0)
    tl.store(DELTA + row, delta, mask=s < tokens)


@triton.jit(do_not_specialize=["first_head", "last_head", "turn", "ring", "tokens"])
def add_up(
    PART, PLACE, CHUNKS, FIRST_CHUNK, DQ, first_head, last_head, turn, ring, tokens,
    QUERIES: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Partial gradients of the queries of chunk ``turn * ring + program_id(1)`` of a group of heads, if it exists."""
    chunk = tl.load(FIRST_CHUNK + first_head) + turn * ring + tl.program_id(1)
    if chunk < tl.load(FIRST_CHUNK + last_head):
        info = CHUNKS + chunk * _CHUNK_FIELDS
        head, first, last = tl.load(info).to(tl.int64), tl.load(info + 1), tl.load(info + 2)
        s = first + tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
        inside = s < last
        to = head * tokens + s
        slot = tl.load(PLACE + to * 2, mask=inside, other=0)
        size = tl.load(PLACE + to * 2 + 1, mask=inside, other=0)
        d = tl.arange(0, D)
        dq = tl.zeros([QUERIES, D], tl.float32)
        for j in range(tl.max(size)):
            part = tl.load(
                PART + (slot + j)[:, None].to(tl.int64) * D + d[None, :], mask=(j < size)[:, None], other=0.0
            )
            dq += part.to(tl.float32)
        store = inside[:, None] & (d < HEAD_DIM)[None, :]
        tl.store(DQ + to[:, None] * HEAD_DIM + d[None, :], dq.to(DQ.dtype.element_ty), mask=store)


@triton.jit
def clear_masked(MASK, DK, DV, tokens, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    """Zeros for the keys that are masked out; the others are stored by their boxes."""
    head, sample = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    masked = (token < tokens) & (tl.load(MASK + sample * tokens + token, mask=token < tokens, other=1) == 0)
    d = tl.arange(0, D)
    to = ((sample * tl.num_programs(1) + head) * tokens + token)[:, None] * HEAD_DIM + d[None, :]
    store = masked[:, None] & (d < HEAD_DIM)[None, :]
    zero = tl.zeros([BLOCK, D], DK.dtype.element_ty)
    tl.store(DK + to, zero, mask=store)
    tl.store(DV + to, zero, mask=store)


def deltas(work: Work, dout: Tensor, out: Tensor, dlse: Tensor) -> Tensor:
    """What softmax takes off the gradient of each query's weights, float32 [B, H, S]."""
    batch, heads, tokens, head_dim = out.shape
    delta = work.empty(batch, heads, tokens, dtype=torch.float32)
    work.launch(
        multiply_rows, (batch * heads, triton.cdiv(tokens, 32)), dout, out, dlse, delta, *dout.stride()[:3], heads, tokens,
        HAS_DLSE=dlse.numel() > 0, ROWS=32, HEAD_DIM=head_dim, D=power_of_two(head_dim), num_warps=4,
    )  # fmt: skip
    return delta


def gradients(
    work: Work, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, words: Tensor, key_mask: Tensor, lse: Tensor, delta: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor, geometry: Geometry, scale: float,
    *, kernels: ModuleType, capacity: int, head_capacity: int, scratch: int,
) -> None:  # fmt: skip
    """Fill ``dq``, ``dk``, ``dv`` of one group of samples by ``kernels``; about ``scratch`` bytes of buffers."""
    batch, _, tokens, head_dim = q.shape
    dim, block = kernels.padded(head_dim), kernels.keys_per_block(q)
    head_capacity = min(head_capacity, tokens * geometry.num_key_boxes)
    row_bytes = dim * q.element_size()
    room = plan(
        q, k, geometry, block=block, dim=dim, row_bytes=row_bytes, head_capacity=head_capacity, scratch=scratch
    )  # fmt: skip
    lists = attend_lists.build(
        work, words, key_mask, geometry,
        capacity=capacity, head_capacity=head_capacity, chunk_pairs=room.chunk_pairs, ring=room.ring,
    )  # fmt: skip
    inputs = Inputs(q, k, v, dout, lse, delta, lists, geometry, scale, int(key_mask.numel() > 0))
    if inputs.masked:
        work.launch(
            clear_masked, (triton.cdiv(tokens, 64), k.shape[1], batch), key_mask.view(torch.uint8), dk, dv, tokens,
            BLOCK=64, HEAD_DIM=head_dim, D=power_of_two(head_dim), num_warps=4,
        )  # fmt: skip
    kernels.launch_keys(work, inputs, dk, dv)
    packed = PackedKeys(
        work, k, v, lists.keys, lists.span, geometry,
        block=block, dim=dim, together=room.together, describe=kernels.describe,
    )  # fmt: skip
    part = work.empty(room.ring * lists.slots, dim, dtype=q.dtype)
    for turn in turns(q, k, geometry, room, lists, packed, capacity=capacity, head_capacity=head_capacity):
        kernels.launch_queries(work, inputs, turn, packed, part)
        work.launch(
            add_up, (triton.cdiv(tokens, QUERIES), turn.ring), part, lists.place, lists.chunks, lists.first_chunk, dq,
            turn.first, turn.last, turn.number, turn.ring, tokens,
            QUERIES=QUERIES, HEAD_DIM=head_dim, D=dim, num_warps=1,
        )  # fmt: skip
    refuse_results(work, lists.totals, dq, None)
