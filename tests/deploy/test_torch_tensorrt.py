"""``export_torch_tensorrt`` without a GPU: refusals, what is asked of Torch-TensorRT, what is told of its partition, saving.

``Splitter`` stands for the library: it splits the program around what it is told to leave in PyTorch, as the library does,
and leaves out only the engines.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import fx, nn
from torch.fx.passes.split_module import split_module

from vmoba_compile import ExportError, VMoBAConfig
from vmoba_compile.deploy import torch_tensorrt as deploy

GRID = (2, 4, 6)
VMOBA = VMoBAConfig(min_tokens=0)
SINES = torch.ops.aten.sin.default


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x, scale=None, flag: bool = True):
        q, k, v = (y.unflatten(-1, (2, 16)).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=-1))
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        y = self.out(torch.sin(y))
        return {"y": y if flag else -y}


class Splitter:
    """``torch_tensorrt.dynamo.compile`` but for the engines: every part is a graph module."""

    def __init__(self) -> None:
        self.settings = {}
        converters = SimpleNamespace(DYNAMO_CONVERTERS=self)
        self.dynamo = SimpleNamespace(compile=self.compile, conversion=converters)

    def __contains__(self, node: fx.Node) -> bool:
        return not str(node.target).startswith("vmoba.") and node.target != SINES

    def compile(self, program, *, arg_inputs, kwarg_inputs, **settings):
        self.settings = settings
        module = program.module()
        for node in module.graph.find_nodes(op="call_module", target="_guards_fn"):
            module.graph.erase_node(node)
        parts, last = {}, None
        for node in module.graph.nodes:
            if node.op == "call_function":
                side = "acc" if node in self else "gpu"
                last = last if last is not None and last[1] == side else (0 if last is None else last[0] + 1, side)
                parts[node] = f"_run_on_{side}_{last[0]}"
        codegen = module.graph._codegen
        split = split_module(module, module, lambda node: parts[node], partition_affix="")
        for name, _ in list(split.named_children()):
            if name.startswith("submod"):  # its own prefix
                plain = name.removeprefix("submod_").lstrip("_")
                split.add_submodule(f"_{plain}", split.get_submodule(name))
                for node in split.graph.find_nodes(op="call_module", target=name):
                    node.target = f"_{plain}"
                split.delete_submodule(name)
        split.graph.set_codegen(codegen)
        split.recompile()
        return split


@pytest.fixture
def library(monkeypatch):
    made = Splitter()
    monkeypatch.setattr(deploy, "find_torch_tensorrt", lambda: (made, "torch-tensorrt 0"))
    monkeypatch.setattr(deploy, "_device", lambda *_: torch.device("cpu"))
    return made


def test_partition_is_told(library):
    model, x = Model(), torch.randn(1, 48, 32)
    made = deploy.export_torch_tensorrt(model, (x,), config=VMOBA, grid=GRID, expect=1, optimization_level=3)
    assert made.engines == 3
    operators = [(left.operator, left.reason) for left in made.in_pytorch]
    assert operators == [
        ("vmoba.select", "runs its own kernels"),
        ("vmoba.attention", "runs its own kernels"),
        ("aten.sin", "no converter of Torch-TensorRT takes it"),
    ]
    assert "3 engines of torch-tensorrt 0" in str(made) and "2 vmoba operators between them" in str(made)
    assert "also in PyTorch: aten.sin: no converter of Torch-TensorRT" in str(made)
    assert made.report.summary().startswith("1 of 1")


def test_results_are_compared(library):
    made = deploy.export_torch_tensorrt(Model(), (torch.randn(1, 48, 32),), config=VMOBA, grid=GRID)
    assert made.error is not None and made.error < 1e-5 and "error" in str(made)
    unchecked = deploy.export_torch_tensorrt(Model(), (torch.randn(1, 48, 32),), config=VMOBA, grid=GRID, verify=False)
    assert unchecked.error is None


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda *_: {"y": torch.full((1, 48, 32), torch.nan)}, "give NaN where PyTorch gives numbers"),
        (lambda *_: torch.ones(2) @ torch.ones(3), "fail: RuntimeError"),
    ],
    ids=["nan", "error"],
)
def test_broken_engines_are_refused(library, monkeypatch, broken, message, tmp_path):
    monkeypatch.setattr(deploy.TorchTensorRT, "__call__", broken)
    path = tmp_path / "model.pt2"
    with pytest.raises(ExportError, match=message):
        deploy.export_torch_tensorrt(Model(), (torch.randn(1, 48, 32),), path=path, config=VMOBA, grid=GRID)
    assert not path.exists()


def test_operators_left_in_small_blocks(library, monkeypatch):
    """What has a converter but lies outside of the engines stands in a block that was too small for one."""
    monkeypatch.setattr(Splitter, "__contains__", lambda self, node: "linear" in str(node.target))

    def plain(program, **settings):
        return program.module()

    library.dynamo.compile = plain
    made = deploy.export_torch_tensorrt(Model(), (torch.randn(1, 48, 32),), config=VMOBA, grid=GRID, min_block_size=7)
    reasons = {left.operator: left.reason for left in made.in_pytorch}
    assert made.engines == 0
    assert reasons["aten.linear"] == "it stands among fewer than 7 operators that an engine could hold"
    assert reasons["aten.sin"] == "no converter of Torch-TensorRT takes it"


def test_what_is_asked_of_the_library(library):
    x = torch.randn(1, 48, 32)
    deploy.export_torch_tensorrt(Model(), (x,), config=VMOBA, grid=GRID, min_block_size=2, workspace_size=7)
    assert library.settings["attn_bias_is_causal"] is False  # else masks would become causal ones
    assert library.settings["disable_tf32"] is True  # as torch.set_float32_matmul_precision says
    assert (library.settings["min_block_size"], library.settings["workspace_size"]) == (2, 7)


def test_result_is_called_and_saved_like_the_model(library, tmp_path):
    model, x = Model(), torch.randn(1, 48, 32)
    path = tmp_path / "deep" / "model.pt2"
    kwargs = {"scale": None, "flag": False}
    made = deploy.export_torch_tensorrt(model, (x,), kwargs, path, config=VMOBA, grid=GRID)
    assert made.path == path and path.is_file()
    other = torch.randn(1, 48, 32)
    wanted = made(other, **kwargs)
    assert list(wanted) == ["y"] and not wanted["y"].requires_grad
    assert torch.equal(deploy.load_torch_tensorrt(path)(other, **kwargs)["y"], wanted["y"])
    (tmp_path / "bad.pt2").write_bytes(b"nothing")
    with pytest.raises(ExportError, match=r"torch-tensorrt 0 cannot load .*bad\.pt2: "):
        deploy.load_torch_tensorrt(tmp_path / "bad.pt2")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        deploy.load_torch_tensorrt(tmp_path / "none.pt2")


def test_an_older_file_stays_until_the_new_one_is_complete(library, monkeypatch, tmp_path):
    path = tmp_path / "model.pt2"
    path.write_text("precious")
    made = deploy.export_torch_tensorrt(Model(), (torch.randn(1, 48, 32),), config=VMOBA, grid=GRID)

    def full(program, file):
        with open(file, "w") as half:
            half.write("ha")
        raise OSError("No space left on device")

    with monkeypatch.context() as patched, pytest.raises(ExportError, match=r"cannot be written to .*No space left"):
        patched.setattr(torch.export, "save", full)
        made.save(path)
    assert path.read_text() == "precious" and list(tmp_path.iterdir()) == [path]
    made.save(path)
    assert list(tmp_path.iterdir()) == [path] and path.stat().st_size > 1000
    deploy.load_torch_tensorrt(path)
    with pytest.raises(ValueError, match="is a folder; give the path of a file"):
        deploy.export_torch_tensorrt(Model(), (torch.randn(1, 48, 32),), path=tmp_path, config=VMOBA, grid=GRID)


def test_failures_name_the_model(library):
    def fail(program, **settings):
        raise RuntimeError("no engine\nand a long trace")

    library.dynamo.compile = fail
    with pytest.raises(ExportError, match=r"^Torch-TensorRT cannot compile Model: RuntimeError: no engine$"):
        deploy.export_torch_tensorrt(Model(), (torch.randn(1, 48, 32),), config=VMOBA, grid=GRID)


def test_failures_have_the_cause_that_the_library_logs(library):
    """Its builder logs why it gives None, which then breaks the next call."""

    def fail(program, **settings):
        logging.getLogger("torch_tensorrt [TensorRT Conversion Context]").error(
            "IBuilder::buildSerializedNetwork: Error Code 1: Myelin ([graph.h:1: attach] bad weights In compile at /a.cpp:1)"
        )
        logging.getLogger("others").error("something else")
        raise TypeError("deserialize_cuda_engine(): incompatible function arguments")

    library.dynamo.compile = fail
    before = list(logging.getLogger().handlers)
    with pytest.raises(ExportError, match=r"^Torch-TensorRT cannot compile Model: bad weights$"):
        deploy.export_torch_tensorrt(Model(), (torch.randn(1, 48, 32),), config=VMOBA, grid=GRID)
    assert logging.getLogger().handlers == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_no_gpu():
    with pytest.raises(ExportError, match="on the GPU that runs them, and torch sees no GPU"):
        deploy.export_torch_tensorrt(Model(), (torch.randn(1, 48, 32),))


def test_missing_library(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(deploy, "_version", lambda name: None)
    wanted = ".".join(torch.__version__.split(".")[:2])
    with pytest.raises(
        ExportError, match=rf"needs Torch-TensorRT for torch {wanted}: pip install 'torch-tensorrt=={wanted}"
    ):
        deploy.find_torch_tensorrt()
    monkeypatch.setattr(deploy, "_version", lambda name: "1.0" if name == "torch-tensorrt-rtx" else None)
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    with pytest.raises(
        ExportError, match=r"torch-tensorrt-rtx 1.0 cannot be imported with torch .*pip install 'torch-tensorrt-rtx=="
    ):
        deploy.find_torch_tensorrt()


def test_inputs_must_be_on_a_gpu():
    with pytest.raises(ValueError, match="must be on one GPU, not on cpu"):
        deploy._device(Model(), (torch.randn(1),), {})
    with pytest.raises(ValueError, match="must be on one GPU, not on cpu, meta"):
        deploy._device(Model(), (torch.randn(1, device="meta"),), {})


def test_import_stays_light():
    code = "import sys, vmoba_compile.deploy.torch_tensorrt; sys.exit('torch_tensorrt' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-W", "ignore", "-c", code]).returncode == 0
