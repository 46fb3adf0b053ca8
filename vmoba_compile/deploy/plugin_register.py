"""Plugins made known to TensorRT (``tensorrt.plugin``, from 10.7 on, not 10.14) from data alone.

A plugin compiled ahead of time is one kernel on one grid: its name stands for everything, PTX, sizes and integers, so it has
no attributes and equal calls of all layers share it. Functions that ``tensorrt.plugin`` inspects get the signature of the
call's tensors. TensorRT has no tensors of float64: such scratch memory is declared as int64, which kernels do not see.

``trt`` and ``trtp`` are the modules ``tensorrt`` and ``tensorrt.plugin``.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..kernels.partition import Geometry, Triple
from ..passes import ExportError
from .onnx_body import ATTENTION, SELECT

if TYPE_CHECKING:
    from ..kernels.aot import Call, Chain
    from ..kernels.aot_ptx import Kernel, Program

AOT, JIT = "vmoba_aot", "vmoba_jit"  # namespaces
TACTIC = 1  # there is one, and custom ones are greater than 0

# torch's name -> attribute of tensorrt, name in combinations of types
_TYPES = {
    "float32": ("float32", "FP32"), "float16": ("float16", "FP16"), "bfloat16": ("bfloat16", "BF16"),
    "int32": ("int32", "INT32"), "int64": ("int64", "INT64"), "float64": ("int64", "INT64"), "bool": ("bool", "BOOL"),
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What a ``vmoba`` node computes, but for its tensors; ``mode`` is the selection's, ``scale`` the attention's."""

    operator: str
    grid: Triple
    block: Triple
    prefix: int
    suffix: int
    pool: str
    threshold: float
    topk: int
    tile: int
    masked: bool
    mode: str = ""
    scale: float = 0.0

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.grid, self.block, self.prefix, self.suffix)

    @property
    def sizes(self) -> tuple[int, ...]:
        """As the operators take them."""
        return (*self.grid, *self.block, self.prefix, self.suffix)

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Settings:
        data = json.loads(text.rstrip("\0"))
        return cls(**data | {"grid": tuple(data["grid"]), "block": tuple(data["block"])})


def plugin_name(chain: Chain, call: Call, key: str) -> str:
    """The plugin of a call: equal for calls that run the same kernel on tensors of the same sizes with the same numbers."""
    ports = [[(asdict(chain.values[p.value]), p.alias) for p in ports] for ports in (call.inputs, call.outputs)]
    known = json.dumps([key, ports, call.grid, call.numbers], sort_keys=True)
    return f"{call.name.strip('_')}_{hashlib.sha256(known.encode()).hexdigest()[:12]}"


def register_program(trt: Any, trtp: Any, program: Program) -> list[str]:
    """Register what is not yet known of a program's calls; the names of all its plugins.

    Raises:
        ExportError: this TensorRT has plugins in Python, but none that are compiled ahead of time.
    """
    if not hasattr(trtp, "KernelLaunchParams"):
        raise ExportError(
            f"TensorRT {trt.__version__} has no plugins that are compiled ahead of time:"
            " pip install --upgrade tensorrt-cu13, or use plugins='jit'"
        )
    names = []
    for call, key in zip(program.chain.calls, program.keys, strict=True):
        name = plugin_name(program.chain, call, key)
        if not _is_known(trtp, AOT, name):
            _register_call(trt, trtp, f"{AOT}::{name}", program.chain, call, program.kernels[key])
        names.append(name)
    return names


def _register_call(trt: Any, trtp: Any, plugin: str, chain: Chain, call: Call, kernel: Kernel) -> None:
    inputs = [f"x{number}" for number in range(len(call.inputs))]
    made = [(port.alias, chain.values[port.value]) for port in call.outputs]
    used = [chain.values[port.value] for port in (*call.inputs, *call.outputs)]
    types = ", ".join(_TYPES[value.dtype][1] for value in used)
    several = _tuple_of(trtp.TensorDesc, len(made))
    integers = [call.numbers[name] for name in kernel.numbers]

    def describe(*descs: Any) -> Any:
        return tuple([
            descs[alias].aliased()
            if alias >= 0
            else trtp.from_shape_expr(value.shape, getattr(trt, _TYPES[value.dtype][0]))
            for alias, value in made
        ])  # fmt: skip

    def combinations(*_: Any) -> Any:
        return [trtp.AutoTuneCombination(types, "LINEAR", [TACTIC])]

    def implement(*_: Any) -> Any:
        launch = trtp.KernelLaunchParams()
        launch.grid_x, launch.grid_y, launch.grid_z = call.grid
        launch.block_x, launch.shared_mem = kernel.threads, kernel.shared
        extra = trtp.SymIntExprs(len(integers))
        for number, value in enumerate(integers):
            extra[number] = trtp.SymInt32(value)
        return kernel.name, kernel.ptx, launch, extra

    tensors = [(name, trtp.TensorDesc) for name in inputs]
    outputs = ("outputs", several)
    result = tuple[str, str, trtp.KernelLaunchParams, trtp.SymExprs]
    trtp.register(plugin)(_signed(describe, tensors, several))
    trtp.autotune(plugin)(_signed(combinations, [*tensors, outputs], list[trtp.AutoTuneCombination]))
    trtp.aot_impl(plugin)(_signed(implement, [*tensors, outputs, ("tactic", int)], result))


def register_jit(trt: Any, trtp: Any) -> list[str]:
    """Register the plugins that call the operators; engines that hold them need this before they are loaded, too."""
    names = []
    for operator, inputs in ((SELECT, ("q", "k", "key_mask")), (ATTENTION, ("q", "k", "v", "selected", "key_mask"))):
        names.append(operator)
        if not _is_known(trtp, JIT, operator):
            _register_operator(trt, trtp, operator, inputs)
    return names


def _register_operator(trt: Any, trtp: Any, operator: str, inputs: Sequence[str]) -> None:
    plugin = f"{JIT}::{operator}"
    outputs = 1 if operator == SELECT else 2

    def describe(*tensors: Any, settings: str) -> Any:
        known, q = Settings.from_json(settings), tensors[0]
        batch, heads, tokens = (q.shape_expr[axis] for axis in range(3))
        if operator == SELECT:
            rows, words = known.geometry.by_tile(known.tile).num_video, known.geometry.num_words
            return (trtp.from_shape_expr((batch, heads, rows, words), trt.int32),)
        return q.like(), trtp.from_shape_expr((batch, heads, tokens), trt.float32)

    def implement(*arguments: Any, stream: int) -> None:
        *tensors, settings, results = arguments
        run_operator(Settings.from_json(settings), tensors, results, stream)

    tensors = [(name, trtp.TensorDesc) for name in inputs]
    trtp.register(plugin)(_signed(describe, [*tensors, ("settings", str)], _tuple_of(trtp.TensorDesc, outputs)))
    given = [*((name, trtp.Tensor) for name in inputs), ("settings", str), ("outputs", _tuple_of(trtp.Tensor, outputs))]
    trtp.impl(plugin)(_signed(implement, [*given, ("stream", int)], None))


def run_operator(settings: Settings, inputs: Sequence[Any], outputs: Sequence[Any], stream: int) -> None:
    """``torch.ops.vmoba`` on what TensorRT passes to a plugin in Python: tensors with ``data_ptr``, ``shape``, ``dtype``."""
    with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
        *tensors, mask = map(as_torch, inputs)
        mask = mask if settings.masked else mask.new_empty(0)
        rule = {"pool": settings.pool, "threshold": settings.threshold, "topk": settings.topk, "tile": settings.tile}
        if settings.operator == SELECT:
            results = [torch.ops.vmoba.select(*tensors, mask, *settings.sizes, mode=settings.mode, **rule)]
        else:
            results = torch.ops.vmoba.attention(*tensors, mask, *settings.sizes, scale=settings.scale, **rule)
        for result, output in zip(results, outputs, strict=True):
            as_torch(output).copy_(result)


class _Memory:
    """Bytes on the GPU, as torch imports them: it knows integers of every width, and not bfloat16."""

    def __init__(self, x: Any, kind: str) -> None:
        shape = tuple(int(extent) for extent in x.shape)
        self.__cuda_array_interface__ = {
            "shape": shape, "typestr": kind, "data": (int(x.data_ptr), False), "version": 3, "strides": None,
        }  # fmt: skip


def as_torch(x: Any) -> Tensor:
    """A dense tensor of TensorRT as one of torch's that shares its memory."""
    name = {"float": "float32", "half": "float16", "bf16": "bfloat16"}.get(x.dtype.name.lower(), x.dtype.name.lower())
    dtype = getattr(torch, name)
    if 0 in tuple(x.shape):
        return torch.empty(tuple(x.shape), dtype=dtype, device="cuda")
    kind = {1: "|u1", 2: "<i2", 4: "<i4", 8: "<i8"}[dtype.itemsize]
    return torch.as_tensor(_Memory(x, kind), device="cuda").view(dtype)


def _is_known(trtp: Any, namespace: str, name: str) -> bool:
    return hasattr(getattr(trtp.op, namespace, None), name)


def _tuple_of(kind: Any, count: int) -> Any:
    return tuple[(kind,) * count]  # type: ignore[misc]


def _signed(function: Callable[..., Any], parameters: Sequence[tuple[str, Any]], result: Any) -> Callable[..., Any]:
    """``function`` with the signature that ``tensorrt.plugin`` is to see."""
    kinds = inspect.Parameter
    function.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [kinds(name, kinds.POSITIONAL_OR_KEYWORD, annotation=annotation) for name, annotation in parameters],
        return_annotation=result,
    )
    return function
