"""The measurement behind ``bench``: what is run and timed, when the ladder ends, and what a calibration writes."""

from __future__ import annotations

import json
import math

import pytest
import torch

import vmoba_compile
from vmoba_compile import bench, bench_measure, profit
from vmoba_compile.__main__ import _parser
from vmoba_compile.bench_measure import Setup
from vmoba_compile.blocks import SCHEMES

CPU = torch.device("cpu")
FORWARD = Setup(CPU, 2, 16, torch.float32)
BACKWARD = Setup(CPU, 2, 16, torch.float32, backward=True)
GRID = (3, 4, 5)
LADDER = ["2x3x4", "4x5x6", "5x8x14", "6x9x15", "6x10x15"]  # 24, 120, 560, 810, 900 tokens


@pytest.fixture(autouse=True)
def path(tmp_path, monkeypatch):
    """The user's file, which is not there yet."""
    found = tmp_path / "calibration.json"
    monkeypatch.setenv("VMOBA_COMPILE_CALIBRATION", str(found))
    return found


def clocked(forward: float, training: float):
    """A timer by which dense attention takes n^2 and sparse ``forward`` or ``training`` times n nanoseconds."""

    def timer(runs, device):
        result = runs["dense"]()
        trains = isinstance(result, tuple)
        tokens = (result[0] if trains else result).shape[2]
        sparse = tokens * (training if trains else forward) / 1e6
        return {name: [tokens**2 / 1e6 if name == "dense" else sparse] * 3 for name in runs}

    return timer


def calibrate(timer, *more: str, grids=LADDER) -> int:
    argv = ["bench", "--calibrate", "--head-dim", "16", *more]
    for grid in grids:
        argv += ["--tokens", grid]
    return bench.run(_parser().parse_args(argv), timer=timer)


def test_what_is_timed_forward():
    results = {}

    def timer(runs, device):
        results.update({name: run() for name, run in runs.items()})
        return {name: [1.0] for name in runs}

    row = bench_measure.measure(GRID, FORWARD, bench_measure.dense_attention(FORWARD)[0], timer)
    q, k, v = bench_measure.inputs(GRID, FORWARD)
    assert q.shape == (1, 2, 60, 16) and q.transpose(1, 2).is_contiguous()
    assert torch.equal(results["dense"], torch.nn.functional.scaled_dot_product_attention(q, k, v))
    for scheme in SCHEMES:
        block = row[scheme]["block"]
        assert torch.equal(results[scheme], vmoba_compile.attention(q, k, v, GRID, block=block))
        density = vmoba_compile.select(q, k, GRID, block=block).density().mean()
        assert bench_measure.densities(GRID, FORWARD)[scheme] == pytest.approx(float(density))
    assert len({row[scheme]["block"] for scheme in SCHEMES}) == 3


def test_what_is_timed_forward_and_backward():
    results = {}

    def timer(runs, device):
        results.update({name: run() for name, run in runs.items()})
        return {name: [1.0] for name in runs}

    row = bench_measure.measure(GRID, BACKWARD, bench_measure.dense_attention(BACKWARD)[0], timer)
    q, k, v, dout = bench_measure.inputs(GRID, BACKWARD)
    for scheme in SCHEMES:
        out = vmoba_compile.attention(q, k, v, GRID, block=row[scheme]["block"])
        for found, wanted in zip(results[scheme], torch.autograd.grad(out, (q, k, v), dout), strict=True):
            assert torch.equal(found, wanted)
    assert [x.shape for x in results["dense"]] == [q.shape] * 3


def test_ratios_are_those_of_turns():
    """A turn in which everything is slow, as on a busy machine, says the same as the others."""
    times = {"dense": [6.0, 60.0, 5.4, 6.6], "1d": [1.0, 10.0, 1.0, 1.0], "2d": [2.0, 20.0, 2.0, 2.0]}
    times["3d"] = [3.0, 30.0, 3.0, 3.0]
    row = bench_measure.measure(GRID, FORWARD, bench_measure.dense_attention(FORWARD)[0], lambda runs, device: times)
    assert row["ratio"] == pytest.approx(3.0) and (row["low"], row["high"]) == pytest.approx((2.925, 3.075))
    assert row["dense_ms"] == pytest.approx(6.3) and row["2d"]["ms"] == 2 and row["2d"]["ratio"] == pytest.approx(3.15)
    assert row["tokens"] == 60 and row["turns"] == 4 and row["turn_ms"] == pytest.approx(12.3)


def test_turns_alternate_and_the_first_do_not_count(monkeypatch):
    order = []
    runs = {name: lambda name=name: order.append(name) for name in ("a", "b")}
    times = bench_measure.time_in_turns(runs, CPU)
    count = bench_measure.MOST_TURNS
    assert [len(values) for values in times.values()] == [count, count]
    assert order == ["a", "b"] * (count + bench_measure.WARM_UPS)
    monkeypatch.setattr(bench_measure, "BUDGET_MS", 0)
    assert {len(values) for values in bench_measure.time_in_turns(runs, CPU).values()} == {bench_measure.LEAST_TURNS}


def row_of(tokens: int, low: float, high: float, turn_ms: float = 1.0) -> dict:
    return {"tokens": tokens, "ratio": (low + high) / 2, "low": low, "high": high, "turn_ms": turn_ms}


def ladder(bounds: list[tuple[float, float]], **options):
    """What is climbed of sizes 1, 2, 3, ... whose ratios lie in these bounds."""
    grids = [(1, 1, number + 1) for number in range(len(bounds))]
    return bench.climb(grids, lambda grid: row_of(grid[2], *bounds[grid[2] - 1]), **options)


@pytest.mark.parametrize(
    ("bounds", "measured"),
    [
        ([(0.5, 0.6), (1.2, 1.3), (1.5, 1.6), (2, 2), (3, 3)], 3),
        ([(1.2, 1.3), (1.5, 1.6), (2, 2)], 2),  # faster from the smallest size on
        ([(0.5, 0.6), (0.9, 1.6), (1.5, 1.6), (2, 2), (3, 3)], 4),  # not certain at the second
        ([(0.5, 0.6), (1.2, 1.3), (0.8, 0.9), (2, 2), (3, 3), (4, 4)], 5),  # a lead that is lost again
        ([(0.5, 0.6), (1.01, 1.3), (1.02, 1.6), (2, 2), (3, 3)], 5),  # no more than the noise
        ([(0.5, 0.6)] * 4, 4),
    ],
)
def test_the_ladder_ends_where_it_is_certain(bounds, measured):
    told = []
    rows, ended = ladder(bounds, told=told.append)
    assert len(rows) == measured and told == rows
    certain = all(low > 1.03 for low, _ in bounds[measured - 2 : measured])
    assert ended == (f"certain after {measured} sizes" if certain else "no larger size to measure")


def test_the_ladder_ends_before_the_time_does():
    """Turns grow with the square: 10, 40 and 160 s of 7 turns, and nothing else takes time but the first size."""
    now = [0.0]

    def measured(grid):
        tokens = math.prod(grid)
        now[0] += 5
        return row_of(tokens, 0.5, 0.5, turn_ms=1e4 * (tokens / 10) ** 2)

    grids = [(1, 1, 10), (1, 1, 20), (1, 1, 40)]
    for deadline, count in ((0, 1), (5 + 5 + 7 * 40 - 1, 1), (5 + 5 + 7 * 40 + 1, 2), (10 + 5 + 7 * 160 + 1, 3)):
        now[0] = 0.0
        rows, ended = bench.climb(grids, measured, deadline=deadline, clock=lambda: now[0])
        assert len(rows) == count
        assert ended == (
            "no larger size to measure" if count == 3 else f"the time would not do for 1x1x{10 * 2**count}"
        )


def test_the_ladder_ends_where_the_memory_does():
    def measured(grid):
        if grid[2] > 1:
            raise torch.OutOfMemoryError("no more")
        return row_of(1, 0.5, 0.5)

    rows, ended = bench.climb([(1, 1, 1), (1, 1, 2), (1, 1, 3)], measured)
    assert len(rows) == 1 and ended == "the memory would not do for 1x1x2"


def test_calibration(path, capsys, tmp_path):
    saved = tmp_path / "figures.json"
    profit.write_calibration("A GPU", {"forward": 3})
    assert calibrate(clocked(forward=200, training=90), "--json", str(saved), grids=LADDER[::-1]) == 0
    devices = json.loads(path.read_text())["devices"]
    entry = devices.pop("cpu")
    assert devices == {"A GPU": {"forward": 3}}
    assert (entry["forward"], entry["training"]) == (200, 90)
    assert entry["largest"] == {"forward": 810, "training": 560}, "the ladder ends once it is certain"
    assert entry["torch"] == torch.__version__ and entry["measured"].startswith("20")
    out = capsys.readouterr().out
    assert "calibrating cpu" in out and "sparse is faster from 200 tokens on; certain after 4 sizes" in out
    assert "560 tokens: dense 0.314 ms, sparse 0.112 ms, 2.80x" in out
    assert "training: min_tokens='auto' keeps dense what has fewer tokens than min_tokens=90" in out
    facts = json.loads(saved.read_text())
    assert facts["calibration"]["cpu"] == entry and len(facts["forward"]) == 4 and len(facts["training"]) == 3
    assert profit.least_tokens(CPU, False).tokens == 200 and profit.least_tokens(CPU, True).tokens == 90


def test_a_device_on_which_sparse_is_never_faster(path, monkeypatch, capsys):
    monkeypatch.setattr(profit, "SHIPPED", {"cpu": {"forward": 500}})
    assert calibrate(clocked(forward=5000, training=700)) == 0
    entry = json.loads(path.read_text())["devices"]["cpu"]
    assert (entry["forward"], entry["training"], entry["largest"]) == (None, 700, {"forward": 900, "training": 900})
    assert "sparse is not faster at 900 tokens, the largest size measured" in capsys.readouterr().out
    assert profit.least_tokens(CPU, False).tokens == profit.NEVER


@pytest.mark.parametrize("forward", [5000, 1])
def test_sizes_on_one_side_of_the_crossover_decide_nothing(path, monkeypatch, capsys, forward):
    """All below it, and all above it: what is known already stays."""
    monkeypatch.setattr(profit, "SHIPPED", {"cpu": {"forward": 1000 if forward == 5000 else 10}})
    profit.write_calibration("cpu", {"forward": 77})
    assert calibrate(clocked(forward, forward)) == 1
    out = capsys.readouterr().out
    assert "these sizes do not reach the crossover" in out and "nothing was decided, and nothing written" in out
    assert json.loads(path.read_text())["devices"]["cpu"] == {"forward": 77}


def test_a_mode_that_was_not_decided_is_left_out(path, monkeypatch):
    monkeypatch.setattr(profit, "SHIPPED", {"cpu": {"forward": 1000}})
    assert calibrate(clocked(forward=5000, training=90)) == 0
    entry = json.loads(path.read_text())["devices"]["cpu"]
    assert "forward" not in entry and entry["training"] == 90
    assert (profit.least_tokens(CPU, False).tokens, profit.least_tokens(CPU, True).tokens) == (1000, 90)


def test_a_file_that_must_not_be_overwritten_is_told_of_before_the_work(path):
    path.write_text("mine")
    with pytest.raises(ValueError, match="is no calibration that can be used"):
        calibrate(lambda runs, device: pytest.fail("it began to measure"))
    assert path.read_text() == "mine"


def test_memory_that_does_not_do_for_anything():
    def timer(runs, device):
        raise torch.OutOfMemoryError("no more")

    with pytest.raises(ValueError, match="nothing could be measured: the memory would not do for 2x3x4"):
        calibrate(timer)


def test_sixteen_bits_on_a_gpu(monkeypatch):
    """The choices alone: what they are used with needs a GPU."""
    args = _parser().parse_args(["bench"])
    for supported, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True, yes=supported: yes)
        assert bench._setup(args, torch.device("cuda")) == Setup(torch.device("cuda"), 12, 128, dtype)
    assert bench._setup(args, CPU) == Setup(CPU, 2, 64, torch.float32)
    args = _parser().parse_args(["bench", "--dtype", "float16", "--heads", "3", "--head-dim", "72", "--backward"])
    assert bench._setup(args, CPU) == Setup(CPU, 3, 72, torch.float16, backward=True)


@pytest.mark.gpu
def test_on_a_gpu(path, capsys, monkeypatch):
    """Graphs of both modes are captured, against cuDNN's attention, and a calibration is written."""
    captures = []
    real = bench_measure._captured

    def captured(run):
        replay = real(run)
        captures.append(replay is not run)
        return replay

    monkeypatch.setattr(bench_measure, "_captured", captured)
    assert bench.run(_parser().parse_args(["bench", "--calibrate", "--minutes", "8"])) == 0
    entry = json.loads(path.read_text())["devices"][torch.cuda.get_device_name()]
    print(capsys.readouterr().out)
    assert captures and all(captures)
    assert entry["forward"] is None or 500 < entry["forward"] < 100_000
    assert "training" in entry
