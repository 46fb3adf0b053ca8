"""How files are written: a file appears under its name whole, or what was there stays."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .passes import ExportError


def check_target(path: str | os.PathLike[str]) -> Path:
    """Whether a file can be written there, asked before minutes are spent on it. Folders that are missing may be made.

    Raises:
        ValueError: ``path`` is a folder. ExportError: its folder cannot be made or written to.
    """
    path = Path(path)
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder; give the path of a file in it")
    parent = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not os.path.isdir(parent):
        raise ExportError(f"cannot write {path}: {parent} is not a folder; give another path")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ExportError(f"cannot write {path}: no permission to write in {parent}; give another path")
    return path


@contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """A hidden folder beside ``path``, so on its file system, which is removed in the end with all that is in it.

    Raises:
        ExportError: it cannot be made.
    """
    with _telling(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        made = tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-", ignore_cleanup_errors=True)
    with made as folder:
        yield Path(folder)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """``with replacing(path) as made: write(made)``: ``made`` has the same name, in a hidden folder beside ``path``.

    When the block ends well, the file moves to ``path``. When it fails or is interrupted, the folder is removed and the
    older file is as it was. That holds for a killed process as well, which only leaves the hidden folder behind. A link
    by the name of the file is replaced; what it points to stays.

    What else the block writes beside ``made``, weights for example, moves along: first, so that the file never stands
    without them, and back again where a later move fails. If the process is killed between these moves, new weights can
    stand beside the older file, or none; the older weights are then in the hidden folder, under ``old``.

    Raises:
        ExportError: the folder cannot be made, or a file cannot be moved to its place.
    """
    with folder_beside(path) as folder:
        new, old = folder / "new", folder / "old"
        new.mkdir()
        old.mkdir()
        yield new / path.name
        with _telling(path):
            _move(new, old, path)


def _move(new: Path, old: Path, path: Path) -> None:
    named = new / path.name
    others = sorted(file for file in new.iterdir() if file != named)
    for file in (*others, named):
        with open(file, "rb+") as written:
            os.fsync(written.fileno())  # else a file may bear its name before its content is on the disk
    try:
        for file in others:
            target = path.parent / file.name
            if os.path.isdir(target):
                raise IsADirectoryError(0, f"{target} is a folder")
            if os.path.lexists(target):
                os.replace(target, old / file.name)
            os.replace(file, target)
        os.replace(named, path)
    except BaseException:
        if named.exists():  # the last move decides: before it everything goes back
            for file in others:
                target = path.parent / file.name
                if os.path.lexists(old / file.name):
                    os.replace(old / file.name, target)
                elif not file.exists():
                    target.unlink()
        raise


@contextmanager
def _telling(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error.strerror or error}") from error
