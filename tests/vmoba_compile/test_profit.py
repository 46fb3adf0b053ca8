"""From how many tokens sparse attention pays: the reading of measurements, the shipped figures, the user's file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from graphs import VideoAttention, compiled, verdicts, video
from torch import nn
from torch.utils.checkpoint import checkpoint

from vmoba_compile import VMoBAConfig, profit
from vmoba_compile.blocks import SCHEMES

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
CPU, CUDA, META = (torch.device(name) for name in ("cpu", "cuda", "meta"))


@pytest.fixture(autouse=True)
def path(tmp_path, monkeypatch):
    """The user's file, which is not there yet."""
    found = tmp_path / "folder" / "calibration.json"
    monkeypatch.setenv("VMOBA_COMPILE_CALIBRATION", str(found))
    return found


@pytest.fixture
def h200(monkeypatch):
    """A GPU, as far as its name goes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")


def put(path: Path, content: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def calibrated(path: Path, **entry: object) -> None:
    put(path, {"version": 1, "devices": {"cpu": entry}})


@pytest.mark.parametrize(
    ("ratios", "found"),
    [
        ({100: 2, 10_000: 3}, 100),  # always faster: from the smallest size on
        ({100: 0.5, 10_000: 2}, 1000),  # half-way on the logarithms
        ({100: 0.5, 10_000: 8}, 316),  # a quarter of the way
        ({10_000: 2, 100: 0.5}, 1000),  # in any order
        ({100: 2, 10_000: 0.5, 1_000_000: 2}, 100_000),  # a lead that is lost again does not count
        ({100: 0.5, 1000: 1, 10_000: 2}, 1000),  # as fast at one of the sizes
        ({100: 0.5, 10_000: 0.9}, None),  # never faster
        ({100: 2, 10_000: 0.5}, None),
        ({}, None),
    ],
)
def test_crossover(ratios, found):
    assert profit.crossover([{"tokens": tokens, "ratio": ratio} for tokens, ratio in ratios.items()]) == found


def test_shipped_figures_are_those_of_the_benchmarks():
    facts = json.loads((RESULTS / "attention-nvidia_h200.json").read_text())
    calibration = json.loads((RESULTS / "calibration-nvidia_h200.json").read_text())
    forward, training = facts["scaling"]["crossover_tokens"], calibration["calibration"]["NVIDIA H200"]["training"]
    assert profit.SHIPPED["NVIDIA H200"] == {"forward": forward, "training": training}
    assert profit.crossover(facts["scaling"]["rows"]) == forward
    assert profit.crossover(calibration["training"]) == training
    assert profit.crossover(calibration["forward"]) <= forward, "the safer of two measurements"
    facts = json.loads((RESULTS / "crossover_2_cpu_cores.json").read_text())
    assert profit.SHIPPED["cpu"] == {"forward": facts["crossover_tokens"]}
    rows = [row | {"ratio": 3 * row["dense_s"] / sum(row[s]["seconds"] for s in SCHEMES)} for row in facts["rows"]]
    before = max(row["tokens"] for row in rows if row["tokens"] < profit.SHIPPED["cpu"]["forward"])
    assert before < profit.crossover(rows) <= profit.SHIPPED["cpu"]["forward"], "on the safe side of the reading"


def test_shipped_figures_by_device(h200):
    assert profit.least_tokens(CUDA, False) == (
        10601, "min_tokens=10601, below which dense attention is faster (measured for NVIDIA H200)"
    )  # fmt: skip
    assert profit.least_tokens(torch.device("cuda", 0), True) == (
        5564, "min_tokens=5564, below which dense attention is faster (measured for NVIDIA H200)"
    )  # fmt: skip
    assert "measured for cpu, the forward alone; for training run python -m" in profit.least_tokens(CPU, True).named
    assert (
        profit.least_tokens(CPU, False).tokens == 7480 and "measured for cpu" in profit.least_tokens(CPU, False).named
    )


@pytest.mark.parametrize(
    ("device", "tokens", "source"),
    [
        ("cuda", 10601, "(default for devices without a measurement; run python -m vmoba_compile bench --calibrate)"),
        ("meta", 8192, "(default for devices without a measurement)"),
        ("xpu", 8192, "(default for devices without a measurement; run python -m vmoba_compile bench --calibrate)"),
    ],
)
def test_defaults(device, tokens, source, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    least = profit.least_tokens(torch.device(device), False)
    assert least.tokens == tokens and least.named.endswith(source)


def test_a_gpu_that_is_traced_for_but_not_there_has_the_default(h200, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Some GPU")
    assert "default for devices" in profit.least_tokens(CUDA, False).named
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: pytest.fail("there is no such GPU"))
    assert profit.device_name(torch.device("cuda", 1)) == "cuda"


def test_neither_the_import_nor_a_look_up_for_a_cpu_starts_cuda():
    code = (
        "import torch\n"
        "def fail(*_): raise SystemExit('CUDA was started')\n"
        "torch.cuda._lazy_init = fail\n"
        "import vmoba_compile\n"
        "vmoba_compile.VMoBAConfig().least_tokens(torch.device('cpu'), True)\n"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=120)


def test_the_users_figures_win_over_the_shipped_ones(path, h200):
    put(path, {"version": 1, "devices": {"cpu": {"forward": 5, "training": 7}, "NVIDIA H200": {"forward": 11}}})
    assert [profit.least_tokens(CPU, training).tokens for training in (False, True)] == [5, 7]
    assert profit.least_tokens(CPU, True).named.endswith("(your calibration)")
    assert profit.least_tokens(CUDA, False).tokens == 11
    assert profit.least_tokens(CUDA, True).tokens == 11, "no figure for training: the forward's"
    assert profit.least_tokens(META, False).tokens == 8192
    assert VMoBAConfig().least_tokens(CPU, True) == 7


def test_a_device_on_which_nothing_was_faster_stays_dense(path):
    calibrated(path, forward=None, training=300, largest={"forward": 20_000})
    least = profit.least_tokens(CPU, False)
    assert least.tokens == profit.NEVER > 10**12
    assert least.named == "any at which your calibration found sparse attention faster (none up to 20000)"
    assert profit.least_tokens(CPU, True).tokens == 300


def test_a_file_is_read_once_until_it_changes(path, monkeypatch):
    reads = []
    real = profit.read_calibration
    monkeypatch.setattr(profit, "read_calibration", lambda path: reads.append(path) or real(path))
    assert profit.least_tokens(CPU, False).tokens == 7480 and not reads
    calibrated(path, forward=5)
    assert [profit.least_tokens(CPU, False).tokens for _ in range(3)] == [5] * 3 and len(reads) == 1
    profit.write_calibration("cpu", {"forward": 6}, path)
    assert profit.least_tokens(CPU, False).tokens == 6
    path.unlink()
    assert profit.least_tokens(CPU, False).tokens == 7480


def test_where_the_file_lies(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("VMOBA_COMPILE_CALIBRATION", "~/mine.json")
    assert profit.calibration_path() == tmp_path / "mine.json"
    monkeypatch.setenv("VMOBA_COMPILE_CALIBRATION", "")
    assert profit.calibration_path() == tmp_path / "cache" / "vmoba_compile" / "calibration.json"
    for ignored in ("relative", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert profit.calibration_path() == tmp_path / ".cache" / "vmoba_compile" / "calibration.json"


def test_writing_keeps_other_devices(path):
    assert profit.write_calibration("cpu", {"forward": 5, "training": 6, "note": "kept"}) == path
    profit.write_calibration("A GPU", {"forward": None, "largest": {"forward": 9}})
    profit.write_calibration("cpu", {"forward": 7})
    assert json.loads(path.read_text()) == {
        "version": 1, "devices": {"cpu": {"forward": 7}, "A GPU": {"forward": None, "largest": {"forward": 9}}}
    }  # fmt: skip
    assert os.listdir(path.parent) == [path.name]


def test_a_link_stays_a_link(path, tmp_path):
    real = tmp_path / "real.json"
    calibrated(real, forward=5)
    path.parent.mkdir()
    path.symlink_to(real)
    profit.write_calibration("cpu", {"forward": 6})
    assert path.is_symlink() and json.loads(real.read_text())["devices"]["cpu"] == {"forward": 6}


@pytest.mark.parametrize("broken", ["replace", "fsync"])
def test_a_write_that_fails_leaves_the_old_file(path, monkeypatch, broken):
    calibrated(path, forward=5)
    before = path.read_text()

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(OSError, match="no space left"):
        profit.write_calibration("cpu", {"forward": 6})
    assert path.read_text() == before and os.listdir(path.parent) == [path.name]


BROKEN = {
    "empty": ("", "cannot be read as JSON"),
    "cut short": ('{"version": 1, "devices": {"cpu"', "cannot be read as JSON"),
    "deep": ("[" * 100_000, "cannot be read as JSON"),
    "a list": ([1], 'does not hold "version" and "devices"'),
    "foreign": ({"name": "something else"}, 'does not hold "version" and "devices"'),
    "newer": ({"version": 2, "devices": {}}, "has version 2, and this vmoba_compile reads version 1"),
    "no version": ({"devices": {}}, "has version None"),
    "a flag": ({"version": True, "devices": {}}, "has version True"),
    "no figure": ({"version": 1, "devices": {"cpu": {}}}, "device 'cpu' has neither forward nor training"),
    "an entry": ({"version": 1, "devices": {"cpu": 5}}, "device 'cpu' has neither forward nor training"),
    "negative": ({"version": 1, "devices": {"cpu": {"forward": -1}}}, "must be a number of tokens or null, not -1"),
    "text": ({"version": 1, "devices": {"cpu": {"forward": 1, "training": "2"}}}, "number of tokens or null, not '2'"),
    "fraction": ({"version": 1, "devices": {"cpu": {"forward": 1.5}}}, "number of tokens or null, not 1.5"),
    "largest": ({"version": 1, "devices": {"cpu": {"forward": 1, "largest": 3}}}, "must map modes to numbers"),
    "huge": (" " * (profit.MAX_BYTES + 1), "not a JSON file of a few lines"),
}


@pytest.mark.parametrize(("content", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_file(path, content, message):
    put(path, content)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="is no calibration that can be used, because ") as error:
        profit.read_calibration(path)
    assert message in str(error.value) and str(path) in str(error.value) and "move it away" in str(error.value)
    with pytest.raises(ValueError, match="is no calibration that can be used"):
        profit.write_calibration("cpu", {"forward": 5})
    assert path.read_bytes() == before
    with pytest.warns(UserWarning, match="is no calibration that can be used") as told:
        least = [profit.least_tokens(CPU, training) for training in (False, True)]
    assert len(told) == 1 and [tokens for tokens, _ in least] == [7480, 7480]


def test_a_folder_in_the_files_place(path):
    path.mkdir(parents=True)
    with pytest.raises(ValueError, match="not a JSON file of a few lines"):
        profit.write_calibration("cpu", {"forward": 5})


def test_an_entry_that_could_not_be_read_again_is_not_written(path):
    with pytest.raises(ValueError, match=r"cannot be written: .*must be a number of tokens or null, not 0\.5"):
        profit.write_calibration("cpu", {"forward": 0.5})
    assert not path.exists()


class KeysOnly(VideoAttention):
    """Gradients for the keys' projection alone."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)
        self.keys = nn.Linear(16, 16)

    def forward(self, latents):
        x = self.order(self.patch(latents))
        q, _, v = self.split(x)
        return self.attend(q, self.keys(x).unflatten(2, (self.heads, -1)).transpose(1, 2), v)


class WithoutGradients(VideoAttention):
    def forward(self, latents):
        with torch.no_grad():
            return super().forward(latents)


class Checkpointed(VideoAttention):
    def forward(self, latents):
        return checkpoint(super().forward, latents, use_reentrant=False)


def by_hand(q, k, v):
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v


MODELS = {
    # a model, and whether a backward follows where gradients are on
    "plain": (VideoAttention, True),
    "spelled out": (lambda: VideoAttention(attend=by_hand), True),
    "checkpointed": (Checkpointed, True),
    "some frozen": (KeysOnly, True),
    "frozen": (lambda: VideoAttention().requires_grad_(False), False),
    "no_grad within": (WithoutGradients, False),
}


@pytest.mark.parametrize("made", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("faster", ["forward", "training"])
def test_training_and_inference_have_figures_of_their_own(path, made, gradients, faster):
    """One of them lies below the 24 tokens of the model, the other above them."""
    calibrated(path, **({"forward": 1000, "training": 1000} | {faster: 24}))
    make, trains = made
    with torch.set_grad_enabled(gradients):
        capture, _ = compiled(make(), video(), config=VMoBAConfig())
    mode = "training" if gradients and trains else "forward"
    assert verdicts(capture.report) == ["rewritten" if mode == faster else "too_few_tokens"]
    if mode != faster:
        assert capture.report.sites[0].detail == (
            "24 tokens are fewer than min_tokens=1000, below which dense attention is faster (your calibration)"
        )


def test_a_broken_file_does_not_stop_the_rewrite(path):
    put(path, "{")
    with pytest.warns(UserWarning, match="is no calibration that can be used") as told:
        capture, _ = compiled(VideoAttention(), video(), config=VMoBAConfig())
    assert sum("calibration" in str(one.message) for one in told) == 1
    assert "24 tokens are fewer than min_tokens=7480" in capture.report.sites[0].detail


def test_a_number_in_the_configuration_needs_no_file(path):
    put(path, "{")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = VMoBAConfig(min_tokens=25)
        assert config.least_tokens(CPU, True) == 25
        assert config.least_tokens_named(CPU, True) == "min_tokens=25 of the configuration"
