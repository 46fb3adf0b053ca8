"""Sizes that may be symbolic: compared and multiplied without ever adding a guard to the graph."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from math import prod

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import FloorDiv


@dataclass(frozen=True)
class Size:
    """A tensor size: an int, or a symbolic expression with an example value (``hint``) used for ordering only."""

    expr: int | sympy.Expr
    hint: int = field(compare=False)

    @property
    def static(self) -> bool:
        return isinstance(self.expr, int)

    def __str__(self) -> str:
        return str(self.expr)


ONE = Size(1, 1)


def size_of(value: int | torch.SymInt) -> Size:
    """``value`` as a :class:`Size`. Sizes that depend on data have no example value; they count as 1."""
    if isinstance(value, int):
        return Size(value, value)
    expr = value.node.expr
    if expr.is_Integer:
        return Size(int(expr), int(expr))
    hint = value.node.hint if value.node.has_hint() else 1
    return Size(expr, int(hint))


Lengths = dict[sympy.Symbol, Size]  # what is known of lengths that have a symbol of their own


def replaced(size: Size, lengths: Lengths) -> Size:
    """The size in terms of what its symbols are known to be."""
    if isinstance(size.expr, int) or not lengths or lengths.keys().isdisjoint(size.expr.free_symbols):
        return size
    return _normal(size.expr.xreplace({symbol: known.expr for symbol, known in lengths.items()}), size.hint)


def learn_length(found: Size, expected: Size, lengths: Lengths) -> None:
    """Remember a length that depends on data and got a symbol of its own, where it is known from elsewhere."""
    if same(found, expected) or not isinstance(found.expr, sympy.Symbol) or not found.expr.name.startswith("u"):
        return
    if isinstance(expected.expr, int) or found.expr not in expected.expr.free_symbols:
        lengths[found.expr] = expected


def is_learned(size: Size, lengths: Lengths) -> bool:
    """True where the size rests on lengths that are known from elsewhere: zero and clamped ones are other sizes."""
    symbols = {symbol for known in lengths.values() for symbol in sympy.sympify(known.expr).free_symbols}
    return not size.static and not symbols.isdisjoint(sympy.sympify(size.expr).free_symbols)


def multiply(sizes: list[Size]) -> Size:
    return _normal(prod((s.expr for s in sizes), start=sympy.Integer(1)), prod(s.hint for s in sizes))


def add(sizes: list[Size]) -> Size:
    return _normal(sum((s.expr for s in sizes), start=sympy.Integer(0)), sum(s.hint for s in sizes))


def subtract(a: Size, b: Size) -> Size:
    return _normal(sympy.Integer(0) + a.expr - b.expr, a.hint - b.hint)


def quotient(a: Size, b: Size) -> Size:
    return _normal(sympy.sympify(a.expr) / b.expr, a.hint // b.hint)


def same(a: Size, b: Size) -> bool:
    """True where the sizes are equal for every value of the symbols."""
    if a.static and b.static:
        return a.expr == b.expr
    return bool(a.expr == b.expr or sympy.expand(a.expr - b.expr) == 0 or _vanishes(sympy.sympify(a.expr - b.expr)))


@lru_cache(maxsize=4096)
def _vanishes(expr: sympy.Expr) -> bool:
    """True where the difference is 0 once divisions that leave no rest are carried out: ``(b*b*t)//b`` is ``b*t``."""
    if not expr.has(FloorDiv):
        return False

    def divide(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
        exact = sympy.cancel(a / b)
        whole = exact.is_polynomial(*exact.free_symbols, *exact.atoms(FloorDiv)) and sympy.denom(exact) == 1
        return exact if whole else FloorDiv(a, b)

    return sympy.expand(expr.replace(FloorDiv, divide)) == 0


def _normal(expr: int | sympy.Expr, hint: int) -> Size:
    if isinstance(expr, sympy.Expr):
        return Size(int(expr), int(expr)) if expr.is_Integer else Size(expr, hint)
    return Size(expr, hint)


def value_of(node: fx.Node) -> object:
    """The example value of a node: ``example_value`` in a Dynamo graph, ``val`` in an exported program."""
    meta = node.meta
    return meta["example_value"] if "example_value" in meta else meta.get("val")


def memory_of(value: object) -> int | None:
    """A number for the memory that a tensor lies in; None where it has none of its own, as under vmap."""
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        return None
    try:
        return int(value.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return None


def shape_of(node: fx.Node) -> list[Size] | None:
    """The node's shape, or None where it is no tensor."""
    value = value_of(node)
    return [size_of(s) for s in value.shape] if isinstance(value, torch.Tensor) else None
