"""Where the video tokens lie in a sequence: one run in raster order, or positions that must be gathered first."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from .sizes import Size, add, multiply, same, subtract
from .tokens import (
    ROLES,
    Axis,
    Factor,
    Origin,
    Raster,
    Segment,
    axis_size,
    claims,
    cut,
    raster_of,
    segment_size,
)

NOTHING = Size(0, 0)


@dataclass(frozen=True)
class Written:
    """The video tokens stand where ``index`` says, from its entry ``first`` on: positions in a sequence of ``whole`` tokens,
    of which this one begins at ``start``.
    """

    index: fx.Node
    first: Size
    start: Size
    whole: Size


@dataclass(frozen=True)
class Transposed:
    """The video tokens are one run, as a grid whose axes stand in another order: ``axes`` names that of each dimension."""

    axes: tuple[int, int, int]


@dataclass(frozen=True)
class Pieces:
    """The video tokens are several runs, with others between them: where each begins and its length, in raster order."""

    runs: tuple[tuple[int, int], ...]


Order = Written | Transposed | Pieces


@dataclass(frozen=True)
class Layout:
    """Where the video tokens lie in the keys' sequence, and how that is known.

    ``order`` says how to bring them into raster order behind ``prefix`` tokens and before ``suffix``; None where they
    stand so. Queries are a part of the sequence, without ``missing`` tokens before and after them.
    """

    grid: tuple[Size, Size, Size]
    prefix: Size
    suffix: Size
    evidence: str
    order: Order | None = None
    missing: tuple[Size, Size] = (NOTHING, NOTHING)


@dataclass(frozen=True)
class Video:
    """The video grid of a sequence, and the tokens before and after it once it is in order."""

    raster: Raster
    before: Size
    after: Size
    order: Order | None = None


def main_grid(rasters: list[Raster]) -> int | None:
    """The largest grid, where the others together are no larger: history or reference frames are conditions then."""
    sizes = [multiply(list(raster.sizes)).hint for raster in rasters]
    largest = max(sizes)
    return sizes.index(largest) if sum(sizes) <= 2 * largest and sizes.count(largest) == 1 else None


def rasters(tokens: Axis) -> list[tuple[int, Raster, tuple[int, int, int]]]:
    """Segments that are a whole grid: their place, the grid, and the order of its axes. Tables of positions are none."""
    found = []
    for place, segment in enumerate(tokens):
        for order in _ORDERS:
            ordered = _reordered(segment, order)
            if ordered is not None and (raster := raster_of(ordered)) and segment[0].origin is not Origin.TABLE:
                found.append((place, raster, order))
                break
    return found


_ORDERS = ((0, 1, 2), (1, 2, 0), (1, 0, 2), (0, 2, 1), (2, 0, 1), (2, 1, 0))


def _reordered(segment: Segment, order: tuple[int, int, int]) -> Segment | None:
    """The factors in raster order, of a segment whose i-th factor is axis ``order[i]`` of its grid."""
    if len(segment) != 3:
        return None
    return tuple(segment[order.index(axis)] for axis in range(len(ROLES)))


def around(tokens: Axis, place: int) -> tuple[Size, Size]:
    """Tokens before and after a segment."""
    before = add([segment_size(segment) for segment in tokens[:place]])
    return before, add([segment_size(segment) for segment in tokens[place + 1 :]])


def in_place(tokens: Axis) -> Video | None:
    """The only grid of a sequence or the main one; None where there are several, or none."""
    known = rasters(tokens)
    best = main_grid([raster for _, raster, _ in known]) if known else None
    if best is None:
        return None
    place, raster, order = known[best]
    return Video(raster, *around(tokens, place), None if order == _ORDERS[0] else Transposed(order))


def in_pieces(tokens: Axis) -> Video | None:
    """The only grid of a sequence that holds all of it, cut apart: as shards of text and video in turn do."""
    runs: dict[Segment, list[tuple[int, int, int]]] = {}
    position = NOTHING
    for segment in tokens:
        part = segment[0].part if len(segment) == 1 else None
        length = segment_size(segment)
        if part is not None and raster_of(part[0]) and segment[0].origin is not Origin.TABLE:
            if not (position.static and part[1].static and length.static):
                return None
            runs.setdefault(part[0], []).append((part[1].hint, position.hint, length.hint))
        elif claims((segment,)):
            return None
        position = add([position, length])
    if len(runs) != 1 or not position.static:
        return None
    ((whole, found),) = runs.items()
    found.sort()
    raster, size = raster_of(whole), segment_size(whole)
    ends = [0, *(start + length for start, _, length in found)]
    if raster is None or [start for start, *_ in found] != ends[:-1] or not size.static or ends[-1] != size.hint:
        return None
    order = Pieces(tuple((at, length) for _, at, length in found))
    return Video(raster, NOTHING, subtract(position, size), order)


def packed_factor(tokens: Axis) -> tuple[Factor, Size] | None:
    """The packed sequence that the axis is, or is a cut of, and where the cut begins."""
    only = tokens[0][0] if len(tokens) == 1 and len(tokens[0]) == 1 else None
    if only is None:
        return None
    if only.writes:
        return only, NOTHING
    if only.part is not None and len(only.part[0]) == 1 and only.part[0][0].writes:
        return only.part[0][0], only.part[1]
    return None


def in_packed(tokens: Axis, grid: tuple[Size, Size, Size] | None) -> Video | None:
    """The video among tokens that were written by index: their only grid, or those of the given grid's number."""
    packed = packed_factor(tokens)
    if packed is None:
        return None
    whole, start = packed
    found: list[tuple[fx.Node, Size, Raster]] = []
    for write in whole.writes:
        known = rasters(write.tokens)
        found += [
            (write.index, around(write.tokens, place)[0], raster)
            for place, raster, order in known
            if order == _ORDERS[0]
        ]
    if not found and grid is not None:
        video = multiply(list(grid))
        found = [
            (write.index, NOTHING, Raster(grid, write.tokens[0][0].source))
            for write in whole.writes
            if same(axis_size(write.tokens), video) and not claims(write.tokens)
        ]
        found = found if len(found) == 1 else []
    best = main_grid([raster for *_, raster in found]) if found else None
    if best is None:
        return None
    index, first, raster = found[best]
    length, video = axis_size(tokens), multiply(list(raster.sizes))
    rest = subtract(whole.size, length)
    # Of several cuts only one can hold the video: that is checked when the graph runs.
    if not (whole.size.static and length.static) or length.hint < video.hint or 0 < video.hint <= rest.hint:
        return None
    return Video(raster, NOTHING, subtract(length, video), Written(index, first, start, whole.size))


def too_short(tokens: Axis) -> bool:
    """True for a cut of a packed sequence that has fewer tokens than any video written into that."""
    packed = packed_factor(tokens)
    sizes = [
        multiply(list(raster.sizes)).hint
        for write in (packed[0].writes if packed else ())
        for _, raster, _ in rasters(write.tokens)
    ]
    return bool(sizes) and axis_size(tokens).static and axis_size(tokens).hint < min(sizes)


def inside(tokens: Axis, keys: Axis) -> tuple[Size, Size] | None:
    """How many keys stand before and after those that are the queries' own tokens; None where these are not among them."""
    length, total = axis_size(tokens), axis_size(keys)
    if not (length.static and total.static and 0 < length.hint < total.hint):
        return None
    position = NOTHING
    for segment in keys:
        for start in _starts(tokens[0], segment, position):
            after = subtract(total, add([start, length]))
            if start.static and start.hint >= 0 and after.hint >= 0 and cut(keys, start, length, "queries") == tokens:
                return start, after
        position = add([position, segment_size(segment)])
    return None


def _starts(first: Segment, segment: Segment, position: Size) -> list[Size]:
    """Where the keys may hold what the queries begin with."""
    if first == segment:
        return [position]
    part = first[0].part if len(first) == 1 else None
    if part is None:
        return []
    if part[0] == segment:
        return [add([position, part[1]])]
    other = segment[0].part if len(segment) == 1 else None
    return [] if other is None or other[0] != part[0] else [add([position, subtract(part[1], other[1])])]
