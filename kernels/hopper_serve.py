"""Four helper warps of the kernel for Hopper, in Gluon: they feed keys and values, count tiles, pack and merge.

One warp copies blocks of keys and values with the copy engine. One counts finished tiles in global memory: each count
waits for a full memory fence, which would hold up those who attend. Two warps pack the keys and values of a head into box
order, two heads ahead, and merge the partial results of a chunk once its tiles are done.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, tma

from .attend_lists import CHUNK_FIELDS, TILE_FIELDS
from .hopper_sync import add, fence_async_global, maximum, thread_barrier, wait_until
from .triton_tools import LN2

WARPS = 2  # that pack and merge
ROWS = 16  # partial rows per step of a merging warp; attend_lists rounds the buffer to as many
DEPTH = 3  # steps that a merging warp keeps in flight
PACKED_ROWS = 8  # per step of a packing warp

_TILE_FIELDS = gl.constexpr(TILE_FIELDS)
_CHUNK_FIELDS = gl.constexpr(CHUNK_FIELDS)
_WARPS = gl.constexpr(WARPS)
_NONE = gl.constexpr(float("-inf"))
_ROWS = gl.constexpr(ROWS)
_PACKED_ROWS = gl.constexpr(PACKED_ROWS)
_DEPTH = gl.constexpr(DEPTH)


@gluon.jit
def tell(TILES, DONE, done, told, num_tiles):
    """Count finished tiles where every program sees it. A warp of its own, since each release waits for a full fence."""
    step = gl.num_programs(0)
    n = 0
    for tile in range(gl.program_id(0), num_tiles, step):
        chunk = gl.load(TILES + _TILE_FIELDS * tile + 5)
        mbarrier.wait(done.index(n % 2), (n // 2) & 1)
        gl.atomic_add(DONE + chunk, 1, sem="release", scope="gpu")
        mbarrier.arrive(told.index(n % 2), count=1)
        n += 1  # noqa: SIM113 - Gluon has no enumerate


@gluon.jit
def read_box(TILES, tile, BLOCK: gl.constexpr):
    """Head, first packed row and number of blocks of keys of a tile."""
    info = TILES + _TILE_FIELDS * tile
    return gl.load(info), gl.load(info + 3), (gl.load(info + 4) + BLOCK - 1) // BLOCK


@gluon.jit
def feed(feed_from, feed_to, feed_counts, BLOCK: gl.constexpr, SLOTS: gl.constexpr, D: gl.constexpr):
    """Keys and values of every tile, in the order in which :func:`attend` takes them: values one block behind keys."""
    packed_k, packed_v, TILES, PACKED = feed_from
    keys, values, full_k, full_v, empty = feed_to
    group, packed_rows, num_tiles, packers = feed_counts
    BYTES: gl.constexpr = BLOCK * D * 2
    step = gl.num_programs(0)
    t = gl.program_id(0)
    if t < num_tiles:
        i, row, before = 0, 0, -1
        head, box, blocks = read_box(TILES, t, BLOCK)
        for tile in range(t, num_tiles + step, step):  # one more, for keys that nobody uses
            next_head, next_box, next_blocks = read_box(TILES, gl.minimum(tile + step, num_tiles - 1), BLOCK)
            kv_head = head // group
            if kv_head != before:
                wait_until(PACKED + kv_head, packers)
                fence_async_global()
                before = kv_head
            box += (kv_head % 2) * packed_rows
            end = box + gl.where(tile < num_tiles, blocks, 1) * BLOCK
            at = box
            # Not ``range``: Triton 3.6 forgets that ``blocks`` changes where all it does is to end a loop.
            while at < end:
                at_k, at_v = i & (SLOTS - 1), (i - 1) & (SLOTS - 1)
                mbarrier.wait(empty.index(at_k), ((i // SLOTS) & 1) ^ 1)
                v_row, row = row, at
                at += BLOCK
                mbarrier.expect(full_k.index(at_k), BYTES)
                tma.async_copy_global_to_shared(packed_k, [row, 0], full_k.index(at_k), keys.index(at_k))
                if i > 0:
                    mbarrier.expect(full_v.index(at_v), BYTES)
                    tma.async_copy_global_to_shared(packed_v, [v_row, 0], full_v.index(at_v), values.index(at_v))
                i += 1
            head, box, blocks = next_head, next_box, next_blocks


@gluon.jit
def pack(pack_from, pack_to, kv_head, kv_heads, head_dim, tokens, masked, worker, workers, D: gl.constexpr):
    """This warp's share of the keys and values of one head, to box order; zeros where there is no key."""
    K, V, KEYS, k_batch, k_head, k_token, v_batch, v_head, v_token = pack_from
    PACKED_K, PACKED_V, PACKED, packed_rows = pack_to
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [1, 1], [1, 0])
    rows = gl.arange(0, _PACKED_ROWS, gl.SliceLayout(1, COPY))
    d = gl.arange(0, D, gl.SliceLayout(0, COPY))
    sample, of_sample = (kv_head // kv_heads).to(gl.int64), (kv_head % kv_heads).to(gl.int64)
    k = K + sample * (k_batch.to(gl.int64) * 8) + of_sample * (k_head.to(gl.int64) * 8)
    v = V + sample * (v_batch.to(gl.int64) * 8) + of_sample * (v_head.to(gl.int64) * 8)
    keys = KEYS + sample * masked * tokens
    to = (kv_head % 2).to(gl.int64) * packed_rows
    for start in range(worker * _PACKED_ROWS, packed_rows, workers * _PACKED_ROWS):
        r = start + rows
        token = gl.load(keys + r, mask=r < tokens, other=-1).to(gl.int64)
        inside = (token >= 0)[:, None] & (d < head_dim * 8)[None, :]
        key = gl.load(k + (token * (k_token * 8))[:, None] + d[None, :], mask=inside, other=0.0)
        value = gl.load(v + (token * (v_token * 8))[:, None] + d[None, :], mask=inside, other=0.0)
        at = (to + r)[:, None] * D + d[None, :]
        gl.store(PACKED_K + at, key, mask=(r < packed_rows)[:, None])
        gl.store(PACKED_V + at, value, mask=(r < packed_rows)[:, None])
    fence_async_global()
    thread_barrier()
    gl.atomic_add(PACKED + kv_head, 1, sem="release", scope="gpu")


@gluon.jit
def fetch_partials(WARP: gl.constexpr, PART, step, end, rows, D: gl.constexpr):
    """Start copying partial rows ``16 * step ... 16 * step + 16`` to shared memory; an empty group behind the last."""
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [1, 1], [1, 0])
    if step * _ROWS < end:
        r = gl.arange(0, _ROWS, gl.SliceLayout(1, COPY))
        d = gl.arange(0, D, gl.SliceLayout(0, COPY))
        async_copy.async_copy_global_to_shared(
            rows.index(WARP * _DEPTH + step % _DEPTH),
            PART + step.to(gl.int64) * (_ROWS * D) + (r[:, None] * D + d[None, :]),
        )
    async_copy.commit_group()


@gluon.jit
def merge_queries(
    WARP: gl.constexpr, PART, PART_LSE, PLACE, OUT, LSE, first, last, rows, weights, head_dim, D: gl.constexpr
):
    """Merge the partials of queries ``first ... last`` (counted over all heads): one contiguous stream of rows.

    A lane takes a partial's weight, then the warp adds row after row. Each instruction here is one less for those who
    attend, so nothing is computed twice, and the next query's log-sum-exps are read ahead.
    """
    READ: gl.constexpr = gl.BlockedLayout([D // 32], [32], [1], [0])
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    ONE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    lane = gl.arange(0, 32, LANES)
    d = gl.arange(0, D, READ)
    by_row = rows._reinterpret(PART.dtype.element_ty, [_WARPS * _DEPTH * _ROWS, D], ONE)
    weight_of = weights._reinterpret(gl.float32, [_WARPS * 32, 1], ONE)
    slot = gl.load(PLACE + first.to(gl.int64) * 2)
    size = gl.load(PLACE + first.to(gl.int64) * 2 + 1)
    final = PLACE + (last - 1).to(gl.int64) * 2
    stop = gl.load(final) + gl.load(final + 1)
    step = slot // _ROWS
    for ahead in range(_DEPTH):
        fetch_partials(WARP, PART, step + ahead, stop, rows, D)
    lse = gl.load(PART_LSE + slot + lane, mask=lane < size, other=_NONE)
    async_copy.wait_group(_DEPTH - 1)
    thread_barrier()
    size_next = gl.load(PLACE + gl.minimum(first + 1, last - 1).to(gl.int64) * 2 + 1)
    for query in range(first, last):
        size_after = gl.load(PLACE + gl.minimum(query + 2, last - 1).to(gl.int64) * 2 + 1)
        end = slot + size
        following = gl.where(query + 1 < last, size_next, 0)
        lse_next = gl.load(PART_LSE + end + lane, mask=lane < following, other=_NONE)
        peak = gl.reduce(lse, 0, maximum)
        for j in range(32, size, 32):
            more = gl.load(PART_LSE + slot + j + lane, mask=j + lane < size, other=_NONE)
            peak = gl.maximum(peak, gl.reduce(more, 0, maximum))
        total = gl.full([32], 0.0, gl.float32, LANES)
        acc = gl.full([D], 0.0, gl.float32, READ)
        for j in range(0, size, 32):
            if j > 0:
                lse = gl.load(PART_LSE + slot + j + lane, mask=j + lane < size, other=_NONE)
            weight = gl.exp2(lse - peak)
            total += weight
            thread_barrier()  # every lane has read the last weights
            weights.index(WARP).store(weight)
            thread_barrier()
            a = slot + j
            b = gl.minimum(a + 32, end)
            while a < b:
                at = a // _ROWS
                if at > step:
                    thread_barrier()  # every lane has read the rows that are overwritten
                    fetch_partials(WARP, PART, step + _DEPTH, stop, rows, D)
                    step += 1
                    async_copy.wait_group(_DEPTH - 1)
                    thread_barrier()
                behind = gl.minimum(b, (at + 1) * _ROWS)
                shift = (WARP * _DEPTH + at % _DEPTH) * _ROWS - at * _ROWS
                for r in range(a, behind):
                    w = weight_of.index(WARP * 32 + r - slot - j).load(READ)
                    acc += by_row.index(shift + r).load(READ).to(gl.float32) * w
                a = behind
        summed = gl.reduce(total, 0, add)
        if size == 0:
            summed = summed + 1.0
        to = OUT + query * (head_dim.to(gl.int64) * 8) + d
        gl.store(to, (acc * (1.0 / summed)).to(OUT.dtype.element_ty), mask=d < head_dim * 8)
        gl.store(LSE + query, (peak + gl.log2(summed)) * LN2)
        slot, size, size_next, lse = end, size_next, size_after, lse_next
    async_copy.wait_group(0)
    thread_barrier()


@gluon.jit
def first_behind(PLACE, first, last, slot):
    """The first of queries ``first ... last`` whose partials begin at ``slot`` or behind; ``last`` if none does."""
    lane = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    while first < last:
        step = (last - first + 31) // 32
        query = first + lane * step
        begin = gl.load(PLACE + query.to(gl.int64) * 2, mask=query < last, other=2147483647)
        before = gl.reduce((begin < slot).to(gl.int32), 0, add)
        last = gl.minimum(last, first + before * step)
        first += gl.maximum((before - 1) * step + 1, 0)
    return first


@gluon.jit
def share_of(PLACE, first, last, worker, workers):
    """This worker's queries of ``first ... last``: as many partials for each worker, not as many queries."""
    final = PLACE + (last - 1).to(gl.int64) * 2
    start, stop = gl.load(PLACE + first.to(gl.int64) * 2), gl.load(final) + gl.load(final + 1)
    share = (stop - start) // workers + 1  # so that the last worker also gets queries without partials, at the end
    begin = start + worker * share
    return first_behind(PLACE, first, last, begin), first_behind(PLACE, first, last, begin + share)


@gluon.jit
def serve(WARP: gl.constexpr, pack_from, pack_to, merge_from, OUT, LSE, counts, D: gl.constexpr):
    """This warp's share of packing every head, two ahead, and of merging every chunk but the last once it is done."""
    PART, PART_LSE, PLACE, CHUNKS, DONE, MERGED, rows, weights = merge_from
    head_dim, tokens, masked, group, kv_heads, all_kv_heads, num_chunks = counts
    workers = gl.num_programs(0) * _WARPS
    worker = gl.program_id(0) * _WARPS + WARP
    for kv_head in range(0, gl.where(num_chunks > 0, gl.minimum(all_kv_heads, 2), 0)):
        pack(pack_from, pack_to, kv_head, kv_heads, head_dim, tokens, masked, worker, workers, D)
    for chunk in range(0, num_chunks - 1):
        info = CHUNKS + _CHUNK_FIELDS * chunk
        head, begin, end = gl.load(info), gl.load(info + 1), gl.load(info + 2)
        tiles = gl.load(info + 4) - gl.load(info + 3)
        next_kv_head = gl.load(info + _CHUNK_FIELDS) // group
        first, last = share_of(PLACE, head * tokens + begin, head * tokens + end, worker, workers)
        wait_until(DONE + chunk, tiles)
        if first < last:
            merge_queries(WARP, PART, PART_LSE, PLACE, OUT, LSE, first, last, rows, weights, head_dim, D)
        gl.atomic_add(MERGED + chunk, 1, sem="release", scope="gpu")
        kv_head = head // group + 2
        if (next_kv_head + 1 == kv_head) & (kv_head < all_kv_heads):
            pack(pack_from, pack_to, kv_head, kv_heads, head_dim, tokens, masked, worker, workers, D)
