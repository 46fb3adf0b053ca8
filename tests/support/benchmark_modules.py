"""The benchmarks' scripts as modules, for the tests of their parts."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace

FOLDER = Path(__file__).parents[2] / "benchmarks"


def imported(names: Mapping[str, str]) -> Iterator[SimpleNamespace]:
    """Modules of the benchmarks' folder under short names; afterwards they are forgotten, and those that they imported."""
    before, known = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(FOLDER))
    yield SimpleNamespace(**{short: importlib.import_module(name) for short, name in names.items()})
    sys.path[:] = before
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(FOLDER)):
            del sys.modules[name]
