"""Regional compilation: a model's repeated blocks compiled one by one, each told what the whole model shows of its inputs.

A dry run of the whole model, once for each size of its inputs, proves the grid, numbers the layers, and reads at the entry
of every block what its inputs are. The model itself then runs eagerly, its blocks compiled: one graph serves all blocks
whose layers have the same schemes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .backend import Inner, Rewriter, inner_compiler, warn
from .blocks import SCHEMES
from .compiling import compile_with
from .handover import Handover
from .passes import Layers, Reason, Report, RewriteError, Site
from .passes.landmarks import arguments
from .passes.report import SiteKey, site_keys
from .regional_plan import REMEDY, Plan, by_block, learn, parameters, signature, survey

# A block's class, and of each of its attentions the scheme and whether the configuration keeps it dense.
Kind = tuple[type[nn.Module], tuple[tuple[SiteKey, int, bool], ...]]

DENSE: Literal["dense"] = "dense"
MANY_PLANS = 8
MANY_CALLS = 4096


Mode = Plan | Literal["dense"] | None  # how blocks run: sparse by a plan, dense, or None: not compiled
Call = tuple[Any, ...]  # of a block: its path, and the shapes and places of its tensors


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
        check_blocks(model)
        self.blocks: dict[str, nn.Module] = {}
        self.outside: tuple[nn.Module, ...] = ()
        self.lock = threading.RLock()
        self.report = Report()
        self.plans: dict[Any, Plan] = {}
        self.mode: Mode = None  # of the present call of the model
        self.modes: dict[Call, Mode] = {}  # of the calls of blocks that a backward pass may make again
        self.active = False  # while the model runs for this object
        self.recording = False  # calls of blocks, once there were gradients
        self.called: set[str] = set()  # the blocks that the latest sparse call of the model called
        self.ran: dict[str, tuple[Report, ...]] = {}  # what their graphs hold
        self.reported: Hashable = None  # what the report tells of
        self.regions: dict[Kind, _Region] = {}
        self.dense_region: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One sparse forward of the model."""
        with self.lock:
            self.blocks, self.outside = survey(self.model)
            training = self._is_training(args, kwargs)
            key = training, *signature(self.blocks.values(), self.outside, (args, kwargs))
            if key not in self.plans:
                config, grid = self.settings["config"], self.settings["grid"]
                self.plans[key] = learn(self.model, (args, kwargs), config, grid, training)
                if len(self.plans) == MANY_PLANS:
                    warn(
                        f"vmoba_compile made {MANY_PLANS} dry runs of {type(self.model).__name__}, one for each new size,"
                        " number or text among its arguments and attributes; pass what changes at every step, such as a"
                        " timestep, as a tensor"
                    )
            plan = self.plans[key]
            self.called.clear()
            self.ran.clear()
            result = self._run(plan, args, kwargs)
            if self.graphs() != self.reported:
                self.report.sites[:] = self._sites(plan)
                self.reported = self.graphs()
            return result

    def run_dense(self, *args: Any, **kwargs: Any) -> Any:
        """One forward of the model, its blocks compiled as they are."""
        with self.lock:
            self.blocks, self.outside = survey(self.model)
            return self._run(DENSE, args, kwargs)

    def run_block(self, path: str, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call of a block: by the model, by the plain model, or by a backward pass that computes a checkpoint again."""
        mode = self.mode if self.active else None
        again = torch._C._current_graph_task_id() != -1
        if again or self.recording:
            places = ((name, tuple(x.shape), x.data_ptr()) for name, x in arguments(parameters(block), args, kwargs))
            mode = self._mode_again((path, *places)) if again else self._recorded((path, *places), mode)
        if mode is None:
            return block._call_impl(*args, **kwargs)
        if mode == DENSE:
            if self.dense_region is None:
                self.dense_region = self._compiled("dense_block", self.compiler)
            return self.dense_region(block, args, kwargs)
        return self._run_sparse(mode, path, block, args, kwargs)

    def _recorded(self, call: Call, mode: Mode) -> Mode:
        """The mode, kept for a backward pass: the latest for these tensors, as older ones with their addresses are gone."""
        if len(self.modes) == MANY_CALLS:
            del self.modes[next(iter(self.modes))]
        self.modes.pop(call, None)
        self.modes[call] = mode
        return mode

    def _mode_again(self, call: Call) -> Mode:
        """How the forward pass made a call that the backward pass makes again."""
        if call in self.modes:
            return self.modes[call]
        path, *tensors = call
        shapes = [tensor[:2] for tensor in tensors]
        alike = {
            id(mode): mode
            for (other, *given), mode in self.modes.items()
            if other == path and [x[:2] for x in given] == shapes
        }
        if len(alike) == 1:  # moved meanwhile, to the CPU and back for example
            return next(iter(alike.values()))
        raise RewriteError(
            f"{path} is computed again in a backward pass, but it is not known how its forward pass ran; call backward "
            f"before the model runs in another way, or {REMEDY}"
        )

    def _run_sparse(
        self, plan: Plan, path: str, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self.called.add(path)
        region = self._region(plan, path)
        rewriter = region.rewriter
        given = dict(arguments(parameters(block), args, kwargs))
        assert rewriter.handover is not None
        rewriter.handover.begin()
        for name, evidence in plan.of_block(path, given).items():
            rewriter.handover.tell(given[name], evidence)
        rewriter.ran = []
        try:
            return region.run(block, args, kwargs)
        finally:
            if rewriter.ran:
                self.ran[path] = tuple(rewriter.ran)
            rewriter.ran = None

    def _is_training(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """True where a backward may follow: as the graphs of the blocks will see it."""
        tensors = (*self.model.parameters(), *pytree.tree_leaves((args, kwargs)))
        return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in tensors)

    def _region(self, plan: Plan, path: str) -> _Region:
        settings, layers = self.settings, plan.layers.get(path, {})
        schemes = tuple(
            (key, layer % len(SCHEMES), layer in settings["config"].dense_layers) for key, layer in layers.items()
        )
        kind = type(self.blocks[path]), schemes
        if kind not in self.regions:
            rewriter = Rewriter(
                settings["config"], settings["grid"], self.compiler,
                report=Report(layers=_Numbered(layers)), handover=Handover(),
                dump_dir=settings["dump_dir"], label=f"region_{len(self.regions)}_",
            )  # fmt: skip
            self.regions[kind] = _Region(rewriter, self._compiled("sparse_block", rewriter))
        return self.regions[kind]

    def graphs(self) -> Hashable:
        """The plan of the latest sparse forward, and the graphs that its blocks ran."""
        ran = frozenset((path, *map(id, graphs)) for path, graphs in self.ran.items())
        return id(self.mode), frozenset(self.called), ran

    def account(self) -> tuple[Report, int]:
        """The sites of the latest sparse forward; a graph that serves several layers has one for each."""
        return Report(list(self.report.sites)), 1

    def _compiled(self, name: str, backend: Inner) -> Callable[..., Any]:
        run: Callable[..., Any] = compile_with(_function(name), backend, self.settings["compile_kwargs"])
        return run

    def _run(self, mode: Mode, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model, eagerly, and its blocks compiled."""
        before = {path: block.__dict__.get("_compiled_call_impl") for path, block in self.blocks.items()}
        for path, block in self.blocks.items():
            block._compiled_call_impl = _BlockCall(self, path, block)
        self.mode, self.active, self.recording = mode, True, self.recording or torch.is_grad_enabled()
        try:
            return self.model(*args, **kwargs)
        finally:
            self.active = False
            if not torch.is_grad_enabled():  # else the backward pass may compute checkpointed blocks again
                for path, block in self.blocks.items():
                    if before[path] is None:
                        block.__dict__.pop("_compiled_call_impl", None)
                    else:
                        block._compiled_call_impl = before[path]

    def _sites(self, plan: Plan) -> list[Site]:
        """What really happened, under the paths and layers of the whole model, in the order of the dry run."""
        sites: list[Site] = []
        for path, expected in by_block(plan.report, self.blocks):
            if path is None:
                why = "outside the repeated blocks, which alone are compiled with regional=True"
                sites += [_dense(site, why) for site in expected]
            elif path in self.ran:
                found = [site for graph in self.ran[path] for site in graph]
                sites += _named(found, path, expected, plan.layers[path])
            else:
                why = (
                    "Dynamo ran the block eagerly; is its recompile_limit reached?"
                    if path in self.called
                    else "the model did not call the block as a module"
                )
                sites += [_dense(site, why) for site in expected]
        return sites


class _BlockCall:
    """What stands in for a block's own call while the model runs, and for checkpoints that a backward pass computes again.

    Left in place after a forward with gradients. The plain model then runs as ever.
    """

    def __init__(self, regions: Regions, path: str, block: nn.Module) -> None:
        self.regions, self.path, self.block = regions, path, block

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # the plain model, within a graph of somebody else
            return self.block._call_impl(*args, **kwargs)
        return self.regions.run_block(self.path, self.block, args, kwargs)


class _Numbered(Layers):
    """The layer numbers that a block's attentions have in the whole model."""

    def __init__(self, numbers: Mapping[SiteKey, int]) -> None:
        super().__init__()
        self._numbers.update(numbers)


def check_blocks(model: nn.Module) -> None:
    """ValueError where a model has no repeated blocks, or they are compiled already."""
    blocks, _ = survey(model)
    if not blocks:
        raise ValueError(
            f"regional=True, but {type(model).__name__} has no repeated blocks: no _repeated_blocks and no nn.ModuleList of"
            " two modules or more of one class; compile it as a whole (regional=False)"
        )
    for path, block in blocks.items():
        if block._compiled_call_impl is not None and not isinstance(block._compiled_call_impl, _BlockCall):
            raise ValueError(
                f"{path} is compiled already; give optimize(regional=True) the model without compile_repeated_blocks()"
            )


def _function(name: str) -> Callable[..., Any]:
    """A function that calls a module, with a code object of its own: Dynamo counts recompilations for each of those."""

    def call(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return block._call_impl(*args, **kwargs)

    return FunctionType(call.__code__.replace(co_name=name), call.__globals__, name)


def _named(ran: list[Site], path: str, expected: list[Site], layers: Mapping[SiteKey, int]) -> Iterator[Site]:
    """What the graphs of a block hold, as sites of the whole model; of what stays dense, that knows the reason better."""
    known: list[Site] | list[None] = expected if len(expected) == len(ran) else [None] * len(ran)
    keys = site_keys((site.path, site.source) for site in ran)
    for key, site, whole in zip(keys, ran, known, strict=True):
        layer = site.layer if site.layer is None else layers.get(key, site.layer)
        here = replace(site, path=f"{path}.{site.path}".rstrip("."), layer=layer)
        if whole is None or (whole.path, whole.source) != (here.path, here.source):
            yield here
        elif whole.rewritten and not here.rewritten and here.reason.intended:
            detail = f"what the whole model shows of its tokens cannot be handed to a block ({here.detail}); {REMEDY}"
            yield replace(here, reason=Reason.NO_GRID, detail=detail)
        else:
            known_better = whole.rewritten or here.rewritten or here.reason is Reason.TOO_FEW_TOKENS
            yield here if known_better else whole


def _dense(site: Site, detail: str) -> Site:
    """The site as it is where its block is not compiled."""
    if not site.rewritten:
        return site
    return replace(
        site, reason=Reason.NOT_COMPILED, detail=detail, layer=None, scheme=None, block=None, density_bound=None
    )
