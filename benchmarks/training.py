"""Training with sparse attention against dense attention on this device: gradients, times and memory.

    python benchmarks/training.py               # one attention, forward and backward; about a minute on one GPU
    python benchmarks/training.py --model       # also whole training steps of a Wan-2.1-1.3B-shaped model; long to compile
    python benchmarks/training.py --quick       # two shapes, fewer repeats

Compares gradients with the reference implementation first (the exit status tells whether that held), then times forward
and backward, selection included, against dense attention to the same tensors in the same run: CUDA graphs, replayed in
turns, medians. A training step is forward, mean squared error, backward and AdamW, both sides compiled by Inductor with
activation checkpointing on, the dense side with cuDNN's attention. Without a GPU a small smoke run. Prints tables and
writes JSON and a plot to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).parent))  # python -P leaves it off

import torch
from attention import RESULTS, Setup, prepare
from attention_measure import (
    THRESHOLD,
    Case,
    captured,
    host_ms,
    interleaved,
    make_inputs,
    mean_density,
    peak_bytes,
    release,
    sparse_runs,
    synchronize,
)
from attention_report import shape
from rich.console import Console
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from training_report import check_table, model_table, operator_table, plot

import vmoba_compile
from vmoba_compile import VMoBAConfig
from vmoba_compile.__main__ import parse_grid
from vmoba_compile.backend import inner_compiler
from vmoba_compile.blocks import SCHEMES
from vmoba_compile.zoo import preset

ERROR_LIMIT = 1e-2  # of 16-bit gradients, relative


def check_cases(on_gpu: bool) -> list[Case]:
    if not on_gpu:
        return [Case("even", (4, 6, 8), 2, 64), Case("ragged", (5, 7, 9), 1, 64, prefix=3, suffix=5)]
    mid = Case("mid", (12, 24, 40), heads=4)
    return [mid, mid.smooth(*SCHEMES), Case("ragged", (9, 13, 17), 4, 64, prefix=19, suffix=45)]


def timed_cases(on_gpu: bool, quick: bool) -> list[Case]:
    if not on_gpu:
        return [Case("tiny", (4, 6, 8), 2, 64)]
    small, middle = Case("21x30x52", (21, 30, 52)), Case("24x36x64", (24, 36, 64), portable=True)
    if quick:
        return [small, middle]
    return [
        small, small.smooth("3d"), middle, middle.smooth("3d"), Case("21x45x80", (21, 45, 80)),
        Case("CogVideoX-1.5 11x48x85", (11, 48, 85), 48, 64, prefix=226),
    ]  # fmt: skip


def model_grids(on_gpu: bool, quick: bool) -> list[tuple[int, int, int]]:
    if not on_gpu:
        return [(4, 6, 8)]
    return [(24, 36, 64)] if quick else [(24, 36, 64), (21, 45, 80)]


def forward_and_backward(attend: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """``attend`` and its gradients for q, k and v; ``inputs`` are these and the gradient of the output."""
    *leaves, dout = inputs
    return lambda: torch.autograd.grad(attend(*leaves), leaves, dout)


def training_inputs(case: Case, device: str, dtype: torch.dtype) -> list[Tensor]:
    """q, k and v, which require gradients, and a random gradient of the output in the same layout."""
    leaves = [x.requires_grad_() for x in make_inputs(case, device, dtype)]
    dout = torch.randn_like(leaves[0].detach().transpose(1, 2).contiguous()).transpose(1, 2)
    return [*leaves, dout]


def sparse_attention(case: Case, scheme: str, implementation: str) -> Callable[..., Tensor]:
    """Selection and attention by one call of the public function."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return vmoba_compile.attention(
            q, k, v, case.grid, block=case.block(scheme), prefix=case.prefix, suffix=case.suffix, threshold=THRESHOLD,
            implementation=implementation,
        )  # fmt: skip

    return attend


def check(case: Case, scheme: str, setup: Setup) -> dict:
    """Gradients against the reference's in float32, which selects for itself."""
    inputs = training_inputs(case, setup.device, torch.bfloat16)
    got = forward_and_backward(sparse_attention(case, scheme, setup.implementation), inputs)()
    exact = [x.detach().float().requires_grad_() for x in inputs[:3]]
    wanted = forward_and_backward(sparse_attention(case, scheme, "reference"), [*exact, inputs[3].float()])()
    errors = [float((a.float() - b).norm() / b.norm()) for a, b in zip(got, wanted, strict=True)]
    return {"relative_errors": errors, "held": all(error <= ERROR_LIMIT for error in errors)}


def run_checks(setup: Setup) -> list[dict]:
    rows = []
    for case in check_cases(setup.on_gpu):
        for scheme in case.schemes:
            what = f"check of {case.label} {scheme}"
            row = setup.guarded(what, lambda case=case, scheme=scheme: check(case, scheme, setup))
            rows.append(case.facts() | {"scheme": scheme, "held": False} | row)
        release(setup.device)
    setup.console.print(check_table(rows))
    return rows


def measure(case: Case, scheme: str, inputs: list[Tensor], dense: dict, implementation: str, setup: Setup) -> dict:
    """One row: times, density and memory of one scheme."""
    run = forward_and_backward(sparse_attention(case, scheme, implementation), inputs)
    selection = sparse_runs(case, scheme, [x.detach() for x in inputs[:3]], implementation)[1]
    peak = peak_bytes(run, inputs, setup.device)
    host = host_ms(run, setup.device)
    replay, timing = captured(run, graph=setup.graph(implementation))
    times, repeats = interleaved({"dense": dense["run"], "sparse": replay}, setup.device, **setup.turns)
    return {
        "boxes": selection.geometry.num_boxes, "density": float(selection.density().mean()), "ms": times["sparse"],
        "dense_ms": times["dense"], "ratio": times["dense"] / times["sparse"], "peak_bytes": peak,
        "dense_peak_bytes": dense["peak"], "memory_ratio": peak and peak / dense["peak"], "host_ms": host,
        "repeats": repeats, "timing": timing,
    }  # fmt: skip


def run_case(case: Case, setup: Setup) -> list[dict]:
    used = setup.used(case)
    inputs = training_inputs(case, setup.device, setup.dtype)
    dense_run = forward_and_backward(setup.dense, inputs)
    dense: dict = {"peak": peak_bytes(dense_run, inputs, setup.device)}
    dense["run"], _ = captured(dense_run, graph=setup.on_gpu)
    rows = []
    for scheme, implementation in [(scheme, used) for scheme in case.schemes] + [("3d", "triton")] * case.portable:
        what = f"{case.label} {scheme} with {implementation}"
        call = (case, scheme, inputs, dense, implementation, setup)
        numbers = setup.guarded(what, lambda call=call: measure(*call))
        facts = {"scheme": scheme, "block": case.block(scheme), "implementation": implementation}
        rows.append(case.facts() | facts | numbers)
        release(setup.device)
    setup.console.print(operator_table(case, rows))
    return rows


@contextlib.contextmanager
def cudnn_attention(on_gpu: bool) -> Iterator[None]:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if on_gpu else contextlib.nullcontext():
        yield


def attention_kernels(step: Callable[[], object], device: str) -> list[str]:
    """Names of the attention kernels that a step runs: the dense side must really be cuDNN's."""
    if device != "cuda":
        return []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    names = {
        event.key for event in profile.key_averages() if re.search("sdpa|flash|attention|hopper|attend", event.key)
    }
    return sorted(names)


def timed_steps(step: Callable[[], float], setup: Setup, count: int) -> dict:
    """Median time of ``count`` steps after two that compile and settle, and the peak memory of all that is on the GPU."""
    start = time.perf_counter()
    step()
    synchronize(setup.device)
    first = time.perf_counter() - start
    kernels = attention_kernels(step, setup.device)
    if setup.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    times, losses = [], []
    for _ in range(count):
        synchronize(setup.device)
        start = time.perf_counter()
        losses.append(step())
        synchronize(setup.device)
        times.append((time.perf_counter() - start) * 1e3)
    peak = torch.cuda.max_memory_allocated() if setup.on_gpu else None
    return {
        "ms": statistics.median(times), "all_ms": times, "peak_bytes": peak, "first_s": first, "losses": losses,
        "attention_kernels": kernels,
    }  # fmt: skip


def make_step(model: nn.Module, run: nn.Module, inputs: dict, target: Tensor) -> Callable[[], float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=target.is_cuda)

    def step() -> float:
        loss = (run(**inputs).sample - target).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def told(grid: tuple[int, int, int], side: str, facts: dict) -> str:
    """A line while the benchmark runs: compiling a whole model takes minutes."""
    return f"{'x'.join(map(str, grid))} {side}: first step {facts['first_s']:.0f} s, then {facts['ms']:.0f} ms a step"


def check_losses(sides: dict[str, dict]) -> None:
    """Times of steps that lost their way are worth nothing: both sides must learn, and from the same start."""
    for name, side in sides.items():
        losses = side["losses"]
        if not all(map(math.isfinite, losses)) or losses[-1] > losses[0]:
            raise RuntimeError(f"the {name} model does not learn: its losses are {losses}")
    first = [side["losses"][0] for side in sides.values()]
    if abs(first[0] - first[1]) > 0.05 * first[0]:
        raise RuntimeError(f"dense and sparse losses differ by more than 5 %: {first}")


def measure_model(grid: tuple[int, int, int], layers: int, setup: Setup) -> dict:
    """Training steps of one model, dense and rewritten, one after the other with the same weights and inputs."""
    torch.manual_seed(0)
    name = "wan2.1-1.3b" if setup.on_gpu else "tiny-wan"
    model, inputs = preset(name).build(grid=grid, device=setup.device, dtype=setup.dtype, num_layers=layers)
    model.train().enable_gradient_checkpointing()
    target = torch.randn_like(inputs["hidden_states"])
    start = {name: x.to("cpu", copy=True) for name, x in model.state_dict().items()}
    inner = "inductor" if setup.on_gpu else "aot_eager"
    count, sides = (3 if setup.on_gpu else 1), {}
    with cudnn_attention(setup.on_gpu):
        compiler = inner_compiler(inner)  # the same for both sides
        dense = torch.compile(model, dynamic=False, backend=compiler)
        sides["dense"] = timed_steps(make_step(model, dense, inputs, target), setup, count)
    setup.console.print(told(grid, "dense", sides["dense"]))
    del dense
    torch.compiler.reset()
    release(setup.device)
    model.load_state_dict(start)
    config = VMoBAConfig() if setup.on_gpu else VMoBAConfig(min_tokens=0)
    sparse = vmoba_compile.optimize(model, config, inner=compiler, expect=layers)
    sides["sparse"] = timed_steps(make_step(model, sparse, inputs, target), setup, count)
    setup.console.print(told(grid, "sparse", sides["sparse"]))
    check_losses(sides)
    density = mean_density(model, config, inputs)
    memory = setup.on_gpu and sides["sparse"]["peak_bytes"] / sides["dense"]["peak_bytes"]
    return {
        "model": name, "grid": grid, "layers": layers, "inner": inner, "density": density, **sides,
        "ratio": sides["dense"]["ms"] / sides["sparse"]["ms"], "memory_ratio": memory or None,
    }  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--implementation", default="auto", choices=("auto", "reference", "triton", "hopper"))
    parser.add_argument("--model", action="store_true", help="also training steps of a whole model")
    parser.add_argument("--only-model", action="store_true", help="nothing but these; other results in the file stay")
    parser.add_argument("--grids", nargs="+", type=parse_grid, metavar="TxHxW", help="of the model's tokens")
    parser.add_argument("--layers", type=int, help="of the model; 30 on a GPU unless given")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and repeats")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> None:
    args, console = arguments(), Console(width=None if sys.stdout.isatty() else 150)
    setup, facts, path = prepare("training", args, console)
    before = json.loads(path.read_text()) if path.exists() and args.only_model else {}
    facts |= {name: before.get(name, []) for name in ("checks", "rows", "models")}

    def save() -> None:  # after every step: a run cut short leaves what it had
        path.write_text(json.dumps(facts, indent=1) + "\n")

    if not args.only_model:
        facts["checks"] = run_checks(setup)
        save()
        for case in timed_cases(setup.on_gpu, args.quick):
            found = setup.guarded(case.label, lambda case=case: {"rows": run_case(case, setup)})
            facts["rows"] += found.get("rows", [case.facts() | found])
            release(setup.device)
            save()
    if args.model or args.only_model or not setup.on_gpu:
        layers = args.layers or (30 if setup.on_gpu else 3)
        for grid in args.grids or model_grids(setup.on_gpu, args.quick):
            row = setup.guarded(f"model at {shape(grid)}", lambda grid=grid: measure_model(grid, layers, setup))
            others = [other for other in facts["models"] if tuple(other["grid"]) != grid]
            facts["models"] = [*others, {"grid": grid} | row]
            torch.compiler.reset()
            release(setup.device)
            save()
        console.print(model_table(facts["models"]))
    setup.guarded("plot", lambda: plot(facts, path.with_suffix(".png")))
    console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    if not all(row["held"] for row in facts["checks"]):
        raise SystemExit("FAILED: not all gradients agree with the reference, see the first table")


if __name__ == "__main__":
    main()
