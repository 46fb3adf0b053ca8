"""Which implementation attends, with how much scratch memory, and how many samples and heads at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import ModuleType

import torch
from torch import Tensor

from . import (
    attend_backward,
    attend_hopper,
    attend_lists,
    attend_tiles,
    attend_triton,
    backward_hopper,
    backward_triton,
)
from .launches import Work, is_dynamic, part_of
from .partition import Geometry

MEMORY_SHARE = 0.24  # of the bytes of q, k, v and out, for all that dense attention does not need
GRADIENT_MEMORY_SHARE = 0.5  # the same for the backward, in which dense attention needs more as well
MEMORY_FLOOR = 32 * 2**20  # bytes; on short sequences more would be gained by few chunks than lost
MAX_GRID = 65535  # of programs along the second axis of a launch
ROOM = 36 * 2**20  # bytes for partial results, or a quarter of all; if lists leave less, heads are done in groups


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


def most_samples(geometry: Geometry, heads: int, share: float) -> int:
    """Largest batch that can be done at a time: rows of partial results and pairs are counted in 32 bits."""
    slack = attend_lists.GROUP * geometry.num_key_boxes + attend_lists.ROUNDING
    rows = pair_capacity(geometry, heads, share) + 3 * heads * slack
    return min((2**31 - 1) // rows, MAX_GRID // heads)


def table_bytes(geometry: Geometry, samples: int, heads: int, share: float) -> int:
    """Of entries, tiles and places."""
    return samples * (17 * pair_capacity(geometry, heads, share) // 4 + 8 * heads * geometry.num_tokens)


def why_not_hopper(q: Tensor, k: Tensor, v: Tensor) -> str:
    """Why the kernel for Hopper cannot take the tensors; empty if it can."""
    if q.device.type != "cuda":
        return "the tensors are not on a GPU"
    return attend_hopper.why_not(q, k, v)


def attention(
    work: Work, q: Tensor, k: Tensor, v: Tensor, words: Tensor, key_mask: Tensor, geometry: Geometry, scale: float,
    *, implementation: str, share: float, by_head: bool, tile: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``out`` [B, H, S, D] and ``lse`` [B, H, S] from bit sets ``words`` by "hopper" or "triton"; of tiles by "triton".

    At most ``share`` of the other boxes' entries of a sample, or of a head if ``by_head``, are selected; where a
    selection has more, all is NaN. Tiles of queries have no such bound.
    """
    heads = q.shape[1]
    samples = 1 if is_dynamic(q.shape[0]) else q.shape[0]  # as many as the buffers' sizes are planned for
    tensor_bytes = 2 * samples * (q.shape[1] + k.shape[1]) * math.prod(q.shape[2:]) * q.element_size()
    given = 4 * samples * heads * (words.shape[2] * words.shape[3] + geometry.num_tokens)  # bit sets, log-sum-exps
    scratch = max(MEMORY_FLOOR, int(work.memory_factor * MEMORY_SHARE * tensor_bytes) - given)
    out, lse = work.output(*q.shape, dtype=q.dtype), work.output(*q.shape[:3], dtype=torch.float32)
    if tile:
        attend_tiles.attention(work, q, k, v, words, key_mask, out, lse, geometry, scale, tile=tile, scratch=scratch)
        return out, lse
    run: Callable[..., None] = attend_triton.attention
    if implementation == "hopper":
        _must_run(why_not_hopper(q, k, v))
        run = attend_hopper.attention
    for own, kv, limits in list_groups(geometry, q, k, share, by_head, scratch, whole=not work.takes_parts):
        inputs = [work.part(x, *which) for x, which in ((q, own), (k, kv), (v, kv), (words, own))]
        with work.section():
            results = part_of(out, *own), part_of(lse, *own)
            run(work, *inputs, work.part(key_mask, own[0]), *results, geometry, scale, **limits)
    return out, lse


def _must_run(reason: str) -> None:
    if reason:
        raise ValueError(f"implementation='hopper' cannot run: {reason}; use 'auto' or 'triton'")


def attention_backward(
    work: Work, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, words: Tensor, key_mask: Tensor, out: Tensor, lse: Tensor,
    dlse: Tensor, geometry: Geometry, scale: float, *, implementation: str, share: float, by_head: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``dq``, ``dk`` and ``dv`` in the shapes and dtypes of ``q``, ``k`` and ``v``; see :func:`attention`."""
    kernels: ModuleType = backward_triton
    if implementation == "hopper":
        _must_run(why_not_hopper(q, k, v))
        kernels = backward_hopper
    dq, dk, dv = (work.output(*x.shape, dtype=x.dtype) for x in (q, k, v))
    tensor_bytes = 2 * (q.numel() + k.numel()) * q.element_size()
    scratch = max(MEMORY_FLOOR, int(GRADIENT_MEMORY_SHARE * tensor_bytes) - 4 * words.numel())
    delta = attend_backward.deltas(work, dout, out, dlse)
    for own, kv, limits in list_groups(geometry, q, k, share, by_head, scratch):
        part = work.part
        with work.section():
            attend_backward.gradients(
                work, part(dout, *own), part(q, *own), part(k, *kv), part(v, *kv), part(words, *own),
                part(key_mask, own[0]), part(lse, *own), delta[own], dq[own], dk[kv], dv[kv], geometry, scale,
                kernels=kernels, **limits,
            )  # fmt: skip
    return dq, dk, dv


def list_groups(
    geometry: Geometry, q: Tensor, k: Tensor, share: float, by_head: bool, scratch: int, whole: bool = False
) -> Iterator[tuple[tuple[slice, slice], tuple[slice, slice], dict[str, int]]]:
    """Samples and heads that are done at a time: slices of q and of k, and what bounds their lists and buffers.

    ``whole``: all at once, whatever the lists take.
    """
    batch, heads, kv_heads = *q.shape[:2], k.shape[1]
    group = heads // kv_heads
    capacity = pair_capacity(geometry, heads, share)
    if is_dynamic(batch):  # all samples at a time, however many there will be
        everything = slice(None), slice(None)
        head_capacity = pair_capacity(geometry, 1, share) if by_head else capacity
        yield everything, everything, {"capacity": batch * capacity, "head_capacity": head_capacity, "scratch": scratch}
        return
    together = max(1, min(batch, (2**31 - 1) // capacity, scratch // (8 * capacity), MAX_GRID // heads))
    step = kv_heads
    if whole:
        together = batch
    elif by_head and together == 1 and 4 * capacity > MEMORY_FLOOR // 2:
        packed = 4 * geometry.num_tokens * q.shape[-1] * q.element_size()  # keys and values of two heads
        room = scratch - packed - min(ROOM, scratch // 4)
        for parts in range(1, kv_heads + 1):
            step = math.ceil(kv_heads / parts)
            fits = pair_capacity(geometry, step * group, share) < 2**31
            if fits and table_bytes(geometry, 1, step * group, share) <= room:
                break
    for i in range(0, batch, together):
        samples = slice(i, min(i + together, batch))
        count = samples.stop - samples.start
        for first in range(0, kv_heads, step):
            kv = samples, slice(first, min(first + step, kv_heads))
            own = samples, slice(kv[1].start * group, kv[1].stop * group)
            here = own[1].stop - own[1].start
            pairs = count * pair_capacity(geometry, here, share)
            limits = {
                "capacity": pairs,
                "head_capacity": pair_capacity(geometry, 1, share) if by_head else pairs,
                "scratch": max(scratch - table_bytes(geometry, count, here, share), scratch // 4),
            }
            yield own, kv, limits
