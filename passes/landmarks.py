"""Marks in a graph: what a tensor is at the place where a module of interest takes it.

A dry run of a whole model sets them at the entry of each block, so that blocks compiled one by one can be told what their
inputs are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from .evidence import Evidence, canonical, evidence_at
from .track import Tracking

_LIBRARY = torch.library.Library("vmoba", "FRAGMENT")
_LIBRARY.define("landmark(Tensor tensor, str module, str argument) -> Tensor")


@torch.library.impl(_LIBRARY, "landmark", "CompositeExplicitAutograd")
def _landmark(tensor: Tensor, module: str, argument: str) -> Tensor:
    return tensor.clone()


@torch.library.register_fake("vmoba::landmark", lib=_LIBRARY)
def _fake(tensor: Tensor, module: str, argument: str) -> Tensor:
    return torch.empty_like(tensor)


LANDMARK = torch.ops.vmoba.landmark
fx.node._side_effectful_functions.add(LANDMARK.default)


@dataclass
class Landmarks:
    """For each module, call by call: what is known of the tensors among its arguments, by their names."""

    modules: dict[str, list[dict[str, Evidence]]] = field(default_factory=dict)

    def take(self, tracking: Tracking) -> None:
        """Read the marks of a graph that was walked."""
        found: dict[str, list[dict[str, Evidence | None]]] = {}
        for scope, node in tracking.order:
            if is_landmark(node):
                module, argument = map(str, node.args[1:])
                calls = found.setdefault(module, [])
                if not calls or argument in calls[-1]:
                    calls.append({})
                # The mark has the type that its tensor had there, whatever was written to that later.
                calls[-1][argument] = evidence_at(scope, node, tracking)
        for module, calls in found.items():
            known = [{name: evidence for name, evidence in call.items() if evidence is not None} for call in calls]
            self.modules.setdefault(module, []).extend(map(canonical, known))


def is_landmark(node: fx.Node) -> bool:
    return node.target is LANDMARK.default or node.target is LANDMARK


def tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors in an argument, by name: of nested tuples, lists and dicts as well."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, (tuple, list)):
        for place, item in enumerate(value):
            yield from tensors(item, f"{name}[{place}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from tensors(item, f"{name}[{key!r}]")


def arguments(names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a function with parameters ``names`` is called with, however they are passed."""
    for place, value in enumerate(args):
        yield from tensors(value, names[place] if place < len(names) else f"*{place}")
    for name, value in kwargs.items():
        yield from tensors(value, name)
