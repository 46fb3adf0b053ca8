"""Brute-force VMoBA (arXiv 2506.23858): loops, Python sorting and float64, sharing no code with the package."""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor

Triple = tuple[int, int, int]
Entry = tuple[int, int, int]  # (box, query, head): tuples compare in the order in which equal entries are taken


def boxes(grid: Triple, block: Triple) -> list[list[int]]:
    """Raster indices of the video tokens of every box, boxes in raster order."""
    frames, rows, columns = grid
    return [
        [
            (t * rows + y) * columns + x
            for t in range(t0, min(t0 + block[0], frames))
            for y in range(y0, min(y0 + block[1], rows))
            for x in range(x0, min(x0 + block[2], columns))
        ]
        for t0 in range(0, frames, block[0])
        for y0 in range(0, rows, block[1])
        for x0 in range(0, columns, block[2])
    ]


def tiles(grid: Triple, block: Triple, tile: int) -> list[tuple[int, list[int], list[int]]]:
    """Of every tile of queries: its box, its tokens, and the tokens whose mean is its query. In the order of tiles."""
    members = boxes(grid, block)
    parts = math.ceil(len(members[0]) / tile)  # the first box is a whole one
    frames = math.ceil(grid[0] / block[0])
    found = []
    for a in range(frames):
        for part in range(parts):
            for box in range(a * len(members) // frames, (a + 1) * len(members) // frames):
                tokens = members[box]
                part_of = [rank * parts // len(tokens) for rank in range(len(tokens))]
                mine = [token for token, other in zip(tokens, part_of, strict=True) if other == part]
                before = [token for token, other in zip(tokens, part_of, strict=True) if other < part]
                assert len(mine) <= tile
                found.append((box, mine, mine or before[-1:]))
    return found


def gate(q: Tensor, k: Tensor, members: list[list[int]], valid: list[bool]) -> dict[Entry, float]:
    """Products of the video queries [H, N, D] of one sample with the mean valid key of every box that has one."""
    values = {}
    for box, tokens in enumerate(members):
        kept = [token for token in tokens if valid[token]]
        if kept:
            means = sum(k[:, token].double() for token in kept) / len(kept)
            for head in range(len(q)):
                products = q[head].double() @ means[head * len(k) // len(q)]
                values |= {(box, query, head): value for query, value in enumerate(products.tolist())}
    return values


def take(values: dict[Entry, float], own: list[int], threshold: float | None, extra: int) -> list[Entry]:
    """Entries of one pool taken besides the self entries; ``threshold`` None: the ``extra`` best."""
    low, high = min(values.values()), max(values.values())
    weight = {e: 1.0 if high - low <= 1e-6 else (value - low) / (high - low) for e, value in values.items()}
    others = sorted((e for e in values if own[e[1]] != e[0]), key=lambda e: (-weight[e], e))
    if threshold is None:
        return others[:extra]
    if threshold >= 1:
        return others
    total = sum(weight.values()) + 1e-6
    need = max(0.0, threshold - sum(weight[e] for e in values if own[e[1]] == e[0]) / total)
    held = 0.0
    for count, entry in enumerate(others, start=1):
        held += weight[entry]
        if held / total >= need:
            return others[:count]
    return others


@torch.no_grad()
def select(
    q: Tensor,
    k: Tensor,
    grid: Triple,
    block: Triple,
    *,
    prefix: int = 0,
    suffix: int = 0,
    key_mask: Tensor | None = None,
    pool: str = "head_global",
    mode: str = "threshold",
    threshold: float = 0.25,
    topk: int | None = None,
    tile: int = 0,
) -> Tensor:
    """Boxes that each video query attends to, bool [B, H, N, C]; with ``tile`` chosen for tiles of queries."""
    members = boxes(grid, block)
    batch, heads, video = q.shape[0], q.shape[1], slice(prefix, q.shape[2] - suffix)
    queries = q[:, :, video]
    if tile:
        asking = tiles(grid, block, tile)
        queries = torch.stack([queries[:, :, mean].double().mean(2) for _, _, mean in asking], 2).to(q.dtype)
    else:
        box_of = {token: box for box, tokens in enumerate(members) for token in tokens}
        asking = [(box_of[token], [token], [token]) for token in range(len(box_of))]
    own = {query: box for query, (box, _, _) in enumerate(asking)}
    extra = (min(topk or 1, len(members)) - 1) * {"head_global": len(own), "overall": heads * len(own)}.get(pool, 1)
    pool_of = {
        "head_global": lambda box, query, head: head,
        "query_head": lambda box, query, head: (query, head),
        "block": lambda box, query, head: box,
        "overall": lambda box, query, head: 0,
    }[pool]
    num_video = sum(map(len, members))
    selected = torch.zeros(batch, heads, num_video, len(members), dtype=torch.bool)
    for box, tokens, _ in asking:
        selected[:, :, tokens, box] = True
    for sample in range(batch):
        valid = [True] * num_video if key_mask is None else key_mask[sample, video].tolist()
        pools: dict[object, dict[Entry, float]] = defaultdict(dict)
        for entry, value in gate(queries[sample], k[sample, :, video], members, valid).items():
            pools[pool_of(*entry)][entry] = value
        for values in pools.values():
            for box, query, head in take(values, own, threshold if mode == "threshold" else None, extra):
                selected[sample, head, asking[query][1], box] = True
    return selected.to(q.device)


def allowed(
    selected: Tensor, grid: Triple, block: Triple, *, prefix: int = 0, suffix: int = 0, key_mask: Tensor | None = None
) -> Tensor:
    """Which query may attend to which key, bool [B, H, S, S]."""
    batch, heads, video, _ = selected.shape
    pairs = torch.ones(batch, heads, *[prefix + video + suffix] * 2, dtype=torch.bool, device=selected.device)
    for box, tokens in enumerate(boxes(grid, block)):
        for token in tokens:
            pairs[:, :, prefix : prefix + video, prefix + token] = selected[..., box]
    return pairs if key_mask is None else pairs & key_mask[:, None, None, :]


def attend(q: Tensor, k: Tensor, v: Tensor, pairs: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Softmax attention over the allowed pairs, ``out`` and ``lse`` in float64; 0 and -inf where there are none."""
    group = q.shape[1] // k.shape[1]
    keys, values = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
    scores = q.double() @ keys.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~pairs, float("-inf"))
    weights = scores.softmax(-1).masked_fill(~pairs.any(-1, keepdim=True), 0.0)
    return weights @ values, scores.logsumexp(-1)


def attention(
    q: Tensor, k: Tensor, v: Tensor, grid: Triple, block: Triple, *, prefix: int = 0, suffix: int = 0,
    key_mask: Tensor | None = None, scale: float | None = None, **selection,
) -> Tensor:  # fmt: skip
    """VMoBA attention [B, H, S, D] in q's dtype, differentiable; ``selection``: pool, mode, threshold, topk."""
    layout = {"prefix": prefix, "suffix": suffix, "key_mask": key_mask}
    selected = select(q, k, grid, block, **layout, **selection)
    return attend(q, k, v, allowed(selected, grid, block, **layout), scale)[0].to(q.dtype)
