"""The passes over the gate: its range, an exact histogram, the bit sets. The gate itself is never stored.

One entry of the gate is ``<query, mean key of a box>``. Writing it down costs more than computing it again, so every
pass multiplies anew, all through :func:`gate_tile` with the same tile, so that all see the same bits.

A program works on one word, that is 32 boxes, and on a run of queries of one head. The three terms of the means (24 KB
at head_dim 128) stay in shared memory while tiles of 64 queries, one warpgroup's ``wgmma``, stream past them; two tiles
are on their way while a third is multiplied, and three programs share an SM, so that one compares while another
multiplies. What a pass adds up stays apart for every entry of the tile and is joined when the run is over. Queries are
read once a word, mostly from the L2 cache, since the programs of one run follow each other.

The passes are bound by the number of instructions an entry takes, hence some detours: keys are compared as floats where
that is the same (:func:`bracket_values`), and entries that do not count are NaN, with which no comparison is true.

Entries are ordered by ``order_key``, a 32-bit unsigned integer that grows with the float. Source: arXiv 2506.23858,
sections 3.3 and 3.4.
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
INFINITY_KEY = tl.constexpr(4286578688)  # the largest of a number
# Low bits of a listed entry: its place in the order of ties.
PLACE_BITS, PLACE_MASK = tl.constexpr(40), tl.constexpr((1 << 40) - 1)

SIZES = [
    "prefix", "num_video", "heads", "group", "num_words", "run", "rows", "columns", "bt", "bh", "bw", "box_rows",
    "box_columns", "replicas", "samples", "sample_runs", "sum_bits", "drop_bits",
]  # fmt: skip


@triton.jit
def order_key(gate):
    """uint32 that orders as the float32 does; -0 and 0 have one key."""
    return key_of_bits((gate + 0.0).to(tl.int32, bitcast=True))  # -0 + 0 is 0


@triton.jit
def key_of_bits(bits):
    return (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)


@triton.jit
def key_value(key):
    """The float32 of an order key given as int64."""
    key = key.to(tl.uint32).to(tl.int32, bitcast=True)
    return (key ^ ((~key >> 31) | -2147483648)).to(tl.float32, bitcast=True)


@triton.jit
def bracket_values(first, last):
    """float32 bounds between which exactly the floats with keys from ``first`` to ``last`` lie (int64)."""
    low = tl.where(first <= 8388607, float("-inf"), key_value(first))
    # No float has the key of -0, which equals 0.
    high = tl.where(last >= INFINITY_KEY, float("inf"), key_value(tl.where(last == 2147483647, last - 1, last)))
    return low, high


@triton.jit
def head_queries(q, row, heads, prefix, num_video, stride_qb, stride_qh, stride_qs, BLOCK_Q: tl.constexpr):
    """Where the video queries of a head begin, and how far from the first query of a tile each lies, int64 [BLOCK_Q]."""
    sample = row // heads
    first = q + sample * stride_qb + (row - sample * heads) * stride_qh + tl.cast(prefix, tl.int64) * stride_qs
    return first, tl.minimum(tl.arange(0, BLOCK_Q), num_video - 1).to(tl.int64) * stride_qs


@triton.jit
def query_tile(line, own_box, start, num_video, stride_qs, BLOCK_Q: tl.constexpr):
    """Where the first query of a tile lies, its queries, and their boxes [BLOCK_Q].

    The last tile is moved back to end with the sequence; queries that are not its own, or not there, are in box -1.
    """
    first = tl.maximum(tl.minimum(start, num_video - BLOCK_Q), 0)
    i = tl.arange(0, BLOCK_Q)
    n = first + tl.minimum(i, num_video - 1)
    own = tl.where((first + i >= start) & (i < num_video), tl.load(own_box + n), -1)
    return line + first.to(tl.int64) * stride_qs, n, own


@triton.jit
def read_means(columns, plane, DIM: tl.constexpr, TERMS: tl.constexpr):
    """The three terms of the means of some boxes, [DIM, BOXES]. float32 means are read by ``gate_tile`` instead."""
    if TERMS == 1:
        large = tl.zeros([1], tl.float32)
        middle, small = large, large
    else:
        at = columns[None, :] + tl.arange(0, DIM)[:, None]
        large, middle, small = tl.load(at), tl.load(at + plane), tl.load(at + 2 * plane)
    return large, middle, small


@triton.jit
def gate_tile(
    line, further, columns, large, middle, small, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK_Q: tl.constexpr,
    BOXES: tl.constexpr, TERMS: tl.constexpr, RESCALE: tl.constexpr,
):  # fmt: skip
    """Gate of a tile of queries and boxes in float32, smallest term of the means first, [BLOCK_Q, BOXES]."""
    if TERMS == 1:
        CHUNK: tl.constexpr = 16
        gate = tl.zeros([BLOCK_Q, BOXES], tl.float32)
        for start in range(0, DIM, CHUNK):
            dims = start + tl.arange(0, CHUNK)
            part = tl.load(line + (further[:, None] + dims[None, :]), mask=(dims < HEAD_DIM)[None, :], other=0.0)
            mean = tl.load(columns[None, :] + dims[:, None])  # [CHUNK, BOXES]
            gate = tl.dot(part, mean, gate, input_precision="ieee")
    else:
        dims = tl.arange(0, DIM)
        if HEAD_DIM == DIM:
            query = tl.load(line + (further[:, None] + dims[None, :]))  # [BLOCK_Q, DIM]
        else:
            query = tl.load(line + (further[:, None] + dims[None, :]), mask=(dims < HEAD_DIM)[None, :], other=0.0)
        gate = tl.dot(query, small)
        if RESCALE != 1.0:
            gate *= 1.0 / RESCALE
        gate = tl.dot(query, middle, gate)
        if RESCALE != 1.0:
            gate *= 1.0 / RESCALE
        gate = tl.dot(query, large, gate)
    return gate


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
def bins_of(histograms, replicas, row, heads, box, num_words, POOL: tl.constexpr, SIZE: tl.constexpr):
    """Where the histograms of this (sample, head) lie, and how much further on that of each box, int32."""
    if POOL == BLOCK:
        first = histograms + (row // heads) * (num_words * 32) * replicas * SIZE
        column = (box * replicas * SIZE)[None, :]
    else:
        first = histograms + pool_index(row, heads, box, num_words, POOL) * replicas * SIZE
        column = 0
    return first, column


@triton.jit
def other_entries(gate, own, filled, box, POOL: tl.constexpr):
    """The gate with NaN for own boxes, boxes without keys and queries beyond the end, and without -0.

    In one row, in any order, where the columns do not matter: then the compiler need not move entries to other threads
    before atomics, as it does to bring neighbouring addresses together, which these have not.
    """
    gate = gate * tl.where(own >= 0, 1.0, float("nan"))[:, None] + tl.where(filled, 0.0, float("nan"))
    gate = tl.where(own[:, None] == box[None, :], float("nan"), gate)
    if POOL != BLOCK:
        gate = tl.reshape(gate, [gate.shape[0] * gate.shape[1]], can_reorder=True)
    return gate


@triton.jit
def pack_word(chosen):
    """Bits of 32 entries, int32 [..]; no bit occurs twice, so the sum does not carry."""
    return tl.sum(tl.where(chosen, tl.full([1, 1], 1, tl.int32) << tl.arange(0, 32)[None, :], 0), 1)


@triton.jit
def own_bit(own, word):
    """The bit of each query's own box, where it is in this word."""
    bit = own - word * 32
    return tl.where((bit >= 0) & (bit < 32), tl.full([1], 1, tl.int32) << (bit & 31), 0)


@triton.jit(do_not_specialize=SIZES)
def gate_range(
    q, means, sizes, own_box, low, high, other_sum, own_sum, coarse, stride_qb, stride_qh, stride_qs,
    prefix, num_video, heads, group, num_words, run, replicas, samples, sample_runs,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK_Q: tl.constexpr, TERMS: tl.constexpr, RESCALE: tl.constexpr,
    POOL: tl.constexpr,
):  # fmt: skip
    """Smallest, largest and summed gate of one run (``block``: of each of its columns), and a sampled histogram.

    The first programs draw the sample: one query of each of as many stretches, at a pseudo-random place and the same
    for every head. A regular choice could coincide with the columns of the grid. ``replicas`` copies of the histogram
    keep the atomics of neighbouring programs apart.
    """
    program = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    part, word = program // num_words, program % num_words
    box = word * 32 + tl.arange(0, 32)
    padded = num_words * 32
    plane = padded * DIM
    columns = means + (row // group) * TERMS * plane + box * DIM
    filled = (tl.load(sizes + (row // heads) * padded + box) > 0)[None, :]
    large, middle, small = read_means(columns, plane, DIM, TERMS)
    line, further = head_queries(q, row, heads, prefix, num_video, stride_qb, stride_qh, stride_qs, BLOCK_Q)
    if part < sample_runs:
        counts, column = bins_of(coarse, replicas, row, heads, box, num_words, POOL, COARSE_BINS)
        counts += (program % replicas) * COARSE_BINS
        for start in range(part * run, tl.minimum(part * run + run, samples), BLOCK_Q):
            i = start + tl.arange(0, BLOCK_Q)
            within = (i.to(tl.uint32) * 2654435761).to(tl.int64) * (num_video // samples) >> 32  # the stretch
            n = tl.where(i < samples, i.to(tl.int64) * num_video // samples + within, 0)
            own = tl.load(own_box + n, mask=i < samples, other=-1)
            apart = n * stride_qs
            gate = gate_tile(line, apart, columns, large, middle, small, HEAD_DIM, DIM, BLOCK_Q, 32, TERMS, RESCALE)
            gate = other_entries(gate, own, filled, box, POOL)
            bin = (key_of_bits(gate.to(tl.int32, bitcast=True)) >> COARSE_SHIFT).to(tl.int32)
            tl.atomic_add(counts + (column + bin), 1, mask=gate == gate, sem="relaxed")
    else:
        part -= sample_runs
        lows = tl.full([BLOCK_Q, 32], float("inf"), tl.float32)
        highs = tl.full([BLOCK_Q, 32], float("-inf"), tl.float32)
        sums = tl.zeros([BLOCK_Q, 32], tl.float32)
        OWNS: tl.constexpr = [BLOCK_Q, 32] if POOL == BLOCK else [BLOCK_Q]
        owns = tl.zeros(OWNS, tl.float32)
        for start in range(part * run, tl.minimum(part * run + run, num_video), BLOCK_Q):
            at, _n, own = query_tile(line, own_box, start, num_video, stride_qs, BLOCK_Q)
            gate = gate_tile(at, further, columns, large, middle, small, HEAD_DIM, DIM, BLOCK_Q, 32, TERMS, RESCALE)
            lows = tl.minimum(lows, gate)
            highs = tl.maximum(highs, gate)
            sums += tl.where(own >= 0, 1.0, 0.0)[:, None] * gate
            mine = tl.where(own[:, None] == box[None, :], gate, 0.0)
            if POOL == BLOCK:
                owns += mine
            else:
                owns += tl.sum(mine, 1)
        lows = tl.where(filled, lows, float("inf"))
        highs = tl.where(filled, highs, float("-inf"))
        sums = tl.where(filled, sums, 0.0).to(tl.float64)
        if POOL == BLOCK:
            out = (row * (tl.num_programs(0) // num_words - sample_runs) + part) * padded + box
            tl.store(low + out, tl.min(lows, 0).to(tl.float64))
            tl.store(high + out, tl.max(highs, 0).to(tl.float64))
            owns = tl.where(filled, owns, 0.0).to(tl.float64)
            tl.store(other_sum + out, tl.sum(sums - owns, 0))
            tl.store(own_sum + out, tl.sum(owns, 0))
        else:
            out = row * (tl.num_programs(0) - sample_runs * num_words) + program - sample_runs * num_words
            tl.store(low + out, tl.min(tl.min(lows, 1), 0).to(tl.float64))
            tl.store(high + out, tl.max(tl.max(highs, 1), 0).to(tl.float64))
            own = tl.sum(owns.to(tl.float64), 0)
            tl.store(other_sum + out, tl.sum(tl.sum(sums, 1), 0) - own)
            tl.store(own_sum + out, own)


@triton.jit(do_not_specialize=SIZES)
def gate_histogram(
    q, means, sizes, own_box, ints, numbers, above_count, above_sum, fine, stride_qb, stride_qh, stride_qs,
    prefix, num_video, heads, group, num_words, run, sum_bits, drop_bits,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK_Q: tl.constexpr, TERMS: tl.constexpr, RESCALE: tl.constexpr,
    POOL: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Exact histogram of the other entries within each pool's bracket; number and sum of ``gate - low`` above it.

    A bin is one int64: the number of its entries above bit ``sum_bits``, and below it the sum of their offsets from the
    start of the bin. Within a bin the float is linear in its key, so that is the exact sum of the gate. Offsets lose as
    many low bits as the field could overflow by: ``shift - drop_bits`` of them where that is positive.
    """
    program = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    part, word = program // num_words, program % num_words
    box = word * 32 + tl.arange(0, 32)
    pool = pool_index(row, heads, box, num_words, POOL)
    state = ints + pool * STATE
    seek = tl.load(state + STATUS) == SEEK
    if POOL == BLOCK:  # noqa: SIM108
        some = tl.max(tl.max(seek.to(tl.int32), 1), 0) > 0
    else:
        some = seek
    if some:
        padded = num_words * 32
        plane = padded * DIM
        columns = means + (row // group) * TERMS * plane + box * DIM
        filled = (tl.load(sizes + (row // heads) * padded + box) > 0)[None, :] & seek
        large, middle, small = read_means(columns, plane, DIM, TERMS)
        line, further = head_queries(q, row, heads, prefix, num_video, stride_qb, stride_qh, stride_qs, BLOCK_Q)
        first, last = tl.load(state + FIRST_KEY), tl.load(state + LAST_KEY)
        _, to_value = bracket_values(first, last)
        first = first.to(tl.uint32)
        width = tl.minimum(last, INFINITY_KEY).to(tl.uint32) - first  # beyond it are the keys of NaN
        shift = tl.load(state + SHIFT).to(tl.uint32)
        within = (shift * 0 + 1 << shift) - 1
        drop = tl.minimum(tl.maximum(shift.to(tl.int32) - drop_bits, 0), shift.to(tl.int32)).to(tl.uint32)
        one = tl.full([], 1, tl.int64) << sum_bits
        low = tl.load(numbers + pool * STATE + LOW).to(tl.float32)
        bins, column = bins_of(fine, 1, row, heads, box, num_words, POOL, BINS)
        SHAPE: tl.constexpr = [BLOCK_Q, 32] if POOL == BLOCK else [BLOCK_Q * 32]
        counts = tl.zeros(SHAPE, tl.int32)
        sums = tl.zeros(SHAPE, tl.float32)
        for start in range(part * run, tl.minimum(part * run + run, num_video), BLOCK_Q):
            at, _n, own = query_tile(line, own_box, start, num_video, stride_qs, BLOCK_Q)
            gate = gate_tile(at, further, columns, large, middle, small, HEAD_DIM, DIM, BLOCK_Q, 32, TERMS, RESCALE)
            gate = other_entries(gate, own, filled, box, POOL)
            above = gate > to_value
            counts += above.to(tl.int32)
            sums += tl.where(above, gate - low, 0.0)
            from_start = key_of_bits(gate.to(tl.int32, bitcast=True)) - first
            offset = (from_start & within) >> drop
            tl.atomic_add(
                bins + (column + (from_start >> shift).to(tl.int32)), one | offset.to(tl.int64),
                mask=from_start <= width, sem="relaxed",
            )  # fmt: skip
        if POOL == BLOCK:
            out = (row * (tl.num_programs(0) // num_words) + part) * padded + box
            tl.store(above_count + out, tl.sum(counts, 0).to(tl.float64))
            tl.store(above_sum + out, tl.sum(sums.to(tl.float64), 0))
        else:
            out = row * tl.num_programs(0) + program
            tl.store(above_count + out, tl.sum(counts, 0).to(tl.float64))
            tl.store(above_sum + out, tl.sum(sums.to(tl.float64), 0))


@triton.jit(do_not_specialize=SIZES)
def gate_bits(
    q, means, sizes, own_box, ints, words, ties, listed, lengths, stride_qb, stride_qh, stride_qs,
    prefix, num_video, heads, group, num_words, run,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK_Q: tl.constexpr, TERMS: tl.constexpr, RESCALE: tl.constexpr,
    POOL: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """Bit sets of the own boxes and of the entries above the cut-off; entries at the cut-off are listed or marked.

    A listed entry is one int64 that decreases in the order in which entries are taken: offset from the start of the
    bin, then the complement of its place (box, query, head). Few runs have any, and those go through their tiles again.
    """
    program = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    part, word = program // num_words, program % num_words
    box = word * 32 + tl.arange(0, 32)
    padded = num_words * 32
    plane = padded * DIM
    columns = means + (row // group) * TERMS * plane + box * DIM
    filled = tl.load(sizes + (row // heads) * padded + box) > 0
    large, middle, small = read_means(columns, plane, DIM, TERMS)
    line, further = head_queries(q, row, heads, prefix, num_video, stride_qb, stride_qh, stride_qs, BLOCK_Q)
    pool = pool_index(row, heads, box, num_words, POOL)
    state = ints + pool * STATE
    status = tl.load(state + STATUS)
    first = tl.load(state + FIRST_KEY)
    from_value, to_value = bracket_values(first, tl.load(state + LAST_KEY))
    filled_bits = tl.sum(pack_word(filled[None, :]), 0)
    list_bits = tl.sum(pack_word((status == LIST) & filled[None, :]), 0)
    tie_bits = tl.sum(pack_word((status == TIES) & filled[None, :]), 0)
    # Also where no box has keys: all of the marks are read.
    marking = tl.sum(pack_word((status == TIES) & (box >= 0)[None, :]), 0) != 0
    some_listed = tl.zeros([BLOCK_Q], tl.int32)
    for start in range(part * run, tl.minimum(part * run + run, num_video), BLOCK_Q):
        at, n, own = query_tile(line, own_box, start, num_video, stride_qs, BLOCK_Q)
        gate = gate_tile(at, further, columns, large, middle, small, HEAD_DIM, DIM, BLOCK_Q, 32, TERMS, RESCALE)
        mine = own_bit(own, word)
        above = pack_word(gate > to_value)  # a NaN is not
        at_cut = pack_word(gate >= from_value) & ~above & ~mine
        out = (row * num_video + n) * num_words + word  # int64 [BLOCK_Q]
        tl.store(words + out, mine | (filled_bits & above), mask=own >= 0)
        if marking:
            tl.store(ties + out, at_cut & tie_bits, mask=own >= 0)
        some_listed |= tl.where(own >= 0, at_cut & list_bits, 0)
    if tl.max((some_listed != 0).to(tl.int32), 0) > 0:
        head = row % heads
        for start in range(part * run, tl.minimum(part * run + run, num_video), BLOCK_Q):
            at, n, own = query_tile(line, own_box, start, num_video, stride_qs, BLOCK_Q)
            gate = gate_tile(at, further, columns, large, middle, small, HEAD_DIM, DIM, BLOCK_Q, 32, TERMS, RESCALE)
            other = (own[:, None] != box[None, :]) & (own >= 0)[:, None] & filled[None, :]
            listing = other & (gate >= from_value) & (gate <= to_value) & (status == LIST)
            place = (box[None, :].to(tl.int64) * num_video + n[:, None]) * heads + head
            entry = ((order_key(gate) - first.to(tl.uint32)).to(tl.int64) << PLACE_BITS) + (PLACE_MASK - place)
            of_pool = pool + tl.zeros([BLOCK_Q, 32], tl.int64)
            slot = tl.atomic_add(lengths + of_pool, 1, mask=listing, sem="relaxed")
            tl.store(listed + of_pool * CAPACITY + slot, entry, mask=listing & (slot < CAPACITY))


@triton.jit(do_not_specialize=SIZES)
def plain_bits(
    sizes, words, num_video, heads, num_words, rows, columns, bt, bh, bw, box_rows, box_columns,
    BLOCK_Q: tl.constexpr, EVERYTHING: tl.constexpr,
):  # fmt: skip
    """Bit sets where nothing is compared: the own box, and ``EVERYTHING`` that has keys."""
    n = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    row = tl.program_id(1).to(tl.int64)
    own = box_of_token(n, rows, columns, bt, bh, bw, box_rows, box_columns)
    sizes += (row // heads) * (num_words * 32)
    out = (row * num_video + n) * num_words
    for word in range(0, num_words):
        mine = own_bit(own, word)
        if EVERYTHING:
            filled = tl.load(sizes + word * 32 + tl.arange(0, 32)) > 0
            mine = mine | tl.sum(pack_word(filled[None, :]), 0)
        tl.store(words + out + word, mine, mask=n < num_video)
