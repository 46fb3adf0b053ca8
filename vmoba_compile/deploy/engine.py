"""``build_engine``: an ONNX file of ``export_onnx`` as a TensorRT or TensorRT-RTX engine."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..backend import warn
from ..files import check_target, replacing
from ..passes import ExportError
from .progress import Steps
from .tensorrt_library import PLUGINS, Library, find_library, plain

Shape = Sequence[int]
Dynamic = Mapping[str, tuple[Shape, Shape, Shape]]

DOMAIN = "vmoba"


@dataclass(frozen=True)
class Port:
    """An input or output: -1 stands for a dynamic extent, ``profile`` for an input's least, best and greatest shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    profile: tuple[tuple[int, ...], ...] = ()

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} [{', '.join('?' if extent < 0 else str(extent) for extent in self.shape)}]"


@dataclass(frozen=True)
class Engine:
    """What was built, by which library, and how the ``vmoba`` nodes run in it.

    ``plugins`` names the nodes that run as plugins, ``portable`` those that run their body of standard operators, at
    the cost and with the memory of dense attention. ``capability`` is the target, None for the library's default: with
    TensorRT the GPU of this machine, with TensorRT-RTX compute capability 8.0 and later. ``bytes`` is the engine's size,
    ``layers`` counts the network's before the library fused them.
    """

    path: Path
    runtime: str
    version: str
    capability: tuple[int, int] | None
    bytes: int
    seconds: float
    layers: int
    plugins: tuple[str, ...]
    portable: tuple[str, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.runtime} {self.version}, {self.bytes / 2**20:,.1f} MiB, {self.layers} layers,"
            f" {self.seconds:.1f} s to build; {len(self.plugins)} vmoba nodes as plugins, {len(self.portable)} by their"
            f" portable body; {', '.join(map(str, self.inputs))} -> {', '.join(map(str, self.outputs))}"
        )


def build_engine(
    onnx_path: str | os.PathLike[str],
    engine_path: str | os.PathLike[str] | None = None,
    *,
    runtime: str = "auto",
    plugins: str = "none",
    dynamic: Dynamic | None = None,
    capability: tuple[int, int] | None = None,
    workspace: int | None = None,
    timing_cache: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> Engine:
    """Build an engine from an ONNX file of :func:`vmoba_compile.export_onnx`.

    Types are those of the file: none is lowered, and float32 products keep their accuracy unless
    ``torch.set_float32_matmul_precision`` allows less.

    TensorRT builds on the GPU that is to run the engine; TensorRT-RTX needs no GPU to build, and compiles its kernels
    where the engine runs.

    Args:
        onnx_path: the file; its weights may lie beside it.
        engine_path: where to write; None: the same name with the suffix ``.engine``. A file that is there is replaced in one
            step once the engine is complete; until then, and where anything fails, it stays as it was.
        runtime: "tensorrt", "tensorrt_rtx", or "auto", the first of them that is installed.
        plugins: how ``vmoba`` nodes run: "none", by the portable body in the file; "aot", as plugins of kernels that the
            engine holds; "jit", as plugins that need Python where the engine runs. Only TensorRT has plugins.
        dynamic: for every input with a dynamic extent its least, best and greatest shape.
        capability: compute capability of the target, for TensorRT-RTX: (8, 0), say. None: 8.0 and later.
        workspace: bytes of scratch memory that layers may use; None: all there is.
        timing_cache: a file that keeps TensorRT's measurements, read where it exists and written afterwards.
        progress: show a progress bar; None: on a terminal.

    Raises:
        FileNotFoundError: there is no such file, or none with its weights. ValueError, TypeError: an argument is unknown,
        out of range or does not fit the file. ExportError: a library is missing, or it cannot parse or build the file; the
        engine cannot be written.
    """
    onnx_path = Path(onnx_path)
    if not onnx_path.is_file():
        raise FileNotFoundError(f"there is no ONNX file {onnx_path}")
    engine_path = check_target(onnx_path.with_suffix(".engine") if engine_path is None else engine_path)
    if engine_path.exists() and engine_path.samefile(onnx_path):
        raise ValueError(f"the engine would be written over its ONNX file {onnx_path}; give another engine_path")
    if engine_path.absolute() == Path(f"{onnx_path}.data").absolute():
        raise ValueError(f"the engine would be written over {onnx_path}'s weights; give another engine_path")
    if plugins not in PLUGINS:
        raise ValueError(f"plugins must be one of {', '.join(map(repr, PLUGINS))}, not {plugins!r}")
    library = find_library(runtime, plugins)
    if workspace is not None and (not isinstance(workspace, int) or workspace <= 0):
        raise ValueError(f"workspace must be a number of bytes, not {workspace!r}")
    if timing_cache is not None and library.name != "tensorrt":
        raise ValueError("timing_cache is TensorRT's; TensorRT-RTX measures nothing when it builds")
    target = library.capability(capability)
    nodes = _vmoba_nodes(onnx_path, library)

    with Steps("building an engine", 3, progress) as step:
        start = time.perf_counter()
        log = library.log()
        builder = library.module.Builder(log)
        network = builder.create_network(library.strongly_typed)
        step("parsing the file")
        _parse(library, network, onnx_path, plugins, nodes, log)
        _allow_any_attention(library, network)
        settings = builder.create_builder_config()
        if torch.get_float32_matmul_precision() == "highest":
            settings.clear_flag(library.module.BuilderFlag.TF32)
        inputs = [network.get_input(i) for i in range(network.num_inputs)]
        shapes = _profile(builder, settings, inputs, dynamic)
        if target is not None:
            settings.set_compute_capability(target, 0)
        if plugins != "none":
            from .plugins import PREVIEW_FEATURE

            settings.set_preview_feature(getattr(library.module.PreviewFeature, PREVIEW_FEATURE), True)
        if workspace is not None:
            settings.set_memory_pool_limit(library.module.MemoryPoolType.WORKSPACE, workspace)
        cache = _timing_cache(settings, timing_cache)
        as_plugins = _plugin_layers(network)
        ports = (
            [_port(tensor, shapes) for tensor in inputs],
            [_port(network.get_output(i), {}) for i in range(network.num_outputs)],
        )
        layers = network.num_layers
        step("building")
        plan = builder.build_serialized_network(network, settings)
        if plan is None:
            raise ExportError(f"{library} cannot build {onnx_path.name}: {_cause(log.errors)}")
        step("writing")
        data = bytes(plan)
        with replacing(engine_path) as made:
            made.write_bytes(data)
        if cache is not None and timing_cache is not None:
            with replacing(Path(timing_cache)) as made:
                made.write_bytes(bytes(cache.serialize()))
        seconds = time.perf_counter() - start
    return Engine(
        engine_path, library.name, library.version, capability, len(data), seconds, layers,
        tuple(name for name in nodes if name in as_plugins), tuple(name for name in nodes if name not in as_plugins),
        tuple(ports[0]), tuple(ports[1]),
    )  # fmt: skip


def _vmoba_nodes(path: Path, library: Library) -> tuple[str, ...]:
    """Names of the nodes of domain ``vmoba``; ExportError for what no engine computes as the file says."""
    if find_spec("onnx") is None:
        raise ExportError("build_engine needs onnx: pip install 'vmoba_compile[onnx]'")
    import onnx
    from google.protobuf.message import DecodeError
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except DecodeError as error:
        raise ExportError(f"{path} is not an ONNX file: {error}") from error
    outside = {ExternalDataInfo(x).location for x in graph.initializer if uses_external_data(x)}
    for file in sorted(path.parent / name for name in outside):
        if not file.is_file():
            raise FileNotFoundError(f"the weights of {path} are missing: they must lie beside it in {file}")
    double = onnx.TensorProto.DOUBLE
    ports = [port.name for port in (*graph.input, *graph.output) if port.type.tensor_type.elem_type == double]
    if ports:
        raise ExportError(
            f"engines have no float64, and {', '.join(ports)} of {path.name} is of that type; export the model with inputs"
            " and outputs of float32, float16 or bfloat16"
        )
    casts = [
        node.name or node.output[0] for node in graph.node for x in node.attribute
        if node.op_type == "Cast" and x.name == "to" and x.i == double
    ]  # fmt: skip
    if casts:
        warn(
            f"vmoba_compile: engines have no float64: {len(casts)} casts of {path.name} to it (the first is {casts[0]}) are"
            " computed in float32"
        )
    kinds = {port.type.tensor_type.elem_type for port in (*graph.input, *graph.output)}
    if library.name == "tensorrt_rtx" and onnx.TensorProto.BFLOAT16 in kinds | {x.data_type for x in graph.initializer}:
        warn(
            f"vmoba_compile: {path.name} is in bfloat16, in which engines of TensorRT-RTX 1.4 gave NaN on an H200, those of"
            " dense models too; compare the engine's outputs before you use it, or export the model in float16"
        )
    return tuple(node.name or node.output[0] for node in graph.node if node.domain == DOMAIN)


def _without_attention(path: Path) -> bytes:
    """The file with each Attention operator as what it is defined to compute; weights stay where they lie.

    Beside vmoba nodes, TensorRT-RTX breaks on a masked one when it builds, and on any other the engine never returns.
    """
    import onnx
    from onnx.inliner import inline_selected_functions

    model = onnx.load(str(path), load_external_data=False)
    try:
        model = inline_selected_functions(model, [("", "Attention")], inline_schema_functions=True)
    except RuntimeError as error:
        raise ExportError(
            f"engines need the Attention operators of {path.name} spelled out, and it does not tell the types of their"
            f" inputs ({error}); write it with export_onnx, or with opset=20"
        ) from error
    return bytes(model.SerializeToString())


def _parse(library: Library, network: Any, path: Path, plugins: str, nodes: Sequence[str], log: Any) -> None:
    """Fill the network. ExportError names the node that the parser refuses."""
    parser = library.module.OnnxParser(network, log)
    if plugins != "none":
        from .plugins import expand  # registers the plugins; vmoba nodes become chains of their nodes

        parsed = parser.parse(expand(path, plugins), str(path))
    elif nodes and library.name == "tensorrt_rtx":
        parsed = parser.parse(_without_attention(path), str(path))
    else:
        parsed = parser.parse_from_file(str(path))
    if parsed:
        return
    if not parser.num_errors:
        raise ExportError(f"{library} cannot parse {path.name}: {_cause(log.errors)}")
    error = parser.get_error(0)
    node = f"node {error.node_name()!r} ({error.node_operator()})" if error.node_operator() else "a node"
    within = "".join(f", in {name}" for name in reversed(error.local_function_stack()) if name != error.node_name())
    cause = error.desc().strip()
    if cause in ("", "false"):
        cause = "it has no such operator"
    raise ExportError(f"{library} cannot parse {node} of {path.name}{within}: {plain(cause)}")


def _allow_any_attention(library: Library, network: Any) -> None:
    """Let attention run as single operators where there is no fused kernel (float32, say); the parser does not."""
    boundary = getattr(library.module, "IAttentionBoundaryLayer", None)
    for layer in map(network.get_layer, range(network.num_layers)):
        if boundary is not None and layer.type.name == "ATTENTION_OUTPUT":
            layer.__class__ = boundary  # the Python binding hands every layer out as its base class
            layer.attention.decomposable = True


def _profile(builder: Any, settings: Any, inputs: Sequence[Any], dynamic: Dynamic | None) -> dict[str, Any]:
    """Tell the builder the shapes to expect. ValueError where ``dynamic`` and the network's inputs do not fit."""
    dynamic = dict(dynamic or {})
    found = {tensor.name: tuple(tensor.shape) for tensor in inputs}
    unknown = sorted(set(dynamic) - set(found))
    if unknown:
        raise ValueError(f"dynamic names {unknown[0]!r}, but the inputs are {', '.join(found)}")
    open_ = {name: shape for name, shape in found.items() if -1 in shape}
    missing = [name for name in open_ if name not in dynamic]
    if missing:
        shown = ", ".join("?" if extent < 0 else str(extent) for extent in open_[missing[0]])
        raise ValueError(
            f"input {missing[0]!r} has shape [{shown}] with dynamic extents; give its least, best and greatest shape, as"
            f" in dynamic={{{missing[0]!r}: (least, best, greatest)}}"
        )
    shapes = {name: _checked(name, found[name], triple) for name, triple in dynamic.items()}
    if shapes:
        profile = builder.create_optimization_profile()
        for name, triple in shapes.items():
            profile.set_shape(name, *triple)
        settings.add_optimization_profile(profile)
    return shapes


def _checked(name: str, shape: tuple[int, ...], triple: Any) -> tuple[tuple[int, ...], ...]:
    try:
        least, best, greatest = checked = tuple(tuple(int(extent) for extent in given) for given in triple)
    except (TypeError, ValueError):
        raise TypeError(f"dynamic[{name!r}] must be three shapes (least, best, greatest), not {triple!r}") from None
    if any(len(given) != len(shape) for given in checked):
        raise ValueError(f"dynamic[{name!r}] must be three shapes of {len(shape)} extents, not {triple!r}")
    for axis, (low, middle, high) in enumerate(zip(least, best, greatest, strict=True)):
        if not 0 <= low <= middle <= high:
            raise ValueError(f"dynamic[{name!r}] must ascend, but extent {axis} is {low}, {middle}, {high}")
        if shape[axis] >= 0 and {low, middle, high} != {shape[axis]}:
            raise ValueError(f"extent {axis} of input {name!r} is always {shape[axis]}, not {low}, {middle} or {high}")
    return checked


def _timing_cache(settings: Any, path: str | os.PathLike[str] | None) -> Any:
    if path is None:
        return None
    cache = settings.create_timing_cache(Path(path).read_bytes() if Path(path).is_file() else b"")
    settings.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _plugin_layers(network: Any) -> set[str]:
    layers = map(network.get_layer, range(network.num_layers))
    return {layer.name for layer in layers if layer.type.name.startswith("PLUGIN")}


def _port(tensor: Any, shapes: Mapping[str, Any]) -> Port:
    return Port(tensor.name, tensor.dtype.name.lower(), tuple(tensor.shape), shapes.get(tensor.name, ()))


def _cause(errors: Sequence[str]) -> str:
    """The last error that says anything; some only name a place in the library's sources."""
    said = [text for text in map(plain, errors) if text]
    return said[-1] if said else "it gives no reason"
