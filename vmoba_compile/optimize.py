"""``optimize``: wrap a model so that its dense video self-attention runs as VMoBA attention."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .backend import NO_ATTENTION, Inner, check_coverage, check_grid, check_strict, warn
from .compiling import plainly
from .config import VMoBAConfig, as_config
from .context_parallel import check_degrees
from .kernels.partition import Triple
from .passes import CoverageError, Reason, Report
from .pipelines import Clock, calling_pipeline
from .regional import Regions
from .schedule import Schedule
from .whole import Whole


def optimize(
    model: nn.Module,
    config: VMoBAConfig | Mapping[str, Any] | None = None,
    *,
    grid: Triple | None = None,
    inner: str | Inner = "inductor",
    strict: bool = False,
    expect: int | None = None,
    regional: bool = False,
    dump_dir: str | Path | None = None,
    **compile_kwargs: Any,
) -> OptimizedModel:
    """Compile ``model`` with its dense video self-attention replaced by VMoBA attention (arXiv 2506.23858).

    Args:
        model: any module; inference or training, on one device. It is not changed.
        config: a :class:`VMoBAConfig`, or a mapping of its fields.
        grid: (frames, rows, columns) of the video tokens after patching. Found in the graph where it can be; one given
            here wins and is checked against the token count.
        inner: the compiler of the rewritten graph: a ``torch.compile`` backend's name or a callable.
        strict: raise unless every attention that may be over a video is rewritten.
        expect: raise unless at least so many attentions are rewritten.
        regional: compile the model's repeated blocks one by one, one graph for all whose layers have the same schemes: a
            fraction of the compile time; what lies outside the blocks runs eagerly. The first call with inputs of a new
            size makes a dry run of the model.
        dump_dir: a folder for the text of every captured graph, before and after the rewrite.
        compile_kwargs: ``fullgraph``, ``dynamic``, ``mode``, ``options`` and the rest, as for ``torch.compile``;
            ``dynamic`` is False unless given, since blocks and ``min_tokens`` belong to a size.

    Returns:
        A module that behaves as ``torch.compile``'s result does (attributes, ``state_dict``, ``train``/``eval``), with
        ``dense()`` and ``schedule()`` besides. Graphs are made at the first call.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, unknown or out of range; ``regional`` and the model has no
            repeated blocks.

    Within the denoising loop of a diffusers pipeline that holds the result, the first ``dense_steps`` of the configuration
    use dense attention by themselves; elsewhere ``schedule()`` says which step it is.

    The first call may raise :class:`GridError` (``grid`` contradicts the graph), :class:`CoverageError` (``strict`` or
    ``expect`` not met) or :class:`InputError` (the model rejects the inputs); it warns where nothing was rewritten.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise TypeError("model is compiled already; pass the module that torch.compile or optimize was given")
    for path, module in model.named_modules():
        if isinstance(module, torch._dynamo.OptimizedModule):
            raise TypeError(f"{path} is compiled already; optimize the model with the plain module in that place")
    if "backend" in compile_kwargs:
        raise ValueError("optimize is itself the backend; choose the compiler of the rewritten graph with inner=")
    if compile_kwargs.get("disable"):
        raise ValueError("disable=True leaves nothing to rewrite; use the model itself")
    unknown = sorted(
        set(compile_kwargs) - set(inspect.signature(torch.compile).parameters) | ({"model"} & set(compile_kwargs))
    )
    if unknown:
        fields = ", ".join(VMoBAConfig.__dataclass_fields__)
        raise TypeError(
            f"unknown option {unknown[0]!r}: neither an argument of torch.compile nor of optimize "
            f"(configuration such as {fields} goes into config=VMoBAConfig(...))"
        )
    if expect is not None and (isinstance(expect, bool) or not isinstance(expect, int) or expect < 0):
        raise ValueError(f"expect must be a number of attentions (int, at least 0) or None, not {expect!r}")
    settings = {
        "config": as_config(config),
        "grid": check_grid(grid),
        "inner": inner,
        "strict": strict,
        "expect": expect,
        "regional": bool(regional),
        "dump_dir": dump_dir,
        "compile_kwargs": compile_kwargs,
    }
    return OptimizedModel(model, settings)


class OptimizedModel(torch._dynamo.OptimizedModule):
    """A compiled model with a sparse and a dense graph. Made by :func:`optimize`."""

    def __init__(self, model: nn.Module, settings: dict[str, Any]) -> None:
        made = Regions(model, settings) if settings["regional"] else Whole(model, settings)
        super().__init__(model, made.context)
        # Plain attributes would be set on the wrapped model.
        object.__setattr__(self, "_vmoba", _State(settings, made))
        # Under an outer torch.compile the graphs made here must still run, not be traced through as plain dense code.
        self.forward = torch.compiler.disable(self._call)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        state = self._vmoba
        dense = self._uses_dense(kwargs)
        state.ran_dense = dense
        if not state.checked:
            check_degrees(self._orig_mod)
        with plainly(self._orig_mod, (args, kwargs)):
            result = (state.made.run_dense if dense else state.made)(*args, **kwargs)
        if not dense and state.made.graphs() not in state.checked:
            self._check_coverage()
            state.checked.add(state.made.graphs())
        return result

    def _uses_dense(self, kwargs: dict[str, Any]) -> bool:
        """What was asked for, or what the step of the pipeline that is running asks for."""
        state, config = self._vmoba, self._vmoba.settings["config"]
        # With gradients on it is no denoising loop, whatever scheduler a trainer holds.
        if state.dense is not None or config.dense_steps == 0 or torch.is_grad_enabled():
            return bool(state.dense)
        pipeline = calling_pipeline(self)
        if pipeline is None:
            return False
        step = state.clock.read(pipeline, kwargs.get("timestep"))
        if step is None:
            if not state.told:
                warn(
                    f"vmoba_compile: {type(pipeline).__name__} does not show which denoising step it is at, so that all are"
                    " sparse; set fast.set_dense(True) for the first ones, in its callback"
                )
                state.told = True
            return False
        dense_steps = config.dense_step_count(step.count)
        if isinstance(config.dense_steps, int):  # a scheduler of second order calls the model twice a step
            dense_steps *= getattr(pipeline.scheduler, "order", 1)
        return bool(step.index < dense_steps)

    def _check_coverage(self) -> None:
        """Judge one call by the graphs that it ran: none where Dynamo ran the model eagerly, that is dense."""
        settings, made = self._vmoba.settings, self._vmoba.made
        together, times = made.account()
        if settings["strict"]:
            check_strict(together)
        check_coverage(together, strict=settings["strict"], expect=settings["expect"])
        name = type(self._orig_mod).__name__
        if not together.rewritten and together.counts.keys() != {Reason.NOT_COMPILED.value}:
            found = together.summary() if len(together) else NO_ATTENTION
            warn(f"vmoba_compile left {name} dense: {found}; see vmoba_compile.report()")
        lost = [site for site in together if site.reason is Reason.NOT_COMPILED]
        if lost:
            warn(f"vmoba_compile left {len(lost)} attentions of {name} dense, such as {lost[0].path}: {lost[0].detail}")
        if times > 1:
            message = (
                f"one compiled graph of {name} served {times} layers, which so share a layer number and a scheme; "
                "compile the model without graph breaks (fullgraph=True shows them)"
            )
            if settings["strict"]:
                raise CoverageError(f"strict=True, but {message}")
            warn(f"vmoba_compile: {message}")

    def set_dense(self, dense: bool | None) -> bool | None:
        """Use the dense graph (True) or the sparse one (False) from the next call on; returns what was set before.

        None, as at first, is sparse but for the first steps of a diffusers pipeline.
        """
        before = self._vmoba.dense
        self._vmoba.dense = None if dense is None else bool(dense)
        return before

    def is_dense(self) -> bool:
        """True while the dense graph is used; where nothing is set, True where the latest call used it."""
        state = self._vmoba
        return state.ran_dense if state.dense is None else state.dense

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Within ``with fast.dense():`` the model runs with its own dense attention. Nothing is recompiled."""
        before = self.set_dense(True)
        try:
            yield
        finally:
            self.set_dense(before)

    def schedule(self, steps: int | Iterable[Any], dense_steps: float | int | None = None) -> Schedule:
        """Denoising steps of which the first are dense: a number of steps, or the timesteps themselves.

        ``dense_steps`` is a fraction or a count, the configuration's unless given. See :class:`Schedule`.
        """
        config: VMoBAConfig = self._vmoba.settings["config"]
        if dense_steps is not None:
            config = VMoBAConfig.from_dict(config.to_dict() | {"dense_steps": dense_steps})
        if isinstance(steps, (bool, float)) or (isinstance(steps, int) and steps < 0):
            raise ValueError(f"steps must be a number of steps (int, at least 0) or the timesteps, not {steps!r}")
        if isinstance(steps, int):
            steps = range(steps)
        items = steps if isinstance(steps, Sized) else list(steps)
        return Schedule(self, items, len(items), config.dense_step_count(len(items)))

    def __bool__(self) -> bool:
        # Otherwise truth asks for the length, which torch's class refuses where the model has none.
        return True

    def __reduce__(self) -> tuple[Any, ...]:
        return _remade, (self._orig_mod, self._vmoba.settings, self._vmoba.dense)


def _remade(model: nn.Module, settings: dict[str, Any], dense: bool | None) -> OptimizedModel:
    made = OptimizedModel(model, settings)
    made.set_dense(dense)
    return made


class _State:
    """What an OptimizedModel holds beside the model."""

    def __init__(self, settings: dict[str, Any], made: Whole | Regions) -> None:
        self.settings = settings
        self.made = made
        self.dense: bool | None = None  # None: as the pipeline's step asks for
        self.ran_dense = False
        self.clock = Clock()
        self.told = False  # that a pipeline does not show its steps
        self.checked: set[Hashable] = set()  # the sequences of graphs that were judged


def report(optimized: nn.Module) -> Report:
    """What was rewritten so far in a model from :func:`optimize`, or from ``torch.compile(backend="vmoba")`` that was
    given ``options={"report": Report()}``. Filled at the first call.

    Raises:
        TypeError: the module was compiled by neither.
    """
    if isinstance(optimized, OptimizedModel):
        return optimized._vmoba.made.report
    callback: Any = getattr(getattr(optimized, "dynamo_ctx", None), "callback", None)
    while hasattr(callback, "_torchdynamo_orig_backend"):
        callback = callback._torchdynamo_orig_backend
    found = getattr(callback, "kwargs", {}).get("options", {}).get("report")
    if isinstance(found, Report):
        return found
    raise TypeError(
        "no report: pass a model from vmoba_compile.optimize, or compile with "
        "torch.compile(model, backend='vmoba', options={'report': vmoba_compile.Report()})"
    )
