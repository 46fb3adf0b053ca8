"""Put the ``vmoba`` operators where a proven attention stood."""

from __future__ import annotations

import operator
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx

from .decide import Layout, key_mask_dims
from .recognise import AttentionCall
from .sizes import Size, same, shape_of, size_of, value_of

SELECT = torch.ops.vmoba.select.default
ATTENTION = torch.ops.vmoba.attention.default
Number = int | fx.Node


def _unchanged(x: torch.Tensor) -> torch.Tensor:
    return x


class Builder:
    """Inserts nodes before ``at``, each with the example value that later passes and exporters expect."""

    def __init__(self, graph: fx.Graph, at: fx.Node) -> None:
        self.graph = graph
        self.at = at
        self.key = "example_value" if "example_value" in at.meta else "val"
        # The mode that made the example values; during compilation another one is current.
        self.fake_mode = getattr(value_of(at), "fake_mode", None) or nullcontext()

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        with self.graph.inserting_before(self.at):
            node = self.graph.call_function(target, args, kwargs)
        node.meta = {name: value for name, value in self.at.meta.items() if name not in ("example_value", "val")}
        real_args, real_kwargs = fx.map_arg((args, kwargs), value_of)  # type: ignore[misc,arg-type]
        # Checkpointing around the model that is being compiled would count what example values save for a backward.
        with self.fake_mode, torch.autograd.graph.saved_tensors_hooks(_unchanged, _unchanged):
            node.meta[self.key] = target(*real_args, **real_kwargs)
        return node

    def find(self, size: Size) -> Number | tuple[fx.Node, int] | None:
        """The size as an int, as a node that is it, or as a tensor and its dimension; None where no shape holds it."""
        if isinstance(size.expr, int):
            return size.expr
        for node in self.graph.nodes:
            if node is self.at:
                return None
            value = value_of(node)
            if isinstance(value, torch.SymInt) and same(size_of(value), size):
                return node
            for dim, extent in enumerate(shape_of(node) or []):
                if not extent.static and same(extent, size):
                    return node, dim
        return None

    def number(self, size: Size) -> Number:
        found = self.find(size)
        assert found is not None
        return self.call(torch.ops.aten.sym_size.int, *found) if isinstance(found, tuple) else found


def numbers(builder: Builder, layout: Layout) -> list[Number] | None:
    """Grid, prefix and suffix as graph arguments, None where a symbolic size cannot be had at this place."""
    sizes = (*layout.grid, layout.prefix, layout.suffix)
    if any(builder.find(size) is None for size in sizes):
        return None
    return [builder.number(size) for size in sizes]


def replace_attention(
    call: AttentionCall, builder: Builder, sizes: list[Number], block: list[Number], selection: dict[str, Any]
) -> None:
    """Replace ``call`` by select and attend. ``selection`` holds pool, mode, threshold, topk and tile."""
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
