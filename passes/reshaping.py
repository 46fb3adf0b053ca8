"""What a reshape does to token types: factors are merged and split with the dimensions that they lie in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .sizes import ONE, Size, multiply, quotient, same, size_of
from .tokens import (
    MIXED,
    UNIT,
    Axes,
    Axis,
    Factor,
    axis_size,
    claims,
    mixed,
    ordered,
    segment_size,
    unknown,
)


def reshape(axes: Axes, sizes: Sequence[Size], source: str) -> Axes:
    """The axes after a row-major reshape to ``sizes``."""
    return tuple(unbundled(axis) for axis in _reshape(axes, sizes, source))


def bundled(axis: Axis) -> Axis:
    """Several segments as one factor, which stands for them when it is alone again."""
    if len(axis) == 1:
        return axis
    size, source = axis_size(axis), f"{len(axis)} segments"
    return ((Factor(size, MIXED if ordered(axis) else None, source, bundle=("", axis)),),)


def unbundled(axis: Axis) -> Axis:
    """What a bundle stands for, where its factors stand together."""
    bundle = axis[0][-1].bundle if len(axis) == 1 and axis[0] else None
    if bundle is None:
        return axis
    before, (source, whole) = axis[0][:-1], bundle
    return whole if [factor.source for factor in before] == ([source] if source else []) else axis


def _reshape(axes: Axes, sizes: Sequence[Size], source: str) -> Axes:
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
                return (*result, *_lost(axes[first_in:], sizes[len(result) :], f"{source}[{first_out}]"))
        while i < len(axes) and _trailing(axes[first_in:i], axes[i]) and (j == len(sizes) or sizes[j] != ONE):
            i += 1
        result.extend(_regroup(axes[first_in:i], sizes[first_out:j], f"{source}[{first_out}]"))
    return tuple(result)


def _lost(axes: Axes, sizes: Sequence[Size], source: str) -> Axes:
    """The axes of a reshape whose dimensions cut through what is known."""
    return tuple(mixed(axes, size, f"{source}.{dim}") for dim, size in enumerate(sizes))


def _trailing(group: Axes, axis: Axis) -> bool:
    """True for rows or columns of a grid of which there is only one: they stay beside the rest of it."""
    return claims(axis) and axis_size(axis) == ONE and any(claims(other) for other in group)


def _regroup(axes: Axes, sizes: Sequence[Size], source: str) -> Axes:
    """One group of a reshape: the same elements, seen through other dimensions."""
    solid = [axis for axis in axes if axis_size(axis) != ONE]
    wide = [dim for dim, size in enumerate(sizes) if size != ONE]
    if len(solid) == 1 and len(wide) == 1 and len(solid[0]) > 1:
        return tuple(solid[0] if dim == wide[0] else UNIT for dim in range(len(sizes)))
    queue = [factor for axis in axes for factor in bundled(axis)[0]]
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
            pieces = _split(factor, product, size)
            if pieces is None:
                return _lost(axes, sizes, source)
            taken.append(pieces[0])
            queue.insert(0, pieces[1])
            product = size
        if dim == len(sizes) - 1:
            taken.extend(queue)  # trailing factors of size one
        if not same(segment_size(tuple(taken)), size):
            return _lost(axes, sizes, source)
        result.append((tuple(taken),))
    return tuple(result)


def _split(factor: Factor, product: Size, size: Size) -> tuple[Factor, Factor] | None:
    """Split a factor so that ``product`` times its first piece is ``size``. Only factors that carry no claim can be."""
    if (
        factor.role is not None
        or factor.part is not None
        or factor.bundle is not None
        or factor.writes
        or not product.hint
        or size.hint % product.hint
    ):
        return None
    outer = size.hint // product.hint
    if not outer or factor.size.hint % outer:
        return None
    if factor.size.static and size.static and product.static:
        first, second = size_of(outer), size_of(factor.size.hint // outer)
    else:
        first = quotient(size, product)
        second = quotient(factor.size, first)
    # The sizes are part of the names: the outer three of twelve and the inner three are not the same positions.
    return (
        replace(factor, size=first, source=f"{factor.source}/{first}", folded=None),
        replace(factor, size=second, source=f"{factor.source}%{second}", place=None),
    )
