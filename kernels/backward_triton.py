"""Gradients of attention to the selected boxes, in portable Triton.

Keys and values: one program takes a block of keys of one box through the list of all queries that selected it, head after
head of a group, so that each gradient is summed by one program: no atomics, the same bits every time. Queries: the same
tiles as in the forward, each of which leaves partial gradients. Weights come again from the log-sum-exps.
arXiv 2506.23858, section 3.1.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .attend_lists import CHUNK_FIELDS, RANK_BITS, TILE, TILE_FIELDS
from .attend_pack import PackedKeys
from .attend_triton import padded, reads_shared_operands
from .backward_inputs import Inputs
from .launches import Work
from .triton_tools import LOG2E, power_of_two
from .turns import Turn

_RANK_BITS = tl.constexpr(RANK_BITS)
_RANK_MASK = tl.constexpr(2**RANK_BITS - 1)
_TILE_FIELDS = tl.constexpr(TILE_FIELDS)
_CHUNK_FIELDS = tl.constexpr(CHUNK_FIELDS)
_LOG2E = tl.constexpr(LOG2E)

# (bytes of an element, padded head size) -> queries and keys per step, warps, stages; smaller heads take the entry of 64.
_FLOAT32_KEYS = {(4, 64): (16, 32, 4, 1), (4, 128): (32, 32, 8, 1), (4, 256): (16, 32, 8, 1)}
_FLOAT32_QUERIES = {(4, 64): (16, 16, 4, 1), (4, 128): (16, 16, 8, 1), (4, 256): (16, 16, 8, 1)}


class Shapes(NamedTuple):
    """Of the two kernels."""

    keys: dict[tuple[int, int], tuple[int, int, int, int]]
    queries: dict[tuple[int, int], tuple[int, int, int, int]]


# Tensor cores that read shared memory, and all others: see attend_triton.
SHARED_OPERANDS = Shapes(
    {(2, 64): (64, 64, 4, 2), (2, 128): (64, 128, 8, 3), (2, 256): (32, 32, 4, 1), **_FLOAT32_KEYS},
    {(2, 64): (128, 64, 4, 2), (2, 128): (128, 64, 8, 3), (2, 256): (128, 32, 8, 1), **_FLOAT32_QUERIES},
)
REGISTER_OPERANDS = Shapes(
    {(2, 64): (64, 64, 4, 2), (2, 128): (64, 64, 4, 2), (2, 256): (32, 32, 4, 1), **_FLOAT32_KEYS},
    {(2, 64): (128, 32, 8, 2), (2, 128): (64, 32, 8, 2), (2, 256): (32, 16, 8, 1), **_FLOAT32_QUERIES},
)

_SIZES = ["heads", "group", "tokens", "boxes", "blocks", "masked"]


@triton.jit(do_not_specialize=_SIZES)
def gradients_of_keys(
    Q, K, V, DOUT, LSE, DELTA, KEYS, SPAN, ENTRIES, START, TOTAL, TOTALS, DK, DV,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, o_batch, o_head, o_token,
    scale, heads, group, tokens, boxes, blocks, masked,
    QUERIES: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One block of keys of one box, for all queries that selected it."""
    box, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    kv_head = tl.program_id(1).to(tl.int64)
    kv_heads = heads // group
    sample, of_sample = kv_head // kv_heads, kv_head % kv_heads
    span = SPAN + (sample * masked * boxes + box) * 2
    first, size = tl.load(span), tl.load(span + 1)
    if block * BLOCK < size:
        d = tl.arange(0, D)
        of_head = (d < HEAD_DIM)[None, :]
        r = block * BLOCK + tl.arange(0, BLOCK)
        token = tl.load(KEYS + sample * masked * tokens + first + r, mask=r < size, other=0).to(tl.int64)
        read = (r < size)[:, None] & of_head
        k = tl.load(
            K + sample * k_batch + of_sample * k_head + token[:, None] * k_token + d[None, :], mask=read, other=0.0
        )
        v = tl.load(
            V + sample * v_batch + of_sample * v_head + token[:, None] * v_token + d[None, :], mask=read, other=0.0
        )
        fits = tl.load(TOTALS + 2) == 0  # else the lists are empty, and the result is NaN
        dk = tl.zeros([BLOCK, D], tl.float32) + tl.where(fits, 0.0, float("nan"))
        dv = dk
        for member in range(group):
            head = kv_head * group + member
            of_query = of_sample * group + member
            begin = tl.load(START + head * boxes + box)
            count = tl.where(fits, tl.load(TOTAL + head * (boxes + 1) + box), 0)
            q_from = Q + sample * q_batch + of_query * q_head
            o_from = DOUT + sample * o_batch + of_query * o_head
            for i in tl.range(0, count, QUERIES, num_stages=STAGES):
                at = i + tl.arange(0, QUERIES)
                inside = at < count
                s = (tl.load(ENTRIES + begin + at, mask=inside, other=0) >> _RANK_BITS).to(tl.int64)
                rows = inside[:, None] & of_head
                q = tl.load(q_from + s[:, None] * q_token + d[None, :], mask=rows, other=0.0)  # [QUERIES, D]
                dout = tl.load(o_from + s[:, None] * o_token + d[None, :], mask=rows, other=0.0)
                lse = tl.load(LSE + head * tokens + s, mask=inside, other=float("inf")) * _LOG2E
                delta = tl.load(DELTA + head * tokens + s, mask=inside, other=0.0)
                scores = tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * _LOG2E)  # [BLOCK, QUERIES]
                weights = tl.exp2(scores - lse[None, :])
                dv = tl.dot(weights.to(dout.dtype), dout, dv, input_precision="ieee")
                dweights = tl.dot(v, tl.trans(dout), input_precision="ieee")
                dscores = weights * (dweights - delta[None, :])
                dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision="ieee")
        to = (kv_head * tokens + token)[:, None] * HEAD_DIM + d[None, :]
        tl.store(DK + to, (dk * scale).to(DK.dtype.element_ty), mask=read)
        tl.store(DV + to, dv.to(DV.dtype.element_ty), mask=read)


@triton.jit
def query_step(q, dout, lse, delta, dq, keys, values, row, left, scale, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """What one block of keys adds to the gradients of a tile of queries, but for the scale."""
    k, v = keys.load([row, 0]), values.load([row, 0])
    weights = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * _LOG2E) - lse[:, None])  # [ROWS, BLOCK]
    if MASKED:
        weights = tl.where(tl.arange(0, BLOCK)[None, :] < left, weights, 0.0)
    dscores = weights * (tl.dot(dout, tl.trans(v), input_precision="ieee") - delta[:, None])
    return tl.dot(dscores.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit(do_not_specialize=["first_head", "last_head", "turn", "ring", "heads", "group", "tokens", "packed_rows",
                               "stride"])  # fmt: skip
def gradients_of_queries(
    Q, DOUT, LSE, DELTA, keys, values, ENTRIES, PLACE, TILES, CHUNKS, FIRST_CHUNK, PART,
    q_batch, q_head, q_token, o_batch, o_head, o_token, scale,
    first_head, last_head, turn, ring, heads, group, tokens, packed_rows, stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Some queries of one tile of chunks ``turn * ring`` to ``turn * ring + ring`` of a group of heads."""
    chunk = tl.load(FIRST_CHUNK + first_head) + turn * ring
    end = tl.minimum(chunk + ring, tl.load(FIRST_CHUNK + last_head))
    if chunk < end:
        tile = tl.load(CHUNKS + chunk * _CHUNK_FIELDS + 3) + tl.program_id(0)
        if tile < tl.load(CHUNKS + (end - 1) * _CHUNK_FIELDS + 4):
            info = TILES + tile * _TILE_FIELDS
            head, first, last = tl.load(info).to(tl.int64), tl.load(info + 1), tl.load(info + 2)
            size, box = tl.load(info + 4), tl.load(info + 6)
            at = first + tl.program_id(1) * ROWS + tl.arange(0, ROWS)
            inside = at < last
            entry = tl.load(ENTRIES + at, mask=inside, other=0)
            s = (entry >> _RANK_BITS).to(tl.int64)
            slot = tl.load(PLACE + (head * tokens + s) * 2, mask=inside, other=0) + (entry & _RANK_MASK)
            d = tl.arange(0, D)
            rows = inside[:, None] & (d < HEAD_DIM)[None, :]
            q_from = Q + (head // heads) * q_batch + (head % heads) * q_head
            o_from = DOUT + (head // heads) * o_batch + (head % heads) * o_head
            q = tl.load(q_from + s[:, None] * q_token + d[None, :], mask=rows, other=0.0)  # [ROWS, D]
            dout = tl.load(o_from + s[:, None] * o_token + d[None, :], mask=rows, other=0.0)
            lse = tl.load(LSE + head * tokens + s, mask=inside, other=float("inf")) * _LOG2E
            delta = tl.load(DELTA + head * tokens + s, mask=inside, other=0.0)
            row = ((head - first_head) // group).to(tl.int32) * packed_rows + box * stride
            dq = tl.zeros([ROWS, D], tl.float32)
            whole = size // BLOCK
            for j in tl.range(0, whole, num_stages=STAGES):
                dq = query_step(q, dout, lse, delta, dq, keys, values, row + j * BLOCK, BLOCK, scale, BLOCK, False)
            if size > whole * BLOCK:
                left = size - whole * BLOCK
                dq = query_step(q, dout, lse, delta, dq, keys, values, row + whole * BLOCK, left, scale, BLOCK, True)
            part = (dq * scale).to(PART.dtype.element_ty)
            tl.store(PART + slot[:, None].to(tl.int64) * D + d[None, :], part, mask=inside[:, None])


def describe(x: Tensor, shape: list[int]) -> TensorDescriptor:
    """Blocks of ``x`` as :func:`gradients_of_queries` reads them."""
    return TensorDescriptor.from_tensor(x, shape)


def shapes(q: Tensor) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
    """Queries and keys per step, warps and stages of the kernel of keys and of the one of queries."""
    table = SHARED_OPERANDS if reads_shared_operands(q.device) else REGISTER_OPERANDS
    entry = q.element_size(), max(64, power_of_two(q.shape[-1]))
    return table.keys[entry], table.queries[entry]


def keys_per_block(q: Tensor) -> int:
    """Of the packed keys that :func:`gradients_of_queries` reads."""
    return shapes(q)[1][1]


def launch_keys(work: Work, inputs: Inputs, dk: Tensor, dv: Tensor) -> None:
    """Fill ``dk`` and ``dv``, but for masked keys."""
    q, k, v, dout, lse, delta, lists, geometry, scale, masked = inputs
    batch, heads, tokens, head_dim = q.shape
    (queries, keys, warps, stages), _ = shapes(q)
    boxes = geometry.num_key_boxes
    blocks = triton.cdiv(max(geometry.box_size, geometry.num_condition), keys)
    strides = [stride for x in (q, k, v, dout) for stride in x.stride()[:3]]
    work.launch(
        gradients_of_keys, (boxes * blocks, batch * k.shape[1]), q, k, v, dout, lse, delta, lists.keys, lists.span,
        lists.entries, lists.start, lists.total, lists.totals, dk, dv, *strides, scale, heads, inputs.group, tokens,
        boxes, blocks, masked, QUERIES=queries, BLOCK=keys, HEAD_DIM=head_dim, D=padded(head_dim),
        STAGES=stages, num_warps=warps,
    )  # fmt: skip


def launch_queries(work: Work, inputs: Inputs, turn: Turn, packed: PackedKeys, part: Tensor) -> None:
    """Partial gradients of the queries of one turn."""
    q, _, _, dout, lse, delta, lists, _, scale, _ = inputs
    _, (rows, block, warps, stages) = shapes(q)
    rows = min(rows, TILE)
    work.launch(
        gradients_of_queries, (turn.tiles, TILE // rows), q, dout, lse, delta, packed.keys, packed.values, lists.entries,
        lists.place, lists.tiles, lists.chunks, lists.first_chunk, part, *q.stride()[:3], *dout.stride()[:3], scale,
        turn.first, turn.last, turn.number, turn.ring, q.shape[1], inputs.group, q.shape[2], packed.rows, packed.stride,
        ROWS=rows, BLOCK=block, HEAD_DIM=q.shape[-1], D=part.shape[1], STAGES=stages, num_warps=warps,
    )  # fmt: skip
