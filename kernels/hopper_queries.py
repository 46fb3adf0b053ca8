"""Gradients of queries on Hopper, in Gluon: tiles of queries of one box, each through all of its keys.

Two warpgroups take 64 queries each; one warp feeds both with blocks of keys and values by the copy engine. As in the
forward (``hopper_attend``) one loop runs across tiles, with a block's scores and weights computed while the tensor cores
sum what the block before has given; queries and gradients of the output are copied two tiles ahead. Each tile leaves
partial gradients, to be added up by query. arXiv 2506.23858, section 3.1.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .attend_lists import CHUNK_FIELDS, RANK_BITS, TILE_FIELDS
from .hopper_attend import INFOS, PART_QUERIES, PARTS, copy_info, info, mask_keys, operand, read_entries
from .hopper_sync import release, thread_barrier
from .triton_tools import LOG2E

BLOCK = 64  # keys per step

_PARTS = gl.constexpr(PARTS)
_PART = gl.constexpr(PART_QUERIES)
_BLOCK = gl.constexpr(BLOCK)
_INFOS = gl.constexpr(INFOS)
_RANK_BITS = gl.constexpr(RANK_BITS)
_RANK_MASK = gl.constexpr(2**RANK_BITS - 1)
_TILE_FIELDS = gl.constexpr(TILE_FIELDS)
_CHUNK_FIELDS = gl.constexpr(CHUNK_FIELDS)
_LOG2E = gl.constexpr(LOG2E)


@gluon.jit
def feed(feed_from, feed_to, numbers, D: gl.constexpr, STAGES: gl.constexpr):
    """Keys and values of every tile of this program, block by block."""
    packed_k, packed_v, TILES, first_head, group, packed_rows, stride = feed_from
    keys, values, full, empty = feed_to
    t, last_tile = numbers
    BYTES: gl.constexpr = 2 * _BLOCK * D * 2
    step = gl.num_programs(0)
    i = 0
    for tile in range(t, last_tile, step):
        fields = TILES + _TILE_FIELDS * tile
        row = ((gl.load(fields) - first_head) // group) * packed_rows + gl.load(fields + 6) * stride
        end = row + gl.load(fields + 4)
        # Not ``range``: Triton 3.6 forgets bounds that change where all they do is to end a loop.
        while row < end:
            stage = i % STAGES
            mbarrier.wait(empty.index(stage), ((i // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(stage), BYTES)
            tma.async_copy_global_to_shared(packed_k, [row, 0], full.index(stage), keys.index(stage))
            tma.async_copy_global_to_shared(packed_v, [row, 0], full.index(stage), values.index(stage))
            row += _BLOCK
            i += 1


@gluon.jit
def gather_tile(query_from, infos, INDEX: gl.constexpr, n, entries, flat_entries, d, to, dout_to, shared):
    """Start copying what the n-th tile needs of one warpgroup's queries. Offsets in a head fit in 32 bits."""
    Q, DOUT, LSE, DELTA, PLACE, q_batch, q_head, q_token, o_batch, o_head, o_token, head_dim, heads, tokens = query_from
    places, numbers = shared
    head, sample = info(infos, INDEX, n, 0), info(infos, INDEX, n, 7)
    batch_at, head_at = sample.to(gl.int64) * 8, (head - sample * heads).to(gl.int64) * 8
    inside = (entries >= 0)[:, None] & (d < head_dim * 8)[None, :]
    s = entries >> _RANK_BITS
    q_at = (s * (q_token * 8).to(gl.int32))[:, None] + d[None, :]
    async_copy.async_copy_global_to_shared(to, Q + batch_at * q_batch + head_at * q_head + q_at, mask=inside)
    o_at = (s * (o_token * 8).to(gl.int32))[:, None] + d[None, :]
    async_copy.async_copy_global_to_shared(dout_to, DOUT + batch_at * o_batch + head_at * o_head + o_at, mask=inside)
    of_head = head.to(gl.int64) * tokens
    flat_s = flat_entries >> _RANK_BITS
    async_copy.async_copy_global_to_shared(numbers.index(2 * INDEX), LSE + of_head + flat_s)
    async_copy.async_copy_global_to_shared(numbers.index(2 * INDEX + 1), DELTA + of_head + flat_s)
    async_copy.async_copy_global_to_shared(places, PLACE + of_head * 2 + flat_s * 2)


@gluon.jit
def read_numbers(numbers, INDEX: gl.constexpr, ROWS: gl.constexpr):
    """Log-sum-exps to the base of 2, and -delta, of the tile that was copied last."""
    return numbers.index(2 * INDEX).load(ROWS) * _LOG2E, -numbers.index(2 * INDEX + 1).load(ROWS)


@gluon.jit
def sum_gradients(
    INDEX: gl.constexpr, query_from, memory, shared, numbers, scale, D: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """Queries ``64 * INDEX ... 64 * INDEX + 64`` of every tile of this program."""
    ENTRIES, TILES, PART = memory
    queries, douts, places, rows_of, infos, keys, values, full, empty = shared
    t, last_tile = numbers
    dtype: gl.constexpr = PART.dtype.element_ty
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _BLOCK, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    rows = gl.arange(0, _PART, gl.SliceLayout(1, COPY))
    flat = gl.arange(0, _PART, gl.BlockedLayout([1], [32], [4], [0]))
    d = gl.arange(0, D, gl.SliceLayout(0, COPY))
    zero = gl.full([_PART, _BLOCK], 0.0, gl.float32, SCORES)
    step = gl.num_programs(0)
    if t < last_tile:
        for n in gl.static_range(_INFOS):
            copy_info(TILES, gl.minimum(t + n * step, last_tile - 1), infos, INDEX, n)
        async_copy.commit_group()
        async_copy.wait_group(0)
        thread_barrier()
        lse, less_delta = gl.zeros([_PART], gl.float32, ROWS), gl.zeros([_PART], gl.float32, ROWS)
        for n in gl.static_range(2):
            e = read_entries(ENTRIES, infos, INDEX, n, rows)
            flat_e = read_entries(ENTRIES, infos, INDEX, n, flat)
            at = 2 * n + INDEX
            gather_tile(
                query_from,
                infos,
                INDEX,
                n,
                e,
                flat_e,
                d,
                queries.index(at),
                douts.index(at),
                (places.index(at), rows_of),
            )
            async_copy.commit_group()
            if n == 0:
                async_copy.wait_group(0)
                fence_async_shared()
                thread_barrier()
                lse, less_delta = read_numbers(rows_of, INDEX, ROWS)
                thread_barrier()
        mbarrier.wait(full.index(0), 0)
        scores_ = warpgroup_mma(queries.index(INDEX), keys.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
        start = zero + less_delta[:, None]
        dweights_ = warpgroup_mma(douts.index(INDEX), values.index(0).permute((1, 0)), start, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[scores_])
        scores = mask_keys(scores, info(infos, INDEX, 0, 4), _BLOCK, SCORES)
        dweights = warpgroup_mma_wait(0, deps=[dweights_])
        dscores = operand(gl.exp2(scores * scale - lse[:, None]) * dweights, OUT, dtype)
        dq = gl.full([_PART, D], 0.0, gl.float32, OUT)
        i = 1  # counts steps: scores of block i, sums over block i - 1
        n = 0
        for tile in range(t, last_tile, step):
            size, next_size = info(infos, INDEX, n, 4), info(infos, INDEX, n + 1, 4)
            blocks = (size + _BLOCK - 1) // _BLOCK
            # Behind the last tile of all there is no next block of keys to wait for.
            final = tile + step >= last_tile
            own, e = read_entries(ENTRIES, infos, INDEX, n, rows), read_entries(ENTRIES, infos, INDEX, n + 2, rows)
            flat_e = read_entries(ENTRIES, infos, INDEX, n + 2, flat)
            for block in range(1, blocks + 1 - final.to(gl.int32)):
                last = block == blocks  # the next block is the first of the next tile
                if last:
                    async_copy.wait_group(0)
                    fence_async_shared()
                    thread_barrier()
                    lse, less_delta = read_numbers(rows_of, INDEX, ROWS)
                stage, before = i % STAGES, (i - 1) % STAGES
                mbarrier.wait(full.index(stage), (i // STAGES) & 1)
                at = (n + last.to(gl.int32)) % 2 * 2 + INDEX
                k, v = keys.index(stage), values.index(stage)
                scores_ = warpgroup_mma(queries.index(at), k.permute((1, 0)), zero, use_acc=False, is_async=True)
                start = zero + less_delta[:, None]
                dweights_ = warpgroup_mma(douts.index(at), v.permute((1, 0)), start, is_async=True)
                dq_ = warpgroup_mma(dscores, keys.index(before), dq, use_acc=block > 1, is_async=True)
                scores = warpgroup_mma_wait(2, deps=[scores_])
                left = gl.where(last, next_size, size - block * _BLOCK)
                if left < _BLOCK:
                    scores = mask_keys(scores, left, _BLOCK, SCORES)
                weights = gl.exp2(scores * scale - lse[:, None])
                dweights, weights = warpgroup_mma_wait(1, deps=[dweights_, weights])
                following = operand(weights * dweights, OUT, dtype)
                dq, dscores = warpgroup_mma_wait(0, deps=[dq_, dscores])
                dscores = following
                release(empty.index(before))
                i += 1
            if final:
                before = (i - 1) % STAGES
                dq_ = warpgroup_mma(dscores, keys.index(before), dq, use_acc=blocks > 1, is_async=True)
                dq, dscores = warpgroup_mma_wait(0, deps=[dq_, dscores])
            q = queries.index(n % 2 * 2 + INDEX)
            q.store((dq * (scale / _LOG2E)).to(dtype))
            thread_barrier()
            result = q.load(COPY)
            place = places.index(n % 2 * 2 + INDEX)
            slot = place.load(gl.SliceLayout(1, COPY)) + (own & _RANK_MASK)
            first, last_entry = info(infos, INDEX, n, 1), info(infos, INDEX, n, 2)
            thread_barrier()
            dout = douts.index(n % 2 * 2 + INDEX)
            gather_tile(query_from, infos, INDEX, n + 2, e, flat_e, d, q, dout, (place, rows_of))
            copy_info(TILES, gl.minimum(tile + _INFOS * step, last_tile - 1), infos, INDEX, n)
            async_copy.commit_group()
            inside = first + INDEX * _PART + rows < last_entry
            gl.store(PART + (slot[:, None] * D + d[None, :]), result, mask=inside[:, None])
            n += 1  # noqa: SIM113 - Gluon has no enumerate
        async_copy.wait_group(0)


_SIZES = [
    "q_batch", "q_head", "q_token", "o_batch", "o_head", "o_token", "head_dim", "heads", "group", "tokens", "first_head",
    "last_head", "turn", "ring", "packed_rows", "stride",
]  # fmt: skip


@gluon.jit(do_not_specialize=_SIZES)
def hopper_gradients_of_queries(
    Q, DOUT, LSE, DELTA, packed_k, packed_v, ENTRIES, PLACE, TILES, CHUNKS, FIRST_CHUNK, PART,
    q_batch, q_head, q_token, o_batch, o_head, o_token, head_dim, scale,
    first_head, last_head, turn, ring, heads, group, tokens, packed_rows, stride,
    D: gl.constexpr, STAGES: gl.constexpr, SUM_REGISTERS: gl.constexpr, FEED_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Tiles of chunks ``turn * ring`` to ``turn * ring + ring`` of a group of heads; one program per multiprocessor.

    Strides and ``head_dim`` come in units of 8 elements, so that copies are known to be 16 bytes wide.
    """
    chunk = gl.load(FIRST_CHUNK + first_head) + turn * ring
    end = gl.minimum(chunk + ring, gl.load(FIRST_CHUNK + last_head))
    if chunk < end:
        dtype: gl.constexpr = Q.dtype.element_ty
        FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        queries = gl.allocate_shared_memory(dtype, [2 * _PARTS, _PART, D], packed_k.layout)
        douts = gl.allocate_shared_memory(dtype, [2 * _PARTS, _PART, D], packed_k.layout)
        keys = gl.allocate_shared_memory(dtype, [STAGES, _BLOCK, D], packed_k.layout)
        values = gl.allocate_shared_memory(dtype, [STAGES, _BLOCK, D], packed_v.layout)
        places = gl.allocate_shared_memory(gl.int32, [2 * _PARTS, _PART], FLAT)
        rows_of = gl.allocate_shared_memory(gl.float32, [2 * _PARTS, _PART], FLAT)
        infos = gl.allocate_shared_memory(gl.int32, [_PARTS * _INFOS, _TILE_FIELDS], FLAT)
        full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(STAGES):
            mbarrier.init(full.index(i), count=1)
            mbarrier.init(empty.index(i), count=_PARTS)
        tile = gl.load(CHUNKS + chunk * _CHUNK_FIELDS + 3) + gl.program_id(0)
        numbers = (tile, gl.load(CHUNKS + (end - 1) * _CHUNK_FIELDS + 4))
        query_from = (
            Q, DOUT, LSE, DELTA, PLACE, q_batch, q_head, q_token, o_batch, o_head, o_token, head_dim, heads, tokens
        )  # fmt: skip
        memory = (ENTRIES, TILES, PART)
        shared = (queries, douts, places, rows_of, infos, keys, values, full, empty)
        feed_from = (packed_k, packed_v, TILES, first_head, group, packed_rows, stride)
        feed_to = (keys, values, full, empty)
        gl.warp_specialize(
            [
                (sum_gradients, (0, query_from, memory, shared, numbers, scale, D, STAGES)),
                (sum_gradients, (1, query_from, memory, shared, numbers, scale, D, STAGES)),
                (feed, (feed_from, feed_to, numbers, D, STAGES)),
            ],
            [4, 1],
            [SUM_REGISTERS, FEED_REGISTERS],
        )
