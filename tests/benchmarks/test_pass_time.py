"""The benchmark of the rewrite's own time, on few layers."""

from __future__ import annotations

import json
from pathlib import Path

import processes
import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "pass_time.py"


def test_runs(tmp_path):
    pytest.importorskip("diffusers")
    done = processes.run_script(SCRIPT, "--layers", 3, 9, "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("pass_time_*.json")
    few, more = json.loads(path.read_text())["rows"]
    assert (few["rewritten"], more["rewritten"]) == (3, 9) and more["nodes"] > 2 * few["nodes"]
    # Linear but for the first graph's imports; quadratic would be three times as much a node.
    assert more["microseconds_per_node"] < 2 * few["microseconds_per_node"]
