"""Regional compilation: a model's repeated blocks compiled one by one, each told what the whole model shows of its inputs.

A dry run of the whole model, once for each size of its inputs, proves the grid, numbers the layers, and reads at the entry
of every block what its inputs are. The model itself then runs eagerly, its blocks compiled: one graph serves all blocks
whose layers have the same schemes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .backend import Inner, Rewriter, inner_compiler
from .blocks import SCHEMES
from .compiling import compile_with
from .explain import dry_run
from .handover import Handover
from .passes import Layers, Reason, Report, Site
from .passes.evidence import Evidence
from .passes.landmarks import LANDMARK, Landmarks, arguments
from .whole import untraced

# A block's class, and of each of its attentions the scheme and whether the configuration keeps it dense.
Kind = tuple[type[nn.Module], tuple[tuple[int, bool], ...]]


@dataclass(frozen=True, eq=False)
class Plan:
    """What a dry run of the whole model showed, for inputs of one size."""

    report: Report
    told: Mapping[str, list[dict[str, Evidence]]]  # for each block, call by call, of its arguments
    layers: Mapping[str, tuple[int, ...]]  # for each block, the layers of its attentions

    def of_block(self, path: str, given: Mapping[str, Tensor]) -> dict[str, Evidence]:
        """What is known of a block's arguments: where it was called several times, what holds of every call."""
        calls = [call for call in self.told.get(path, []) if all(_fits(e, given.get(n)) for n, e in call.items())]
        return calls[0] if calls and all(call == calls[0] for call in calls) else {}


@dataclass(eq=False)
class _Region:
    """Blocks of one kind, their backend and their compiled form."""

    rewriter: Rewriter
    run: Callable[..., Any]


class Regions:
    """The repeated blocks of one model, compiled where they stand in it."""

    def __init__(self, model: nn.Module, settings: dict[str, Any]) -> None:
        kwargs = settings["compile_kwargs"]
        if kwargs.get("dynamic"):
            raise ValueError("regional=True compiles for each size of the inputs: leave dynamic out, or regional")
        self.model, self.settings = model, settings
        self.compiler = inner_compiler(settings["inner"], kwargs.get("mode"), kwargs.get("options"))
        self.context = torch._dynamo.disable(model).dynamo_ctx
        self.blocks = repeated_blocks(model)
        self.names = {path: list(inspect.signature(block.forward).parameters) for path, block in self.blocks.items()}
        self.outside = [
            module for path, module in model.named_modules() if not any(_under(path, block) for block in self.blocks)
        ]
        self.report = Report()
        self.dense = False
        self.plans: dict[Any, Plan] = {}
        self.plan: Plan | None = None  # of the present call of the model
        self.called: set[str] = set()  # the blocks that it called
        self.ran: dict[str, Report] = {}  # what their graphs hold
        self.regions: dict[Kind, _Region] = {}
        self.dense_region: Callable[..., Any] | None = None

    @untraced
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One sparse forward of the model."""
        signature = _signature(self.outside, args, kwargs)
        plan = self.plans.get(signature)
        if plan is None:
            plan = self.plans[signature] = self._learn(args, kwargs)
        self.plan, self.dense = plan, False
        self.called.clear()
        self.ran.clear()
        result = self._run(args, kwargs)
        self.report.sites[:] = self._sites(plan)
        return result

    @untraced
    def run_dense(self, *args: Any, **kwargs: Any) -> Any:
        """One forward of the model, its blocks compiled as they are."""
        self.dense = True
        return self._run(args, kwargs)

    def run_block(self, path: str, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call of a block, wherever it comes from: the model, or a checkpoint computed again in the backward pass."""
        if self.dense or self.plan is None:
            if self.dense_region is None:
                self.dense_region = self._compiled("dense_block", self.compiler)
            return self.dense_region(block, args, kwargs)
        self.called.add(path)
        region = self._region(self.plan, path)
        rewriter = region.rewriter
        given = dict(arguments(self.names[path], args, kwargs))
        assert rewriter.handover is not None
        rewriter.handover.begin()
        for name, evidence in self.plan.of_block(path, given).items():
            rewriter.handover.tell(given[name], evidence)
        rewriter.ran = []
        try:
            return region.run(block, args, kwargs)
        finally:
            if rewriter.ran:
                self.ran[path] = Report([site for found in rewriter.ran for site in found])
            rewriter.ran = None

    def _region(self, plan: Plan, path: str) -> _Region:
        layers = plan.layers.get(path, ())
        schemes = tuple((layer % len(SCHEMES), layer in self.settings["config"].dense_layers) for layer in layers)
        kind = type(self.blocks[path]), schemes
        if kind not in self.regions:
            settings = self.settings
            rewriter = Rewriter(
                settings["config"], settings["grid"], self.compiler,
                report=Report(layers=_Numbered(layers)), handover=Handover(),
                dump_dir=settings["dump_dir"], label=f"region_{len(self.regions)}_",
            )  # fmt: skip
            self.regions[kind] = _Region(rewriter, self._compiled("sparse_block", rewriter))
        return self.regions[kind]

    def graphs(self) -> Hashable:
        """The plan of the latest sparse forward, and the graphs that its blocks ran."""
        return id(self.plan), frozenset(self.called), frozenset(self.ran)

    def account(self) -> tuple[Report, int]:
        """The sites of the latest sparse forward; a graph that serves several layers has one for each."""
        return Report(list(self.report.sites)), 1

    def _learn(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Plan:
        self._restore()
        landmarks = Landmarks()
        with _marked(self.blocks, self.names):
            report = dry_run(
                self.model, args, kwargs, self.settings["config"], self.settings["grid"], landmarks, _REMEDY
            )
        layers = {
            path: tuple(site.layer for site in report if _under(site.path, path) and site.layer is not None)
            for path in self.blocks
        }
        return Plan(report, landmarks.modules, layers)

    def _compiled(self, name: str, backend: Inner) -> Callable[..., Any]:
        run: Callable[..., Any] = compile_with(_function(name), backend, self.settings["compile_kwargs"])
        return run

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model, eagerly, whatever torch.compile may be around it, and its blocks compiled."""
        for path, block in self.blocks.items():
            block._compiled_call_impl = _BlockCall(self, path, block)
        try:
            return torch.compiler.disable(self.model.__call__)(*args, **kwargs)
        finally:
            if not torch.is_grad_enabled():  # else the backward pass may compute checkpointed blocks again
                self._restore()

    def _restore(self) -> None:
        for block in self.blocks.values():
            block.__dict__.pop("_compiled_call_impl", None)

    def _sites(self, plan: Plan) -> list[Site]:
        """What really happened, under the paths and layers of the whole model, in the order of the dry run."""
        sites: list[Site] = []
        for path, expected in _by_block(plan.report, self.blocks):
            if path is None:
                why = "outside the repeated blocks, which alone are compiled with regional=True"
                sites += [_dense(site, why) for site in expected]
            elif path in self.ran:
                sites += _named(self.ran[path], path, expected, plan.layers[path])
            else:
                why = (
                    "Dynamo ran the block eagerly; is its recompile_limit reached?"
                    if path in self.called
                    else "the model did not call the block as a module"
                )
                sites += [_dense(site, why) for site in expected]
        return sites


class _BlockCall:
    """What stands in for a block's own call."""

    def __init__(self, regions: Regions, path: str, block: nn.Module) -> None:
        self.regions, self.path, self.block = regions, path, block

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.regions.run_block(self.path, self.block, args, kwargs)


class _Numbered(Layers):
    """The layer numbers that a block's attentions have in the whole model, in their order."""

    def __init__(self, numbers: tuple[int, ...]) -> None:
        super().__init__()
        self._given = numbers

    def number(self, key: Any) -> int:
        place = super().number(key)
        return self._given[place] if place < len(self._given) else place


def repeated_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks to compile by themselves, by path: those that the model names (``_repeated_blocks``, as diffusers' models
    do), and the elements of its other outermost lists of two modules or more of one class.

    Raises:
        ValueError: there are none, or they are compiled already.
    """
    named = set(getattr(model, "_repeated_blocks", None) or ())
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if path and type(module).__name__ in named and not any(_under(path, other) for other in found):
            found[path] = module
    for path, module in list(_listed(model, "")):
        if not any(_under(path, other) or _under(other, path) for other in found):
            found[path] = module
    if not found:
        raise ValueError(
            f"regional=True, but {type(model).__name__} has no repeated blocks: no _repeated_blocks and no nn.ModuleList of"
            " two modules or more of one class; compile it as a whole (regional=False)"
        )
    for path, block in found.items():
        if block._compiled_call_impl is not None and not isinstance(block._compiled_call_impl, _BlockCall):
            raise ValueError(
                f"{path} is compiled already; give optimize(regional=True) the model without compile_repeated_blocks()"
            )
    return found


def _listed(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, nn.ModuleList) and len(child) > 1 and len({type(x) for x in child}) == 1:
            yield from ((f"{path}.{index}", block) for index, block in child.named_children())
        else:
            yield from _listed(child, f"{path}.")


def _function(name: str) -> Callable[..., Any]:
    """A function that calls a module, with a code object of its own: Dynamo counts recompilations for each of those."""

    def call(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return block._call_impl(*args, **kwargs)

    return FunctionType(call.__code__.replace(co_name=name), call.__globals__, name)


def _signature(outside: list[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """What the sizes and the order of tokens may depend on: inputs and settings; not numbers such as guidance scales."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    settings = [
        (name, value) for module in outside for name, value in vars(module).items() if isinstance(value, _SETTINGS)
    ]
    return (spec, *map(_kind, leaves), *settings)


_SETTINGS = (bool, int, str, type(None))


def _kind(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape), leaf.dtype, leaf.device
    return leaf if isinstance(leaf, _SETTINGS) else type(leaf)


def _fits(evidence: Evidence, tensor: Tensor | None) -> bool:
    return tensor is not None and evidence.fits(tensor.shape)


_REMEDY = "compile it as a whole (regional=False)"


def _under(path: str, block: str) -> bool:
    return path == block or path.startswith(block + ".")


def _by_block(report: Report, blocks: Mapping[str, nn.Module]) -> Iterator[tuple[str | None, list[Site]]]:
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


def _named(ran: Report, path: str, expected: list[Site], layers: tuple[int, ...]) -> Iterator[Site]:
    """What the graph of a block holds, as sites of the whole model; of what stays dense, that knows the reason better."""
    numbers = iter(layers)
    known: list[Site] | list[None] = expected if len(expected) == len(ran) else [None] * len(ran)
    for site, whole in zip(ran, known, strict=True):
        layer = site.layer if site.layer is None else next(numbers, site.layer)
        here = replace(site, path=f"{path}.{site.path}".rstrip("."), layer=layer)
        if whole is None or (whole.path, whole.source) != (here.path, here.source):
            yield here
        elif whole.rewritten and not here.rewritten and here.reason.intended:
            detail = f"what the whole model shows of its tokens cannot be handed to a block ({here.detail}); {_REMEDY}"
            yield replace(here, reason=Reason.NO_GRID, detail=detail)
        else:
            yield here if whole.rewritten or here.rewritten else whole


def _dense(site: Site, detail: str) -> Site:
    """The site as it is where its block is not compiled."""
    if not site.rewritten:
        return site
    return replace(
        site, reason=Reason.NOT_COMPILED, detail=detail, layer=None, scheme=None, block=None, density_bound=None
    )


class _marked:
    """Landmarks at the entries of the blocks, while a dry run lasts."""

    def __init__(self, blocks: Mapping[str, nn.Module], names: Mapping[str, list[str]]) -> None:
        self.blocks, self.names = blocks, names

    def __enter__(self) -> None:
        self.hooks = [
            block.register_forward_pre_hook(_marking(path, self.names[path]), with_kwargs=True)
            for path, block in self.blocks.items()
        ]

    def __exit__(self, *exception: object) -> None:
        for hook in self.hooks:
            hook.remove()


def _marking(path: str, names: list[str]) -> Callable[..., None]:
    def mark(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for name, tensor in arguments(names, args, kwargs):
            LANDMARK(tensor, path, name)

    return mark
