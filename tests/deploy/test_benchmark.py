"""``benchmarks/package.py`` as far as it goes without a GPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

import vmoba_compile

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark_package(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("benchmark_package", FOLDER / "package.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Model(nn.Module):
    def forward(self, x):
        return (x + 1,)


def test_models_are_timed_in_turns(benchmark_package, monkeypatch):
    called = []

    def stand_in(name):
        def wrap(model, **options):
            def run(**inputs):
                called.append(name)
                return model(**inputs)

            return run

        return wrap

    monkeypatch.setattr(torch, "compile", stand_in("dense"))
    monkeypatch.setattr(vmoba_compile, "optimize", stand_in("sparse"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 7)
    rows, output = benchmark_package.in_process(Model(), {"x": torch.zeros(3)}, 1, 4, "cpu")
    assert torch.equal(output, torch.ones(3))
    assert set(rows) == {"dense, torch.compile", "optimized"} and rows["optimized"]["peak_bytes"] == 7
    assert all(row["ms"] > 0 for row in rows.values())
    assert called[-8:] == ["dense", "sparse"] * 4
