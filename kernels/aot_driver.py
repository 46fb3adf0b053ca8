"""Compiled chains run by the CUDA driver alone: no Triton, and torch only for memory.

What a runtime would do with the data of a :class:`Program`, and the way to check it on a GPU: modules are loaded from the
PTX, and each kernel gets exactly the arguments that the program declares, on its declared grid. Every value is a tensor of
its own, as between the layers of an engine; what is changed in place shares its input's memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .aot_ptx import Kernel, Program

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_DEFAULT_SHARED = 48 * 1024


class DriverError(RuntimeError):
    """A call of the CUDA driver failed."""


class Driver:
    """Functions of libcuda, for the current device and context, which torch has made."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        self._functions: dict[tuple[int, str], ctypes.c_void_p] = {}  # by device and kernel

    def _call(self, name: str, *args: Any) -> None:
        status = getattr(self._library, name)(*args)
        if status:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(status, ctypes.byref(text))
            raise DriverError(f"{name}: {(text.value or b'unknown error').decode()} ({status})")

    def function(self, kernel: Kernel) -> ctypes.c_void_p:
        """The kernel, loaded on the current device; kept for as long as the process runs."""
        place = torch.cuda.current_device(), kernel.key
        if place not in self._functions:
            module, function = ctypes.c_void_p(), ctypes.c_void_p()
            self._call("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(kernel.ptx.encode()))
            self._call("cuModuleGetFunction", ctypes.byref(function), module, kernel.name.encode())
            if kernel.shared > _DEFAULT_SHARED:
                self._call("cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED, kernel.shared)
            self._functions[place] = function
        return self._functions[place]

    def launch(
        self, kernel: Kernel, grid: tuple[int, int, int], inputs: list[int], numbers: list[int], outputs: list[int]
    ) -> None:
        """One launch on torch's current stream; ``inputs`` and ``outputs`` are addresses."""
        if [len(inputs), len(numbers), len(outputs)] != [
            sum(x.startswith(kind) for x in kernel.arguments) for kind in ("input", "number", "output")
        ]:
            raise ValueError(
                f"{kernel.name} takes other arguments than {len(inputs)} inputs, {len(numbers)} and {len(outputs)}"
            )
        values = [
            *map(ctypes.c_uint64, inputs),
            *map(ctypes.c_int32, numbers),
            *map(ctypes.c_uint64, outputs),
        ]
        pointers = (ctypes.c_void_p * len(values))(*[ctypes.cast(ctypes.byref(x), ctypes.c_void_p) for x in values])
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        shape = (*grid, kernel.threads, 1, 1, kernel.shared)
        self._call("cuLaunchKernel", self.function(kernel), *map(ctypes.c_uint, shape), stream, pointers, None)


@cache
def driver() -> Driver:
    return Driver()


def run(program: Program, inputs: Mapping[str, Tensor], poison: bool = False) -> tuple[Tensor, ...]:
    """The outputs of a program for contiguous CUDA tensors; ``poison`` fills new memory with bytes of 255 (NaN) first.

    Raises:
        ValueError: an input has another shape, dtype or layout than the recorded one.
    """
    chain = program.chain
    tensors: dict[int, Tensor] = {}
    for number, name in enumerate(chain.inputs):
        x, expected = inputs[name], chain.values[number]
        given = tuple(x.shape), str(x.dtype).removeprefix("torch.")
        if given != (expected.shape, expected.dtype) or not x.is_contiguous() or not x.is_cuda:
            raise ValueError(
                f"{name} must be a contiguous CUDA tensor {expected.dtype} {list(expected.shape)}, not {given}"
            )
        tensors[number] = x
    device = tensors[0].device
    last = {port.value: i for i, call in enumerate(chain.calls) for port in (*call.inputs, *call.outputs)}
    with torch.cuda.device(device):
        for i, (call, key) in enumerate(zip(chain.calls, program.keys, strict=True)):
            kernel = program.kernels[key]
            for port in call.outputs:
                if port.alias >= 0:
                    tensors[port.value] = tensors[call.inputs[port.alias].value]
                    continue
                value = chain.values[port.value]
                made = torch.empty(value.shape, dtype=getattr(torch, value.dtype), device=device)
                if poison:
                    made.view(torch.uint8).fill_(255)
                tensors[port.value] = made
            addresses = ([tensors[port.value].data_ptr() for port in ports] for ports in (call.inputs, call.outputs))
            given_inputs, given_outputs = addresses
            numbers = [call.numbers[name] for name in kernel.numbers]
            driver().launch(kernel, call.grid, given_inputs, numbers, given_outputs)
            for port in (*call.inputs, *call.outputs):  # freed in stream order
                if last[port.value] == i and port.value not in chain.outputs:
                    tensors.pop(port.value, None)
    return tuple(tensors[value] for value in chain.outputs)
