"""The passes over the gate: its range, an exact histogram, the bit sets. The gate itself is never stored.

One entry of the gate is ``<query, mean key of a box>``. Writing it down costs more than computing it again, so every
pass multiplies anew, all through :func:`gate_tile` with the same tile, so that all see the same bits.

Tile: 128 queries x 32 boxes, 8 warps. Every tile reads all the means, so fewer queries would double that traffic (225 MB
a pass at 32,760 tokens, 12 heads and 72 boxes). 64 rows are one warpgroup's ``wgmma`` and 32 boxes one word of the
result; an accumulator of 16 registers a thread leaves room for keys, masks and addresses below 128 registers, so that
two tiles share an SM. With 4 warps the passes take 250 and spill. The queries (32 KB of 16-bit values at head_dim 128)
stay in shared memory while a run-time loop goes over the words.

Entries are compared through ``order_key``, a 32-bit unsigned integer that grows with the float. Source: arXiv
2506.23858, sections 3.3 and 3.4.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tools import box_of_token

HEAD_GLOBAL, OVERALL, BLOCK = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

# Columns of the pools' state: integers (int64) and numbers (float64).
STATUS, FIRST_KEY, LAST_KEY, SHIFT, OTHERS, TAKE = (tl.constexpr(i) for i in range(6))
LOW, HIGH, TARGET, REST, START, STEP = (tl.constexpr(i) for i in range(6))
STATE = tl.constexpr(8)  # columns
# STATUS: the cut-off is sought, or lies among few entries (listed), or among many equal ones (marked).
SEEK, LIST, TIES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

# The sampled histogram looks at the top 13 bits of the key: sign, exponent, four bits of the mantissa.
COARSE_SHIFT, COARSE_BINS = tl.constexpr(19), tl.constexpr(1 << 13)
# Low bits of a listed entry: its place in the order of ties.
PLACE_BITS, PLACE_MASK = tl.constexpr(40), tl.constexpr((1 << 40) - 1)

SIZES = [
    "prefix", "num_video", "heads", "group", "num_words", "rows", "columns", "bt", "bh", "bw", "box_rows",
    "box_columns", "replicas", "sample_limit", "sum_bits", "drop_bits",
]  # fmt: skip


@triton.jit
def order_key(gate):
    """uint32 that orders as the float32 does; -0 and 0 have one key."""
    bits = tl.where(gate == 0.0, 0.0, gate).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)


@triton.jit
def key_value(key):
    """The float32 (as float64) of an order key given as int64."""
    bits = tl.where(key >= 2147483648, key - 2147483648, 4294967295 - key)
    return bits.to(tl.uint32).to(tl.float32, bitcast=True).to(tl.float64)


@triton.jit
def load_queries(
    q, row, tile, stride_qb, stride_qh, stride_qs, prefix, num_video, heads,
    rows, columns, bt, bh, bw, box_rows, box_columns,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK_Q: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """Video indices of a tile of queries, which exist, their boxes, where they lie, and their values.

    float32 queries are read chunk by chunk in ``gate_tile`` instead: there the values are not used.
    """
    sample = row // heads
    head = row - sample * heads
    n = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    live = n < num_video
    own = box_of_token(n, rows, columns, bt, bh, bw, box_rows, box_columns)
    lines = q + sample * stride_qb + head * stride_qh + (prefix + n).to(tl.int64) * stride_qs  # [BLOCK_Q]
    if TERMS == 1:
        query = tl.zeros([BLOCK_Q], tl.float32)
    else:
        dims = tl.arange(0, DIM)
        read = live[:, None]
        if HEAD_DIM != DIM:
            read = read & (dims < HEAD_DIM)[None, :]
        query = tl.load(lines[:, None] + dims[None, :], mask=read, other=0.0)  # [BLOCK_Q, DIM]
    return n, live, own, lines, query


@triton.jit
def gate_tile(
    query, lines, live, means, plane, box, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK_Q: tl.constexpr,
    BOXES: tl.constexpr, TERMS: tl.constexpr, RESCALE: tl.constexpr,
):  # fmt: skip
    """Gate of a tile of queries and the boxes ``box`` [BOXES] in float32, smallest term of the means first."""
    if TERMS == 1:
        CHUNK: tl.constexpr = 16
        gate = tl.zeros([BLOCK_Q, BOXES], tl.float32)
        for start in range(0, DIM, CHUNK):
            dims = start + tl.arange(0, CHUNK)
            read = live[:, None] & (dims < HEAD_DIM)[None, :]
            part = tl.load(lines[:, None] + dims[None, :], mask=read, other=0.0)  # [BLOCK_Q, CHUNK]
            mean = tl.load(means + box[None, :] * DIM + dims[:, None])  # [CHUNK, BOXES]
            gate = tl.dot(part, mean, gate, input_precision="ieee")
    else:
        dims = tl.arange(0, DIM)
        at = means + box[None, :] * DIM + dims[:, None]  # [DIM, BOXES]
        gate = tl.dot(query, tl.load(at + 2 * plane))
        if RESCALE != 1.0:
            gate *= 1.0 / RESCALE
        gate = tl.dot(query, tl.load(at + plane), gate)
        if RESCALE != 1.0:
            gate *= 1.0 / RESCALE
        gate = tl.dot(query, tl.load(at), gate)
    return gate


@triton.jit
def own_and_other(live, own, sizes, box):
    """Which entries [BLOCK_Q, 32] are a query's own box, and which are another box that has keys; own box with keys."""
    filled = tl.load(sizes + box) > 0
    mine = (own[:, None] == box[None, :]) & live[:, None]
    valid = filled[None, :] & live[:, None]
    return mine, valid & (own[:, None] != box[None, :]), valid


@triton.jit
def pool_index(row, heads, box, num_words, POOL: tl.constexpr):
    """Number of the pool of this (sample, head), or of each of its boxes [1, 32]."""
    if POOL == HEAD_GLOBAL:
        pool = row
    elif POOL == OVERALL:
        pool = row // heads
    else:
        pool = (row // heads) * (num_words * 32) + box[None, :]
    return pool


@triton.jit
def pack_word(chosen):
    """Bits of 32 entries, int32 [BLOCK_Q]; no bit occurs twice, so the sum does not carry."""
    return tl.sum(chosen.to(tl.int32) << tl.arange(0, 32)[None, :], 1)


@triton.jit(do_not_specialize=SIZES)
def gate_range(
    q, means, sizes, low, high, other_sum, own_sum, coarse, stride_qb, stride_qh, stride_qs,
    prefix, num_video, heads, group, num_words, rows, columns, bt, bh, bw, box_rows, box_columns,
    replicas, sample_limit,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK_Q: tl.constexpr, TERMS: tl.constexpr, RESCALE: tl.constexpr,
    POOL: tl.constexpr,
):  # fmt: skip
    """Smallest, largest and summed gate of one tile (``block``: of each of its columns), and a sampled histogram.

    The sample is a pseudo-random choice of queries, the same for every head; a regular one could coincide with the
    columns of the grid. ``replicas`` copies of the histogram keep the atomics of neighbouring tiles apart.
    """
    tile = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    n, live, own, lines, query = load_queries(
        q, row, tile, stride_qb, stride_qh, stride_qs, prefix, num_video, heads,
        rows, columns, bt, bh, bw, box_rows, box_columns, HEAD_DIM, DIM, BLOCK_Q, TERMS,
    )  # fmt: skip
    padded = num_words * 32
    plane = padded * DIM
    means += (row // group) * TERMS * plane
    sizes += (row // heads) * padded
    program = row * tl.num_programs(0) + tile
    replica = program % replicas
    sampled = live & (((n.to(tl.uint32) * 2654435761) >> 1).to(tl.int32) <= sample_limit)
    lows = tl.full([BLOCK_Q], float("inf"), tl.float32)
    highs = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    others = tl.zeros([BLOCK_Q], tl.float64)
    owns = tl.zeros([BLOCK_Q], tl.float64)
    for word in range(0, num_words):
        box = word * 32 + tl.arange(0, 32)
        gate = gate_tile(query, lines, live, means, plane, box, HEAD_DIM, DIM, BLOCK_Q, 32, TERMS, RESCALE)
        mine, other, valid = own_and_other(live, own, sizes, box)
        if POOL == BLOCK:
            out = program * padded + box
            tl.store(low + out, tl.min(tl.where(valid, gate, float("inf")), 0).to(tl.float64))
            tl.store(high + out, tl.max(tl.where(valid, gate, float("-inf")), 0).to(tl.float64))
            tl.store(other_sum + out, tl.sum(tl.where(other, gate, 0.0), 0).to(tl.float64))
            tl.store(own_sum + out, tl.sum(tl.where(mine & valid, gate, 0.0), 0).to(tl.float64))
        else:
            lows = tl.minimum(lows, tl.min(tl.where(valid, gate, float("inf")), 1))
            highs = tl.maximum(highs, tl.max(tl.where(valid, gate, float("-inf")), 1))
            others += tl.sum(tl.where(other, gate, 0.0), 1).to(tl.float64)
            owns += tl.sum(tl.where(mine & valid, gate, 0.0), 1).to(tl.float64)
        pool = pool_index(row, heads, box, num_words, POOL)
        bin = (order_key(gate) >> COARSE_SHIFT).to(tl.int32)
        counts = coarse + (pool * replicas + replica) * COARSE_BINS
        tl.atomic_add(counts + bin, 1, mask=other & sampled[:, None], sem="relaxed")
    if POOL != BLOCK:
        tl.store(low + program, tl.min(lows, 0).to(tl.float64))
        tl.store(high + program, tl.max(highs, 0).to(tl.float64))
        tl.store(other_sum + program, tl.sum(others, 0))
        tl.store(own_sum + program, tl.sum(owns, 0))


@triton.jit(do_not_specialize=SIZES)
def gate_histogram(
    q, means, sizes, ints, numbers, above_count, above_sum, fine, stride_qb, stride_qh, stride_qs,
    prefix, num_video, heads, group, num_words, rows, columns, bt, bh, bw, box_rows, box_columns,
    sum_bits, drop_bits,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK_Q: tl.constexpr, TERMS: tl.constexpr, RESCALE: tl.constexpr,
    POOL: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Exact histogram of the other entries within each pool's bracket; number and sum of ``gate - low`` above it.

    A bin is one int64: the number of its entries above bit ``sum_bits``, and below it the sum of their offsets from the
    start of the bin. Within a bin the float is linear in its key, so that is the exact sum of the gate. Offsets lose as
    many low bits as the field could overflow by: ``shift - drop_bits`` of them where that is positive.
    """
    tile = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    if POOL == BLOCK:  # noqa: SIM108
        active = True
    else:
        active = tl.load(ints + pool_index(row, heads, 0, 0, POOL) * STATE + STATUS) == SEEK
    if active:
        _n, live, own, lines, query = load_queries(
            q, row, tile, stride_qb, stride_qh, stride_qs, prefix, num_video, heads,
            rows, columns, bt, bh, bw, box_rows, box_columns, HEAD_DIM, DIM, BLOCK_Q, TERMS,
        )  # fmt: skip
        padded = num_words * 32
        plane = padded * DIM
        means += (row // group) * TERMS * plane
        sizes += (row // heads) * padded
        program = row * tl.num_programs(0) + tile
        numbers_above = tl.zeros([BLOCK_Q], tl.int32)
        sums_above = tl.zeros([BLOCK_Q], tl.float64)
        for word in range(0, num_words):
            box = word * 32 + tl.arange(0, 32)
            pool = pool_index(row, heads, box, num_words, POOL)
            state = ints + pool * STATE
            if POOL == BLOCK:
                seek = tl.load(state + STATUS) == SEEK
                some = tl.max(tl.max(seek.to(tl.int32), 1), 0) > 0
            else:
                seek = True
                some = True
            if some:
                first = tl.load(state + FIRST_KEY).to(tl.uint32)
                last = tl.load(state + LAST_KEY).to(tl.uint32)
                shift = tl.load(state + SHIFT).to(tl.uint32)
                low = tl.load(numbers + pool * STATE + LOW).to(tl.float32)
                gate = gate_tile(query, lines, live, means, plane, box, HEAD_DIM, DIM, BLOCK_Q, 32, TERMS, RESCALE)
                _mine, other, _valid = own_and_other(live, own, sizes, box)
                key = order_key(gate)
                above = other & (key > last)
                over = tl.where(above, gate - low, 0.0)
                if POOL == BLOCK:
                    tl.store(above_count + program * padded + box, tl.sum(above.to(tl.int32), 0).to(tl.float64))
                    tl.store(above_sum + program * padded + box, tl.sum(over, 0).to(tl.float64))
                else:
                    numbers_above += tl.sum(above.to(tl.int32), 1)
                    sums_above += tl.sum(over, 1).to(tl.float64)
                inside = other & seek & (key >= first) & (key <= last)
                from_start = key - first
                bin = from_start >> shift
                drop = tl.maximum(shift.to(tl.int32) - drop_bits, 0).to(tl.uint32)
                offset = (from_start - (bin << shift)) >> drop
                count = tl.full([1], 1, tl.int64) << sum_bits
                tl.atomic_add(
                    fine + pool * BINS + bin.to(tl.int64), count[:, None] + offset.to(tl.int64), mask=inside,
                    sem="relaxed",
                )  # fmt: skip
        if POOL != BLOCK:
            tl.store(above_count + program, tl.sum(numbers_above, 0).to(tl.float64))
            tl.store(above_sum + program, tl.sum(sums_above, 0))


@triton.jit(do_not_specialize=SIZES)
def gate_bits(
    q, means, sizes, ints, words, ties, listed, lengths, stride_qb, stride_qh, stride_qs,
    prefix, num_video, heads, group, num_words, rows, columns, bt, bh, bw, box_rows, box_columns,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK_Q: tl.constexpr, TERMS: tl.constexpr, RESCALE: tl.constexpr,
    POOL: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """Bit sets of the own boxes and of the entries above the cut-off; entries at the cut-off are listed or marked.

    A listed entry is one int64 that decreases in the order in which entries are taken: offset from the start of the
    bin, then the complement of its place (box, query, head).
    """
    tile = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    n, live, own, lines, query = load_queries(
        q, row, tile, stride_qb, stride_qh, stride_qs, prefix, num_video, heads,
        rows, columns, bt, bh, bw, box_rows, box_columns, HEAD_DIM, DIM, BLOCK_Q, TERMS,
    )  # fmt: skip
    padded = num_words * 32
    plane = padded * DIM
    means += (row // group) * TERMS * plane
    sizes += (row // heads) * padded
    head = row % heads
    out = (row * num_video + n) * num_words  # int64 [BLOCK_Q]
    for word in range(0, num_words):
        box = word * 32 + tl.arange(0, 32)
        pool = pool_index(row, heads, box, num_words, POOL)
        state = ints + pool * STATE
        first = tl.load(state + FIRST_KEY).to(tl.uint32)
        last = tl.load(state + LAST_KEY).to(tl.uint32)
        status = tl.load(state + STATUS)
        gate = gate_tile(query, lines, live, means, plane, box, HEAD_DIM, DIM, BLOCK_Q, 32, TERMS, RESCALE)
        mine, other, _valid = own_and_other(live, own, sizes, box)
        key = order_key(gate)
        tl.store(words + out + word, pack_word(mine | (other & (key > last))), mask=live)
        at_cut = other & (key >= first) & (key <= last)
        listing = at_cut & (status == LIST)
        if tl.max(listing.to(tl.int32)) > 0:
            place = (box[None, :].to(tl.int64) * num_video + n[:, None]) * heads + head
            entry = ((key - first).to(tl.int64) << PLACE_BITS) + (PLACE_MASK - place)
            at = pool + tl.zeros([BLOCK_Q, 32], tl.int64)
            slot = tl.atomic_add(lengths + at, 1, mask=listing, sem="relaxed")
            tl.store(listed + at * CAPACITY + slot, entry, mask=listing & (slot < CAPACITY))
        if POOL == BLOCK:  # noqa: SIM108
            marking = tl.max(tl.max((status == TIES).to(tl.int32), 1), 0) > 0
        else:
            marking = status == TIES
        if marking:
            tl.store(ties + out + word, pack_word(at_cut), mask=live)


@triton.jit(do_not_specialize=SIZES)
def plain_bits(
    sizes, words, num_video, heads, num_words, rows, columns, bt, bh, bw, box_rows, box_columns,
    BLOCK_Q: tl.constexpr, EVERYTHING: tl.constexpr,
):  # fmt: skip
    """Bit sets where nothing is compared: the own box, and ``EVERYTHING`` that has keys."""
    n = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    row = tl.program_id(1).to(tl.int64)
    live = n < num_video
    own = box_of_token(n, rows, columns, bt, bh, bw, box_rows, box_columns)
    sizes += (row // heads) * (num_words * 32)
    out = (row * num_video + n) * num_words
    for word in range(0, num_words):
        box = word * 32 + tl.arange(0, 32)
        mine, other, _valid = own_and_other(live, own, sizes, box)
        if EVERYTHING:
            mine = mine | other
        tl.store(words + out + word, pack_word(mine), mask=live)
