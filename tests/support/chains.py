"""Recorded chains run in Triton's interpreter from the data alone, on memory that holds NaN wherever nothing was written."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor
from vmoba_compile.kernels import aot, aot_ptx


def interpret(chain: aot.Chain, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The outputs of a chain, through JSON and back. A value that a call has changed in place is not there any more."""
    chain = aot.Chain.from_json(chain.to_json())
    tensors: dict[int, Tensor] = dict(enumerate(inputs))
    for call in chain.calls:
        kernel = aot_ptx.find(call.kernel)
        arguments = dict(call.constants) | call.numbers
        read = {port.parameter: tensors[port.value] for port in call.inputs if port.parameter}
        made = []
        for port in call.outputs:
            if port.alias >= 0:
                made.append(tensors.pop(call.inputs[port.alias].value))
                continue
            value = chain.values[port.value]
            memory = torch.full((value.bytes,), 255, dtype=torch.uint8).view(getattr(torch, value.dtype))
            made.append(memory.view(value.shape))
            read[port.parameter] = made[-1]
        for name, x in read.items():
            arguments[name] = x.view(next(dtype for dtype, kind in aot._POINTERS.items() if kind == call.types[name]))
        ordered = [arguments[name] for name in inspect.signature(kernel.fn).parameters]
        kernel[call.grid](*ordered)
        tensors |= {port.value: x for port, x in zip(call.outputs, made, strict=True)}
    return tuple(tensors[value] for value in chain.outputs)
