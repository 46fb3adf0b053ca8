"""Sparse attention forward and backward in plain torch, on any device: the definition for every other implementation.

Works box by box: the queries that selected a box are gathered, attend to its keys and are merged into a running
softmax, so unselected pairs are never computed and memory stays linear in the tokens. Accumulates in float32 (float64
for float64 inputs). Source: arXiv 2506.23858, section 3.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch

from .partition import Geometry, box_order, per_token, unpack_bits

# Scores computed at once: small enough to stay in a CPU's caches, large enough to fill a GPU.
CHUNK_SCORES = {"cpu": 2**20, "cuda": 2**26}


@dataclass(frozen=True)
class Tile:
    """Rows (query positions) and keys (key positions) of the sequence that attend to each other, all to all."""

    rows: torch.Tensor
    keys: torch.Tensor


def tiles(selected: torch.Tensor, valid: torch.Tensor | None, geometry: Geometry) -> Iterator[Tile]:
    """Cut one head's attention into dense tiles.

    ``selected`` int32 [N, W] is the head's bit sets, ``valid`` bool [S] the keys that may be attended (None: all). A
    video query meets its boxes and every condition token, a condition query meets everything.
    """
    device = selected.device
    limit = CHUNK_SCORES.get(device.type, CHUNK_SCORES["cpu"])

    def split(rows: torch.Tensor, keys: torch.Tensor) -> Iterator[Tile]:
        if valid is not None:
            keys = keys[valid[keys]]
        if rows.numel() == 0 or keys.numel() == 0:
            return
        # Long key lists are cut as well, so that a tile never has more than `limit` scores.
        for key_part in keys.split(max(1, limit // 256)):
            for row_part in rows.split(max(1, limit // key_part.numel())):
                yield Tile(row_part, key_part)

    condition = geometry.condition_index(device)
    video = torch.arange(geometry.prefix, geometry.prefix + geometry.num_video, device=device)
    yield from split(condition, torch.arange(geometry.num_tokens, device=device))
    yield from split(video, condition)
    order, starts = box_order(geometry.grid, geometry.block, device)
    mask = unpack_bits(selected, geometry.num_boxes).T.contiguous()  # [C, N]
    for box, (start, end) in enumerate(pairwise(starts)):
        rows = mask[box].nonzero().squeeze(1)
        yield from split(rows + geometry.prefix, order[start:end] + geometry.prefix)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    selected: torch.Tensor,
    key_mask: torch.Tensor,
    geometry: Geometry,
    scale: float,
    tile: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention over the selected boxes and the condition tokens.

    ``q`` [B, H, S, D], ``k``, ``v`` [B, Hkv, S, D], ``selected`` int32 [B, H, N, W], or [B, H, M, W] with ``tile`` tokens
    a tile, ``key_mask`` bool [B, S] or no elements. Returns ``out`` [B, H, S, D] in q's dtype and ``lse`` [B, H, S]
    (natural logarithm, float32 or float64). A query that may attend to nothing gets 0 and an lse of -inf.
    """
    batch, heads, _, head_dim = q.shape
    group = heads // k.shape[1]
    dtype = _accumulator(q)
    selected = per_token(selected, geometry, tile)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=dtype, device=q.device)
    for sample in range(batch):
        valid = key_mask[sample] if key_mask.numel() else None
        for head in range(heads):
            if head % group == 0:
                keys, values = k[sample, head // group].to(dtype), v[sample, head // group].to(dtype)
            queries = q[sample, head].to(dtype) * scale
            peak = queries.new_full((geometry.num_tokens,), float("-inf"))
            total = queries.new_zeros(geometry.num_tokens)
            sums = queries.new_zeros(geometry.num_tokens, head_dim)
            for part in tiles(selected[sample, head], valid, geometry):
                scores = queries[part.rows] @ keys[part.keys].T
                old = peak[part.rows]
                new = torch.maximum(old, scores.amax(1))
                scores.sub_(new[:, None]).exp_()
                decay = torch.exp(old - new)
                peak[part.rows] = new
                total[part.rows] = total[part.rows] * decay + scores.sum(1)
                sums[part.rows] = torch.addcmul(scores @ values[part.keys], sums[part.rows], decay[:, None])
            out[sample, head] = (sums / torch.where(total > 0, total, 1.0)[:, None]).to(q.dtype)
            lse[sample, head] = peak + total.log()
    return out, lse


def attention_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    selected: torch.Tensor,
    key_mask: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dlse: torch.Tensor,
    geometry: Geometry,
    scale: float,
    tile: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of :func:`attention` for q, k and v, in their dtypes.

    ``dout`` and ``dlse`` are the gradients of its results ``out`` and ``lse``; ``dlse`` may have no elements.
    """
    batch, heads = q.shape[:2]
    group = heads // k.shape[1]
    dtype = _accumulator(q)
    selected = per_token(selected, geometry, tile)
    delta = (dout.to(dtype) * out.to(dtype)).sum(-1)
    if dlse.numel():
        delta = delta - dlse
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    for sample in range(batch):
        valid = key_mask[sample] if key_mask.numel() else None
        for head in range(heads):
            if head % group == 0:
                keys, values = k[sample, head // group].to(dtype), v[sample, head // group].to(dtype)
                key_grad, value_grad = torch.zeros_like(keys), torch.zeros_like(values)
            queries = q[sample, head].to(dtype) * scale
            grad = dout[sample, head].to(dtype)
            query_grad = torch.zeros_like(queries)
            for part in tiles(selected[sample, head], valid, geometry):
                rows, part_keys, part_values = queries[part.rows], keys[part.keys], values[part.keys]
                part_grad = grad[part.rows]
                weights = (rows @ part_keys.T).sub_(lse[sample, head, part.rows, None]).exp_()
                value_grad[part.keys] += weights.T @ part_grad
                dscores = (part_grad @ part_values.T).sub_(delta[sample, head, part.rows, None]).mul_(weights)
                query_grad[part.rows] += dscores @ part_keys
                key_grad[part.keys] += dscores.T @ rows
            dq[sample, head] = (query_grad * scale).to(q.dtype)
            if head % group == group - 1:
                dk[sample, head // group] = key_grad.to(k.dtype)
                dv[sample, head // group] = value_grad.to(v.dtype)
    return dq, dk, dv


def _accumulator(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
