"""Where each pool is cut: a bracket from a sample, the cut-off from exact histograms, the last entries one by one.

With ``low`` and ``high`` the range of the pool and ``w = (gate - low) / (high - low)``, everything here is kept times
``high - low``, in float64: an entry weighs ``gate - low``, the pool ``total``, and the other entries that are taken,
largest first, must reach ``target = need * total``. For top-k an entry weighs 1 and the target is their number. Where
the range is nil every entry weighs 1 too, and all are ties.

One program works on one pool. The histogram of 65,536 bins is 512 KB. It is added up in 512 chunks side by side, as
integers, so that nothing waits for a sum before the next bins are read; then the chunk that holds the cut-off is
scanned. A chunk never spans two exponents (the widest bracket has a sign and eight bits of exponent for 512 chunks),
so within it the float is linear in the key. Source: arXiv 2506.23858, section 3.4.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .select_gate import (
    BLOCK,
    COARSE_BINS,
    COARSE_SHIFT,
    FIRST_KEY,
    HIGH,
    LAST_KEY,
    LIST,
    LOW,
    OTHERS,
    OVERALL,
    PLACE_BITS,
    PLACE_MASK,
    REST,
    SEEK,
    SHIFT,
    START,
    STATE,
    STATUS,
    STEP,
    TAKE,
    TARGET,
    TIES,
    key_value,
    order_key,
)
from .triton_tools import float_of

RANGE_FLOOR = tl.constexpr(1e-6)  # as in the reference
SUM_FLOOR = tl.constexpr(1e-6)
MARGIN = tl.constexpr(0.03)  # of the sample's weight, on both sides of the estimated cut-off
NO_KEY = tl.constexpr(4294967295)
CHUNKS = tl.constexpr(512)  # of a histogram

SIZES = [
    "amount_low", "amount_high", "num_video", "heads", "padded", "pools_per_sample", "per_sample", "per_pool", "stride",
    "count", "replicas", "sum_bits", "drop_bits", "num_words", "entries",
]  # fmt: skip


@triton.jit
def _put(ints, status, first, last, shift):
    tl.store(ints + STATUS, tl.zeros([], tl.int64) + status)
    tl.store(ints + FIRST_KEY, tl.zeros([], tl.int64) + first)
    tl.store(ints + LAST_KEY, tl.zeros([], tl.int64) + last)
    tl.store(ints + SHIFT, tl.zeros([], tl.int64) + shift)


@triton.jit
def _seek(ints, first, last, BINS: tl.constexpr):
    """Set the bracket: the narrowest bins of which ``BINS`` cover the keys ``first`` to ``last``, in aligned chunks."""
    shifts = tl.arange(0, 32).to(tl.int64)
    aligned: tl.constexpr = -(BINS // CHUNKS)
    covered = (last >> shifts) - ((first >> shifts) & aligned) < BINS
    shift = tl.min(tl.where(covered, shifts, 31), 0)
    start = ((first >> shift) & aligned) << shift
    _put(ints, SEEK, start, tl.minimum(start + (tl.full([], BINS, tl.int64) << shift) - 1, NO_KEY), shift)


@triton.jit
def _partials(pool, pools_per_sample, per_sample, per_pool):
    """Where the first of a pool's per-tile numbers lies."""
    sample = (pool // pools_per_sample).to(tl.int64)
    return sample * per_sample + (pool % pools_per_sample).to(tl.int64) * per_pool


@triton.jit(do_not_specialize=SIZES)
def find_bracket(
    low, high, other_sum, own_sum, coarse, sizes, ints, numbers,
    amount_low, amount_high, num_video, heads, padded, pools_per_sample, per_sample, per_pool, stride, count, replicas,
    POOL: tl.constexpr, TOPK: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Statistics and target of a pool, and the first bracket. ``amount_*``: bits of the threshold or number, a float64."""
    pool = tl.program_id(0)
    ints += pool.to(tl.int64) * STATE
    numbers += pool.to(tl.int64) * STATE
    start = _partials(pool, pools_per_sample, per_sample, per_pool)
    lows = tl.full([CHUNK], float("inf"), tl.float64)
    highs = tl.full([CHUNK], float("-inf"), tl.float64)
    others = tl.zeros([CHUNK], tl.float64)
    owns = tl.zeros([CHUNK], tl.float64)
    for i in range(0, count, CHUNK):
        index = i + tl.arange(0, CHUNK)
        at = start + index.to(tl.int64) * stride
        inside = index < count
        lows = tl.minimum(lows, tl.load(low + at, mask=inside, other=float("inf")))
        highs = tl.maximum(highs, tl.load(high + at, mask=inside, other=float("-inf")))
        others += tl.load(other_sum + at, mask=inside, other=0.0)
        owns += tl.load(own_sum + at, mask=inside, other=0.0)
    lowest, highest = tl.min(lows, 0), tl.max(highs, 0)

    sample = pool // pools_per_sample
    sizes += sample * padded
    rows = tl.cast(heads, tl.int64)  # in the pool
    if POOL == BLOCK:
        size = tl.load(sizes + pool % pools_per_sample).to(tl.int64)
        num_own = size * rows
        num_all = tl.where(size > 0, rows * num_video, 0)
    else:
        if POOL != OVERALL:
            rows = tl.full([], 1, tl.int64)
        size = tl.zeros([CHUNK], tl.int64)
        filled = tl.zeros([CHUNK], tl.int64)
        for i in range(0, padded, CHUNK):
            box = i + tl.arange(0, CHUNK)
            tokens = tl.load(sizes + box, mask=box < padded, other=0).to(tl.int64)
            size += tokens
            filled += (tokens > 0).to(tl.int64)
        num_own = tl.sum(size, 0) * rows
        num_all = tl.sum(filled, 0) * num_video * rows
    num_other = num_all - num_own

    wanted = float_of(amount_low, amount_high)
    width = highest - lowest
    flat = (width > RANGE_FLOOR) == 0
    other_weight = tl.where(flat, num_other.to(tl.float64), tl.sum(others, 0) - num_other.to(tl.float64) * lowest)
    own_weight = tl.where(flat, num_own.to(tl.float64), tl.sum(owns, 0) - num_own.to(tl.float64) * lowest)
    total = other_weight + own_weight + tl.where(flat, SUM_FLOOR, SUM_FLOOR * width)
    if TOPK:
        other_weight = num_other.to(tl.float64)
        target = wanted
        need = wanted
        total = tl.full([], 1.0, tl.float64)
    else:
        need = tl.maximum(wanted - own_weight / total, 0.0)
        target = need * total
    tl.store(ints + OTHERS, num_other)
    tl.store(numbers + LOW, lowest)
    tl.store(numbers + HIGH, highest)
    target = tl.where((target == target) & (target < float("inf")), target, 0.0)  # a NaN among the gates: one entry
    tl.store(numbers + TARGET, target)
    tl.store(numbers + REST, 0.0)
    tl.store(numbers + START, 0.0)
    tl.store(numbers + STEP, 0.0)

    if num_other == 0:
        tl.store(ints + TAKE, tl.zeros([], tl.int64))
        _put(ints, LIST, NO_KEY, NO_KEY, 0)
    elif flat:
        # The number taken, decided by the very comparison of the definition: count / total against need.
        near = tl.minimum(target, num_other.to(tl.float64)).to(tl.int64) - 2 + tl.arange(0, 8).to(tl.int64)
        enough = (near >= 1) & (near.to(tl.float64) / total >= need)
        tl.store(ints + TAKE, tl.min(tl.where(enough, tl.minimum(near, num_other), num_other), 0))
        _put(ints, TIES, 0, NO_KEY, 32)
    else:
        bins = COARSE_BINS - 1 - tl.arange(0, COARSE_BINS)  # from the top
        counts = tl.zeros([COARSE_BINS], tl.int32)
        for replica in range(0, replicas):
            counts += tl.load(coarse + (pool.to(tl.int64) * replicas + replica) * COARSE_BINS + bins)
        weights = counts.to(tl.float64)
        if not TOPK:
            centre = key_value((bins.to(tl.int64) << COARSE_SHIFT) + (1 << 18)).to(tl.float64)
            weights = tl.where(counts > 0, weights * tl.maximum(centre - lowest, 0.0), 0.0)
        reached = tl.cumsum(weights, 0)
        sampled = tl.sum(weights, 0)
        guess = target / other_weight * sampled
        above = tl.max(tl.where(reached >= guess - MARGIN * sampled, bins, 0), 0).to(tl.int64) + 1
        below = tl.max(tl.where(reached >= guess + MARGIN * sampled, bins, 0), 0).to(tl.int64) - 1
        lowest_key = order_key(lowest.to(tl.float32)).to(tl.int64)
        highest_key = order_key(highest.to(tl.float32)).to(tl.int64)
        first = tl.maximum(below << COARSE_SHIFT, lowest_key)
        last = tl.minimum(((above + 1) << COARSE_SHIFT) - 1, highest_key)
        usable = (sampled > 0.0) & (first <= last)
        _seek(ints, tl.where(usable, first, lowest_key), tl.where(usable, last, highest_key), BINS)


@triton.jit
def _weights(count, offsets, first, linear, low, TOPK: tl.constexpr):
    """Weight of ``count`` entries from the key ``first`` upwards; ``offsets``: sum of their distances, if not nil."""
    if TOPK:
        weight = count.to(tl.float64)
    else:
        start = key_value(first)
        step = tl.where(linear, key_value(first + 1) - start, 0.0).to(tl.float64)
        weight = tl.where(count > 0, count.to(tl.float64) * (start.to(tl.float64) - low) + offsets * step, 0.0)
    return weight


@triton.jit
def _offsets(packed, count, shift, sum_bits, drop_bits):
    """Sum of the offsets in a bin or in several, the dropped bits at their mean."""
    dropped = (tl.full([], 1, tl.int64) << tl.minimum(tl.maximum(shift - drop_bits, 0), shift)).to(tl.float64)
    return (packed - (count << sum_bits)).to(tl.float64) * dropped + count.to(tl.float64) * 0.5 * (dropped - 1)


@triton.jit
def _chunks(fine, from_bin, shift, sum_bits, drop_bits, LENGTH: tl.constexpr):
    """Number of entries in every chunk, and the sum of their distances from its start, [CHUNKS].

    Bins are added as they are: their fields hold all entries of a pool.
    """
    PART: tl.constexpr = LENGTH if LENGTH < 16 else 16  # bins of a chunk that are read at a time
    column = tl.arange(0, PART)
    packed = tl.zeros([CHUNKS, PART], tl.int64)
    steps = tl.zeros([CHUNKS, PART], tl.int64)  # an entry counts once for every PART bins below it in the chunk
    for i in range(0, LENGTH, PART):
        steps += packed >> sum_bits
        packed += tl.load(fine + from_bin[:, None] + (column + (LENGTH - PART - i))[None, :])
    count = packed >> sum_bits
    distance = tl.sum(steps * PART + count * column[None, :], 1) << shift
    number = tl.sum(count, 1)
    return number, distance.to(tl.float64) + _offsets(tl.sum(packed, 1), number, shift, sum_bits, drop_bits)


@triton.jit(do_not_specialize=SIZES)
def find_cut(
    above_count, above_sum, fine, ints, numbers,
    pools_per_sample, per_sample, per_pool, stride, count, sum_bits, drop_bits,
    FIRST: tl.constexpr, TOPK: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """The bin that holds the cut-off, or a narrower or another bracket to look in.

    Only the first bracket is a guess. The later ones are known to hold the cut-off, so that there a miss can only be
    rounding, and the nearest bin is taken.
    """
    pool = tl.program_id(0)
    ints += pool.to(tl.int64) * STATE
    numbers += pool.to(tl.int64) * STATE
    fine += pool.to(tl.int64) * BINS
    if tl.load(ints + STATUS) == SEEK:
        first, shift = tl.load(ints + FIRST_KEY), tl.load(ints + SHIFT)
        last = tl.load(ints + LAST_KEY)
        low, target = tl.load(numbers + LOW), tl.load(numbers + TARGET)
        start = _partials(pool, pools_per_sample, per_sample, per_pool)
        counts = tl.zeros([CHUNK], tl.float64)
        sums = tl.zeros([CHUNK], tl.float64)
        for i in range(0, count, CHUNK):
            index = i + tl.arange(0, CHUNK)
            at = start + index.to(tl.int64) * stride
            counts += tl.load(above_count + at, mask=index < count, other=0.0)
            sums += tl.load(above_sum + at, mask=index < count, other=0.0)
        above = tl.sum(counts, 0)
        above_weight = above
        if not TOPK:
            above_weight = tl.sum(sums, 0)

        LENGTH: tl.constexpr = BINS // CHUNKS
        place = tl.arange(0, CHUNKS)
        from_bin = (CHUNKS - 1 - place) * LENGTH  # from the top
        number, offsets = _chunks(fine, from_bin, shift, sum_bits, drop_bits, LENGTH)
        chunk_key = first + (from_bin.to(tl.int64) << shift)
        chunk_weight = _weights(number, offsets, chunk_key, (shift > 0) | (LENGTH > 1), low, TOPK)
        running = above + tl.sum(number, 0).to(tl.float64)
        # The first chunk to reach the target, else the last that is not empty; ``before`` is the weight above it.
        enough = (number > 0) & (above_weight + tl.cumsum(chunk_weight, 0) >= target)
        found = tl.max(enough.to(tl.int32), 0)
        chosen = tl.min(tl.where(enough, place, CHUNKS), 0)
        if found == 0:
            chosen = tl.max(tl.where(number > 0, place, 0), 0)
        before = above_weight + tl.sum(tl.where(place < chosen, chunk_weight, 0.0), 0)
        last_bin = (CHUNKS - chosen) * LENGTH - 1  # of the chunk

        missed_above = (above > 0.0) & (above_weight >= target)
        missed_below = (found == 0) & (running < tl.load(ints + OTHERS).to(tl.float64))
        seek_first = tl.full([], 0, tl.int64)
        seek_last = tl.full([], 0, tl.int64)
        seek = tl.full([], 0, tl.int32)
        if FIRST:
            lowest_key = order_key(low.to(tl.float32)).to(tl.int64)
            highest_key = order_key(tl.load(numbers + HIGH).to(tl.float32)).to(tl.int64)
            seek_first = tl.where(missed_above, last + 1, lowest_key)
            seek_last = tl.where(missed_above, highest_key, first - 1)
            seek = (missed_above | missed_below).to(tl.int32)
        if seek == 0:
            bins = last_bin - tl.arange(0, LENGTH)  # from the top
            some = tl.load(fine + bins)
            numbers_in = some >> sum_bits
            offsets_in = _offsets(some, numbers_in, shift, sum_bits, drop_bits)
            part = _weights(numbers_in, offsets_in, first + (bins.to(tl.int64) << shift), shift > 0, low, TOPK)
            reached = before + tl.cumsum(part, 0)
            bin = tl.max(tl.where((numbers_in > 0) & (reached >= target), bins, -1), 0)
            lowest_filled = tl.min(tl.where(numbers_in > 0, bins, last_bin), 0)
            bin = tl.where(bin >= 0, bin, lowest_filled)
            here = tl.sum(tl.where(bins == bin, numbers_in, 0), 0)
            rest = target - before - tl.sum(tl.where(bins > bin, part, 0.0), 0)
            seek_first = first + (bin.to(tl.int64) << shift)
            seek_last = seek_first + (tl.full([], 1, tl.int64) << shift) - 1
            if (here > CAPACITY) & (shift > 0):
                seek = tl.full([], 1, tl.int32)
            else:
                entry = key_value(seek_first).to(tl.float64) - low
                step = tl.where(shift > 0, key_value(seek_first + 1) - key_value(seek_first), 0.0).to(tl.float64)
                if TOPK:
                    entry = tl.full([], 1.0, tl.float64)
                    step = tl.full([], 0.0, tl.float64)
                tl.store(numbers + REST, rest)
                tl.store(numbers + START, entry)
                tl.store(numbers + STEP, step)
                # For ties: all weigh ``entry``, which may be nil.
                everything = here.to(tl.float64)
                wanted = tl.ceil(rest / tl.where(entry > 0.0, entry, 1.0))
                wanted = tl.where((entry > 0.0) | (rest <= 0.0), wanted, everything)
                wanted = tl.minimum(tl.maximum(wanted, 1.0), everything)
                tl.store(ints + TAKE, wanted.to(tl.int64))
                _put(ints, tl.where(here > CAPACITY, TIES, LIST), seek_first, seek_last, shift)
        if seek != 0:
            for i in range(0, BINS, CHUNKS):
                tl.store(fine + i + tl.arange(0, CHUNKS), tl.zeros([CHUNKS], tl.int64))
            _seek(ints, seek_first, seek_last, BINS)


@triton.jit
def _set_bits(words, pool, place, num_video, heads, num_words, chosen, POOL: tl.constexpr):
    """Set the bits of entries given by their place in the order (box, query, head)."""
    head = place % heads
    rest = place // heads
    query = rest % num_video
    box = (rest // num_video).to(tl.int32)
    if POOL == OVERALL:
        row = pool * heads + head
    elif POOL == BLOCK:
        row = (pool // (num_words * 32)) * heads + head
    else:
        row = (pool // heads) * heads + head
    bit = (tl.full([1], 1, tl.int32) << (box % 32)).to(tl.int32)
    tl.atomic_or(words + (row * num_video + query) * num_words + box // 32, bit, mask=chosen, sem="relaxed")


@triton.jit(do_not_specialize=SIZES)
def take_last(
    ints, numbers, words, ties, listed, lengths, num_video, heads, num_words, entries,
    POOL: tl.constexpr, CAPACITY: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Take entries at the cut-off one by one: from the list by (gate, place), among ties by place."""
    pool = tl.program_id(0).to(tl.int64)
    status = tl.load(ints + pool * STATE + STATUS)
    if status == LIST:
        listed += pool * CAPACITY
        length = tl.minimum(tl.load(lengths + pool), CAPACITY)
        rest = tl.load(numbers + pool * STATE + REST)
        start = tl.load(numbers + pool * STATE + START)
        step = tl.load(numbers + pool * STATE + STEP)
        for i in range(0, length, ROWS):
            row = i + tl.arange(0, ROWS)
            mine = tl.load(listed + row, mask=row < length, other=0)
            rank = tl.zeros([ROWS], tl.int32)
            offsets = tl.zeros(
                [ROWS], tl.int64
            )  # integers: the list has no fixed order, its sums must not depend on it
            for j in range(0, length, COLUMNS):
                column = j + tl.arange(0, COLUMNS)
                theirs = tl.load(listed + column, mask=column < length, other=-1)
                earlier = theirs[None, :] > mine[:, None]  # [ROWS, COLUMNS]
                rank += tl.sum(earlier.to(tl.int32), 1)
                offsets += tl.sum(tl.where(earlier, theirs[None, :] >> PLACE_BITS, 0), 1)
            held = rank.to(tl.float64) * start + offsets.to(tl.float64) * step
            place = PLACE_MASK - (mine & PLACE_MASK)
            chosen = (row < length) & ((rank == 0) | (held < rest))
            _set_bits(words, pool, place, num_video, heads, num_words, chosen, POOL)
    if status == TIES:
        take = tl.load(ints + pool * STATE + TAKE)
        taken = tl.full([], 0, tl.int64)
        at = tl.full([], 0, tl.int64)
        while (taken < take) & (at < entries):
            index = at + tl.arange(0, CHUNK)
            # Within the pool, entries run by box, query and head as far as these vary in it.
            if POOL == OVERALL:
                place, row = index, pool * heads + index % heads
                slot = index // heads
            elif POOL == BLOCK:
                place = index + (pool % (num_words * 32)) * num_video * heads
                row = (pool // (num_words * 32)) * heads + index % heads
                slot = place // heads
            else:
                place, row = index * heads + pool % heads, pool + index * 0
                slot = index
            query, box = slot % num_video, (slot // num_video).to(tl.int32)
            inside = index < entries
            word = tl.load(ties + (row * num_video + query) * num_words + box // 32, mask=inside, other=0)
            marked = ((word >> (box % 32)) & 1).to(tl.int64)
            chosen = (marked > 0) & (taken + tl.cumsum(marked, 0) <= take)
            _set_bits(words, pool, place, num_video, heads, num_words, chosen, POOL)
            taken += tl.sum(marked, 0)
            at += CHUNK
