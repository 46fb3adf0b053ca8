"""TensorRT and TensorRT-RTX: which is installed, what it can do, and what to install where it is missing."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

from ..passes import ExportError

RUNTIMES = ("tensorrt", "tensorrt_rtx")
PLUGINS = ("none", "aot", "jit")
TITLES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
INSTALL = {"tensorrt": "pip install tensorrt-cu13", "tensorrt_rtx": "pip install tensorrt_rtx tensorrt_rtx_cu13"}
OLDEST = (10, 0)
OLDEST_WITH_PLUGINS = (10, 7)
BROKEN_PLUGINS = (10, 14)


@dataclass(frozen=True)
class Library:
    """One of the two, imported."""

    name: str
    module: ModuleType

    @property
    def version(self) -> str:
        return str(self.module.__version__)

    def __str__(self) -> str:
        return f"{TITLES[self.name]} {self.version}"

    @property
    def strongly_typed(self) -> int:
        """The flag of a network whose layers compute in the types that the file gives them."""
        return 1 << int(self.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)

    def log(self) -> Any:
        """A logger that keeps errors and prints nothing."""
        base = self.module.ILogger

        class Log(base):  # type: ignore[misc, valid-type]
            def __init__(self) -> None:
                base.__init__(self)
                self.errors: list[str] = []

            def log(self, severity: Any, message: str) -> None:
                if severity <= base.ERROR:
                    self.errors.append(message)

        return Log()

    def capability(self, wanted: tuple[int, int] | None) -> Any:
        """The target that the builder takes. ValueError for one that the library does not build for."""
        if wanted is None:
            return None
        if self.name == "tensorrt":
            raise ValueError("TensorRT builds for the GPU of this machine; capability is for TensorRT-RTX")
        targets: dict[tuple[int, ...], Any] = {
            (int(digits[:-1]), int(digits[-1])): target
            for name, target in self.module.ComputeCapability.__members__.items()
            if (digits := name.removeprefix("SM")).isdigit()
        }
        if tuple(wanted) not in targets:
            names = ", ".join(map(str, sorted(targets)))
            raise ValueError(
                f"{self} builds for compute capability {names}, not {tuple(wanted)}; None is for 8.0 and later"
            )
        return targets[tuple(wanted)]


def find_library(runtime: str = "auto", plugins: str = "none") -> Library:
    """Import the library asked for, with "auto" the first that is installed.

    Raises:
        ValueError: an unknown name, or plugins of a library without. ExportError: it is missing or of a bad version.
    """
    if runtime not in ("auto", *RUNTIMES):
        raise ValueError(f"runtime must be one of 'auto', {', '.join(map(repr, RUNTIMES))}, not {runtime!r}")
    if runtime == "tensorrt_rtx" and plugins != "none":
        raise ValueError(
            f"TensorRT-RTX has no plugins written in Python; plugins={plugins!r} is for runtime='tensorrt'"
        )
    names = (runtime,) if runtime != "auto" else RUNTIMES if plugins == "none" else ("tensorrt",)
    for name in names:
        module = _imported(name)
        if module is not None:
            library = Library(name, module)
            if name == "tensorrt":
                _check_version(library, plugins)
            return library
    wanted = " or ".join(TITLES[name] for name in names)
    raise ExportError(f"engines need {wanted}: {' or '.join(INSTALL[name] for name in names)}")


def _imported(name: str) -> ModuleType | None:
    try:
        module = import_module(name)
    except ImportError as error:
        if getattr(error, "name", None) == name:
            return None
        raise ExportError(f"{TITLES[name]} is installed but cannot be imported: {error}") from error
    # torch_tensorrt for TensorRT-RTX enters that library under the name of TensorRT.
    return None if name == "tensorrt" and getattr(module, "_package_name", name) != name else module


def _check_version(library: Library, plugins: str) -> None:
    numbers = tuple(int(x) for x in re.findall(r"\d+", library.version)[:2])
    oldest = OLDEST if plugins == "none" else OLDEST_WITH_PLUGINS
    if numbers < oldest:
        needed = f"{oldest[0]}.{oldest[1]}" + (f" for plugins={plugins!r}" if plugins != "none" else "")
        raise ExportError(f"{library} is too old, at least {needed} is needed: {INSTALL['tensorrt']}")
    if plugins != "none" and numbers == BROKEN_PLUGINS:
        raise ExportError(
            f"{library} has a defect in plugins written in Python, which other versions do not have; take another,"
            " 10.13 or 11.0, or plugins='none'"
        )


def plain(message: str) -> str:
    """The library's sentence without its error codes and the places in its sources."""
    message = " ".join(message.split())
    inner = re.search(r"Error Code \d+: [^(]*\((.*)\)\s*$", message)
    message = inner.group(1) if inner else message
    return re.sub(r"\s*In \w+ at /\S+|\[\w+\.\w+:\d+: \w+\]", "", message).strip().rstrip(".")
