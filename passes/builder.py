"""Insert nodes into a graph, each with the example value that later passes and exporters expect."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import fx

from .reading import Unread
from .report import Reason
from .sizes import Size, same, shape_of, size_of, value_of

Number = int | fx.Node


def _unchanged(x: torch.Tensor) -> torch.Tensor:
    return x


class Builder:
    """Inserts nodes before ``at``, each with the example value that later passes and exporters expect.

    ``writers`` are the nodes of the graph that write to a tensor; none is ever inserted. ``trusts_masks``: float masks on
    scores hold zeros and large negatives.
    """

    def __init__(self, graph: fx.Graph, at: fx.Node, writers: Sequence[fx.Node], *, trusts_masks: bool = False) -> None:
        self.graph = graph
        self.at = at
        self.writers = writers
        self.trusts_masks = trusts_masks
        self.added: list[fx.Node] = []
        self.key = "example_value" if "example_value" in at.meta else "val"
        # The mode that made the example values; during compilation another one is current.
        value = value_of(at)
        first = value[0] if isinstance(value, (tuple, list)) and value else value
        self.fake_mode = getattr(first, "fake_mode", None) or nullcontext()

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        with self.graph.inserting_before(self.at):
            make = self.graph.call_method if isinstance(target, str) else self.graph.call_function
            node = make(target, args, kwargs)
        self.added.append(node)
        node.meta = {name: value for name, value in self.at.meta.items() if name not in ("example_value", "val")}
        real_args, real_kwargs = fx.map_arg((args, kwargs), value_of)  # type: ignore[misc,arg-type]
        # Checkpointing around the model that is being compiled would count what example values save for a backward.
        with self.fake_mode, torch.autograd.graph.saved_tensors_hooks(_unchanged, _unchanged):
            run = getattr(real_args[0], target) if isinstance(target, str) else target
            node.meta[self.key] = run(*(real_args[1:] if isinstance(target, str) else real_args), **real_kwargs)
        return node

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Leaves the graph as it was where the block raises :class:`Unread`, or torch refuses one of its calls."""
        try:
            yield
        except Unread:
            self.undo()
            raise
        except RuntimeError as error:
            self.undo()
            raise Unread(f"it cannot be spelled as one call: {str(error).splitlines()[0]}") from error

    def undo(self) -> None:
        for node in reversed(self.added):
            self.graph.erase_node(node)
        self.added.clear()

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
        if found is None:
            raise Unread(
                f"the size {size} is not at hand in this subgraph; compile with dynamic=False", Reason.DYNAMIC_GRID
            )
        return self.call(torch.ops.aten.sym_size.int, *found) if isinstance(found, tuple) else found
