"""Every example runs as it stands; the demo on a small grid, where it checks itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES, BENCHMARKS = ROOT / "examples", ROOT / "benchmarks"

RUNS = {
    "demo.py": (["--grid", "6x10x13", "--heads", "1"], ["3 of 6 attentions rewritten", "exact", "whole model: dense"]),
    "optimize_wan.py": ([], ["3 of 6 attentions rewritten (left dense: 3 cross_attention)"]),
    "own_model.py": ([], ["step 9: loss", "1 of 1 attentions rewritten"]),
}


def run(path: Path, *args: str) -> str:
    command = [sys.executable, "-P", str(path), *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_example(name):
    args, expected = RUNS[name]
    out = run(EXAMPLES / name, *args)
    for text in expected:
        assert text in out


def test_crossover_benchmark(tmp_path):
    """The benchmark on grids too small to tell anything: it runs, and writes what it prints."""
    pytest.importorskip("matplotlib")
    out = run(BENCHMARKS / "crossover.py", "--grids", "3x4x5", "4x5x6", "--out", str(tmp_path))
    assert "4x5x6" in out and "sparse is faster from" in out
    (facts,) = (json.loads(path.read_text()) for path in tmp_path.glob("crossover_*.json"))
    assert [row["tokens"] for row in facts["rows"]] == [60, 120] and facts["implementation"] == "reference"
    assert len(list(tmp_path.glob("*.png"))) == 1
