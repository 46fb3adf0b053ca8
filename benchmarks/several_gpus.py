"""One forward of a large video transformer over several GPUs of a machine, dense against sparse.

    python benchmarks/several_gpus.py                           # Wan-2.1-14B's shape, 8 layers, on 1, 2, 4 ... GPUs
    python benchmarks/several_gpus.py --gpus 2 4 --layers 40    # the whole model
    python benchmarks/several_gpus.py --tiny --gpus 1 2         # a small model, gloo; runs anywhere

diffusers' transformer with random weights in bfloat16, its tokens spread by diffusers' Ulysses (``enable_parallelism``):
``torch.compile`` with cuDNN's attention preferred against ``vmoba_compile.optimize``, both by Inductor. One process a GPU;
each number of GPUs and each side in processes of their own: what fails is recorded with its cause. Efficiency is the time
on one GPU over the time on n times n. Communication is the time of NCCL's kernels in the process that waits least, as a
share of all kernels' time; waiting is what the others have more. Imbalance is the load of the fullest GPU's heads over the
mean, from the densities on one GPU, and what an order of heads (``vmoba_compile.balance``) would leave of it. Prints a
table, writes JSON and a plot to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).parent))  # python -P leaves it off

import torch
from attention import RESULTS, prepare
from attention_measure import reason
from end_to_end_measure import Settings
from rich.console import Console
from several_gpus_measure import Plan, Row, begin, first_error, work
from several_gpus_report import efficiency_table, group_table, plot

from vmoba_compile import balance
from vmoba_compile.__main__ import parse_grid

SIDES = ("dense", "sparse")


def run(plan: Plan, side: str, ranks: int, limit: float, body: Callable[..., None] = work) -> Row:
    """One side on so many processes; its row, or ``error`` with the cause: that of the process which failed first."""
    with tempfile.TemporaryDirectory() as folder:
        processes = torch.multiprocessing.spawn(begin, (body, folder, ranks, plan, side), nprocs=ranks, join=False)
        deadline = time.monotonic() + limit
        try:
            while not processes.join(timeout=1):  # one that fails ends the others
                if time.monotonic() > deadline:
                    raise TimeoutError(f"stopped after {limit:.0f} s, --limit")
            found = json.loads((Path(folder) / "row.json").read_text())
        except Exception as error:
            found = {"error": first_error(Path(folder)) or reason(error)}
        finally:
            for process in processes.processes:
                if process.is_alive():
                    process.kill()
                process.join()
    return {"side": side, "gpus": ranks} | found


def summaries(rows: list[Row]) -> list[Row]:
    """For each number of GPUs the two sides' figures beside each other."""
    measured = {(row["side"], row["gpus"]): row for row in rows if "ms" in row}
    density = measured.get(("sparse", 1), {}).get("densities")
    found = []
    for ranks in sorted({gpus for _, gpus in measured}):
        facts: Row = {"gpus": ranks}
        for side in SIDES:
            row, alone = measured.get((side, ranks)), measured.get((side, 1))
            if row is None:
                continue
            facts[side] = {
                "ms": row["ms"], "communication": row["communication_ms"] / row["kernels_ms"],
                "waiting": row["waiting_ms"] / row["kernels_ms"],
                "efficiency": alone and alone["ms"] / (ranks * row["ms"]),
                "differs": alone and difference(alone["output"], row["output"]),
            }  # fmt: skip
        if all(side in facts for side in SIDES):
            facts["ratio"] = facts["dense"]["ms"] / facts["sparse"]["ms"]
        if density and len(density[0]) % ranks == 0:
            shares = torch.tensor(density)
            order = balance.head_order(shares, ranks)
            facts["density"] = float(shares.mean())
            facts["imbalance"] = balance.imbalance(shares, ranks).tolist()
            facts["balanced"] = balance.imbalance(shares, ranks, order).tolist()
        found.append(facts)
    return found


def difference(a: list[float], b: list[float]) -> float:
    """Of outputs, relative, over the values that rows keep."""
    x, y = torch.tensor(a), torch.tensor(b)
    return float((x - y).norm() / x.norm())


def told(row: Row) -> str:
    name = f"{row['side']} on {row['gpus']}"
    if "error" in row:
        return f"[red]{name} failed:[/red] {row['error']}"
    return f"{name}: first call {row['first_s']:.1f} s, then {row['ms']:.1f} ms a forward"


def counts(asked: Sequence[int] | None, there: int, heads: int) -> list[int]:
    """Numbers of processes: those asked for, or 1, 2, 4 … that there are GPUs for and that divide the heads."""
    if asked is None:
        return [count for count in (2**power for power in range(12)) if count <= there and heads % count == 0]
    for count in asked:
        if not 1 <= count <= there:
            raise SystemExit(f"--gpus {count}: there are {there}")
        if heads % count:
            raise SystemExit(f"--gpus {count}: the model's {heads} heads are no multiple of it")
    return list(asked)


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--gpus", type=int, nargs="+", metavar="N", help="numbers of GPUs (1, 2, 4 ... of those there are)"
    )
    parser.add_argument("--layers", type=int, help="of the model: 8 of 40, --tiny 2")
    parser.add_argument("--grid", type=parse_grid, metavar="TxHxW", help="tokens; 21x45x80, --tiny 4x6x8")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--limit", type=float, default=900, metavar="SECONDS", help="for a side on a number of GPUs")
    parser.add_argument("--tiny", action="store_true", help="a small model; the times tell nothing")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(words)
    args.implementation, args.quick = "auto", False  # for prepare()
    return args


def main() -> None:
    args, console = arguments(), Console(width=None if sys.stdout.isatty() else 150)
    setup, facts, path = prepare("several_gpus" + "_tiny" * args.tiny, args, console)
    if not (setup.on_gpu or args.tiny):
        raise SystemExit("a model of production size needs GPUs, and torch sees none; --tiny runs anywhere")
    settings = Settings(args.tiny, args.layers or (2 if args.tiny else 8), setup.device)
    model, grid = ("tiny-wan", (4, 6, 8)) if args.tiny else ("wan2.1-14b", (21, 45, 80))
    plan = Plan(model, args.grid or grid, settings)
    there = torch.cuda.device_count() if setup.on_gpu else 4
    facts |= {"model": model, "grid": plan.grid, "layers": settings.layers, "weights": "random", "rows": [], "gpus": []}
    for ranks in counts(args.gpus, there, 4 if args.tiny else 40):
        for side in args.sides:
            facts["rows"].append(run(plan, side, ranks, args.limit))
            console.print(told(facts["rows"][-1]), highlight=False, soft_wrap=True)
            facts["gpus"] = summaries(facts["rows"])
            path.write_text(json.dumps(facts, indent=1) + "\n")  # at every step: a run cut short leaves what it had
    console.print(efficiency_table(facts))
    console.print(group_table(facts["rows"]))
    setup.guarded("plot", lambda: plot(facts, path.with_suffix(".png")))
    console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    failed = [f"{row['side']} on {row['gpus']}" for row in facts["rows"] if "error" in row]
    if failed:
        raise SystemExit(f"FAILED: {', '.join(failed)}")


if __name__ == "__main__":
    main()
