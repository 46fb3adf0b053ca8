"""The operators in ONNX: schemas of ``VMoBASelect`` and ``VMoBAAttention``, and how an exported program gets such nodes.

``sizes`` is int64 [8]: grid, block (frames, rows, columns), prefix and suffix. Where it is constant, the same numbers are
attributes too, for plugins: they see attributes when an engine is built, and a tensor's values not before it runs.
"""

from collections.abc import Callable, Sequence
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnxscript import BOOL, FLOAT, INT32, INT64, opset18, values

from .onnx_body import ATTENTION, DOMAIN, SELECT, VERSION

PLUGIN = {"plugin_namespace": DOMAIN, "plugin_version": str(VERSION)}
STATIC = ("grid", "block", "prefix", "suffix")
_OPS = values.Opset(DOMAIN, VERSION)
_STANDARD: Any = opset18  # for which torch.onnx's own translations are written

_FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]


def register_schemas() -> None:
    """Tell ``onnx`` of the operators, once a process: ``onnx.checker`` and the exporter then know their inputs."""
    if onnx.defs.has(SELECT, DOMAIN):
        return
    for schema in _schemas():
        onnx.defs.register_schema(schema)


def _schemas() -> list[onnx.defs.OpSchema]:
    schema = onnx.defs.OpSchema
    kind = schema.AttrType

    def inputs(*named: tuple[str, str, str]) -> list[onnx.defs.OpSchema.FormalParameter]:
        return [schema.FormalParameter(name, type_, text) for name, type_, text in named]

    q = ("q", "T", "queries [B, H, S, D]")
    k = ("k", "T", "keys [B, Hkv, S, D]")
    v = ("v", "T", "values [B, Hkv, S, D]")
    mask = ("key_mask", "tensor(bool)", "[B, S], true where a key may be attended")
    sizes = ("sizes", "tensor(int64)", "[8]: grid, block, prefix, suffix")
    bits = ("selected", "tensor(int32)", "bit sets [B, H, N, W] of the boxes that each query attends to")
    types = [("T", _FLOATS, "float tensors of one type")]
    plugin = [schema.Attribute(name, kind.STRING, "for TensorRT", required=False) for name in PLUGIN]
    static = [
        schema.Attribute(name, kind.INTS if name in ("grid", "block") else kind.INT, "as in sizes", required=False)
        for name in STATIC
    ]
    rule = [
        schema.Attribute(name, getattr(kind, type_), text)
        for name, type_, text in [
            ("pool", "STRING", "what competes"),
            ("threshold", "FLOAT", "share of the weight that the selection holds"),
            ("topk", "INT", "boxes a query, 0 with a threshold"),
            ("tile", "INT", "tokens of a tile of queries, 0 for none"),
        ]
    ]
    mode = schema.Attribute("mode", kind.STRING, "threshold or topk")
    scale = schema.Attribute("scale", kind.FLOAT, "of the scores")
    return [
        schema(
            SELECT, DOMAIN, VERSION, doc="Boxes of a video grid for each query (arXiv 2506.23858, 3.2 to 3.4).",
            inputs=inputs(q, k, mask, sizes), outputs=inputs(bits), type_constraints=types,
            attributes=[*rule, mode, *static, *plugin],
        ),
        schema(
            ATTENTION, DOMAIN, VERSION, doc="Softmax attention to the selected boxes and the condition tokens.",
            inputs=inputs(q, k, v, bits, mask, sizes),
            outputs=inputs(("out", "T", "[B, H, S, D]"), ("lse", "tensor(float)", "[B, H, S]")),
            type_constraints=types, attributes=[*rule, scale, *static, *plugin],
        ),
    ]  # fmt: skip


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For ``torch.onnx.export``'s ``custom_translation_table``."""
    return {
        torch.ops.vmoba.select.default: select,
        torch.ops.vmoba.attention.default: attention,
        # What rms_norm becomes on a GPU; torch.onnx has no translation of its own.
        torch.ops.aten._fused_rms_norm.default: fused_rms_norm,
    }


def _call(name: str, inputs: tuple[Any, ...], numbers: tuple[Any, ...], attributes: dict[str, Any]) -> Any:
    """One node. ``numbers`` are Python ints, or values of the ONNX graph where a size is dynamic."""
    attributes = {**attributes, **PLUGIN}
    if all(isinstance(x, int) for x in numbers):
        sizes = _STANDARD.Constant(value_ints=list(numbers))
        attributes |= {"grid": numbers[:3], "block": numbers[3:6], "prefix": numbers[6], "suffix": numbers[7]}
    else:
        one = _STANDARD.Constant(value_ints=[1])
        parts = [
            _STANDARD.Constant(value_ints=[x]) if isinstance(x, int) else _STANDARD.Reshape(x, one) for x in numbers
        ]
        sizes = _STANDARD.Concat(*parts, axis=0)
    return getattr(_OPS, name)(*inputs, sizes, **attributes)


def _full_mask(key_mask: Any, q: Any) -> Any:
    """A mask without elements means: every key. Nodes always have one [B, S], which no runtime refuses."""
    if len(key_mask.shape) == 2:
        return key_mask
    batch, tokens = _STANDARD.Shape(q, start=0, end=1), _STANDARD.Shape(q, start=2, end=3)
    true = _STANDARD.Cast(_STANDARD.Constant(value_ints=[1]), to=ir.DataType.BOOL)
    return _STANDARD.Expand(true, _STANDARD.Concat(batch, tokens, axis=0))


def select(
    q: FLOAT, k: FLOAT, key_mask: BOOL,
    t: INT64, h: INT64, w: INT64, bt: INT64, bh: INT64, bw: INT64, prefix: INT64, suffix: INT64,
    pool: str = "head_global", mode: str = "threshold", threshold: float = 0.25, topk: int = 0,
    implementation: str = "auto", tile: int = 0,
) -> INT32:  # fmt: skip
    """``torch.ops.vmoba.select``."""
    rule = {"pool": pool, "mode": mode, "threshold": threshold, "topk": topk, "tile": tile}
    return _call(SELECT, (q, k, _full_mask(key_mask, q)), (t, h, w, bt, bh, bw, prefix, suffix), rule)


def attention(
    q: FLOAT, k: FLOAT, v: FLOAT, selected: INT32, key_mask: BOOL,
    t: INT64, h: INT64, w: INT64, bt: INT64, bh: INT64, bw: INT64, prefix: INT64, suffix: INT64,
    scale: float = 1.0, threshold: float = 1.0, topk: int = 0, implementation: str = "auto", tile: int = 0,
    pool: str = "overall",
) -> tuple[FLOAT, FLOAT]:  # fmt: skip
    """``torch.ops.vmoba.attention``."""
    rule = {"scale": scale, "threshold": threshold, "topk": topk, "tile": tile, "pool": pool}
    inputs = (q, k, v, selected, _full_mask(key_mask, q))
    return _call(ATTENTION, inputs, (t, h, w, bt, bh, bw, prefix, suffix), rule)


def fused_rms_norm(
    input: FLOAT, normalized_shape: Sequence[int], weight: FLOAT | None = None, eps: float | None = None
) -> tuple[FLOAT, FLOAT]:
    """``torch.ops.aten._fused_rms_norm``: in float32, as the GPU computes it."""
    if eps is None:
        eps = torch.finfo(torch.float32).eps  # of the type that it computes in
    axes = _STANDARD.Constant(value_ints=list(range(-len(normalized_shape), 0)))
    x = _STANDARD.Cast(input, to=ir.DataType.FLOAT)
    square = _STANDARD.ReduceMean(_STANDARD.Mul(x, x), axes, keepdims=1)
    scale = _STANDARD.Reciprocal(_STANDARD.Sqrt(_STANDARD.Add(square, _STANDARD.Constant(value_float=eps))))
    out = _STANDARD.Mul(x, scale)
    if weight is not None:
        out = _STANDARD.Mul(out, _STANDARD.Cast(weight, to=ir.DataType.FLOAT))
    return _STANDARD.CastLike(out, input), scale
