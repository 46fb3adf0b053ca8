"""The type that token tracking gives to a tensor: for each axis, what its positions mean.

An axis is a concatenation of segments, a segment a row-major product of factors. A factor is one run of positions: the
frames, rows or columns of one video grid, video tokens in an order that was lost ("mixed"), or something unknown that
is merely told apart by where it came from. So a patch embedding's output is ``[B][C][frame][row][column]``; flattened
and transposed it is ``[B][frame.row.column][C]``; after joining text it is ``[B][text | frame.row.column][C]``.
Everything here is arithmetic on such types; what each operator does to them stands in :mod:`.rules`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import NamedTuple

from torch import fx

from .sizes import ONE, Size, add, multiply, same, subtract


class Origin(IntEnum):
    """How much is known about where a factor came from; the better known one survives a join."""

    CONSTANT = 0  # a parameter or buffer, or one value for every position
    TABLE = 1  # positions that count up, as rotary tables are made of
    CHANNELS = 2  # what a projection makes: channels, and heads
    OPERATOR = 3  # an operator without a rule, or a factory
    INPUT = 4  # an axis of a graph input


class Place(NamedTuple):
    """The dimension of a graph input that a factor is, or the outer part of."""

    tensor: str
    dim: int
    rank: int


@dataclass(frozen=True)
class Write:
    """Tokens that were written into a longer sequence, at the positions that a tensor holds."""

    tokens: Axis
    index: fx.Node


@dataclass(frozen=True)
class Factor:
    """``size`` consecutive positions. ``role`` is "frame", "row", "column" (of grid ``source``), "mixed" or None."""

    size: Size
    role: str | None
    source: str
    origin: Origin = Origin.OPERATOR
    part: tuple[Segment, Size] | None = None  # a cut of that segment, starting at that position
    folded: str | None = None  # the conv2d grid over whose batch it runs: these may be its frames
    place: Place | None = None
    picked: tuple[str, ...] = ()  # the one position of other dimensions at which these were taken, as x[:, 0] does
    writes: tuple[Write, ...] = ()  # what a packed sequence is made of
    readings: tuple[Axis, ...] = ()  # of mixed tokens: two readings of their grid that disagree
    # What this stands for where it follows the factor of that source, or, without a source, where it is alone.
    bundle: tuple[str, Axis] | None = None

    def __str__(self) -> str:
        if self.role == MIXED:
            return f"tokens in unknown order after {self.source}:{self.size}"
        return f"{self.role or plain_source(self.source)}:{self.size}"


Segment = tuple[Factor, ...]
Axis = tuple[Segment, ...]
Axes = tuple[Axis, ...]

ROLES = ("frame", "row", "column")
MIXED = "mixed"
NONE = Size(0, 0)
UNIT: Axis = ((),)


def unknown(size: Size, source: str, origin: Origin = Origin.OPERATOR) -> Axis:
    """An axis about which nothing is known but where it came from."""
    return UNIT if same(size, ONE) else ((Factor(size, None, source, origin),),)


def unknowns(sizes: Sequence[Size], source: str, origin: Origin = Origin.OPERATOR) -> Axes:
    axes = [unknown(size, f"{source}[{dim}]", origin) for dim, size in enumerate(sizes)]
    if origin is Origin.INPUT:
        places = [Place(source, dim, len(sizes)) for dim in range(len(sizes))]
        axes = [
            tuple(tuple(replace(factor, place=place) for factor in segment) for segment in axis)
            for axis, place in zip(axes, places, strict=True)
        ]
    return tuple(axes)


def plain_source(source: str) -> str:
    """A graph input's name as its user knows it; sources keep the whole name, which is unique."""
    return re.sub(r"^l_((kw)?args?_|self_)?|_(?=\[|$)", "", source, flags=re.IGNORECASE) or source


def mixed(axes: Sequence[Axis], size: Size, source: str) -> Axis:
    """An axis made of ``axes``, whose order was lost. Video tokens among them are not forgotten: they are mixed."""
    if not any(ordered(axis) for axis in axes) or same(size, ONE):
        channels = axes and all(f.origin is Origin.CHANNELS for axis in axes for f in factors(axis))
        return unknown(size, source, Origin.CHANNELS if channels else Origin.OPERATOR)
    return ((Factor(size, MIXED, source),),)


def grid_axis(size: Size, role: str, source: str) -> Axis:
    """One axis of a video grid, as a patch embedding makes it."""
    return ((Factor(size, role, source),),)


def fold(batch: Axis, source: str) -> Axis:
    """The batch of a conv2d: the frames of its grid may be folded into it, where they vary fastest.

    They are an axis of a video or an inner part of an image batch. What varies slower, and axes of tensors with more
    dimensions than a video has, may be samples or views.
    """
    *before, last = batch
    if not last or (last[-1].place is not None and last[-1].place.rank > 5):
        return batch
    return (*before, (*last[:-1], replace(last[-1], folded=source)))


def segment_size(segment: Segment) -> Size:
    return multiply([factor.size for factor in segment])


def axis_size(axis: Axis) -> Size:
    return segment_size(axis[0]) if len(axis) == 1 else add([segment_size(segment) for segment in axis])


def factors(axis: Axis) -> Iterator[Factor]:
    for segment in axis:
        yield from segment


def claims(axis: Axis) -> bool:
    """True where any position of the axis is known to belong to a video grid."""
    return any(f.role is not None or any(claims(inner) for inner in _within(f)) for f in factors(axis))


def _within(factor: Factor) -> list[Axis]:
    """What a factor is a cut of, or is packed from."""
    cut_from: list[Axis] = [] if factor.part is None else [(factor.part[0],)]
    return [*cut_from, *(write.tokens for write in factor.writes)]


def ordered(axis: Axis) -> bool:
    """True where the order of the positions matters: video tokens, or a batch that may hold frames."""
    return claims(axis) or any(f.folded for f in factors(axis))


def is_mixed(axis: Axis) -> bool:
    """True where any position is a video token whose place is not known."""
    return any(f.role == MIXED or any(is_mixed(inner) for inner in _within(f)) for f in factors(axis))


def join(a: Axis, b: Axis, source: str) -> Axis:
    """The axis of an elementwise result: the better known of the two, mixed where they contradict each other.

    What is added to tokens in a known order stands in that order, whatever was known of it before.
    """
    if a == b or axis_size(b) == ONE:
        return a
    if axis_size(a) == ONE:
        return b
    if unpicked(a) == unpicked(b):  # such as tokens and what was read off one of them
        return b if any(f.picked for f in factors(a)) and not any(f.picked for f in factors(b)) else a
    placed_a, placed_b = (claims(axis) and not is_mixed(axis) for axis in (a, b))
    if placed_a and placed_b:
        if _like(a, b):
            return b if _is_table(a) and not _is_table(b) else a
        if len(a) == len(b) > 1 and all(same(segment_size(x), segment_size(y)) for x, y in zip(a, b, strict=True)):
            return tuple(join((x,), (y,), source)[0] for x, y in zip(a, b, strict=True))
        return _common(a, b, source) or disagreeing(a, b, source)
    if placed_a or placed_b:
        placed, other = (a, b) if placed_a else (b, a)
        return _positioned(other, placed) if _is_table(placed) else placed
    if claims(a) and claims(b):
        return mixed((a, b), axis_size(a), source)
    if claims(a) or claims(b):
        return a if claims(a) else b
    return max(a, b, key=_knowledge)


def disagreeing(a: Axis, b: Axis, source: str) -> Axis:
    """Tokens of which two things are known that cannot both be true."""
    both = tuple(x for x in (a, b) if all(raster_of(segment) for segment in x))
    return ((Factor(axis_size(a), MIXED, source, readings=both if len(both) == 2 else ()),),)


def _common(a: Axis, b: Axis, source: str) -> Axis | None:
    """Two sequences that are the same but for a run of conditions, such as texts of two lengths and their padding."""
    before = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    rest = list(zip(reversed(a[before:]), reversed(b[before:]), strict=False))
    after = next((i for i, (x, y) in enumerate(rest) if x != y), len(rest))
    runs = a[before : len(a) - after], b[before : len(b) - after]
    if any(claims(run) or not run for run in runs) or not same(axis_size(runs[0]), axis_size(runs[1])):
        return None
    return (*a[:before], *unknown(axis_size(runs[0]), source), *a[len(a) - after :])


def _is_table(axis: Axis) -> bool:
    return any(f.role in ROLES and f.origin is Origin.TABLE for f in factors(axis))


def _positioned(tokens: Axis, table: Axis) -> Axis:
    """Tokens that a table of positions was joined to: it says which place each has, not whose tokens they are."""
    if all(factor.origin <= Origin.TABLE for factor in factors(tokens)):
        return table
    segment = tokens[0]
    if len(tokens) != 1 or len(segment) != 1 or segment[0].part is not None or raster_of(table[0]) is None:
        return tokens
    source, picked = segment[0].source, segment[0].picked
    return (tuple(replace(f, source=source, origin=Origin.OPERATOR, picked=picked) for f in table[0]),)


def _like(a: Axis, b: Axis) -> bool:
    """True for two grids of the same sizes: embeddings of two videos that are added frame by frame, row by row."""

    def role(factor: Factor) -> str | None:
        """That of the frames, rows or columns of which this is some that follow each other."""
        whole = factor.part[0] if factor.part is not None else ()
        return whole[0].role if len(whole) == 1 else factor.role if factor.part is None else None

    def shape(axis: Axis) -> list[list[tuple[str | None, Size]]] | None:
        found: list[list[tuple[str | None, Size]]] = []
        for segment in axis:
            raster = raster_of(segment)
            if raster is None and any(role(f) not in ROLES for f in segment):
                return None
            names = ROLES if raster else [role(f) for f in segment]
            sizes = raster.sizes if raster else [f.size for f in segment]
            found.append(list(zip(names, sizes, strict=True)))
        return found

    return shape(a) == shape(b) is not None


def _knowledge(axis: Axis) -> tuple[bool, bool, int, int]:
    origins = [f.origin for f in factors(axis)]
    folded = any(f.folded for f in factors(axis))
    return is_packed(axis), folded, len(axis), min(origins, default=Origin.CONSTANT)


def pick(axes: Sequence[Axis], dropped: Axis, index: object) -> Axes:
    """What is left of the axes at one position of a dimension that was dropped: not what it is at another position.

    Channels hold the same tokens at each; what was expanded holds the same in all.
    """
    kinds = {f.origin for f in factors(dropped)}
    if axis_size(dropped) == ONE or kinds <= {Origin.CHANNELS, Origin.CONSTANT}:
        return tuple(axes)
    mark = f"{describe(dropped)}={index}"
    return tuple(
        tuple(
            tuple(f if f.origin <= Origin.CHANNELS else replace(f, picked=(*f.picked, mark)) for f in segment)
            for segment in axis
        )
        for axis in axes
    )


def unpicked(axis: Axis) -> Axis:
    return tuple(tuple(replace(f, picked=()) for f in segment) for segment in axis)


def is_packed(axis: Axis) -> bool:
    """True where tokens were written by index into the sequence, or into one that this was cut from."""
    return any(f.writes or (f.part is not None and is_packed((f.part[0],))) for f in factors(axis))


def written(axis: Axis, tokens: Axis, index: fx.Node, source: str) -> Axis:
    """The axis after ``tokens`` were written into it at the positions that ``index`` holds."""
    only = axis[0][0] if len(axis) == 1 and len(axis[0]) == 1 else None
    if ordered(axis) and not (only is not None and only.writes):
        return mixed((axis, tokens), axis_size(axis), source)
    before = only.writes if only is not None else ()
    return ((Factor(axis_size(axis), None, source, writes=(*before, Write(tokens, index))),),)


def _holds_tokens(axis: Axis) -> bool:
    return claims(axis) and not _is_table(axis) and axis_size(axis) != ONE


def join_all(operands: Sequence[Axes], sizes: Sequence[Size], source: str) -> Axes:
    """Broadcast elementwise operands to the result's sizes.

    Tokens that are one wide in a dimension are the same ones all over the result's: no longer those of its samples.
    """
    tokens = [axes for axes in operands if any(map(_holds_tokens, axes))]
    result = []
    for dim, size in enumerate(sizes):
        axis: Axis = UNIT
        places = [dim - (len(sizes) - len(axes)) for axes in tokens]
        if places and size != ONE and all(i < 0 or axis_size(x[i]) == ONE for i, x in zip(places, tokens, strict=True)):
            result.append(unknown(size, f"{source}[{dim}]"))
            continue
        for axes in operands:
            index = dim - (len(sizes) - len(axes))
            if index >= 0:
                axis = join(axis, axes[index], f"{source}[{dim}]")
        result.append(axis if same(axis_size(axis), size) else unknown(size, f"{source}[{dim}]"))
    return tuple(result)


def concatenate(parts: Sequence[Axis]) -> Axis:
    """Axes laid end to end; neighbouring cuts of one segment grow together again, empty ones vanish."""
    segments: list[Segment] = []
    for segment in (s for axis in parts for s in axis):
        if segment_size(segment) == NONE:
            continue
        merged = _merge_parts(segments[-1], segment) if segments else None
        if merged is None:
            segments.append(segment)
        else:
            segments[-1] = merged
    return tuple(segments) or unknown(NONE, "nothing")


def _merge_parts(left: Segment, right: Segment) -> Segment | None:
    if len(left) != 1 or len(right) != 1 or left[0].part is None or right[0].part is None:
        return None
    (whole, start), (other, middle) = left[0].part, right[0].part
    if whole != other or not same(add([start, left[0].size]), middle):
        return None
    size = add([left[0].size, right[0].size])
    if same(size, segment_size(whole)):
        return whole
    return (Factor(size, None, left[0].source, left[0].origin, (whole, start)),)


def cut(axis: Axis, start: Size, length: Size, source: str) -> Axis:
    """``length`` positions of the axis from ``start`` on; mixed where symbolic sizes do not prove which those are."""
    segments: list[Segment] = []
    position, end, skipped = Size(0, 0), add([start, length]), Size(0, 0)
    for segment in axis:
        size = segment_size(segment)
        after = add([position, size])
        low = start if start.hint > position.hint else position
        high = end if end.hint < after.hint else after
        if not segments:
            skipped = position
        if same(low, position) and same(high, after):
            segments.append(segment)
        elif high.hint > low.hint:
            if not segments:
                skipped = low
            segments.append(_part(segment, subtract(low, position), subtract(high, low), source))
        position = after
    found = tuple(segments) or UNIT
    exact = same(axis_size(found), length) and (not segments or same(skipped, start))
    return found if exact else mixed((axis,), length, source)


def splice(axis: Axis, start: Size, other: Axis, source: str) -> Axis:
    """The axis with the positions from ``start`` on overwritten by ``other``."""
    end = add([start, axis_size(other)])
    parts = [cut(axis, Size(0, 0), start, source)] if start.hint else []
    rest = subtract(axis_size(axis), end)
    after = [cut(axis, end, rest, source)] if rest.hint else []
    found = concatenate([*parts, other, *after])
    return found if same(axis_size(found), axis_size(axis)) else mixed((axis, other), axis_size(axis), source)


def _part(segment: Segment, start: Size, length: Size, source: str) -> Segment:
    if len(segment) == 1 and segment[0].part is not None:
        whole, offset = segment[0].part
        start = add([offset, start])
    else:
        whole = segment
    # The same positions of the same tokens are the same, wherever they were cut.
    label = f"{whole[0].source if whole else source} cut"
    return (Factor(length, None, label, segment[0].origin if segment else Origin.OPERATOR, (whole, start)),)


@dataclass(frozen=True)
class Raster:
    """A segment proven to be a video grid in raster order."""

    sizes: tuple[Size, Size, Size]
    source: str


def raster_of(segment: Segment) -> Raster | None:
    """The grid of a segment, or None. Frames are the grid's own, or ran over the batch of the conv2d that made it."""
    if len(segment) != 3:
        return None
    frame, row, column = segment
    if row.role != "row" or column.role != "column" or row.source != column.source:
        return None
    own_frames = frame.role == "frame" and frame.source == row.source
    folded_frames = frame.role in ("frame", None) and frame.part is None and frame.folded == row.source
    if not (own_frames or folded_frames):
        return None
    return Raster((frame.size, row.size, column.size), row.source)


_VIDEO_DIMS = ((2, 3, 4), (1, 3, 4), (1, 2, 3))  # [B, C, T, H, W], [B, T, C, H, W], [B, T, H, W, C]


def merged_grid(axis: Axis, source: str) -> Axis:
    """The axis with its places in a grid where a reshape has merged three axes into it.

    These are the axes of one five-dimensional input, whole or cut into patches, or three that count positions up.
    """
    return tuple(_merged(segment, source) for segment in axis)


def _merged(segment: Segment, source: str) -> Segment:
    if len(segment) != 3 or any(f.role is not None or f.part is not None for f in segment):
        return segment
    places = [f.place for f in segment]
    origin = Origin.OPERATOR
    if all(f.origin is Origin.TABLE for f in segment):
        if len({f.source for f in segment}) < 3:
            return segment
        origin = Origin.TABLE
    elif (
        None in places
        or len({(p.tensor, p.rank) for p in places if p}) != 1
        or places[0] is None
        or places[0].rank != 5
        or tuple(p.dim for p in places if p) not in _VIDEO_DIMS
    ):
        return segment
    else:
        source = places[0].tensor
    return tuple(
        replace(f, role=role, source=source, origin=origin, place=None) for f, role in zip(segment, ROLES, strict=True)
    )


def unpatched(axes: Axes) -> Raster | None:
    """The grid that tokens of an input were taken apart into, to become the pixels of a five-dimensional video."""
    for dims in _VIDEO_DIMS:
        pieces = [_coarse(axes[dim]) for dim in dims] if len(axes) == 5 else []
        if not pieces or None in pieces:
            continue
        frame, row, column = (piece for piece in pieces if piece)
        source, _, frames = frame.source.rpartition("/")
        inner = f"{source}%{multiply([row.size, column.size])}"
        names = (f"{source}/{frame.size}", f"{inner}/{row.size}", f"{inner}%{column.size}")
        if frames and names == (frame.source, row.source, column.source):
            return Raster((frame.size, row.size, column.size), source)
    return None


def _coarse(axis: Axis) -> Factor | None:
    """The tokens' part of an axis that is tokens and, within them, pixels made of channels."""
    if len(axis) != 1 or not axis[0]:
        return None
    first, *fine = axis[0]
    plain = first.role is None and first.part is None and first.origin is Origin.INPUT
    return first if plain and all(f.origin is Origin.CHANNELS for f in fine) else None


def describe(axis: Axis) -> str:
    """A short reading of an axis for messages, such as ``text[1]:77 + video 21x30x52``."""
    return " + ".join(_describe_segment(segment) for segment in axis)


def _describe_segment(segment: Segment) -> str:
    raster = raster_of(segment)
    if raster is not None:
        return "video " + "x".join(map(str, raster.sizes))
    return " x ".join(str(factor) for factor in segment) or "1"
