"""Denoising schedules: the first steps dense, the others sparse (arXiv 2506.23858, section 4.1)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Protocol


class _Switch(Protocol):
    def set_dense(self, dense: bool | None) -> bool | None: ...


class Schedule:
    """Steps of one denoising run, of which the first ``dense_steps`` use dense attention.

    Iterate over it in place of the timesteps, ``for t in fast.schedule(scheduler.timesteps):``, or enter it and call
    :meth:`step` after each step: ``with fast.schedule(50) as schedule: … schedule.step()``. However often the model is
    called within a step (guidance), it uses the same attention. At the end the model is as it was before.
    """

    def __init__(self, switch: _Switch, steps: Iterable[Any], count: int, dense_steps: int) -> None:
        self._switch = switch
        self._steps = steps
        self.count = count
        self.dense_steps = dense_steps
        self.current = 0
        self._before: bool | None = None

    @property
    def dense(self) -> bool:
        """True while the current step uses dense attention."""
        return self.current < self.dense_steps

    def step(self) -> None:
        """End the current step."""
        self.current += 1
        self._switch.set_dense(self.dense)

    def __enter__(self) -> Schedule:
        self.current = 0
        self._before = self._switch.set_dense(self.dense)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._switch.set_dense(self._before)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        with self:
            for item in self._steps:
                yield item
                self.step()
