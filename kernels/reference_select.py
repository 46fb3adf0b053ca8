"""Block selection in plain torch, on any device: the definition that every other implementation is tested against.

Runs in float64 throughout, one head (or one sample, for the pools that join heads) at a time, so the peak is a few
times N x C numbers: linear in the tokens. Source: arXiv 2506.23858, section 3.3 (global selection) and 3.4 (threshold).
"""

from __future__ import annotations

from itertools import pairwise

import torch

from .partition import Geometry, box_order, pack_bits, tile_of, tile_tokens

RANGE_FLOOR = 1e-6  # below this range of the gate every weight is 1
SUM_FLOOR = 1e-6  # added to the pool's total before dividing by it


def box_means(keys: torch.Tensor, valid: torch.Tensor | None, geometry: Geometry) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean key of every box.

    ``keys`` [Hkv, N, D] in raster order, ``valid`` bool [N] or None. Returns float64 [Hkv, C, D] and bool [C], False
    for a box without any valid key (its mean is 0).
    """
    order, starts = box_order(geometry.grid, geometry.block, keys.device)
    boxed = keys.double()[:, order]
    weight = (
        torch.ones(keys.shape[1], dtype=torch.float64, device=keys.device) if valid is None else valid[order].double()
    )
    boxed = torch.where(weight[:, None] > 0, boxed, 0.0)
    sums, counts = [], []
    for start, end in pairwise(starts):
        sums.append(boxed[:, start:end].sum(1))
        counts.append(weight[start:end].sum())
    size = torch.stack(counts)
    return torch.stack(sums, dim=1) / size.clamp(min=1)[:, None], size > 0


def tile_means(queries: torch.Tensor, geometry: Geometry, tile: int) -> torch.Tensor:
    """Mean query of every tile: ``queries`` [N, D] in raster order to [M, D], float64 sums rounded to their dtype.

    A tile without tokens, in a box of fewer tokens than tiles, has the query of the tile before it in its box.
    """
    tokens = tile_tokens(geometry, tile, queries.device)
    order = torch.argsort(tile_of(geometry.grid, geometry.block, tile, queries.device), stable=True)
    place = torch.arange(int(tokens.max()), device=queries.device)
    at = (tokens.cumsum(0) - tokens)[:, None] + place
    rows = queries[order[at.clamp(max=geometry.num_video - 1)]].double()  # [M, tokens of the longest tile, D]
    sums = torch.where((place < tokens[:, None])[..., None], rows, 0.0).sum(1)
    means = (sums / tokens.clamp(min=1)[:, None]).to(queries.dtype)
    parts, boxes = geometry.by_tile(tile).block[0], geometry.num_boxes
    frames = geometry.counts[0]
    number = torch.arange(parts, device=queries.device).view(1, parts, 1).expand(frames, parts, boxes // frames)
    last = torch.where(tokens.view(number.shape) > 0, number, 0).cummax(1).values
    grouped = means.view(frames, parts, boxes // frames, -1)
    return grouped.gather(1, last[..., None].expand_as(grouped)).flatten(0, 2)


def choose(
    gate: torch.Tensor, own: torch.Tensor, valid: torch.Tensor, *, threshold: float | None, extra: int
) -> torch.Tensor:
    """Entries taken from each pool, bool [P, E].

    ``gate`` float64 [P, E] holds a pool a row, entries in the order in which ties are taken; ``own`` marks self
    entries, ``valid`` the entries whose box has keys. With ``threshold`` the cumulative-weight rule applies,
    otherwise the ``extra`` largest other entries are taken.
    """
    other = valid & ~own
    available = other.sum(1, keepdim=True)
    if threshold is not None and threshold >= 1:
        return own | valid
    low = gate.masked_fill(~valid, float("inf")).amin(1, keepdim=True)
    high = gate.masked_fill(~valid, float("-inf")).amax(1, keepdim=True)
    flat = ~(high - low > RANGE_FLOOR)
    weight = torch.where(flat, 1.0, (gate - low) / torch.where(flat, 1.0, high - low))
    weight = torch.where(valid, weight, 0.0)
    rank_by = torch.where(flat, 0.0, gate).masked_fill(~other, float("-inf"))
    order = torch.sort(rank_by, dim=1, descending=True, stable=True).indices
    if threshold is None:
        count = torch.full_like(available, extra)
    else:
        total = weight.sum(1, keepdim=True) + SUM_FLOOR
        need = (threshold - (weight * own).sum(1, keepdim=True) / total).clamp(min=0)
        reached = (weight * other).gather(1, order).cumsum(1) / total
        count = (reached < need).sum(1, keepdim=True) + 1
    count = torch.minimum(count, available)
    taken = torch.arange(gate.shape[1], device=gate.device) < count
    return own | torch.zeros_like(own).scatter_(1, order, taken)


def select(
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
    """Bit sets of the boxes that each video query attends to, int32 [B, H, N, ceil(C / 32)].

    ``q`` [B, H, S, D], ``k`` [B, Hkv, S, D], ``key_mask`` bool [B, S] or no elements. The box that holds the query is
    always selected; the others are chosen within ``pool``, never across samples. With ``tile`` tokens a tile
    (``partition.tile_of``) the rule is applied to the tiles' mean queries, each of which counts once: [B, H, M, W].
    """
    batch, heads = q.shape[:2]
    boxes, video = geometry.num_boxes, geometry.video
    group = heads // k.shape[1]
    asking = geometry.by_tile(tile)
    own = torch.zeros(asking.num_video, boxes, dtype=torch.bool, device=q.device)
    order, starts = box_order(asking.grid, asking.block, q.device)
    for box, (start, end) in enumerate(pairwise(starts)):
        own[order[start:end], box] = True

    fraction = threshold if mode == "threshold" else None
    extra_per_query = min(topk, boxes) - 1
    selected = torch.empty(batch, heads, asking.num_video, geometry.num_words, dtype=torch.int32, device=q.device)
    for sample in range(batch):
        mask = key_mask[sample, video] if key_mask.numel() else None
        means, filled = box_means(k[sample, :, video], mask, geometry)
        together = heads if pool in ("overall", "block") else 1
        for first in range(0, heads, together):
            chunk = range(first, first + together)
            queries = [q[sample, head, video] for head in chunk]
            if tile:
                queries = [tile_means(rows, geometry, tile) for rows in queries]
            gate = torch.stack([x.double() @ means[head // group].T for x, head in zip(queries, chunk, strict=True)])
            to_pools, from_pools = _pooling(pool, gate.shape)
            extra = extra_per_query * (gate.shape[0] * gate.shape[1] if pool != "query_head" else 1)
            taken = choose(
                to_pools(gate),
                to_pools(own.expand_as(gate)),
                to_pools(filled.expand_as(gate)),
                threshold=fraction,
                extra=extra,
            )
            taken = from_pools(taken)
            for index, head in enumerate(chunk):
                selected[sample, head] = pack_bits(taken[index])
    return selected


def _pooling(pool: str, shape: torch.Size):
    """Functions from [H, N, C] to pools [P, E] and back. Within a pool, entries run by box, then query, then head."""
    heads, queries, boxes = shape
    if pool == "query_head":
        return lambda x: x.reshape(heads * queries, boxes), lambda x: x.reshape(heads, queries, boxes)
    pools = boxes if pool == "block" else 1
    return (
        lambda x: x.permute(2, 1, 0).reshape(pools, -1),
        lambda x: x.reshape(boxes, queries, heads).permute(2, 1, 0),
    )
