"""``python -m vmoba_compile bench``: one attention on this device, dense and sparse, and from where sparse is faster."""

from __future__ import annotations

import argparse
import datetime
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from . import profit
from .bench_measure import LEAST_TURNS, WARM_UPS, Row, Setup, Timer, dense_attention, densities, measure, time_in_turns
from .blocks import SCHEMES
from .files import check_target, replacing
from .kernels.partition import Triple

# From 560 to 119,808 tokens, in the shapes of videos.
LADDER: tuple[Triple, ...] = (
    (5, 8, 14), (7, 11, 20), (9, 15, 26), (10, 18, 30), (11, 20, 34), (13, 22, 40), (17, 26, 45), (21, 30, 52), (24, 36, 64),
    (21, 45, 80), (52, 36, 64),
)  # fmt: skip
SHOWN = {"cpu": LADDER[:5], "cuda": LADDER[4:10]}  # where no --tokens are given
NOISE = 0.03  # of a ratio: one nearer to 1 than this decides nothing
SURE = 2  # sizes in a row at which sparse must be faster for certain before the ladder ends
DTYPES = ("bfloat16", "float16", "float32")


def add_arguments(command: argparse.ArgumentParser, parse_grid: Callable[[str], Triple]) -> None:
    """Arguments of ``bench``."""
    command.add_argument(
        "--tokens", type=parse_grid, action="append", metavar="TxHxW", help="a token grid; may be given several times"
    )
    command.add_argument("--heads", type=_positive, metavar="N", help="12 on a GPU and 2 on a CPU unless given")
    command.add_argument("--head-dim", type=_positive, metavar="N", help="128 on a GPU and 64 on a CPU unless given")
    command.add_argument("--dtype", choices=DTYPES, help="16 bits on a GPU and float32 on a CPU unless given")
    command.add_argument("--backward", action="store_true", help="forward and backward, as in training")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    command.add_argument(
        "--calibrate",
        action="store_true",
        help="find the length from which sparse attention is faster here, forward and with backward, and keep it for "
        "min_tokens='auto'",
    )
    command.add_argument(
        "--minutes", type=float, default=10.0, metavar="M", help="the most that --calibrate may take, 10 unless given"
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"it must be a whole number of at least 1, not {text!r}")
    return int(text)


def run(args: argparse.Namespace, *, timer: Timer = time_in_turns) -> int:
    """Carry out the command and print what it finds; returns the exit status: 0, 1 where a calibration decides nothing.

    Raises:
        ValueError: arguments that do not go together, or a calibration file that must not be overwritten.
        ExportError, OSError: a file cannot be written.
    """
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.json and not args.json.absolute().parent.is_dir():
        raise ValueError(f"--json names {args.json}, whose folder does not exist; make it first")
    if args.json:
        check_target(args.json)
    return (_calibrate if args.calibrate else _compare)(args, device, timer, console)


def _setup(args: argparse.Namespace, device: torch.device) -> Setup:
    on_gpu = device.type == "cuda"
    dtype = torch.float32
    if on_gpu:
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if args.dtype:
        dtype = getattr(torch, args.dtype)
    heads, head_dim = args.heads or (12 if on_gpu else 2), args.head_dim or (128 if on_gpu else 64)
    return Setup(device, heads, head_dim, dtype, args.backward)


def _compare(args: argparse.Namespace, device: torch.device, timer: Timer, console: Console) -> int:
    setup = _setup(args, device)
    dense, dense_name = dense_attention(setup)
    rows: list[Row] = []
    with console.status("measuring") as status:
        for grid in sorted(args.tokens or SHOWN[device.type], key=math.prod):
            status.update(f"measuring {_shape(grid)}")
            rows.append(measure(grid, setup, dense, timer) | {"density": densities(grid, setup)})
    console.print(_table(rows, setup, dense_name))
    console.print(_kept(profit.least_tokens(device, setup.backward)))
    _save(args.json, _facts(setup, dense_name) | {"crossover_tokens": profit.crossover(rows), "rows": rows}, console)
    return 0


def _calibrate(args: argparse.Namespace, device: torch.device, timer: Timer, console: Console) -> int:
    if args.backward or args.dtype:
        raise ValueError(
            "--calibrate measures the forward and the backward in the type that the device is used with; leave out"
            " --backward and --dtype"
        )
    if not args.minutes > 0:
        raise ValueError(f"--minutes must be more than 0, not {args.minutes}")
    path = profit.calibration_path()
    profit.read_calibration(path)  # a file that must not be overwritten is told of before the work, not after it
    name = profit.device_name(device)
    console.print(f"calibrating {name}: usually a few minutes, {args.minutes:g} at the most (--minutes)")
    began = time.monotonic()
    facts: dict[str, Any] = {}
    entry: dict[str, Any] = {"torch": torch.__version__, "measured": datetime.date.today().isoformat(), "largest": {}}
    for mode, share in (("forward", 1 / 3), ("training", 1)):  # of the time, by the end of the mode
        setup = replace(_setup(args, device), backward=mode == "training")
        dense, dense_name = dense_attention(setup)
        console.print(f"{setup}, dense: {dense_name}")
        rows, ended = climb(
            sorted(args.tokens or LADDER, key=math.prod),
            partial(measure, setup=setup, dense=dense, timer=timer),
            deadline=began + 60 * args.minutes * share,
            told=lambda row: console.print(_progress(row)),
        )
        if not rows:
            raise ValueError(f"nothing could be measured: {ended}")
        console.print(f"  {_verdict(rows)}; {ended}")
        facts |= _facts(setup, dense_name) | {mode: rows}
        if _decides(rows, profit.shipped(device, setup.backward).tokens):
            entry[mode] = profit.crossover(rows)
            entry["largest"][mode] = rows[-1]["tokens"]
        else:
            console.print("  these sizes do not reach the crossover: give other --tokens, or more --minutes")
    decided = bool(entry["largest"])
    del facts["backward"]
    if decided:
        facts["calibration"] = {name: entry}
        path = profit.write_calibration(name, entry, path)
        console.print(f"wrote {path} after {time.monotonic() - began:.0f} s", soft_wrap=True)
    else:
        console.print("nothing was decided, and nothing written")
    for training in (False, True):
        console.print(f"{profit.MODES[training]}: {_kept(profit.least_tokens(device, training))}")
    _save(args.json, facts, console)
    return 0 if decided else 1


def _decides(rows: list[Row], known: int) -> bool:
    """False where all sizes lie on one side of the crossover, and that is no news beside the ``known`` one."""
    found = profit.crossover(rows)
    if found is None:
        return rows[-1]["tokens"] >= known
    return found > rows[0]["tokens"] or found <= known


def climb(
    grids: Sequence[Triple],
    measured: Callable[[Triple], Row],
    *,
    deadline: float = math.inf,
    clock: Callable[[], float] = time.monotonic,
    told: Callable[[Row], object] = lambda row: None,
) -> tuple[list[Row], str]:
    """Measure the grids, small to large, until the crossover lies below sizes at which sparse is faster for certain.

    Returns the rows and why they end: certainty, the end of the ladder, memory, or ``deadline`` (seconds of ``clock``),
    which the next size would overrun if its runs grew with the square of its tokens. The first is measured in any case.
    """
    rows: list[Row] = []
    spent = 0.0
    for grid in grids:
        if rows:
            turn = rows[-1]["turn_ms"] / 1e3 * (math.prod(grid) / rows[-1]["tokens"]) ** 2
            # What the last size took stands for what the next one compiles.
            if clock() + spent + turn * (LEAST_TURNS + WARM_UPS) > deadline:
                return rows, f"the time would not do for {_shape(grid)}"
        start = clock()
        try:
            rows.append(measured(grid))
        except torch.OutOfMemoryError:
            return rows, f"the memory would not do for {_shape(grid)}"
        spent = clock() - start
        told(rows[-1])
        if len(rows) >= SURE and all(row["low"] > 1 + NOISE for row in rows[-SURE:]):
            return rows, f"certain after {len(rows)} sizes"
    return rows, "no larger size to measure"


def _verdict(rows: list[Row]) -> str:
    tokens = profit.crossover(rows)
    if tokens is None:
        return f"sparse is not faster at {rows[-1]['tokens']:,} tokens, the largest size measured"
    smallest = ", the smallest size measured" if tokens == rows[0]["tokens"] else ""
    return f"sparse is faster from {tokens:,} tokens on{smallest}"


def _kept(least: profit.Least) -> str:
    return f"min_tokens='auto' keeps dense what has fewer tokens than {least.named}"


def _progress(row: Row) -> str:
    sparse = sum(row[scheme]["ms"] for scheme in SCHEMES) / len(SCHEMES)
    return (
        f"  {row['tokens']:>7,} tokens: dense {row['dense_ms']:.3f} ms, sparse {sparse:.3f} ms, {row['ratio']:.2f}x "
        f"({row['low']:.2f} to {row['high']:.2f} in {row['turns']} turns)"
    )


def _table(rows: list[Row], setup: Setup, dense_name: str) -> Table:
    """A line for each grid: times, dense time over sparse time, and the densities of the schemes."""
    name = profit.device_name(setup.device)
    found = Table(
        title=f"{name}, torch {torch.__version__}: {setup}, dense: {dense_name}", title_justify="left",
        caption_justify="left", caption=_verdict(rows),
    )  # fmt: skip
    for column in ("grid", "tokens", "dense ms", *(f"{s.upper()} ms (ratio)" for s in SCHEMES), "mean", "density"):
        found.add_column(column, justify="right")
    for row in rows:
        found.add_row(
            _shape(row["grid"]), f"{row['tokens']:,}", f"{row['dense_ms']:.3f}",
            *(f"{row[s]['ms']:.3f} ({row[s]['ratio']:.2f}x)" for s in SCHEMES), f"{row['ratio']:.2f}x",
            " ".join(f"{row['density'][s]:.2f}" for s in SCHEMES),
        )  # fmt: skip
    return found


def _shape(grid: Triple) -> str:
    return "x".join(map(str, grid))


def _facts(setup: Setup, dense_name: str) -> dict[str, Any]:
    return {
        "device": profit.device_name(setup.device), "torch": torch.__version__, "heads": setup.heads,
        "head_dim": setup.head_dim, "dtype": str(setup.dtype).removeprefix("torch."), "backward": setup.backward,
        "dense": dense_name,
    }  # fmt: skip


def _save(path: Path | None, facts: dict[str, Any], console: Console) -> None:
    if path:
        with replacing(path) as made:
            made.write_text(json.dumps(facts, indent=1) + "\n")
        console.print(f"wrote {path}", soft_wrap=True)
