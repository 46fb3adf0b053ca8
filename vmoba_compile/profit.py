"""From how many tokens sparse attention is faster than dense: what ``min_tokens="auto"`` stands for on a device.

A device's figure is the user's own, written by ``python -m vmoba_compile bench --calibrate``, else a shipped one, else a
default. The user's lie in one JSON file, ``$VMOBA_COMPILE_CALIBRATION`` or ``vmoba_compile/calibration.json`` in the
user's cache folder::

    {"version": 1, "devices": {"cpu": {"forward": 6000, "training": null, "largest": {"forward": 11440, "training": 19890},
                                       "torch": "2.13.0", "measured": "2026-01-31"}}}

Its counts are in tokens. null: sparse attention was faster at no size measured; "largest" is the largest of them.
"""

from __future__ import annotations

import json
import math
import os
import stat
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

VERSION = 1
VARIABLE = "VMOBA_COMPILE_CALIBRATION"
MODES = ("forward", "training")  # training: forward and backward
COMMAND = "python -m vmoba_compile bench --calibrate"
NEVER = sys.maxsize  # tokens
MAX_BYTES = 1 << 20  # a larger file is none of ours


class Reading(NamedTuple):
    """What was measured of one mode on one device."""

    tokens: int | None  # sparse attention is faster from here on; None: at no size measured
    largest: int = 0  # tokens of the largest size measured; 0: not known


class Least(NamedTuple):
    """Sequences shorter than ``tokens`` stay dense; ``named`` is that number and where it comes from, in words."""

    tokens: int
    named: str


# "NVIDIA H200": python benchmarks/attention.py --scaling (benchmarks/results/attention-nvidia_h200.json); training:
#     python -m vmoba_compile bench --calibrate --json (calibration-nvidia_h200.json), whose forward gives 8,641: both lie
#     between sizes that were measured, 7,480 and 11,440 tokens, and the larger one is the safer.
# "cpu": python benchmarks/crossover.py on two cores (benchmarks/results/crossover_2_cpu_cores.json), the forward alone: the
#     least size measured that was faster. Between the sizes, as `crossover` reads it, it would be 6,172.
SHIPPED: Mapping[str, Mapping[str, int]] = {
    "NVIDIA H200": {"forward": 10601, "training": 5564},
    "cpu": {"forward": 7480},
}
# Devices without a measurement: GPUs have the H200's figure; of any other, such as meta, nothing is known.
DEFAULT = {"cuda": 10601}
DEFAULT_OTHER = 8192


def least_tokens(device: torch.device, training: bool) -> Least:
    """From how many tokens sparse attention is used on ``device``; ``training`` where a backward follows.

    A calibration file that cannot be used is warned of once, and the shipped figures are used.
    """
    readings = _calibrations().get(device_name(device), {})
    reading = readings.get(MODES[training]) or readings.get("forward")
    if reading is None:
        return shipped(device, training)
    if reading.tokens is not None:
        return Least(reading.tokens, _below(reading.tokens, "your calibration"))
    largest = f" (none up to {reading.largest})" if reading.largest else ""
    return Least(NEVER, f"any at which your calibration found sparse attention faster{largest}")


def shipped(device: torch.device, training: bool) -> Least:
    """The same without the user's calibration."""
    name, mode = device_name(device), MODES[training]
    measured = SHIPPED.get(name)
    if measured:
        alone = "" if mode in measured else f", the forward alone; for training run {COMMAND}"
        tokens = measured.get(mode, measured["forward"])
        return Least(tokens, _below(tokens, f"measured for {name}{alone}"))
    tokens = DEFAULT.get(device.type, DEFAULT_OTHER)
    remedy = "" if device.type == "meta" else f"; run {COMMAND}"
    return Least(tokens, _below(tokens, f"default for devices without a measurement{remedy}"))


def _below(tokens: int, source: str) -> str:
    return f"min_tokens={tokens}, below which dense attention is faster ({source})"


def device_name(device: torch.device) -> str:
    """What figures of a device go by: a GPU's name, else the type, as for a GPU that is traced for but not there."""
    if device.type != "cuda" or not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
        return device.type
    return torch.cuda.get_device_name(device)


def crossover(rows: Sequence[Mapping[str, Any]]) -> int | None:
    """Tokens from which sparse is faster at every larger size, read between two sizes on the logarithms; None: nowhere.

    ``rows`` hold "tokens" and "ratio", dense time over sparse time in the mean of the schemes, through which layers
    cycle. Where sparse is faster at the smallest size already, that size.
    """
    rows = sorted(rows, key=lambda row: row["tokens"])
    first = next((place for place in range(len(rows)) if all(row["ratio"] >= 1 for row in rows[place:])), None)
    if not first:
        return None if first is None else rows[0]["tokens"]
    (x0, y0), (x1, y1) = ((math.log(row["tokens"]), math.log(row["ratio"])) for row in rows[first - 1 : first + 1])
    return round(math.exp(x0 - y0 * (x1 - x0) / (y1 - y0)))


def calibration_path() -> Path:
    """Where the user's calibration lies, or would: ``$VMOBA_COMPILE_CALIBRATION``, else in the user's cache folder."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(cache) if os.path.isabs(cache) else Path(os.path.expanduser("~/.cache"))  # relative: to be ignored
    return folder / "vmoba_compile" / "calibration.json"


def read_calibration(path: Path) -> dict[str, Any]:
    """The file's content, checked; an empty calibration where there is no file.

    Raises:
        ValueError: the file cannot be read, is not a calibration, or is one of another version.
    """
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return {"version": VERSION, "devices": {}}
    except OSError as error:
        raise _unusable(path, str(error)) from error
    if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_BYTES:
        raise _unusable(path, "it is not a JSON file of a few lines")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _unusable(path, f"it cannot be read as JSON: {error}") from error
    problem = _problem(content)
    if problem:
        raise _unusable(path, problem)
    return content


def _unusable(path: Path, why: str) -> ValueError:
    return ValueError(
        f"{path} is no calibration that can be used, because {why}; move it away, or name another in {VARIABLE}"
    )


def _problem(content: Any) -> str | None:
    """What is wrong with a file's content, as the end of a sentence; None: nothing."""
    if not isinstance(content, dict) or not isinstance(content.get("devices"), dict):
        return 'it does not hold "version" and "devices"'
    if isinstance(content.get("version"), bool) or content.get("version") != VERSION:
        return f"it has version {content.get('version')!r}, and this vmoba_compile reads version {VERSION}"
    for name, entry in content["devices"].items():
        if not isinstance(entry, dict) or not any(mode in entry for mode in MODES):
            return f"its device {name!r} has neither {' nor '.join(MODES)}"
        largest = entry.get("largest", {})
        if not isinstance(largest, dict) or not all(_is_count(value) for value in largest.values()):
            return f'"largest" of its device {name!r} must map modes to numbers of tokens, not {largest!r}'
        for mode in MODES:
            value = entry.get(mode)
            if value is not None and not _is_count(value):
                return f'"{mode}" of its device {name!r} must be a number of tokens or null, not {value!r}'
    return None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def write_calibration(name: str, entry: Mapping[str, Any], path: Path | None = None) -> Path:
    """Put a device's entry into the file, in place of an older one of that device; the others stay. Returns the path.

    The file is replaced as a whole: whoever reads it meanwhile finds the old or the new one.

    Raises:
        ValueError: a file is there that is not a calibration; it is left as it is. OSError: it cannot be written.
    """
    # A link stays one.
    path = Path(os.path.realpath(calibration_path() if path is None else path))
    content = read_calibration(path)
    content["devices"][name] = dict(entry)
    problem = _problem(content)
    if problem:
        raise ValueError(f"the entry for {name!r} cannot be written: {problem}")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path


def _calibrations() -> Mapping[str, Mapping[str, Reading]]:
    """The user's readings by device and mode; read again where the file is another one than the last time."""
    path = calibration_path()
    try:
        found = path.stat()
    except OSError:  # most often there is none; a folder that may not be looked into says nothing either
        return {}
    return _load(path, (found.st_mtime_ns, found.st_size, found.st_ino))


@lru_cache(maxsize=4)
def _load(path: Path, state: tuple[int, ...]) -> Mapping[str, Mapping[str, Reading]]:
    """The readings in a file in that state; none, after a warning, where it is broken. Once for each state."""
    try:
        devices = read_calibration(path)["devices"]
    except ValueError as error:
        warnings.warn(f"vmoba_compile: {error}; until then min_tokens='auto' is the shipped figure", stacklevel=2)
        return {}
    return {
        name: {mode: Reading(entry[mode], entry.get("largest", {}).get(mode, 0)) for mode in MODES if mode in entry}
        for name, entry in devices.items()
    }
