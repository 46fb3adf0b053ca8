"""The attention benchmark: a run without a GPU, and the parts that its figures rest on."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import processes
import pytest
import torch
from rich.console import Console
from vmoba_compile.kernels import ops

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "attention.py"


@pytest.fixture(scope="module")
def bench():
    """The script as a module."""
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location("benchmark_attention", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before
    del sys.modules[spec.name]


@pytest.fixture
def setup(bench):
    dense, _ = bench.dense_attention("cpu")
    return bench.Setup("cpu", torch.float32, "auto", dense, True, Console(quiet=True))


def test_runs_without_a_gpu(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = processes.run_script(SCRIPT, "--scaling", "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "without a GPU" in done.stdout and "failed" not in done.stdout
    (path,) = tmp_path.glob("attention-*.json")
    facts = json.loads(path.read_text())
    assert facts["implementation"] == "reference"
    assert len(facts["checks"]) == 12 and all(row["held"] and row["differing"] == 0 for row in facts["checks"])
    assert [(row["label"], row["scheme"]) for row in facts["rows"]] == [
        ("tiny", "1d"), ("tiny", "2d"), ("tiny", "3d"), ("tiny, tiles", "3d"),
        ("with text, smooth", "1d"), ("with text, smooth", "3d")
    ]  # fmt: skip
    assert all(row["total_ms"] > 0 and row["dense_ms"] > 0 for row in facts["rows"] + facts["scaling"]["rows"])
    assert path.with_suffix(".png").exists()


@pytest.mark.parametrize(
    ("ratios", "found"),
    [
        ([2, 3], 100),  # faster at the smallest already
        ([0.5, 2], 1000),  # half-way on the logarithms
        ([2, 0.5, 2], 100_000),  # a lead that is lost again does not count
        ([2, 0.5], None),
        ([], None),
    ],
)
def test_crossover(bench, ratios, found):
    rows = [{"tokens": 100 ** (place + 1), "ratio": ratio} for place, ratio in enumerate(ratios)]
    assert bench.crossover(rows) == found


def test_pairs_are_those_that_the_operator_counts(bench):
    case = bench.Case("ragged", (5, 7, 9), 2, 16, prefix=3, suffix=5)
    q, k, _ = tensors = bench.make_inputs(case, "cpu", torch.float32)
    assert q.shape == (1, 2, 323, 16) and q.transpose(1, 2).is_contiguous() and not torch.equal(q, k)
    _, selection = bench.sparse_runs(case, "3d", tensors, "reference")
    counted = ops._selected_pairs(selection.words, selection.geometry, 2, 1)
    assert case.pairs(float(selection.density().mean())) == pytest.approx(counted, rel=1e-6)


def test_smooth_inputs_are_coherent_over_the_grid(bench):
    case = bench.Case("text", (8, 12, 18), 1, 64, suffix=5).smooth("3d")
    _, _, v = bench.make_inputs(case, "cpu", torch.float32)
    video = v[0, 0, :-5].view(8, 12, 18, 64)
    for axis, extent in enumerate((8, 12, 18)):
        first, second, half = (video.select(axis, place) for place in (0, 1, extent // 2))
        near, far = (torch.nn.functional.cosine_similarity(first, other, dim=-1).mean() for other in (second, half))
        assert near > 0.8 and near > far + 0.2
    assert 0.9 < video.std() < 1.15


@pytest.mark.parametrize("wrong", ["nan", "large", "raises"])
def test_a_check_that_does_not_hold(bench, setup, monkeypatch, wrong):
    def attend(case, scheme, tensors, *_):
        if wrong == "raises":
            raise RuntimeError("no such kernel")
        return torch.full(tensors[0].shape, float("nan") if wrong == "nan" else 1.0)

    monkeypatch.setattr(bench, "attend", attend)
    rows = bench.run_checks(setup)
    assert len(rows) == 12 and not any(row["held"] for row in rows)


def test_tiles_are_not_asked_of_a_kernel_that_refuses_them(bench, setup):
    tiled = bench.Case("tiny", (3, 4, 5), 1, 16).tiled("3d")
    assert tiled.label == "tiny, tiles" and setup.takes(tiled)
    assert not dataclasses.replace(setup, implementation="hopper").takes(tiled)
    facts = {"rows": [], "portable": [], "flex_attention": []}
    bench.run_case(tiled, setup, facts)
    assert [row["granularity"] for row in facts["rows"]] == ["tile"]


def test_a_failing_row_leaves_the_others(bench, setup, monkeypatch):
    real = bench.sparse_runs

    def sparse_runs(case, scheme, *others):
        if scheme == "2d":
            raise torch.cuda.OutOfMemoryError("out of memory\nand so on")
        return real(case, scheme, *others)

    monkeypatch.setattr(bench, "sparse_runs", sparse_runs)
    facts = {"rows": [], "portable": [], "flex_attention": []}
    bench.run_case(bench.Case("tiny", (3, 4, 5), 1, 16), setup, facts)
    assert ["error" in row for row in facts["rows"]] == [False, True, False]
    assert facts["rows"][1]["error"] == "OutOfMemoryError: out of memory"


def test_flex_attention_selects_whole_tiles_at_the_density(bench):
    tensors = torch.randn(3, 1, 2, 128 * 10 + 5, 16).unbind()
    run, density, tokens = bench.flex_at_density(tensors, 0.22)
    mask = run.__closure__[[name for name in run.__code__.co_freevars].index("mask")].cell_contents
    assert density == 0.2 and tokens == 1280 and mask.shape == (1, 2, 1280, 1280)
    assert mask.sparsity() == pytest.approx(80)
    assert (mask.to_dense().sum(-1) == 2).all()
