"""Mean query of every tile: what selects where ``granularity="tile"`` joins queries before the selection.

One program adds up one tile of one head, all of its rows in flight at once (64 values a thread at most): the queries are
read once, from then on the selection sees some hundred rows a head. ``partition.tile_of`` says which queries make a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launches import Work
from .partition import Geometry
from .triton_tools import power_of_two, tile_in_box, token_in_box

_SIZES = [
    "heads", "prefix", "parts", "frames", "rows", "columns", "bt", "bh", "bw", "box_rows", "box_columns",
]  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def mean_query(
    q, out, own, stride_qb, stride_qh, stride_qs, heads, prefix, parts, frames, rows, columns, bt, bh, bw, box_rows,
    box_columns, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Mean of the queries of one tile. One without tokens takes the query before it: of its box, since a box has some."""
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    t0, h0, w0, eh, ew, first, last = tile_in_box(tile, parts, frames, rows, columns, bt, bh, bw, box_rows, box_columns)
    first = tl.where(first == last, first - 1, first)
    r = first + tl.arange(0, TILE)
    token = (prefix + token_in_box(r, t0, h0, w0, eh, ew, rows, columns)).to(tl.int64)
    dims = tl.arange(0, DIM)
    lines = q + (row // heads) * stride_qb + (row % heads) * stride_qh + token * stride_qs
    read = (r < last)[:, None] & (dims < HEAD_DIM)[None, :]
    queries = tl.load(lines[:, None] + dims[None, :], mask=read, other=0.0)  # [TILE, DIM]
    mean = tl.sum(queries.to(tl.float32), 0) / (last - first).to(tl.float32)
    at = out + (row * tl.num_programs(0) + tile) * HEAD_DIM + dims
    tl.store(at, mean.to(out.dtype.element_ty), mask=dims < HEAD_DIM)
    if row == 0:
        plane = box_rows * box_columns
        tl.store(own + tile, tile // plane // parts * plane + tile % plane)


def mean_queries(work: Work, q: torch.Tensor, geometry: Geometry, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, H, M, D] in q's dtype from ``q`` [B, H, S, D] (last stride 1), and the box of every tile, int32 [M].

    Tiles are in the order of ``partition.tile_of``.
    """
    batch, heads, _, head_dim = q.shape
    asking = geometry.by_tile(tile)
    out = work.empty(batch, heads, asking.num_video, head_dim, dtype=q.dtype)
    own = work.empty(asking.num_video, dtype=torch.int32)
    work.launch(
        mean_query, (asking.num_video, batch * heads), q, out, own, *q.stride()[:3], heads, geometry.prefix,
        asking.block[0], *geometry.grid, *geometry.block, *geometry.counts[1:],
        HEAD_DIM=head_dim, DIM=max(16, power_of_two(head_dim)), TILE=tile, num_warps=8,
    )  # fmt: skip
    return out, own
