"""The command line, run as a person runs it."""

from __future__ import annotations

import json

import pytest

from vmoba_compile import Report, VMoBAConfig
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
        "def wrong():\n"
        "    return 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["explain", "my_model:make"]) == 1
    assert "weights_used" in capsys.readouterr().out


def test_min_tokens(capsys):
    assert main(["explain", "tiny-wan", "--min-tokens", "0"]) == 0
    assert "3 of 6 attentions rewritten" in capsys.readouterr().out


WRONG = {
    "unknown model": (["explain", "wan9"], "unknown model 'wan9'; the models are wan2.1-1.3b"),
    "no such module": (["explain", "no_such_module:make"], "cannot load 'no_such_module:make'"),
    "no model": (["explain", "json:dumps"], ""),
    "saved as what": (["explain", "tiny-wan", "--save", "report.txt"], "--save takes a .json or .html file"),
    "no config file": (["explain", "tiny-wan", "--config", "missing.json"], "missing.json"),
    "wrong grid": (["explain", "tiny-wan", "--grid", "3x3x3"], "grid=(3, 3, 3) has 27 tokens, but the video has 192"),
}


@pytest.mark.parametrize(("argv", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_use(capsys, argv, message):
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("python -m vmoba_compile: ") and message in err and "Traceback" not in err


def test_a_grid_that_is_none(capsys):
    with pytest.raises(SystemExit) as error:
        main(["explain", "tiny-wan", "--tokens", "21x30"])
    assert error.value.code == 2 and "such as 21x30x52, not '21x30'" in capsys.readouterr().err


def test_config_with_an_unknown_option(capsys, tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"tau": 0.3}))
    assert main(["explain", "tiny-wan", "--config", str(config)]) == 2
    assert "unknown option 'tau'" in capsys.readouterr().err
