"""Which implementation attends, with how much scratch memory, and over how many samples at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from . import attend_hopper, attend_triton
from .launches import Work
from .partition import Geometry

SCRATCH_SHARE = 0.2  # of the bytes of q, k, v and out: buffers and tables together stay within a quarter
SCRATCH_FLOOR = 64 * 2**20  # bytes; on short sequences more would be gained by few chunks than lost


def pair_capacity(geometry: Geometry, heads: int, share: float) -> int:
    """Bound on the (query, box) pairs of one sample where at most ``share`` of the other boxes' entries are selected.

    Entries above the cut-off hold at least their share of the weight, so a pool of M other entries gives at most
    ceil(share * M) + 1 of them; the slack of one per query covers every pool and the rounding of sums.
    """
    video, boxes = geometry.num_video, geometry.num_boxes
    others = video * (boxes - 1)
    per_head = video + min(others, math.ceil(share * 1.001 * others) + video)
    condition = geometry.num_condition
    return heads * (per_head + condition * boxes + (geometry.num_tokens if condition else 0))


def why_not_hopper(q: Tensor, k: Tensor, v: Tensor) -> str:
    """Why the kernel for Hopper cannot take the tensors; empty if it can."""
    if q.device.type != "cuda":
        return "the tensors are not on a GPU"
    return attend_hopper.why_not(q, k, v)


def attention(
    work: Work, q: Tensor, k: Tensor, v: Tensor, words: Tensor, key_mask: Tensor, geometry: Geometry, scale: float,
    *, implementation: str, share: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``out`` [B, H, S, D] and ``lse`` [B, H, S] from bit sets ``words`` by "hopper" or "triton".

    At most ``share`` of the other boxes' entries of a sample are selected; where a selection has more, all is NaN.
    """
    run: Callable[..., None] = attend_triton.attention
    if implementation == "hopper":
        reason = why_not_hopper(q, k, v)
        if reason:
            raise ValueError(f"implementation='hopper' cannot run: {reason}; use 'auto' or 'triton'")
        run = attend_hopper.attention
    batch, heads = q.shape[:2]
    capacity = pair_capacity(geometry, heads, share)
    tensor_bytes = 2 * (q.numel() + k.numel()) * q.element_size()
    scratch = max(SCRATCH_FLOOR, int(SCRATCH_SHARE * tensor_bytes))
    together = max(1, min(batch, 2**31 // capacity, scratch // (8 * capacity)))
    out, lse = work.output(*q.shape, dtype=q.dtype), work.output(*q.shape[:3], dtype=torch.float32)
    for i in range(0, batch, together):
        some = slice(i, i + together)
        inputs = [work.samples(x, some) for x in (q, k, v, words, key_mask)]
        pairs = min(together, batch - i) * capacity
        with work.section():
            run(work, *inputs, out[some], lse[some], geometry, scale, pairs, scratch)
    return out, lse
