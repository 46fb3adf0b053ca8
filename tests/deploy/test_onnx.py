"""``export_onnx``: files that run in ONNX Runtime as the optimized model does, and refusals."""

from __future__ import annotations

import json
import os
import sys

import models
import numpy as np
import onnx_files
import pytest
import torch
from torch import nn

import vmoba_compile
from vmoba_compile import ExportError, VMoBAConfig

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

EXPORTS = [("wan", False, 20), ("wan", True, 23), ("cogvideox", False, 20), ("cogvideox", True, 20)]
NAMED = {
    f"{name}-{'dynamic' if dynamic else 'static'}-{opset}": (name, dynamic, opset) for name, dynamic, opset in EXPORTS
}
# The tests of one file run in one process, which makes it once.
FILES = [pytest.param(*given, id=label, marks=pytest.mark.xdist_group(label)) for label, given in NAMED.items()]


def session(path):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def batch_of(inputs: dict, batch: int) -> dict:
    """Other inputs of the same kind; what has no batch stays."""
    rows = inputs["hidden_states"].shape[0]

    def change(x):
        if not isinstance(x, torch.Tensor) or x.shape[0] != rows:
            return x
        shape = (batch, *x.shape[1:])
        return torch.randn(shape) if x.is_floating_point() else torch.randint(0, 999, shape)

    return {name: change(x) for name, x in inputs.items()}


def feeds(found, inputs: dict) -> dict:
    leaves = torch.utils._pytree.tree_leaves(inputs)
    return {x.name: leaf.numpy() for x, leaf in zip(found.get_inputs(), leaves, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dynamic", "opset"), FILES)
def test_runs_as_the_optimized_model(name, dynamic, opset):
    model, inputs, made = onnx_files.exported(name, dynamic=dynamic, opset=opset)
    fast = vmoba_compile.optimize(model.eval(), models.CONFIG, inner="eager")
    found = session(made.path)
    for batch in (2, 1, 3) if dynamic else (2,):
        own = inputs if batch == 2 else batch_of(inputs, batch)
        with torch.no_grad():
            expected = fast(**own).sample
        got = torch.from_numpy(found.run(None, feeds(found, own))[0])
        assert models.relative(got, expected) < 1e-4
    assert len(vmoba_compile.report(fast).rewritten) == 2
    assert bool(made.dynamic) is dynamic and made.nodes == 4
    assert max(made.errors.values()) < 1e-4 and not made.unverified
    assert "4 vmoba nodes" in str(made)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dynamic", "opset"), FILES)
def test_nodes_carry_what_plugins_need(name, dynamic, opset):
    _, _, made = onnx_files.exported(name, dynamic=dynamic, opset=opset)
    file = onnx.load(made.path)
    nodes = [node for node in file.graph.node if node.domain == "vmoba"]
    assert [node.op_type for node in nodes] == ["VMoBASelect", "VMoBAAttention"] * 2
    assert {(f.domain, f.name) for f in file.functions} == {("vmoba", "VMoBASelect"), ("vmoba", "VMoBAAttention")}
    sites = made.report.rewritten
    for site, pair in zip(sites, (nodes[:2], nodes[2:]), strict=True):
        for node in pair:
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            assert attributes["plugin_namespace"] == b"vmoba" and attributes["plugin_version"] == b"1"
            assert tuple(attributes["grid"]) == site.grid and tuple(attributes["block"]) == site.block
            assert (attributes["prefix"], attributes["suffix"]) == (site.prefix, site.suffix)
            assert attributes["threshold"] == pytest.approx(models.CONFIG.threshold)
    properties = {p.key: p.value for p in file.metadata_props}
    assert VMoBAConfig.from_json(properties["vmoba_compile.config"]) == models.CONFIG
    assert len(json.loads(properties["vmoba_compile.report"])["sites"]) == len(made.report)
    opsets = {x.domain: x.version for x in file.opset_import}
    assert opsets[""] == opset and opsets["vmoba"] == 1


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dynamic", "opset"), FILES)
def test_tensorrt_rtx_builds_an_engine(name, dynamic, opset, tmp_path):
    pytest.importorskip("tensorrt_rtx", exc_type=ImportError)
    _, _, made = onnx_files.exported(name, dynamic=dynamic, opset=opset)
    shapes = made.ranges(1, 2, 4)
    assert bool(shapes) is dynamic
    engine = vmoba_compile.build_engine(
        made.path, tmp_path / "model.engine", runtime="tensorrt_rtx", dynamic=shapes, progress=False
    )
    assert engine.bytes == engine.path.stat().st_size > 100_000
    assert len(engine.portable) == 4 and not engine.plugins
    assert [port.name for port in engine.inputs if port.profile] == list(shapes)


@pytest.mark.slow
def test_sizes_of_the_video_may_be_dynamic(tmp_path):
    model, inputs = models.build("wan", num_layers=2)
    any_size = torch.export.Dim.DYNAMIC
    shapes = {name: {0: any_size} for name in inputs}
    shapes["hidden_states"] = {0: any_size, 2: any_size, 3: any_size, 4: any_size}
    made = vmoba_compile.export_onnx(
        model, (), inputs, tmp_path / "wan.onnx", config=models.CONFIG, dynamic_shapes=shapes, progress=False
    )
    assert len(made.dynamic) == 4
    found = session(made.path)
    fast = vmoba_compile.optimize(model.eval(), models.CONFIG, inner="eager")
    for shape in [(1, 4, 5, 8, 20), (3, 4, 2, 6, 10)]:
        own = batch_of(inputs, shape[0]) | {"hidden_states": torch.randn(shape)}
        with torch.no_grad():
            expected = fast(**own).sample
        assert models.relative(torch.from_numpy(found.run(None, feeds(found, own))[0]), expected) < 1e-4


@pytest.mark.slow
def test_masked_text_and_external_weights(tmp_path):
    model, inputs = models.build("hunyuanvideo", num_layers=1, num_single_layers=1)
    made = vmoba_compile.export_onnx(
        model, (), inputs, tmp_path / "new" / "model.onnx", config=models.CONFIG, external_data=True, progress=False
    )
    assert [x.name for x in made.files] == ["model.onnx", "model.onnx.data"]
    assert sorted(x.name for x in made.path.parent.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert max(made.errors.values()) < 1e-4


class Video(nn.Module):
    """One self-attention over a video."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv3d(3, 16, (1, 2, 2), (1, 2, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        q = tokens.unflatten(2, (2, 8)).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(q, q, q)


def video(batch: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(batch, 3, 4, 12, 12, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision(dtype, tmp_path):
    path = tmp_path / "half.onnx"
    model, x = Video().to(dtype), video(dtype=dtype)
    if dtype == torch.float16:
        made = vmoba_compile.export_onnx(model, (x,), None, path, config=models.CONFIG, progress=False)
        assert max(made.errors.values()) < 1e-2
        assert session(path).run(None, {"x": x.numpy()})[0].dtype == np.float16
        return
    with pytest.warns(UserWarning, match="no bfloat16"):
        made = vmoba_compile.export_onnx(model, (x,), None, path, config=models.CONFIG, progress=False)
    assert made.errors is None and "bfloat16" in made.unverified
    # The same graph in float32 says whether the nodes are right: ONNX's own evaluator knows bfloat16.
    got = onnx.reference.ReferenceEvaluator(onnx.load(path)).run(
        None, {"x": x.view(torch.uint16).numpy().view(bfloat16())}
    )[0]
    with torch.no_grad():
        expected = vmoba_compile.optimize(model, models.CONFIG, inner="eager")(x).float()
    assert models.relative(torch.from_numpy(got.astype(np.float32)), expected) < 1e-2


def bfloat16():
    import ml_dtypes

    return ml_dtypes.bfloat16


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.float16, 2e-3)], ids=["fp32", "fp16"])
def test_what_rms_norm_is_on_a_gpu(dtype, error, tmp_path):
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 8, dtype=dtype))

        def forward(self, x):
            normal = torch.ops.aten._fused_rms_norm
            return normal(normal(x, [4, 8], self.weight, 1e-6)[0], [8], None, None)[0]

    with pytest.warns(UserWarning, match="exports Fused dense"):
        made = vmoba_compile.export_onnx(
            Fused(), (torch.randn(3, 4, 8, dtype=dtype),), path=tmp_path / "fused.onnx", progress=False
        )
    assert max(made.errors.values()) < error


def test_the_default_epsilon_is_that_of_float32(tmp_path):
    class Small(nn.Module):
        def forward(self, x):
            return torch.ops.aten._fused_rms_norm(x, [8], None, None)[0]

    with pytest.warns(UserWarning, match="exports Small dense"):
        made = vmoba_compile.export_onnx(
            Small(), (torch.full((2, 8), 0.02, dtype=torch.float16),), path=tmp_path / "x.onnx", progress=False
        )
    assert session(made.path).run(None, {"x": np.full((2, 8), 0.02, np.float16)})[0] == pytest.approx(1, abs=0.01)


def test_an_optimized_model_brings_its_config_and_is_left_as_it_was(tmp_path):
    model = Video().train()
    fast = vmoba_compile.optimize(model, models.CONFIG, inner="eager")
    made = vmoba_compile.export_onnx(fast, (video(),), path=tmp_path / "video.onnx", progress=False)
    assert made.report.rewritten[0].block == models.expected_block(0, (4, 6, 6))
    assert model.training and model.patch.training


def test_a_dense_model_is_exported_with_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="exports Video dense"):
        made = vmoba_compile.export_onnx(Video(), (video(),), path=tmp_path / "video.onnx", progress=False)
    assert made.nodes == 0 and made.body_bytes == 0 and max(made.errors.values()) < 1e-5


def test_hopeless_sizes_are_said(tmp_path, monkeypatch):
    from vmoba_compile.deploy import onnx as module

    monkeypatch.setattr(module, "HOPELESS", 1000)
    with pytest.warns(UserWarning, match=r"portable body of video\.onnx needs .* GiB"):
        made = vmoba_compile.export_onnx(
            Video(), (video(),), path=tmp_path / "video.onnx", config=models.CONFIG, progress=False
        )
    assert made.errors is None and made.unverified and made.nodes == 2


def test_what_was_there_stays_where_an_export_fails(tmp_path):
    class Refused(Video):
        def forward(self, x):
            return super().forward(x) if float(x.sum()) > 0 else x

    path = tmp_path / "video.onnx"
    path.write_bytes(b"precious")
    with pytest.raises(ExportError, match=r"torch\.export cannot trace Refused"):
        vmoba_compile.export_onnx(Refused(), (video(),), path=path, progress=False)
    assert path.read_bytes() == b"precious" and list(tmp_path.iterdir()) == [path]


def test_a_file_and_its_weights_are_replaced_together(tmp_path, monkeypatch):
    from vmoba_compile import files
    from vmoba_compile.deploy import onnx as module

    path, weights = tmp_path / "video.onnx", tmp_path / "video.onnx.data"

    def export(seed: int):
        torch.manual_seed(seed)
        return vmoba_compile.export_onnx(
            Video(), (video(),), path=path, config=models.CONFIG, external_data=True, progress=False
        )

    assert export(0).files == (path, weights)
    before = path.read_bytes(), weights.read_bytes()

    def fail(*_):
        raise ExportError("refused")

    with monkeypatch.context() as patched, pytest.raises(ExportError, match="refused"):
        patched.setattr(module, "_check_file", fail)
        export(1)
    move = os.replace

    def fail_last(source, target):
        if target == path:
            raise PermissionError(13, "Permission denied")
        move(source, target)

    with monkeypatch.context() as patched, pytest.raises(ExportError, match=r"cannot write .*: Permission denied"):
        patched.setattr(files.os, "replace", fail_last)
        export(1)
    assert (path.read_bytes(), weights.read_bytes()) == before and sorted(tmp_path.iterdir()) == [path, weights]
    made = export(1)
    assert weights.read_bytes() != before[1] and sorted(tmp_path.iterdir()) == [path, weights]
    assert max(made.errors.values()) < 1e-4 and session(path).get_inputs()


def test_wrong_use(tmp_path):
    export = vmoba_compile.export_onnx
    with pytest.raises(ValueError, match="opset must be one of 20, 23"):
        export(Video(), (video(),), opset=18)
    with pytest.raises(ValueError, match="batch 2 or more"):
        export(Video(), (video(),), dynamic_batch=True)
    with pytest.raises(ValueError, match="either dynamic_batch or dynamic_shapes"):
        export(Video(), (video(2),), dynamic_batch=True, dynamic_shapes={})
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        export(len, (video(),))
    with pytest.raises(vmoba_compile.CoverageError, match="expect=2"):
        export(Video(), (video(),), path=tmp_path / "x.onnx", config=models.CONFIG, expect=2)
    assert not list(tmp_path.iterdir())


def test_a_batch_that_the_model_fixes_is_said(tmp_path):
    class Fixed(nn.Module):
        def forward(self, x, scale=None):
            return x * scale + torch.ones(2, 3)

    with pytest.raises(ExportError, match="fixes the batch at 2"):
        vmoba_compile.export_onnx(
            Fixed(), (torch.randn(2, 3),), {"scale": torch.ones(1, 3)}, tmp_path / "x.onnx", dynamic_batch=True
        )


def test_attention_in_a_subgraph_is_refused(tmp_path):
    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.video = Video()

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
                return self.video(x)

    with pytest.raises(ExportError, match="lies in a subgraph of the exported program"):
        vmoba_compile.export_onnx(Inside(), (video(),), path=tmp_path / "x.onnx", config=models.CONFIG)


def test_what_onnx_runtime_cannot_run_is_kept(tmp_path):
    class Bools(nn.Module):
        def forward(self, x):
            return torch.where(x > 0, x > 1, x < -1)

    with pytest.warns(UserWarning, match="cannot run it"):
        made = vmoba_compile.export_onnx(Bools(), (torch.randn(3, 4),), path=tmp_path / "x.onnx", progress=False)
    assert made.path.exists() and made.errors is None


def test_attentions_of_one_file_select_alike(tmp_path):
    class Own(nn.Module):
        def forward(self, q):
            sizes = {"grid": (4, 6, 6), "block": (2, 3, 3)}
            once = vmoba_compile.attention(q, q, q, **sizes)
            return vmoba_compile.attention(once, once, once, **sizes, threshold=0.5)

    with pytest.raises(ExportError, match="select in different ways"):
        vmoba_compile.export_onnx(Own(), (torch.randn(1, 2, 144, 8),), path=tmp_path / "own.onnx", progress=False)


def test_missing_libraries_are_named(monkeypatch):
    from vmoba_compile.deploy import onnx as module

    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"needs onnx, onnxscript, onnxruntime: pip install 'vmoba_compile\[onnx\]'"):
        vmoba_compile.export_onnx(Video(), (video(),))


def test_importing_the_package_imports_no_onnx():
    code = "import sys, vmoba_compile; sys.exit(any(m.split('.')[0] in ('onnx', 'onnxscript') for m in sys.modules))"
    import subprocess

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
