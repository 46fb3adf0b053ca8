"""Put the ``vmoba`` operators where a proven attention stood."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from .builder import Builder, Number
from .decide import Layout, key_mask_dims
from .recognise import AttentionCall
from .sizes import shape_of, value_of

SELECT = torch.ops.vmoba.select.default
ATTENTION = torch.ops.vmoba.attention.default


def numbers(builder: Builder, layout: Layout) -> list[Number] | None:
    """Grid, prefix and suffix as graph arguments, None where a symbolic size cannot be had at this place."""
    sizes = (*layout.grid, layout.prefix, layout.suffix)
    if any(builder.find(size) is None for size in sizes):
        return None
    return [builder.number(size) for size in sizes]


def replace_attention(
    call: AttentionCall, builder: Builder, sizes: list[Number], block: list[Number], selection: dict[str, Any]
) -> fx.Node:
    """Replace ``call`` by select and attend; ``selection`` holds pool, mode, threshold, topk and tile."""
    out = value_of(call.node)
    assert isinstance(out, torch.Tensor)
    query, key, value = (_cast(builder, node, out.dtype) for node in (call.query, call.key, call.value))
    mask = _key_mask(builder, call)
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
    call.node.replace_all_uses_with(result)
    name = call.node.name
    builder.graph.erase_node(call.node)
    result.name = name  # the signature of an exported program names its outputs
    return result


def _cast(builder: Builder, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """Under autocast the dense attention runs in another dtype than its inputs have; so does the sparse one."""
    value = value_of(node)
    assert isinstance(value, torch.Tensor)
    return node if value.dtype == dtype else builder.call(torch.ops.aten.to.dtype, node, dtype)


def _key_mask(builder: Builder, call: AttentionCall) -> fx.Node:
    if call.mask is None:
        return builder.call(torch.ops.aten.new_empty.default, call.query, [0], dtype=torch.bool)
    mask = call.mask
    if key_mask_dims(mask) == 4:  # [B, 1, 1, S]
        mask = builder.call(torch.ops.aten.select.int, mask, 1, 0)
        mask = builder.call(torch.ops.aten.select.int, mask, 1, 0)
    else:  # [1, S]
        mask = builder.call(torch.ops.aten.slice.Tensor, mask, 0, 0, 1)
    sizes = shape_of(call.query) or []
    batch, tokens = builder.number(sizes[0]), builder.number(sizes[2])
    return builder.call(torch.ops.aten.expand.default, mask, [batch, tokens])
