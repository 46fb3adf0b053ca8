"""``python -m vmoba_compile export``, run as a person runs it."""

from __future__ import annotations

import os

import pytest

from vmoba_compile import ExportError, Report
from vmoba_compile.__main__ import _parser, main
from vmoba_compile.config import VMoBAConfig
from vmoba_compile.deploy import command
from vmoba_compile.deploy.command import KINDS, OPTIONS

pytest.importorskip("onnxruntime")

TINY = ("export", "tiny-wan", "--min-tokens", "0", "--layers", "1", "--tokens", "2x4x4")
RTX = ("--to", "tensorrt", "--runtime", "tensorrt_rtx")

OWN_MODEL = """
import torch
from vmoba_compile.zoo import preset

def make():
    return preset("tiny-wan").build(device="cpu", batch=3, grid=(2, 4, 4), num_layers=1)
"""


@pytest.fixture
def precious(tmp_path):
    """What a user has beside the engine that is to be made: contents by name."""
    had = {name: f"precious {name}".encode() for name in ("wan.onnx", "wan.onnx.data", "wan.engine")}
    for name, data in had.items():
        (tmp_path / name).write_bytes(data)
    return had


def contents(folder):
    return {name: (folder / name).read_bytes() for name in os.listdir(folder)}


@pytest.mark.slow
def test_an_engine_for_any_batch(capsys, tmp_path, precious):
    pytest.importorskip("tensorrt_rtx")
    out, saved = tmp_path / "wan.engine", tmp_path / "report.json"
    status = main([*TINY, *RTX, "--batch", "2", "--dynamic-batch", "--out", str(out), "--save", str(saved)])
    said = capsys.readouterr().out
    assert status == 0
    assert "1 of 2 attentions rewritten" in said and "2 vmoba nodes" in said and "hidden_states float [?, " in said
    assert "ONNX file for the engine, not kept: opset 20" in said
    assert out.stat().st_size > 10_000
    assert len(Report.load(saved).rewritten) == 1
    found = contents(tmp_path)
    assert set(found) == {*precious, "report.json"}
    assert all(found[name] == precious[name] for name in ("wan.onnx", "wan.onnx.data"))


@pytest.mark.slow
def test_the_onnx_file_of_an_engine_is_kept_where_one_asks(capsys, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    kept, out = tmp_path / "kept.onnx", tmp_path / "wan.engine"
    words = [*TINY, *RTX, "--no-verify", "--keep-onnx", str(kept), "--out", str(out)]
    assert main(words) == 0
    assert f"{kept}: opset 20" in capsys.readouterr().out
    assert set(os.listdir(tmp_path)) == {"kept.onnx", "wan.engine"} and kept.stat().st_size > 10_000


@pytest.mark.slow
def test_nothing_is_lost_where_the_build_fails(capsys, tmp_path, precious, monkeypatch):
    built = []

    def fail(path, out, **options):
        built.append((path.is_file(), path.name))
        raise ExportError("no engine today")

    monkeypatch.setattr(command, "build_engine", fail)
    monkeypatch.setattr(command, "find_library", lambda *_: None)
    words = [*TINY, *RTX, "--no-verify", "--out", str(tmp_path / "wan.engine")]
    assert main(words) == 2
    assert "no engine today" in capsys.readouterr().err
    assert built == [(True, "wan.onnx")] and contents(tmp_path) == precious
    assert main([*words, "--keep-onnx", str(tmp_path / "kept.onnx")]) == 2  # and what was asked for is kept
    assert set(os.listdir(tmp_path)) == {*precious, "kept.onnx"}


@pytest.mark.slow
def test_an_engine_of_ones_own_model_is_for_its_batch(tmp_path, monkeypatch):
    (tmp_path / "own_wan.py").write_text(OWN_MODEL)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(command, "find_library", lambda *_: None)
    given = {}
    monkeypatch.setattr(command, "build_engine", lambda path, out, **options: given.update(options))
    words = ["export", "own_wan:make", "--min-tokens", "0", *RTX, "--dynamic-batch", "--no-verify"]
    assert main([*words, "--out", str(tmp_path / "wan.engine")]) == 0
    assert [shape[0] for shape in given["dynamic"]["hidden_states"]] == [1, 3, 6]


VALUES = {
    "--batch": ("2",), "--dtype": ("float32",), "--device": ("cpu",), "--opset": ("20",), "--dynamic-batch": (),
    "--no-verify": (), "--runtime": ("auto",), "--plugins": ("none",), "--keep-onnx": ("kept.onnx",),
}  # fmt: skip  # defaults where there are: what counts is that they are given


class LoadedError(Exception):
    """The options have passed."""


def checked(words):
    def load():
        raise LoadedError

    args = _parser().parse_args(["export", *words])
    command.export(args, load, VMoBAConfig())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.flag)
def test_options_are_for_their_targets(option, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "find_library", lambda *_: None)
    words = ["tiny-wan", "--to", kind, option.flag, *VALUES[option.flag]]
    if kind in option.kinds:
        with pytest.raises(LoadedError):
            checked(words)
        return
    targets = {"--opset": "--to onnx and --to tensorrt", "--dynamic-batch": "--to onnx and --to tensorrt"}
    with pytest.raises(ValueError) as caught:
        checked(words)
    wanted = targets.get(option.flag, "--to tensorrt")
    assert str(caught.value) == f"{option.flag} is for {wanted}, not for --to {kind}; leave it out"


@pytest.mark.parametrize("flag", ["--batch", "--dtype", "--device"])
def test_options_of_named_models(flag):
    with pytest.raises(
        ValueError, match=rf"^{flag} is for named models; my_model:make makes its own model and inputs$"
    ):
        checked(["my_model:make", "--to", "onnx", flag, *VALUES[flag]])


def test_options_that_are_not_given_have_their_defaults(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = _parser().parse_args(["export", "tiny-wan", "--to", "onnx"])
    command.check(args)
    assert {option.name: getattr(args, option.name) for option in OPTIONS} == {
        "batch": 1, "dtype": "float32", "device": None, "opset": 20, "dynamic_batch": False, "no_verify": False,
        "runtime": "auto", "plugins": "none", "keep_onnx": None,
    }  # fmt: skip


def test_wrong_use(capsys, tmp_path):
    def refused(*words):
        assert main([*TINY, *map(str, words)]) == 2
        return capsys.readouterr().err

    assert "--out for --to onnx must end in .onnx" in refused("--to", "onnx", "--out", tmp_path / "wan.pt2")
    said = refused("--to", "onnx", "--dynamic-batch", "--out", tmp_path / "wan.onnx")
    assert "batch 2 or more" in said
    assert "GPU" in refused("--to", "package", "--device", "cpu", "--out", tmp_path / "wan.pt2")
    assert not list(tmp_path.iterdir())
    (tmp_path / "wan.onnx").mkdir()
    assert "wan.onnx is a folder" in refused("--to", "onnx", "--out", tmp_path / "wan.onnx")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--runtime", "tensorrt_rtx", "--plugins", "aot"), "TensorRT-RTX has no plugins written in Python"),
        (
            ("--plugins", "aot", "--dynamic-batch"),
            "--plugins aot makes engines of fixed sizes; leave out --dynamic-batch",
        ),
        (("--keep-onnx", "kept"), "--keep-onnx must end in .onnx, not kept"),
        (("--keep-onnx", "there.onnx"), "--keep-onnx replaces no file, and there.onnx exists; give another name"),
        (("--keep-onnx", "other.onnx"), "--keep-onnx replaces no file, and other.onnx.data exists"),
    ],
)
def test_engines_that_cannot_be_are_refused_at_once(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "tensorrt_rtx" not in words:
        monkeypatch.setattr(command, "find_library", lambda *_: None)
    for name in ("there.onnx", "other.onnx.data"):
        (tmp_path / name).write_text("precious")
    with pytest.raises(ValueError) as caught:
        checked(["tiny-wan", "--to", "tensorrt", *words])
    assert str(caught.value).startswith(message)
    assert set(contents(tmp_path).values()) == {b"precious"} and len(os.listdir(tmp_path)) == 2


def test_a_missing_library_is_said_before_the_model_is_loaded(monkeypatch):
    from vmoba_compile.deploy import tensorrt_library

    monkeypatch.setattr(tensorrt_library, "_imported", lambda name: None)
    with pytest.raises(ExportError, match="engines need TensorRT or TensorRT-RTX"):
        checked(["tiny-wan", "--to", "tensorrt"])


def test_nothing_rewritten_is_a_status(capsys, tmp_path):
    with pytest.warns(UserWarning, match="dense"):
        status = main(
            ["export", "tiny-wan", "--layers", "1", "--tokens", "2x4x4", "--to", "onnx", "--no-verify",
             "--out", str(tmp_path / "wan.onnx")]
        )  # fmt: skip
    assert status == 1 and (tmp_path / "wan.onnx").exists()
    assert "0 of 2 attentions rewritten" in capsys.readouterr().out
