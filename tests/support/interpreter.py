"""Cures of the Triton interpreter: it multiplies bfloat16 operands of ``tl.dot`` as the integers that hold their bits, and
takes twice the time that it needs."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect

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


_SCALARS = [dtype for dtype in vars(tl).values() if isinstance(dtype, tl.dtype) and dtype is not tl.void]
_NUMPY = {}


def _numpy_dtype(dtype: tl.dtype) -> numpy.dtype:
    """By a table, which the interpreter makes anew in every call."""
    scalar = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
    return _NUMPY["pointer" if isinstance(scalar, tl.pointer_type) else scalar.name]


def _call(self, *args, **kwargs):
    """A kernel's call of another function. The language is patched already, unless it is another module's."""
    modules = [x for x in self.fn.__globals__.values() if inspect.ismodule(x) and x in (tl, tl.core)]
    if any(tl.core.is_builtin(module.load) for module in modules):
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **kwargs)


def install() -> None:
    """Replace parts of the interpreter for the rest of the process. No effect on kernels that are compiled."""
    interpreter.InterpreterBuilder.create_dot = _create_dot
    if _call is interpreter.InterpretedFunction.__call__:
        return
    for dtype in _SCALARS:
        with contextlib.suppress(KeyError):
            _NUMPY[dtype.name] = interpreter._get_np_dtype(dtype)
    _NUMPY["pointer"] = interpreter._get_np_dtype(tl.pointer_type(tl.int8))
    interpreter._get_np_dtype = _numpy_dtype
    interpreter.InterpretedFunction.__call__ = _call
    # Each addition is otherwise done in 64 bits as well: a third of the time, and nothing here comes near 2**31.
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def small_selection(monkeypatch) -> None:
    """Small tiles and histograms: several tiles, several levels, and a patient interpreter."""
    from vmoba_compile.kernels import select_triton

    for name, value in {"BLOCK_Q": 32, "BINS": 2048, "BLOCK_BINS": 512, "CHUNK": 256, "CAPACITY": 64}.items():
        monkeypatch.setattr(select_triton, name, value)
    monkeypatch.setattr(select_triton, "REPLICAS", {"head_global": 2, "overall": 2, "block": 1})
