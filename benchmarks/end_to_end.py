"""Denoising steps of whole video transformers, dense against sparse, at the shapes that they are used with.

    python benchmarks/end_to_end.py                               # all cases; half an hour or more on one GPU
    python benchmarks/end_to_end.py --only wan2.1-14b-720p --regional --profile
    python benchmarks/end_to_end.py --missing --limit 540         # again and again, until nothing is missing
    python benchmarks/end_to_end.py --tiny                        # small models, two layers; runs anywhere

diffusers' transformers with random weights, bfloat16, no gradients: ``torch.compile`` with cuDNN's attention preferred
against ``vmoba_compile.optimize``, both by Inductor. Median milliseconds of a forward, seconds of compilation, peak
memory, kept density, kernels by group; the time of a video of 50 steps follows by arithmetic. Every side of a case runs
in a process of its own: one that fails is recorded with its cause and does not end the rest. New results are merged into
those of the file; what was measured with other software is dropped. ``--regional`` adds compilation block by block. Prints
tables, writes JSON and a plot to benchmarks/results/. ``--jobs 3`` compiles three at a time while one has the GPU: sooner
done, but the compile times are those of a busy machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))  # python -P leaves it off

from attention import RESULTS, prepare
from end_to_end_measure import CASES, SIDES, TINY, ModelCase
from end_to_end_report import compile_table, forward_table, kernel_tables, plot, profile_table, summaries, video_table
from rich.console import Console

SCRIPT = Path(__file__).with_name("end_to_end_measure.py")
LEAST = 45  # seconds, less than which no process is worth starting
SAME = ("device", "torch", "triton", "cudnn", "dtype", "implementation", "layers")
Row = dict[str, Any]
Unit = tuple[ModelCase, str, str]


def run_unit(unit: Unit, args: argparse.Namespace, seconds: float, turn: Path | None = None) -> Row:
    """One side of one case in a process of its own; its row, with ``error`` where something failed."""
    case, side, mode = unit
    with tempfile.TemporaryDirectory() as folder:
        file, errors = Path(folder) / "row.json", Path(folder) / "stderr"
        command = [sys.executable, "-P", str(SCRIPT), case.name, side, mode, str(file)]
        command += ["--layers", str(args.layers)] if args.layers else []
        command += ["--turn", str(turn)] if turn else []
        # Folders of its own: nothing is compiled yet.
        caches = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton"}
        with errors.open("w") as stderr:
            process = subprocess.Popen(command, stderr=stderr, env=os.environ | caches, start_new_session=True)
            try:
                code = process.wait(None if math.isinf(seconds) else seconds)
                end = f"the process ended with status {code}"
            except subprocess.TimeoutExpired:
                code, end = 1, f"stopped after {seconds:.0f} s, --limit"
            finally:
                stop(process)  # its own processes as well, Inductor's for example
        row = json.loads(file.read_text()) if file.exists() else {}
        told = errors.read_text().strip().splitlines()
        row["warnings"] = [line for line in told if "Warning: " in line]
        if code and "error" not in row:
            row["error"] = f"{end}: {told[-1]}" if told and "--limit" not in end else end
    return case.facts() | {"side": side, "mode": mode, "jobs": args.jobs} | row


def run_units(units: list[Unit], args: argparse.Namespace, end_at: float) -> Iterator[tuple[Unit, Row | None]]:
    """Rows as they come, ``--jobs`` processes at a time; None for what there is no time for."""

    def run(unit: Unit) -> Row | None:
        left = end_at - time.perf_counter()
        return run_unit(unit, args, left, turn) if left >= LEAST else None

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        turn = Path(folder) / "turn" if args.jobs > 1 else None
        running = {pool.submit(run, unit): unit for unit in units}
        for future in as_completed(running):
            yield running[future], future.result()


def stop(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def key(row: Row) -> tuple[str, str, str]:
    return row["case"], row["side"], row["mode"]


def merge(rows: list[Row], new: Row) -> list[Row]:
    """``rows`` with a new one in its place, the order of CASES kept; a row with a time gives way to none without."""
    kept = {key(row): row for row in rows}
    if "ms" in new or "ms" not in kept.get(key(new), {}):
        kept[key(new)] = new
    names = [case.name for case in CASES + TINY]
    return sorted(kept.values(), key=lambda row: (names.index(row["case"]), SIDES.index(row["side"])))


def told(row: Row) -> str:
    name = f"{row['case']} {row['side']} {row['mode']}"
    if "ms" not in row:
        return f"[red]{name} failed:[/red] {row['error']}"
    density = f", density {row['density']:.3f}" if "density" in row else ""
    trouble = f"; afterwards: {row['error']}" if "error" in row else ""
    return f"{name}: compiled in {row['compile_s']:.1f} s, {row['ms']:.0f} ms a forward{density}{trouble}"


def wanted(args: argparse.Namespace, rows: list[Row]) -> list[Unit]:
    """What to measure, smaller models first."""
    cases = [case for case in (TINY if args.tiny else CASES) if not args.only or case.name in args.only]
    modes = ["whole", "regional"] if args.regional else ["whole"]
    units = [
        (case, side, mode)
        for case in cases
        for mode in modes
        for side in args.sides
        if side != "dense-masked" or case.text_mask
    ]
    done = {key(row) for row in rows if "error" not in row} if args.missing else set()
    return [unit for unit in units if (unit[0].name, unit[1], unit[2]) not in done]


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [case.name for case in CASES + TINY]
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=["dense", "sparse"])
    parser.add_argument("--regional", action="store_true", help="also compiled block by block")
    parser.add_argument(
        "--missing", action="store_true", help="only what the file does not have, or not without an error"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes that compile at a time")
    parser.add_argument("--limit", type=float, default=math.inf, metavar="SECONDS", help="end after so long")
    parser.add_argument("--profile", action="store_true", help="also print the longest kernels")
    parser.add_argument("--layers", type=int, help="of each stack of blocks, for a first try")
    parser.add_argument("--tiny", action="store_true", help="small models; the times tell nothing")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(words)
    args.implementation, args.quick = "auto", False  # for prepare()
    return args


def main() -> None:
    start, args, console = time.perf_counter(), arguments(), Console(width=None if sys.stdout.isatty() else 150)
    name = "end_to_end" + "_tiny" * args.tiny + f"_{args.layers}_layers" * bool(args.layers)
    setup, facts, path = prepare(name, args, console)
    if not (setup.on_gpu or args.tiny):
        raise SystemExit("models of production size need a GPU, and torch sees none; --tiny runs anywhere")
    facts |= {"cpu_cores": os.cpu_count(), "layers": args.layers, "weights": "random", "rows": [], "cases": []}
    facts["title"] = facts["title"].replace(", dense:", ", random weights, dense:")
    before = json.loads(path.read_text()) if path.exists() else {}
    if all(before.get(name) == facts[name] for name in SAME):
        facts["rows"] = before["rows"]
    elif before:
        console.print(f"{path} is of other software or another device, and is written anew", soft_wrap=True)
    failed: list[str] = []
    for (case, side, mode), row in run_units(wanted(args, facts["rows"]), args, start + args.limit):
        if row is None:
            console.print(f"{case.name} {side} {mode}: left out, --limit", highlight=False)
            continue
        if "error" in row and "--limit" not in row["error"]:
            failed.append(f"{case.name} {side} {mode}")
        for line in (told(row), *row["warnings"]):
            console.print(line, highlight=False, soft_wrap=True)
        facts["rows"] = merge(facts["rows"], row)
        facts["cases"] = summaries(facts["rows"])
        path.write_text(json.dumps(facts, indent=1) + "\n")  # at every step: a run cut short leaves what it had
    rows = facts["rows"]
    for table in (forward_table(rows), video_table(rows), compile_table(rows), profile_table(rows)):
        console.print(table)
    for table in kernel_tables(rows) if args.profile else ():
        console.print(table)
    setup.guarded("plot", lambda: plot(facts, path.with_suffix(".png")))
    console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    if failed:
        raise SystemExit(f"FAILED: {', '.join(failed)}")


if __name__ == "__main__":
    main()
