"""From bit sets to work: which queries meet which box, in which order, and where their partial results go.

Attention is cut box by box: a *tile* is up to ``TILE`` queries of one head that all selected one box, whatever their
place in the sequence, so only selected pairs are computed even where neighbouring queries select differently. A query
meets its boxes in different tiles; each leaves a *partial* result, and partials of one query lie side by side, to be
merged later.

Partials of a whole sequence would be larger than the sequence. The queries of a head are therefore cut into *chunks* of
about ``chunk_pairs`` partials, tiles are listed chunk by chunk, and the buffer holds a few chunks at a time. Chunks are
cut between groups of ``GROUP`` queries, on the device, where the numbers are known: nothing waits for the host.

Condition tokens are one more box, which every query selects; a condition query selects every box. Masked keys are left
out of the boxes' key lists, and boxes without keys have no tiles. arXiv 2506.23858, section 3.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launches import Work, is_dynamic
from .partition import Geometry
from .triton_tools import box_shape, box_start, token_in_box

TILE = 128  # queries per tile
GROUP = 128  # queries that always share a chunk; at most 256, see scatter_entries
ROUNDING = 16  # rows of the buffer of partials; they are read so many at a time
SCATTER_WARPS = 2  # of a group: the fewer, the more queries share what is read for each box
RANK_BITS = 12  # a list entry is (query << RANK_BITS) | rank of the box among the query's boxes
TILE_FIELDS = 8  # head, first and last entry, first key and number of keys, chunk, box, sample
CHUNK_FIELDS = 8  # head, first and last query, first and last tile, unused
MAX_TOKENS = 2 ** (31 - RANK_BITS)
MAX_BOXES = 2**RANK_BITS - 1

_RANK_BITS = tl.constexpr(RANK_BITS)
_TILE_FIELDS = tl.constexpr(TILE_FIELDS)
_CHUNK_FIELDS = tl.constexpr(CHUNK_FIELDS)


@dataclass(frozen=True)
class Lists:
    """Device tables of one attention; sizes that depend on the selection exist on the device only.

    ``keys`` int32 [B or 1, S]: token of every key, box by box. ``span`` int32 [B or 1, boxes, 2]: first key and number
    of keys of every box. ``start`` int64 [B * H, boxes] and ``total`` int32 [B * H, boxes + 1]: first entry and number
    of entries of every list, in the last column the sum. ``entries`` int32 [capacity]. ``place`` int32 [B * H, S, 2]:
    first partial and number of partials of every query. ``tiles``, ``chunks``: see the fields above. ``totals`` int32
    [4]: tiles, chunks, whether entries found no room, and 0, a mark for those who attend. ``done`` int32
    [2 * (2 * max_chunks + B * H)], zeros: two sets of counters for a kernel that merges while it attends. ``keys`` is -1
    where masked keys have left room behind a box.
    """

    keys: Tensor
    span: Tensor
    start: Tensor
    total: Tensor
    entries: Tensor
    place: Tensor
    tiles: Tensor
    chunks: Tensor
    totals: Tensor
    done: Tensor
    first_chunk: Tensor
    max_chunks: int
    chunk_pairs: int
    slots: int


_SIZES = ["frames", "rows", "columns", "bt", "bh", "bw", "box_rows", "box_columns", "prefix", "suffix"]


@triton.jit(do_not_specialize=_SIZES)
def list_keys(
    MASK, KEYS, SPAN, frames, rows, columns, bt, bh, bw, box_rows, box_columns, prefix, suffix,
    HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Tokens of one box in raster order, masked ones left out. The last box holds the condition tokens."""
    c, sample, boxes = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    num_video = frames * rows * columns
    tokens = prefix + num_video + suffix
    t0, h0, w0, et, eh, ew = box_shape(c, frames, rows, columns, bt, bh, bw, box_rows, box_columns)
    start, size = box_start(t0, h0, w0, et, eh, rows, columns), et * eh * ew
    is_video = t0 < frames
    if t0 >= frames:
        start, size = num_video, prefix + suffix
    kept = 0
    for r0 in range(0, size, BLOCK):
        r = r0 + tl.arange(0, BLOCK)
        video = prefix + token_in_box(r, t0, h0, w0, tl.maximum(eh, 1), tl.maximum(ew, 1), rows, columns)
        token = tl.where(is_video, video, tl.where(r < prefix, r, r + num_video))
        inside = r < size
        if HAS_MASK:
            inside = inside & (tl.load(MASK + sample * tokens + token, mask=inside, other=0) != 0)
        on = inside.to(tl.int32)
        tl.store(KEYS + sample * tokens + start + kept + tl.cumsum(on, 0) - on, token, mask=inside)
        kept += tl.sum(on)
    if HAS_MASK:
        for r0 in range(0, size - kept, BLOCK):
            r = kept + r0 + tl.arange(0, BLOCK)
            tl.store(KEYS + sample * tokens + start + r, tl.full([BLOCK], -1, tl.int32), mask=r < size)
    tl.store(SPAN + (sample * boxes + c) * 2, start)
    tl.store(SPAN + (sample * boxes + c) * 2 + 1, kept)


@triton.jit
def selected_word(WORDS, span, row, w, n, is_video, inside, words, num_boxes):
    """Which of 32 boxes a group of queries attends to, the bits of an int32 [GROUP]; never a box without keys."""
    bit = tl.arange(0, 32)
    c = w * 32 + bit
    word = tl.load(WORDS + (row + n) * words + w, mask=is_video, other=-1)  # a condition query attends to every box
    filled = tl.load(span + 2 * c + 1, mask=c < num_boxes, other=0) > 0
    return tl.where(inside, word, 0) & tl.sum(filled.to(tl.int32) << bit, 0)


@triton.jit
def pairs_of_boxes(word):
    """Boxes b and b + 16 of a word in the halves of an int32 [GROUP, 16], to count both in one sum."""
    return (word[:, None] >> tl.arange(0, 16)[None, :]) & 0x10001


@triton.jit
def number_of_bits(word):
    """Bits set in an int32. The compiler knows this sequence and makes one instruction of it."""
    bits = word.to(tl.uint32, bitcast=True)
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F
    return ((bits * 0x01010101) >> 24).to(tl.int32)


_COUNTS = ["num_video", "prefix", "tokens", "num_boxes", "boxes", "heads", "groups", "span_stride"]


@triton.jit(do_not_specialize=_COUNTS)
def count_pairs(
    WORDS, SPAN, COUNT, PLACE, num_video, prefix, tokens, num_boxes, boxes, heads, groups, span_stride,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Per group of queries: how many selected each box, and each query's place among the group's partials."""
    group, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    s = group * GROUP + tl.arange(0, GROUP)
    n = s - prefix
    inside = s < tokens
    is_video = inside & (n >= 0) & (n < num_video)
    span = SPAN + (head // heads) * span_stride
    words = (num_boxes + 31) // 32
    per_query = tl.zeros([GROUP], tl.int32)
    count = COUNT + head * (boxes + 1) * groups + group
    for w in range(words):
        word = selected_word(WORDS, span, head * num_video, w, n, is_video, inside, words, num_boxes)
        both = tl.sum(pairs_of_boxes(word), 0)  # [16]
        for half in tl.static_range(2):
            c = w * 32 + half * 16 + tl.arange(0, 16)
            tl.store(count + c * groups, (both >> (16 * half)) & 0xFFFF, mask=c < num_boxes)
        per_query += number_of_bits(word)
    if boxes > num_boxes:
        has_condition = inside & (tl.load(span + 2 * num_boxes + 1) > 0)
        tl.store(count + num_boxes * groups, tl.sum(has_condition.to(tl.int32)))
        per_query += has_condition.to(tl.int32)
    tl.store(count + boxes * groups, tl.sum(per_query))
    place = PLACE + (head * tokens + s) * 2
    tl.store(place, tl.cumsum(per_query, 0) - per_query, mask=inside)
    tl.store(place + 1, per_query, mask=inside)


@triton.jit(do_not_specialize=["groups"])
def scan_groups(COUNT, TOTAL, groups, BLOCK: tl.constexpr):
    """Counts of one box over the groups to numbers of entries before each group; their sum to TOTAL."""
    row = tl.program_id(0).to(tl.int64)
    before = 0
    for g0 in range(0, groups, BLOCK):
        g = g0 + tl.arange(0, BLOCK)
        count = tl.load(COUNT + row * groups + g, mask=g < groups, other=0)
        tl.store(COUNT + row * groups + g, before + tl.cumsum(count, 0) - count, mask=g < groups)
        before += tl.sum(count)
    tl.store(TOTAL + row, before)


@triton.jit
def entries_in(COUNT, TOTAL, row, groups, first, last, inside):
    """Number of entries of lists ``row`` [BLOCK] before group ``first`` and before group ``last``."""
    a = tl.load(COUNT + row * groups + first, mask=inside, other=0)
    end = tl.load(TOTAL + row, mask=inside, other=0)
    b = tl.load(COUNT + row * groups + last, mask=inside & (last < groups), other=0)
    return a, tl.where(last < groups, b, end)


@triton.jit(
    do_not_specialize=["num_heads", "boxes", "groups", "chunk_pairs", "per_head", "capacity", "head_capacity", "least"]
)
def cut_chunks(
    COUNT, TOTAL, START, CUT, TOTALS, num_heads, boxes, groups, chunk_pairs, per_head, capacity, head_capacity, least,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per possible chunk: its groups and its number of tiles. One more: where each list starts."""
    program = tl.program_id(0)
    if program == num_heads * per_head:
        before = tl.zeros([], tl.int64)
        for r0 in range(0, num_heads * boxes, BLOCK):
            r = r0 + tl.arange(0, BLOCK)
            row = (r // boxes) * (boxes + 1) + r % boxes
            total = tl.load(TOTAL + row, mask=r < num_heads * boxes, other=0).to(tl.int64)
            tl.store(START + r, before + tl.cumsum(total, 0) - total, mask=r < num_heads * boxes)
            before += tl.sum(total)
        most = 0
        for h0 in range(0, num_heads, BLOCK):
            h = h0 + tl.arange(0, BLOCK)
            most = tl.maximum(most, tl.max(tl.load(TOTAL + h * (boxes + 1) + boxes, mask=h < num_heads, other=0)))
        tl.store(TOTALS + 2, ((before > capacity) | (most > head_capacity)).to(tl.int32))
        tl.store(TOTALS + 3, 0)
    else:
        head, chunk = (program // per_head).to(tl.int64), program % per_head
        pairs = COUNT + (head * (boxes + 1) + boxes) * groups  # pairs of the head before each group
        first, last = 0, 0
        for g0 in range(0, groups, BLOCK):
            g = g0 + tl.arange(0, BLOCK)
            inside = g < groups
            of_group = tl.load(pairs + g, mask=inside, other=0) // chunk_pairs
            first += tl.sum((inside & (of_group < chunk)).to(tl.int32))
            last += tl.sum((inside & (of_group <= chunk)).to(tl.int32))
        tiles = 0
        if last > first:
            for c0 in range(0, boxes, BLOCK):
                c = c0 + tl.arange(0, BLOCK)
                a, b = entries_in(COUNT, TOTAL, head * (boxes + 1) + c, groups, first, last, c < boxes)
                tiles += tl.sum((b - a + TILE - 1) // TILE)
            if chunk == 0:
                tiles = tl.maximum(tiles, least)
        tl.store(CUT + program * 4, first)
        tl.store(CUT + program * 4 + 1, last)
        tl.store(CUT + program * 4 + 2, tiles)


@triton.jit(do_not_specialize=["num_heads", "groups", "per_head", "tokens", "heads", "masked", "max_chunks"])
def list_tiles(
    COUNT, TOTAL, START, CUT, SPAN, TILES, CHUNKS, FIRST_CHUNK, TOTALS, DONE,
    num_heads, groups, per_head, tokens, heads, masked, max_chunks,
    TILE: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Tiles of one box in one chunk; the program of box 0 also describes the chunk, that of the last box fills it up."""
    chunk, c, boxes = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    counters = 2 * max_chunks + num_heads
    fits = tl.load(TOTALS + 2) == 0  # else no tiles, no chunks: nothing is attended, and the merge answers NaN
    # The chunk is that many used places of the cut on.
    tile, own, place, first, last, all_tiles, all_chunks = 0, 0, 0, 0, 0, 0, 0
    for p0 in range(0, num_heads * per_head, BLOCK):
        p = p0 + tl.arange(0, BLOCK)
        inside = p < num_heads * per_head
        a = tl.load(CUT + p * 4, mask=inside, other=0)
        b = tl.load(CUT + p * 4 + 1, mask=inside, other=0)
        tiles = tl.load(CUT + p * 4 + 2, mask=inside, other=0)
        used = (b > a).to(tl.int32)
        index = all_chunks + tl.cumsum(used, 0) - used
        here = (index == chunk) & (b > a)
        place += tl.sum(tl.where(here, p, 0))
        first += tl.sum(tl.where(here, a, 0))
        last += tl.sum(tl.where(here, b, 0))
        own += tl.sum(tl.where(here, tiles, 0))
        tile += tl.sum(tl.where(index < chunk, tiles, 0))
        all_tiles += tl.sum(tiles)
        all_chunks += tl.sum(used)
    if (chunk == 0) & (c == 0):
        tl.store(TOTALS, tl.where(fits, all_tiles, 0))
        tl.store(TOTALS + 1, tl.where(fits, all_chunks, 0))
        tl.store(FIRST_CHUNK + num_heads, tl.where(fits, all_chunks, 0))
        if not fits:
            for h0 in range(0, num_heads, BLOCK):
                h = h0 + tl.arange(0, BLOCK)
                tl.store(FIRST_CHUNK + h, tl.zeros([BLOCK], tl.int32), mask=h < num_heads)
                for twice in tl.static_range(2):
                    done = DONE + twice * counters + 2 * max_chunks
                    tl.store(done + h, tl.zeros([BLOCK], tl.int32), mask=h < num_heads)
    if fits & (chunk < all_chunks):
        head = (place // per_head).to(tl.int64)
        if c == 0:
            if place % per_head == 0:  # every head has its first
                tl.store(DONE + 2 * max_chunks + head, 0)
                tl.store(DONE + counters + 2 * max_chunks + head, 0)
                tl.store(FIRST_CHUNK + head, chunk)
            info = CHUNKS + chunk * _CHUNK_FIELDS
            tl.store(info, head.to(tl.int32))
            tl.store(info + 1, first * GROUP)
            tl.store(info + 2, tl.minimum(last * GROUP, tokens))
            tl.store(info + 3, tile)
            tl.store(info + 4, tile + own)
            for twice in tl.static_range(2):
                tl.store(DONE + twice * counters + chunk, 0)
                tl.store(DONE + twice * counters + max_chunks + chunk, 0)
        end = tile + own
        for c0 in range(0, c, BLOCK):
            o = c0 + tl.arange(0, BLOCK)
            a, b = entries_in(COUNT, TOTAL, head * (boxes + 1) + o, groups, first, last, o < c)
            tile += tl.sum((b - a + TILE - 1) // TILE)
        row = head * (boxes + 1) + c
        a = tl.load(COUNT + row * groups + first)
        b = tl.load(TOTAL + row)
        if last < groups:
            b = tl.load(COUNT + row * groups + last)
        start = tl.load(START + head * boxes + c).to(tl.int32)
        sample = (head // heads) * masked
        span = SPAN + (sample * boxes + c) * 2
        key, size = tl.load(span), tl.load(span + 1)
        full = tl.zeros([BLOCK], tl.int32)
        for i0 in range(0, b - a, BLOCK * TILE):
            i = i0 + tl.arange(0, BLOCK) * TILE
            info = TILES + (tile + i // TILE) * _TILE_FIELDS
            inside = i < b - a
            tl.store(info, full + head.to(tl.int32), mask=inside)
            tl.store(info + 1, start + a + i, mask=inside)
            tl.store(info + 2, full + start + b, mask=inside)
            tl.store(info + 3, full + key, mask=inside)
            tl.store(info + 4, full + size, mask=inside)
            tl.store(info + 5, full + chunk, mask=inside)
            tl.store(info + 6, full + c, mask=inside)
            tl.store(info + 7, full + (head // heads).to(tl.int32), mask=inside)
        if c == boxes - 1:
            for i0 in range(tile + (b - a + TILE - 1) // TILE, end, BLOCK):  # tiles without queries, of one key
                i = i0 + tl.arange(0, BLOCK)
                info = TILES + i * _TILE_FIELDS
                for field in tl.static_range(_TILE_FIELDS):
                    tl.store(info + field, full, mask=i < end)
                tl.store(info, full + head.to(tl.int32), mask=i < end)
                tl.store(info + 4, full + 1, mask=i < end)
                tl.store(info + 5, full + chunk, mask=i < end)
                tl.store(info + 7, full + (head // heads).to(tl.int32), mask=i < end)


_SCATTER = [*_COUNTS, "chunk_pairs", "ring", "ring_slots"]


@triton.jit(do_not_specialize=_SCATTER)
def scatter_entries(
    WORDS, SPAN, COUNT, START, FIRST_CHUNK, PLACE, TOTALS, ENTRIES,
    num_video, prefix, tokens, num_boxes, boxes, heads, groups, span_stride, chunk_pairs, ring, ring_slots,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Write a group's list entries, and turn each query's place in the group into its place in the buffer.

    Neighbouring lanes hold neighbouring queries of one box, and so write to neighbouring addresses.
    """
    group, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    s = group * GROUP + tl.arange(0, GROUP)
    n = s - prefix
    inside = s < tokens
    listed = inside & (tl.load(TOTALS + 2) == 0)  # else there is no room for all, and nothing is attended
    is_video = inside & (n >= 0) & (n < num_video)
    span = SPAN + (head // heads) * span_stride
    words = (num_boxes + 31) // 32
    entry = s << _RANK_BITS
    count = COUNT + head * (boxes + 1) * groups + group
    for w in range(words):
        word = selected_word(WORDS, span, head * num_video, w, n, is_video, listed, words, num_boxes)
        for nibble in tl.static_range(8):
            if w * 32 + nibble * 4 < num_boxes:
                # Four boxes in the bytes of an integer; so many queries of the group, up to 255, selected them before.
                four = (((word >> (4 * nibble)) & 15) * 0x204081) & 0x01010101
                before = tl.cumsum(four, 0) - four
                for i in tl.static_range(4):
                    c = tl.minimum(w * 32 + nibble * 4 + i, num_boxes - 1)
                    start = tl.load(START + head * boxes + c).to(tl.int32) + tl.load(count + c * groups)
                    on = (four & (1 << (8 * i))) != 0
                    tl.store(ENTRIES + start + ((before >> (8 * i)) & 0xFF), entry, mask=on)
                    entry = tl.where(on, entry + 1, entry)
    if boxes > num_boxes:
        on = (listed & (tl.load(span + 2 * num_boxes + 1) > 0)).to(tl.int32)
        at = tl.load(START + head * boxes + num_boxes) + tl.load(count + num_boxes * groups) + tl.cumsum(on, 0) - on
        tl.store(ENTRIES + at, entry, mask=on > 0)
    before = tl.load(count + boxes * groups)  # pairs of the head before this group
    chunk = before // chunk_pairs
    base = ((tl.load(FIRST_CHUNK + head) + chunk) % ring) * ring_slots + before - chunk * chunk_pairs
    place = PLACE + (head * tokens + s) * 2
    tl.store(place, base + tl.load(place, mask=inside, other=0), mask=inside)


def list_all_keys(work: Work, key_mask: Tensor, geometry: Geometry, batch: int) -> tuple[Tensor, Tensor]:
    """``keys`` and ``span`` of :class:`Lists`; ``key_mask`` bool [B, S] or no elements."""
    tokens, boxes = geometry.num_tokens, geometry.num_key_boxes
    masked = key_mask.numel() > 0
    keys = work.empty(batch if masked else 1, tokens, dtype=torch.int32)
    span = work.empty(batch if masked else 1, boxes, 2, dtype=torch.int32)
    sizes = (*geometry.grid, *geometry.block, *geometry.counts[1:], geometry.prefix, geometry.suffix)
    work.launch(
        list_keys, (boxes, span.shape[0]), work.as_bytes(key_mask) if masked else keys, keys, span, *sizes,
        HAS_MASK=masked, BLOCK=1024, num_warps=4,
    )  # fmt: skip
    return keys, span


def build(
    work: Work, words: Tensor, key_mask: Tensor, geometry: Geometry,
    *, capacity: int, head_capacity: int, chunk_pairs: int, ring: int, least_tiles: int = 0,
) -> Lists:  # fmt: skip
    """Tables for ``words`` int32 [B, H, N, W] and ``key_mask`` bool [B, S] or no elements.

    ``capacity`` bounds the pairs of all heads, ``head_capacity`` those of one, ``chunk_pairs`` those of a chunk (but
    for one group of queries); the buffer of partials has ``ring`` chunks of ``Lists.slots`` rows. Each head has at least
    ``least_tiles`` tiles, of which some may be without queries.
    """
    batch, heads = words.shape[:2]
    num_heads, tokens, num_boxes = batch * heads, geometry.num_tokens, geometry.num_boxes
    boxes = geometry.num_key_boxes
    groups = triton.cdiv(tokens, GROUP)
    chunk_pairs = max(chunk_pairs, GROUP * boxes)  # then a group is never longer than a chunk: no chunk is empty
    per_head = triton.cdiv(min(head_capacity, tokens * boxes), chunk_pairs)
    max_chunks = num_heads * per_head
    if not is_dynamic(batch):
        max_chunks = min(max_chunks, num_heads + capacity // chunk_pairs)
    max_tiles = triton.cdiv(capacity, TILE) + max_chunks * boxes + num_heads * least_tiles
    masked = key_mask.numel() > 0
    new = partial(work.empty, dtype=torch.int32)
    keys, span = list_all_keys(work, key_mask, geometry, batch)
    count, total = new(num_heads, boxes + 1, groups), new(num_heads, boxes + 1)
    place = new(num_heads, tokens, 2)
    counts = (
        geometry.num_video, geometry.prefix, tokens, num_boxes, boxes, heads, groups, boxes * 2 if masked else 0
    )  # fmt: skip
    work.launch(count_pairs, (groups, num_heads), words, span, count, place, *counts, GROUP=GROUP, num_warps=4)
    work.launch(scan_groups, (num_heads * (boxes + 1),), count, total, groups, BLOCK=512, num_warps=4)
    start, cut = new(num_heads * boxes, dtype=torch.int64), new(num_heads * per_head, 4)
    totals = new(4)
    work.launch(
        cut_chunks, (num_heads * per_head + 1,), count, total, start, cut, totals,
        num_heads, boxes, groups, chunk_pairs, per_head, capacity, head_capacity, least_tiles,
        TILE=TILE, BLOCK=256, num_warps=2,
    )  # fmt: skip
    tiles, chunks = new(max_tiles, TILE_FIELDS), new(max_chunks, CHUNK_FIELDS)
    first_chunk, done = new(num_heads + 1), new(2 * (2 * max_chunks + num_heads))
    work.launch(
        list_tiles, (max_chunks, boxes), count, total, start, cut, span, tiles, chunks, first_chunk, totals,
        done, num_heads, groups, per_head, tokens, heads, int(masked), max_chunks,
        TILE=TILE, GROUP=GROUP, BLOCK=256, num_warps=1,
    )  # fmt: skip
    entries = new(capacity)
    slots = triton.cdiv(chunk_pairs + GROUP * boxes, ROUNDING) * ROUNDING
    work.launch(
        scatter_entries, (groups, num_heads), words, span, count, start, first_chunk, place, totals, entries,
        *counts, chunk_pairs, ring, slots, GROUP=GROUP, num_warps=SCATTER_WARPS,
    )  # fmt: skip
    return Lists(
        keys, span, start, total, entries, place, tiles, chunks, totals, done, first_chunk, max_chunks, chunk_pairs, slots
    )  # fmt: skip
