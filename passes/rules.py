"""What each operator does to token types: one small function per kind of operator.

A rule takes an :class:`Op` and returns the axes of its result (a tuple of axes for a tensor, a list of those for
several tensors). It serves torch functions, tensor methods and aten overloads alike, which share names and argument
order. To support another operator, write its rule and enter it in ``RULES``. An operator without a rule gives unknown
axes, so a missing rule can lose a grid but never invent one.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import EllipsisType, MappingProxyType

import torch
from torch import fx

from .sizes import Size, add, same, shape_of, size_of, value_of
from .tokens import (
    ROLES,
    UNIT,
    Axes,
    Axis,
    axis_size,
    claims,
    concatenate,
    cut,
    grid_axis,
    join_all,
    reshape,
    unknown,
    unknowns,
)

Result = Axes | list[Axes]


@dataclass(frozen=True)
class Op:
    """One node as a rule sees it: its name, arguments, result sizes and the axes of its tensor arguments."""

    node: fx.Node
    name: str
    axes_of: Callable[[fx.Node], Axes | None]

    def arg(self, index: int, *names: str, default: object = None) -> object:
        """A positional argument, or the first of ``names`` given by keyword."""
        if index < len(self.node.args):
            return self.node.args[index]
        return next((self.node.kwargs[name] for name in names if name in self.node.kwargs), default)

    def tokens(self, index: int = 0, *names: str) -> Axes:
        """Axes of a tensor argument; none for anything else, such as a number."""
        value = self.arg(index, *(names or ("input", "self")))
        return (self.axes_of(value) if isinstance(value, fx.Node) else None) or ()

    def dims(self, index: int, rank: int, *names: str) -> list[int]:
        """Dimension numbers, given as one argument, as a list or as the rest of the arguments; never negative."""
        value = self.arg(index, *(names or ("dim", "dims")))
        if not isinstance(value, (tuple, list)):
            value = self.node.args[index:] if index < len(self.node.args) else [value]
        return [int(dim) % rank for dim in value if isinstance(dim, int)]

    def dim(self, index: int, rank: int, *names: str, default: int = 0) -> int:
        value = self.arg(index, *(names or ("dim",)), default=default)
        return value % rank if isinstance(value, int) else default

    @property
    def sizes(self) -> list[Size]:
        return shape_of(self.node) or []

    def unknown(self) -> Axes:
        return unknowns(self.sizes, self.node.name)


def keep(op: Op) -> Axes:
    """Same positions in, same positions out: casts, copies, norms, softmax, dropout."""
    axes = op.tokens()
    return axes if len(axes) == len(op.sizes) else op.unknown()


def elementwise(op: Op) -> Axes:
    operands = [op.axes_of(node) or () for node in op.node.all_input_nodes]
    return join_all(operands, op.sizes, op.node.name)


def regroup(op: Op) -> Axes:
    """view, reshape, flatten, unflatten, squeeze, unsqueeze: only the result's sizes matter."""
    return reshape(op.tokens(), op.sizes, op.node.name)


def permute(op: Op) -> Axes:
    axes = op.tokens()
    dims = op.dims(1, len(axes))
    return tuple(axes[dim] for dim in dims) if len(dims) == len(axes) else op.unknown()


def transpose(op: Op) -> Axes:
    axes = list(op.tokens())
    if not axes:
        return op.unknown()
    if op.name in ("t", "mT", "adjoint"):
        first, second = len(axes) - 2, len(axes) - 1
    else:
        first = op.dim(1, len(axes), "dim0", "axis0")
        second = op.dim(2, len(axes), "dim1", "axis1")
    axes[first], axes[second] = axes[second], axes[first]
    return tuple(axes)


def movedim(op: Op) -> Axes:
    axes = op.tokens()
    source, destination = op.arg(1, "source"), op.arg(2, "destination")
    if not isinstance(source, int) or not isinstance(destination, int):
        return op.unknown()
    rest = list(axes)
    rest.insert(destination % len(axes), rest.pop(source % len(axes)))
    return tuple(rest)


def linear(op: Op) -> Axes:
    axes = op.tokens()
    return (*axes[:-1], unknown(op.sizes[-1], f"{op.node.name}[-1]"))


def matmul(op: Op) -> Axes:
    left, right = op.tokens(0), op.tokens(1, "mat2", "other", "tensor2")
    if len(left) < 2 or len(right) < 2:
        return op.unknown()
    batch = join_all([left[:-2], right[:-2]], op.sizes[:-2], op.node.name)
    return (*batch, left[-2], right[-1])


def attention(op: Op) -> Axes:
    """Scaled dot-product attention: the queries' tokens, the values' channels."""
    query, value = op.tokens(0, "query"), op.tokens(2, "value")
    return (*query[:-1], value[-1]) if query and value else op.unknown()


def reduce(op: Op) -> Axes:
    """sum, mean and their kin: reduced dimensions vanish or become one wide."""
    axes = op.tokens()
    dims = op.dims(1, len(axes), "dim", "axis") if axes else []
    if not dims:
        return op.unknown()
    if len(op.sizes) == len(axes):
        return tuple(UNIT if dim in dims else axis for dim, axis in enumerate(axes))
    return tuple(axis for dim, axis in enumerate(axes) if dim not in dims)


def cat(op: Op) -> Axes:
    tensors = op.arg(0, "tensors")
    assert isinstance(tensors, Sequence)
    parts = [(op.axes_of(node) if isinstance(node, fx.Node) else None) or () for node in tensors]
    parts = [axes for axes in parts if len(axes) == len(op.sizes)]
    if len(parts) != len(tensors):
        return op.unknown()
    along = op.dim(1, len(op.sizes), "dim", "axis")
    axes = []
    for dim, size in enumerate(op.sizes):
        if dim == along:
            axes.append(concatenate([part[dim] for part in parts]))
        else:
            axes.extend(join_all([(part[dim],) for part in parts], [size], op.node.name))
    return tuple(axes)


def stack(op: Op) -> Axes:
    tensors = op.arg(0, "tensors")
    assert isinstance(tensors, Sequence)
    parts = [(op.axes_of(node) if isinstance(node, fx.Node) else None) or () for node in tensors]
    along = op.dim(1, len(op.sizes))
    rest = [size for dim, size in enumerate(op.sizes) if dim != along]
    axes = list(join_all(parts, rest, op.node.name))
    axes.insert(along, unknown(op.sizes[along], f"{op.node.name}[{along}]"))
    return tuple(axes)


def pieces(op: Op) -> Result:
    """chunk, split, unbind: a list of results. The sizes of the pieces are read off the example values."""
    values = value_of(op.node)
    axes = op.tokens()
    if not isinstance(values, (tuple, list)) or not axes:
        return []
    unbind = op.name == "unbind"
    dim = op.dim(1 if unbind else 2, len(axes))
    start, result = Size(0, 0), []
    for value in values:
        if unbind:
            result.append((*axes[:dim], *axes[dim + 1 :]))
            continue
        length = size_of(value.shape[dim])
        result.append((*axes[:dim], cut(axes[dim], start, length, op.node.name), *axes[dim + 1 :]))
        start = add([start, length])
    return result


IndexMap = list[tuple[int | None, builtins.slice | None]]


def slicing(op: Op) -> IndexMap | None:
    """Where each dimension of a basic-indexing result comes from: (source dimension or None where it is new, the slice
    taken of it or None where it is taken whole). None for an index that is a tensor or a list: it reorders positions.
    """
    axes = op.tokens()
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
    mapping, axes = slicing(op), op.tokens()
    if mapping is None or len(mapping) != len(op.sizes):
        return op.unknown()
    return tuple(
        UNIT
        if source is None
        else axes[source]
        if item is None
        else slice_axis(axes[source], item, op.sizes[dim], f"{op.node.name}[{dim}]")
        for dim, (source, item) in enumerate(mapping)
    )


def slice_axis(axis: Axis, item: builtins.slice, length: Size, source: str) -> Axis:
    """``length`` positions of an axis, picked by a slice whose bounds are numbers or nodes that hold one."""
    start = _number(item.start)
    if item.step not in (None, 1) or start is None:
        return unknown(length, source)
    if start.hint < 0:
        start = add([axis_size(axis), start])
    return cut(axis, start, length, source)


def _number(value: object) -> Size | None:
    if isinstance(value, fx.Node):
        value = value_of(value)
    if value is None:
        return Size(0, 0)
    return size_of(value) if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool) else None


def expand(op: Op) -> Axes:
    axes = op.tokens()
    sizes = op.sizes
    padded = (*[UNIT] * (len(sizes) - len(axes)), *axes)
    return tuple(
        axis if same(axis_size(axis), size) else unknown(size, f"{op.node.name}[{dim}]")
        for dim, (axis, size) in enumerate(zip(padded, sizes, strict=True))
    )


def reorder(op: Op) -> Axes:
    """flip, roll, index_select, gather: positions along the named dimensions are lost, the others stay."""
    axes = op.tokens()
    place = {"roll": 2, "gather": 1, "index_select": 1, "flip": 1, "repeat_interleave": 2}[op.name]
    dims = op.dims(place, len(axes), "dim", "dims") if axes else []
    if not dims or len(axes) != len(op.sizes):
        return op.unknown()
    fresh = op.unknown()
    return tuple(fresh[dim] if dim in dims else axis for dim, axis in enumerate(axes))


def pad(op: Op) -> Axes:
    axes, widths = list(op.tokens()), op.arg(1, "pad")
    if not isinstance(widths, (tuple, list)):
        return op.unknown()
    for offset in range(0, len(widths), 2):
        dim = len(axes) - 1 - offset // 2
        before, after = _number(widths[offset]), _number(widths[offset + 1])
        if before is None or after is None or before.hint < 0 or after.hint < 0:
            return op.unknown()
        name = f"{op.node.name}[{dim}]"
        sides = [unknown(size, f"{name} {side}") for size, side in ((before, "before"), (after, "after"))]
        parts = [part for part, size in zip(sides, (before, after), strict=True) if size.hint]
        axes[dim] = concatenate([*parts[: bool(before.hint)], axes[dim], *parts[bool(before.hint) :]])
    return tuple(axes)


def patch_embedding(op: Op) -> Axes:
    """A convolution over (frames, rows, columns) or (rows, columns) makes a grid out of its last axes.

    One inside the model, over axes that are a grid already and keep their sizes, leaves them what they are.
    """
    roles = ROLES if op.name == "conv3d" else ROLES[1:]
    axes, sizes = op.tokens(), op.sizes
    if len(axes) != len(roles) + 2 or len(sizes) != len(axes):
        return op.unknown()
    made = [
        axis if claims(axis) and same(axis_size(axis), size) else grid_axis(size, role, op.node.name)
        for axis, size, role in zip(axes[2:], sizes[2:], roles, strict=True)
    ]
    return (axes[0], unknown(sizes[1], f"{op.node.name}[1]"), *made)


def complex_view(op: Op) -> Axes:
    axes = op.tokens()
    return axes[:-1] if op.name == "view_as_complex" else (*axes, unknown(op.sizes[-1], f"{op.node.name}[-1]"))


_KEEP = [
    "to", "float", "double", "half", "bfloat16", "bool", "int", "long", "type", "type_as", "contiguous",
    "clone", "detach", "alias", "lift_fresh_copy", "requires_grad_", "dropout", "feature_dropout", "layer_norm",
    "rms_norm", "native_layer_norm", "softmax", "_softmax", "log_softmax", "normalize", "masked_fill", "cumsum",
    "cpu", "cuda", "nan_to_num", "_to_copy", "dropout_", "nested_tensor_from_mask", "cumprod",
]  # fmt: skip
_REDUCE = ["sum", "mean", "amax", "amin", "prod", "norm", "var", "std", "logsumexp", "any", "all", "linalg_vector_norm"]
_REGROUP = ["view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "_unsafe_view", "view_as", "reshape_as"]
_TRANSPOSE = ["transpose", "swapaxes", "swapdims", "t", "mT", "adjoint"]

SLICES = ("getitem", "slice", "narrow", "select")

RULES: Mapping[str, Callable[[Op], Result]] = MappingProxyType(
    {
        **dict.fromkeys(_KEEP, keep),
        **dict.fromkeys(_REDUCE, reduce),
        **dict.fromkeys(_REGROUP, regroup),
        **dict.fromkeys(_TRANSPOSE, transpose),
        **dict.fromkeys(("chunk", "split", "split_with_sizes", "tensor_split", "unbind", "unsafe_chunk"), pieces),
        **dict.fromkeys(SLICES, sliced),
        **dict.fromkeys(("matmul", "bmm", "mm"), matmul),
        **dict.fromkeys(("expand", "expand_as", "broadcast_to"), expand),
        **dict.fromkeys(("flip", "roll", "index_select", "gather", "repeat_interleave"), reorder),
        **dict.fromkeys(("cat", "concat", "concatenate"), cat),
        **dict.fromkeys(("conv3d", "conv2d"), patch_embedding),
        **dict.fromkeys(("view_as_complex", "view_as_real"), complex_view),
        **dict.fromkeys(("movedim", "moveaxis"), movedim),
        "permute": permute,
        "linear": linear,
        "scaled_dot_product_attention": attention,
        "stack": stack,
        "pad": pad,
    }
)

_OPERATORS = {"truediv": "div", "floordiv": "floor_divide", "and_": "bitwise_and", "or_": "bitwise_or", "inv": "neg"}


def name_of(node: fx.Node) -> str:
    """The operator's name, one and the same for a function, a tensor method and an aten overload."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[-1]
    name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    if name.startswith("__") and name.endswith("__"):
        name = name[2:-2]
    return _OPERATORS.get(name, name)


@lru_cache(maxsize=4096)
def is_elementwise(name: str) -> bool:
    """True where ATen tags the operator as pointwise, in place or not."""
    packet = getattr(torch.ops.aten, name.rstrip("_"), None)
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return False
    return any(torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads())
