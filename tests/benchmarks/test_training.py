"""The training benchmark's whole-model part: a run without a GPU, and what it refuses to time."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import processes
import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "training.py"


@pytest.fixture(scope="module")
def bench():
    """The script as a module."""
    before = list(sys.path)
    sys.path.insert(0, str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("benchmark_training", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before


@pytest.mark.slow
def test_model_runs_without_a_gpu(tmp_path):
    args = ["--only-model", "--grids", "4x6x8", "--layers", "3", "--out", str(tmp_path)]
    done = processes.run_script(SCRIPT, *args)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("training-*.json")
    (row,) = json.loads(path.read_text())["models"]
    assert row["layers"] == 3 and 0.2 < row["density"] < 0.5
    assert row["sparse"]["losses"][0] == pytest.approx(row["dense"]["losses"][0], rel=0.01)


@pytest.mark.parametrize(
    ("dense", "sparse", "message"),
    [
        ([1.0, 0.9], [float("nan")] * 2, "sparse model does not learn"),
        ([1.0, 1.1], [1.0, 0.9], "dense model does not learn"),
        ([1.0, 0.9], [2.0, 0.9], "differ by more than 5 %"),
    ],
)
def test_steps_that_lost_their_way_are_not_timed(bench, dense, sparse, message):
    with pytest.raises(RuntimeError, match=message):
        bench.check_losses({"dense": {"losses": dense}, "sparse": {"losses": sparse}})
