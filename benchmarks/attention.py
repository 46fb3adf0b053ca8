"""Sparse attention against dense attention on this device: whether it is right, how fast it is, what memory it takes.

    python benchmarks/attention.py --scaling    # a few minutes on one GPU; without a GPU a small smoke run
    python benchmarks/attention.py --quick      # two shapes, fewer repeats, no peer

Compares with the reference implementation first (the exit status tells whether that held), then times selection,
attention and both together against dense attention to the same tensors in the same run: CUDA graphs, replayed in
turns, medians. A row that fails says why and is left out. Inputs are bfloat16 on a GPU, "random" (normal) or "smooth"
(coherent over the grid, as video is); "tiles" are selected with ``granularity="tile"``, which is not the paper's exact
rule. Prints tables and writes JSON and a plot to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).parent))  # python -P leaves it off

import torch
from attention_measure import (
    FLEX_TILE,
    THRESHOLD,
    Case,
    attend,
    captured,
    dense_attention,
    flex_at_density,
    host_ms,
    implementation_used,
    interleaved,
    make_inputs,
    peak_bytes,
    reason,
    release,
    sparse_runs,
)
from attention_report import FLEX_LABEL, case_table, check_table, plot, scaling_table, shape
from rich.console import Console
from torch import Tensor

from vmoba_compile.blocks import SCHEMES
from vmoba_compile.profit import crossover

RESULTS = Path(__file__).parent / "results"
ERROR_LIMIT = 1e-2  # of 16-bit outputs, relative
DIFFERING_LIMIT = 1e-3  # of the selection's entries: those too close to the cut-off to tell in float32


@dataclass(frozen=True)
class Setup:
    """What every measurement of a run shares."""

    device: str
    dtype: torch.dtype
    implementation: str
    dense: Callable[[Tensor, Tensor, Tensor], Tensor]
    quick: bool
    console: Console

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def turns(self) -> dict:
        """How often to repeat: see :func:`interleaved`."""
        if not self.on_gpu:
            return {"budget_ms": 20, "least": 1, "most": 3}
        return {"budget_ms": 1000 if self.quick else 3000, "least": 5, "most": 10 if self.quick else 20}

    def used(self, case: Case) -> str:
        return implementation_used(self.implementation, case.head_dim, self.device, self.dtype, case.granularity)

    def takes(self, case: Case) -> bool:
        return case.granularity == "token" or self.implementation != "hopper"

    def graph(self, implementation: str) -> bool:
        """Whether to capture: the reference waits for the host."""
        return self.on_gpu and implementation != "reference"

    def guarded(self, what: str, measure: Callable[[], dict | None]) -> dict:
        """The measurement, or ``{"error": ...}`` after printing why there is none."""
        try:
            return measure() or {}
        except Exception as error:
            self.console.print(f"{what} failed: {reason(error)}", style="red", highlight=False, markup=False)
            return {"error": reason(error)}


def check_cases(on_gpu: bool) -> list[Case]:
    if not on_gpu:
        cases = [Case("even", (4, 6, 8), 2, 64), Case("ragged", (5, 7, 9), 1, 64, prefix=3, suffix=5)]
        return [*cases, *(case.tiled() for case in cases)]
    mid = Case("mid", (12, 24, 40), heads=4)
    ragged = Case("ragged", (9, 13, 17), 4, 64, prefix=19, suffix=45)
    return [
        Case("even", (8, 16, 24), heads=4), ragged, mid, mid.smooth(*SCHEMES), ragged.tiled(), mid.tiled(),
        mid.smooth(*SCHEMES).tiled(),
    ]  # fmt: skip


def timed_cases(on_gpu: bool, quick: bool) -> list[Case]:
    if not on_gpu:
        tiny, text = Case("tiny", (4, 6, 8), 2, 64), Case("with text", (5, 7, 9), 2, 64, suffix=7)
        return [tiny, tiny.tiled("3d"), text.smooth("1d", "3d")]
    small = Case("21x30x52", (21, 30, 52), flex=not quick)
    middle = Case("24x36x64", (24, 36, 64), flex=not quick, portable=True)
    large = Case("21x45x80", (21, 45, 80), flex=True)
    if quick:
        return [small, small.tiled(), middle, middle.tiled()]
    text = [
        Case("HunyuanVideo 33x45x80", (33, 45, 80), 24, 128, suffix=256),
        Case("CogVideoX-1.5 11x48x85", (11, 48, 85), 48, 64, prefix=226),
    ]
    return [
        *(other for case in (small, middle, large) for other in (case, case.smooth("1d", "3d"), case.tiled())),
        *(other for case in text for other in (case, case.tiled())),
    ]


def scaling_cases(on_gpu: bool, quick: bool) -> list[Case]:
    if not on_gpu:
        return [Case("tiny", (frames, 6, 8), 2, 64) for frames in (3, 6)]
    frames = (4, 12, 24) if quick else (2, 4, 7, 12, 18, 24, 36, 52)  # 4,608 to 119,808 tokens
    return [Case("scaling", (count, 36, 64)) for count in frames]


def check(case: Case, scheme: str, setup: Setup) -> dict:
    """Output against the reference in float32 on the same selection, and the selection against the reference's."""
    # In 16 bits on a CPU as well: there the same code computes both, and in float32 nothing would differ.
    tensors = make_inputs(case, setup.device, torch.bfloat16)
    runs, selection = sparse_runs(case, scheme, tensors, setup.implementation)
    out = runs["total"]().float()
    expected = attend(case, scheme, [x.float() for x in tensors], selection, "reference")
    right = sparse_runs(case, scheme, tensors, "reference")[1].mask()
    error = float((out - expected).norm() / expected.norm())
    differing = int((selection.mask() != right).sum())
    return {
        "relative_error": error, "largest_error": float((out - expected).abs().max()), "entries": right.numel(),
        "selected": int(right.sum()), "differing": differing,
        # NaN is not at most anything: it fails.
        "held": error <= ERROR_LIMIT and differing <= DIFFERING_LIMIT * right.numel(),
    }  # fmt: skip


def run_checks(setup: Setup) -> list[dict]:
    rows = []
    for case in filter(setup.takes, check_cases(setup.on_gpu)):
        for scheme in case.schemes:
            what = f"check of {case.label} {shape(case.grid)} {scheme}"
            row = setup.guarded(what, lambda case=case, scheme=scheme: check(case, scheme, setup))
            rows.append(case.facts() | {"scheme": scheme, "block": case.block(scheme), "held": False} | row)
        release(setup.device)
    setup.console.print(check_table(rows))
    return rows


def prepared_dense(tensors: list[Tensor], setup: Setup) -> dict:
    def run() -> Tensor:
        return setup.dense(*tensors)

    peak = peak_bytes(run, tensors, setup.device)
    replay, timing = captured(run, graph=setup.on_gpu)
    return {"run": replay, "timing": timing, "peak": peak}


def measure(case: Case, scheme: str, tensors: list[Tensor], dense: dict, implementation: str, setup: Setup) -> dict:
    """One row: times, density, throughput, memory and host time of one scheme."""
    runs, selection = sparse_runs(case, scheme, tensors, implementation)
    density = float(selection.density().mean())
    peak = peak_bytes(runs["total"], tensors, setup.device)
    host = host_ms(runs["total"], setup.device)
    replays, how = {"dense": dense["run"]}, {dense["timing"]}
    for name, run in runs.items():
        replays[name], timing = captured(run, graph=setup.graph(implementation))
        how.add(timing)
    times, repeats = interleaved(replays, setup.device, **setup.turns)
    flops, dense_flops = (4 * case.head_dim * pairs for pairs in (case.pairs(density), case.heads * case.num_tokens**2))
    return {
        "boxes": selection.geometry.num_boxes, "density": density,
        **{f"{name}_ms": times[name] for name in ("select", "attention", "total", "dense")},
        "ratio": times["dense"] / times["total"], "useful_tflops": flops / times["attention"] / 1e9,
        "dense_tflops": dense_flops / times["dense"] / 1e9, "peak_bytes": peak, "dense_peak_bytes": dense["peak"],
        "memory_ratio": peak and peak / dense["peak"], "host_ms": host, "repeats": repeats,
        "timing": "; ".join(sorted(how)),
    }  # fmt: skip


def measure_flex(case: Case, tensors: list[Tensor], dense: dict, density: float, setup: Setup) -> dict:
    """The peer: compiled flex_attention, which selects whole tiles; what it attends to is drawn at random."""
    run, tiled, tokens = flex_at_density(tensors, density)
    peak = peak_bytes(run, tensors, setup.device)
    replay, timing = captured(run, graph=setup.on_gpu)
    times, repeats = interleaved({"dense": dense["run"], "flex": replay}, setup.device, **setup.turns)
    flops = 4 * case.head_dim * case.heads * tiled * tokens**2
    return {
        "tile": FLEX_TILE, "density": tiled, "attention_ms": times["flex"], "dense_ms": times["dense"],
        "ratio": times["dense"] / times["flex"], "useful_tflops": flops / times["flex"] / 1e9, "peak_bytes": peak,
        "repeats": repeats, "timing": timing,
    }  # fmt: skip


def run_case(case: Case, setup: Setup, facts: dict) -> None:
    """Measure all of one shape, add it to the facts and print it."""
    used = setup.used(case)
    tensors = make_inputs(case, setup.device, setup.dtype)
    dense = prepared_dense(tensors, setup)

    def row(scheme: str, implementation: str) -> dict:
        what = f"{case.label} {scheme} with {implementation}"
        numbers = setup.guarded(what, lambda: measure(case, scheme, tensors, dense, implementation, setup))
        release(setup.device)
        return case.facts() | {
            "scheme": scheme, "block": case.block(scheme), "implementation": implementation
        } | numbers  # fmt: skip

    rows = [row(scheme, used) for scheme in case.schemes]
    facts["rows"] += rows
    portable = [row("3d", "triton")] if case.portable and used == "hopper" else []
    facts["portable"] += portable
    peers = []
    density = next((row.get("density") for row in rows if row["scheme"] == "3d"), None)
    if case.flex and density is not None:
        what = f"flex_attention at {case.label}"
        numbers = setup.guarded(what, lambda: measure_flex(case, tensors, dense, density, setup))
        peers = [case.facts() | {"what": FLEX_LABEL} | numbers]
        facts["flex_attention"] += peers
    setup.console.print(case_table(case, rows + portable, peers))


def measure_scaling(case: Case, setup: Setup) -> dict:
    """Dense and sparse milliseconds, each the mean over the three schemes."""
    used = setup.used(case)
    tensors = make_inputs(case, setup.device, setup.dtype)
    dense, timing = captured(lambda: setup.dense(*tensors), graph=setup.on_gpu)
    parts, how = {}, {timing}
    for scheme in case.schemes:
        runs, selection = sparse_runs(case, scheme, tensors, used)
        sparse, timing = captured(runs["total"], graph=setup.graph(used))
        how.add(timing)
        times, repeats = interleaved({"dense": dense, "total": sparse}, setup.device, **setup.turns)
        parts[scheme] = {
            "block": case.block(scheme), "density": float(selection.density().mean()), "total_ms": times["total"],
            "dense_ms": times["dense"], "repeats": repeats,
        }  # fmt: skip
        del runs, selection, sparse
        release(setup.device)
    mean = {name: sum(part[name] for part in parts.values()) / len(parts) for name in ("dense_ms", "total_ms")}
    ratio = mean["dense_ms"] / mean["total_ms"]
    return {"implementation": used, **mean, "ratio": ratio, "timing": "; ".join(sorted(how)), **parts}


def run_scaling(setup: Setup) -> dict:
    rows = []
    cases = scaling_cases(setup.on_gpu, setup.quick)
    for case in cases:
        what = f"scaling at {case.num_tokens} tokens"
        rows.append(case.facts() | setup.guarded(what, lambda case=case: measure_scaling(case, setup)))
        release(setup.device)
    measured = [row for row in rows if "error" not in row]
    found = crossover(measured)
    facts = {
        "what": f"{cases[0].heads} heads x {cases[0].head_dim}, random inputs, mean of the three schemes",
        "crossover_tokens": found, "crossover_at_smallest": bool(found) and found == measured[0]["tokens"],
        "rows": rows,
    }  # fmt: skip
    setup.console.print(scaling_table(facts))
    return facts


def describe(setup: Setup, dense_name: str) -> dict:
    """The device and the software."""
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = None
    name = torch.cuda.get_device_name() if setup.on_gpu else f"{os.cpu_count()} CPU cores"
    used = setup.used(Case("any", (1, 1, 1)))
    title = f"{name}, torch {torch.__version__}, implementation {used}, dense: {dense_name}"
    if not setup.on_gpu:
        title += "\na smoke run without a GPU: on shapes this small the times tell nothing"
    return {
        "title": title, "device": name, "machine": platform.machine(), "torch": torch.__version__, "triton": triton,
        "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "dense": dense_name,
        "dtype": str(setup.dtype).removeprefix("torch."), "threshold": THRESHOLD, "quick": setup.quick,
        "implementation_asked": setup.implementation, "implementation": used,
    }  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--implementation", default="auto", choices=("auto", "reference", "triton", "hopper"))
    parser.add_argument("--quick", action="store_true", help="two shapes, fewer repeats, no flex_attention")
    parser.add_argument("--scaling", action="store_true", help="also times over the tokens, and the crossover")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def prepare(name: str, args: argparse.Namespace, console: Console) -> tuple[Setup, dict, Path]:
    """What every benchmark begins with: the setup, the facts about it, and the file that results go to."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)  # tensors this small take longer on many
    dense, dense_name = dense_attention(device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    setup = Setup(device, dtype, args.implementation, dense, args.quick, console)
    facts = describe(setup, dense_name)
    console.print(facts["title"], highlight=False)
    args.out.mkdir(parents=True, exist_ok=True)
    return setup, facts, args.out / (f"{name}-" + re.sub(r"\W+", "_", facts["device"].lower()) + ".json")


@torch.no_grad()
def main() -> None:
    args, console = arguments(), Console(width=None if sys.stdout.isatty() else 150)
    setup, facts, path = prepare("attention", args, console)
    facts |= {"checks": [], "rows": [], "portable": [], "flex_attention": []}

    def save() -> None:  # after every step: a run cut short leaves what it had
        path.write_text(json.dumps(facts, indent=1) + "\n")

    facts["checks"] = run_checks(setup)
    save()
    for case in filter(setup.takes, timed_cases(setup.on_gpu, args.quick)):
        failed = setup.guarded(case.label, lambda case=case: run_case(case, setup, facts))
        if failed:
            facts["rows"].append(case.facts() | {"scheme": "all"} | failed)
        release(setup.device)
        save()
    if args.scaling:
        facts["scaling"] = run_scaling(setup)
        save()
    setup.guarded("plot", lambda: plot(facts, path.with_suffix(".png")))
    console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    if not all(row["held"] for row in facts["checks"]):
        raise SystemExit("FAILED: not everything agrees with the reference, see the first table")


if __name__ == "__main__":
    main()
