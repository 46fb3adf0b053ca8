"""Where the video tokens lie and how the grid is cut into boxes: index arithmetic shared by every implementation.

A sequence of S tokens is ``prefix`` condition tokens, N = frames * rows * columns video tokens in raster order, then
``suffix`` condition tokens. One block size ``(frames, rows, columns)`` cuts the grid into boxes, the last box of an
axis shorter where it does not divide; boxes are numbered in raster order (arXiv 2506.23858, section 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

Triple = tuple[int, int, int]

WORD_BITS = 32
HEAD_POOLS = ("head_global", "query_head")  # the entries of one head compete among themselves
TILE_OF = {"token": 0, "tile": 128}  # tokens of a tile of queries by granularity, 0: every query selects for itself
TILE_SIZES = (64, 128)  # what the operators take besides 0


@dataclass(frozen=True)
class Geometry:
    """Token layout of one attention: grid and block in tokens per axis, condition tokens on both sides."""

    grid: Triple
    block: Triple
    prefix: int = 0
    suffix: int = 0

    @property
    def num_video(self) -> int:
        """N, the number of video tokens."""
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def num_tokens(self) -> int:
        """S, video and condition tokens."""
        return self.prefix + self.num_video + self.suffix

    @property
    def num_condition(self) -> int:
        return self.prefix + self.suffix

    @property
    def num_key_boxes(self) -> int:
        """Boxes that keys lie in: those of the video, and one more for the condition tokens."""
        return self.num_boxes + (self.num_condition > 0)

    @property
    def counts(self) -> Triple:
        """Boxes along (frames, rows, columns)."""
        return box_counts(self.grid, self.block)

    @property
    def num_boxes(self) -> int:
        """C, the number of boxes."""
        counts = self.counts
        return counts[0] * counts[1] * counts[2]

    @property
    def box_size(self) -> int:
        """Tokens of the largest box."""
        frames, rows, columns = (min(step, size) for step, size in zip(self.block, self.grid, strict=True))
        return frames * rows * columns

    @property
    def num_words(self) -> int:
        """int32 words in one query's bit set."""
        return -(-self.num_boxes // WORD_BITS)

    def by_tile(self, tile: int) -> Geometry:
        """The tiles of queries as the tokens of a video of its own, without condition tokens.

        Its grid is (boxes in time * P, boxes in height, boxes in width) and its blocks are (P, 1, 1), with P tiles a box:
        the boxes keep their numbers, and raster order is the order of the tiles. ``tile`` 0: the video as it is.
        """
        if not tile:
            return self
        parts, counts = tiles_per_box(self.grid, self.block, tile), self.counts
        return Geometry((counts[0] * parts, *counts[1:]), (parts, 1, 1))

    @property
    def video(self) -> slice:
        """Where the video tokens lie in the sequence."""
        return slice(self.prefix, self.prefix + self.num_video)

    def condition_index(self, device: torch.device) -> torch.Tensor:
        """Positions of the condition tokens in the sequence, int64 [prefix + suffix]."""
        tail = self.prefix + self.num_video
        return torch.cat(
            [torch.arange(self.prefix, device=device), torch.arange(tail, tail + self.suffix, device=device)]
        )


def box_counts(grid: Triple, block: Triple) -> Triple:
    """Boxes along each axis: ceil(grid / block). Plain integer arithmetic, so symbolic sizes pass through."""
    return (
        (grid[0] + block[0] - 1) // block[0],
        (grid[1] + block[1] - 1) // block[1],
        (grid[2] + block[2] - 1) // block[2],
    )


def box_of(grid: Triple, block: Triple, device: torch.device | str = "cpu") -> torch.Tensor:
    """Box number of every video token in raster order, int64 [N]."""
    counts = box_counts(grid, block)
    frame, row, column = (
        torch.div(torch.arange(size, device=device), step, rounding_mode="floor")
        for size, step in zip(grid, block, strict=True)
    )
    boxes = (frame[:, None, None] * counts[1] + row[:, None]) * counts[2] + column
    return boxes.flatten()


def tiles_per_box(grid: Triple, block: Triple, tile: int) -> int:
    """P, into how many tiles of queries every box is cut: ceil(tokens of a whole box / tile)."""
    # No comparison that a symbolic size would have to answer.
    frames, rows, columns = (torch.sym_min(step, size) for step, size in zip(block, grid, strict=True))
    return (frames * rows * columns + tile - 1) // tile


def tile_of(grid: Triple, block: Triple, tile: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Tile of queries of every video token in raster order, int64 [N]. An option of ours, not in the paper.

    Every box, ragged ones too, is cut into P parts: its r-th token of n, in raster order within the box, is in part
    ``r * P // n``, which has at most ``tile`` tokens. Part j of box (a, b, c) is tile
    ``((a * P + j) * box_rows + b) * box_columns + c``. A box of fewer than P tokens has parts without any.
    """
    counts, parts = box_counts(grid, block), tiles_per_box(grid, block, tile)
    box, place, extent = [], [], []
    for size, step, shape in zip(grid, block, ((-1, 1, 1), (-1, 1), (-1,)), strict=True):
        at = torch.arange(size, device=device)
        number = torch.div(at, step, rounding_mode="floor")
        box.append(number.view(shape))
        place.append((at - number * step).view(shape))
        extent.append((size - number * step).clamp(max=step).view(shape))
    rank = (place[0] * extent[1] + place[1]) * extent[2] + place[2]  # [T, H, W]
    part = torch.div(rank * parts, extent[0] * extent[1] * extent[2], rounding_mode="floor")
    return (((box[0] * parts + part) * counts[1] + box[1]) * counts[2] + box[2]).flatten()


def tile_tokens(geometry: Geometry, tile: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Number of video tokens of every tile, int64 [M]."""
    of = tile_of(geometry.grid, geometry.block, tile, device)
    return torch.bincount(of, minlength=geometry.by_tile(tile).num_video)


def per_token(words: torch.Tensor, geometry: Geometry, tile: int) -> torch.Tensor:
    """Bit sets of tiles [..., M, W] to those of their tokens [..., N, W]; ``tile`` 0: as they are."""
    if not tile:
        return words
    return words.index_select(-2, tile_of(geometry.grid, geometry.block, tile, words.device))


@lru_cache(maxsize=64)
def _box_order(grid: Triple, block: Triple) -> tuple[torch.Tensor, tuple[int, ...]]:
    boxes = box_of(grid, block)
    counts = box_counts(grid, block)
    sizes = torch.bincount(boxes, minlength=counts[0] * counts[1] * counts[2])
    starts = (0, *torch.cumsum(sizes, 0).tolist())
    return torch.argsort(boxes, stable=True), starts


def box_order(grid: Triple, block: Triple, device: torch.device | str = "cpu") -> tuple[torch.Tensor, tuple[int, ...]]:
    """Raster index of every video token in box order (int64 [N]), and where each box starts in it (C + 1 ints)."""
    order, starts = _box_order(grid, block)
    return order.to(device), starts


def pack_bits(mask: torch.Tensor) -> torch.Tensor:
    """Bool [..., C] to bit sets int32 [..., ceil(C / 32)]: box c is bit ``c % 32`` of word ``c // 32``."""
    boxes = mask.shape[-1]
    words = -(-boxes // WORD_BITS)
    padded = torch.nn.functional.pad(mask, (0, words * WORD_BITS - boxes)).unflatten(-1, (words, WORD_BITS))
    weights = torch.ones((), dtype=torch.int64, device=mask.device) << torch.arange(WORD_BITS, device=mask.device)
    packed = (padded * weights).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def unpack_bits(selected: torch.Tensor, boxes: int) -> torch.Tensor:
    """Bit sets int32 [..., W] to bool [..., C]; the inverse of :func:`pack_bits`."""
    shifts = torch.arange(WORD_BITS, dtype=torch.int32, device=selected.device)
    return ((selected.unsqueeze(-1) >> shifts) & 1).bool().flatten(-2)[..., :boxes]


def queries_per_box(words: torch.Tensor, geometry: Geometry, tile: int) -> torch.Tensor:
    """How many video queries selected each box, int64 [C], from one head's bit sets [N, W] or, of tiles, [M, W]."""
    mask = unpack_bits(words, geometry.num_boxes)
    return (mask * tile_tokens(geometry, tile, words.device)[:, None]).sum(0) if tile else mask.sum(0)
