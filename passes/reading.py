"""What an attention in a graph computes, read off however it is spelled."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isinf

import torch
from torch import fx

from .labels import Dims, Labels
from .names import name_of
from .report import Reason
from .sizes import memory_of, value_of

FLOATS = frozenset([torch.float64, torch.float32, torch.bfloat16, torch.float16])
CASTS = frozenset(["to", "float", "half", "bfloat16", "double", "type", "type_as", "_to_copy"])
FLOOR = -1e4  # a score below this has no weight beside any other


@dataclass(frozen=True)
class Operand:
    """A tensor and what its dimensions stand for."""

    node: fx.Node
    dims: Dims


@dataclass(frozen=True)
class Mask:
    """A mask on the scores.

    ``kind`` is "keep" (bool, where False is filled with ``scale``), "drop" (bool, where True is) or "bias" (added, times
    ``scale``).
    """

    kind: str
    node: fx.Node
    dims: Dims
    scale: float = 1.0


@dataclass
class Reading:
    """``result = softmax(scale * factors * query @ key.T + masks) @ value``; ``dims`` are those of the result."""

    node: fx.Node
    query: Operand
    key: Operand
    value: Operand
    result: fx.Node
    dims: Dims
    labels: Labels
    batch: list[str]
    scale: float = 1.0
    factors: list[tuple[str, Operand]] = field(default_factory=list)  # ("mul" or "div", what does not vary by token)
    masks: list[Mask] = field(default_factory=list)
    dropout: float = 0.0
    causal: bool = False
    dtype: torch.dtype | None = None  # that autocast gives to the products, where it does
    nodes: list[fx.Node] = field(default_factory=list)  # from the first product to the result, in order


class Unread(Exception):
    """An attention that is not read, with the reason that its site reports."""

    def __init__(self, detail: str, reason: Reason = Reason.SPELLING) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


def called(node: fx.Node) -> str:
    """The operator's name; none for an input, which may be named like one."""
    return name_of(node) if node.op in ("call_function", "call_method") else ""


def argument(node: fx.Node, index: int, *names: str) -> object:
    """An argument by its place or by one of its names; None where it is not given."""
    if index < len(node.args):
        return node.args[index]
    return next((node.kwargs[name] for name in names if name in node.kwargs), None)


def is_floating(node: fx.Node) -> bool:
    """True for a tensor of real numbers of a type that attention is computed in."""
    value = value_of(node)
    return isinstance(value, torch.Tensor) and value.dtype in FLOATS


def where_of(node: fx.Node) -> tuple[object, object, object]:
    """Condition and the two choices of a ``where``; the method is called on the first choice."""
    if node.op == "call_method":
        return argument(node, 1, "condition"), node.args[0], argument(node, 2, "other")
    return argument(node, 0, "condition"), argument(node, 1, "input", "self"), argument(node, 2, "other")


def number_of(value: object) -> float | None:
    """A Python number, or a node that holds one for certain."""
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        return float(value)
    if not isinstance(value, fx.Node):
        return None
    held = value_of(value)
    if isinstance(held, (torch.SymFloat, torch.SymInt)):
        expr = held.node.expr
        return float(expr) if expr.is_number else None
    return _held(value, held) if isinstance(held, torch.Tensor) and not held.dim() else None


def _held(node: fx.Node, held: torch.Tensor) -> float | None:
    """The number in a tensor without dimensions that the graph makes, unless it is rounded or may be written to."""
    name = called(node)
    if name not in ("tensor", "scalar_tensor", "full"):
        return None
    given = argument(node, 1, "fill_value") if name == "full" else argument(node, 0, "data", "s")
    number = None if isinstance(given, fx.Node) else number_of(given)
    if number is None or any(_writes(user, held) for user in node.users):
        return None
    exact = held.dtype in (torch.float32, torch.float64) or number.is_integer() or isinf(number)
    return number if exact else None


def _writes(user: fx.Node, tensor: torch.Tensor) -> bool:
    alias = memory_of(value_of(user)) == memory_of(tensor)
    return alias or called(user) == "setitem" or called(user).endswith("_") or "out" in user.kwargs
