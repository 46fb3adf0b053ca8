"""Two warpgroups of the kernel for Hopper: 64 queries each, through one block of keys after the other, in Gluon.

The scores of a block are computed while the previous block's values are summed, across the border between two tiles as
well. The ragged block of a box is taken first, so that only one block of a tile is masked. Queries, and the places of
their partial results, are copied two tiles ahead. Entries of a list and places are read long before they are needed.
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

_RANK_BITS = gl.constexpr(RANK_BITS)
_RANK_MASK = gl.constexpr(2**RANK_BITS - 1)
_TILE_FIELDS = gl.constexpr(TILE_FIELDS)
_NONE = gl.constexpr(float("-inf"))
_PART = gl.constexpr(PART_QUERIES)


@gluon.jit
def softmax_step(
    scores, peak, total, scale, left, BLOCK: gl.constexpr, MASKED: gl.constexpr, SCORES: gl.constexpr,
    OUT: gl.constexpr, dtype: gl.constexpr,
):  # fmt: skip
    """Scores [64, BLOCK] of a block to weights, new peak and total, and the factor for what was summed before."""
    if MASKED:
        key = gl.arange(0, BLOCK, gl.SliceLayout(0, SCORES))
        scores = gl.where((key < left)[None, :], scores, _NONE)
    highest = gl.convert_layout(gl.reduce(scores, 1, maximum), gl.SliceLayout(1, OUT))
    new = gl.maximum(peak, highest * scale)
    weights = gl.exp2(scores * scale - gl.convert_layout(new, gl.SliceLayout(1, SCORES))[:, None])
    decay = gl.exp2(peak - new)
    total = total * decay + gl.convert_layout(gl.reduce(weights, 1, add), gl.SliceLayout(1, OUT))
    return gl.convert_layout(weights.to(dtype), gl.DotOperandLayout(0, OUT, 2)), new, total, decay


@gluon.jit
def read_tile(TILES, t):
    info = TILES + _TILE_FIELDS * t
    sample = gl.load(info + 7)
    return gl.load(info), sample, gl.load(info + 1), gl.load(info + 2), gl.load(info + 4), gl.load(info + 5)


@gluon.jit
def read_entries(ENTRIES, first, last, INDEX: gl.constexpr, rows):
    at = first + INDEX * _PART + rows
    return gl.load(ENTRIES + at, mask=at < last, other=0)


@gluon.jit
def gather_queries(
    Q, PLACE, head, sample, entries, flat_entries, heads, tokens, q_batch, q_head, q_token, head_dim, rows, d, to, places,
    ranks,
):  # fmt: skip
    """Start copying the queries of one warpgroup and the places of their partials. Offsets in a head fit in 32 bits."""
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
    async_copy.commit_group()


@gluon.jit
def attend(
    INDEX: gl.constexpr, memory, shared, q_strides, numbers, scale,
    BLOCK: gl.constexpr, SLOTS: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Queries ``64 * INDEX ... 64 * INDEX + 64`` of every tile of this program."""
    Q, ENTRIES, PLACE, TILES, PART, PART_LSE, MERGED = memory
    queries, places, ranks, ring, full, empty, done, told = shared
    q_batch, q_head, q_token = q_strides
    head_dim, heads, group, tokens, num_tiles, servers, buffers = numbers
    dtype: gl.constexpr = Q.dtype.element_ty
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
        head, sample, first, last, size, chunk = read_tile(TILES, t)
        e = read_entries(ENTRIES, first, last, INDEX, rows)
        flat_e = read_entries(ENTRIES, first, last, INDEX, flat)
        gather_queries(Q, PLACE, head, sample, e, flat_e, heads, tokens, q_batch, q_head, q_token, head_dim, rows, d,
                       queries.index(INDEX), places.index(INDEX), ranks.index(INDEX))  # fmt: skip
        head1, sample1, first1, last1, size1, chunk1 = read_tile(TILES, gl.minimum(t + step, num_tiles - 1))
        e = read_entries(ENTRIES, first1, last1, INDEX, rows)
        flat_e = read_entries(ENTRIES, first1, last1, INDEX, flat)
        gather_queries(Q, PLACE, head1, sample1, e, flat_e, heads, tokens, q_batch, q_head, q_token, head_dim, rows, d,
                       queries.index(2 + INDEX), places.index(2 + INDEX), ranks.index(2 + INDEX))  # fmt: skip
        head2, sample2, first2, last2, size2, chunk2 = read_tile(TILES, gl.minimum(t + 2 * step, num_tiles - 1))
        async_copy.wait_group(1)
        fence_async_shared()
        thread_barrier()
        mbarrier.wait(full.index(0), 0)
        scores = warpgroup_mma(queries.index(INDEX), ring.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=[scores])
        release(empty.index(0))
        i = 1
        buffer = 0
        seen = -1
        n = 0
        kv_head = head // group
        for tile in range(t, num_tiles, step):
            q = queries.index(buffer * 2 + INDEX)
            q_next = queries.index((1 - buffer) * 2 + INDEX)
            blocks = (size + BLOCK - 1) // BLOCK
            peak = gl.full([_PART], _NONE, gl.float32, gl.SliceLayout(1, OUT))
            total = gl.full([_PART], 0.0, gl.float32, gl.SliceLayout(1, OUT))
            acc = gl.full([_PART, D], 0.0, gl.float32, OUT)
            left = size - (blocks - 1) * BLOCK
            p, peak, total, decay = softmax_step(scores, peak, total, scale, left, BLOCK, True, SCORES, OUT, dtype)
            e = read_entries(ENTRIES, first2, last2, INDEX, rows)
            flat_e = read_entries(ENTRIES, first2, last2, INDEX, flat)
            for _ in range(1, blocks):
                at_k, at_v = i % SLOTS, (i + 1) % SLOTS
                mbarrier.wait(full.index(at_k), (i // SLOTS) & 1)
                scores_ = warpgroup_mma(q, ring.index(at_k).permute((1, 0)), zero, use_acc=False, is_async=True)
                mbarrier.wait(full.index(at_v), ((i + 1) // SLOTS) & 1)
                acc_ = warpgroup_mma(p, ring.index(at_v), acc, is_async=True)
                scores1 = warpgroup_mma_wait(1, deps=[scores_])
                release(empty.index(at_k))
                p1, peak, total, decay = softmax_step(
                    scores1, peak, total, scale, BLOCK, BLOCK, False, SCORES, OUT, dtype
                )
                total = pin(total)
                acc, p, p1, total = warpgroup_mma_wait(0, deps=[acc_, p, p1, total])
                release(empty.index(at_v))
                i += 2
                acc = acc * decay[:, None]
                p = p1
            async_copy.wait_group(0)
            fence_async_shared()
            thread_barrier()
            at_v, at_k = i % SLOTS, (i + 1) % SLOTS
            mbarrier.wait(full.index(at_v), (i // SLOTS) & 1)
            acc_ = warpgroup_mma(p, ring.index(at_v), acc, is_async=True)
            mbarrier.wait(full.index(at_k), ((i + 1) // SLOTS) & 1)  # behind the last tile: its own first block again
            scores_ = warpgroup_mma(q_next, ring.index(at_k).permute((1, 0)), zero, use_acc=False, is_async=True)
            acc, p = warpgroup_mma_wait(1, deps=[acc_, p])
            release(empty.index(at_v))
            acc = acc * (1.0 / total)[:, None]
            q.store(acc.to(dtype))
            thread_barrier()
            result = q.load(COPY)
            place, rank = places.index(buffer * 2 + INDEX), ranks.index(buffer * 2 + INDEX)
            slot = place.load(gl.SliceLayout(1, COPY)) + rank.load(gl.SliceLayout(1, COPY)).to(gl.int32)
            lse_slot = place.load(gl.SliceLayout(1, OUT)) + rank.load(gl.SliceLayout(1, OUT)).to(gl.int32)
            thread_barrier()
            gather_queries(Q, PLACE, head2, sample2, e, flat_e, heads, tokens, q_batch, q_head, q_token, head_dim, rows, d,
                           q, place, rank)  # fmt: skip
            if chunk != seen:
                if chunk >= buffers:
                    while gl.load(MERGED + chunk - buffers, volatile=True) < servers:
                        sleep()
                seen = chunk
            inside = first + INDEX * _PART + rows < last
            gl.store(PART + (slot[:, None] * D + d[None, :]), result, mask=inside[:, None])
            lse_inside = first + INDEX * _PART + out_rows < last
            gl.store(PART_LSE + lse_slot, peak + gl.log2(total), mask=lse_inside)
            mbarrier.wait(told.index(n % 2), ((n // 2) & 1) ^ 1)
            release(done.index(n % 2))
            n += 1  # noqa: SIM113 - Gluon has no enumerate
            head, first, last, size, chunk = head1, first1, last1, size1, chunk1
            head1, first1, last1, size1, chunk1 = head2, first2, last2, size2, chunk2
            head2, sample2, first2, last2, size2, chunk2 = read_tile(TILES, gl.minimum(tile + 3 * step, num_tiles - 1))
            scores = warpgroup_mma_wait(0, deps=[scores_])
            release(empty.index(at_k))
            i += 2
            before, kv_head = kv_head, head // group
            if (tile + step < num_tiles) & (kv_head > before + 1):  # those were not its keys, see feed
                at_k = i % SLOTS
                mbarrier.wait(full.index(at_k), (i // SLOTS) & 1)
                scores = warpgroup_mma(q_next, ring.index(at_k).permute((1, 0)), zero, use_acc=False, is_async=True)
                scores = warpgroup_mma_wait(0, deps=[scores])
                release(empty.index(at_k))
                i += 1
            buffer = 1 - buffer
        async_copy.wait_group(0)
