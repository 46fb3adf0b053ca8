"""Evidence that outlives a graph break: which tensors graphs returned, and what those graphs knew of them."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import fx
from torch.utils.weak import WeakIdKeyDictionary

from .passes.evidence import Evidence


class Handover:
    """Tensors that the graphs of one call of the model have returned, by identity, unless written to since."""

    def __init__(self) -> None:
        self._known = WeakIdKeyDictionary()

    def clear(self) -> None:
        """At the beginning of a call: what a model returned before may be anything when it comes back."""
        self._known.clear()

    def note(self, outputs: Sequence[object], told: Sequence[Evidence | None]) -> None:
        for output, evidence in zip(outputs, told, strict=True):
            version = _version(output)
            if isinstance(output, torch.Tensor) and version is not None:
                if evidence is not None:
                    self._known[output] = (evidence, version)
                else:
                    self._known.pop(output, None)

    def of(self, value: object) -> Evidence | None:
        """What is known of a tensor."""
        if not isinstance(value, torch.Tensor) or value not in self._known:
            return None
        evidence, version = self._known[value]
        return evidence if version == _version(value) else None

    def __bool__(self) -> bool:
        return bool(self._known)


def _version(value: object) -> int | None:
    """Counts writes; None where they are not counted, as in inference mode."""
    if not isinstance(value, torch.Tensor) or value.is_inference():
        return None
    return value._version


def copied(module: fx.GraphModule) -> fx.GraphModule:
    """The graph and the graphs that it calls, on the same tensors."""
    twin = fx.GraphModule(module, copy.deepcopy(module.graph))
    for name, inner in module.named_children():
        if isinstance(inner, fx.GraphModule):
            setattr(twin, name, copied(inner))
    twin.meta = dict(module.meta)
    return twin
