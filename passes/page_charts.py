"""The charts of a report's page as inline SVG: shares per layer and head, and selections on the video grid.

Every text that a chart shows is escaped here; numbers and enumerations are not.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from html import escape

from .report import Picture

Triple = tuple[int, int, int]
PAGE = 1056.0  # pixels across the inside of a card
SHEET = 488.0  # pixels across the inside of a card of two


def ramp(values: Iterable[float]) -> tuple[float, float]:
    """Ends of a colour scale over shares, in whole steps of 5 %."""
    known = list(values)
    low, high = math.floor(min(known) * 20 + 1e-6) / 20, math.ceil(max(known) * 20 - 1e-6) / 20
    return (low, high) if high > low else (max(0.0, low - 0.05), min(1.0, low + 0.05))


def heat_map(kind: str, rows: Sequence[tuple[str, Sequence[float]]], ends: tuple[float, float], what: str) -> str:
    """A cell for each head (columns) of each layer (rows, with their labels). ``kind`` names the colour."""
    heads = max(len(shares) for _, shares in rows)
    gutter, gap = 58.0, 1.5
    tall = 24.0 if len(rows) <= 8 else 18.0 if len(rows) <= 20 else 13.0
    wide = min(44.0, (SHEET - gutter) / heads)
    width, height = SHEET, tall * len(rows) + 20
    low, high = ends
    parts = [f'<svg class="heat {kind}" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(what)}">']
    for row, (label, shares) in enumerate(rows):
        top = row * tall
        parts.append(f'<text x="{gutter - 8:g}" y="{top + tall / 2 + 3.5:g}" text-anchor="end">{escape(label)}</text>')
        for head, share in enumerate(shares):
            weight = 0.06 + 0.94 * min(1.0, max(0.0, (share - low) / (high - low)))
            parts.append(
                f'<rect class="c" x="{gutter + head * wide:.4g}" y="{top:.4g}" width="{wide - gap:.3g}"'
                f' height="{tall - gap:.3g}" rx="1.5" fill-opacity="{weight:.2f}">'
                f"<title>layer {escape(label)}, head {head}: {share:.1%}</title></rect>"
            )
    every = max(1, math.ceil(22 / wide))
    for head in range(0, heads, every):
        x = gutter + head * wide + (wide - gap) / 2
        parts.append(f'<text x="{x:.4g}" y="{height - 6:g}" text-anchor="middle">{head}</text>')
    parts.append(f'<text x="{gutter - 8:g}" y="{height - 6:g}" text-anchor="end">head</text></svg>')
    return "".join(parts)


def frames(picture: Picture, key: str) -> str:
    """Every frame of the grid, each box in the strength of the share of heads that selected it. ``key`` is for ids."""
    count, rows, columns = picture.grid
    per_line, scale = _lines(count, columns)
    margin, caption = 6 / scale, 15 / scale
    lines = -(-count // per_line)
    width = per_line * columns + (per_line - 1) * margin
    height = lines * (rows + caption + margin) - margin
    votes: dict[int, int] = defaultdict(int)
    for selected in picture.boxes:
        for box in selected:
            votes[box] += 1
    own, heads = _box_of(picture, picture.query), len(picture.boxes)
    what = f"boxes selected by the query at frame {picture.query[0]}, row {picture.query[1]}, column {picture.query[2]}"
    parts = [
        f'<svg class="video" viewBox="0 0 {_n(width)} {_n(height)}" width="{_n(width * scale)}" role="img"'
        f' aria-label="{what}"><defs>'
    ]
    for slab in range(_counts(picture)[0]):
        by_votes: dict[int, list[int]] = defaultdict(list)
        for box in _of_slab(picture, slab):
            if votes[box]:
                by_votes[votes[box]].append(box)
        fills = "".join(
            f'<path class="v-pick" fill-opacity="{0.12 + 0.88 * number / heads:.2f}" d="{_areas(picture, boxes)}"/>'
            for number, boxes in sorted(by_votes.items())
        )
        rim = f'<path class="v-own" d="{_areas(picture, [own])}"/>' if own in _of_slab(picture, slab) else ""
        parts.append(f'<g id="{key}s{slab}">{_ground(picture)}{fills}{_cuts(picture)}{rim}</g>')
    parts.append("</defs>")
    for frame in range(count):
        x, y = frame % per_line * (columns + margin), frame // per_line * (rows + caption + margin)
        parts.append(f'<use href="#{key}s{frame // picture.block[0]}" x="{_n(x)}" y="{_n(y)}"/>')
        parts.append(
            f'<text x="{_n(x)}" y="{_n(y + rows + 11.5 / scale)}" style="font-size:{_n(10 / scale)}px">{frame}</text>'
        )
        if frame == picture.query[0]:
            parts.append(_dot(picture, x, y, 4.5 / scale))
    return "".join([*parts, "</svg>"])


def head_frames(picture: Picture, key: str) -> str:
    """For every head the boxes that it selected: one small frame for each row of boxes in time."""
    counts = _counts(picture)
    rows, columns = picture.grid[1:]
    scale = min(64 / columns, 48 / rows, 168 / (counts[0] * (columns + 2)))
    if counts[0] > 1:
        scale = max(scale, 14 / columns)
    margin = 3 / scale
    width, height = counts[0] * (columns + margin) - margin, rows
    places = [slab * (columns + margin) for slab in range(counts[0])]
    own = _box_of(picture, picture.query)
    mine = picture.query[0] // picture.block[0]
    cuts = "".join(f'<g transform="translate({_n(x)} 0)">{_cuts(picture)}</g>' for x in places)
    ground = "".join(f'<g transform="translate({_n(x)} 0)">{_ground(picture)}</g>' for x in places)
    over = (
        f'{cuts}<g transform="translate({_n(places[mine])} 0)"><path class="v-own" d="{_areas(picture, [own])}"/></g>'
    )
    over += _dot(picture, places[mine], 0.0, 2.5 / scale)
    head = f'<svg class="video" viewBox="0 0 {_n(width)} {_n(height)}" width="{_n(width * scale)}"'
    parts = [f'<svg width="0" height="0" class="video" aria-hidden="true"><defs><g id="{key}u">{ground}</g>']
    parts.append(f'<g id="{key}o">{over}</g></defs></svg><div class="heads">')
    boxes = math.prod(counts)
    for number, selected in enumerate(picture.boxes):
        areas = "".join(
            _areas(picture, [box for box in selected if box in _of_slab(picture, slab)], x)
            for slab, x in enumerate(places)
        )
        parts.append(
            f'<figure>{head} role="img" aria-label="head {number}"><use href="#{key}u"/><path class="v-pick" d="{areas}"/>'
            f'<use href="#{key}o"/></svg><figcaption>head {number} · {len(selected)} of {boxes}</figcaption></figure>'
        )
    return "".join([*parts, "</div>"])


def _lines(count: int, columns: int) -> tuple[int, float]:
    """Frames in a line, and pixels of a token, so that frames are 84 to 170 pixels wide and lines about equal."""
    most = max(1, int(PAGE // (84 + 6)))
    lines = -(-count // most)
    per_line = -(-count // lines)
    return per_line, min(170.0, PAGE / per_line - 6) / columns


def _counts(picture: Picture) -> Triple:
    """Boxes along each axis."""
    t, h, w = (-(-extent // step) for extent, step in zip(picture.grid, picture.block, strict=True))
    return t, h, w


def _of_slab(picture: Picture, slab: int) -> range:
    """Numbers of the boxes at one place in time."""
    _, rows, columns = _counts(picture)
    return range(slab * rows * columns, (slab + 1) * rows * columns)


def _box_of(picture: Picture, place: Triple) -> int:
    _, rows, columns = _counts(picture)
    t, h, w = (index // step for index, step in zip(place, picture.block, strict=True))
    return (t * rows + h) * columns + w


def _areas(picture: Picture, boxes: Iterable[int], left: float = 0.0) -> str:
    """An SVG path around boxes within a frame whose left edge is at ``left``; a unit is a token."""
    _, rows, columns = _counts(picture)
    (_, tall, wide), (_, height, width) = picture.block, picture.grid
    parts = []
    for box in boxes:
        y, x = box // columns % rows * tall, box % columns * wide
        h, w = min(tall, height - y), min(wide, width - x)
        parts.append(f"M{_n(left + x)} {y}h{w}v{h}h{-w}z")
    return "".join(parts)


def _ground(picture: Picture) -> str:
    return f'<rect class="v-frame" width="{picture.grid[2]}" height="{picture.grid[1]}"/>'


def _cuts(picture: Picture) -> str:
    """The lines between boxes."""
    (_, tall, wide), (_, height, width) = picture.block, picture.grid
    lines = [f"M0 {y}h{width}" for y in range(tall, height, tall)] + [
        f"M{x} 0v{height}" for x in range(wide, width, wide)
    ]
    return f'<path class="v-cuts" d="{"".join(lines)}"/>' if lines else ""


def _dot(picture: Picture, x: float, y: float, radius: float) -> str:
    _, row, column = picture.query
    return f'<circle class="v-query" cx="{_n(x + column + 0.5)}" cy="{_n(y + row + 0.5)}" r="{_n(radius)}"/>'


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
