"""Where a denoising run stands, asked of the diffusers pipeline that is calling the model."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import nn

HOLDERS = ("self", "components")  # what pipelines, and the blocks of modular ones, name the holder of the models


@dataclass(frozen=True)
class Progress:
    """Step ``index`` (from 0) of ``count`` denoising steps."""

    index: int
    count: int


def calling_pipeline(model: nn.Module) -> Any | None:
    """The object that holds ``model`` beside a scheduler and whose method is running, None where there is none.

    Known by these attributes, not by its class: a pipeline of one's own that is built alike is found as well.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_flags & inspect.CO_OPTIMIZED and any(name in code.co_varnames[:2] for name in HOLDERS):
            known = frame.f_locals
            holders = [known.get(name) for name in HOLDERS]
            if sys.version_info < (3, 13):
                known.clear()  # a copy, which would keep the caller's tensors alive until it returns
            for holder in holders:
                if _holds(holder, model):
                    return holder
        frame = frame.f_back
    return None


def _holds(holder: Any, model: nn.Module) -> bool:
    if holder is None or isinstance(holder, nn.Module):
        return False
    attributes = getattr(holder, "__dict__", {})
    if getattr(attributes.get("scheduler"), "timesteps", None) is None:
        return False
    return any(model is x for value in attributes.values() for x in _within(value))


def _within(value: Any) -> Iterator[Any]:
    """What an attribute holds: itself, and one level of a wrapper, a dict or a list."""
    yield value
    if isinstance(value, nn.Module):
        yield from value.children()
    elif isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, (list, tuple)):
        yield from value


class Clock:
    """Reads the step from a pipeline. It waits for the device once, at most, in a run's first step."""

    def __init__(self) -> None:
        self._first: tuple[Any, float] | None = None  # timesteps of a run that has not stepped, and the first one

    def read(self, pipeline: Any, timestep: Any) -> Progress | None:
        """Where the run is that calls the model with ``timestep``; None where the scheduler does not show it."""
        scheduler, timesteps = pipeline.scheduler, pipeline.scheduler.timesteps
        number = min(getattr(pipeline, "num_timesteps", None) or len(timesteps), len(timesteps))
        # A run from a noised video begins later; schedulers that know nothing of it are cut to what runs.
        skipped = (getattr(scheduler, "begin_index", len(timesteps) - number)) or 0
        current = getattr(pipeline, "current_timestep", None)
        if isinstance(current, torch.Tensor) and current.dim():
            return None  # a timestep for each frame: there is no one step
        index = _place(current, timesteps)
        if index is None:
            index = self._counted(scheduler, timesteps, timestep)
        if index is None:
            return None
        return Progress(max(0, index - skipped), min(number, len(timesteps) - skipped))

    def _counted(self, scheduler: Any, timesteps: Any, timestep: Any) -> int | None:
        """The scheduler's own count, which is None until the first step ends."""
        if not hasattr(scheduler, "step_index"):
            return None
        if scheduler.step_index is not None:
            self._first = None
            return int(scheduler.step_index)
        # Some loops step copies of their scheduler, or none: its count then stays None while the timestep moves on.
        if isinstance(timestep, torch.Tensor) and timestep.numel():
            value = float(timestep.max())
        elif isinstance(timestep, (int, float)):
            value = float(timestep)
        else:
            return None
        if self._first is None or self._first[0] is not timesteps:
            self._first = (timesteps, value)
        return 0 if self._first[1] == value else None


def _place(current: Any, timesteps: Any) -> int | None:
    """The place of a timestep that is a view of one entry: read from where it lies, not from its value."""
    if not (isinstance(current, torch.Tensor) and isinstance(timesteps, torch.Tensor)):
        return None
    if current.dim() or timesteps.dim() != 1 or current.untyped_storage()._cdata != timesteps.untyped_storage()._cdata:
        return None
    step = max(1, timesteps.stride(0))
    return (current.storage_offset() - timesteps.storage_offset()) // step
