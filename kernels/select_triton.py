"""Block selection in Triton: the launches, their scratch memory, and nothing that waits for the GPU.

A pool that joins queries (``head_global``, ``overall``, ``block``) is cut without sorting and without storing the gate:
box means (2 launches), range and sampled histogram (1), bracket (1), exact histogram and cut-off (2 a level), bit sets
(1), last entries (1): 12 in all. The first level nearly always finds the cut-off; the kernels of the later ones then
return at once. They make the result exact whatever the values: the second looks through whatever the sample missed,
each level sees ``log2(bins)`` bits of the 32-bit order key, so one level more than cover 32 bits always suffices.

``query_head`` takes three launches; a selection that compares nothing (own box alone, or everything) three as well.
Tiles of queries take one more: their means are then the queries of a video of their own, with boxes of the same number.
The result is the same from run to run: only integers are added atomically, and nothing depends on the order in which
entries are listed. Source: arXiv 2506.23858, sections 3.3 and 3.4.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import torch
import triton

from .launches import Work
from .partition import WORD_BITS, Geometry
from .select_cut import find_bracket, find_cut, take_last
from .select_gate import (
    BLOCK,
    COARSE_BINS,
    HEAD_GLOBAL,
    OVERALL,
    STATE,
    gate_bits,
    gate_histogram,
    gate_range,
    plain_bits,
)
from .select_means import Means, box_means
from .select_query import select_rows
from .select_tiles import mean_queries

BLOCK_Q = 64  # queries of one tile: one warpgroup's wgmma; the reasons are in select_gate
WARPS, STAGES = 4, 3
RUN = 8  # tiles that one program goes through
REGISTERS = 168  # a thread: three programs an SM. Not for float32, long heads or pools of one box, which need more
BINS = 65536  # of the exact histogram; a power of two, at least 512 so that a bin never spans two exponents
BLOCK_BINS = 4096  # the same for pool "block", which has a histogram for every box
CAPACITY = 1024  # entries at the cut-off that are listed and ranked; more are looked at more closely, or are equal
CHUNK = 512  # partial results of a pool that are read at a time
SAMPLE_SHARE = 1 / 32  # of the queries, for the first bracket
SAMPLE_QUERIES = 1024  # but at least so many
REPLICAS = {"head_global": 4, "overall": 32, "block": 1}  # copies of the sampled histogram

_POOLS = {"head_global": HEAD_GLOBAL.value, "overall": OVERALL.value, "block": BLOCK.value}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# A debugging aid: called with the name of a stage and the state of every pool (int64 [P, 8]) after it. Calls that are
# replayed, see launches, do not come through here.
observer: Callable[[str, torch.Tensor], None] | None = None


def select(
    work: Work,
    q: torch.Tensor,
    k: torch.Tensor,
    key_mask: torch.Tensor,
    geometry: Geometry,
    *,
    pool: str,
    mode: str,
    threshold: float,
    topk: int,
    tile: int = 0,
) -> torch.Tensor:
    """Bit sets of the boxes that each video query attends to, int32 [B, H, N, ceil(C / 32)]; of tiles [B, H, M, W].

    ``q`` and ``k`` have a last stride of 1. As ``reference_select.select``, in float32 accuracy: entries whose weights
    are closer to the cut-off than that may be chosen differently.
    """
    if q.dtype not in _DTYPES or k.dtype != q.dtype:
        raise TypeError(
            f"the Triton selection takes float16, bfloat16 or float32 q and k of one dtype, not {q.dtype} and {k.dtype};"
            " vmoba_compile.kernels.reference_select.select takes any"
        )
    batch, heads = q.shape[:2]
    boxes = geometry.num_boxes
    means = box_means(work, k, key_mask, geometry, tile)
    if tile:
        q, own = mean_queries(work, q, geometry, tile)
        means, geometry = means._replace(own=own), geometry.by_tile(tile)
    words = work.output(batch, heads, geometry.num_video, geometry.num_words, dtype=torch.int32)
    group = heads // k.shape[1]
    kept = min(topk, boxes) if mode == "topk" else boxes
    everything = threshold >= 1 if mode == "threshold" else kept == boxes
    if everything or kept == 1:
        work.launch(
            plain_bits, (triton.cdiv(geometry.num_video, BLOCK_Q), batch * heads),
            means.sizes, words, geometry.num_video, heads, geometry.num_words,
            *geometry.grid[1:], *geometry.block, *geometry.counts[1:],
            BLOCK_Q=BLOCK_Q, EVERYTHING=everything, num_warps=4,
        )  # fmt: skip
        return words
    amount = float(threshold) if mode == "threshold" else float(kept - 1)
    if mode == "topk" and pool != "query_head":
        amount *= geometry.num_video * (heads if pool == "overall" else 1)
    # Triton passes floats as float32: hand over the bits of the float64, in halves that every compiler passes.
    bits: tuple[int, int] = struct.unpack("<ii", struct.pack("<d", amount))
    if pool == "query_head":
        select_rows(work, q, means, words, geometry, group, bits, topk=mode == "topk")
    else:
        _select_pools(work, q, means, words, geometry, group, bits, pool=pool, topk=mode == "topk")
    return words


def _select_pools(
    work: Work, q: torch.Tensor, means: Means, words: torch.Tensor, geometry: Geometry, group: int,
    amount: tuple[int, int], *, pool: str, topk: bool,
) -> None:  # fmt: skip
    """Fill ``words`` for pools that join queries."""
    batch, heads = q.shape[:2]
    queries, padded = geometry.num_video, geometry.num_words * WORD_BITS
    runs = triton.cdiv(queries, RUN * BLOCK_Q)
    per_box = pool == "block"
    pools_per_sample = {"head_global": heads, "overall": 1, "block": padded}[pool]
    pools = batch * pools_per_sample
    entries = queries * (1 if per_box else geometry.num_boxes) * (1 if pool == "head_global" else heads)
    bins, replicas = BLOCK_BINS if per_box else BINS, REPLICAS[pool]
    levels = 1 + -(-32 // (bins.bit_length() - 1))
    # A bin holds a number of up to ``entries`` above a sum of as many offsets; see gate_histogram.
    sum_bits = 63 - entries.bit_length()
    fields = {"sum_bits": sum_bits, "drop_bits": sum_bits - entries.bit_length()}

    # Scratch: counters, which start at zero, and what is written before it is read. Each is a tensor of its own: a
    # compiler that sees a launch write to a part of a tensor may copy the whole.
    fine = work.zeros(pools * bins, dtype=torch.int64)
    coarse, lengths = (work.zeros(n, dtype=torch.int32) for n in (pools * replicas * COARSE_BINS.value, pools))
    per_sample = heads * runs * (padded if per_box else geometry.num_words)
    partials = [work.empty(batch * per_sample, dtype=torch.float64) for _ in range(4)]
    ints = work.empty(pools, STATE.value, dtype=torch.int64)
    numbers = work.empty(pools, STATE.value, dtype=torch.float64)
    listed = work.empty(pools * CAPACITY, dtype=torch.int64)
    ties = work.empty(*words.shape, dtype=words.dtype)

    # Where a pool's numbers per tile lie: first of the sample, first of the pool, stride, how many.
    where = {
        "pools_per_sample": pools_per_sample,
        "per_sample": per_sample,
        "per_pool": {"head_global": runs * geometry.num_words, "overall": 0, "block": 1}[pool],
        "stride": padded if per_box else 1,
        "count": runs * (1 if per_box else geometry.num_words) * (1 if pool == "head_global" else heads),
    }
    gate = (*q.stride()[:3], geometry.prefix, queries, heads, group, geometry.num_words, RUN * BLOCK_Q)
    flags: dict[str, Any] = {
        "HEAD_DIM": q.shape[3], "DIM": means.dim, "BLOCK_Q": BLOCK_Q, "TERMS": means.num_terms,
        "RESCALE": means.rescale, "POOL": _POOLS[pool],
        "num_warps": 2 * WARPS if per_box else WARPS,  # every column has bounds and addresses of its own
        "num_stages": STAGES if means.dim <= 128 else 1,  # of long heads, one copy fits in shared memory
    }  # fmt: skip
    if means.num_terms > 1 and means.dim <= 128 and not per_box:
        flags["maxnreg"] = REGISTERS
    grid = (runs * geometry.num_words, batch * heads)
    inputs = (q, means.terms, means.sizes, means.own)
    cut = {"BINS": bins, "CHUNK": CHUNK, "num_warps": 16 if bins == BINS else 4}

    samples = min(queries, max(1, SAMPLE_QUERIES, int(SAMPLE_SHARE * queries)))
    sample_runs = triton.cdiv(samples, RUN * BLOCK_Q)
    work.launch(
        gate_range, ((sample_runs + runs) * geometry.num_words, batch * heads), *inputs, *partials, coarse, *gate,
        replicas, samples, sample_runs, **flags,
    )  # fmt: skip
    work.launch(
        find_bracket, (pools,), *partials, coarse, means.sizes, ints, numbers,
        amount_low=amount[0], amount_high=amount[1], num_video=queries, heads=heads, padded=padded, replicas=replicas,
        **where, POOL=_POOLS[pool], TOPK=topk, BINS=bins, CHUNK=1024, num_warps=8,
    )  # fmt: skip
    _observe("bracket", ints)
    above = partials[:2]  # the range is known: its place serves again
    for level in range(levels):
        work.launch(gate_histogram, grid, *inputs, ints, numbers, *above, fine, *gate, **fields, **flags, BINS=bins)
        work.launch(
            find_cut, (pools,), *above, fine, ints, numbers, **where, **fields,
            FIRST=level == 0, TOPK=topk, CAPACITY=CAPACITY, **cut,
        )  # fmt: skip
        _observe(f"level {level}", ints)
    work.launch(gate_bits, grid, *inputs, ints, words, ties, listed, lengths, *gate, **flags, CAPACITY=CAPACITY)
    work.launch(
        take_last, (pools,), ints, numbers, words, ties, listed, lengths, queries, heads, geometry.num_words, entries,
        POOL=_POOLS[pool], CAPACITY=CAPACITY, ROWS=32, COLUMNS=128, CHUNK=2048, num_warps=8,
    )  # fmt: skip


def _observe(stage: str, state: torch.Tensor) -> None:
    if observer is not None:
        observer(stage, state)
