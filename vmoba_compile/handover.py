"""Evidence that outlives a graph break: which tensors graphs returned, and what those graphs knew of them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import fx
from torch._subclasses import FakeTensor
from torch.utils.weak import WeakIdKeyDictionary

from .passes.evidence import Evidence


class Handover:
    """Tensors that graphs have returned, by identity, unless written to since.

    Only those of the same call of the model count: what it returned before may be anything when it comes back.
    """

    def __init__(self) -> None:
        self._known = WeakIdKeyDictionary()
        self._runs = 0

    def begin(self) -> None:
        """A call of the model begins."""
        self._known.clear()

    def tell(self, tensor: torch.Tensor, evidence: Evidence) -> None:
        """Something is known of a tensor as it now is."""
        self._known[tensor] = (evidence, _state(tensor))

    def note(self, inputs: Sequence[object], outputs: Sequence[object], told: Sequence[Evidence | None]) -> None:
        """A graph ran. Its evidence is about the tensors of this run, and none is kept of tensors that share memory."""
        if not any(told) and not self._known:
            return
        self._runs += 1
        shared = Counter(map(_memory, {id(x): x for x in (*inputs, *outputs)}.values()))
        for output, evidence in zip(outputs, told, strict=False):
            if isinstance(output, torch.Tensor):
                if evidence is not None and shared[_memory(output)] == 1 and _state(output) is not None:
                    self._known[output] = (replace(evidence, graph=self._runs), _state(output))
                else:
                    self._known.pop(output, None)

    def of(self, value: object) -> Evidence | None:
        """What is known of a tensor."""
        if not isinstance(value, torch.Tensor) or value not in self._known:
            return None
        evidence, state = self._known[value]
        return evidence if state == _state(value) else None


def _memory(value: object) -> int | None:
    """A number for the memory that a tensor lies in."""
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) and value.layout is torch.strided else None


def _state(value: torch.Tensor) -> tuple[int, ...] | None:
    """What changes when a tensor is written to; None where writes are not counted, as in inference mode."""
    if value.is_inference():
        return None
    address = 0 if isinstance(value, FakeTensor) or value.device.type == "meta" else value.data_ptr()
    return (value._version, address, int(value.storage_offset()), *map(int, value.stride()))


def copied(module: fx.GraphModule) -> fx.GraphModule:
    """The graph and the graphs that it calls, on the same tensors."""
    twin = fx.GraphModule(module, copy.deepcopy(module.graph))
    for name, inner in module.named_children():
        if isinstance(inner, fx.GraphModule):
            setattr(twin, name, copied(inner))
    twin.meta = dict(module.meta)
    return twin
