"""Put the ``vmoba`` operators where a proven attention stood."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from .builder import Builder, Number
from .canonical import laid_out
from .gather import gather
from .layout import Layout
from .masks import erase_unused, over_keys, over_queries, token_mask
from .reading import called
from .recognise import AttentionCall
from .sizes import multiply, shape_of, value_of

aten = torch.ops.aten
SELECT = torch.ops.vmoba.select.default
ATTENTION = torch.ops.vmoba.attention.default


def numbers(builder: Builder, layout: Layout, query: fx.Node) -> list[Number] | None:
    """Grid, prefix and suffix as graph arguments, None where a symbolic size cannot be had at this place.

    A suffix that is a symbol is what the queries have beside the rest: right whatever its symbol stands for.
    """
    sizes = (*layout.grid, layout.prefix, *layout.missing)
    if any(builder.find(size) is None for size in sizes):
        return None
    found = [builder.number(size) for size in sizes[:4]]
    if layout.suffix.static:
        return [*found, layout.suffix.hint]
    rest: Number = builder.call(aten.sym_size.int, query, 2)
    if all(size.static for size in layout.grid):
        taken: list[Number] = [multiply(list(layout.grid)).hint]
    else:
        rows = builder.call(operator.mul, found[0], found[1])
        taken = [builder.call(operator.mul, rows, found[2])]
    for number in (*taken, found[3]):
        rest = builder.call(operator.sub, rest, number)
    return [*found, rest]


def replace_attention(
    call: AttentionCall,
    builder: Builder,
    layout: Layout,
    sizes: list[Number],
    block: list[Number],
    selection: dict[str, Any],
) -> fx.Node:
    """Replace ``call`` by select and attend; ``selection`` holds pool, mode, threshold, topk and tile."""
    out = value_of(call.node)
    assert isinstance(out, torch.Tensor)
    query, key, value = (_cast(builder, node, out.dtype) for node in (call.query, call.key, call.value))
    mask, seeing = _masks(builder, call)
    before, after = layout.missing
    more = bool(before.hint or after.hint)
    if more:
        query = builder.call(aten.constant_pad_nd.default, query, [0, 0, before.hint, after.hint])
    gathered = None if layout.order is None else gather(builder, layout, key)
    if gathered is not None:
        query, key, value = (builder.call(aten.index_select.default, x, 2, gathered.order) for x in (query, key, value))
        held = value_of(mask)
        if isinstance(held, torch.Tensor) and held.dim() == 2:
            mask = builder.call(aten.index_select.default, mask, 1, gathered.order)
    *grid, prefix, suffix = sizes
    places = (*grid, *block, prefix, suffix)
    head_dim = (shape_of(call.query) or [])[-1]  # a number: nothing else is rewritten
    scale = float(head_dim.hint**-0.5 if call.scale is None else call.scale)
    selected = builder.call(SELECT, query, key, mask, *places, **selection)
    # The rule bounds the pairs that it selects, and with them the kernels' buffers.
    by_count = selection["mode"] == "topk"
    bound = {"topk": selection["topk"]} if by_count else {"threshold": selection["threshold"]}
    bound |= {"tile": selection["tile"], "pool": selection["pool"]}
    both = builder.call(ATTENTION, query, key, value, selected, mask, *places, scale=scale, **bound)
    result = builder.call(operator.getitem, both, 0)
    if gathered is not None:
        result = builder.call(aten.index_select.default, result, 2, gathered.back)
    if more:
        result = builder.call(aten.slice.Tensor, result, 2, before.hint, before.hint + out.shape[2])
        result = builder.call(aten.contiguous.default, result)
    if seeing is not None:
        result = _blanked(builder, result, seeing)
    if _is_viewed(call.node):
        result = laid_out(builder, result, call.node)
    call.node.replace_all_uses_with(result)
    name = call.node.name
    builder.graph.erase_node(call.node)
    if call.mask is not None:
        erase_unused(call.mask)  # one over pairs is large
    result.name = name  # the signature of an exported program names its outputs
    return result


def _cast(builder: Builder, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """Under autocast the dense attention runs in another dtype than its inputs have; so does the sparse one."""
    value = value_of(node)
    assert isinstance(value, torch.Tensor)
    return node if value.dtype == dtype else builder.call(aten.to.dtype, node, dtype)


_TURNS = frozenset(
    ["transpose", "swapaxes", "permute", "mT", "movedim", "squeeze", "unsqueeze", "getitem", "select", "slice"]
)


def _is_viewed(node: fx.Node) -> bool:
    """True where the graph sees the result, perhaps turned, through a view: that asks for the strides it had."""
    front, seen = [node], {node}
    while front:
        users = [user for user in front.pop().users if user not in seen]
        if any(called(user) in ("view", "view_as") for user in users):
            return True
        seen.update(users)
        front += [user for user in users if called(user) in _TURNS]
    return False


def _masks(builder: Builder, call: AttentionCall) -> tuple[fx.Node, fx.Node | None]:
    """Which keys are seen, [batch, tokens] or empty for all; which queries see anything, None for all."""
    batch, _, tokens, _ = shape_of(call.query) or []
    found = None if call.mask is None else token_mask(call.mask, call.node, builder.writers)
    keys = None
    if found is not None and found.keys:
        keys = over_keys(builder, found, builder.number(batch), builder.number((shape_of(call.key) or [])[2]))
    if keys is None:
        keys = builder.call(aten.new_empty.default, call.query, [0], dtype=torch.bool)
    seeing = None
    if found is not None and found.queries:
        seeing = over_queries(builder, found, builder.number(batch), builder.number(tokens))
    return keys, seeing


def _blanked(builder: Builder, result: fx.Node, seeing: fx.Node) -> fx.Node:
    """The result with zeros, which the dense operator gives, for queries that see nothing."""
    for dim in (1, 3):
        seeing = builder.call(aten.unsqueeze.default, seeing, dim)
    blind = builder.call(aten.logical_not.default, seeing)
    return builder.call(aten.masked_fill.Scalar, result, blind, 0.0)
