"""``optimize``: wrap a model so that its dense video self-attention runs as VMoBA attention."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed, TorchRuntimeError

from .backend import NO_ATTENTION, Inner, Rewriter, check_coverage, check_grid, inner_compiler, warn
from .config import VMoBAConfig, as_config
from .handover import Handover
from .kernels.partition import Triple
from .passes import CoverageError, InputError, Report, RewriteError
from .schedule import Schedule


def optimize(
    model: nn.Module,
    config: VMoBAConfig | Mapping[str, Any] | None = None,
    *,
    grid: Triple | None = None,
    inner: str | Inner = "inductor",
    strict: bool = False,
    expect: int | None = None,
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
        compile_kwargs: ``fullgraph``, ``dynamic``, ``mode``, ``options`` and the rest, as for ``torch.compile``;
            ``dynamic`` is False unless given, since blocks and ``min_tokens`` belong to a size.

    Returns:
        A module that behaves as ``torch.compile``'s result does (attributes, ``state_dict``, ``train``/``eval``), with
        ``dense()`` and ``schedule()`` besides. Graphs are made at the first call.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, unknown or out of range.

    The first call may raise :class:`GridError` (``grid`` contradicts the graph), :class:`CoverageError` (``strict`` or
    ``expect`` not met) or :class:`InputError` (the model rejects the inputs); it warns where nothing was rewritten.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise TypeError("model is compiled already; pass the module that torch.compile or optimize was given")
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
        "compile_kwargs": compile_kwargs,
    }
    return OptimizedModel(model, settings)


def compile_with(model: nn.Module, backend: Inner, compile_kwargs: Mapping[str, Any]) -> Any:
    """``torch.compile`` with its own room for recompilations, where this torch offers that."""
    kwargs = {name: value for name, value in compile_kwargs.items() if name not in ("mode", "options")}
    # Blocks and min_tokens belong to a size: each gets a graph of its own unless told otherwise.
    kwargs.setdefault("dynamic", False)
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        kwargs.setdefault("isolate_recompiles", True)
    return torch.compile(model, backend=backend, **kwargs)


def whole_graphs() -> Any:
    """Dynamo set to go on over a number or a length read from a tensor, where it would cut the graph: masks of text."""
    return torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True)


class OptimizedModel(torch._dynamo.OptimizedModule):
    """A compiled model with a sparse and a dense graph. Made by :func:`optimize`."""

    def __init__(self, model: nn.Module, settings: dict[str, Any]) -> None:
        kwargs = settings["compile_kwargs"]
        compiler = inner_compiler(settings["inner"], kwargs.get("mode"), kwargs.get("options"))
        handover = Handover()
        rewriter = Rewriter(settings["config"], settings["grid"], compiler, settings["strict"], handover=handover)
        sparse = compile_with(model, rewriter, kwargs)
        super().__init__(model, sparse.dynamo_ctx)
        dense = compile_with(model, compiler, kwargs)
        # Plain attributes would be set on the wrapped model.
        object.__setattr__(self, "_vmoba", _State(settings, rewriter, handover, self.forward, dense.forward))
        # Under an outer torch.compile the graphs made here must still run, not be traced through as plain dense code.
        self.forward = torch.compiler.disable(self._call, recursive=False)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        state = self._vmoba
        rewriter = state.rewriter
        ran: list[Report] = []
        rewriter.ran = ran
        state.handover.begin()
        try:
            with whole_graphs():
                result = (state.dense_forward if state.dense else state.sparse_forward)(*args, **kwargs)
        except BackendCompilerFailed as error:
            if isinstance(error.inner_exception, RewriteError):
                raise error.inner_exception from None
            raise
        except TorchRuntimeError as error:
            raise _input_error(self._orig_mod, (args, kwargs), error) from error
        finally:
            rewriter.ran = None
        if not state.dense:
            graphs = tuple(map(id, ran))
            if graphs not in state.checked:
                self._check_coverage(ran)
                state.checked.add(graphs)
        return result

    def _check_coverage(self, ran: list[Report]) -> None:
        """Judge one call by the graphs that it ran: none where Dynamo ran the model eagerly, that is dense."""
        settings = self._vmoba.settings
        together = Report([site for report in ran for site in report])
        check_coverage(together, strict=settings["strict"], expect=settings["expect"])
        name = type(self._orig_mod).__name__
        if not together.rewritten:
            found = together.summary() if len(together) else NO_ATTENTION
            warn(f"vmoba_compile left {name} dense: {found}; see vmoba_compile.report()")
        times = max((ran.count(report) for report in ran if report.rewritten), default=0)
        if times > 1:
            message = (
                f"one compiled graph of {name} served {times} layers, which so share a layer number and a scheme; "
                "compile the model without graph breaks (fullgraph=True shows them)"
            )
            if settings["strict"]:
                raise CoverageError(f"strict=True, but {message}")
            warn(f"vmoba_compile: {message}")

    def set_dense(self, dense: bool) -> None:
        """Use the dense graph (True) or the sparse one (False) from the next call on."""
        self._vmoba.dense = bool(dense)

    def is_dense(self) -> bool:
        """True while the dense graph is used."""
        return self._vmoba.dense

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Within ``with fast.dense():`` the model runs with its own dense attention. Nothing is recompiled."""
        before = self._vmoba.dense
        self.set_dense(True)
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
        return OptimizedModel, (self._orig_mod, self._vmoba.settings)


class _State:
    """What an OptimizedModel holds beside the model."""

    def __init__(
        self, settings: dict[str, Any], rewriter: Rewriter, handover: Handover, sparse_forward: Any, dense_forward: Any
    ) -> None:
        self.settings = settings
        self.rewriter = rewriter
        self.handover = handover
        self.sparse_forward = sparse_forward
        self.dense_forward = dense_forward
        self.dense = False
        self.checked: set[tuple[int, ...]] = set()  # the sequences of graphs that were judged


def report(optimized: nn.Module) -> Report:
    """What was rewritten so far in a model from :func:`optimize`, or from ``torch.compile(backend="vmoba")`` that was
    given ``options={"report": Report()}``. Filled at the first call.

    Raises:
        TypeError: the module was compiled by neither.
    """
    if isinstance(optimized, OptimizedModel):
        return optimized._vmoba.rewriter.report
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


def _input_error(model: nn.Module, inputs: Any, error: TorchRuntimeError) -> InputError:
    """One sentence for a failure of the model's own code on these inputs."""
    devices: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters():
        devices.setdefault(str(parameter.device), []).append(f"parameter {name}")
    for path, leaf in torch.utils._pytree.tree_flatten_with_path(inputs)[0]:
        if isinstance(leaf, torch.Tensor):
            name = torch.utils._pytree.keystr(path[1:]).strip("[]'")
            devices.setdefault(str(leaf.device), []).append(f"input {name}")
    if len(devices) > 1 and "device" in str(error):
        places = "; ".join(f"{names[0]} on {device}" for device, names in devices.items())
        return InputError(f"model and inputs are on several devices: {places}. Move them to one device.")
    told = re.findall(r"got \w+\(([\"'])(.*?)\1\)", str(error), re.DOTALL)
    cause = told[-1][1] if told else str(error).split("from user code:")[0].strip().splitlines()[0]
    frames = re.findall(r'File "([^"]+)", line (\d+)', str(error))
    own = [frame for frame in frames if "/torch/" not in frame[0]] or frames
    where = f" at {Path(own[-1][0]).name}:{own[-1][1]}" if own else ""
    return InputError(
        f"{type(model).__name__} itself rejects these inputs{where}: {cause}. The plain model fails alike; check the "
        "inputs' dtype, channels, and frames, height and width against the model's position table and patch size."
    )
