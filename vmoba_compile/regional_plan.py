"""What a dry run of the whole model shows of its repeated blocks: the plan by which they are compiled one by one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .config import VMoBAConfig
from .explain import dry_run
from .kernels.partition import Triple
from .passes import Report, Site
from .passes.evidence import Evidence
from .passes.landmarks import LANDMARK, Landmarks, arguments
from .passes.report import SiteKey, site_keys

Inputs = tuple[tuple[Any, ...], dict[str, Any]]  # a model's, by position and by name
REMEDY = "compile it as a whole (regional=False)"


@dataclass(frozen=True, eq=False)
class Plan:
    """What a dry run of the whole model showed, for inputs of one size."""

    report: Report
    told: Mapping[str, list[dict[str, Evidence]]]  # for each block, call by call, of its arguments
    layers: Mapping[str, dict[SiteKey, int]]  # for each block, the layers of its attentions, by their place in it
    kept: tuple[nn.Module, ...]  # the modules that it is for, whose identities are not to be taken by others

    def of_block(self, path: str, given: Mapping[str, Tensor]) -> dict[str, Evidence]:
        """What is known of a block's arguments: where it was called several times, what holds of every call."""
        calls = [call for call in self.told.get(path, []) if all(_fits(e, given.get(n)) for n, e in call.items())]
        return calls[0] if calls and all(call == calls[0] for call in calls) else {}


def learn(model: nn.Module, inputs: Inputs, config: VMoBAConfig, grid: Triple | None, training: bool) -> Plan:
    """Make a dry run for these inputs; ``training`` where a backward may follow."""
    tensors = (*model.parameters(), *pytree.tree_leaves(inputs))
    device = next((x.device for x in tensors if isinstance(x, Tensor)), torch.device("cpu"))
    # A dry run has no gradients, of which the figure for "auto" depends.
    config = replace(config, min_tokens=config.least_tokens(device, training))
    landmarks = Landmarks()
    report = dry_run(model, *inputs, config, grid, landmarks, _mark, REMEDY)
    blocks, outside = survey(model)
    layers = {path: dict(_numbers(path, sites)) for path, sites in by_block(report, blocks) if path is not None}
    return Plan(report, landmarks.modules, layers, (*blocks.values(), *outside))


def survey(model: nn.Module) -> tuple[dict[str, nn.Module], tuple[nn.Module, ...]]:
    """The blocks to compile by themselves, by path, and the modules outside of them.

    Blocks are those that the model names (``_repeated_blocks``, as diffusers' models do), and the elements of its other
    outermost lists of two modules or more of one class.
    """
    named = set(getattr(model, "_repeated_blocks", None) or ())
    blocks: dict[str, nn.Module] = {}
    outside = [model]

    def visit(module: nn.Module, prefix: str, listed: bool) -> None:
        for name, child in module.named_children():
            path = f"{prefix}{name}"
            if listed or type(child).__name__ in named:
                blocks[path] = child
            else:
                outside.append(child)
                visit(child, f"{path}.", _is_list_of_blocks(child, named))

    visit(model, "", False)
    return blocks, tuple(outside)


def _is_list_of_blocks(module: nn.Module, named: set[str]) -> bool:
    alike = isinstance(module, nn.ModuleList) and len(module) > 1 and len({type(x) for x in module}) == 1
    return alike and not (named and any(type(x).__name__ in named for x in module.modules()))


def signature(blocks: Iterable[nn.Module], outside: Iterable[nn.Module], inputs: Any) -> tuple[Hashable, ...]:
    """What sizes and the order of tokens may depend on: the inputs, the modules, and what is set on those."""
    leaves, spec = pytree.tree_flatten(inputs)
    settings = [
        (name, _plain(value))
        for module in outside
        for name, value in vars(module).items()
        if not name.startswith("_") and not isinstance(value, (Tensor, nn.Module))
    ]
    return spec, *map(_plain, leaves), *map(id, blocks), *map(id, outside), *settings


def _plain(value: Any) -> Hashable:
    """A value that is equal where what it was made of is; for what cannot be compared, its identity."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.device
    if isinstance(value, (bool, int, float, str, type(None), torch.dtype, torch.device)):
        return type(value), value
    if isinstance(value, (tuple, list)):
        return type(value), *map(_plain, value)
    if isinstance(value, Mapping):
        return type(value), *((str(key), _plain(item)) for key, item in value.items())
    if is_dataclass(value):
        return type(value), *((each.name, _plain(getattr(value, each.name))) for each in fields(value))
    return type(value), id(value)


def _fits(evidence: Evidence, tensor: Tensor | None) -> bool:
    return tensor is not None and evidence.fits(tensor.shape)


def _under(path: str, block: str) -> bool:
    return path == block or path.startswith(block + ".")


def by_block(report: Report, blocks: Mapping[str, nn.Module]) -> Iterator[tuple[str | None, list[Site]]]:
    """Runs of sites of one block, None for those outside of all blocks."""
    latest: tuple[str | None, list[Site]] | None = None
    for site in report:
        path = next((path for path in blocks if _under(site.path, path)), None)
        if latest is None or latest[0] != path or path is None:
            if latest is not None:
                yield latest
            latest = (path, [])
        latest[1].append(site)
    if latest is not None:
        yield latest


def _numbers(path: str, sites: list[Site]) -> Iterator[tuple[SiteKey, int]]:
    """The layers of a block's attentions, by the keys that they have in a graph of the block alone."""
    inside = [(site.path[len(path) :].lstrip("."), site.source) for site in sites]
    for key, site in zip(site_keys(inside), sites, strict=True):
        if site.layer is not None:
            yield key, site.layer


def _mark(twin: nn.Module) -> None:
    """Landmarks at the entries of the blocks of a copy of the model."""
    for path, block in survey(twin)[0].items():
        # Before hooks of the model's own, which are in the blocks' graphs. prepend=True moves an entry to the front, of
        # which Dynamo's guards in torch 2.11 know nothing.
        hooks = block._forward_pre_hooks
        own = dict(hooks)
        hooks.clear()
        block.register_forward_pre_hook(_marking(path, parameters(block)), with_kwargs=True)
        hooks.update(own)


def parameters(block: nn.Module) -> tuple[str, ...]:
    forward = block.forward
    method = getattr(forward, "__func__", None)
    return _names(forward) if method is None else _names(method)[1:]


@lru_cache(maxsize=256)
def _names(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def _marking(path: str, names: tuple[str, ...]) -> Callable[..., None]:
    def mark(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for name, tensor in arguments(names, args, kwargs):
            LANDMARK(tensor, path, name)

    return mark
