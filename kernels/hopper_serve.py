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

WARPS = 2  # that pack and merge
ROWS = 8  # partial rows per step of a merging warp
DEPTH = 8  # steps that a merging warp keeps in flight

_TILE_FIELDS = gl.constexpr(TILE_FIELDS)
_CHUNK_FIELDS = gl.constexpr(CHUNK_FIELDS)
_WARPS = gl.constexpr(WARPS)
_NONE = gl.constexpr(float("-inf"))
_LN2 = gl.constexpr(0.6931471805599453)
_ROWS = gl.constexpr(ROWS)
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
def put_block(packed, row, i, ring, full, empty, SLOTS: gl.constexpr, BYTES: gl.constexpr):
    """Copy a block of packed keys or values into the next slot."""
    at = i % SLOTS
    mbarrier.wait(empty.index(at), ((i // SLOTS) & 1) ^ 1)
    mbarrier.expect(full.index(at), BYTES)
    tma.async_copy_global_to_shared(packed, [row, 0], full.index(at), ring.index(at))


@gluon.jit
def feed(
    packed_k, packed_v, TILES, PACKED, ring, full, empty, group, packed_rows, num_tiles, packers,
    BLOCK: gl.constexpr, SLOTS: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Keys and values of every tile, in the order in which :func:`attend` takes them."""
    BYTES: gl.constexpr = BLOCK * D * 2
    step = gl.num_programs(0)
    t = gl.program_id(0)
    if t < num_tiles:
        i, row, before = 0, 0, -1
        info = TILES + _TILE_FIELDS * t
        head, box, size = gl.load(info), gl.load(info + 3), gl.load(info + 4)
        for tile in range(t, num_tiles, step):
            info = TILES + _TILE_FIELDS * gl.minimum(tile + step, num_tiles - 1)
            next_head, next_box, next_size = gl.load(info), gl.load(info + 3), gl.load(info + 4)
            kv_head = head // group
            # The first keys of a tile come before the last values of the tile before it; of a tile far ahead, whose
            # keys may wait for this very tile to be done, after them.
            far = kv_head > before + 1
            if i > 0:
                put_block(packed_v, row, i, ring, full, empty, SLOTS, BYTES)
                i += 1
                if far:
                    put_block(packed_k, row, i, ring, full, empty, SLOTS, BYTES)
                    i += 1
            if kv_head != before:
                wait_until(PACKED + kv_head, packers)
                fence_async_global()
                before = kv_head
            box += (kv_head % 2) * packed_rows
            row = box + (size - 1) // BLOCK * BLOCK
            put_block(packed_k, row, i, ring, full, empty, SLOTS, BYTES)
            i += 1
            for start in range(0, (size - 1) // BLOCK * BLOCK, BLOCK):
                put_block(packed_k, box + start, i, ring, full, empty, SLOTS, BYTES)
                put_block(packed_v, row, i + 1, ring, full, empty, SLOTS, BYTES)
                i += 2
                row = box + start
            head, box, size = next_head, next_box, next_size
        put_block(packed_v, row, i, ring, full, empty, SLOTS, BYTES)
        put_block(packed_k, row, i + 1, ring, full, empty, SLOTS, BYTES)


@gluon.jit
def pack(
    K, V, KEYS, PACKED_K, PACKED_V, kv_head, kv_heads, k_batch, k_head, k_token, v_batch, v_head, v_token, head_dim,
    tokens, masked, packed_rows, worker, workers, D: gl.constexpr,
):  # fmt: skip
    """This warp's share of the keys and values of one head, to box order; zeros where there is no key."""
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [1, 1], [1, 0])
    rows = gl.arange(0, _ROWS, gl.SliceLayout(1, COPY))
    d = gl.arange(0, D, gl.SliceLayout(0, COPY))
    sample, of_sample = (kv_head // kv_heads).to(gl.int64), (kv_head % kv_heads).to(gl.int64)
    k = K + sample * (k_batch.to(gl.int64) * 8) + of_sample * (k_head.to(gl.int64) * 8)
    v = V + sample * (v_batch.to(gl.int64) * 8) + of_sample * (v_head.to(gl.int64) * 8)
    keys = KEYS + sample * masked * tokens
    to = (kv_head % 2).to(gl.int64) * packed_rows
    for start in range(worker * _ROWS, packed_rows, workers * _ROWS):
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


@gluon.jit
def fetch_partials(WARP: gl.constexpr, PART, PART_LSE, step, last_step, rows, lses, D: gl.constexpr):
    """Start copying partial rows ``8 * step ... 8 * step + 8`` to shared memory; an empty group behind the last."""
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [1, 1], [1, 0])
    LSE_COPY: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    if step < last_step:
        r = step * _ROWS + gl.arange(0, _ROWS, gl.SliceLayout(1, COPY))
        d = gl.arange(0, D, gl.SliceLayout(0, COPY))
        async_copy.async_copy_global_to_shared(
            rows.index(WARP * _DEPTH + step % _DEPTH), PART + r.to(gl.int64)[:, None] * D + d[None, :]
        )
        async_copy.async_copy_global_to_shared(
            lses.index(WARP * _DEPTH + step % _DEPTH), PART_LSE + step * _ROWS + gl.arange(0, _ROWS, LSE_COPY)
        )
    async_copy.commit_group()


@gluon.jit
def merge_queries(
    WARP: gl.constexpr, PART, PART_LSE, PLACE, OUT, LSE, first, last, rows, lses, head_dim, D: gl.constexpr
):
    """Merge the partials of queries ``first ... last`` (counted over all heads): one contiguous stream of rows."""
    READ: gl.constexpr = gl.BlockedLayout([1, D // 32], [1, 32], [1, 1], [1, 0])
    row = gl.arange(0, _ROWS, gl.SliceLayout(1, READ))
    d = gl.arange(0, D, gl.SliceLayout(0, READ))
    slot = gl.load(PLACE + first.to(gl.int64) * 2)
    final = PLACE + (last - 1).to(gl.int64) * 2
    last_step = (gl.load(final) + gl.load(final + 1) + _ROWS - 1) // _ROWS
    step = slot // _ROWS
    for ahead in range(_DEPTH):
        fetch_partials(WARP, PART, PART_LSE, step + ahead, last_step, rows, lses, D)
    async_copy.wait_group(_DEPTH - 1)
    thread_barrier()
    size = gl.load(PLACE + first.to(gl.int64) * 2 + 1)
    for query in range(first, last):
        size_next = gl.load(PLACE + gl.minimum(query + 1, last - 1).to(gl.int64) * 2 + 1)
        end = slot + size
        peak = _NONE + slot * 0.0
        total = slot * 0.0
        acc = gl.full([D], 0.0, gl.float32, gl.SliceLayout(0, READ))
        behind = (end + _ROWS - 1) // _ROWS
        if size == 0:
            behind = slot // _ROWS
        for at in range(slot // _ROWS, behind):
            if at > step:
                thread_barrier()  # every lane has read the slot that is filled again
                fetch_partials(WARP, PART, PART_LSE, step + _DEPTH, last_step, rows, lses, D)
                step += 1
                async_copy.wait_group(_DEPTH - 1)
                thread_barrier()
            inside = (at * _ROWS + row >= slot) & (at * _ROWS + row < end)
            lse = gl.where(inside, lses.index(WARP * _DEPTH + at % _DEPTH).load(gl.SliceLayout(1, READ)), _NONE)
            new = gl.maximum(peak, gl.reduce(lse, 0, maximum))
            weight = gl.exp2(lse - new)
            decay = gl.exp2(peak - new)
            part = rows.index(WARP * _DEPTH + at % _DEPTH).load(READ).to(gl.float32)  # [8, D]
            more = gl.reduce(part * weight[:, None], 0, add)
            # Rows of other queries, and rows that nothing was written to, have weight 0: it takes an infinity or a NaN
            # for them to matter.
            if gl.reduce((more != more).to(gl.int32), 0, add) > 0:
                more = gl.reduce(gl.where(inside[:, None], part, 0.0) * weight[:, None], 0, add)
            acc = acc * decay + more
            total = total * decay + gl.reduce(weight, 0, add)
            peak = new
        if size == 0:
            total = total + 1.0
        to = OUT + query * (head_dim.to(gl.int64) * 8) + d
        gl.store(to, (acc * (1.0 / total)).to(OUT.dtype.element_ty), mask=d < head_dim * 8)
        gl.store(LSE + query, (peak + gl.log2(total)) * _LN2)
        slot = end
        size = size_next
    async_copy.wait_group(0)
    thread_barrier()


@gluon.jit
def serve(
    WARP: gl.constexpr, K, V, KEYS, PACKED_K, PACKED_V, PACKED, k_batch, k_head, k_token, v_batch, v_head, v_token,
    PART, PART_LSE, PLACE, CHUNKS, OUT, LSE, DONE, MERGED, rows, lses, head_dim, tokens, masked, group, kv_heads,
    all_kv_heads, packed_rows, num_chunks, D: gl.constexpr,
):  # fmt: skip
    """This warp's share of packing every head, two ahead, and of merging every chunk but the last once it is done."""
    workers = gl.num_programs(0) * _WARPS
    worker = gl.program_id(0) * _WARPS + WARP
    for kv_head in range(0, gl.minimum(all_kv_heads, 2)):
        pack(K, V, KEYS, PACKED_K, PACKED_V, kv_head, kv_heads, k_batch, k_head, k_token, v_batch, v_head, v_token,
             head_dim, tokens, masked, packed_rows, worker, workers, D)  # fmt: skip
        gl.atomic_add(PACKED + kv_head, 1, sem="release", scope="gpu")
    for chunk in range(0, num_chunks - 1):
        info = CHUNKS + _CHUNK_FIELDS * chunk
        head, begin, end = gl.load(info), gl.load(info + 1), gl.load(info + 2)
        tiles = gl.load(info + 4) - gl.load(info + 3)
        next_kv_head = gl.load(info + _CHUNK_FIELDS) // group
        share = (end - begin + workers - 1) // workers
        first = gl.minimum(begin + worker * share, end) + head * tokens
        last = gl.minimum(begin + worker * share + share, end) + head * tokens
        wait_until(DONE + chunk, tiles)
        kv_head = head // group + 2
        if (next_kv_head + 1 == kv_head) & (kv_head < all_kv_heads):
            pack(K, V, KEYS, PACKED_K, PACKED_V, kv_head, kv_heads, k_batch, k_head, k_token, v_batch, v_head, v_token,
                 head_dim, tokens, masked, packed_rows, worker, workers, D)  # fmt: skip
            gl.atomic_add(PACKED + kv_head, 1, sem="release", scope="gpu")
        if first < last:
            merge_queries(WARP, PART, PART_LSE, PLACE, OUT, LSE, first, last, rows, lses, head_dim, D)
        gl.atomic_add(MERGED + chunk, 1, sem="release", scope="gpu")
