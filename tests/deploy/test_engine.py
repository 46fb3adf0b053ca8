"""Engines of TensorRT-RTX, built without a GPU from small ONNX files with portable ``vmoba`` nodes; every refusal."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from vmoba_compile import ExportError
from vmoba_compile.deploy import engine, tensorrt_library
from vmoba_compile.deploy.engine import Engine, build_engine

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnx.inliner")
ReferenceEvaluator = pytest.importorskip("onnx.reference").ReferenceEvaluator
FLOAT, HALF, INT64, BOOL, DOUBLE, BFLOAT16 = 1, 10, 7, 9, 11, 16

needs_rtx = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="needs tensorrt_rtx")
node, tensor = onnx.helper.make_node, onnx.helper.make_tensor_value_info
PLUGIN = {"plugin_namespace": "vmoba", "plugin_version": "1"}


def constant(name: str, value: object) -> onnx.TensorProto:
    return onnx.numpy_helper.from_array(np.asarray(value), name)


def write(path: Path, nodes, inputs, outputs, constants=(), functions=(), opset=20) -> Path:
    graph = onnx.helper.make_graph(nodes, "g", inputs, outputs, list(constants))
    sets = [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid("vmoba", 1)]
    model = onnx.helper.make_model(graph, opset_imports=sets, functions=list(functions), ir_version=10)
    onnx.save(model, str(path))
    return path


def function(name: str, inputs, outputs, nodes, attributes=(), opset=20) -> onnx.FunctionProto:
    sets = [onnx.helper.make_opsetid("", opset)]
    return onnx.helper.make_function("vmoba", name, inputs, outputs, nodes, sets, list(attributes))


def by_reference(op: str, inputs, outputs, attribute: str, of_function: str, kind: int, **rest) -> onnx.NodeProto:
    made = node(op, inputs, outputs, **rest)
    made.attribute.append(onnx.AttributeProto(name=attribute, ref_attr_name=of_function, type=kind))
    return made


def selection(opset: int = 20) -> onnx.FunctionProto:
    """The kind of body that export_onnx writes: gate, sort, cumulative sum, cut, mask and softmax attention."""
    body = [
        node("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2]),
        node("MatMul", ["q", "kt"], ["g"]),
        node("Constant", [], ["last"], value=constant("", np.array([-1], np.int64))),
        node("ReduceMax", ["g", "last"], ["high"], keepdims=1),
        node("ReduceMin", ["g", "last"], ["low"], keepdims=1),
        node("Sub", ["g", "low"], ["a"]),
        node("Sub", ["high", "low"], ["b"]),
        node("Div", ["a", "b"], ["w"]),
        node("Shape", ["w"], ["all"]),
        node("Gather", ["all", "last"], ["count"]),
        node("TopK", ["w", "count"], ["sorted", "order"], largest=1, sorted=1),
        node("Constant", [], ["axis"], value=constant("", np.array(3, np.int64))),
        node("CumSum", ["sorted", "axis"], ["sums"], exclusive=1),
        by_reference("Constant", [], ["tau"], "value_float", "threshold", onnx.AttributeProto.FLOAT),
        node("Cast", ["tau"], ["limit"], to=FLOAT),
        node("Less", ["sums", "limit"], ["kept"]),
        node("ConstantOfShape", ["all"], ["none"], value=onnx.helper.make_tensor("", BOOL, [1], [0])),
        node("ScatterElements", ["none", "order", "kept"], ["selected"], axis=3),
        node("Constant", [], ["minus"], value=constant("", np.array(-np.inf, np.float32))),
        node("Where", ["selected", "g", "minus"], ["scores"]),
        node("Softmax", ["scores"], ["p"], axis=-1),
        node("MatMul", ["p", "k"], ["out"]),
    ]
    return function("VMoBAAttention", ["q", "k"], ["out"], body, ["threshold"], opset)


def attention_file(path: Path, shape=(1, 2, 64, 16), opset: int = 20) -> Path:
    nodes = [
        node("VMoBAAttention", ["q", "k"], ["x"], name="first", domain="vmoba", threshold=0.5, **PLUGIN),
        node("VMoBAAttention", ["x", "k"], ["out"], name="second", domain="vmoba", threshold=0.25, **PLUGIN),
    ]
    ports = [tensor("q", FLOAT, shape), tensor("k", FLOAT, shape)]
    return write(path, nodes, ports, [tensor("out", FLOAT, shape)], functions=[selection(opset)], opset=opset)


@needs_rtx
@pytest.mark.parametrize("opset", [20, 23])
def test_engine_of_portable_nodes(tmp_path, opset):
    engine = build_engine(attention_file(tmp_path / "m.onnx", opset=opset), runtime="tensorrt_rtx")
    assert isinstance(engine, Engine)
    assert engine.path == tmp_path / "m.engine" and engine.path.stat().st_size == engine.bytes > 1000
    assert engine.runtime == "tensorrt_rtx" and engine.version
    assert engine.portable == ("first", "second") and engine.plugins == ()
    assert [(x.name, x.dtype, x.shape) for x in engine.inputs] == [(n, "float", (1, 2, 64, 16)) for n in "qk"]
    assert [(x.name, x.shape) for x in engine.outputs] == [("out", (1, 2, 64, 16))]
    assert engine.layers > 40
    assert "2 by their portable body" in str(engine) and "q float [1, 2, 64, 16]" in str(engine)


@needs_rtx
def test_dynamic_extents(tmp_path):
    path = attention_file(tmp_path / "m.onnx", ("batch", 2, 64, 16))
    shapes = {name: ((1, 2, 64, 16), (2, 2, 64, 16), (4, 2, 64, 16)) for name in "qk"}
    engine = build_engine(path, tmp_path / "deep" / "e.plan", dynamic=shapes, capability=(8, 0), workspace=1 << 28)
    assert engine.path == tmp_path / "deep" / "e.plan" and engine.path.is_file()
    assert engine.inputs[0].shape == (-1, 2, 64, 16) and engine.inputs[0].profile == shapes["q"]
    assert engine.capability == (8, 0)
    assert "[?, 2, 64, 16]" in str(engine)


@needs_rtx
@pytest.mark.parametrize(
    ("dynamic", "kind", "message"),
    [
        (None, ValueError, "input 'q' has shape .*dynamic extents; give its least, best and greatest shape"),
        ({"z": ((1,),) * 3}, ValueError, "dynamic names 'z', but the inputs are q, k"),
        ({"q": (1, 2)}, TypeError, "must be three shapes"),
        ({"q": ((1, 2), (1, 2), (1, 2))}, ValueError, "three shapes of 4 extents"),
        ({"q": ((4, 2, 64, 16), (2, 2, 64, 16), (4, 2, 64, 16))}, ValueError, "must ascend, but extent 0 is 4, 2, 4"),
        ({"q": ((1, 2, 9, 16),) * 3}, ValueError, "extent 2 of input 'q' is always 64"),
    ],
)
def test_dynamic_is_checked(tmp_path, dynamic, kind, message):
    path = attention_file(tmp_path / "m.onnx", ("batch", 2, 64, 16))
    if isinstance(dynamic, dict) and "q" in dynamic:
        dynamic = {"k": ((1, 2, 64, 16),) * 3, **dynamic}
    with pytest.raises(kind, match=message):
        build_engine(path, dynamic=dynamic, runtime="tensorrt_rtx")
    assert not (tmp_path / "m.engine").exists()


@needs_rtx
def test_attention_without_a_fused_kernel(tmp_path):
    """In float32 the library has no kernel for attention as one operator, and must take it apart."""
    ports = [tensor(name, FLOAT, [1, 2, 8, 16]) for name in "qkv"]
    nodes = [node("Attention", ["q", "k", "v"], ["y"])]
    path = write(tmp_path / "m.onnx", nodes, ports, [tensor("y", FLOAT, [1, 2, 8, 16])], opset=23)
    assert build_engine(path, runtime="tensorrt_rtx").bytes > 0


@needs_rtx
@pytest.mark.parametrize("masked", [True, False])
def test_attention_beside_vmoba_nodes_is_spelled_out(masked, tmp_path, monkeypatch):
    """As one operator the library breaks on it: some builders end the process, some engines never return."""
    shape = (1, 2, 64, 16)
    nodes = [
        node("VMoBAAttention", ["q", "k"], ["x"], name="first", domain="vmoba", threshold=0.5, **PLUGIN),
        node("Attention", ["x", "k", "k"] + ["mask"] * masked, ["out"], name="text"),
    ]
    ports = [tensor("q", FLOAT, shape), tensor("k", FLOAT, shape)]
    ports += [tensor("mask", BOOL, (1, 1, 64, 64))] * masked
    path = write(tmp_path / "m.onnx", nodes, ports, [tensor("out", FLOAT, shape)], (), [selection(23)], 23)
    parsed = []
    model = onnx.load(str(path))
    model.graph.value_info.append(tensor("x", FLOAT, shape))  # as export_onnx writes
    onnx.save(model, str(path))
    spell_out = engine._without_attention
    monkeypatch.setattr(engine, "_without_attention", lambda path: parsed.append(spell_out(path)) or parsed[0])
    assert build_engine(path, runtime="tensorrt_rtx").portable == ("first",)
    (text,) = map(onnx.load_from_string, parsed)
    assert {"Softmax", "VMoBAAttention"} <= {x.op_type for x in text.graph.node} >= {"MatMul"}
    assert not any(x.op_type == "Attention" for x in text.graph.node)
    feeds = {"q": np.random.default_rng(0).normal(size=shape), "k": np.random.default_rng(1).normal(size=shape)}
    feeds = {name: x.astype(np.float32) for name, x in feeds.items()}
    feeds |= {"mask": np.tril(np.ones((1, 1, 64, 64), bool))} if masked else {}
    runs = [ReferenceEvaluator(x).run(None, feeds)[0] for x in (onnx.load(str(path)), text)]
    np.testing.assert_allclose(*runs, rtol=1e-5, atol=1e-6)


@needs_rtx
def test_attention_of_unknown_inputs_is_refused(tmp_path, monkeypatch):
    """Where the schema of VMoBA's nodes is registered and the file has no types."""

    def fail(*_, **__):
        raise RuntimeError("Type unknown for x")

    monkeypatch.setattr(onnx.inliner, "inline_selected_functions", fail)
    nodes = [node("VMoBAAttention", ["q", "q"], ["x"], domain="vmoba", threshold=0.5, **PLUGIN)]
    port = tensor("q", FLOAT, (1, 2, 64, 16))
    path = write(tmp_path / "m.onnx", nodes, [port], [tensor("x", FLOAT, (1, 2, 64, 16))], (), [selection(23)], 23)
    with pytest.raises(
        ExportError, match=r"does not tell the types .*Type unknown for x.*export_onnx, or with opset=20"
    ):
        build_engine(path, runtime="tensorrt_rtx")


@needs_rtx
@pytest.mark.parametrize("dtype", [BFLOAT16, HALF])
def test_bfloat16_is_warned_of(dtype, tmp_path, recwarn):
    path = write(
        tmp_path / "m.onnx", [node("Relu", ["x"], ["y"])], [tensor("x", dtype, [4])], [tensor("y", dtype, [4])]
    )
    build_engine(path, runtime="tensorrt_rtx")
    told = [str(x.message) for x in recwarn if "gave NaN" in str(x.message)]
    assert len(told) == (dtype == BFLOAT16) and all("export the model in float16" in text for text in told)


@needs_rtx
def test_parser_errors_name_the_node(tmp_path):
    body = function("Select", ["a"], ["b"], [node("BitwiseNot", ["a"], ["b"], name="flip")])
    nodes = [node("Select", ["x"], ["y"], name="blocks.0.attn1", domain="vmoba")]
    path = write(tmp_path / "m.onnx", nodes, [tensor("x", 6, [4])], [tensor("y", 6, [4])], functions=[body])
    with pytest.raises(ExportError, match=r"TensorRT-RTX \S+ cannot parse node '.*flip.*' \(BitwiseNot\) of m.onnx"):
        build_engine(path, runtime="tensorrt_rtx")


@needs_rtx
def test_builder_errors_keep_the_cause(tmp_path):
    nodes = [node("TopK", ["x", "k"], ["v", "i"], name="sort")]
    outputs = [tensor("v", FLOAT, [1, 4000]), tensor("i", INT64, [1, 4000])]
    path = write(
        tmp_path / "m.onnx", nodes, [tensor("x", FLOAT, [1, 5000])], outputs, [constant("k", np.array([4000]))]
    )
    with pytest.raises(ExportError, match=r"cannot build m.onnx: .*K exceeds the maximum value allowed \(3840\)$"):
        build_engine(path, runtime="tensorrt_rtx")


@needs_rtx
def test_float64_is_refused_or_named(tmp_path):
    ports = [tensor("x", DOUBLE, [4])], [tensor("y", DOUBLE, [4])]
    with pytest.raises(ExportError, match=r"engines have no float64, and x, y of m\.onnx"):
        build_engine(write(tmp_path / "m.onnx", [node("Cos", ["x"], ["y"])], *ports), runtime="tensorrt_rtx")
    nodes = [node("Cast", ["x"], ["d"], to=DOUBLE), node("Cos", ["d"], ["c"]), node("Cast", ["c"], ["y"], to=FLOAT)]
    path = write(tmp_path / "n.onnx", nodes, [tensor("x", FLOAT, [4])], [tensor("y", FLOAT, [4])])
    with pytest.warns(UserWarning, match="1 casts of n.onnx to it .* are computed in float32"):
        build_engine(path, runtime="tensorrt_rtx")


@needs_rtx
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capability": (9, 0)}, r"builds for compute capability .*\(8, 0\).*not \(9, 0\); None is for 8.0 and later"),
        ({"plugins": "aot"}, "TensorRT-RTX has no plugins"),
        ({"plugins": "some"}, "plugins must be one of 'none', 'aot', 'jit'"),
        ({"workspace": 0}, "workspace must be a number of bytes"),
        ({"timing_cache": "t"}, "timing_cache is TensorRT's"),
        ({"runtime": "cuda"}, "runtime must be one of 'auto', 'tensorrt', 'tensorrt_rtx'"),
    ],
)
def test_bad_options(tmp_path, options, message):
    path = attention_file(tmp_path / "m.onnx")
    with pytest.raises(ValueError, match=message):
        build_engine(path, **{"runtime": "tensorrt_rtx", **options})


@needs_rtx
def test_an_older_engine_stays_until_the_new_one_is_written(tmp_path, monkeypatch):
    onnx_path, engine_path = attention_file(tmp_path / "m.onnx"), tmp_path / "m.engine"
    engine_path.write_text("precious")
    write_bytes = Path.write_bytes

    def full(path, data):
        write_bytes(path, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left"):
        patched.setattr(Path, "write_bytes", full)
        build_engine(onnx_path, engine_path, runtime="tensorrt_rtx")
    assert engine_path.read_text() == "precious" and sorted(tmp_path.iterdir()) == [engine_path, onnx_path]
    assert build_engine(onnx_path, engine_path, runtime="tensorrt_rtx").bytes == engine_path.stat().st_size > 1000
    assert sorted(tmp_path.iterdir()) == [engine_path, onnx_path]


def test_bad_places_for_an_engine(tmp_path):
    path = attention_file(tmp_path / "m.onnx")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"would be written over its ONNX file .*m\.onnx; give another engine_path"):
        build_engine(path, tmp_path / "." / "m.onnx")
    with pytest.raises(ValueError, match="is a folder; give the path of a file"):
        build_engine(path, tmp_path)
    assert path.read_bytes() == before


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no ONNX file"):
        build_engine(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("not ONNX at all")
    if find_spec("tensorrt_rtx") is not None:
        with pytest.raises(ExportError, match=r"text\.onnx is not an ONNX file"):
            build_engine(tmp_path / "text.onnx", runtime="tensorrt_rtx")


@needs_rtx
def test_weights_left_behind(tmp_path):
    x, y = tensor("x", FLOAT, (4, 64)), tensor("y", FLOAT, (4, 64))
    weight = constant("w", np.ones((64, 64), np.float32))
    model = onnx.load(write(tmp_path / "m.onnx", [node("MatMul", ["x", "w"], ["y"])], [x], [y], [weight]))
    path = tmp_path / "outside.onnx"
    onnx.save(model, str(path), save_as_external_data=True, location="outside.onnx.data")
    assert build_engine(path).path.is_file()
    with pytest.raises(ValueError, match=r"over .*outside\.onnx's weights"):
        build_engine(path, tmp_path / "outside.onnx.data")
    (tmp_path / "outside.onnx.data").unlink()
    with pytest.raises(FileNotFoundError, match=r"weights of .*outside\.onnx are missing.*outside\.onnx\.data"):
        build_engine(path)


def test_missing_libraries_are_named(monkeypatch):
    monkeypatch.setattr(tensorrt_library, "_imported", lambda name: None)
    with pytest.raises(
        ExportError, match=r"^engines need TensorRT or TensorRT-RTX: pip install tensorrt-cu13 or pip install"
    ):
        tensorrt_library.find_library()
    with pytest.raises(ExportError, match=r"^engines need TensorRT: pip install tensorrt-cu13$"):
        tensorrt_library.find_library("auto", "aot")


@pytest.mark.parametrize(
    ("version", "plugins", "message"),
    [
        ("10.14.1.48", "aot", "TensorRT 10.14.1.48 has a defect in plugins written in Python"),
        ("10.6.0", "jit", "TensorRT 10.6.0 is too old, at least 10.7 for plugins='jit' is needed"),
        ("8.6.1", "none", "TensorRT 8.6.1 is too old, at least 10.0 is needed: pip install"),
        ("10.14.1.48", "none", None),
        ("10.7.0", "aot", None),
        ("11.1.0", "jit", None),
    ],
)
def test_versions_of_tensorrt(monkeypatch, version, plugins, message):
    monkeypatch.setattr(tensorrt_library, "_imported", lambda name: SimpleNamespace(__version__=version))
    if message is None:
        assert tensorrt_library.find_library("tensorrt", plugins).version == version
    else:
        with pytest.raises(ExportError, match=message):
            tensorrt_library.find_library("tensorrt", plugins)


def test_tensorrt_is_not_what_torch_tensorrt_calls_so(monkeypatch):
    """Torch-TensorRT for TensorRT-RTX enters that library in sys.modules as tensorrt."""
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(_package_name="tensorrt_rtx", __version__="1.4.0.76"))
    assert tensorrt_library._imported("tensorrt") is None


@pytest.mark.skipif(find_spec("tensorrt") is None, reason="needs TensorRT")
def test_engine_of_tensorrt(tmp_path):
    engine = build_engine(attention_file(tmp_path / "m.onnx"), runtime="tensorrt", timing_cache=tmp_path / "cache")
    assert engine.runtime == "tensorrt" and engine.portable == ("first", "second")
    assert (tmp_path / "cache").stat().st_size


def test_import_stays_light():
    code = "import sys, vmoba_compile.deploy.engine as e; sys.exit(any(n in sys.modules for n in ('onnx', 'tensorrt_rtx')))"
    assert subprocess.run([sys.executable, "-P", "-W", "ignore", "-c", code]).returncode == 0
