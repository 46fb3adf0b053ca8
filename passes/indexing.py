"""Indexing: which positions of which axis a result holds."""

from __future__ import annotations

import builtins
from types import EllipsisType

import sympy
import torch
from torch import fx

from .op import Op
from .sizes import Lengths, Size, add, learn_length, replaced, size_of, subtract, value_of
from .tokens import UNIT, Axes, Axis, axis_size, cut, join, mixed, pick, written

SLICES = ("getitem", "slice", "narrow", "select")
IndexMap = list[tuple[int | None, builtins.slice | None]]


def slicing(op: Op) -> IndexMap | None:
    """Where each dimension of a basic-indexing result comes from: (source dimension or None where it is new, the slice
    taken of it or None where it is taken whole). None for an index that is a tensor or a list: it reorders positions.
    """
    axes = op.tokens()
    if not axes:
        return None
    if op.name == "getitem":
        return index_map(len(axes), op.arg(1))
    dim = op.dim(1, len(axes))
    if op.name == "select":
        return [(index, None) for index in range(len(axes)) if index != dim]
    step = op.arg(4, "step", default=1) if op.name == "slice" else 1
    taken = builtins.slice(op.arg(2, "start", default=0), None, step)
    return [(index, taken if index == dim else None) for index in range(len(axes))]


def index_map(rank: int, index: object) -> IndexMap | None:
    """The same for ``x[index]`` with ``x`` of that rank."""
    items = list(index) if isinstance(index, tuple) else [index]
    if any(not isinstance(i, (int, builtins.slice, EllipsisType, type(None))) or isinstance(i, bool) for i in items):
        return None
    if Ellipsis not in items:
        items.append(Ellipsis)
    at = items.index(Ellipsis)
    consumed = sum(isinstance(i, (int, builtins.slice)) for i in items)
    items[at : at + 1] = [builtins.slice(None)] * (rank - consumed)
    mapping: IndexMap = []
    source = 0
    for item in items:
        if item is None:
            mapping.append((None, None))
            continue
        if isinstance(item, builtins.slice):
            whole = item.start in (None, 0) and item.stop is None and item.step in (None, 1)
            mapping.append((source, None if whole else item))
        source += 1
    return mapping if source == rank else None


def sliced(op: Op) -> Axes:
    """Basic indexing, aten.slice, narrow and select."""
    mapping = slicing(op)
    if mapping is None or len(mapping) != len(op.sizes):
        return indexed(op)
    return _mapped(op, mapping)


def _mapped(op: Op, mapping: IndexMap) -> Axes:
    """The result's axes, each taken from where the map says."""
    axes = op.tokens()
    for dim, (source, item) in enumerate(mapping):
        length = None if source is None or item is None else _length(axes[source], item, op.lengths)
        if length is not None:  # one counted from the end, such as of x[:, -n:], is n unless n is zero
            learn_length(op.sizes[dim], length, op.lengths)
    sizes = op.sizes
    found: Axes = tuple(
        UNIT
        if source is None
        else axes[source]
        if item is None
        else slice_axis(axes[source], item, sizes[dim], f"{op.label}[{dim}]", op.lengths)
        for dim, (source, item) in enumerate(mapping)
    )
    for source, index in _dropped(op, len(axes), {source for source, _ in mapping}):
        found = pick(found, axes[source], index)
    return found


def _dropped(op: Op, rank: int, kept: set[int | None]) -> list[tuple[int, object]]:
    """Dimensions of which one position was taken, and that position."""
    gone = [dim for dim in range(rank) if dim not in kept]
    if op.name == "getitem":
        index = op.arg(1)
        items = list(index) if isinstance(index, tuple) else [index]
        numbers = [item for item in items if isinstance(item, (int, fx.Node)) and not isinstance(item, bool)]
        return (
            list(zip(gone, numbers, strict=False)) if len(numbers) == len(gone) else [(dim, op.label) for dim in gone]
        )
    return [(dim, op.arg(2, "index")) for dim in gone]


def indexed(op: Op) -> Axes:
    """``x[:, order]``: what a list or tensor of positions picks comes in an order of its own.

    Other axes stay where the index is one list, or one tensor of one dimension; all are mixed where there is more.
    """
    axes, index = op.tokens(), op.arg(1, "indices", "index")
    items = list(index) if isinstance(index, tuple) else [index]
    if op.name == "index" and isinstance(index, (tuple, list)):
        items = [builtins.slice(None) if item is None else item for item in index]
    picking = [place for place, item in enumerate(items) if _picks_one_axis(item)]
    if len(picking) == 1 and not any(isinstance(item, int) for item in items):
        items[picking[0]] = builtins.slice(0, None, 2)  # a stand-in: some positions of that axis
        mapping = index_map(len(axes), tuple(items))
        if mapping is not None and len(mapping) == len(op.sizes):
            return _mapped(op, mapping)
    return tuple(mixed(axes, size, f"{op.label}[{dim}]") for dim, size in enumerate(op.sizes))


def index_write(op: Op) -> Axes | None:
    """The tensor's axes after a write at the positions that one tensor of integers holds; None for other writes.

    ``index_copy(x, dim, index, source)``, ``index_put(x, [None, index], values)`` and ``x[:, index] = values``.
    """
    axes = op.tokens()
    if op.name.startswith("index_copy"):
        dim, index, given = op.arg(1, "dim"), op.arg(2, "index"), op.arg(3, "source")
        place = dim % len(axes) if isinstance(dim, int) and axes else None
    else:
        items, given = op.arg(1, "indices"), op.arg(2, "values")
        items = list(items) if isinstance(items, (tuple, list)) else [items]
        whole = (None,) if op.name != "setitem" else (builtins.slice(None),)
        picking = [dim for dim, item in enumerate(items) if item not in whole]
        place = picking[0] if len(picking) == 1 else None
        index = items[picking[0]] if picking else None
        if op.arg(3, "accumulate", default=False) is not False:
            return None
    tokens = op.axes_of(given) if isinstance(given, fx.Node) else None
    picked = value_of(index) if isinstance(index, fx.Node) else None
    if place is None or tokens is None or len(tokens) != len(axes) or not isinstance(picked, torch.Tensor):
        return None
    if picked.dim() != 1 or picked.dtype not in (torch.int64, torch.int32):
        return None
    assert isinstance(index, fx.Node)
    return tuple(
        written(axis, tokens[dim], index, op.label) if dim == place else join(axis, tokens[dim], f"{op.label}[{dim}]")
        for dim, axis in enumerate(axes)
    )


def _picks_one_axis(item: object) -> bool:
    value = value_of(item) if isinstance(item, fx.Node) else item
    if isinstance(value, torch.Tensor):
        return value.dim() == 1
    return isinstance(value, list) and not any(isinstance(entry, (list, tuple)) for entry in value)


def slice_axis(axis: Axis, item: builtins.slice, length: Size, source: str, lengths: Lengths | None = None) -> Axis:
    """``length`` positions of an axis, picked by a slice whose bounds are numbers or nodes that hold one."""
    start = number(item.start, lengths)
    if item.step not in (None, 1) or start is None:
        return mixed((axis,), length, source)
    if is_negative(start):
        start = add([axis_size(axis), start])
    return cut(axis, start, length, source)


def _length(axis: Axis, item: builtins.slice, lengths: Lengths) -> Size | None:
    """How many positions a slice takes, where its bounds are inside."""
    whole = axis_size(axis)
    ends = [number(item.start, lengths), whole if item.stop is None else number(item.stop, lengths)]
    if item.step not in (None, 1):
        return None
    first, last = (None if end is None else add([whole, end]) if is_negative(end) else end for end in ends)
    return None if first is None or last is None else subtract(last, first)


def is_negative(start: Size) -> bool:
    """True for a start that is counted from the end; of a size that depends on data only its sign is known."""
    return start.hint < 0 or (isinstance(start.expr, sympy.Expr) and start.expr.could_extract_minus_sign())


def number(value: object, lengths: Lengths | None = None) -> Size | None:
    """A bound of a slice: 0 where there is none."""
    if isinstance(value, fx.Node):
        value = value_of(value)
    if value is None:
        return Size(0, 0)
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        return None
    return replaced(size_of(value), lengths or {})
