"""The Triton interpreter multiplies bfloat16 operands of ``tl.dot`` as the integers that hold their bits: a cure."""

from __future__ import annotations

import numpy
import triton.language as tl
from triton.runtime import interpreter


def _values(operand: interpreter.TensorHandle) -> numpy.ndarray:
    """The numbers of an operand; bfloat16 is the upper half of a float32."""
    if operand.dtype.scalar != tl.bfloat16:
        return operand.data
    return (operand.data.astype(numpy.uint32) << 16).view(numpy.float32)


def _create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    product = numpy.matmul(_values(a), _values(b), dtype=d.data.dtype)
    return interpreter.TensorHandle(product + d.data, d.dtype.scalar)


def install() -> None:
    """Replace the interpreter's product for the rest of the process. No effect on kernels that are compiled."""
    interpreter.InterpreterBuilder.create_dot = _create_dot


def small_selection(monkeypatch) -> None:
    """Small tiles and histograms: several tiles, several levels, and a patient interpreter."""
    from vmoba_compile.kernels import select_triton

    for name, value in {"BLOCK_Q": 32, "BINS": 2048, "BLOCK_BINS": 512, "CHUNK": 256, "CAPACITY": 64}.items():
        monkeypatch.setattr(select_triton, name, value)
    monkeypatch.setattr(select_triton, "REPLICAS", {"head_global": 2, "overall": 2, "block": 1})
