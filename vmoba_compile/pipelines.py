"""Where a denoising run stands, asked of the diffusers pipeline that is calling the model."""

from __future__ import annotations

import sys
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
        if any(name in frame.f_code.co_varnames[:2] for name in HOLDERS):
            known = frame.f_locals
            for name in HOLDERS:
                holder = known.get(name)
                if _holds(holder, model):
                    return holder
        frame = frame.f_back
    return None


def _holds(holder: Any, model: nn.Module) -> bool:
    if holder is None or isinstance(holder, nn.Module):
        return False
    attributes = getattr(holder, "__dict__", {})
    scheduler = attributes.get("scheduler")
    return getattr(scheduler, "timesteps", None) is not None and any(x is model for x in attributes.values())


class Clock:
    """Reads the step from a pipeline, without waiting for the device."""

    def __init__(self) -> None:
        self._first: tuple[Any, float] | None = None  # timesteps of a run that has not stepped, and the first one

    def read(self, pipeline: Any, timestep: Any) -> Progress | None:
        """Where the run is that calls the model with ``timestep``; None where the scheduler does not show it."""
        timesteps = pipeline.scheduler.timesteps
        count = getattr(pipeline, "num_timesteps", None) or len(timesteps)
        skipped = max(0, len(timesteps) - count)  # a run from a noised video begins later
        index = _place(getattr(pipeline, "current_timestep", None), timesteps)
        if index is None:
            index = self._counted(pipeline.scheduler, timesteps, timestep)
        return None if index is None else Progress(max(0, index - skipped), count)

    def _counted(self, scheduler: Any, timesteps: Any, timestep: Any) -> int | None:
        """The scheduler's own count, which is None until the first step ends."""
        if not hasattr(scheduler, "step_index"):
            return None
        if scheduler.step_index is not None:
            self._first = None
            return int(scheduler.step_index)
        # Some pipelines step copies of their scheduler: its count then stays None while the timestep moves on.
        value = float(timestep.max()) if isinstance(timestep, torch.Tensor) and timestep.numel() else 0.0
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
