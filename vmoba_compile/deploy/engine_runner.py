"""Run an engine on torch tensors: to verify and to time what ``build_engine`` made."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..passes import ExportError
from .engine import Engine
from .tensorrt_library import find_library

DTYPES = {
    "FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16, "INT64": torch.int64, "INT32": torch.int32,
    "INT8": torch.int8, "UINT8": torch.uint8, "BOOL": torch.bool, "FP8": torch.float8_e4m3fn,
}  # fmt: skip


class EngineRunner:
    """An engine, loaded on the current GPU; call it with its inputs by name, and it gives its outputs by name.

    Nothing waits: the work is enqueued on the current stream. Inputs must have the engine's dtypes; those that are not
    contiguous on the GPU are copied.

    Args:
        engine: what ``build_engine`` returned, or the path of its file.
        runtime: the library that built it; taken from an ``Engine``.

    Raises:
        ExportError: the library is missing, there is no GPU, or the library cannot load the engine on this GPU.
    """

    def __init__(self, engine: Engine | str | os.PathLike[str], *, runtime: str = "auto") -> None:
        path = Path(engine.path if isinstance(engine, Engine) else engine)
        library = find_library(engine.runtime if isinstance(engine, Engine) else runtime)
        if not torch.cuda.is_available():
            raise ExportError("an engine runs on a GPU, and torch sees none")
        self._log = library.log()
        self._runtime = library.module.Runtime(self._log)
        self._engine: Any = self._runtime.deserialize_cuda_engine(path.read_bytes())
        self._context: Any = self._engine.create_execution_context() if self._engine is not None else None
        if self._context is None:
            cause = " ".join(self._log.errors[-1].split()) if self._log.errors else "it gives no reason"
            raise ExportError(f"{library} cannot load {path} on {torch.cuda.get_device_name()}: {cause}")
        kind = library.module.TensorIOMode
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        self.inputs = tuple(name for name in names if self._engine.get_tensor_mode(name) == kind.INPUT)
        self.outputs = tuple(name for name in names if self._engine.get_tensor_mode(name) == kind.OUTPUT)
        host = library.module.TensorLocation.HOST
        self._on_host = {name for name in names if self._engine.get_tensor_location(name) == host}
        self._library = library

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Outputs by name. ValueError: inputs are missing, unknown, of another dtype, or of a shape that was not built."""
        if set(inputs) != set(self.inputs):
            raise ValueError(f"the engine's inputs are {', '.join(self.inputs)}, not {', '.join(inputs) or 'none'}")
        held = [self._give(name, inputs[name]) for name in self.inputs]
        missing = self._context.infer_shapes()
        if missing:
            raise ExportError(f"{self._library} cannot infer shapes from these inputs: {', '.join(missing)} is missing")
        outputs = {name: self._take(name) for name in self.outputs}
        stream = torch.cuda.current_stream()
        if not self._context.execute_async_v3(stream.cuda_stream):
            raise ExportError(f"{self._library} cannot run the engine: {' '.join(self._log.errors[-1:])}")
        for tensor in held:
            if tensor.is_cuda:
                tensor.record_stream(stream)
        return outputs

    def _dtype(self, name: str) -> torch.dtype:
        kind = self._engine.get_tensor_dtype(name).name
        if kind not in DTYPES:
            raise ExportError(f"{name} of the engine is of type {kind}, which torch tensors do not have")
        return DTYPES[kind]

    def _give(self, name: str, tensor: Tensor) -> Tensor:
        if tensor.dtype != self._dtype(name):
            raise ValueError(f"input {name!r} must be {self._dtype(name)}, not {tensor.dtype}")
        tensor = tensor.detach().to("cpu" if name in self._on_host else "cuda").contiguous()
        if not self._context.set_input_shape(name, tuple(tensor.shape)):
            least, _, greatest = (tuple(x) for x in self._engine.get_tensor_profile_shape(name, 0))
            raise ValueError(
                f"input {name!r} has shape {tuple(tensor.shape)}, but the engine was built for {least} to {greatest}"
            )
        tensor = tensor if tensor.numel() else tensor.new_empty(1)  # an address is wanted even of nothing
        self._context.set_tensor_address(name, tensor.data_ptr())
        return tensor

    def _take(self, name: str) -> Tensor:
        shape = tuple(self._context.get_tensor_shape(name))
        if any(extent < 0 for extent in shape):
            raise ExportError(f"the shape of output {name!r} depends on values, which this runner does not serve")
        tensor = torch.empty(shape, dtype=self._dtype(name), device="cuda")
        self._context.set_tensor_address(name, tensor.data_ptr())
        return tensor
