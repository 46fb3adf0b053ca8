"""Trace the inline operators without a GPU, and lower them with Inductor as far as that goes without one.

    python -P tests/support/trace_inline.py trace      # one JSON line per case: traced launches beside the ordinary ones
    python -P tests/support/trace_inline.py inductor   # the same, lowered: what each kernel is compiled with, for sm_90

For a process of its own: kernels are those that Triton compiles, not the interpreter's, and a driver that only knows its
target stands in for the GPU's. Tensors are fake ones on the CPU: PyTorch built for CPUs cannot slice fake GPU tensors.
"""

from __future__ import annotations

import json
import operator
import sys
from collections.abc import Iterator
from typing import Any, ClassVar
from unittest import mock

import torch
import triton
from torch import fx
from torch._functorch.aot_autograd import aot_export_module
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table, triton_kernel_wrapper_functional
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vmoba_compile.kernels import implementations, inline

TARGET = GPUTarget("cuda", 90, 32)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WAN = {"grid": (21, 30, 52), "block": (7, 5, 13), "heads": 12, "head_dim": 128}
SMALL = {"grid": (3, 4, 5), "block": (2, 2, 3), "heads": 4, "head_dim": 80}
CASES: dict[str, dict[str, Any]] = {
    "wan": WAN,
    "text": SMALL | {"prefix": 3, "suffix": 5, "batch": 2, "kv_heads": 2, "masked": True},
    # Inductor makes constants of the integers that are 1.
    "ones": {"grid": (3, 4, 5), "block": (1, 1, 1), "heads": 1, "prefix": 1, "suffix": 1, "batch": 2, "masked": True},
    "one_frame": {"grid": (1, 1, 9), "block": (1, 1, 1), "heads": 1, "prefix": 1, "pool": "overall"},
    "block": SMALL | {"pool": "block"},
    "query_head": SMALL | {"pool": "query_head", "dtype": "fp32", "prefix": 1},
    "topk": SMALL | {"mode": "topk", "topk": 2, "dtype": "fp16"},
    "own_box": SMALL | {"mode": "topk", "topk": 1},
    "tile": SMALL | {"tile": 128, "prefix": 1},
    "tile_1": {"grid": (1, 4, 5), "block": (1, 4, 3), "tile": 64, "heads": 1, "batch": 2, "masked": True},
    "dynamic": SMALL | {"batch": 3, "dynamic": True, "suffix": 2},
}
LOWERED = ("wan", "text", "ones", "query_head", "tile", "dynamic")


class Driver:
    """All that the host code asks of a GPU's driver."""

    def get_current_target(self) -> GPUTarget:
        return TARGET


class Layers(torch.nn.Module):
    """Selection and attention of one case."""

    def __init__(self, case: dict[str, Any]) -> None:
        super().__init__()
        sizes = (*case["grid"], *case["block"], case.get("prefix", 0), case.get("suffix", 0))
        self.sizes, self.scale = sizes, 0.125
        self.rule = {
            "pool": case.get("pool", "head_global"), "threshold": case.get("threshold", 0.25),
            "topk": case.get("topk", 0), "tile": case.get("tile", 0),
        }  # fmt: skip
        self.mode = case.get("mode", "threshold")

    def forward(self, q, k, v, mask):
        words = torch.ops.vmoba.select_inline(q, k, mask, *self.sizes, mode=self.mode, **self.rule)
        return torch.ops.vmoba.attention_inline(q, k, v, words, mask, *self.sizes, scale=self.scale, **self.rule)


def tensors(case: dict[str, Any], mode: FakeTensorMode) -> tuple[torch.Tensor, ...]:
    """q, k, v [B, H, S, D], heads next to each other within a token, and the key mask."""
    batch, heads, dim = case.get("batch", 1), case["heads"], case.get("head_dim", 64)
    tokens = case["grid"][0] * case["grid"][1] * case["grid"][2] + case.get("prefix", 0) + case.get("suffix", 0)
    dtype = DTYPES[case.get("dtype", "bf16")]
    with mode if not case.get("dynamic") else mock.MagicMock():
        q, k, v = (
            torch.empty(batch, tokens, n, dim, dtype=dtype).transpose(1, 2)
            for n in (heads, *(2 * [case.get("kv_heads", heads)]))
        )
        made = q, k, v, torch.empty((batch, tokens) if case.get("masked") else (0,), dtype=torch.bool)
    if not case.get("dynamic"):
        return made
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    def symbolic(x: torch.Tensor, name: str) -> torch.Tensor:
        sizes = [DimDynamic.DYNAMIC if x.dim() == 4 and i == 0 else DimDynamic.STATIC for i in range(x.dim())]
        return mode.from_tensor(
            x, source=ConstantSource(name), symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes)
        )

    return tuple(symbolic(x, name) for x, name in zip(made, ("q", "k", "v", "mask"), strict=True))


def kernel_of(index: int) -> tuple[str, int, int]:
    """Name, warps and stages of a kernel in the table of traced ones."""
    kernel = kernel_side_table.get_kernel(index)
    if hasattr(kernel, "configs"):
        (config,) = kernel.configs
        return kernel.fn.__name__, config.num_warps, config.num_stages
    return kernel.__name__, 4, 3


def root(node: fx.Node) -> fx.Node:
    """The allocation or the input that a traced tensor is memory of."""
    while node.op == "call_function":
        first = node.args[0] if node.args else None
        if node.target is operator.getitem and first.target is triton_kernel_wrapper_functional:
            node = first.kwargs["kwargs"][node.args[1]]
        elif isinstance(first, fx.Node):
            node = first
        else:
            break
    return node


def described(value: Any, memory: list[Any], identity: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if identity not in memory:
        memory.append(identity)
    return ["tensor", str(value.dtype), [int(n) for n in value.shape], list(value.stride()), memory.index(identity)]


def traced(graph: fx.Graph) -> Iterator[dict[str, Any]]:
    """The launches of a traced graph in order."""
    memory: list[Any] = []
    for node in graph.nodes:
        if node.target is not triton_kernel_wrapper_functional:
            continue
        name, warps, stages = kernel_of(node.kwargs["kernel_idx"])
        args = {
            key: described(x.meta["val"], memory, root(x)) if isinstance(x, fx.Node) else x
            for key, x in node.kwargs["kwargs"].items()
        }
        args |= kernel_side_table.get_constant_args(node.kwargs["constant_args_idx"])
        (grid,) = node.kwargs["grid"]
        written = sorted(node.kwargs["tensors_to_clone"])
        yield {"kernel": name, "warps": warps, "stages": stages, "grid": list(grid), "args": args, "written": written}


class Truth(inline.Inline):
    """Writes down launches as the host code asks for them."""

    found: ClassVar[list[dict[str, Any]]] = []
    memory: ClassVar[list[Any]] = []
    alive: ClassVar[list[Any]] = []  # storages, so that no two have one identity

    def as_bytes(self, mask: torch.Tensor) -> torch.Tensor:
        return mask.view(torch.uint8)  # the mask's memory, which a traced copy of it counts as

    def launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        if not all(grid):
            return
        warps, stages = options.pop("num_warps", 4), options.pop("num_stages", 3)
        options.pop("maxnreg", None)
        said = {}
        for key, x in kernel.signature.bind(*args, **options).arguments.items():
            storage = x.untyped_storage() if isinstance(x, torch.Tensor) else None
            self.alive.append(storage)
            said[key] = described(x, self.memory, storage and storage._cdata)
        full = list((*grid, 1, 1)[:3])
        self.found.append({"kernel": kernel.__name__, "warps": warps, "stages": stages, "grid": full, "args": said})


def truth(case: dict[str, Any]) -> list[dict[str, Any]]:
    """The launches of the ordinary host code, on tensors without memory."""
    module, (q, k, v, mask) = Layers(case), tensors(case, FakeTensorMode())
    Truth.found, Truth.memory, Truth.alive = [], [], []
    with mock.patch.object(inline, "Inline", Truth):
        words = inline._select(q, k, mask, *module.sizes, mode=module.mode, **module.rule)
        inline._attention(q, k, v, words, mask, *module.sizes, scale=module.scale, **module.rule)
    return Truth.found


def trace(name: str) -> dict[str, Any]:
    case = CASES[name]
    environment = ShapeEnv()
    given = tensors(case, FakeTensorMode(shape_env=environment))
    with torch.no_grad():
        module, _ = aot_export_module(Layers(case), given, trace_joint=False)
    if not case.get("dynamic"):
        return {"case": name, "traced": list(traced(module.graph)), "truth": truth(case)}
    batch = given[0].shape[0].node.expr
    nodes = [node for node in module.graph.nodes if node.target is triton_kernel_wrapper_functional]
    grids = [str(extent) for node in nodes for extent in node.kwargs["grid"][0]]
    guards = [str(guard.expr) for guard in environment.guards]
    return {"case": name, "batch": str(batch), "free": batch not in environment.replacements, "guards": guards,
            "dynamic_grids": sum(not extent.isdecimal() for extent in grids)}  # fmt: skip


class Lowered(Exception):
    """Inductor has written its code; there is no GPU to load it for."""


def lower(name: str) -> dict[str, Any]:
    """Lower a case with Inductor, and compile each kernel as Inductor would."""
    from torch._inductor import config, graph
    from torch._inductor.codegen.wrapper import PythonWrapperCodegen
    from torch._inductor.compile_fx import compile_fx

    found: dict[str, Any] = {}
    code: list[str] = []
    define = PythonWrapperCodegen.define_user_defined_triton_kernel

    def noted(self, kernel, configs, *args, **kwargs):
        result = define(self, kernel, configs, *args, **kwargs)
        found[result[0]] = kernel, configs, result[1]
        return result

    def stop(self):
        code.append(self.codegen()[0].value)
        raise Lowered

    case = CASES[name]
    given = tensors(case, FakeTensorMode(shape_env=ShapeEnv()))
    with (
        mock.patch.object(PythonWrapperCodegen, "define_user_defined_triton_kernel", noted),
        mock.patch.object(graph.GraphLowering, "compile_to_module", stop),
        config.patch({"fx_graph_cache": False}),
        torch.no_grad(),
    ):
        try:
            compile_fx(fx.symbolic_trace(_wrapped(case)), list(given))
        except Exception as error:
            if "Lowered" not in repr(error):
                raise
    errors = {}
    for kernel_name, (kernel, configs, meta) in found.items():
        options = {"num_warps": configs[0].num_warps, "num_stages": configs[0].num_stages} if configs else {}
        source = ASTSource(kernel, meta["signature"], meta["constants"], meta["configs"][0])
        try:
            triton.compile(source, target=TARGET, options=options)
        except Exception as error:
            errors[kernel_name] = f"{error}"[-500:]
    launches = code[0].count(".run(")
    lines = (line for line in code[0].splitlines() if not line.lstrip().startswith("#"))
    copies = [line for line in lines if "copy_(" in line or "clone" in line]
    return {"case": name, "launches": launches, "kernels": sorted(found), "copies": copies, "errors": errors}


def _wrapped(case: dict[str, Any]) -> torch.nn.Module:
    """Without the pair that the operator returns: symbolic tracing cannot look into it."""

    class First(Layers):
        def forward(self, q, k, v, mask):
            return super().forward(q, k, v, mask)[0]

    return First(case)


def main() -> None:
    assert not triton.knobs.runtime.interpret
    triton.runtime.driver.set_active(Driver())
    implementations._no_triton = lambda q: ""
    run, names = (trace, CASES) if sys.argv[1] == "trace" else (lower, LOWERED)
    for name in sys.argv[2:] or names:
        print(json.dumps(run(name)), flush=True)


if __name__ == "__main__":
    main()
