"""Packages, as far as they go without a GPU: a dense one from end to end, in Python and C++, and every refusal."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from vmoba_compile import ExportError, Package, Report, VMoBAConfig, attention, export_onnx
from vmoba_compile.deploy import package
from vmoba_compile.deploy.package import export_package, read_about, replace_operators
from vmoba_compile.deploy.program import capture, relative_error
from vmoba_compile.deploy.replay import DYNAMIC, Replays

EXAMPLE = Path(__file__).parents[2] / "examples" / "package_cpp"
GRID, BLOCK = (2, 3, 4), (1, 3, 2)


class Attention(nn.Module):
    """A model of its own with VMoBA attention in it."""

    def __init__(self, implementation: str = "auto") -> None:
        super().__init__()
        self.project = nn.Linear(16, 48)
        self.implementation = implementation

    def forward(self, x):
        q, k, v = self.project(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        out = attention(q, k, v, GRID, block=BLOCK, implementation=self.implementation)
        return out.transpose(1, 2).flatten(2)


def dense() -> tuple[nn.Module, torch.Tensor]:
    """A model without attention, and its input."""
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)), torch.randn(3, 16)


@pytest.fixture
def no_compiler(monkeypatch):
    """Refusals come before anything is compiled."""

    def fail(*args, **kwargs):
        raise AssertionError("compiled")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail)


def test_a_model_on_the_cpu_is_refused(tmp_path, no_compiler):
    with pytest.raises(ExportError, match=r"on the device 'cpu'; move it and its inputs to a GPU with \.to\('cuda'\)"):
        export_package(Attention(), (torch.randn(1, 24, 16),), path=tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


def test_another_suffix_is_refused(tmp_path, no_compiler):
    with pytest.raises(ValueError, match=r"must end in \.pt2"):
        export_package(*dense()[:1], (dense()[1],), path=tmp_path / "model.so")


@pytest.mark.parametrize("export", [export_package, export_onnx])
@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        (torch.ones(3, 16), None, r"args must be a tuple of inputs, such as \(x,\), not Tensor"),
        ("model.pt2", None, "args must be a tuple of inputs, .* not str"),
        ((), (torch.ones(3, 16),), "kwargs must be a dict of inputs by name, not tuple"),
    ],
    ids=["tensor", "path", "tuple"],
)
def test_inputs_of_another_kind(tmp_path, no_compiler, export, args, kwargs, message):
    with pytest.raises(TypeError, match=message):
        export(dense()[0], args, kwargs, tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def as_on_gpu(monkeypatch):
    from vmoba_compile.kernels import implementations

    monkeypatch.setattr(implementations, "_no_triton", lambda q: "")


def test_operators_are_replaced(as_on_gpu):
    program = capture(Attention(), (torch.randn(1, 24, 16),)).program
    before = {str(node.target): node for node in program.graph.nodes}
    assert replace_operators(program) == 1
    after = {str(node.target): node for node in program.graph.nodes}
    for name in ("select", "attention"):
        old, new = before[f"vmoba.{name}.default"], after[f"vmoba.{name}_inline.default"]
        assert old.args == new.args and "implementation" not in new.kwargs
    assert "vmoba.attention.default" not in after
    assert replace_operators(program) == 0


def test_an_implementation_asked_for_by_name_is_not_exchanged(as_on_gpu):
    program = capture(Attention("reference"), (torch.randn(1, 24, 16),)).program
    with pytest.raises(ExportError, match="asks for implementation='reference'"):
        replace_operators(program)


class Unrecorded(Replays):
    """On a GPU whose launches cannot be recorded."""

    def __init__(self, reason: str | Exception) -> None:
        super().__init__(torch.device("cpu"))
        self.reason = reason

    def exchange(self, node):
        if isinstance(self.reason, Exception):
            raise self.reason
        return self.reason


def test_portable_kernels_for_fixed_sizes_are_told(as_on_gpu):
    model = nn.Sequential(Attention(), Attention())
    program = capture(model, (torch.randn(1, 24, 16),)).program
    with pytest.warns(UserWarning) as warned:
        assert replace_operators(program, Unrecorded("no luck")) == 2
    assert [str(x.message) for x in warned] == [
        "the package has the portable kernels for the attention at 0, 1: no luck"
    ]
    program = capture(Attention(), (torch.randn(1, 24, 16),)).program
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert replace_operators(program, Unrecorded(DYNAMIC)) == 1


@pytest.mark.parametrize(
    ("replays", "message"),
    [
        (None, "recorded launches alone: launches are not recorded in such a package; leave it at 'auto'"),
        (Unrecorded(DYNAMIC), "recorded launches alone: its sizes are dynamic; leave it at 'auto'"),
        (Unrecorded(ValueError("it takes no float32")), "cannot hold the attention at .*: it takes no float32"),
        (
            Unrecorded(RuntimeError("a fault\nin line 3")),
            "the attention at .* cannot run on this GPU: RuntimeError: a fault$",
        ),
    ],
)
def test_hoppers_kernel_is_not_exchanged(as_on_gpu, replays, message):
    program = capture(Attention(), (torch.randn(1, 24, 16),)).program
    for node in program.graph.nodes:
        if "vmoba" in str(node.target):
            node.kwargs = node.kwargs | {"implementation": "hopper"}
    with pytest.raises(ExportError, match=message):
        replace_operators(program, replays)


def test_launches_are_recorded_for_packages_that_are_built_here():
    built, options = package._built_elsewhere, torch._inductor.config.get_config_copy()
    assert not built({}) and built({"aot_inductor.package_cpp_only": True})
    assert all(name in options and built({name: "windows"}) for name in package._ELSEWHERE)
    with torch._inductor.config.patch({"aot_inductor.emit_multi_arch_kernel": True}):
        assert built({}) and not built({"aot_inductor.emit_multi_arch_kernel": False})


def test_a_dynamic_batch_needs_a_largest_size(as_on_gpu):
    pytest.importorskip("triton")
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    program = capture(Attention(), (torch.randn(2, 24, 16),), dynamic_shapes=shapes).program
    with pytest.raises(ExportError, match=r"has no largest size; give it .*Dim\('batch', max=8\)"):
        replace_operators(program)
    shapes = ({0: torch.export.Dim("batch", min=1, max=8)},)
    program = capture(Attention(), (torch.randn(2, 24, 16),), dynamic_shapes=shapes).program
    assert replace_operators(program) == 1


def test_what_the_compiler_cannot_do_is_said(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no C++ compiler\nand a long trace")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail)
    model, x = dense()
    with pytest.warns(UserWarning, match="exports Sequential dense"), pytest.raises(ExportError) as caught:
        export_package(model, (x,), path=tmp_path / "model.pt2")
    assert str(caught.value) == "AOTInductor cannot compile Sequential: RuntimeError: no C++ compiler"


@pytest.mark.parametrize("how", ["half-way", "when it is run"])
def test_an_older_package_stays_until_the_new_one_is_good(tmp_path, monkeypatch, how):
    path = tmp_path / "model.pt2"
    path.write_text("precious")
    compiled = []

    def compile_half(program, *, package_path, inductor_configs):
        compiled.append(Path(package_path))
        compiled[0].write_text("ha")
        if how == "half-way":
            raise RuntimeError("out of memory")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compile_half)
    model, x = dense()
    message = (
        "cannot compile Sequential: .*out of memory" if how == "half-way" else "compiled but cannot be loaded and run"
    )
    with pytest.warns(UserWarning, match="dense"), pytest.raises(ExportError, match=message):
        export_package(model, (x,), path=path, verify=True)
    assert compiled[0].name == path.name  # the archive is named after the file
    assert path.read_text() == "precious" and list(tmp_path.iterdir()) == [path]


def test_a_package_that_crashes_takes_no_other_process_along(tmp_path, monkeypatch):
    monkeypatch.setattr(package, "LOADER", "import os; os.abort()")
    monkeypatch.setattr(
        torch._inductor, "aoti_compile_and_package", lambda *_, package_path, **__: Path(package_path).write_text("ha")
    )
    monkeypatch.setenv("CXX", "my-compiler")
    model, x = dense()
    with (
        pytest.warns(UserWarning, match="dense"),
        pytest.raises(ExportError, match=r"loads it \(SIGABRT\).*my-compiler may"),
    ):
        export_package(model, (x,), path=tmp_path / "model.pt2", verify=True)
    assert not list(tmp_path.iterdir())


def test_a_package_in_a_line(tmp_path):
    said = str(Package(tmp_path / "model.pt2", Report([]), ("a", "b"), 3 << 20, 2.0, 1e-6))
    assert (
        said
        == f"{tmp_path}/model.pt2: 3.0 MiB, 2 VMoBA kernels, 2.0 s to compile; run on the example inputs: error 1.0e-06"
    )


def test_files_that_are_no_packages(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no package .*none\.pt2"):
        read_about(tmp_path / "none.pt2")
    other = tmp_path / "other.pt2"
    torch.save([1], other)
    with pytest.raises(ValueError, match=r"was not made by vmoba_compile\.export_package"):
        read_about(other)
    other.write_text("text")
    with pytest.raises(ValueError, match="is not a package"):
        read_about(other)


def test_errors_are_relative():
    a, b = torch.ones(4), torch.full((4,), 2.0)
    assert relative_error([a, b], [b, b]) == pytest.approx(0.5)
    assert relative_error([torch.tensor(1)], [torch.tensor(2)]) == 0
    assert math.isnan(relative_error([a, a * torch.nan], [b, b]))


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A dense package, its input and what it should give."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("package")
    model, x = dense()
    with pytest.warns(UserWarning, match="exports Sequential dense"):
        package = export_package(
            model, (x,), path=folder / "made" / "model.pt2", config=VMoBAConfig(threshold=0.5), verify=True,
            inductor_options={"aot_inductor.metadata": {"build": "17"}},
        )  # fmt: skip
    with torch.no_grad():
        torch.save([x], package.path.with_name("inputs.pt"))
        torch.save([model(x)], package.path.with_name("expected.pt"))
    return package


@needs_compiler
@pytest.mark.slow
@pytest.mark.xdist_group("package")
def test_package_tells_of_itself(written):
    assert written.error < 1e-5 and written.kernels == () and written.seconds > 0
    assert written.bytes == written.path.stat().st_size
    about = read_about(written.path)
    assert about["config"]["threshold"] == 0.5 and about["model"] == "Sequential" and about["report"]["sites"] == []
    assert about["inputs"] == [{"name": "[0]", "dtype": "float32", "shape": [3, 16]}]
    metadata = written.load().get_metadata()
    assert metadata["vmoba_compile"] and metadata["build"] == "17", "that of Inductor's options is kept"


RUN = """
import sys, torch
folder = sys.argv[1]
model = torch._inductor.aoti_load_package(folder + "/model.pt2")
out = model(*torch.load(folder + "/inputs.pt"))
torch.testing.assert_close([out], torch.load(folder + "/expected.pt"))
assert not any(name.startswith("vmoba") for name in sys.modules)
"""


@needs_compiler
@pytest.mark.slow
@pytest.mark.xdist_group("package")
def test_runs_without_vmoba_compile(written):
    done = subprocess.run(
        [sys.executable, "-P", "-c", RUN, str(written.path.parent)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@needs_compiler
@pytest.mark.slow
@pytest.mark.xdist_group("package")
@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
def test_runs_in_cpp(written, tmp_path):
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    for words in (["-S", str(EXAMPLE), "-B", str(tmp_path), prefix], ["--build", str(tmp_path)]):
        done = subprocess.run(["cmake", *words], capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    folder = written.path.parent
    program = str(tmp_path / "run_package")
    paths = [str(folder / name) for name in ("model.pt2", "inputs.pt", "output.pt")]
    done = subprocess.run([program, *paths, "2"], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "median of 2 calls" in done.stdout
    torch.testing.assert_close(list(torch.load(paths[2])), torch.load(folder / "expected.pt"))
    for words, said in (([], "usage:"), ([paths[0], "none.pt", paths[2]], "cannot read none.pt")):
        done = subprocess.run([program, *words], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode != 0 and said in done.stderr
