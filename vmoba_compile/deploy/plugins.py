"""``vmoba`` nodes of an ONNX file as TensorRT plugins: chains of compiled kernels, or calls of the operators in Python.

``expand`` gives a file for TensorRT's parser. With "aot" each ``vmoba`` node becomes a chain of nodes, one for each kernel,
whose scratch memory is explicit in the tensors between them; every such node is a plugin that ``plugin_register`` has
made known, and the engine holds the kernels' PTX. With "jit" a node stays one node, whose plugin calls
``torch.ops.vmoba`` in Python: the way to check an engine.

A node that changes a tensor in place says so by an aliased output, so the builder needs the preview feature
``PREVIEW_FEATURE``. Kernels compiled ahead of time take sizes that are fixed, those of the file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..passes import ExportError
from .onnx_body import ATTENTION, DOMAIN, SELECT
from .plugin_register import AOT, JIT, Settings, plugin_name, register_jit, register_program
from .tensorrt_library import find_library

if TYPE_CHECKING:
    import onnx

    from ..kernels.aot_ptx import Program

PREVIEW_FEATURE = "ALIASED_PLUGIN_IO_10_03"  # of the builder's configuration
KINDS = ("aot", "jit")
_DTYPES = {1: torch.float32, 10: torch.float16, 16: torch.bfloat16}  # by onnx.TensorProto's numbers


@dataclass(frozen=True)
class Site:
    """One ``vmoba`` node: what its plugin must know. ``masked`` is False where the mask removes nothing."""

    name: str
    settings: Settings
    q: tuple[int, ...]
    kv_heads: int
    dtype: torch.dtype


def expand(path: str | os.PathLike[str], plugins: str) -> bytes:
    """The file with its ``vmoba`` nodes as plugin nodes, which are registered with TensorRT; weights stay where they lie.

    Raises:
        ExportError: TensorRT >= 10.7 is missing; a node's sizes are dynamic; there is no GPU to compile for.
        ValueError: ``plugins`` is neither "aot" nor "jit"; the kernels do not take a node's sizes.
    """
    if plugins not in KINDS:
        raise ValueError(f"plugins must be 'aot' or 'jit', not {plugins!r}")
    trt = find_library("tensorrt", plugins).module
    import onnx
    import tensorrt.plugin as trtp

    model = onnx.load(os.fspath(path), load_external_data=False)
    if plugins == "jit":
        register_jit(trt, trtp)
        replace_nodes(model, lambda site, node: [jit_node(site, node)], JIT)
        return model.SerializeToString()
    capability = _capability(Path(path).name)
    programs: dict[Any, Program] = {}

    def chain(site: Site, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        key = site.settings, site.q, site.kv_heads, site.dtype
        if key not in programs:
            programs[key] = compile_site(site, capability)
            register_program(trt, trtp, programs[key])
        return chain_nodes(programs[key], node, site)

    replace_nodes(model, chain, AOT)
    return model.SerializeToString()


def _capability(name: str) -> tuple[int, int]:
    if not torch.cuda.is_available():
        raise ExportError(
            f"plugins='aot' compiles the kernels of {name} for the GPU of this machine, and torch sees none"
        )
    return torch.cuda.get_device_capability()


def compile_site(site: Site, capability: tuple[int, int]) -> Program:
    """The kernels of one node for a compute capability; equal ones are compiled once a process."""
    from ..kernels import aot, aot_ptx

    known = site.settings
    rule: dict[str, Any] = {name: getattr(known, name) for name in ("pool", "threshold", "topk", "tile", "masked")}
    where = (site.q, site.kv_heads, site.dtype, known.geometry)
    try:
        if known.operator == SELECT:
            chain = aot.record_select(*where, mode=known.mode, capability=capability, **rule)
        else:
            chain = aot.record_attention(*where, scale=known.scale, capability=capability, **rule)
        return aot_ptx.compile_chain(chain)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise ExportError(f"plugins='aot' cannot compile {site.name}: {error}") from error


def replace_nodes(model: onnx.ModelProto, make: Any, domain: str) -> None:
    """Put ``make(site, node)`` in place of every ``vmoba`` node of the graph, and drop the bodies that nobody calls."""
    import onnx

    graph = model.graph
    values = _values(graph)
    nodes: list[Any] = []
    for node in graph.node:
        is_ours = node.domain == DOMAIN and node.op_type in (SELECT, ATTENTION)
        nodes += make(read(node, graph, values), node) if is_ours else [node]
    del graph.node[:]
    graph.node.extend(nodes)
    kept = [function for function in model.functions if function.domain != DOMAIN]
    del model.functions[:]
    model.functions.extend(kept)
    imports = [x for x in model.opset_import if x.domain not in (DOMAIN, domain)]
    del model.opset_import[:]
    model.opset_import.extend([*imports, onnx.helper.make_opsetid(domain, 1)])


def read(node: onnx.NodeProto, graph: onnx.GraphProto, values: Mapping[str, Any]) -> Site:
    """What a ``vmoba`` node says. ExportError where its sizes are dynamic."""
    import numpy
    import onnx

    name = node.name or node.output[0]
    given = {x.name: onnx.helper.get_attribute_value(x) for x in node.attribute}
    info = [values.get(x) for x in node.input[:2]]
    shapes = [[d.dim_value if d.HasField("dim_value") else 0 for d in x.shape.dim] if x else [0] for x in info]
    if "grid" not in given or any(0 in shape for shape in shapes):
        raise ExportError(
            f"sizes of {name} are dynamic, or the file does not state them, and plugins take fixed ones: export the model"
            " without dynamic_shapes, one file a resolution"
        )
    assert info[0] is not None
    text: dict[str, Any] = {key: given[key].decode() for key in ("pool", "mode") if key in given}
    # Attributes are float32: the shortest decimal is what was asked for.
    floats: dict[str, Any] = {
        key: float(str(numpy.float32(given[key]))) for key in ("threshold", "scale") if key in given
    }
    mask = node.input[2 if node.op_type == SELECT else 4]
    settings = Settings(
        operator=node.op_type, grid=tuple(given["grid"]), block=tuple(given["block"]), prefix=given["prefix"],
        suffix=given["suffix"], topk=given["topk"], tile=given["tile"], masked=not _is_all_true(mask, graph),
        **text, **floats,
    )  # fmt: skip
    return Site(name, settings, tuple(shapes[0]), shapes[1][1], _DTYPES[info[0].elem_type])


def _values(graph: onnx.GraphProto) -> dict[str, Any]:
    """Tensor types by name."""
    return {x.name: x.type.tensor_type for x in (*graph.input, *graph.value_info, *graph.output)}


def _is_all_true(name: str, graph: onnx.GraphProto) -> bool:
    """Whether a mask is certainly true everywhere: a constant, or one that is only cast, reshaped or expanded."""
    import onnx

    for tensor in graph.initializer:
        if tensor.name == name:
            return not tensor.external_data and bool(onnx.numpy_helper.to_array(tensor).all())
    maker = next((node for node in graph.node if name in node.output), None)
    if maker is None:
        return False
    if maker.op_type == "Constant":
        (value,) = maker.attribute
        found = onnx.helper.get_attribute_value(value)
        if isinstance(found, onnx.TensorProto):
            return not found.external_data and bool(onnx.numpy_helper.to_array(found).all())
        return bool(found) if isinstance(found, (int, float)) else all(found)
    if maker.op_type == "ConstantOfShape":
        return any(bool(onnx.numpy_helper.to_array(x.t).all()) for x in maker.attribute if x.name == "value")
    same = ("Cast", "Expand", "Reshape", "Identity", "Squeeze", "Unsqueeze")
    return maker.op_type in same and _is_all_true(maker.input[0], graph)


def chain_nodes(program: Program, node: onnx.NodeProto, site: Site) -> list[onnx.NodeProto]:
    """The nodes of a chain, in order; the last one bears the name of the node that they replace."""
    import onnx

    chain = program.chain
    given = dict(zip(input_names(site.settings), node.input, strict=False))
    names = {number: given[name] for number, name in enumerate(chain.inputs)}
    names |= {value: name for value, name in zip(chain.outputs, node.output, strict=False) if name}
    made = []
    for number, (call, key) in enumerate(zip(chain.calls, program.keys, strict=True)):
        for port in call.outputs:
            names.setdefault(port.value, f"{site.name}/{call.name}_{number}/{port.value}")
        last = number == len(chain.calls) - 1
        made.append(
            onnx.helper.make_node(
                plugin_name(chain, call, key),
                [names[port.value] for port in call.inputs],
                [names[port.value] for port in call.outputs],
                name=site.name if last else f"{site.name}/{call.name}_{number}",
                domain=AOT, plugin_namespace=AOT, plugin_version="1", aot=1,
            )
        )  # fmt: skip
    return made


def jit_node(site: Site, node: onnx.NodeProto) -> onnx.NodeProto:
    """The node of a plugin that calls the operator; its settings are one text, which the engine keeps."""
    import onnx

    inputs = node.input[: len(input_names(site.settings))]
    return onnx.helper.make_node(
        node.op_type, inputs, [name or f"{site.name}/{i}" for i, name in enumerate(node.output)], name=site.name,
        domain=JIT, plugin_namespace=JIT, plugin_version="1", aot=0, settings=site.settings.to_json(),
    )  # fmt: skip


def input_names(settings: Settings) -> Sequence[str]:
    """Inputs of a ``vmoba`` node by the names that chains give them; ``sizes``, the last one, is in the settings."""
    return ("q", "k", "key_mask") if settings.operator == SELECT else ("q", "k", "v", "selected", "key_mask")
