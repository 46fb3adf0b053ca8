"""Files are replaced whole or not at all, whatever happens on the way."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from vmoba_compile import ExportError, files
from vmoba_compile.files import check_target, folder_beside, replacing


def contents(folder):
    """Of every file, hidden ones included, by its path within the folder."""
    found = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_text() for path in found}


def write(path, *, beside: bool = False) -> None:
    with replacing(path) as made:
        made.write_text("new")
        if beside:
            made.with_name(made.name + ".data").write_text("new weights")


OLD = {"m.onnx": "old", "m.onnx.data": "old weights"}
NEW = {"m.onnx": "new", "m.onnx.data": "new weights"}


@pytest.fixture
def older(tmp_path):
    for name, text in OLD.items():
        (tmp_path / name).write_text(text)
    return tmp_path / "m.onnx"


def test_files_are_replaced(older):
    write(older)
    assert contents(older.parent) == {**OLD, "m.onnx": "new"}
    write(older, beside=True)
    assert contents(older.parent) == NEW
    write(older.parent / "deep" / "e.plan")
    assert contents(older.parent / "deep") == {"e.plan": "new"}
    assert set(os.listdir(older.parent)) == {*NEW, "deep"}


def test_permissions_are_those_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_text("")
    write(tmp_path / "made")
    assert (tmp_path / "made").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_what_fails_while_it_is_written_changes_nothing(older, error):
    with pytest.raises(error), replacing(older) as made:
        made.write_text("ha")
        made.with_name("m.onnx.data").write_text("lf")
        raise error
    assert contents(older.parent) == OLD and set(os.listdir(older.parent)) == set(OLD)


@pytest.fixture
def moves(monkeypatch):
    """Every move by the file's name and the name of the folder that it goes to; ``fail_at`` ends one with an error."""

    class Moves(list):
        fail_at = None

    made, move = Moves(), os.replace

    def watched(source, target):
        made.append((os.path.basename(target), os.path.basename(os.path.dirname(target))))
        if len(made) - 1 == made.fail_at:
            raise PermissionError(13, "Permission denied")
        move(source, target)

    monkeypatch.setattr(files.os, "replace", watched)
    return made


def test_the_file_comes_last(older, moves):
    write(older, beside=True)
    folder = older.parent.name
    assert moves == [("m.onnx.data", "old"), ("m.onnx.data", folder), ("m.onnx", folder)]


@pytest.mark.parametrize("fail_at", [0, 1, 2])
def test_a_move_that_fails_undoes_those_before_it(older, moves, fail_at):
    moves.fail_at = fail_at
    with pytest.raises(ExportError, match=r"^cannot write .*m\.onnx: Permission denied$"):
        write(older, beside=True)
    assert contents(older.parent) == OLD


@pytest.mark.parametrize("fail_at", [0, 1])
def test_where_nothing_was_nothing_stays(tmp_path, moves, fail_at):
    moves.fail_at = fail_at
    with pytest.raises(ExportError, match="cannot write"):
        write(tmp_path / "m.onnx", beside=True)
    assert not os.listdir(tmp_path)


KILLED = """
import os, sys
from pathlib import Path
from vmoba_compile.files import replacing
at, count, move = int(sys.argv[2]), 0, os.replace
def replace(source, target):
    global count
    if count == at:
        os._exit(7)
    count += 1
    move(source, target)
os.replace = replace
with replacing(Path(sys.argv[1])) as made:
    made.write_text("new")
    if at < 0:
        os._exit(7)
    made.with_name("m.onnx.data").write_text("new weights")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("at", "beside"), [(-1, "old weights"), (0, "old weights"), (1, None), (2, "new weights")], ids=str
)
def test_a_killed_process_leaves_the_older_file(older, at, beside):
    """As the docstring of ``replacing`` has it: the weights that it needs are beside it or in the hidden folder."""
    words = [sys.executable, "-P", "-W", "ignore", "-c", KILLED, str(older), str(at)]
    assert subprocess.run(words, check=False).returncode == 7
    found = contents(older.parent)
    assert found["m.onnx"] == "old" and found.get("m.onnx.data") == beside
    kept = [name for name, text in found.items() if text == "old weights"]
    assert kept == ["m.onnx.data"] or (kept[0].startswith(".m.onnx-") and kept[0].endswith("old/m.onnx.data"))


def test_a_link_is_replaced_and_not_what_it_points_to(older):
    link = older.parent / "link.onnx"
    link.symlink_to(older)
    write(link)
    assert not link.is_symlink() and contents(older.parent) == {**OLD, "link.onnx": "new"}


def test_folders_are_not_replaced(tmp_path):
    (tmp_path / "m.onnx.data").mkdir()
    (tmp_path / "m.onnx.data" / "mine").write_text("mine")
    with pytest.raises(ExportError, match=r"cannot write .*m\.onnx: .*m\.onnx\.data is a folder"):
        write(tmp_path / "m.onnx", beside=True)
    assert contents(tmp_path) == {"m.onnx.data/mine": "mine"}
    with pytest.raises(ValueError, match=r"m\.onnx\.data is a folder; give the path of a file in it"):
        check_target(tmp_path / "m.onnx.data")


def test_where_nobody_can_write(older, monkeypatch):
    assert check_target(older) == older and check_target(older.parent / "a" / "b") == older.parent / "a" / "b"
    with pytest.raises(ExportError, match=r"cannot write .*b\.onnx: .*m\.onnx is not a folder; give another path"):
        check_target(older / "a" / "b.onnx")
    with pytest.raises(ExportError, match=r"cannot write .*b\.onnx"), folder_beside(older / "b.onnx"):
        pass
    monkeypatch.setattr(files.os, "access", lambda *_: False)
    with pytest.raises(ExportError, match="no permission to write in"):
        check_target(older.parent / "a" / "b")
    assert contents(older.parent) == OLD and set(os.listdir(older.parent)) == set(OLD)
