"""The end-to-end benchmark: a run without a GPU, and the parts that its figures rest on."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
import threading
import time

import processes
import pytest
import torch
from benchmark_modules import FOLDER, imported
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def bench():
    """The script, what measures and what reports, as modules."""
    yield from imported({"end_to_end": "end_to_end", "measure": "end_to_end_measure", "report": "end_to_end_report"})


@pytest.fixture
def tiny(bench):
    """Both sides of each small model, measured here and now."""

    def measure(name: str, side: str, mode: str = "whole") -> dict:
        torch._dynamo.reset()
        (case,) = (case for case in bench.measure.TINY if case.name == name)
        return bench.measure.measure(case, side, mode, bench.measure.Settings(tiny=True))

    return measure


@pytest.mark.slow
def test_runs_without_a_gpu(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    words = ("--tiny", "--only", "tiny-wan", "--profile", "--jobs", 2, "--out", tmp_path)
    done = processes.run_script(FOLDER / "end_to_end.py", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "without a GPU" in done.stdout and "the longest kernels" in done.stdout
    (path,) = tmp_path.glob("end_to_end_tiny-*.json")
    facts = json.loads(path.read_text())
    dense, sparse = facts["rows"]
    assert dense["jobs"] == sparse["jobs"] == 2 and dense["compile_s"] > 0
    assert (dense["side"], sparse["side"]) == ("dense", "sparse") and dense["ms"] > 0 < sparse["ms"]
    assert sparse["attentions"] == 2 and 0.2 < sparse["density"] < 0.5
    (case,) = facts["cases"]
    assert case["video"]["dense_s"] == pytest.approx(50 * 2 * dense["ms"] / 1e3)
    assert path.with_suffix(".png").exists()


@pytest.mark.gpu
@pytest.mark.slow
def test_kernels_and_memory_are_read_from_a_gpu(tmp_path):
    command = [sys.executable, "-P", str(FOLDER / "end_to_end.py"), "--tiny", "--only", "tiny-hunyuanvideo"]
    done = subprocess.run(
        [*command, "--regional", "--jobs", "4", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("end_to_end_tiny-*.json")
    rows = {(row["side"], row["mode"]): row for row in json.loads(path.read_text())["rows"]}
    assert len(rows) == 4 and all(row["peak_bytes"] > row["weight_bytes"] for row in rows.values())
    for (side, _), found in rows.items():
        assert (
            (found["groups_ms"]["VMoBA attention"] > 0) == (found["groups_ms"]["selection"] > 0) == (side == "sparse")
        )
        assert found["groups_ms"]["matrix products"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-wan", "tiny-cogvideox1.5", "tiny-hunyuanvideo"])
def test_sides_run_the_same_model(bench, tiny, name):
    """Same weights and inputs on both sides, another attention; what a forward spends lies in the right groups."""
    dense, sparse = tiny(name, "dense"), tiny(name, "sparse")
    assert 1e-4 < bench.report.difference(dense["output"], sparse["output"]) < 0.2
    assert dense["groups_ms"]["VMoBA attention"] == 0 < dense["groups_ms"]["dense attention"]
    assert sparse["groups_ms"]["VMoBA attention"] > 0 < sparse["groups_ms"]["selection"]
    assert dense["graphs"] == sparse["graphs"] == 1 and 0.2 < sparse["density"] < 0.5
    if name == "tiny-hunyuanvideo":  # the mask that dense leaves out hides nothing
        assert bench.report.difference(dense["output"], tiny(name, "dense-masked")["output"]) < 1e-5
    if name == "tiny-wan":
        for side, whole in (("dense", dense), ("sparse", sparse)):
            regional = tiny(name, side, "regional")
            assert bench.report.difference(whole["output"], regional["output"]) < 1e-5


class Masked(nn.Module):
    def forward(self, q, mask, positional):
        if positional:
            return scaled_dot_product_attention(q, q, q, mask)
        return scaled_dot_product_attention(q, q, q, attn_mask=mask, scale=0.5)


@pytest.mark.parametrize("positional", [True, False])
def test_masks_are_left_out(bench, positional):
    torch._dynamo.reset()
    q, mask = torch.randn(1, 2, 4, 8), torch.tensor([[[[True, True, False, True]]]])
    run = torch.compile(Masked(), backend=bench.measure.without_masks(lambda graph, inputs: graph.forward))
    wanted = Masked()(q, None, positional)
    assert torch.equal(run(q, mask, positional), wanted)
    assert not torch.equal(Masked()(q, mask, positional), wanted)


class Double(nn.Module):
    def forward(self, x):
        return x * 2


def test_every_block_is_compiled_by_itself(bench):
    torch._dynamo.reset()
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    model = nn.Module()
    model.blocks, model.few = nn.ModuleList(Double() for _ in range(3)), nn.ModuleList([Double()])
    bench.measure.compile_blocks(model, backend)
    assert [block._compiled_call_impl is not None for block in [*model.blocks, *model.few]] == [True] * 3 + [False]
    model.blocks[1](torch.ones(1, 4))
    assert len(seen) == 1


def test_compiled_graphs_run_in_turn(bench, tmp_path):
    """What compiled a graph waits until the GPU is free, and keeps it; waiting is no compile time."""
    ours, others = (bench.measure.Turn(tmp_path / "turn") for _ in range(2))
    others.take()
    made = []
    thread = threading.Thread(target=lambda: made.append(ours.after(lambda graph, inputs: "made")(None, None)))
    thread.start()
    time.sleep(0.2)
    assert not made
    others.give()
    thread.join(10)
    assert made == ["made"] and ours.waited > 0.1 and others.waited < 0.1
    with pytest.raises(BlockingIOError):
        fcntl.flock(others.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    bench.measure.Turn().take()  # alone: nothing to wait for


def test_outputs_that_are_not_finite_are_not_timed(bench):
    with pytest.raises(RuntimeError, match="not finite"):
        bench.measure.sampled(torch.tensor([1.0, float("nan")]))
    assert bench.measure.sampled(torch.arange(128.0)) == list(range(0, 128, 2))


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("attend_everything", "VMoBA attention"),
        ("list_tiles", "VMoBA attention"),
        ("gate_histogram", "selection"),
        ("find_cut", "selection"),
        ("_add_pieces", "selection"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128", "dense attention"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, cutlass::bfloat16_t>>", "dense attention"),
        ("nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_bias_TNN", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix products"),
        ("triton_red_fused_add_mul_native_layer_norm_3", "rest"),
        ("Memcpy DtoD (Device -> Device)", "rest"),
    ],
)
def test_kernels_are_grouped(bench, kernel, group):
    assert bench.measure.group_of(kernel) == group
    assert bench.measure.grouped({kernel: 2.0, "other": 1.0})[group] == 2.0 + (group == "rest")


def row(side: str, ms: float | None, mode: str = "whole", **facts) -> dict:
    times = {} if ms is None else {"ms": ms}
    return {"case": "tiny-wan", "side": side, "mode": mode, "forwards": 2, "output": [3.0, 4.0], **times, **facts}


def test_video_is_made_of_dense_and_sparse_steps(bench):
    (found,) = bench.report.summaries([row("dense", 1000.0), row("sparse", 250.0, output=[3.0, 4.5])])
    assert found["dense_steps"] == 12 and found["ratio"] == 4 and found["outputs_differ"] == pytest.approx(0.1)
    assert found["video"] == {"dense_s": 100.0, "first_dense_s": 12 * 2.0 + 38 * 0.5, "sparse_s": 25.0}
    assert bench.report.summaries([row("dense", 1000.0), row("sparse", None), row("sparse", 9.0, "regional")]) == []


def test_results_are_merged(bench):
    merge = bench.end_to_end.merge
    rows = merge(merge([], row("sparse", 2.0)), row("dense", None, error="out of memory"))
    assert [found["side"] for found in rows] == ["dense", "sparse"] and rows[0]["error"] == "out of memory"
    rows = merge(rows, row("dense", 4.0))
    assert [found.get("ms") for found in rows] == [4.0, 2.0] and "error" not in rows[0]
    rows = merge(merge(rows, row("sparse", None, error="stopped")), row("sparse", 3.0, "regional"))
    assert [found["ms"] for found in rows] == [4.0, 2.0, 3.0]  # what was measured stays


def test_only_what_is_missing_is_measured(bench):
    args = bench.end_to_end.arguments(["--tiny", "--missing", "--regional", "--only", "tiny-wan"])
    rows = [row("dense", 4.0), row("sparse", 2.0, error="stopped"), row("dense", None, "regional", error="failed")]
    units = [(side, mode) for _, side, mode in bench.end_to_end.wanted(args, rows)]
    assert units == [("sparse", "whole"), ("dense", "regional"), ("sparse", "regional")]
    assert len(bench.end_to_end.wanted(bench.end_to_end.arguments(["--sides", "dense-masked"]), [])) == 1  # Hunyuan's


def test_failures_are_recorded(bench, monkeypatch, tmp_path):
    case, args = bench.measure.TINY[0], bench.end_to_end.arguments(["--tiny"])
    stopped = bench.end_to_end.run_unit((case, "dense", "whole"), args, 0.2)
    assert stopped["error"] == "stopped after 0 s, --limit" and "ms" not in stopped
    script = tmp_path / "crash.py"
    script.write_text(
        "import sys, json\nopen(sys.argv[4], 'w').write(json.dumps({'first_s': 1}))\n"
        "print('a.py:1: UserWarning: slow', file=sys.stderr)\nsys.exit('out of X')"
    )
    monkeypatch.setattr(bench.end_to_end, "SCRIPT", script)
    crashed = bench.end_to_end.run_unit((case, "sparse", "whole"), args, 60)
    assert crashed["error"] == "the process ended with status 1: out of X" and crashed["first_s"] == 1
    assert crashed["warnings"] == ["a.py:1: UserWarning: slow"]
    assert (crashed["case"], crashed["side"]) == ("tiny-wan", "sparse") and "failed" in bench.end_to_end.told(crashed)


def test_a_failing_side_names_its_cause(bench, monkeypatch, tmp_path):
    def fail(case, side, mode, settings, save):
        save({"first_s": 2.0})
        raise ValueError("no room")

    monkeypatch.setattr(bench.measure, "measure", fail)
    monkeypatch.setattr(sys, "argv", ["measure", "tiny-wan", "dense", "whole", str(tmp_path / "row.json")])
    before = torch.get_num_threads()
    with pytest.raises(ValueError, match="no room"):
        bench.measure.main()
    torch.set_num_threads(before)
    assert json.loads((tmp_path / "row.json").read_text()) == {"first_s": 2.0, "error": "ValueError: no room"}
