"""Every example runs as it stands; the demo on a small grid, where it checks itself."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

import processes
import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[2]
EXAMPLES, BENCHMARKS = ROOT / "examples", ROOT / "benchmarks"

RUNS = {
    "compare_videos.py": (
        ["--train-steps", "2", "--clips", "1", "--euler-steps", "4", "--out", "{tmp}/videos"],
        ["vmoba (vmoba)", "first 25 % dense", "wrote"],
    ),
    "demo.py": (["--grid", "6x10x13", "--heads", "1"], ["3 of 6 attentions rewritten", "exact", "whole model: dense"]),
    "export_wan.py": (
        ["--layers", "1", "--out", "{tmp}/wan"],
        ["2 vmoba nodes", "error", "tensorrt_rtx", "no package" if not torch.cuda.is_available() else "kernels inside"],
    ),
    "measure_wan.py": (["--out", "{tmp}/report.html"], ["mass kept", "3 of 6 attentions rewritten", "wrote"]),
    "optimize_pipeline.py": (
        [],
        ["step 1: dense", "step 2: sparse", "step 7: sparse", "3 of 6 attentions rewritten"],
    ),
    "optimize_wan.py": ([], ["3 of 6 attentions rewritten (left dense: 3 cross_attention)"]),
    "own_model.py": ([], ["step 9: loss", "sampled a video", "1 of 1 attentions rewritten"]),
    "parallel_wan.py": ([], ["3 of 6 attentions rewritten", "2 processes (", "error"]),
    "train_several_gpus.py": (
        ["--grid", "4x4x4", "--steps", "2", "--ulysses", "2", "--save", "1", "--out", "{tmp}/run"],
        ["step 2: loss", "vmoba on 2 processes, 2 to a video: 2 steps, saved in"],
    ),
    "train_video_dit.py": (
        ["--grid", "4x4x4", "--steps", "2", "--held-out", "4", "--euler-steps", "2", "--out", "{tmp}/run"],
        ["3 of 3 attentions rewritten", "vmoba: 2 steps, train loss"],
    ),
    "ulysses.py": (["--balance"], ["2 processes", "error", "imbalance of the heads", "a step: one process"]),
}
PARTS = ("video_dit.py",)  # of other examples
SEVERAL = ("parallel_wan.py", "train_several_gpus.py", "ulysses.py")  # processes, two here


def run(path: Path, *args: str) -> str:
    done = processes.run_script(path, *args, processes=2 if path.name in SEVERAL else 0)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", sorted({path.name for path in EXAMPLES.glob("*.py")} - set(PARTS)))
def test_example(name, tmp_path):
    args, expected = RUNS[name]
    out = run(EXAMPLES / name, *(arg.format(tmp=tmp_path) for arg in args))
    for text in expected:
        assert text in out


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("ulysses.py", ["--heads", "1"], "multiples of the 2 processes"),
        ("train_several_gpus.py", ["--ulysses", "3"], "--ulysses 3 does not divide the 2 processes"),
        ("train_several_gpus.py", ["--batch", "3"], "--batch 3 is not a multiple of 2"),
        ("train_several_gpus.py", ["--resume", "--out", "nowhere"], "finds no checkpoint in nowhere"),
    ],
)
def test_what_cannot_be_shared_out(name, words, message):
    with pytest.raises(AssertionError, match=message):
        run(EXAMPLES / name, *words)


def test_several_processes_need_a_launcher():
    for name in SEVERAL:
        done = processes.run_script(EXAMPLES / name)
        assert done.returncode == 1 and "start it with torchrun" in done.stderr


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


@pytest.fixture(scope="module")
def videos():
    """compare_videos.py as a module."""
    before = list(sys.path)
    sys.path.insert(0, str(EXAMPLES))
    yield importlib.import_module("compare_videos")
    sys.path[:] = before
    for name in ("compare_videos", "train_video_dit", "video_dit"):
        del sys.modules[name]


def make_run(videos, run: Path, grid: tuple[int, int, int] = (4, 6, 6)) -> nn.Module:
    """A run's folder, with weights large enough for the attention to matter."""
    torch.manual_seed(0)
    model = videos.training.VideoTransformer(grid, 32, 3, 2)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    (run / "checkpoint-00000001").mkdir(parents=True)
    videos.training.save_file(model.state_dict(), run / "checkpoint-00000001" / videos.training.WEIGHTS)
    facts = {"grid": grid, "width": 32, "layers": 3, "heads": 2, "attention": "dense", "threshold": 0.25}
    (run / "run.json").write_text(json.dumps(facts))
    return model


def test_samples_are_compared_from_the_same_noise(videos, tmp_path):
    pytest.importorskip("matplotlib")
    model = make_run(videos, tmp_path / "run")
    args = argparse.Namespace(clips=3, batch=2, euler_steps=4, device=torch.device("cpu"))
    rows, samples = videos.compare(tmp_path / "run", args)
    plain = videos.training.sample(model, argparse.Namespace(**vars(args), samples=3, grid=(4, 6, 6)))
    torch.testing.assert_close(samples["dense"], plain, rtol=1e-3, atol=1e-3)
    dense, quarter, sparse = rows
    assert [len(row["psnr"]) for row in rows] == [3, 3, 3] and 0.1 < sparse["density"] < 0.5
    assert dense["psnr"] == pytest.approx([100.0] * 3) and dense["ssim"] == pytest.approx([1.0] * 3)
    assert max(sparse["psnr"]) < 60 and sparse["psnr"] != quarter["psnr"]  # one of four steps is dense
    assert dense["restored_psnr"] != sparse["restored_psnr"]
    films = videos.write_films({"dense": samples["dense"], "sparse": samples["sparse"]}, tmp_path)
    assert all((tmp_path / f"compare_videos.{kind}").stat().st_size for kind in ("png", "gif"))
    assert "ffmpeg" in films[2] or "mp4" in films[2]


def test_runs_that_cannot_be_compared(videos, tmp_path, monkeypatch):
    make_run(videos, tmp_path / "a")
    make_run(videos, tmp_path / "b", (4, 6, 8))
    for runs, message in ((["a", "b"], "different grids"), (["c"], "run.json is missing")):
        monkeypatch.setattr(sys, "argv", ["compare_videos.py", *(str(tmp_path / run) for run in runs)])
        with pytest.raises(SystemExit, match=message):
            videos.main()


def test_psnr_and_ssim(videos):
    torch.manual_seed(0)
    a = torch.rand(2, 3, 2, 11, 11) * 2 - 1
    assert videos.psnr(torch.zeros_like(a), torch.full_like(a, 0.2)).tolist() == pytest.approx([20.0, 20.0])
    assert videos.ssim(a, a).tolist() == pytest.approx([1.0, 1.0])
    # Constant frames have no variance: the luminance term alone is left.
    x, y = 0.25, 0.75
    found = videos.ssim(torch.full_like(a, 2 * x - 1), torch.full_like(a, 2 * y - 1))
    assert found.tolist() == pytest.approx([(2 * x * y + 1e-4) / (x * x + y * y + 1e-4)] * 2, rel=1e-3)
    # Frames as large as the window have one place, whose moments are plain weighted sums.
    b = torch.rand(2, 3, 2, 11, 11) * 2 - 1
    line = torch.exp(-((torch.arange(11.0) - 5) ** 2) / 4.5)
    weights = line[:, None] * line / line.sum() ** 2
    x, y = (a + 1) / 2, (b + 1) / 2
    mean_x, mean_y = ((weights * z).sum((-1, -2)) for z in (x, y))
    var_x, var_y = ((weights * z * z).sum((-1, -2)) - m * m for z, m in ((x, mean_x), (y, mean_y)))
    cov = (weights * x * y).sum((-1, -2)) - mean_x * mean_y
    wanted = (2 * mean_x * mean_y + 1e-4) * (2 * cov + 9e-4)
    wanted = wanted / ((mean_x**2 + mean_y**2 + 1e-4) * (var_x + var_y + 9e-4))
    torch.testing.assert_close(videos.ssim(a, b), wanted.mean((1, 2)), rtol=1e-4, atol=1e-5)


def test_crossover_benchmark(tmp_path):
    """The benchmark on grids too small to tell anything: it runs, and writes what it prints."""
    pytest.importorskip("matplotlib")
    out = run(BENCHMARKS / "crossover.py", "--grids", "3x4x5", "4x5x6", "--out", str(tmp_path))
    assert "4x5x6" in out and "sparse is faster from" in out
    (facts,) = (json.loads(path.read_text()) for path in tmp_path.glob("crossover_*.json"))
    assert [row["tokens"] for row in facts["rows"]] == [60, 120] and facts["implementation"] == "reference"
    assert len(list(tmp_path.glob("*.png"))) == 1
