"""Indexing: which positions of which axis a result holds."""

from __future__ import annotations

import builtins
from types import EllipsisType

import sympy
import torch
from torch import fx

from .op import Op
from .sizes import Size, add, size_of, value_of
from .tokens import UNIT, Axes, Axis, axis_size, cut, mixed

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
    axes, sizes = op.tokens(), op.sizes
    return tuple(
        UNIT
        if source is None
        else axes[source]
        if item is None
        else slice_axis(axes[source], item, sizes[dim], f"{op.label}[{dim}]")
        for dim, (source, item) in enumerate(mapping)
    )


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


def _picks_one_axis(item: object) -> bool:
    value = value_of(item) if isinstance(item, fx.Node) else item
    if isinstance(value, torch.Tensor):
        return value.dim() == 1
    return isinstance(value, list) and not any(isinstance(entry, (list, tuple)) for entry in value)


def slice_axis(axis: Axis, item: builtins.slice, length: Size, source: str) -> Axis:
    """``length`` positions of an axis, picked by a slice whose bounds are numbers or nodes that hold one."""
    start = number(item.start)
    if item.step not in (None, 1) or start is None:
        return mixed((axis,), length, source)
    if is_negative(start):
        start = add([axis_size(axis), start])
    return cut(axis, start, length, source)


def is_negative(start: Size) -> bool:
    """True for a start that is counted from the end; of a size that depends on data only its sign is known."""
    return start.hint < 0 or (isinstance(start.expr, sympy.Expr) and start.expr.could_extract_minus_sign())


def number(value: object) -> Size | None:
    if isinstance(value, fx.Node):
        value = value_of(value)
    if value is None:
        return Size(0, 0)
    return size_of(value) if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool) else None
