"""Products of two tensors, however they are spelled: which dimensions run together and which is summed over."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import fx

from .names import name_of
from .sizes import ONE, same, shape_of

PRODUCTS = frozenset(["matmul", "bmm", "baddbmm", "einsum"])
BROADCAST = ""
Labels = tuple[str, ...]


@dataclass(frozen=True)
class Product:
    """``out = alpha * sum(left * right) + beta * bias``, with one label for each dimension of the three tensors.

    ``batch`` labels are in ``out`` and in both operands, where a dimension of size one that stands for them is labelled
    ``BROADCAST``. The label that is summed over is in both operands, ``rows`` are in ``left`` and ``out``, ``columns``
    in ``right`` and ``out``: one each, unless an einsum leaves out of an operand what is the same for all heads.
    """

    node: fx.Node
    left: fx.Node
    right: fx.Node
    left_dims: Labels
    right_dims: Labels
    out_dims: Labels
    batch: Labels
    summed: str
    rows: Labels
    columns: Labels
    alpha: float = 1.0
    beta: float = 0.0
    bias: fx.Node | None = None


def product_of(node: fx.Node) -> Product | None:
    """The product of matrices that this node makes, None for other nodes and for sums over more or fewer dimensions."""
    name = name_of(node) if node.op in ("call_function", "call_method") else ""
    if name == "einsum":
        return _einsum(node)
    if name == "baddbmm":
        found = _matmul(node, _tensor(node, 1, "batch1"), _tensor(node, 2, "batch2"))
        alpha, beta = node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)
        if found is None or not isinstance(alpha, (int, float)) or not isinstance(beta, (int, float)):
            return None
        bias = _tensor(node, 0, "input", "self") if beta else None
        return replace(found, alpha=float(alpha), beta=float(beta), bias=bias)
    if name in ("matmul", "bmm"):
        return _matmul(node, _tensor(node, 0, "input", "self"), _tensor(node, 1, "mat2", "other", "tensor2"))
    return None


def permutation_of(node: fx.Node) -> list[int] | None:
    """Where each dimension of an einsum of one tensor comes from; None where it is none, or sums."""
    operands, equation = node.args[1:], node.args[0] if node.args else None
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = tuple(operands[0])
    if name_of(node) != "einsum" or not isinstance(equation, str) or len(operands) != 1:
        return None
    given, arrow, made = equation.replace(" ", "").partition("->")
    if not arrow or not given.isalpha() or sorted(given) != sorted(made) or len(set(given)) < len(given):
        return None
    return [given.index(letter) for letter in made]


def _tensor(node: fx.Node, index: int, *names: str) -> fx.Node | None:
    found = node.args[index] if index < len(node.args) else None
    for name in names:
        found = node.kwargs.get(name, found)
    return found if isinstance(found, fx.Node) else None


def _matmul(node: fx.Node, left: fx.Node | None, right: fx.Node | None) -> Product | None:
    if left is None or right is None:
        return None
    a, b, rank = shape_of(left) or [], shape_of(right) or [], len(shape_of(node) or [])
    if rank < 2 or len(a) != rank or len(b) != rank or rank > 12:
        return None
    batch = tuple(string.ascii_lowercase[: rank - 2])
    if any(not same(x, y) and ONE not in (x, y) for x, y in zip(a[:-2], b[:-2], strict=True)):
        return None
    left_dims = tuple(BROADCAST if x == ONE != y else n for n, x, y in zip(batch, a, b, strict=False))
    right_dims = tuple(BROADCAST if y == ONE != x else n for n, x, y in zip(batch, a, b, strict=False))
    return Product(
        node,
        left,
        right,
        (*left_dims, "y", "z"),
        (*right_dims, "z", "x"),
        (*batch, "y", "x"),
        batch,
        "z",
        ("y",),
        ("x",),
    )


def _einsum(node: fx.Node) -> Product | None:
    equation, *rest = node.args
    operands = list(rest[0]) if len(rest) == 1 and isinstance(rest[0], Sequence) else rest
    tensors = [x for x in operands if isinstance(x, fx.Node)]
    if not isinstance(equation, str) or len(tensors) != 2 or len(operands) != 2:
        return None
    terms = _terms(equation, [len(shape_of(x) or []) for x in tensors])
    if terms is None or len(terms[2]) != len(shape_of(node) or []):
        return None
    left, right, out = terms
    sizes = [dict(zip(term, shape_of(x) or [], strict=True)) for term, x in zip(terms, tensors, strict=False)]
    if any(x in sizes[1] and not same(size, sizes[1][x]) for x, size in sizes[0].items()):
        return None
    batch = tuple(x for x in out if x in left and x in right)
    summed = [x for x in left if x in right and x not in out]
    rows, columns = (tuple(x for x in term if x in out and x not in batch) for term in (left, right))
    whole = all(x in out or x in summed for x in left + right)
    if not whole or len(summed) != 1 or not rows or not columns:
        return None
    return Product(node, tensors[0], tensors[1], tuple(left), tuple(right), tuple(out), batch, summed[0], rows, columns)


def _terms(equation: str, ranks: list[int]) -> list[str] | None:
    """The three terms of an equation of two operands, with letters in place of an ellipsis."""
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(terms) != 2 or (not arrow and "." in equation):
        return None
    if not arrow:
        out = "".join(sorted(x for x in set(inputs) - {","} if inputs.count(x) == 1))
    terms.append(out)
    if "." in equation:
        widths = {rank - len(term.replace("...", "")) for rank, term in zip(ranks, terms, strict=False)}
        if len(widths) != 1 or any("..." not in term for term in terms):
            return None
        free = [x for x in string.ascii_letters if x not in equation]
        letters = "".join(free[: max(0, *widths)])
        terms = [term.replace("...", letters) for term in terms]
    if any(len(set(term)) != len(term) for term in terms):
        return None
    return terms if [len(term) for term in terms[:2]] == ranks else None
