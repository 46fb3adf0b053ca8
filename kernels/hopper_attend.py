"""Two warpgroups of the kernel for Hopper: 64 queries each, through one block of keys after the other, in Gluon.

The scores of a block are computed, and turned into weights, while the previous block's values are summed, across the
border between two tiles as well: each step of the innermost loop takes the next block's keys and this block's values, so
that the loop is all there is to keep in the instruction cache. Queries, and the places of their partial results, are
copied two tiles ahead; the fields of a tile four.

Weights are relative to the largest score of the tile's first block, wherever the later ones go: floating point has room
for weights of 2**60, and neither a maximum nor a new factor is needed in each step, a sixth of the loop. A query whose
weights add up to more marks the whole call, which is then done again with a peak that follows the scores (``STEADY``
false), as it always is in float16.
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

from .attend_lists import RANK_BITS, TILE, TILE_FIELDS
from .hopper_sync import add, maximum, pin, release, sleep, thread_barrier

PARTS = 2  # warpgroups
PART_QUERIES = TILE // PARTS  # of each
LIMIT = 2.0**60  # of a query's weights in a tile, relative to its first block's peak
INFOS = 4  # tiles whose fields are in shared memory

_RANK_BITS = gl.constexpr(RANK_BITS)
_RANK_MASK = gl.constexpr(2**RANK_BITS - 1)
_TILE_FIELDS = gl.constexpr(TILE_FIELDS)
_LIMIT = gl.constexpr(LIMIT)
_INFOS = gl.constexpr(INFOS)
_NONE = gl.constexpr(float("-inf"))
_PART = gl.constexpr(PART_QUERIES)


@gluon.jit
def by_thread(x):
    """x [64, BLOCK] as [64, 4, BLOCK / 32, 4, 2]; what one thread holds of a row lies along axes 1, 2 and 4.

    To reduce one of them after the other makes short chains of dependent instructions, where the whole row would be one.
    """
    return x.reshape([x.shape[0], 4, x.shape[1] // 32, 4, 2])


@gluon.jit
def row_maximum(x):
    """The largest of each row of x [64, BLOCK]."""
    of_thread = gl.reduce(gl.reduce(gl.reduce(by_thread(x), 1, maximum), 1, maximum), 2, maximum)
    return gl.reduce(of_thread, 1, maximum)


@gluon.jit
def row_sums(x):
    """Sums of x [64, BLOCK] over the columns of each of the four threads that share a row, [64, 4]."""
    return gl.reduce(gl.reduce(gl.reduce(by_thread(x), 1, add), 1, add), 2, add)


@gluon.jit
def softmax_step(
    scores, peak, total, scale, first, SCORES: gl.constexpr, OUT: gl.constexpr, STEADY: gl.constexpr
):  # fmt: skip
    """Scores [64, BLOCK] to weights, peak [64] and totals [64, 4], and the factor for what was summed before.

    ``first``: of a tile. If STEADY, the peak of its first block serves for all of it, and there is no factor.
    """
    decay = gl.full(peak.shape, 1.0, gl.float32, peak.type.layout)
    total = gl.where(first, 0.0, total)
    if STEADY:
        if first:
            peak = gl.convert_layout(row_maximum(scores), gl.SliceLayout(1, OUT)) * scale
    else:
        before = gl.where(first, _NONE, peak)
        peak = gl.maximum(before, gl.convert_layout(row_maximum(scores), gl.SliceLayout(1, OUT)) * scale)
        decay = gl.exp2(before - peak)
        total = total * gl.convert_layout(decay, gl.SliceLayout(1, total.type.layout))[:, None]
    weights = gl.exp2(scores * scale - gl.convert_layout(peak, gl.SliceLayout(1, SCORES))[:, None])
    return weights, peak, total + row_sums(weights), decay


@gluon.jit
def operand(weights, OUT: gl.constexpr, dtype: gl.constexpr):
    return gl.convert_layout(weights.to(dtype), gl.DotOperandLayout(0, OUT, 2))


@gluon.jit
def mask_keys(scores, left, BLOCK: gl.constexpr, SCORES: gl.constexpr):
    key = gl.arange(0, BLOCK, gl.SliceLayout(0, SCORES))
    return gl.where((key < left)[None, :], scores, _NONE)


@gluon.jit
def copy_info(TILES, tile, infos, INDEX: gl.constexpr, n):
    """Start copying the fields of the n-th tile of this program."""
    at = gl.arange(0, _TILE_FIELDS, gl.BlockedLayout([1], [32], [4], [0]))
    async_copy.async_copy_global_to_shared(infos.index(INDEX * _INFOS + n % _INFOS), TILES + _TILE_FIELDS * tile + at)


@gluon.jit
def info(infos, INDEX: gl.constexpr, n, FIELD: gl.constexpr):
    """A field of the n-th tile of this program."""
    ONE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    fields = infos._reinterpret(gl.int32, [infos.shape[0] * _TILE_FIELDS, 1], ONE)
    field = fields.index((INDEX * _INFOS + n % _INFOS) * _TILE_FIELDS + FIELD)
    return gl.reduce(field.load(gl.BlockedLayout([1], [32], [4], [0])), 0, add)


@gluon.jit
def read_entries(ENTRIES, infos, INDEX: gl.constexpr, n, rows):
    at = info(infos, INDEX, n, 1) + INDEX * _PART + rows
    return gl.load(ENTRIES + at, mask=at < info(infos, INDEX, n, 2), other=0)


@gluon.jit
def gather_queries(gather_from, infos, INDEX: gl.constexpr, n, entries, flat_entries, rows, d, to, places, ranks):
    """Start copying the queries of one warpgroup and the places of their partials. Offsets in a head fit in 32 bits."""
    Q, PLACE, q_batch, q_head, q_token, head_dim, heads, tokens = gather_from
    head, sample = info(infos, INDEX, n, 0), info(infos, INDEX, n, 7)
    base = (
        Q
        + sample.to(gl.int64) * (q_batch.to(gl.int64) * 8)
        + (head - sample * heads).to(gl.int64) * (q_head.to(gl.int64) * 8)
    )
    offset = ((entries >> _RANK_BITS) * (q_token * 8).to(gl.int32))[:, None] + d[None, :]
    inside = (rows >= 0)[:, None] & (d < head_dim * 8)[None, :]
    async_copy.async_copy_global_to_shared(to, base + offset, mask=inside)
    place = PLACE + head.to(gl.int64) * (tokens * 2) + (flat_entries >> _RANK_BITS) * 2
    async_copy.async_copy_global_to_shared(places, place)
    ranks.store((flat_entries & _RANK_MASK).to(gl.int16))


@gluon.jit
def attend(
    INDEX: gl.constexpr, gather_from, memory, shared, numbers, scale,
    BLOCK: gl.constexpr, SLOTS: gl.constexpr, D: gl.constexpr, STEADY: gl.constexpr,
):  # fmt: skip
    """Queries ``64 * INDEX ... 64 * INDEX + 64`` of every tile of this program."""
    ENTRIES, TILES, PART, PART_LSE, MERGED, UNSTEADY = memory
    queries, places, ranks, infos, keys, values, full_k, full_v, empty, done, told = shared
    num_tiles, servers, buffers = numbers
    dtype: gl.constexpr = PART.dtype.element_ty
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    rows = gl.arange(0, _PART, gl.SliceLayout(1, COPY))
    out_rows = gl.arange(0, _PART, gl.SliceLayout(1, OUT))
    flat = gl.arange(0, _PART, gl.BlockedLayout([1], [32], [4], [0]))
    d = gl.arange(0, D, gl.SliceLayout(0, COPY))
    zero = gl.full([_PART, BLOCK], 0.0, gl.float32, SCORES)
    step = gl.num_programs(0)
    t = gl.program_id(0)
    if t < num_tiles:
        for n in gl.static_range(_INFOS):
            copy_info(TILES, gl.minimum(t + n * step, num_tiles - 1), infos, INDEX, n)
        async_copy.commit_group()
        async_copy.wait_group(0)
        thread_barrier()
        for n in gl.static_range(2):
            e = read_entries(ENTRIES, infos, INDEX, n, rows)
            flat_e = read_entries(ENTRIES, infos, INDEX, n, flat)
            at = 2 * n + INDEX
            gather_queries(
                gather_from, infos, INDEX, n, e, flat_e, rows, d, queries.index(at), places.index(at), ranks.index(at)
            )
            async_copy.commit_group()
        async_copy.wait_group(1)
        fence_async_shared()
        thread_barrier()
        mbarrier.wait(full_k.index(0), 0)
        scores = warpgroup_mma(queries.index(INDEX), keys.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=[scores])
        release(empty.index(0))
        scores = mask_keys(scores, info(infos, INDEX, 0, 4), BLOCK, SCORES)
        peak = gl.full([_PART], _NONE, gl.float32, gl.SliceLayout(1, OUT))
        total = row_sums(zero)
        weights, peak, total, decay = softmax_step(scores, peak, total, scale, True, SCORES, OUT, False)
        p = operand(weights, OUT, dtype)
        acc = gl.full([_PART, D], 0.0, gl.float32, OUT)
        i = 1  # counts steps: keys of block i, values of block i - 1
        seen = -1
        n = 0
        for tile in range(t, num_tiles, step):
            q = queries.index(n % 2 * 2 + INDEX)
            size, next_size = info(infos, INDEX, n, 4), info(infos, INDEX, n + 1, 4)
            blocks = (size + BLOCK - 1) // BLOCK
            e = read_entries(ENTRIES, infos, INDEX, n + 2, rows)
            flat_e = read_entries(ENTRIES, infos, INDEX, n + 2, flat)
            # Not ``peak, total``: Triton would take both for constants of the loop, since it begins by assigning those.
            tile_peak, tile_total = gl.zeros_like(peak), gl.zeros_like(total)
            for block in range(1, blocks + 1):
                last = block == blocks  # the next block is the first of the next tile
                if last:
                    async_copy.wait_group(0)
                    fence_async_shared()
                    thread_barrier()
                at_k, at_v = i & (SLOTS - 1), (i - 1) & (SLOTS - 1)
                mbarrier.wait(full_k.index(at_k), (i // SLOTS) & 1)
                other = queries.index((n + last.to(gl.int32)) % 2 * 2 + INDEX)
                scores_ = warpgroup_mma(other, keys.index(at_k).permute((1, 0)), zero, use_acc=False, is_async=True)
                mbarrier.wait(full_v.index(at_v), ((i - 1) // SLOTS) & 1)
                acc_ = warpgroup_mma(p, values.index(at_v), acc, use_acc=block > 1, is_async=True)
                scores1 = warpgroup_mma_wait(1, deps=[scores_])
                left = gl.where(last, next_size, size - block * BLOCK)
                if left < BLOCK:
                    scores1 = mask_keys(scores1, left, BLOCK, SCORES)
                tile_peak, tile_total = peak, total
                weights, peak, total, decay = softmax_step(scores1, peak, total, scale, last, SCORES, OUT, STEADY)
                total = pin(total)
                acc, p, weights, total = warpgroup_mma_wait(0, deps=[acc_, p, weights, total])
                release(empty.index(at_k))
                i += 1
                if not STEADY:
                    acc = acc * gl.where(last, 1.0, decay)[:, None]
                p = operand(weights, OUT, dtype)
            whole = gl.convert_layout(gl.reduce(tile_total, 1, add), gl.SliceLayout(1, OUT))
            q.store((acc * (1.0 / whole)[:, None]).to(dtype))
            thread_barrier()
            result = q.load(COPY)
            place, rank = places.index(n % 2 * 2 + INDEX), ranks.index(n % 2 * 2 + INDEX)
            slot = place.load(gl.SliceLayout(1, COPY)) + rank.load(gl.SliceLayout(1, COPY)).to(gl.int32)
            lse_slot = place.load(gl.SliceLayout(1, OUT)) + rank.load(gl.SliceLayout(1, OUT)).to(gl.int32)
            first, last_entry, chunk = info(infos, INDEX, n, 1), info(infos, INDEX, n, 2), info(infos, INDEX, n, 5)
            thread_barrier()
            gather_queries(gather_from, infos, INDEX, n + 2, e, flat_e, rows, d, q, place, rank)
            copy_info(TILES, gl.minimum(tile + _INFOS * step, num_tiles - 1), infos, INDEX, n)
            async_copy.commit_group()
            if chunk != seen:
                if chunk >= buffers:
                    while gl.load(MERGED + chunk - buffers, volatile=True) < servers:
                        sleep()
                seen = chunk
            inside = first + INDEX * _PART + rows < last_entry
            gl.store(PART + (slot[:, None] * D + d[None, :]), result, mask=inside[:, None])
            lse_inside = first + INDEX * _PART + out_rows < last_entry
            gl.store(PART_LSE + lse_slot, tile_peak + gl.log2(whole), mask=lse_inside)
            if STEADY:
                gl.store(UNSTEADY + out_rows * 0, out_rows * 0 + 1, mask=lse_inside & (whole >= _LIMIT))
            mbarrier.wait(told.index(n % 2), ((n // 2) & 1) ^ 1)
            release(done.index(n % 2))
            n += 1  # noqa: SIM113 - Gluon has no enumerate
        async_copy.wait_group(0)
