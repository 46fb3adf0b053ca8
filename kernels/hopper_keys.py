"""Gradients of keys and values on Hopper, in Gluon: one block of keys of one box meets every query that selected it.

Two warpgroups hold 64 keys each and sum their gradients in registers; a third gathers the queries, the gradients of the
output, the log-sum-exps and the deltas, some steps ahead. Scores lie keys by queries, so that weights and gradients of
scores are already the left operands of the sums, and -delta is where the product of values and gradients begins.
arXiv 2506.23858, section 3.1.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .attend_lists import RANK_BITS
from .hopper_attend import operand
from .hopper_sync import release, thread_barrier
from .triton_tools import LOG2E

PARTS = 2  # warpgroups
PART_KEYS = 64  # of each
QUERIES = 64  # per step

_PARTS = gl.constexpr(PARTS)
_PART = gl.constexpr(PART_KEYS)
_QUERIES = gl.constexpr(QUERIES)
_RANK_BITS = gl.constexpr(RANK_BITS)
_LOG2E = gl.constexpr(LOG2E)


@gluon.jit
def read_queries(ENTRIES, begin, count, first, at):
    """Tokens of the queries ``first + at`` of a list; 0 behind its end."""
    return gl.load(ENTRIES + begin + first + at, mask=first + at < count, other=0) >> _RANK_BITS


@gluon.jit
def number_of_queries(count_from, head):
    """That selected the box; none where the lists had no room for all."""
    TOTAL, box, boxes, fits = count_from
    return gl.where(fits, gl.load(TOTAL + head * (boxes + 1) + box), 0)


@gluon.jit
def gather(query_from, list_from, count_from, shared, kv_head, of_sample, group, D: gl.constexpr, STAGES: gl.constexpr):
    """Rows of all queries that selected the box, ``QUERIES`` at a time; zeros and weightless behind the last."""
    Q, DOUT, LSE, DELTA, q_token, o_token, q_head, o_head, tokens, head_dim = query_from
    ENTRIES, START = list_from
    _, box, boxes, _ = count_from
    queries, douts, numbers, full, empty = shared
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    rows = gl.arange(0, _QUERIES, gl.SliceLayout(1, COPY))
    d = gl.arange(0, D, gl.SliceLayout(0, COPY))
    flat = gl.arange(0, _QUERIES, gl.BlockedLayout([1], [32], [4], [0]))
    i = 0
    for member in range(group):
        head = kv_head * group + member
        begin = gl.load(START + head * boxes + box)
        count = number_of_queries(count_from, head)
        of_query = (of_sample * group + member).to(gl.int64)
        q_from, o_from = Q + of_query * (q_head.to(gl.int64) * 8), DOUT + of_query * (o_head.to(gl.int64) * 8)
        number_of = head.to(gl.int64) * tokens
        s, flat_s = read_queries(ENTRIES, begin, count, 0, rows), read_queries(ENTRIES, begin, count, 0, flat)
        for first in range(0, count, _QUERIES):
            stage = i % STAGES
            mbarrier.wait(empty.index(stage), ((i // STAGES) & 1) ^ 1)
            inside = (first + rows < count)[:, None] & (d < head_dim * 8)[None, :]
            from_q = (s * (q_token * 8).to(gl.int32))[:, None] + d[None, :]
            async_copy.async_copy_global_to_shared(queries.index(stage), q_from + from_q, mask=inside)
            from_o = (s * (o_token * 8).to(gl.int32))[:, None] + d[None, :]
            async_copy.async_copy_global_to_shared(douts.index(stage), o_from + from_o, mask=inside)
            async_copy.commit_group()
            listed = first + flat < count
            lse = gl.load(LSE + number_of + flat_s, mask=listed, other=float("inf")) * _LOG2E
            delta = gl.load(DELTA + number_of + flat_s, mask=listed, other=0.0)
            s = read_queries(ENTRIES, begin, count, first + _QUERIES, rows)
            flat_s = read_queries(ENTRIES, begin, count, first + _QUERIES, flat)
            numbers.index(2 * stage).store(lse)
            numbers.index(2 * stage + 1).store(-delta)
            if i > 0:
                async_copy.wait_group(1)
                fence_async_shared()
                release(full.index((i - 1) % STAGES))
            i += 1
    async_copy.wait_group(0)
    fence_async_shared()
    if i > 0:
        release(full.index((i - 1) % STAGES))


@gluon.jit
def copy_keys(source, tokens_of, inside, token, head_dim, d, to):
    """Start copying the keys or values of one warpgroup; zeros behind the last of the box."""
    mask = inside[:, None] & (d < head_dim * 8)[None, :]
    offset = tokens_of.to(gl.int64) * (token * 8)
    async_copy.async_copy_global_to_shared(to, source + offset[:, None] + d[None, :], mask=mask)


@gluon.jit
def store_rows(gradient, through, source, offset, inside, head_dim, d, COPY: gl.constexpr):
    """Store [64, D] in the order of memory; shared memory turns what the tensor cores leave into whole rows."""
    through.store(gradient)
    thread_barrier()
    store = inside[:, None] & (d < head_dim * 8)[None, :]
    gl.store(source + offset[:, None] + d[None, :], through.load(COPY), mask=store)


@gluon.jit
def sum_gradients(
    INDEX: gl.constexpr, key_from, gradient_to, count_from, shared, keys, values, kv_head, group, first, size, scale,
    D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Keys ``64 * INDEX ... 64 * INDEX + 64`` of this program's block: keys ``first ... first + size`` of the list."""
    K, V, KEYS, k_token, v_token, tokens, head_dim = key_from
    DK, DV = gradient_to
    fits = count_from[3]
    queries, douts, numbers, full, empty = shared
    dtype: gl.constexpr = K.dtype.element_ty
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _QUERIES, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    COLUMNS: gl.constexpr = gl.SliceLayout(0, SCORES)
    rows = INDEX * _PART + gl.arange(0, _PART, gl.SliceLayout(1, COPY))
    d = gl.arange(0, D, gl.SliceLayout(0, COPY))
    inside = rows < size
    token = gl.load(KEYS + first + rows, mask=inside, other=0)
    k, v = keys.index(INDEX), values.index(INDEX)
    copy_keys(K, token, inside, k_token, head_dim, d, k)
    copy_keys(V, token, inside, v_token, head_dim, d, v)
    async_copy.commit_group()
    async_copy.wait_group(0)
    fence_async_shared()
    thread_barrier()
    zero = gl.full([_PART, _QUERIES], 0.0, gl.float32, SCORES)
    begin = gl.full([_PART, D], 0.0, gl.float32, OUT) + gl.where(fits, 0.0, float("nan"))
    dk, dv = begin, begin + 0.0
    i = 0
    for member in range(group):
        count = number_of_queries(count_from, kv_head * group + member)
        for _ in range(0, count, _QUERIES):
            stage = i % STAGES
            mbarrier.wait(full.index(stage), (i // STAGES) & 1)
            q, dout = queries.index(stage), douts.index(stage)
            start = zero + numbers.index(2 * stage + 1).load(COLUMNS)[None, :]
            scores_ = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
            dweights_ = warpgroup_mma(v, dout.permute((1, 0)), start, is_async=True)
            lse = numbers.index(2 * stage).load(COLUMNS)
            scores = warpgroup_mma_wait(1, deps=[scores_])
            weights = operand(gl.exp2(scores * scale - lse[None, :]), OUT, dtype)
            dv_ = warpgroup_mma(weights, dout, dv, is_async=True)
            dweights, weights = warpgroup_mma_wait(1, deps=[dweights_, weights])
            dscores = operand(gl.convert_layout(weights, SCORES).to(gl.float32) * dweights, OUT, dtype)
            dk_ = warpgroup_mma(dscores, q, dk, is_async=True)
            dv, dk, weights, dscores = warpgroup_mma_wait(0, deps=[dv_, dk_, weights, dscores])
            release(empty.index(stage))
            i += 1
    # All of this once more: what is kept over the loop is missing in it.
    rows = INDEX * _PART + gl.arange(0, _PART, gl.SliceLayout(1, COPY))
    inside = rows < size
    token = gl.load(KEYS + first + rows, mask=inside, other=0)
    offset = (kv_head.to(gl.int64) * tokens + token) * (head_dim * 8)
    thread_barrier()
    store_rows((dk * (scale / _LOG2E)).to(dtype), k, DK, offset, inside, head_dim, d, COPY)
    store_rows(dv.to(dtype), v, DV, offset, inside, head_dim, d, COPY)


_SIZES = [
    "q_batch", "q_head", "q_token", "k_batch", "k_head", "k_token", "v_batch", "v_head", "v_token", "o_batch", "o_head",
    "o_token", "head_dim", "heads", "group", "tokens", "boxes", "blocks", "masked",
]  # fmt: skip


@gluon.jit(do_not_specialize=_SIZES)
def hopper_gradients_of_keys(
    Q, K, V, DOUT, LSE, DELTA, KEYS, SPAN, ENTRIES, START, TOTAL, TOTALS, DK, DV,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, o_batch, o_head, o_token,
    head_dim, heads, group, tokens, boxes, blocks, masked, scale,
    D: gl.constexpr, STAGES: gl.constexpr, SUM_REGISTERS: gl.constexpr, GATHER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Strides and ``head_dim`` come in units of 8 elements, so that copies are known to be 16 bytes wide.

    The last box comes first: it may hold condition tokens, which every query selects.
    """
    dtype: gl.constexpr = Q.dtype.element_ty
    box, block = boxes - 1 - gl.program_id(0) // blocks, gl.program_id(0) % blocks
    kv_head = gl.program_id(1)
    kv_heads = heads // group
    sample, of_sample = (kv_head // kv_heads).to(gl.int64), kv_head % kv_heads
    span = SPAN + (sample * masked * boxes + box) * 2
    size = gl.load(span + 1) - block * (_PARTS * _PART)
    if size > 0:
        SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
        queries = gl.allocate_shared_memory(dtype, [STAGES, _QUERIES, D], SHARED)
        douts = gl.allocate_shared_memory(dtype, [STAGES, _QUERIES, D], SHARED)
        keys = gl.allocate_shared_memory(dtype, [_PARTS, _PART, D], SHARED)
        values = gl.allocate_shared_memory(dtype, [_PARTS, _PART, D], SHARED)
        numbers = gl.allocate_shared_memory(gl.float32, [2 * STAGES, _QUERIES], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(STAGES):
            mbarrier.init(full.index(i), count=1)
            mbarrier.init(empty.index(i), count=_PARTS)
        # Compile-time constants stay out of the tuples, in which they would become tensors.
        fits = gl.load(TOTALS + 2) == 0  # else the lists are empty, and the result is NaN
        first = gl.load(span) + block * (_PARTS * _PART)
        of_key = of_sample.to(gl.int64)
        query_from = (
            Q + sample * (q_batch.to(gl.int64) * 8), DOUT + sample * (o_batch.to(gl.int64) * 8), LSE, DELTA,
            q_token, o_token, q_head, o_head, tokens, head_dim,
        )  # fmt: skip
        list_from = (ENTRIES, START)
        count_from = (TOTAL, box, boxes, fits)
        shared = (queries, douts, numbers, full, empty)
        key_from = (
            K + sample * (k_batch.to(gl.int64) * 8) + of_key * (k_head.to(gl.int64) * 8),
            V + sample * (v_batch.to(gl.int64) * 8) + of_key * (v_head.to(gl.int64) * 8),
            KEYS + sample * masked * tokens, k_token.to(gl.int64), v_token.to(gl.int64), tokens, head_dim,
        )  # fmt: skip
        to = (DK, DV)
        gl.warp_specialize(
            [
                (sum_gradients, (0, key_from, to, count_from, shared, keys, values, kv_head, group, first, size, scale, D,
                                 STAGES)),
                (sum_gradients, (1, key_from, to, count_from, shared, keys, values, kv_head, group, first, size, scale, D,
                                 STAGES)),
                (gather, (query_from, list_from, count_from, shared, kv_head, of_sample, group, D, STAGES)),
            ],
            [4, 4],
            [SUM_REGISTERS, GATHER_REGISTERS],
        )  # fmt: skip
