"""Default block sizes for a grid: the paper's box counts, sizes that divide the grid preferred.

About 3 frames a box (1D, 7 to 8 boxes), 24 to 48 tiles (2D), 36 to 72 boxes (3D): arXiv 2506.23858, section 4.1 and
appendix. Grids whose partitions were measured stand in ``MEASURED``; others are found by scoring every size.
"""

from __future__ import annotations

from functools import lru_cache
from math import ceil, log

Triple = tuple[int, int, int]
Block = tuple[int | None, int | None, int | None]  # None: the whole axis

SCHEMES = ("1d", "2d", "3d")
TARGET_SLABS = 7.5
TARGET_TILES = 40
TARGET_SPATIAL_3D = 18  # tiles per slab of the 3D scheme
SLABS_3D = 3

MEASURED: dict[Triple, dict[str, Block]] = {
    (21, 30, 52): {"1d": (3, None, None), "2d": (None, 5, 13), "3d": (7, 5, 13)},
    (21, 45, 80): {"1d": (3, None, None), "2d": (None, 9, 10), "3d": (7, 15, 20)},
    (24, 36, 64): {"1d": (3, None, None), "2d": (None, 6, 8), "3d": (8, 12, 8)},
}


@lru_cache(maxsize=256)
def default_block(scheme: str, grid: Triple) -> Block:
    """Block size (frames, rows, columns) in tokens for one of ``SCHEMES``; None is a whole axis."""
    if grid in MEASURED:
        return MEASURED[grid][scheme]
    frames, rows, columns = grid
    if scheme == "1d":
        return (_slab(frames), None, None)
    if scheme == "2d":
        return (None, *_tile(rows, columns, TARGET_TILES))
    return (ceil(frames / SLABS_3D), *_tile(rows, columns, TARGET_SPATIAL_3D))


def _slab(frames: int) -> int:
    """Frames of a 1D box: near 3, near 7.5 boxes, dividing where it can."""

    def cost(size: int) -> float:
        return abs(log(size / 3)) + abs(log(ceil(frames / size) / TARGET_SLABS)) + _waste(frames, size)

    return min(range(1, min(frames, 8) + 1), key=cost)


def _tile(rows: int, columns: int, target: int) -> tuple[int, int]:
    """Rows and columns of a tile: about ``target`` tiles, shaped like the picture, dividing where they can."""

    def cost(tile: tuple[int, int]) -> float:
        height, width = tile
        count = ceil(rows / height) * ceil(columns / width)
        shape = log((width / height) / (columns / rows))
        return shape**2 + 1.7 * log(count / target) ** 2 + 4 * (_waste(rows, height) + _waste(columns, width))

    return min(((h, w) for h in range(1, rows + 1) for w in range(1, columns + 1)), key=cost)


def _waste(extent: int, size: int) -> float:
    """Share of the last box that lies outside the grid, over the boxes of the axis."""
    boxes = ceil(extent / size)
    return (boxes * size - extent) / (boxes * size)
