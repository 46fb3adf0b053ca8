"""The benchmark of several GPUs: a run without any, and the arithmetic of its figures."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from unittest import mock

import failing
import processes
import pytest
from benchmark_modules import FOLDER, imported

pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def bench():
    """The script, what measures and what reports, as modules."""
    yield from imported({"main": "several_gpus", "measure": "several_gpus_measure", "report": "several_gpus_report"})


def run(out: Path, *words: str) -> tuple[subprocess.CompletedProcess[str], dict]:
    with mock.patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": ""}):
        done = processes.run_script(FOLDER / "several_gpus.py", "--tiny", "--out", out, *words)
    (path,) = out.glob("several_gpus_tiny-*.json")
    return done, json.loads(path.read_text())


@pytest.mark.slow
def test_dense_without_a_gpu(tmp_path):
    pytest.importorskip("matplotlib")
    done, facts = run(tmp_path, "--gpus", "1", "2", "--sides", "dense")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "without a GPU" in done.stdout and "efficiency" in done.stdout
    one, two = facts["rows"]
    assert (one["gpus"], two["gpus"]) == (1, 2) and len(two["rank_ms"]) == 2
    assert one["communication_ms"] == 0 < two["communication_ms"] and two["groups_ms"]["dense attention"] > 0
    assert facts["gpus"][1]["dense"]["differs"] < 1e-5, "the model spread over two processes is the same model"
    assert len(list(tmp_path.glob("*.png"))) == 1


@pytest.mark.slow
def test_sparse_without_a_gpu(tmp_path):
    """Both sides on one process and on two: ``optimize`` rewrites the attention between diffusers' all-to-alls."""
    done, facts = run(tmp_path, "--gpus", "1", "2", "--sides", "sparse")
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = facts["gpus"]
    assert two["sparse"]["differs"] < 1e-4 and one["imbalance"] == [1.0, 1.0] and len(two["imbalance"]) == 2
    for row in facts["rows"]:
        assert row["groups_ms"]["selection"] > 0 < row["groups_ms"]["VMoBA attention"]


def test_a_failing_process_ends_its_run(bench):
    start = time.monotonic()
    row = bench.main.run(None, "dense", 2, 60, failing.by_itself)
    assert row == {"side": "dense", "gpus": 2, "error": "process 1: ValueError: out of luck"}
    assert time.monotonic() - start < 45 and "failed" in bench.main.told(row)


def test_a_run_that_takes_too_long_is_stopped(bench):
    error = bench.main.run(None, "dense", 2, 0, failing.by_itself)["error"]
    assert error == "TimeoutError: stopped after 0 s, --limit"


def process_row(ms: float, communication: float, peak: int | None = None) -> dict:
    groups = {"rest": 10.0, "communication": communication}
    return {"ms": ms, "groups_ms": groups, "peak_bytes": peak, "output": [1.0]}


def test_processes_are_put_together(bench):
    row = bench.measure.together([process_row(5.0, 4.0, 100), process_row(6.0, 2.0, 300)])
    assert row["ms"] == 6.0 and row["rank_ms"] == [5.0, 6.0] and row["peak_bytes"] == 300
    assert row["communication_ms"] == 2.0 and row["waiting_ms"] == 1.0 and row["kernels_ms"] == 13.0
    assert bench.measure.together([process_row(5.0, 4.0)])["peak_bytes"] is None


def test_kernels_of_communication_are_told_apart(bench):
    found = bench.measure.grouped({
        "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)": 3.0, "gloo:all_to_all": 1.0, "c10d::alltoall_base_": 1.0,
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop": 5.0, "find_cut": 2.0, "nvjet_sm90_tst": 1.0, "other": 1.0,
    })  # fmt: skip
    assert found == {
        "communication": 5.0, "dense attention": 5.0, "selection": 2.0, "matrix products": 1.0, "rest": 1.0,
        "VMoBA attention": 0.0,
    }  # fmt: skip


def row(side: str, gpus: int, ms: float, **facts) -> dict:
    return {
        "side": side, "gpus": gpus, "ms": ms, "output": [3.0, 4.0], "communication_ms": 2.0, "waiting_ms": 1.0,
        "kernels_ms": 10.0, "groups_ms": {"rest": 8.0, "communication": 2.0}, "peak_bytes": None, **facts,
    }  # fmt: skip


def test_sides_are_set_beside_each_other(bench, tmp_path):
    pytest.importorskip("matplotlib")
    densities = [[0.1, 0.1, 0.3, 0.3], [0.2, 0.2, 0.2, 0.2]]
    rows = [
        row("dense", 1, 100.0), row("sparse", 1, 50.0, densities=densities), row("dense", 2, 50.0),
        row("sparse", 2, 40.0, output=[3.0, 4.5]), {"side": "dense", "gpus": 4, "error": "out of memory"},
        row("sparse", 4, 20.0),
    ]  # fmt: skip
    one, two, four = found = bench.main.summaries(rows)
    assert (one["ratio"], two["ratio"]) == (2.0, 1.25) and "ratio" not in four and "dense" not in four
    assert two["dense"]["efficiency"] == 1.0 and two["sparse"]["efficiency"] == pytest.approx(0.625)
    assert two["sparse"]["communication"] == 0.2 and two["sparse"]["waiting"] == 0.1
    assert two["sparse"]["differs"] == pytest.approx(0.1) and two["dense"]["differs"] == 0
    assert two["imbalance"] == pytest.approx([1.5, 1.0]) and two["balanced"] == pytest.approx([1.0, 1.0])
    facts = {"model": "tiny-wan", "layers": 2, "grid": (4, 6, 8), "gpus": found, "rows": rows, "title": "here"}
    table = bench.report.efficiency_table(facts)
    assert table.row_count == 5 and list(table.columns[-2]._cells)[3] == "1.250"
    assert bench.report.group_table(rows).row_count == 5
    bench.report.plot(facts, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size
    # A number on which nothing came to an end, and no figures of one to set it beside.
    alone = bench.main.summaries([row("dense", 2, 50.0)])[0]["dense"]
    assert alone["efficiency"] is None and alone["differs"] is None


def test_numbers_of_gpus(bench):
    assert bench.main.counts(None, 8, 40) == [1, 2, 4, 8] and bench.main.counts(None, 3, 40) == [1, 2]
    assert bench.main.counts(None, 8, 12) == [1, 2, 4] and bench.main.counts([5, 1], 8, 40) == [5, 1]
    for asked, message in (([16], "there are 8"), ([0], "there are 8"), ([3], "40 heads are no multiple")):
        with pytest.raises(SystemExit, match=message):
            bench.main.counts(asked, 8, 40)
