"""The type that token tracking gives to a tensor: for each axis, what its positions mean.

An axis is a concatenation of segments, a segment a row-major product of factors. A factor is one run of positions: the
frames, rows or columns of one video grid, or something unknown that is merely told apart by where it came from. So a
patch embedding's output is ``[B][C][frame][row][column]``; flattened and transposed it is ``[B][frame.row.column][C]``;
after joining text it is ``[B][text | frame.row.column][C]``. Everything here is arithmetic on such types; what each
operator does to them stands in :mod:`.rules`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

from .sizes import ONE, Size, add, multiply, same, size_of, subtract


class Origin(IntEnum):
    """How much is known about where a factor came from; the better known one survives a join."""

    CONSTANT = 0  # a parameter or buffer
    OPERATOR = 1  # an operator without a rule, or a factory
    INPUT = 2  # an axis of a graph input


@dataclass(frozen=True)
class Factor:
    """``size`` consecutive positions. ``role`` is "frame", "row" or "column" of the grid ``source``, or None."""

    size: Size
    role: str | None
    source: str
    origin: Origin = Origin.OPERATOR
    part: tuple[Segment, Size] | None = None  # a cut of that segment, starting at that position

    def __str__(self) -> str:
        return f"{self.role or self.source}:{self.size}"


Segment = tuple[Factor, ...]
Axis = tuple[Segment, ...]
Axes = tuple[Axis, ...]

ROLES = ("frame", "row", "column")
UNIT: Axis = ((),)


def unknown(size: Size, source: str, origin: Origin = Origin.OPERATOR) -> Axis:
    """An axis about which nothing is known but where it came from."""
    return UNIT if same(size, ONE) else ((Factor(size, None, source, origin),),)


def unknowns(sizes: Sequence[Size], source: str, origin: Origin = Origin.OPERATOR) -> Axes:
    return tuple(unknown(size, f"{source}[{dim}]", origin) for dim, size in enumerate(sizes))


def grid_axis(size: Size, role: str, source: str) -> Axis:
    """One axis of a video grid, as a patch embedding makes it."""
    return ((Factor(size, role, source),),)


def segment_size(segment: Segment) -> Size:
    return multiply([factor.size for factor in segment])


def axis_size(axis: Axis) -> Size:
    return segment_size(axis[0]) if len(axis) == 1 else add([segment_size(segment) for segment in axis])


def factors(axis: Axis) -> Iterator[Factor]:
    for segment in axis:
        yield from segment


def claims(axis: Axis) -> bool:
    """True where any position of the axis is known to belong to a video grid."""
    return any(f.role is not None or (f.part is not None and claims((f.part[0],))) for f in factors(axis))


def join(a: Axis, b: Axis, source: str) -> Axis:
    """The axis of an elementwise result: the better known of the two, unknown where they contradict each other."""
    if a == b or axis_size(b) == ONE:
        return a
    if axis_size(a) == ONE:
        return b
    known_a, known_b = claims(a), claims(b)
    if known_a and known_b:
        if len(a) == len(b) > 1 and all(same(segment_size(x), segment_size(y)) for x, y in zip(a, b, strict=True)):
            return tuple(join((x,), (y,), source)[0] for x, y in zip(a, b, strict=True))
        return unknown(axis_size(a), f"contradiction at {source}")
    if known_a or known_b:
        return a if known_a else b
    return max(a, b, key=lambda axis: (len(axis), min((f.origin for f in factors(axis)), default=Origin.CONSTANT)))


def join_all(operands: Sequence[Axes], sizes: Sequence[Size], source: str) -> Axes:
    """Broadcast elementwise operands to the result's sizes."""
    result = []
    for dim, size in enumerate(sizes):
        axis: Axis = UNIT
        for axes in operands:
            index = dim - (len(sizes) - len(axes))
            if index >= 0:
                axis = join(axis, axes[index], source)
        result.append(axis if same(axis_size(axis), size) else unknown(size, f"{source}[{dim}]"))
    return tuple(result)


def concatenate(parts: Sequence[Axis]) -> Axis:
    """Axes laid end to end; neighbouring cuts of one segment grow together again."""
    segments: list[Segment] = []
    for segment in (s for axis in parts for s in axis):
        merged = _merge_parts(segments[-1], segment) if segments else None
        if merged is None:
            segments.append(segment)
        else:
            segments[-1] = merged
    return tuple(segments)


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
    """``length`` positions of the axis from ``start`` on."""
    segments: list[Segment] = []
    position, end = Size(0, 0), add([start, length])
    for segment in axis:
        size = segment_size(segment)
        after = add([position, size])
        low = start if start.hint > position.hint else position
        high = end if end.hint < after.hint else after
        if same(low, position) and same(high, after):
            segments.append(segment)
        elif high.hint > low.hint:
            segments.append(_part(segment, subtract(low, position), subtract(high, low), source))
        position = after
    found = tuple(segments) or UNIT
    return found if same(axis_size(found), length) else unknown(length, source)


def _part(segment: Segment, start: Size, length: Size, source: str) -> Segment:
    if len(segment) == 1 and segment[0].part is not None:
        whole, offset = segment[0].part
        start = add([offset, start])
    else:
        whole = segment
    label = f"{source} cut"
    return (Factor(length, None, label, segment[0].origin if segment else Origin.OPERATOR, (whole, start)),)


def reshape(axes: Axes, sizes: Sequence[Size], source: str) -> Axes:
    """The axes after a row-major reshape to ``sizes``: factors are merged and split with the dimensions they lie in."""
    result: list[Axis] = []
    i = j = 0
    while j < len(sizes):
        if i == len(axes):  # only ones can be left
            result.append(unknown(sizes[j], f"{source}[{j}]"))
            j += 1
            continue
        first_in, first_out = i, j
        have, want = axis_size(axes[i]), sizes[j]
        i, j = i + 1, j + 1
        while not same(have, want):
            if have.hint < want.hint and i < len(axes):
                have = multiply([have, axis_size(axes[i])])
                i += 1
            elif have.hint > want.hint and j < len(sizes):
                want = multiply([want, sizes[j]])
                j += 1
            else:  # not provably the same elements
                return (*result, *unknowns(sizes[len(result) :], source))
        result.extend(_regroup(axes[first_in:i], sizes[first_out:j], f"{source}[{first_out}]"))
    return tuple(result)


def _regroup(axes: Axes, sizes: Sequence[Size], source: str) -> Axes:
    """One group of a reshape: the same elements, seen through other dimensions."""
    solid = [axis for axis in axes if axis_size(axis) != ONE]
    wide = [dim for dim, size in enumerate(sizes) if size != ONE]
    if len(solid) == 1 and len(wide) == 1 and len(solid[0]) > 1:
        return tuple(solid[0] if dim == wide[0] else UNIT for dim in range(len(sizes)))
    if any(len(axis) > 1 for axis in axes):
        return unknowns(sizes, source)
    queue = [factor for axis in axes for factor in axis[0]]
    result: list[Axis] = []
    for dim, size in enumerate(sizes):
        taken: list[Factor] = []
        product = ONE
        while queue and (product.hint < size.hint or (queue[0].size == ONE and not taken)):
            factor = queue.pop(0)
            whole = multiply([product, factor.size])
            if whole.hint <= size.hint:
                taken.append(factor)
                product = whole
                continue
            pieces = _split(factor, product, size, dim)
            if pieces is None:
                return unknowns(sizes, source)
            taken.append(pieces[0])
            queue.insert(0, pieces[1])
            product = size
        if dim == len(sizes) - 1:
            taken.extend(queue)  # trailing factors of size one
        if not same(segment_size(tuple(taken)), size):
            return unknowns(sizes, source)
        result.append((tuple(taken),))
    return tuple(result)


def _split(factor: Factor, product: Size, size: Size, dim: int) -> tuple[Factor, Factor] | None:
    """Split a factor so that ``product`` times its first piece is ``size``. Only factors that carry no claim can be."""
    if factor.role is not None or factor.part is not None or not product.hint or size.hint % product.hint:
        return None
    outer = size.hint // product.hint
    if not outer or factor.size.hint % outer:
        return None
    if factor.size.static and size.static and product.static:
        first, second = size_of(outer), size_of(factor.size.hint // outer)
    else:
        first = Size(size.expr / product.expr, outer)  # type: ignore[operator]
        second = Size(factor.size.expr / first.expr, factor.size.hint // outer)  # type: ignore[operator]
    return (
        Factor(first, None, f"{factor.source}/{dim}", factor.origin),
        Factor(second, None, f"{factor.source}%{dim}", factor.origin),
    )


@dataclass(frozen=True)
class Raster:
    """A segment proven to be a video grid in raster order."""

    sizes: tuple[Size, Size, Size]
    source: str


def raster_of(segment: Segment) -> Raster | None:
    """The grid of a segment, or None. Frames folded into the batch and split out again carry no role of their own."""
    if len(segment) != 3:
        return None
    frame, row, column = segment
    if row.role != "row" or column.role != "column" or row.source != column.source:
        return None
    own_frames = frame.role == "frame" and frame.source == row.source
    folded_frames = frame.role is None and frame.part is None
    if not (own_frames or folded_frames):
        return None
    return Raster((frame.size, row.size, column.size), row.source)


def describe(axis: Axis) -> str:
    """A short reading of an axis for messages, such as ``text[1]:77 + frame:21 x row:30 x column:52``."""
    return " + ".join(" x ".join(str(factor) for factor in segment) or "1" for segment in axis)
