"""As much of ``tensorrt`` and ``tensorrt.plugin`` as the plugins use, with the checks that the real one makes of functions.

The checks are those of ``tensorrt.plugin`` 10.13 and 11.4: tensors first and annotated, one signature for all functions of
a plugin, an annotated result.
"""

from __future__ import annotations

import inspect
import typing
from dataclasses import dataclass, field
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any


class DataType(Enum):
    FLOAT = "float32"
    HALF = "float16"
    BF16 = "bfloat16"
    INT32 = "int32"
    INT64 = "int64"
    BOOL = "bool"


class TensorDesc:
    def __init__(self, shape: tuple[int, ...], dtype: DataType) -> None:
        self.shape_expr, self.dtype = tuple(shape), dtype
        self.alias: TensorDesc | None = None

    def aliased(self) -> TensorDesc:
        made = TensorDesc(self.shape_expr, self.dtype)
        made.alias = self
        return made

    def like(self) -> TensorDesc:
        return TensorDesc(self.shape_expr, self.dtype)


class Tensor:
    """One that holds data."""

    def __init__(self, x: Any) -> None:
        self.data_ptr, self.shape = x.data_ptr(), tuple(x.shape)
        self.dtype = next(kind for kind in DataType if kind.value == str(x.dtype).removeprefix("torch."))


class SymInt32:
    def __init__(self, value: int) -> None:
        assert -(2**31) <= value < 2**31
        self.value = value


class SymExprs(list):
    """Symbolic integers."""


class SymIntExprs(SymExprs):
    def __init__(self, count: int) -> None:
        super().__init__([None] * count)


@dataclass
class AutoTuneCombination:
    types: str
    layouts: str
    tactics: list[int]


@dataclass
class KernelLaunchParams:
    grid_x: int = 1
    grid_y: int = 1
    grid_z: int = 1
    block_x: int = 1
    block_y: int = 1
    block_z: int = 1
    shared_mem: int = 0

    def __setattr__(self, name: str, value: int) -> None:
        assert name in type(self).__annotations__ and isinstance(value, int)
        object.__setattr__(self, name, value)


@dataclass
class Plugin:
    describe: Any
    inputs: list[str]
    attributes: dict[str, type]
    outputs: int
    functions: dict[str, Any] = field(default_factory=dict)


def make(version: str = "10.13.3.9") -> tuple[ModuleType, ModuleType]:
    """Modules ``tensorrt`` and ``tensorrt.plugin``; the plugins that were registered are in ``plugins`` of the second."""
    trt, trtp = ModuleType("tensorrt"), ModuleType("tensorrt.plugin")
    plugins: dict[str, Plugin] = {}

    def register(name: str) -> Any:
        def decorate(function: Any) -> Any:
            assert name not in plugins, f"{name} is registered already"
            parameters = inspect.signature(function).parameters
            assert all(p.kind == p.POSITIONAL_OR_KEYWORD and p.default is p.empty for p in parameters.values())
            tensors = [key for key, p in parameters.items() if p.annotation is TensorDesc]
            attributes = {key: p.annotation for key, p in parameters.items() if key not in tensors}
            assert tensors and [*tensors, *attributes] == list(parameters)
            assert set(attributes.values()) <= {int, float, str, bool, bytes}
            result = inspect.signature(function).return_annotation
            assert typing.get_origin(result) is tuple and set(typing.get_args(result)) == {TensorDesc}
            plugins[name] = Plugin(function, tensors, attributes, len(typing.get_args(result)))
            namespace, _, plain = name.partition("::")
            if not hasattr(trtp.op, namespace):
                setattr(trtp.op, namespace, SimpleNamespace())
            setattr(getattr(trtp.op, namespace), plain, plugins[name])
            return function

        return decorate

    def of_plugin(kind: str, last: list[str]) -> Any:
        def named(name: str) -> Any:
            def decorate(function: Any) -> Any:
                plugin = plugins[name]
                assert list(inspect.signature(function).parameters) == [*plugin.inputs, *plugin.attributes, *last]
                result = inspect.signature(function).return_annotation
                if kind == "aot_impl":
                    assert typing.get_args(result)[2:] == (KernelLaunchParams, SymExprs)
                plugin.functions[kind] = function
                return function

            return decorate

        return named

    trt.__dict__.update(
        {kind.value: kind for kind in DataType} | {"__version__": version, "plugin": trtp, "__path__": []}
    )
    trtp.__dict__.update({
        "op": SimpleNamespace(), "plugins": plugins, "register": register, "autotune": of_plugin("autotune", ["outputs"]),
        "aot_impl": of_plugin("aot_impl", ["outputs", "tactic"]), "impl": of_plugin("impl", ["outputs", "stream"]),
        "from_shape_expr": lambda shape, dtype: TensorDesc(shape, dtype),
    } | {kind.__name__: kind for kind in (
        TensorDesc, Tensor, SymInt32, SymExprs, SymIntExprs, AutoTuneCombination, KernelLaunchParams,
    )})  # fmt: skip
    return trt, trtp
