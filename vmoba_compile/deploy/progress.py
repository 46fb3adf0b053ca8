"""A progress bar for exports, which take minutes for large models."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


class Steps:
    """``with Steps(title, count, shown) as step: step("what begins now")``. ``shown`` None: on a terminal."""

    def __init__(self, title: str, count: int, shown: bool | None) -> None:
        console = Console(stderr=True)
        shown = sys.stderr.isatty() if shown is None else shown
        self._bar = Progress(
            TextColumn(title), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn(),
            console=console, disable=not shown,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=count)
        self._begun = 0

    def __call__(self, name: str) -> None:
        """The step ``name`` begins; those before it are done."""
        self._bar.update(self._task, description=name, completed=self._begun)
        self._begun += 1

    def __enter__(self) -> Steps:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._bar.update(self._task, completed=self._bar.tasks[0].total)
        self._bar.stop()
