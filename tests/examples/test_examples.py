"""Every example runs as it stands; the demo on a small grid, where it checks itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
EXAMPLES, BENCHMARKS = ROOT / "examples", ROOT / "benchmarks"

RUNS = {
    "demo.py": (["--grid", "6x10x13", "--heads", "1"], ["3 of 6 attentions rewritten", "exact", "whole model: dense"]),
    "export_wan.py": (
        ["--layers", "1", "--out", "{tmp}/wan"],
        ["2 vmoba nodes", "error", "tensorrt_rtx", "no package" if not torch.cuda.is_available() else "kernels inside"],
    ),
    "optimize_wan.py": ([], ["3 of 6 attentions rewritten (left dense: 3 cross_attention)"]),
    "own_model.py": ([], ["step 9: loss", "1 of 1 attentions rewritten"]),
    "train_video_dit.py": (
        ["--grid", "4x4x4", "--steps", "2", "--held-out", "4", "--euler-steps", "2", "--out", "{tmp}/run"],
        ["3 of 3 attentions rewritten", "vmoba: 2 steps, train loss"],
    ),
}


def run(path: Path, *args: str) -> str:
    command = [sys.executable, "-P", str(path), *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_example(name, tmp_path):
    args, expected = RUNS[name]
    out = run(EXAMPLES / name, *(arg.format(tmp=tmp_path) for arg in args))
    for text in expected:
        assert text in out


def train(out: Path, *args: str) -> list[dict]:
    """Log of a tiny training run, oldest step first."""
    run(
        EXAMPLES / "train_video_dit.py", "--grid", "4x4x4", "--width", "32", "--layers", "2", "--batch", "2",
        "--held-out", "2", "--samples", "2", "--euler-steps", "2", "--out", str(out), *args,
    )  # fmt: skip
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_training_resumes_where_it_stopped(tmp_path):
    dense = ("--attention", "dense")  # a run's folder does not depend on it
    whole = train(tmp_path / "whole", "--steps", "4", *dense)
    train(tmp_path / "parts", "--steps", "2", *dense)
    parts = train(tmp_path / "parts", "--steps", "4", "--resume", *dense)
    assert [record["step"] for record in parts] == [1, 2, 3, 4]
    assert [record["loss"] for record in parts] == pytest.approx([record["loss"] for record in whole], rel=1e-6)
    assert parts[-1]["held_out"] == pytest.approx(whole[-1]["held_out"], rel=1e-6)
    assert [path.name for path in (tmp_path / "parts").glob("checkpoint-*")] == ["checkpoint-00000004"]


@pytest.mark.slow
def test_training_runs_are_compared(tmp_path):
    pytest.importorskip("matplotlib")
    names = ("dense", "vmoba", "moba")
    logs = {name: train(tmp_path / name, "--steps", "2", "--attention", name) for name in names}
    # The model starts at zero velocity, whatever its attention: the clips, noises and times are the same.
    assert len({round(log[0]["loss"], 5) for log in logs.values()}) == 1
    assert logs["dense"][-1]["density"] == 1 > max(logs[name][-1]["density"] for name in ("vmoba", "moba"))
    assert all((tmp_path / name / "samples.png").stat().st_size for name in names)
    runs = [str(tmp_path / name) for name in names]
    out = run(EXAMPLES / "train_video_dit.py", "--compare", *runs, "--out", str(tmp_path / "compared"))
    assert "held-out loss" in out and (tmp_path / "compared" / "compare.png").stat().st_size
    rows = json.loads((tmp_path / "compared" / "compare.json").read_text())
    assert [row["attention"] for row in rows] == list(names) and rows[0]["held_out_ratio"] == 1


def test_crossover_benchmark(tmp_path):
    """The benchmark on grids too small to tell anything: it runs, and writes what it prints."""
    pytest.importorskip("matplotlib")
    out = run(BENCHMARKS / "crossover.py", "--grids", "3x4x5", "4x5x6", "--out", str(tmp_path))
    assert "4x5x6" in out and "sparse is faster from" in out
    (facts,) = (json.loads(path.read_text()) for path in tmp_path.glob("crossover_*.json"))
    assert [row["tokens"] for row in facts["rows"]] == [60, 120] and facts["implementation"] == "reference"
    assert len(list(tmp_path.glob("*.png"))) == 1
