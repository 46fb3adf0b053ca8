"""``vmoba`` nodes as plugins: what is registered with TensorRT, and the nodes that take their place.

TensorRT is not needed: a stand-in makes its checks, and the interpreter runs what each plugin says of its kernel.
"""

from __future__ import annotations

import inspect
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_tensorrt
import numpy as np
import pytest
import torch
from kernel_cases import Case, choose, relative
from vmoba_compile.kernels import aot, aot_ptx, attend, attend_lists, attend_triton, select_triton

import vmoba_compile
from vmoba_compile import ExportError
from vmoba_compile.deploy import plugin_register, plugins, tensorrt_library

onnx = pytest.importorskip("onnx")
pytest.importorskip("triton")

ON_GPU = torch.cuda.is_available()
HAS_TENSORRT = find_spec("tensorrt") is not None
CASE = Case(grid=(3, 4, 5), block=(2, 2, 3), prefix=2, suffix=1, heads=2, kv_heads=1, head_dim=16, layout="contiguous")
FLOAT, INT32, BOOL = 1, 6, 9

needs_interpreter = pytest.mark.skipif(ON_GPU, reason="needs Triton's interpreter")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Small tiles and histograms, for the interpreter's patience."""
    if ON_GPU:
        return
    for name, value in {"BLOCK_Q": 32, "BINS": 2048, "BLOCK_BINS": 512, "CHUNK": 256, "CAPACITY": 64}.items():
        monkeypatch.setattr(select_triton, name, value)
    monkeypatch.setattr(attend_lists, "GROUP", 16)
    monkeypatch.setattr(attend_lists, "TILE", 16)
    monkeypatch.setattr(attend_triton, "TILE", 16)
    monkeypatch.setattr(attend_triton, "QUERIES", 16)


@pytest.fixture
def trt(monkeypatch):
    """The stand-in in place of TensorRT."""
    module, plugin = fake_tensorrt.make()
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", plugin)
    library = tensorrt_library.Library("tensorrt", module)
    monkeypatch.setattr(plugins, "find_library", lambda runtime, kind: library)
    return module


@pytest.fixture
def as_text(monkeypatch):
    """Kernels whose "PTX" is what they are: the interpreter compiles none."""

    def compile_chain(chain: aot.Chain) -> aot_ptx.Program:
        kernels, keys = {}, []
        for call in chain.calls:
            arguments = (
                *["input"] * len(call.inputs),
                *(f"number:{x}" for x in call.numbers),
                *["output"] * len(call.outputs),
            )
            text = json.dumps({
                "kernel": call.kernel, "constants": call.constants, "types": call.types, "numbers": list(call.numbers),
                "inputs": [port.parameter for port in call.inputs], "outputs": [port.parameter for port in call.outputs],
            })  # fmt: skip
            key = str(hash(text))
            kernels[key] = aot_ptx.Kernel(key, call.name, text, 128, 1024, arguments, chain.capability)
            keys.append(key)
        return aot_ptx.Program(chain, tuple(keys), kernels)

    monkeypatch.setattr(aot_ptx, "compile_chain", compile_chain)
    monkeypatch.setattr(plugins, "_capability", lambda name: (9, 0))


def write(path: Path, case: Case = CASE, *, all_true: bool = True, static: bool = True, layers: int = 1) -> Path:
    """A file as ``export_onnx`` writes it, of the attentions alone."""
    node, info = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    tokens, dim = case.num_tokens, case.head_dim
    names = {"q": case.heads, "k": case.kv_heads, "v": case.kv_heads}
    inputs = [info(name, FLOAT, [case.batch, heads, tokens, dim]) for name, heads in names.items()]
    sizes = onnx.numpy_helper.from_array(np.array(case.sizes, np.int64), "sizes")
    shape = onnx.numpy_helper.from_array(np.array([case.batch, tokens], np.int64), "shape")
    rule: dict[str, Any] = {"pool": case.pool, "threshold": case.threshold, "topk": case.topk or 0, "tile": case.tile}
    if static:
        rule |= {"grid": case.grid, "block": case.block, "prefix": case.prefix, "suffix": case.suffix}
    rule |= {"domain": "vmoba", "plugin_namespace": "vmoba", "plugin_version": "1"}
    nodes = []
    if all_true:
        nodes += [
            node("Constant", [], ["one"], value_ints=[1]),
            node("Cast", ["one"], ["true"], to=BOOL),
            node("Expand", ["true", "shape"], ["mask"]),
        ]
    else:
        inputs.append(info("mask", BOOL, [case.batch, tokens]))
    made = []
    for layer in range(layers):
        query = f"out{layer - 1}" if layer else "q"
        chosen, out, lse = f"selected{layer}", f"out{layer}", f"lse{layer}"
        nodes += [
            node("VMoBASelect", [query, "k", "mask", "sizes"], [chosen], name=f"select{layer}", mode=case.mode, **rule),
            node("VMoBAAttention", [query, "k", "v", chosen, "mask", "sizes"], [out, lse], name=f"attend{layer}",
                 scale=case.op_scale, **rule),
        ]  # fmt: skip
        made.append(info(out, FLOAT, [case.batch, case.heads, tokens, dim]))
    last = info(f"lse{layers - 1}", FLOAT, [case.batch, case.heads, tokens])
    graph = onnx.helper.make_graph(nodes, "g", inputs, [made[-1], last], [sizes, shape], value_info=made[:-1])
    body = onnx.helper.make_function(
        "vmoba", "VMoBASelect", ["q"], ["x"], [node("Identity", ["q"], ["x"])], [onnx.helper.make_opsetid("", 20)]
    )
    sets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("vmoba", 1)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=sets, functions=[body], ir_version=10), str(path))
    return path


def run_plugin(plugin: fake_tensorrt.Plugin, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """One plugin as TensorRT runs it: new memory for outputs that alias nothing, one launch, arguments by their order."""
    kinds = {kind.value: kind for kind in fake_tensorrt.DataType}

    def described(x: torch.Tensor) -> fake_tensorrt.TensorDesc:
        name = str(x.dtype).removeprefix("torch.")
        return fake_tensorrt.TensorDesc(tuple(x.shape), kinds["int64" if name == "float64" else name])

    descs = [described(x) for x in inputs]
    outputs = plugin.describe(*descs)
    (combination,) = plugin.functions["autotune"](*descs, outputs)
    assert len(combination.types.split(", ")) == len(inputs) + len(outputs) and combination.layouts == "LINEAR"
    name, ptx, launch, extra = plugin.functions["aot_impl"](*descs, outputs, combination.tactics[0])
    code = json.loads(ptx)
    assert code["kernel"].endswith(f":{name}") and (launch.block_x, launch.shared_mem) == (128, 1024)
    results = []
    for desc in outputs:
        if desc.alias is not None:
            results.append(inputs[descs.index(desc.alias)])
            continue
        size = torch.Size(desc.shape_expr).numel() * getattr(torch, desc.dtype.value).itemsize
        memory = torch.full((size,), 255, dtype=torch.uint8).view(getattr(torch, desc.dtype.value))
        results.append(memory.view(desc.shape_expr))
    ports = [*zip(code["inputs"], inputs, strict=True), *zip(code["outputs"], results, strict=True)]
    arguments = code["constants"] | dict(zip(code["numbers"], [x.value for x in extra], strict=True))
    types = {kind: dtype for dtype, kind in aot._POINTERS.items()}
    arguments |= {parameter: x.view(types[code["types"][parameter]]) for parameter, x in ports if parameter}
    function = aot_ptx.find(code["kernel"])
    ordered = [arguments[x] for x in inspect.signature(function.fn).parameters]
    function[launch.grid_x, launch.grid_y, launch.grid_z](*ordered)
    return results


def run_nodes(model: Any, trt: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The graph's plugins, in order; what standard nodes make is given."""
    for node in model.graph.node:
        if node.domain == "":
            continue
        attributes = {x.name: onnx.helper.get_attribute_value(x) for x in node.attribute}
        assert attributes == {"plugin_namespace": b"vmoba_aot", "plugin_version": b"1", "aot": 1}
        plugin = trt.plugin.plugins[f"vmoba_aot::{node.op_type}"]
        made = run_plugin(plugin, [tensors[name] for name in node.input])
        tensors |= dict(zip(node.output, made, strict=True))
    return tensors


@needs_interpreter
@pytest.mark.parametrize("memory", ["enough", "tight"])
@pytest.mark.parametrize("masked", ["none", "tokens"])
def test_a_chain_of_nodes_computes_the_attention(tmp_path, trt, as_text, memory, masked, monkeypatch):
    if memory == "tight":  # results are filled turn by turn, in place
        monkeypatch.setattr(attend, "MEMORY_FLOOR", 0)
        monkeypatch.setattr(attend, "MEMORY_SHARE", 0.01)
    case = CASE.but(masked=masked)
    tensors = case.tensors(torch.float32)
    path = write(tmp_path / "model.onnx", case, all_true=masked == "none")
    model = onnx.load_from_string(plugins.expand(path, "aot"))
    onnx.checker.check_model(model)
    given = {"q": tensors.q, "k": tensors.k, "v": tensors.v}
    if tensors.key_mask is not None:
        given["mask"] = tensors.key_mask
    found = run_nodes(model, trt, given)
    truth = case.truth(tensors)
    assert torch.equal(found["selected0"], choose(case, tensors).words)
    assert relative(found["out0"], truth.out) < 1e-5
    assert float((found["lse0"].double() - truth.lse).abs().max()) < 1e-4


@needs_interpreter
def test_nodes_name_what_they_replace(tmp_path, trt, as_text):
    path = write(tmp_path / "model.onnx", layers=2)
    model = onnx.load_from_string(plugins.expand(path, "aot"))
    nodes = [node for node in model.graph.node if node.domain == "vmoba_aot"]
    assert not model.functions
    assert {x.domain for x in model.opset_import} == {"", "vmoba_aot"}
    names = [node.name for node in nodes]
    assert len(set(names)) == len(names) and {"select0", "attend0", "select1", "attend1"} <= set(names)
    known, outputs = {x.name for x in (*model.graph.input, *model.graph.initializer)}, []
    for node in model.graph.node:
        assert set(node.input) <= known | set(outputs)
        outputs += node.output
        assert all(node.output)
    assert len(set(outputs)) == len(outputs)
    assert not any("mask" in node.input for node in nodes)  # it is true everywhere: the kernels have none
    # The second layer is the first one again: no plugin of its own.
    assert {node.op_type for node in nodes[len(nodes) // 2 :]} == {node.op_type for node in nodes[: len(nodes) // 2]}
    registered = dict(trt.plugin.plugins)
    plugins.expand(path, "aot")
    assert trt.plugin.plugins == registered


@needs_interpreter
def test_a_mask_that_may_hide_keys_is_an_input(tmp_path, trt, as_text):
    path = write(tmp_path / "model.onnx", all_true=False)
    model = onnx.load_from_string(plugins.expand(path, "aot"))
    assert sum("mask" in node.input for node in model.graph.node) == 2  # the means of the boxes, and the lists of keys


def test_masks_that_are_true_everywhere():
    node, tensor = onnx.helper.make_node, onnx.numpy_helper.from_array

    def found(nodes: list[Any], constants: list[Any] = []) -> bool:  # noqa: B006
        return plugins._is_all_true("mask", onnx.helper.make_graph(nodes, "g", [], [], constants))

    yes, no = np.ones((1, 4), bool), np.array([[True, False]])
    assert found([], [tensor(yes, "mask")]) and not found([], [tensor(no, "mask")])
    assert found([node("Constant", [], ["mask"], value=tensor(yes))])
    assert not found([node("Constant", [], ["mask"], value=tensor(no))])
    assert found([node("ConstantOfShape", ["s"], ["mask"], value=tensor(np.array([True])))])
    assert not found([node("ConstantOfShape", ["s"], ["mask"])])  # zeros
    assert not found([node("Cast", ["x"], ["mask"], to=BOOL)])  # an input of the model
    assert not found([node("Constant", [], ["x"], value_int=1), node("Not", ["x"], ["mask"])])


@pytest.mark.parametrize("kind", ["aot", "jit"])
def test_dynamic_sizes_are_refused(tmp_path, trt, as_text, kind):
    with pytest.raises(ExportError, match="sizes of select0 are dynamic"):
        plugins.expand(write(tmp_path / "model.onnx", static=False), kind)


def test_numbers_are_those_that_were_asked_for(tmp_path):
    """0.3 is kept as a float32, which is another number."""
    model = onnx.load(write(tmp_path / "model.onnx", CASE.but(threshold=0.3, scale=0.1)))
    values = plugins._values(model.graph)
    sites = [plugins.read(node, model.graph, values) for node in model.graph.node if node.domain == "vmoba"]
    assert [site.settings.threshold for site in sites] == [0.3, 0.3] and sites[1].settings.scale == 0.1
    assert sites[0].settings == plugin_register.Settings.from_json(sites[0].settings.to_json() + "\0")
    assert (sites[0].q, sites[0].kv_heads, sites[0].dtype) == ((1, 2, CASE.num_tokens, 16), 1, torch.float32)


def test_unknown_kind(tmp_path):
    with pytest.raises(ValueError, match="'aot' or 'jit', not 'none'"):
        plugins.expand(tmp_path / "model.onnx", "none")


def test_tensorrt_without_kernels_ahead_of_time(trt, monkeypatch):
    monkeypatch.delattr(trt.plugin, "KernelLaunchParams")
    with pytest.raises(ExportError, match=r"10\.13\.3\.9 has no plugins that are compiled ahead"):
        plugin_register.register_program(trt, trt.plugin, SimpleNamespace())


@pytest.mark.skipif(ON_GPU, reason="there is a GPU")
def test_kernels_are_compiled_for_this_gpu(tmp_path, trt):
    with pytest.raises(ExportError, match="torch sees none"):
        plugins.expand(write(tmp_path / "model.onnx"), "aot")


@pytest.mark.skipif(HAS_TENSORRT, reason="TensorRT is installed")
def test_tensorrt_is_missing(tmp_path):
    with pytest.raises(ExportError, match="pip install tensorrt-cu13"):
        plugins.expand(write(tmp_path / "model.onnx"), "aot")


def test_plugins_of_the_operators(tmp_path, trt):
    """One node stays one node; its settings are a text that the plugin gets back."""
    path = write(tmp_path / "model.onnx", all_true=False)
    model = onnx.load_from_string(plugins.expand(path, "jit"))
    nodes = [node for node in model.graph.node if node.domain == "vmoba_jit"]
    assert [node.op_type for node in nodes] == ["VMoBASelect", "VMoBAAttention"]
    kinds = {kind.value: kind for kind in fake_tensorrt.DataType}
    tokens, shapes = CASE.num_tokens, {"selected0": (1, 2, 60, 1)}
    shapes |= {"q": (1, 2, tokens, 16), "k": (1, 1, tokens, 16), "v": (1, 1, tokens, 16), "mask": (1, tokens)}
    types = {"mask": "bool", "selected0": "int32"}
    for node, expected in zip(nodes, ([(1, 2, 60, 1)], [(1, 2, tokens, 16), (1, 2, tokens)]), strict=True):
        attributes = {x.name: onnx.helper.get_attribute_value(x) for x in node.attribute}
        assert attributes["plugin_namespace"] == b"vmoba_jit" and attributes["aot"] == 0
        plugin = trt.plugin.plugins[f"vmoba_jit::{node.op_type}"]
        assert len(node.input) == len(plugin.inputs) and plugin.attributes == {"settings": str}
        descs = [fake_tensorrt.TensorDesc(shapes[name], kinds[types.get(name, "float32")]) for name in node.input]
        made = plugin.describe(*descs, settings=attributes["settings"].decode())
        assert [x.shape_expr for x in made] == expected
    assert [x.dtype.value for x in made] == ["float32", "float32"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("masked", ["none", "tokens"])
def test_operators_run_on_tensors_of_tensorrt(tmp_path, trt, dtype, masked):
    case = CASE.but(masked=masked)
    tensors = case.tensors(dtype)
    plugins.expand(write(tmp_path / "model.onnx", case), "jit")
    given = {name: getattr(tensors, name).cuda().contiguous() for name in ("q", "k", "v")}
    mask = torch.ones(1, case.num_tokens, dtype=torch.bool) if tensors.key_mask is None else tensors.key_mask
    given["mask"] = mask.cuda()
    words = torch.full((1, 2, 60, 1), -1, dtype=torch.int32, device="cuda")
    out = torch.full_like(given["q"], float("nan"))
    lse = torch.full(out.shape[:3], float("nan"), device="cuda")
    common: dict[str, Any] = {"grid": case.grid, "block": case.block, "prefix": case.prefix, "suffix": case.suffix}
    common |= {"pool": case.pool, "threshold": case.threshold, "topk": 0, "tile": 0, "masked": masked != "none"}
    stream = torch.cuda.Stream()
    for operator, inputs, results, more in [
        ("VMoBASelect", [given["q"], given["k"], given["mask"]], [words], {"mode": case.mode}),
        (
            "VMoBAAttention",
            [given["q"], given["k"], given["v"], words, given["mask"]],
            [out, lse],
            {"scale": case.op_scale},
        ),
    ]:
        settings = plugin_register.Settings(operator=operator, **common, **more).to_json()
        implement = trt.plugin.plugins[f"vmoba_jit::{operator}"].functions["impl"]
        stream.wait_stream(torch.cuda.current_stream())
        implement(
            *map(fake_tensorrt.Tensor, inputs),
            settings,
            tuple(map(fake_tensorrt.Tensor, results)),
            stream=stream.cuda_stream,
        )
        stream.synchronize()
    empty = torch.empty(0, dtype=torch.bool, device="cuda")
    used = given["mask"] if masked != "none" else empty
    rule = {"pool": case.pool, "threshold": case.threshold, "topk": 0}
    assert torch.equal(words, torch.ops.vmoba.select(given["q"], given["k"], used, *case.sizes, mode=case.mode, **rule))
    expected = torch.ops.vmoba.attention(
        *[given[x] for x in "qkv"], words, used, *case.sizes, scale=case.op_scale, **rule
    )
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not HAS_TENSORRT, reason="TensorRT >= 10.7 is not installed")
@pytest.mark.parametrize("kind", ["aot", "jit"])
def test_an_engine_with_plugins(tmp_path, kind):
    """The whole way: a file, an engine whose vmoba nodes are plugins, and its results beside the operators'."""
    from vmoba_compile.deploy.engine_runner import EngineRunner

    case = CASE.but(head_dim=64)
    tensors = case.tensors(torch.float32)
    path = write(tmp_path / "model.onnx", case)
    engine = vmoba_compile.build_engine(path, runtime="tensorrt", plugins=kind, progress=False)
    assert engine.plugins == ("select0", "attend0") and not engine.portable
    got = EngineRunner(engine)(**{name: getattr(tensors, name).cuda().contiguous() for name in ("q", "k", "v")})
    truth = case.truth(tensors)
    assert relative(got["out0"].cpu(), truth.out) < 1e-5
