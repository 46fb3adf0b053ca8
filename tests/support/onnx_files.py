"""Small ONNX models of the two operators, and files of tiny models that several tests read."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import models
import torch
from vmoba_compile.kernels.partition import Geometry


def attention_model(rule: Any, opset: int, scale: float, dtype: str = "FLOAT") -> Any:
    """An ONNX model of one selection and one attention with their portable bodies; every size is dynamic."""
    import onnx_ir as ir

    from vmoba_compile.deploy import onnx_body, onnx_ops

    onnx_ops.register_schemas()  # the checker then wants every attribute
    attributes = {"pool": rule.pool, "threshold": rule.threshold, "topk": rule.topk, "tile": rule.tile}

    def value(name: str, kind: str, *shape: str | int) -> Any:
        return ir.Value(name=name, type=ir.TensorType(ir.DataType[kind]), shape=ir.Shape(shape))

    q, k, v = (value(name, dtype, "B", heads, "S", "D") for name, heads in (("q", "H"), ("k", "K"), ("v", "K")))
    mask, sizes = value("key_mask", "BOOL", "B", "S"), value("sizes", "INT64", 8)
    selected = value("selected", "INT32", "B", "H", "M", "W")
    out, lse = value("out", dtype, "B", "H", "S", "D"), value("lse", "FLOAT", "B", "H", "S")
    nodes = [
        ir.Node(
            onnx_body.DOMAIN, onnx_body.SELECT, [q, k, mask, sizes], outputs=[selected],
            attributes=ir.convenience.convert_attributes({**attributes, "mode": rule.mode}),
        ),
        ir.Node(
            onnx_body.DOMAIN, onnx_body.ATTENTION, [q, k, v, selected, mask, sizes], outputs=[out, lse],
            attributes=ir.convenience.convert_attributes({**attributes, "scale": scale}),
        ),
    ]  # fmt: skip
    graph = ir.Graph(
        [q, k, v, mask, sizes], [selected, out, lse], nodes=nodes, name="attention",
        opset_imports={"": opset, onnx_body.DOMAIN: onnx_body.VERSION},
    )  # fmt: skip
    return ir.to_proto(ir.Model(graph, ir_version=10, functions=onnx_body.functions(rule, opset)))


def sizes_of(geometry: Geometry) -> torch.Tensor:
    return torch.tensor([*geometry.grid, *geometry.block, geometry.prefix, geometry.suffix])


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="vmoba-onnx-")


@functools.cache
def exported(name: str, *, dynamic: bool, opset: int = 20) -> Any:
    """A two-layer tiny model, its inputs and what ``export_onnx`` says of its file; made once a process."""
    from vmoba_compile.deploy.onnx import export_onnx

    torch.manual_seed(0)
    layers = {"num_layers": 1, "num_single_layers": 1} if name == "hunyuanvideo" else {"num_layers": 2}
    model, inputs = models.build(name, **layers)
    path = Path(_folder().name) / f"{name}-{opset}-{dynamic}.onnx"
    made = export_onnx(
        model, (), inputs, path, config=models.CONFIG, dynamic_batch=dynamic, opset=opset, expect=2, progress=False
    )
    return model, inputs, made
