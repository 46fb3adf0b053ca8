"""The command line, run as a person runs it."""

from __future__ import annotations

import json

import pytest

from vmoba_compile import Report, VMoBAConfig, bench_measure
from vmoba_compile.__main__ import main

pytestmark = pytest.mark.usefixtures("fresh")


def test_explain_a_named_model(capsys, tmp_path):
    saved = tmp_path / "report.json"
    status = main(["explain", "wan2.1-1.3b", "--layers", "2", "--tokens", "21x30x52", "--save", str(saved)])
    out = capsys.readouterr().out
    assert status == 0
    assert "2 of 4 attentions rewritten (left dense: 2 cross_attention)" in out and "nothing was computed" in out
    report = Report.load(saved)
    assert [site.block for site in report.rewritten] == [(3, 30, 52), (21, 5, 13)]


def test_explain_with_a_config(capsys, tmp_path):
    config = tmp_path / "config.json"
    config.write_text(VMoBAConfig(min_tokens=0, dense_layers=(0,)).to_json())
    assert main(["explain", "tiny-wan", "--config", str(config)]) == 0
    assert "dense_layer" in capsys.readouterr().out


def test_explain_says_by_its_status_that_nothing_would_be_rewritten(capsys):
    assert main(["explain", "tiny-wan"]) == 1
    assert "0 of 6 attentions rewritten" in capsys.readouterr().out


def test_explain_ones_own_model(capsys, tmp_path, monkeypatch):
    (tmp_path / "my_model.py").write_text(
        "import torch\n"
        "def make():\n"
        "    return torch.nn.MultiheadAttention(8, 2, batch_first=True).eval(), dict.fromkeys("
        "('query', 'key', 'value'), torch.zeros(1, 6, 8))\n"
        "def number():\n"
        "    return 3\n"
        "def pair():\n"
        "    return make()[0], torch.zeros(1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["explain", "my_model:make"]) == 1
    assert "weights_used" in capsys.readouterr().out
    for name, given in {"number": "int", "pair": "(MultiheadAttention, Tensor)"}.items():
        assert main(["explain", f"my_model:{name}"]) == 2
        wanted = f"my_model:{name} must return (model, dict of keyword arguments), not {given}\n"
        assert capsys.readouterr().err.endswith(wanted)


def test_min_tokens(capsys):
    assert main(["explain", "tiny-wan", "--min-tokens", "0"]) == 0
    assert "3 of 6 attentions rewritten" in capsys.readouterr().out


WRONG = {
    "unknown model": (["explain", "wan9"], "unknown model 'wan9'; the models are wan2.1-1.3b"),
    "no such module": (["explain", "no_such_module:make"], "cannot load 'no_such_module:make'"),
    "no model": (["explain", "json:dumps"], ""),
    "saved as what": (["explain", "tiny-wan", "--save", "report.txt"], "--save takes a .json or .html file"),
    "saved in a file": (
        ["explain", "tiny-wan", "--save", f"{__file__}/report.json"],
        "is not a folder; give another path",
    ),
    "no config file": (["explain", "tiny-wan", "--config", "missing.json"], "missing.json"),
    "wrong grid": (["explain", "tiny-wan", "--grid", "3x3x3"], "grid=(3, 3, 3) has 27 tokens, but the video has 192"),
}


@pytest.mark.parametrize(("argv", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_use(capsys, argv, message):
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("python -m vmoba_compile: ") and message in err and "Traceback" not in err


def test_a_report_is_written_whole_or_not_at_all(capsys, tmp_path, monkeypatch):
    saved = tmp_path / "report.json"
    saved.write_text("older")

    def half(self, path):
        path.write_text("{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Report, "save", half)
    assert main(["explain", "tiny-wan", "--min-tokens", "0", "--save", str(saved)]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert saved.read_text() == "older" and list(tmp_path.iterdir()) == [saved]


def test_a_grid_that_is_none(capsys):
    with pytest.raises(SystemExit) as error:
        main(["explain", "tiny-wan", "--tokens", "21x30"])
    assert error.value.code == 2 and "such as 21x30x52, not '21x30'" in capsys.readouterr().err


def test_config_with_an_unknown_option(capsys, tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"tau": 0.3}))
    assert main(["explain", "tiny-wan", "--config", str(config)]) == 2
    assert "unknown option 'tau'" in capsys.readouterr().err


@pytest.fixture
def calibration(tmp_path, monkeypatch):
    """The user's calibration file, and a clock that is content with a few turns."""
    path = tmp_path / "cache" / "calibration.json"
    monkeypatch.setenv("VMOBA_COMPILE_CALIBRATION", str(path))
    monkeypatch.setattr(bench_measure, "BUDGET_MS", 1)
    return path


@pytest.mark.parametrize("backward", [False, True])
def test_bench(capsys, tmp_path, calibration, backward):
    saved = tmp_path / "bench.json"
    argv = ["bench", "--tokens", "3x4x5", "--tokens", "2x3x4", "--heads", "1", "--head-dim", "16", "--json", str(saved)]
    assert main(argv + ["--backward"] * backward) == 0
    out = capsys.readouterr().out
    assert "3D ms (ratio)" in out and "2x3x4" in out and "3x4x5" in out and "density" in out
    assert "min_tokens='auto' keeps dense what has fewer tokens than min_tokens=" in out
    facts = json.loads(saved.read_text())
    assert facts["backward"] is backward and (facts["heads"], facts["head_dim"]) == (1, 16)
    assert [row["tokens"] for row in facts["rows"]] == [24, 60]
    for row in facts["rows"]:
        for scheme in ("1d", "2d", "3d"):
            assert row[scheme]["ms"] > 0 and 0 < row["density"][scheme] < 1
            assert row[scheme]["ratio"] == pytest.approx(row["dense_ms"] / row[scheme]["ms"])
    assert not calibration.exists()


def test_bench_calibrate(capsys, calibration, monkeypatch):
    """Two tiny sizes, both above the figure that is to be replaced or below it: either way the file is right."""
    monkeypatch.setattr("vmoba_compile.profit.DEFAULT", {"cuda": 30})
    monkeypatch.setattr("vmoba_compile.profit.SHIPPED", {"cpu": {"forward": 30}})
    argv = ["bench", "--calibrate", "--tokens", "2x3x4", "--tokens", "3x4x5", "--heads", "1", "--head-dim", "16"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "24 tokens: dense" in out and f"wrote {calibration} after" in out
    (entry,) = json.loads(calibration.read_text())["devices"].values()
    assert all(entry[mode] is None or 24 <= entry[mode] <= 60 for mode in ("forward", "training"))
    assert main(["bench", "--tokens", "2x3x4", "--heads", "1", "--head-dim", "16"]) == 0
    assert "your calibration" in capsys.readouterr().out


WRONG_BENCH = {
    "a backward alone": (["--calibrate", "--backward"], "leave out --backward and --dtype"),
    "a type": (["--calibrate", "--dtype", "float16"], "leave out --backward and --dtype"),
    "no time": (["--calibrate", "--minutes", "0"], "--minutes must be more than 0, not 0.0"),
    "no folder": (["--json", "/no/such/folder/bench.json"], "whose folder does not exist"),
}


@pytest.mark.parametrize(("argv", "message"), WRONG_BENCH.values(), ids=WRONG_BENCH.keys())
def test_wrong_use_of_bench(capsys, calibration, argv, message):
    assert main(["bench", *argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith("python -m vmoba_compile: ") and message in err


def test_bench_does_not_overwrite_a_foreign_file(capsys, calibration):
    calibration.parent.mkdir()
    calibration.write_text('{"version": 2, "devices": {}}')
    assert main(["bench", "--calibrate", "--tokens", "2x3x4"]) == 2
    assert "has version 2, and this vmoba_compile reads version 1" in capsys.readouterr().err
    assert calibration.read_text() == '{"version": 2, "devices": {}}'


@pytest.mark.parametrize("argv", [["--heads", "0"], ["--head-dim", "x"], ["--tokens", "3x4"], ["--dtype", "int8"]])
def test_arguments_that_bench_does_not_take(capsys, argv):
    with pytest.raises(SystemExit) as error:
        main(["bench", *argv])
    assert error.value.code == 2 and "usage:" in capsys.readouterr().err
