"""A softmax in a graph: as an operator, or written out as an exp that is divided by its sum."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from .effects import is_disturbed
from .names import name_of
from .reading import CASTS, Unread, argument, called, is_floating
from .sizes import shape_of

SOFTMAX = frozenset(["softmax", "_softmax", "_safe_softmax"])
_DIVISIONS = frozenset(["div", "div_", "divide", "true_divide"])
_SHIFTS = CASTS | {"detach", "getitem", "values"}


@dataclass(frozen=True)
class Ends:
    """Where the scores come in and the weights come out; ``sum`` divides the result where it does not the weights."""

    scores: fx.Node
    reader: fx.Node
    dim: int
    weights: fx.Node
    sum: fx.Node | None = None
    inside: tuple[fx.Node, ...] = ()


def ends_of(node: fx.Node) -> Ends:
    """Of the softmax at a softmax or an exp. Raises :class:`Unread` where that is none."""
    if name_of(node) in SOFTMAX:
        dim, scores = argument(node, 1, "dim"), argument(node, 0, "input", "self")
        if not isinstance(dim, int) or not isinstance(scores, fx.Node):
            raise Unread("softmax without a dim")
        return Ends(scores, node, dim, node)
    return _exponential(node)


def _exponential(node: fx.Node) -> Ends:
    """``exp(x - max(x)) / sum``, the maximum or the division before the product left out or not."""
    shifted = argument(node, 0, "input", "self")
    if not isinstance(shifted, fx.Node):
        raise Unread("exp of no tensor")
    scores, reader, inside = shifted, node, [shifted]
    peak_dim = None
    peak = _peak(shifted)
    if peak is not None:
        scores, reader, inside = peak.of, shifted, [shifted, *peak.nodes]
        if peak.whole:
            return Ends(scores, reader, peak.dim, node, inside=tuple(inside))
        peak_dim = peak.dim
    sums = [user for user in node.users if called(user) == "sum"]
    if len(sums) != 1:
        raise Unread("an exp without one sum of it")
    (total,) = sums
    dim = _kept_dim(total)
    if dim is None or not is_floating(total):
        raise Unread("an exp whose sum is not over one dimension that is kept")
    rank = len(shape_of(node) or [])
    if peak_dim is not None and peak_dim % rank != dim % rank:
        raise Unread("an exp shifted by a maximum over another dimension than that of its sum")
    inside.append(total)
    (division, *others) = total.users or [node]
    if (
        others
        or called(division) not in _DIVISIONS
        or argument(division, 1, "other") is not total
        or division.kwargs.get("rounding_mode") is not None
    ):
        raise Unread("an exp whose sum is used otherwise than to divide")
    if argument(division, 0, "input", "self") is node:
        return Ends(scores, reader, dim, division, inside=tuple(inside))
    return Ends(scores, reader, dim, node, sum=total, inside=tuple(inside))


@dataclass(frozen=True)
class _Peak:
    """What scores are shifted by before their exp; ``whole`` where that leaves nothing to divide by."""

    of: fx.Node
    dim: int
    whole: bool
    nodes: list[fx.Node]


def _peak(shifted: fx.Node) -> _Peak | None:
    """The maximum or logsumexp of the scores, over one dimension that is kept, that is subtracted from them."""
    scores, node = argument(shifted, 0, "input", "self"), argument(shifted, 1, "other")
    if called(shifted) not in ("sub", "sub_") or shifted.kwargs.get("alpha", 1) != 1 or not isinstance(node, fx.Node):
        return None
    found = [node]
    while called(found[-1]) in _SHIFTS:
        before = argument(found[-1], 0, "input", "self")
        if not isinstance(before, fx.Node):
            return None
        found.append(before)
    *since, last = found
    names, dim = [called(x) for x in since], _kept_dim(last)
    first = [x for x in since if called(x) in ("getitem", "values")]
    if dim is None or argument(last, 0, "input", "self") is not scores or not isinstance(scores, fx.Node):
        return None
    if is_disturbed([scores], last, shifted):
        return None
    if called(last) == "logsumexp":
        # The gradient of the softmax flows through it.
        plain = not first and "detach" not in names and all(map(is_floating, found))
        return _Peak(scores, dim, True, found) if plain else None
    # Any shift along the dimension would do, and a maximum of one tensor is a pair.
    pair = called(last) == "max" and first == since[-1:] and argument(since[-1], 1) in (0, "values")
    return _Peak(scores, dim, False, found) if pair or (called(last) == "amax" and not first) else None


def _kept_dim(node: fx.Node) -> int | None:
    """The one dimension that a reduction runs over and keeps."""
    dims = argument(node, 1, "dim")
    dims = list(dims) if isinstance(dims, (tuple, list)) else [dims]
    kept = argument(node, 2, "keepdim") is True
    return dims[0] if kept and len(dims) == 1 and isinstance(dims[0], int) else None
