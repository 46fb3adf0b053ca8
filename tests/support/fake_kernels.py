"""Kernels that are compiled as far as ``launches`` can tell, and run on the CPU: plain functions of arrays and numbers.

An annotation tells what a pointer points to: ``def add(x: numpy.float32, size): ...`` gets ``x`` as a function from a
number of elements to the array that begins there. So a kernel reads and writes whatever address it is given.
"""

from __future__ import annotations

import ctypes
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy
import torch


def pointer(value: Any) -> int:
    """The address that Triton's launcher would take from an argument."""
    return value if isinstance(value, int) else value.data_ptr()


def array_at(address: int, dtype: type) -> Callable[[int], numpy.ndarray]:
    def read(size: int) -> numpy.ndarray:
        data = (ctypes.c_byte * (size * numpy.dtype(dtype).itemsize)).from_address(address)
        return numpy.frombuffer(data, dtype)

    return read


@dataclass
class Descriptor:
    """Stands for Triton's tensor descriptor."""

    base: Any
    shape: tuple[int, ...]
    block_shape: tuple[int, ...]


class Call(NamedTuple):
    """What reached the launcher."""

    grid: tuple[int, int, int]
    stream: int
    arguments: tuple[Any, ...]


class Kernel:
    """``function`` as a kernel; ``calls`` counts what went through Triton's own launch, ``replayed`` what did not."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function
        self.signature = inspect.signature(function, eval_str=True)
        self.calls = 0
        self.replayed: list[Call] = []
        self.compiled: Any = SimpleNamespace(run=self._replay, function=1, packed_metadata=(4, 1, 0))

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def launch(*args: Any, **options: Any) -> Any:
            self.calls += 1
            known = {name: x for name, x in options.items() if name in self.signature.parameters}
            self._run(self.signature.bind(*args, **known).arguments.values())
            return self.compiled

        return launch

    def _replay(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *args) -> None:
        assert (function, metadata, launch_metadata, enter, leave) == (1, (4, 1, 0), None, None, None)
        self.replayed.append(Call((x, y, z), stream, args))
        self._run(args)

    def _run(self, args: Any) -> None:
        parameters = self.signature.parameters.values()
        assert not any(isinstance(x, torch.Tensor) and x.numel() and not x.data_ptr() for x in args)
        self.function(*[
            x if p.annotation is p.empty else array_at(pointer(getattr(x, "base", x)), p.annotation)
            for p, x in zip(parameters, args, strict=True)
        ])  # fmt: skip
