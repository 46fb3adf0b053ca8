"""A model compiled as a whole, sparse and dense."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import nn

from .backend import Rewriter, inner_compiler
from .compiling import compile_with
from .handover import Handover
from .passes import Report


class Whole:
    """The sparse and the dense form of a model, each compiled at its first call."""

    def __init__(self, model: nn.Module, settings: dict[str, Any]) -> None:
        kwargs = settings["compile_kwargs"]
        compiler = inner_compiler(settings["inner"], kwargs.get("mode"), kwargs.get("options"))
        self._handover = Handover()
        self.rewriter = Rewriter(
            settings["config"],
            settings["grid"],
            compiler,
            settings["strict"],
            handover=self._handover,
            dump_dir=settings["dump_dir"],
        )
        self._sparse = compile_with(model, self.rewriter, kwargs)
        self._dense = compile_with(model, compiler, kwargs)
        self.context = self._sparse.dynamo_ctx
        self._ran: list[Report] = []

    @property
    def report(self) -> Report:
        return self.rewriter.report

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One sparse forward."""
        self._ran = self.rewriter.ran = []
        self._handover.begin()
        try:
            return self._sparse.forward(*args, **kwargs)
        finally:
            self.rewriter.ran = None

    def run_dense(self, *args: Any, **kwargs: Any) -> Any:
        """One forward with the model's own attention."""
        self._handover.begin()
        return self._dense.forward(*args, **kwargs)

    def graphs(self) -> Hashable:
        """The graphs that the latest sparse forward ran."""
        return tuple(map(id, self._ran))

    def account(self) -> tuple[Report, int]:
        """Their sites, and how often the one of them that ran most often did."""
        times = max((self._ran.count(report) for report in self._ran if report.rewritten), default=0)
        return Report([site for report in self._ran for site in report]), times
