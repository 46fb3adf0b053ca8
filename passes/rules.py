"""What each operator does to token types: one small function per kind of operator.

A rule takes an :class:`Op` and returns the axes of its result (a tuple of axes for a tensor, a list of those for
several tensors). It serves torch functions, tensor methods and aten overloads alike, which share names and argument
order. To support another operator, write its rule and enter it in ``RULES``. An operator without a rule gives unknown
axes, so a missing rule can lose a grid but never invent one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from torch import fx

from .indexing import SLICES, index_write, indexed, number, sliced
from .op import Op, Result
from .products import permutation_of, product_of
from .reshaping import reshape
from .shards import RULES as COLLECTIVES
from .sizes import ONE, Size, add, same, size_of, value_of
from .tokens import (
    ROLES,
    UNIT,
    Axes,
    Axis,
    Origin,
    axis_size,
    claims,
    concatenate,
    cut,
    fold,
    grid_axis,
    is_mixed,
    join_all,
    merged_grid,
    mixed,
    ordered,
    pick,
    unknown,
    unpicked,
)


def keep(op: Op) -> Axes:
    """Same positions in, same positions out: casts, copies, norms, softmax, dropout."""
    axes = op.tokens()
    return axes if len(axes) == len(op.sizes) else op.unknown()


def elementwise(op: Op) -> Axes:
    operands = [op.axes_of(node) or () for node in op.node.all_input_nodes]
    return join_all(operands, op.sizes, op.label)


def regroup(op: Op) -> Axes:
    """view, reshape, flatten, unflatten, squeeze, unsqueeze: only the result's sizes matter."""
    return tuple(merged_grid(axis, op.label) for axis in reshape(op.tokens(), op.sizes, op.label))


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
    if not isinstance(source, int) or not isinstance(destination, int) or not axes:
        return op.unknown()
    rest = list(axes)
    rest.insert(destination % len(axes), rest.pop(source % len(axes)))
    return tuple(rest)


def linear(op: Op) -> Axes:
    axes = op.tokens()
    return (*axes[:-1], unknown(op.sizes[-1], f"{op.label}[-1]", Origin.CHANNELS))


def matmul(op: Op) -> Axes:
    left, right = op.tokens(0), op.tokens(1, "mat2", "other", "tensor2")
    if len(left) < 2 or len(right) < 2:
        return op.unknown()
    batch = join_all([left[:-2], right[:-2]], op.sizes[:-2], op.label)
    return (*batch, left[-2], right[-1])


def attention(op: Op) -> Axes:
    """Scaled dot-product attention: the queries' tokens, the values' channels."""
    query, value = op.tokens(0, "query"), op.tokens(2, "value")
    return (*query[:-1], value[-1]) if query and value else op.unknown()


def module_attention(op: Op) -> Result:
    """``nn.MultiheadAttention``: the queries' tokens, projected, and weights."""
    query = op.tokens(0, "query")
    values = value_of(op.node)
    if not query or not isinstance(values, (tuple, list)):
        return op.unknown()
    width = size_of(values[0].shape[-1])
    return [(*query[:-1], unknown(width, f"{op.label}[-1]", Origin.CHANNELS)), ()]


def encoder_layer(op: Op) -> Axes:
    src = op.tokens(0, "src")
    return (*src[:-1], unknown(op.sizes[-1], f"{op.label}[-1]", Origin.CHANNELS)) if src else op.unknown()


def product(op: Op) -> Axes:
    """einsum and baddbmm of two tensors: what runs together is joined, the rest comes from one operand."""
    order = permutation_of(op.node)
    if order is not None:
        given = op.axes_of(op.node.all_input_nodes[0]) or ()
        return tuple(given[dim] for dim in order) if len(given) == len(order) else op.unknown()
    found = product_of(op.node)
    if found is None:
        return op.unknown()
    result: list[Axis] = []
    for dim, label in enumerate(found.out_dims):
        axes: list[Axes] = []
        for operand, dims in ((found.left, found.left_dims), (found.right, found.right_dims)):
            axes += [((op.axes_of(operand) or op.unknown())[dims.index(label)],)] if label in dims else []
        result.extend(join_all(axes, [op.sizes[dim]], f"{op.label}[{dim}]"))
    return tuple(result)


def reduce(op: Op) -> Axes:
    """sum, mean and their kin: reduced dimensions vanish or become one wide."""
    axes = op.tokens()
    dims = op.dims(2 if op.name in _NORMS else 1, len(axes), "dim", "axis")
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
    video = [part for part in parts if claims(part[along])] or parts  # whose samples these are, where others are text
    axes = []
    for dim, size in enumerate(op.sizes):
        if dim == along:
            axes.append(concatenate([part[dim] for part in parts]))
        else:
            axes.extend(join_all([(part[dim],) for part in video], [size], op.label))
    return tuple(axes)


def stack(op: Op) -> Axes:
    tensors = op.arg(0, "tensors")
    assert isinstance(tensors, Sequence)
    parts = [(op.axes_of(node) if isinstance(node, fx.Node) else None) or () for node in tensors]
    along = op.dim(1, len(op.sizes))
    rest = [size for dim, size in enumerate(op.sizes) if dim != along]
    axes = list(join_all(parts, rest, op.label))
    for dim, size in enumerate(rest):
        if len({unpicked(part[dim]) for part in parts if len(part) == len(rest) and claims(part[dim])}) > 1:
            axes[dim] = mixed([part[dim] for part in parts], size, f"{op.label}[{dim}]")  # of several videos
    axes.insert(along, unknown(op.sizes[along], f"{op.label}[{along}]", Origin.CHANNELS))
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
    for index, value in enumerate(values):
        if unbind:
            result.append(pick((*axes[:dim], *axes[dim + 1 :]), axes[dim], index))
            continue
        length = size_of(value.shape[dim])
        result.append((*axes[:dim], cut(axes[dim], start, length, op.label), *axes[dim + 1 :]))
        start = add([start, length])
    return result


def expand(op: Op) -> Axes:
    axes = op.tokens()
    sizes = op.sizes
    padded = (*[UNIT] * (len(sizes) - len(axes)), *axes)
    return tuple(
        axis if same(axis_size(axis), size) else unknown(size, f"{op.label}[{dim}]", Origin.CONSTANT)
        for dim, (axis, size) in enumerate(zip(padded, sizes, strict=True))
    )


def repeat(op: Op) -> Axes:
    """Copies laid end to end: of one position the same value everywhere, of several a new order."""
    axes, sizes = op.tokens(), op.sizes
    padded = (*[UNIT] * (len(sizes) - len(axes)), *axes)
    return tuple(
        axis
        if same(axis_size(axis), size)
        else unknown(size, f"{op.label}[{dim}]", Origin.CONSTANT)
        if axis_size(axis) == ONE
        else mixed((axis,), size, f"{op.label}[{dim}]")
        for dim, (axis, size) in enumerate(zip(padded, sizes, strict=True))
    )


def counting(op: Op) -> Axes:
    """arange, linspace: positions that count up."""
    return tuple(unknown(size, f"{op.label}[{dim}]", Origin.TABLE) for dim, size in enumerate(op.sizes))


def outer(op: Op) -> Axes:
    left, right = op.tokens(0), op.tokens(1, "vec2", "other")
    return (*left, *right)


def meshgrid(op: Op) -> Result:
    """Every result has the axes of all operands, the first two swapped where they are columns and rows."""
    tensors = op.arg(0, "tensors")
    if not isinstance(tensors, (tuple, list)):
        tensors = [x for x in op.node.args if isinstance(x, fx.Node)]
    parts = [(op.axes_of(x) if isinstance(x, fx.Node) else None) or () for x in tensors]
    if any(len(axes) != 1 for axes in parts):
        return []
    axes = [axes[0] for axes in parts]
    indexing = op.node.kwargs.get("indexing") or (op.node.args[1] if len(op.node.args) == 2 else "ij")
    if indexing == "xy":
        axes[:2] = axes[1::-1]
    return [tuple(axes)] * len(parts)


def reorder(op: Op) -> Axes:
    """flip, roll, sort, gather: the order along the named dimensions is lost, the others stay."""
    axes = op.tokens()
    place = 2 if op.name in ("roll", "repeat_interleave", "take_along_dim") else 1
    dims = op.dims(place, len(axes), "dim", "dims")
    if not dims or len(axes) != len(op.sizes):
        return tuple(mixed(axes, size, f"{op.label}[{dim}]") for dim, size in enumerate(op.sizes))
    return tuple(
        mixed((axis,), size, f"{op.label}[{dim}]") if dim in dims else axis
        for dim, (axis, size) in enumerate(zip(axes, op.sizes, strict=True))
    )


def written_by_index(op: Op) -> Axes:
    """index_copy, index_put: tokens of another tensor at the positions that a tensor holds."""
    place = index_write(op)
    return op.unknown() if place is None else place


def added_by_index(op: Op) -> Axes:
    """scatter_add, index_add: what is added to tokens in a known order stands in that order."""
    axes, added = op.tokens(), op.tokens(3, "src", "source")
    if any(ordered(axis) for axis in added):
        return reorder(op)
    return axes if len(axes) == len(op.sizes) else op.unknown()


def pad(op: Op) -> Axes:
    axes, widths = list(op.tokens()), op.arg(1, "pad")
    if not isinstance(widths, (tuple, list)):
        return op.unknown()
    for offset in range(0, len(widths), 2):
        dim = len(axes) - 1 - offset // 2
        before, after = number(widths[offset]), number(widths[offset + 1])
        if before is None or after is None or before.hint < 0 or after.hint < 0:
            return op.unknown()
        name = f"{op.label}[{dim}]"
        sides = [unknown(size, f"{name} {side}") for size, side in ((before, "before"), (after, "after"))]
        parts = [part for part, size in zip(sides, (before, after), strict=True) if size.hint]
        axes[dim] = concatenate([*parts[: bool(before.hint)], axes[dim], *parts[bool(before.hint) :]])
    return tuple(axes)


def patch_embedding(op: Op) -> Axes:
    """A convolution over (frames, rows, columns) or (rows, columns) makes a grid out of its last axes.

    One inside the model, over axes that are a grid already and keep their sizes, leaves them what they are; one that
    shrinks them, or is over pixels that a grid was taken apart into, makes a new grid; one over windows or reordered tokens
    makes none.
    """
    roles = ROLES if op.name == "conv3d" else ROLES[1:]
    axes, sizes = op.tokens(), op.sizes
    if len(axes) != len(roles) + 2 or len(sizes) != len(axes):
        return op.unknown()
    spatial = list(zip(axes[2:], sizes[2:], roles, strict=True))
    old = [axis for axis, *_ in spatial if claims(axis)]
    kept = [claims(axis) and same(axis_size(axis), size) for axis, size, _ in spatial]
    if not all(kept) and all(_is_image_axis(axis, role) for axis, _, role in spatial):
        made = [grid_axis(size, role, op.label) for _, size, role in spatial]
    elif any(is_mixed(axis) for axis in axes) or any(len(axis) > 1 or len(axis[0]) > 1 for axis in old):
        made = [
            axis if keep else mixed(axes, size, f"{op.label}[{role}]")
            for keep, (axis, size, role) in zip(kept, spatial, strict=True)
        ]
    elif len(old) == sum(kept) and any(claims(axis) for axis in axes):
        made = [
            axis if keep else unknown(size, f"{op.label}[{role}]")
            for keep, (axis, size, role) in zip(kept, spatial, strict=True)
        ]
    else:
        made = [grid_axis(size, role, op.label) for _, size, role in spatial]
    batch = fold(axes[0], op.label) if op.name == "conv2d" and not any(kept) else axes[0]
    return (batch, unknown(sizes[1], f"{op.label}[1]", Origin.CHANNELS), *made)


def _is_image_axis(axis: Axis, role: str) -> bool:
    """True for frames, rows or columns of a grid that were taken apart into pixels again, in order."""
    if len(axis) != 1 or not axis[0] or axis[0][0].role != role:
        return False
    return all(f.role is None and f.part is None and f.origin is Origin.CHANNELS for f in axis[0][1:])


def complex_view(op: Op) -> Axes:
    axes = op.tokens()
    return axes[:-1] if op.name == "view_as_complex" else (*axes, unknown(op.sizes[-1], f"{op.label}[-1]"))


_KEEP = [
    "to", "float", "double", "half", "bfloat16", "bool", "int", "long", "type", "type_as", "contiguous",
    "clone", "detach", "alias", "lift_fresh_copy", "requires_grad_", "dropout", "feature_dropout", "layer_norm",
    "rms_norm", "native_layer_norm", "softmax", "_softmax", "_safe_softmax", "log_softmax", "normalize",
    "masked_fill", "cumsum",
    "cpu", "cuda", "nan_to_num", "_to_copy", "dropout_", "cumprod", "batch_norm", "group_norm", "instance_norm",
    "masked_fill_", "fill_", "zero_", "vmoba::landmark", "_c10d_functional::wait_tensor",
]  # fmt: skip
_REDUCE = ["sum", "mean", "amax", "amin", "prod", "norm", "var", "std", "logsumexp", "any", "all", "linalg_vector_norm"]
_NORMS = ("norm", "linalg_vector_norm")
_REGROUP = ["view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "_unsafe_view", "view_as", "reshape_as"]
_REORDER = [
    "flip", "roll", "index_select", "gather", "repeat_interleave", "take_along_dim", "index_fill", "scatter",
]  # fmt: skip
_TRANSPOSE = ["transpose", "swapaxes", "swapdims", "t", "mT", "adjoint"]

RULES: Mapping[str, Callable[[Op], Result]] = MappingProxyType(
    {
        **dict.fromkeys(_KEEP, keep),
        **dict.fromkeys(_REDUCE, reduce),
        **dict.fromkeys(_REGROUP, regroup),
        **dict.fromkeys(_TRANSPOSE, transpose),
        **dict.fromkeys(("chunk", "split", "split_with_sizes", "tensor_split", "unbind", "unsafe_chunk"), pieces),
        **dict.fromkeys(SLICES, sliced),
        **dict.fromkeys(("matmul", "bmm", "mm"), matmul),
        **dict.fromkeys(("einsum", "baddbmm"), product),
        **dict.fromkeys(("multi_head_attention_forward", "_native_multi_head_attention"), module_attention),
        "_transformer_encoder_layer_fwd": encoder_layer,
        **dict.fromkeys(("expand", "expand_as", "broadcast_to"), expand),
        **dict.fromkeys(("repeat", "tile"), repeat),
        **dict.fromkeys(("arange", "linspace"), counting),
        **dict.fromkeys(("outer", "ger"), outer),
        "meshgrid": meshgrid,
        **dict.fromkeys(_REORDER, reorder),
        **dict.fromkeys(("cat", "concat", "concatenate"), cat),
        **dict.fromkeys(("conv3d", "conv2d"), patch_embedding),
        **dict.fromkeys(("view_as_complex", "view_as_real"), complex_view),
        **dict.fromkeys(("movedim", "moveaxis"), movedim),
        **dict.fromkeys(("index_copy", "index_put"), written_by_index),
        **dict.fromkeys(("scatter_add", "index_add"), added_by_index),
        **COLLECTIVES,
        "index": indexed,
        "permute": permute,
        "linear": linear,
        "scaled_dot_product_attention": attention,
        "stack": stack,
        "pad": pad,
    }
)
