"""Spell a reading as ``scaled_dot_product_attention`` over [batch, heads, tokens, head_dim], beside the original.

The nodes are inserted where the attention's result is made; :class:`Spelled` puts the result in the original's place or
takes the nodes out again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.nn.functional import scaled_dot_product_attention

from .boolean import boolean_mask
from .builder import Builder
from .effects import is_disturbed
from .labels import CHANNELS, KEYS, QUERIES, VALUES, Dims
from .reading import Mask, Operand, Reading, Unread, argument, called
from .report import Reason
from .sizes import ONE, same, shape_of, size_of, value_of
from .track import Scope, type_nodes

aten = torch.ops.aten
_HIGHEST = {torch.float64: 3, torch.float32: 2, torch.bfloat16: 1, torch.float16: 1}


@dataclass
class Spelled:
    """An attention written as one call: ``call`` is among the nodes ``added``, ``result`` equals ``original``.

    ``spent`` are the nodes that made the original, in order; without its uses they are dead.
    """

    call: fx.Node
    original: fx.Node
    result: fx.Node
    added: list[fx.Node]
    spent: list[fx.Node]
    problem: Unread | None = None  # a mask that the call lacks: it may tell whose tokens attend to whose, not replace

    def take_place(self, attended: fx.Node) -> None:
        """Use the result instead of the original; ``attended`` has replaced the call."""
        result = attended if self.result is self.call else self.result
        self.original.replace_all_uses_with(result)
        name = self.original.name
        for node in reversed(self.spent):
            if not node.users:
                node.graph.erase_node(node)
        result.name = name  # the signature of an exported program names its outputs

    def undo(self) -> None:
        for node in reversed(self.added):
            node.graph.erase_node(node)


def spell(reading: Reading, scope: Scope, trusts_masks: bool) -> Spelled:
    """Insert the call. Raises :class:`Unread`, with the graph as it was, where the operator has no such attention."""
    builder = Builder(scope.module.graph, reading.result, scope.writers, trusts_masks=trusts_masks)
    with builder.attempt():
        return _spell(reading, scope, builder)


def _spell(reading: Reading, scope: Scope, builder: Builder) -> Spelled:
    labels = reading.labels
    if not same(labels.sizes[CHANNELS], labels.sizes[VALUES]):
        raise Unread(
            f"head sizes of query ({labels.sizes[CHANNELS]}) and value ({labels.sizes[VALUES]}) differ", Reason.LAYOUT
        )
    if not reading.scale > 0:
        raise Unread(f"a score scale of {reading.scale:g}, which is not positive", Reason.LAYOUT)
    _split_folded(reading, scope)
    batch = _batch(reading)
    masks, problem = _masks(builder, batch, reading)
    query, scale = _in_product(builder, reading.query, reading)
    query = _multiplied(builder, query, batch, reading)
    key, key_scale = _in_product(builder, reading.key, reading)
    dtype = _dtype(query.node, key.node, reading.value.node, reading)
    tensors = [
        _cast(builder, _arranged(builder, operand, [*batch, *ends], reading), dtype)
        for operand, ends in ((query, (QUERIES, CHANNELS)), (key, (KEYS, CHANNELS)), (reading.value, (KEYS, VALUES)))
    ]
    mask = masks[0] if masks else None
    for other in masks[1:]:
        mask = builder.call(aten.logical_and.default, mask, other)
    grouped = not same(*((shape_of(tensor) or [])[1] for tensor in tensors[:2]))
    call = attend(
        builder, tensors, mask, dropout_p=reading.dropout, is_causal=reading.causal,
        scale=reading.scale * scale * key_scale, enable_gqa=grouped,
    )  # fmt: skip
    out = value_of(reading.result)
    assert isinstance(out, torch.Tensor)
    result = laid_out(builder, _cast(builder, _back(builder, call, batch, reading), out.dtype), reading.result)
    type_nodes(scope, builder.added)
    return Spelled(call, reading.result, result, builder.added, reading.nodes, problem)


def attend(builder: Builder, tensors: list[fx.Node], mask: fx.Node | None, **options: Any) -> fx.Node:
    """The call. Its example value is contiguous, as is the result of what will replace it."""
    node = builder.call(scaled_dot_product_attention, *tensors, attn_mask=mask, **options)
    value = value_of(node)
    assert isinstance(value, torch.Tensor)
    with builder.fake_mode:
        node.meta[builder.key] = value.contiguous()
    return node


def laid_out(builder: Builder, node: fx.Node, original: fx.Node) -> fx.Node:
    """The result with the strides of the original, which the graph may see through other views."""
    like, written = value_of(original), is_disturbed([original], original, builder.graph.output_node(), builder.writers)
    assert isinstance(like, torch.Tensor)
    value = value_of(node)
    assert isinstance(value, torch.Tensor)
    if not all(map(same, map(size_of, value.shape), map(size_of, like.shape))):
        raise Unread(f"a result {list(like.shape)} of other sizes than its queries and values", Reason.LAYOUT)
    strides = [size_of(stride) for stride in like.stride()]
    wide = [dim for dim, size in enumerate(like.shape) if size_of(size) != ONE]
    if all(same(size_of(value.stride(dim)), strides[dim]) for dim in wide):
        # The attention keeps its result for the backward, so that a copy must be written to.
        return builder.call(aten.clone.default, node) if written else node
    order = sorted(range(like.dim()), key=lambda dim: -strides[dim].hint)
    node = builder.call(aten.contiguous.default, builder.call(aten.permute.default, node, order))
    return builder.call(aten.permute.default, node, [order.index(dim) for dim in range(like.dim())])


def _batch(reading: Reading) -> list[str]:
    """The dimensions of batch and heads, in an order that the operator has: masks vary over the first alone, and keys
    and values that several heads share are one for each group of the last.
    """
    labels = reading.labels

    def has(dims: Dims, name: str) -> bool:
        return any(name in labels.leaves(names) for names in dims)

    def place(name: str) -> tuple[bool, bool]:
        masked = any(has(mask.dims, name) for mask in reading.masks)
        shared = not all(has(operand.dims, name) for operand in (reading.key, reading.value))
        return not masked, shared and labels.sizes[name] != ONE

    return sorted(labels.leaves(reading.batch), key=place)


def _multiplied(builder: Builder, query: Operand, batch: list[str], reading: Reading) -> Operand:
    """The query times what the scores are multiplied with."""
    if not reading.factors:
        return query
    order = [*batch, QUERIES, CHANNELS]
    node, _ = _ordered(builder, query, order, reading)
    for kind, factor in reading.factors:
        other = _ordered(builder, factor, order, reading)[0] if factor.dims else factor.node
        node = builder.call(aten.mul.Tensor if kind == "mul" else aten.div.Tensor, node, other)
    return Operand(node, tuple((name,) for name in order))


def _split_folded(reading: Reading, scope: Scope) -> None:
    """Batch and heads folded into one dimension come apart again where the query's tokens tell their sizes."""
    leaves = reading.labels.leaves(reading.batch)
    axes = scope.axes_of(reading.query.node)
    if any(set(leaves) & set(reading.labels.leaves(names)) for mask in reading.masks for names in mask.dims):
        return  # a mask repeated for every head is one for every sample of a batch without heads
    for axis, names in zip(axes or (), reading.query.dims, strict=False):
        if len(leaves) == 1 and reading.labels.leaves(names) == leaves:
            reading.labels.split_as(leaves[0], axis)
            return


def _in_product(builder: Builder, operand: Operand, reading: Reading) -> tuple[Operand, float]:
    """The operand in the dtype that it came from: an exact upcast, and a number it was multiplied with, are undone."""
    value = value_of(operand.node)
    assert isinstance(value, torch.Tensor)
    source, number = _narrow(operand.node, builder.at)
    if source is None or _HIGHEST.get(source, 0) >= _HIGHEST.get(value.dtype, 0):
        return operand, 1.0
    node = operand.node
    if number != 1.0:
        node = builder.call(aten.mul.Tensor, node, 1.0 / number)
    return Operand(builder.call(aten.to.dtype, node, source), operand.dims), number


_MOVES = frozenset(
    ["view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "transpose", "swapaxes",
     "permute", "mT", "contiguous", "clone", "getitem", "expand", "chunk", "unbind", "split", "select", "slice"]
)  # fmt: skip
_CASTS = frozenset(["to", "float", "double", "type", "type_as", "_to_copy"])


def _narrow(node: fx.Node, until: fx.Node, depth: int = 16) -> tuple[torch.dtype | None, float]:
    """The lower dtype that every value of this tensor came from exactly, and the number it was multiplied with since."""
    name, value = called(node), value_of(node)
    given = argument(node, 0, "input", "self")
    if not depth or not isinstance(given, fx.Node) or is_disturbed([node], node, until):
        return None, 1.0
    before = value_of(given)
    if name in _CASTS and isinstance(before, torch.Tensor) and isinstance(value, torch.Tensor):
        rank, now = _HIGHEST.get(before.dtype), _HIGHEST.get(value.dtype)
        if rank and now and rank < now:
            return before.dtype, 1.0
        return _narrow(given, node, depth - 1) if rank == now else (None, 1.0)
    if name in _MOVES and len({x.dtype for x in (before, value) if isinstance(x, torch.Tensor)}) <= 1:
        return _narrow(given, node, depth - 1)
    if name in ("mul", "div") and len(node.args) == 2 and not node.kwargs:
        number = node.args[1]
        if isinstance(number, (int, float)) and not isinstance(number, bool) and number:
            dtype, scale = _narrow(given, node, depth - 1)
            return dtype, scale * (number if name == "mul" else 1 / number)
    return None, 1.0


def _dtype(query: fx.Node, key: fx.Node, value: fx.Node, reading: Reading) -> torch.dtype:
    """The widest of the three, or that which autocast gives to products."""
    tensors = [value_of(node) for node in (query, key, value)]
    dtypes = {tensor.dtype for tensor in tensors if isinstance(tensor, torch.Tensor)}
    if reading.dtype is not None or len(dtypes) == 1:
        return reading.dtype or dtypes.pop()
    widest = max(dtypes, key=lambda dtype: _HIGHEST.get(dtype, 0))
    return widest if _HIGHEST.get(widest, 0) > 1 else torch.float32


def _cast(builder: Builder, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    value = value_of(node)
    assert isinstance(value, torch.Tensor)
    return node if value.dtype == dtype else builder.call(aten.to.dtype, node, dtype)


def _arranged(builder: Builder, operand: Operand, order: list[str], reading: Reading) -> fx.Node:
    """The tensor as [batch, heads, tokens, channels]; what it lacks of batch and heads is one wide."""
    batch, (node, names) = order[:-2], _ordered(builder, operand, order, reading)
    present = [name in names or reading.labels.sizes[name] == ONE for name in batch]
    if present != sorted(present, reverse=True):
        raise Unread("keys or values that are shared by heads in another order than groups", Reason.LAYOUT)
    return _four(builder, node, len(batch))


def _ordered(builder: Builder, operand: Operand, order: list[str], reading: Reading) -> tuple[fx.Node, list[str]]:
    """The tensor with one dimension for each label, in order, one wide where it has none; and the labels it has."""
    node, dims = _unfolded(builder, operand.node, operand.dims, reading)
    names = [names[0] for names in dims if names]
    for place in reversed([place for place, names in enumerate(dims) if not names]):
        node = builder.call(aten.squeeze.dim, node, place)
    if set(names) - set(order):
        raise Unread("an operand with a dimension that the scores have not", Reason.LAYOUT)
    places = [names.index(name) for name in order if name in names]
    if places != sorted(places):
        node = builder.call(aten.permute.default, node, places)
    for place, name in enumerate(order):
        if name not in names:
            node = builder.call(aten.unsqueeze.default, node, place)
    return node, names


def _four(builder: Builder, node: fx.Node, batch: int) -> fx.Node:
    """Batch and heads out of any number of leading dimensions: one is a batch of single heads, more than two are heads."""
    if batch > 2:
        return builder.call(aten.flatten.using_ints, node, 1, batch - 1)
    for _ in range(2 - batch):
        node = builder.call(aten.unsqueeze.default, node, batch)
    return node


def _unfolded(builder: Builder, node: fx.Node, dims: Dims, reading: Reading) -> tuple[fx.Node, Dims]:
    """One dimension for each label."""
    labels = reading.labels
    whole = [labels.leaves(names) for names in dims]
    if all(len(names) <= 1 for names in whole):
        return node, tuple(map(tuple, whole))
    leaves = tuple((name,) for names in whole for name in (names or [""]))
    sizes = [builder.number(labels.sizes[names[0]]) if names[0] else 1 for names in leaves]
    return builder.call(aten.reshape.default, node, sizes), tuple(names if names[0] else () for names in leaves)


def _back(builder: Builder, node: fx.Node, batch: list[str], reading: Reading) -> fx.Node:
    """The result [batch, heads, queries, channels] in the dimensions of the original."""
    labels = reading.labels
    if len(batch) > 2:
        node = builder.call(aten.unflatten.int, node, 1, [builder.number(labels.sizes[name]) for name in batch[1:]])
    for _ in range(2 - len(batch)):
        node = builder.call(aten.squeeze.dim, node, len(batch))
    have = [*batch, QUERIES, VALUES]
    wanted = [labels.leaves(names) for names in reading.dims]
    flat = [name for names in wanted for name in names]
    alone = [name for name in have if name not in flat and labels.sizes[name] == ONE]
    if sorted(alone + flat) != sorted(have):
        raise Unread("a result without all dimensions of the queries", Reason.LAYOUT)
    order = [have.index(name) for name in (*alone, *flat)]
    if order != sorted(order):
        node = builder.call(aten.permute.default, node, order)
    shape = shape_of(reading.result) or []
    if alone or any(len(names) != 1 for names in wanted):
        node = builder.call(aten.reshape.default, node, [builder.number(size) for size in shape])
    return node


def _masks(builder: Builder, batch: list[str], reading: Reading) -> tuple[list[fx.Node], Unread | None]:
    """The masks that can be read, and why another cannot."""
    found, problem = [], None
    for mask in reading.masks:
        try:
            found.append(_mask(builder, mask, batch, reading))
        except Unread as unread:
            problem = unread
    return found, problem


def _mask(builder: Builder, mask: Mask, batch: list[str], reading: Reading) -> fx.Node:
    """A bool mask [batch or 1, heads or 1, queries or 1, keys], True where a key may be attended."""
    operand = Operand(boolean_mask(builder, mask), mask.dims)
    node, names = _ordered(builder, operand, [*batch, QUERIES, KEYS], reading)
    if len(batch) > 2:
        if any(name in names for name in batch[1:]):
            raise Unread("a mask that varies over one of several dimensions of heads", Reason.MASK)
        for _ in batch[2:]:
            node = builder.call(aten.squeeze.dim, node, 1)
        return node
    return _four(builder, node, len(batch))
