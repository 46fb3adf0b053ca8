"""Bool masks on scores that tell tokens apart, not pairs of them: which keys are seen, which queries see anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from .builder import Builder
from .effects import is_disturbed
from .indexing import index_map
from .reading import argument, called
from .sizes import ONE, memory_of, same, shape_of, value_of

aten = torch.ops.aten
Writers = Sequence[fx.Node]
_ANDS = frozenset(["bitwise_and", "logical_and"])
_COPIES = frozenset(["to", "bool", "contiguous", "clone", "_to_copy", "alias", "type"])
_ALIKE = _COPIES | {"logical_not", "bitwise_not", "invert"}
_BOTH = _ANDS | {"bitwise_or", "logical_or", "ge", "gt", "le", "lt", "eq", "ne"}
_EXPANDS = frozenset(["expand", "expand_as", "broadcast_to", "repeat", "tile"])
_SPLITS = frozenset(["view", "reshape", "unflatten"])
_SWAPS = frozenset(["transpose", "swapaxes", "swapdims", "mT", "permute"])
_MADE = _BOTH | _ALIKE | _EXPANDS | _SWAPS | {"unsqueeze"}


@dataclass(frozen=True)
class TokenMask:
    """The mask is the conjunction of masks over keys, each the same for every query, and of masks over queries."""

    keys: tuple[fx.Node, ...]
    queries: tuple[fx.Node, ...]


def token_mask(mask: fx.Node, until: fx.Node, writers: Writers) -> TokenMask | None:
    """The mask, read at ``until``, in masks over tokens that are the same for every head; None where it is none.

    ``writers`` are the nodes of the graph that write to a tensor.
    """
    value = value_of(mask)
    if not isinstance(value, torch.Tensor) or value.dtype != torch.bool or not 2 <= value.dim() <= 4:
        return None
    keys, queries = [], []
    for term in _terms(mask, until, writers):
        if not is_constant(term, -3, until, writers):
            return None
        if is_constant(term, -2, until, writers):
            keys.append(term)
        elif is_constant(term, -1, until, writers):
            queries.append(term)
        else:
            return None
    return TokenMask(tuple(keys), tuple(queries))


def masks_queries(mask: fx.Node | None, until: fx.Node, writers: Writers) -> bool:
    """True where some queries may see nothing."""
    found = None if mask is None else token_mask(mask, until, writers)
    return found is not None and bool(found.queries)


def _terms(mask: fx.Node, until: fx.Node, writers: Writers) -> list[fx.Node]:
    """What is combined by "and" into the mask, each still the same at ``until``."""
    if is_disturbed([mask], mask, until, writers):
        return [mask]
    if called(mask) in _ANDS and "out" not in mask.kwargs:
        pair = argument(mask, 0, "input", "self"), argument(mask, 1, "other")
        nodes = [x for x in pair if isinstance(x, fx.Node) and _is_bool(x)]
        if len(nodes) == 2 and not is_disturbed(nodes, mask, until, writers):
            return [term for node in nodes for term in _terms(node, until, writers)]
    given = argument(mask, 0, "input", "self")
    if called(mask) in _COPIES and isinstance(given, fx.Node) and _is_bool(given):
        return [mask] if is_disturbed([given], mask, until, writers) else _terms(given, until, writers)
    return [mask]


def is_constant(node: fx.Node, dim: int, until: fx.Node, writers: Writers) -> bool:
    """True where the tensor, read at ``until``, holds the same along a dimension, which is counted from the last."""
    value = value_of(node)
    if not isinstance(value, torch.Tensor):
        return True  # a number
    sizes = shape_of(node) or []
    if -dim > len(sizes) or same(sizes[dim], ONE):
        return True
    stride = value.stride(dim)
    if type(stride) is int and stride == 0 and not _given_expanded(node):
        return True
    if is_disturbed([node], node, until, writers):
        return False
    name, given = called(node), argument(node, 0, "input", "self")
    if name in _BOTH and "out" not in node.kwargs:
        return all(is_constant(x, dim, node, writers) for x in node.all_input_nodes)
    if not isinstance(given, fx.Node):
        return False
    rank = len(shape_of(given) or [])
    if name in _ALIKE or (name in _EXPANDS and len(sizes) >= rank):
        return is_constant(given, dim, node, writers)
    if name in _SWAPS:
        source = _source_dim(node, dim, rank)
        return source is not None and is_constant(given, source, node, writers)
    if name == "unsqueeze":
        new = argument(node, 1, "dim")
        if not isinstance(new, int):
            return False
        place = new % len(sizes) - len(sizes)
        return dim == place or is_constant(given, dim + 1 if dim < place else dim, node, writers)
    if name == "squeeze" and rank == len(sizes) + 1 and isinstance(gone := argument(node, 1, "dim"), int):
        return is_constant(given, dim if dim > gone % rank - rank else dim - 1, node, writers)
    if name in _SPLITS:
        return _is_constant_split(node, given, dim, writers)
    if name == "getitem":
        mapping = index_map(rank, node.args[1])
        source = mapping[dim][0] if mapping is not None and len(mapping) == len(sizes) else None
        return source is not None and is_constant(given, source - rank, node, writers)
    return False


def _is_constant_split(node: fx.Node, given: fx.Node, dim: int, writers: Writers) -> bool:
    """One dimension seen as two: the inner one is constant where each entry was repeated so many times, as for heads."""
    sizes, inner = shape_of(node) or [], shape_of(given) or []
    rank = len(inner)
    split = next((i for i, (x, y) in enumerate(zip(inner, sizes, strict=False)) if not same(x, y)), rank - 1)
    if len(sizes) != rank + 1 or not all(map(same, inner[split + 1 :], sizes[split + 2 :])):
        return False
    before = argument(given, 0, "input", "self")
    if called(given) in _SPLITS | {"flatten"} and isinstance(before, fx.Node) and shape_of(before) == sizes:
        return not is_disturbed([given], given, node, writers) and is_constant(before, dim, given, writers)
    if dim >= split + 1 - rank:  # behind what is split
        return is_constant(given, dim, node, writers)
    if dim == split - rank and called(given) == "repeat_interleave" and not is_disturbed([given], given, node, writers):
        times, along = argument(given, 1, "repeats"), argument(given, 2, "dim")
        if isinstance(along, int) and along % rank == split and times == sizes[split + 1].expr:
            return True
    return dim in (split - rank, split - rank - 1) and is_constant(given, split - rank, node, writers)


def _source_dim(node: fx.Node, dim: int, rank: int) -> int | None:
    """The dimension of what is transposed that becomes ``dim``; both are counted from the last."""
    order = list(range(-rank, 0))
    if called(node) == "permute":
        dims = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], (tuple, list)) else node.args[1:]
        if len(dims) != rank or not all(isinstance(x, int) for x in dims):
            return None
        order = [x % rank - rank for x in dims if isinstance(x, int)]
    else:
        given = argument(node, 1, "dim0", "axis0"), argument(node, 2, "dim1", "axis1")
        first, second = (-1, -2) if called(node) == "mT" else given
        if not isinstance(first, int) or not isinstance(second, int):
            return None
        order[first % rank], order[second % rank] = order[second % rank], order[first % rank]
    return order[dim]


def _given_expanded(mask: fx.Node) -> bool:
    """True where the mask is a graph input, or a view of one: an exported program may get other strides at its run."""
    memory = memory_of(value_of(mask))
    return memory is None or any(
        isinstance(given := value_of(node), torch.Tensor) and memory_of(given) == memory and 0 in given.stride()
        for node in mask.graph.find_nodes(op="placeholder")
    )


def over_keys(builder: Builder, mask: TokenMask, batch: object, tokens: object) -> fx.Node | None:
    """[batch, tokens], True for a key that is seen."""
    return _together(builder, [_narrowed(builder, *_core(term, -2, builder)) for term in mask.keys], batch, tokens)


def over_queries(builder: Builder, mask: TokenMask, batch: object, tokens: object) -> fx.Node | None:
    """[batch, tokens], True for a query that sees anything."""
    return _together(builder, [_narrowed(builder, *_core(term, -1, builder)) for term in mask.queries], batch, tokens)


def _core(term: fx.Node, dim: int, builder: Builder) -> tuple[fx.Node, int]:
    """The smaller mask that a term was expanded from, and along which of its dimensions it is the same."""
    given, sizes = argument(term, 0, "input", "self"), shape_of(term) or []
    if not isinstance(given, fx.Node) or not _is_bool(given) or len(shape_of(given) or []) != len(sizes):
        return term, dim
    if is_disturbed([given, term], given, builder.at, builder.writers):
        return term, dim
    inner, rank = shape_of(given) or [], len(sizes)
    if called(term) in _SWAPS:
        order = [_source_dim(term, place, rank) for place in range(-rank, 0)]
        if order[:-2] == list(range(-rank, -2)):  # queries and keys change places
            return _core(given, order[dim] or dim, builder)
        return term, dim
    grows = called(term) in _EXPANDS and all(same(x, y) or same(x, ONE) for x, y in zip(inner, sizes, strict=True))
    return _core(given, dim, builder) if grows or called(term) in _COPIES else (term, dim)


def _is_bool(node: fx.Node) -> bool:
    return getattr(value_of(node), "dtype", None) == torch.bool


def _narrowed(builder: Builder, term: fx.Node, dim: int) -> fx.Node:
    """[batch or 1, tokens or 1] of a mask that is the same for every head and along a dimension."""
    rank = len(shape_of(term) or [])
    if rank < 2:
        return builder.call(aten.unsqueeze.default, term, 0) if dim == -2 else term
    if rank == 2:
        term, rank = builder.call(aten.unsqueeze.default, term, 0), 3
    else:
        term = builder.call(aten.select.int, term, rank - 3, 0)
        if rank == 3:
            term = builder.call(aten.unsqueeze.default, term, 0)
    return builder.call(aten.select.int, term, 3 + dim, 0)


def _together(builder: Builder, terms: list[fx.Node], batch: object, tokens: object) -> fx.Node | None:
    if not terms:
        return None
    whole = terms[0]
    for term in terms[1:]:
        whole = builder.call(aten.logical_and.default, whole, term)
    return builder.call(aten.expand.default, whole, [batch, tokens])


def erase_unused(mask: fx.Node) -> None:
    """Take out a mask that nothing uses any more, and what it alone was combined from."""
    if mask._erased or mask.users or called(mask) not in _MADE or "out" in mask.kwargs:
        return
    given = mask.all_input_nodes
    mask.graph.erase_node(mask)
    for node in given:
        erase_unused(node)
