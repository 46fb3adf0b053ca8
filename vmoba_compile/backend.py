"""The Dynamo backend: rewrite the captured graph, account for it, hand it to the inner compiler."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensor

from .config import VMoBAConfig, as_config
from .handover import Handover, copied
from .kernels.api import triple
from .kernels.partition import Triple
from .passes import CoverageError, Report
from .passes.dump import dump
from .passes.evidence import Evidence, Handed, numbered
from .passes.landmarks import Landmarks
from .passes.rewrite import rewrite_one

Inner = Callable[..., Callable[..., Any]]


def inner_compiler(inner: str | Inner, mode: str | None = None, options: Mapping[str, Any] | None = None) -> Inner:
    """The compiler that takes the rewritten graph: a backend's name ("inductor", "eager", …) or a callable.

    ``mode`` and ``options`` are Inductor's, as in ``torch.compile``. Its mix-order reductions are off unless ``options``
    name them, where they are known to lose gradients.
    """
    if callable(inner):
        if mode or options:
            raise ValueError("mode and options are for inner='inductor'; a callable takes the graph and inputs alone")
        return inner
    if inner == "inductor":
        patches = dict(torch._inductor.list_mode_options(mode)) if mode and mode != "default" else {}
        return _Inductor(_sound() | patches | dict(options or {}))
    if mode or options:
        raise ValueError(f"mode and options are for inner='inductor', not {inner!r}")
    if not isinstance(inner, str) or inner == "vmoba" or inner not in torch._dynamo.list_backends(exclude_tags=()):
        known = ", ".join(name for name in torch._dynamo.list_backends(exclude_tags=()) if name != "vmoba")
        raise ValueError(f"inner must be a callable or one of torch.compile's backends ({known}), not {inner!r}")
    return torch._dynamo.lookup_backend(inner)


def _sound() -> dict[str, Any]:
    """Without mix-order reductions: they leave gradients of modulation tables, such as Wan's, unwritten memory.

    https://github.com/pytorch/pytorch/issues/193061, in torch 2.10 to 2.13.
    """
    name = "triton.mix_order_reduction"
    broken = (2, 10) <= tuple(map(int, torch.__version__.split(".")[:2])) <= (2, 13)
    return {name: False} if broken and name in torch._inductor.config.get_config_copy() else {}


@dataclass
class _Inductor:
    patches: dict[str, Any]

    @property
    def __name__(self) -> str:
        return "inductor"

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[torch.Tensor]) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx

        compiled: Any = compile_fx(gm, example_inputs, config_patches=self.patches)  # type: ignore[arg-type]
        return compiled


@dataclass(eq=False)
class Rewriter:
    """A Dynamo backend with its configuration and what it has done so far.

    One instance serves all graphs of one model: layer numbers and, with a ``handover``, grids go on over graph breaks.
    """

    config: VMoBAConfig
    grid: Triple | None
    inner: Inner
    strict: bool = False
    report: Report = field(default_factory=Report)
    graphs: int = 0
    ran: list[Report] | None = None  # reports of the graphs that ran, where somebody wants to know
    latest: Report | None = None
    handover: Handover | None = None  # where the beginning of a call of the model is known
    landmarks: Landmarks | None = None  # of a dry run, where it is to read some
    dump_dir: str | Path | None = None  # a folder for the text of every graph, before and after the rewrite
    label: str = ""  # begins the names of those files

    @property
    def __name__(self) -> str:
        """How torch.compile names the backend in its messages."""
        return "vmoba"

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[torch.Tensor]) -> Callable[..., Any]:
        return _Graph(self, gm, example_inputs).run

    def compile(self, gm: fx.GraphModule, inputs: Sequence[Any], handed: Handed) -> _Version:
        """Rewrite one graph, given what others told of its inputs, and compile it."""
        self.graphs += 1
        name = f"{self.label}graph_{self.graphs}"
        dump(gm, f"{name}_before", self.dump_dir)
        found, told = rewrite_one(gm, self.config, self.grid, self.report.layers, handed, self.graphs, self.landmarks)
        dump(gm, f"{name}_after", self.dump_dir)
        self._take(found)
        if self.strict:
            check_strict(found)
        return _Version(self.inner(gm, inputs), found, told)

    def note(self, version: _Version, inputs: Sequence[Any], outputs: Any) -> None:
        """A graph ran."""
        if self.latest is not version.report:
            self._take(version.report)
        # DDP runs each piece on fake tensors while it compiles the next one.
        ran = self.ran  # another thread's call may end meanwhile
        if ran is not None and not any(isinstance(x, FakeTensor) for x in inputs):
            ran.append(version.report)
        if self.handover is not None and isinstance(outputs, (tuple, list)):
            self.handover.note(inputs, outputs, version.told)

    def _take(self, found: Report) -> None:
        """The report tells of the graph that ran last: one of several sizes, or of training and inference."""
        self.report.merge(found)
        self.latest = found


@dataclass(frozen=True, eq=False)
class _Version:
    run: Callable[..., Any]
    report: Report
    told: list[Evidence | None]  # of the outputs


class _Graph:
    """One captured graph, compiled anew where it gets inputs of which other graphs tell something else."""

    def __init__(self, rewriter: Rewriter, gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
        known = rewriter.handover
        handed = numbered([None if known is None else known.of(x) for x in inputs])
        self.rewriter = rewriter
        self.places = [place for place, evidence in enumerate(handed) if evidence is not None]
        self.plain = copied(gm) if self.places else None
        self.only = rewriter.compile(gm, inputs, handed)
        self.versions = {self._read(inputs): self.only}

    def run(self, *inputs: Any) -> Any:
        version = self._version(inputs) if self.places else self.only
        outputs = version.run(*inputs)
        self.rewriter.note(version, inputs, outputs)
        return outputs

    def _read(self, inputs: Sequence[Any]) -> Handed:
        known = self.rewriter.handover
        return numbered([None if known is None else known.of(inputs[place]) for place in self.places])

    def _version(self, inputs: Sequence[Any]) -> _Version:
        read = self._read(inputs)
        if read in self.versions:
            return self.versions[read]
        handed: list[Evidence | None] = [None] * len(inputs)
        for place, evidence in zip(self.places, read, strict=True):
            handed[place] = evidence
        assert self.plain is not None
        if any(isinstance(x, int) for x in inputs):  # sizes that are symbols in the graph
            warn("vmoba_compile: a graph after a graph break ran dense: its grid changed; compile with dynamic=False")
            self.versions[read] = _Version(self.plain.forward, Report(), [])
        else:
            self.versions[read] = self.rewriter.compile(copied(self.plain), inputs, tuple(handed))
        return self.versions[read]


def warn(message: str) -> None:
    """Warn at the line that called the model."""
    level, own = 2, str(Path(__file__).parent)
    frame = sys._getframe(1)
    while frame.f_back is not None and ("/torch/" in (name := frame.f_code.co_filename) or name.startswith(own)):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)


def check_strict(report: Report) -> None:
    """Raise CoverageError where an attention that may be over a video was left dense."""
    missed = [site for site in report if not site.reason.intended]
    if missed:
        lines = [f"  {site.path or site.source}: {site.reason.value}: {site.detail}" for site in missed]
        raise CoverageError("strict=True, but not every video attention was rewritten:\n" + "\n".join(lines))


def check_coverage(report: Report, *, strict: bool, expect: int | None) -> None:
    """Raise CoverageError where fewer sites were rewritten than wanted, over all graphs of a call."""
    done = len(report.rewritten)
    found = f":\n{report}" if len(report) else ": " + NO_ATTENTION
    if expect is not None and done < expect:
        raise CoverageError(f"expect={expect}, but {done} attentions were rewritten{found}")
    if strict and not done:
        raise CoverageError(f"strict=True, but no attention was rewritten{found}")


NO_ATTENTION = (
    "no compiled graph with attention ran; is this the video transformer, does it run under torch.compile, and was "
    "torch._dynamo.config.recompile_limit not reached?"
)


def check_grid(grid: object) -> Triple | None:
    return None if grid is None else triple("grid", grid)


def vmoba(
    gm: fx.GraphModule,
    example_inputs: Sequence[torch.Tensor],
    *,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """``torch.compile(model, backend="vmoba", options={...})``.

    Options: every field of :class:`VMoBAConfig`, ``config`` (a whole one, or a mapping), ``grid``, ``inner``,
    ``inner_options``, ``strict``, ``expect``, ``dump_dir`` and ``report``, a :class:`Report` that is filled as graphs are
    compiled and that numbers layers on over graph breaks. ``expect`` counts the sites of one graph, so it wants
    ``fullgraph=True``.
    """
    options = dict(options or {})
    given: dict[str, Any] = {name: options.pop(name, None) for name in _OWN_OPTIONS}
    names = {f.name for f in fields(VMoBAConfig)}
    unknown = sorted(set(options) - names)
    if unknown:
        raise ValueError(
            f"unknown option {unknown[0]!r}; the options are {', '.join(sorted(names | set(_OWN_OPTIONS)))}"
        )
    if given["config"] is not None and options:
        raise ValueError(f"give either config or its fields, not both: {', '.join(sorted(options))}")
    report = Report() if given["report"] is None else given["report"]
    before = {id(site) for site in report}
    rewriter = Rewriter(
        config=as_config(options if given["config"] is None else given["config"]),
        grid=check_grid(given["grid"]),
        inner=inner_compiler(given["inner"] or "inductor", mode, given["inner_options"]),
        strict=bool(given["strict"]),
        report=report,
        dump_dir=given["dump_dir"],
        label=_next_label(given["dump_dir"]),
    )
    compiled = rewriter(gm, example_inputs)
    if given["expect"] is not None:
        fresh = Report([site for site in report if id(site) not in before])
        check_coverage(fresh, strict=False, expect=given["expect"])
    return compiled


_OWN_OPTIONS = ("config", "grid", "inner", "inner_options", "strict", "expect", "dump_dir", "report")


def _next_label(folder: str | Path | None) -> str:
    """Each call of the backend is one graph, which must not take the place of those dumped before."""
    return "" if folder is None else f"{len(list(Path(folder).glob('*_before.py')))}_"
