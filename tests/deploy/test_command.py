"""``python -m vmoba_compile export``, run as a person runs it."""

from __future__ import annotations

import pytest

from vmoba_compile import Report
from vmoba_compile.__main__ import main

pytest.importorskip("onnxruntime")

TINY = ("export", "tiny-wan", "--min-tokens", "0", "--layers", "1", "--tokens", "2x4x4")


@pytest.mark.slow
def test_an_engine_for_any_batch(capsys, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    out, saved = tmp_path / "wan.engine", tmp_path / "report.json"
    status = main(
        [*TINY, "--to", "tensorrt", "--runtime", "tensorrt_rtx", "--batch", "2", "--dynamic-batch",
         "--out", str(out), "--save", str(saved)]
    )  # fmt: skip
    said = capsys.readouterr().out
    assert status == 0
    assert "1 of 2 attentions rewritten" in said and "2 vmoba nodes" in said and "hidden_states float [?, " in said
    assert out.stat().st_size > 10_000 and out.with_suffix(".onnx").exists()
    assert len(Report.load(saved).rewritten) == 1


def test_wrong_use(capsys, tmp_path):
    assert main([*TINY, "--to", "onnx", "--out", str(tmp_path / "wan.pt2")]) == 2
    assert "--out for --to onnx must end in .onnx" in capsys.readouterr().err
    assert main([*TINY, "--to", "onnx", "--dynamic-batch", "--out", str(tmp_path / "wan.onnx")]) == 2
    assert "batch 2 or more" in capsys.readouterr().err
    assert main([*TINY, "--to", "package", "--device", "cpu", "--out", str(tmp_path / "wan.pt2")]) == 2
    assert "GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_nothing_rewritten_is_a_status(capsys, tmp_path):
    with pytest.warns(UserWarning, match="dense"):
        status = main(
            ["export", "tiny-wan", "--layers", "1", "--tokens", "2x4x4", "--to", "onnx", "--no-verify",
             "--out", str(tmp_path / "wan.onnx")]
        )  # fmt: skip
    assert status == 1 and (tmp_path / "wan.onnx").exists()
    assert "0 of 2 attentions rewritten" in capsys.readouterr().out
