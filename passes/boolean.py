"""Masks on scores as bool tensors: True where a key may be attended."""

from __future__ import annotations

from math import isfinite

import torch
from torch import fx

from .builder import Builder
from .effects import check_undisturbed, is_disturbed
from .reading import CASTS, FLOATS, FLOOR, Mask, Unread, argument, called, number_of, where_of
from .report import Reason
from .sizes import shape_of, value_of

aten = torch.ops.aten
_VIEWS = frozenset(
    ["unsqueeze", "squeeze", "view", "reshape", "getitem", "expand", "transpose", "permute", "contiguous", "clone",
     "slice", "select", "alias", "flatten", "unflatten", "repeat_interleave"]
)  # fmt: skip
_ZEROS = frozenset(["zeros", "zeros_like", "new_zeros"])


def boolean_mask(builder: Builder, mask: Mask) -> fx.Node:
    """The mask as bool nodes. Raises :class:`Unread` for a bias that is not proven to be zeros and large negatives."""
    if mask.kind != "bias":
        if not mask.scale <= FLOOR:
            raise Unread(f"scores are masked with {mask.scale:g}, which does not lie below {FLOOR:g}", Reason.MASK)
        node = as_bool(builder, mask.node)
        return node if mask.kind == "keep" else builder.call(aten.logical_not.default, node)
    value = value_of(mask.node)
    if isinstance(value, torch.Tensor) and value.dtype == torch.bool:
        raise Unread("a bool tensor is added to the scores", Reason.MASK)
    found = _kept(builder, mask.node, mask.scale, builder.at)
    if found is None and builder.trusts_masks and _floating(mask.node) and mask.scale > 0:
        return _vouched_for(builder, mask)
    if found is None:
        shape = "[" + ", ".join(map(str, shape_of(mask.node) or [])) + "]"
        raise Unread(
            f"a tensor {shape} is added to the scores that is not proven to be a mask (zeros, and values below {FLOOR:g})",
            Reason.MASK,
        )
    return found


def _vouched_for(builder: Builder, mask: Mask) -> fx.Node:
    """A float mask that the user says is padding: that it holds zeros and large negatives alone is checked at each run."""
    value = value_of(mask.node)
    if isinstance(value, torch.Tensor) and value.requires_grad:
        raise Unread("float_masks='padding' was given, but a mask is learned", Reason.MASK)
    floor = FLOOR / mask.scale
    fits = builder.call(
        aten.logical_or.default,
        builder.call(aten.eq.Scalar, mask.node, 0),
        builder.call(aten.le.Scalar, mask.node, floor),
    )
    message = f"vmoba_compile: float_masks='padding', but a mask holds values other than 0 and at most {floor:g}"
    builder.call(aten._assert_async.msg, builder.call(aten.all.default, fits), message)
    kept = builder.call(aten.gt.Scalar, mask.node, floor / 2)
    seeing = builder.call(aten.all.default, builder.call(aten.any.dim, kept, -1))
    message = "vmoba_compile: float_masks='padding', but a mask hides every key from a query"
    builder.call(aten._assert_async.msg, seeing, message)
    return kept


def as_bool(builder: Builder, node: fx.Node) -> fx.Node:
    value = value_of(node)
    if not isinstance(value, torch.Tensor) or value.dtype != torch.bool:
        raise Unread("scores are masked by a tensor that is not bool", Reason.MASK)
    return node


def _kept(builder: Builder, node: fx.Node, scale: float, until: fx.Node) -> fx.Node | None:
    """Bool nodes that are True where ``scale * node`` is zero and False where it is below the floor; else None.

    ``until`` is where the node is read: what it was made of may have been overwritten before.
    """
    writer = is_disturbed([node], node, until, builder.writers)
    if writer and called(writer) == "masked_fill_" and argument(writer, 0, "input", "self") is node:
        return _kept(builder, writer, scale, until)
    if writer or not called(node):
        return None
    name, first = called(node), argument(node, 0, "input", "self")
    if name in CASTS and isinstance(first, fx.Node):
        return _kept(builder, first, scale, node) if _floating(first) and _floating(node) else None
    if name in _VIEWS and isinstance(first, fx.Node):
        inner = _kept(builder, first, scale, node) if _floating(first) and _dtype(first) == _dtype(node) else None
        return None if inner is None else builder.call(node.target, inner, *node.args[1:], **node.kwargs)
    if name == "where":
        condition, yes, no = where_of(node)
        if isinstance(condition, fx.Node) and _is_zero(builder, yes, node) and _is_low(no, scale):
            return _still(builder, condition, node)
        if isinstance(condition, fx.Node) and _is_zero(builder, no, node) and _is_low(yes, scale):
            return builder.call(aten.logical_not.default, _still(builder, condition, node))
        return None
    if name in ("masked_fill", "masked_fill_"):
        condition = argument(node, 1, "mask")
        if not isinstance(condition, fx.Node) or not _is_low(argument(node, 2, "value"), scale):
            return None
        before = None
        if not _is_zero(builder, first, node):
            before = _kept(builder, first, scale, node) if isinstance(first, fx.Node) else None
            if before is None:
                return None
        filled = builder.call(aten.logical_not.default, _still(builder, condition, node))
        return filled if before is None else builder.call(aten.logical_and.default, before, filled)
    if name in ("mul", "div", "neg") and node.kwargs.get("rounding_mode") is None:
        return _product(builder, node, name, scale)
    return None


def _product(builder: Builder, node: fx.Node, name: str, scale: float) -> fx.Node | None:
    first, second = argument(node, 0, "input", "self"), argument(node, 1, "other")
    if not isinstance(first, fx.Node) and name == "mul":
        first, second = second, first
    number = -1.0 if name == "neg" else number_of(second)
    if not number or not isfinite(number) or not isinstance(first, fx.Node):
        return None
    number = scale / number if name == "div" else scale * number
    return _indicator(builder, first, number, node) or _kept(builder, first, number, node)


def _indicator(builder: Builder, node: fx.Node, scale: float, until: fx.Node) -> fx.Node | None:
    """``(1 - keep) * scale`` with a large negative scale, ``(keep - 1) * scale`` with a large positive one."""
    if is_disturbed([node], node, until, builder.writers):
        return None
    name = called(node)
    if name not in ("sub", "rsub"):  # drop * scale
        held = _was_bool(builder, node, until) if scale <= FLOOR else None
        return None if held is None else builder.call(aten.logical_not.default, held)
    first, second = argument(node, 0, "input", "self"), argument(node, 1, "other")
    if node.kwargs.get("alpha", 1) != 1 or len(node.args) > 2:
        return None
    if name == "rsub":
        first, second = second, first
    if number_of(first) == 1 and isinstance(second, fx.Node) and scale <= FLOOR:
        return _was_bool(builder, second, node)
    if number_of(second) == 1 and isinstance(first, fx.Node) and -scale <= FLOOR:
        return _was_bool(builder, first, node)
    return None


def _was_bool(builder: Builder, node: fx.Node, until: fx.Node) -> fx.Node | None:
    """The bool tensor that was cast to numbers."""
    while _dtype(node) != torch.bool:
        given = argument(node, 0, "input", "self")
        cast = called(node) in CASTS | {"int", "long"} and isinstance(given, fx.Node)
        if not cast or is_disturbed([node], node, until, builder.writers):
            return None
        assert isinstance(given, fx.Node)
        node, until = given, node
    return _still(builder, node, until)


def _still(builder: Builder, node: fx.Node, since: fx.Node) -> fx.Node:
    """A bool tensor that the graph has read at ``since``, to be read again where nodes are inserted."""
    check_undisturbed([node], since, builder.at, builder.writers)
    return as_bool(builder, node)


def _dtype(node: fx.Node) -> torch.dtype | None:
    return getattr(value_of(node), "dtype", None)


def _floating(node: fx.Node) -> bool:
    return _dtype(node) in FLOATS


def _is_zero(builder: Builder, value: object, until: fx.Node) -> bool:
    if not isinstance(value, fx.Node) or not called(value):
        return number_of(value) == 0
    if is_disturbed([value], value, until, builder.writers):
        return False
    if called(value) in ("full", "full_like", "new_full"):
        fill = argument(value, 2 if called(value) == "new_full" else 1, "fill_value")
        return not isinstance(fill, fx.Node) and number_of(fill) == 0
    return called(value) in _ZEROS or number_of(value) == 0


def _is_low(value: object, scale: float) -> bool:
    number = number_of(value)
    return number is not None and scale > 0 and number * scale <= FLOOR
