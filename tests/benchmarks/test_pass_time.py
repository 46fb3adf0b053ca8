"""The benchmark of the rewrite's own time, on few layers."""

from __future__ import annotations

import cProfile
import json
import pstats
import sys

import pytest
from benchmark_modules import imported

pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def bench():
    yield from imported({"main": "pass_time"})


def test_runs(bench, tmp_path, monkeypatch, capsys):
    """On three layers and on nine: the work for each node of the graph is the same."""
    rewrite, calls = bench.main.rewrite, []

    def counted(*args):
        profile = cProfile.Profile()
        report = profile.runcall(rewrite, *args)
        calls.append(pstats.Stats(profile).total_calls)
        return report

    monkeypatch.setattr(bench.main, "rewrite", counted)
    monkeypatch.setattr(sys, "argv", ["pass_time.py", "--layers", "3", "9", "--out", str(tmp_path)])
    bench.main.main()
    (path,) = tmp_path.glob("pass_time_*.json")
    few, more = json.loads(path.read_text())["rows"]
    assert (few["rewritten"], more["rewritten"]) == (3, 9) and more["nodes"] > 2 * few["nodes"]
    assert "wrote" in capsys.readouterr().out and few["seconds"] > 0
    # Calls of functions: times depend on what else the machine does. Quadratic would be twice as many a node.
    assert calls[1] / more["nodes"] < 1.5 * calls[0] / few["nodes"], calls
