"""Which implementation attends, with how much scratch memory, and over how many samples at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import attend_hopper, attend_tiles, attend_triton
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
    q: Tensor, k: Tensor, v: Tensor, words: Tensor, key_mask: Tensor, geometry: Geometry, scale: float,
    *, implementation: str, share: float, tile: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``out`` [B, H, S, D] and ``lse`` [B, H, S] from bit sets ``words`` by "hopper" or "triton"; of tiles by "triton".

    At most ``share`` of the other boxes' entries of a sample are selected; where a selection has more, all is NaN.
    Tiles of queries have no such bound.
    """
    tensor_bytes = 2 * (q.numel() + k.numel()) * q.element_size()
    scratch = max(SCRATCH_FLOOR, int(SCRATCH_SHARE * tensor_bytes))
    if tile:
        return attend_tiles.attention(q, k, v, words, key_mask, geometry, scale, tile=tile, scratch=scratch)
    run = attend_triton.attention
    if implementation == "hopper":
        reason = why_not_hopper(q, k, v)
        if reason:
            raise ValueError(f"implementation='hopper' cannot run: {reason}; use 'auto' or 'triton'")
        run = attend_hopper.attention
    batch, heads = q.shape[:2]
    capacity = pair_capacity(geometry, heads, share)
    together = max(1, min(batch, 2**31 // capacity, scratch // (8 * capacity)))
    if together >= batch:
        return run(q, k, v, words, key_mask, geometry, scale, batch * capacity, scratch)
    parts = []
    for i in range(0, batch, together):
        some = slice(i, i + together)
        mask = key_mask[some] if key_mask.numel() else key_mask
        pairs = min(together, batch - i) * capacity
        parts.append(run(q[some], k[some], v[some], words[some], mask, geometry, scale, pairs, scratch))
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])
