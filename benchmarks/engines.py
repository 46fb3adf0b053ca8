"""Wan in TensorRT engines with VMoBA between them: agreement and time beside Inductor's and beside dense engines.

    python benchmarks/engines.py                              # 4 layers of Wan 2.1 1.3B on 21x30x52 tokens
    python benchmarks/engines.py --layers 1 --grid 5 30 52    # a first try
    python benchmarks/engines.py --parts onnx                 # only the engine of an ONNX file, on a small grid

Needs a GPU; Torch-TensorRT for the parts "vmoba" and "dense", TensorRT or TensorRT-RTX for "onnx". Weights are random.
Prints tables and writes JSON to benchmarks/results/; exits with 1 where a part failed or disagrees. (A script by the
name of a library would be imported in its place: hence this one's.)
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parent))  # python -P leaves it off

from attention_measure import interleaved, reason, release
from attention_report import empty_table, shape
from rich.console import Console
from torch import Tensor, nn

import vmoba_compile
from vmoba_compile import VMoBAConfig
from vmoba_compile.deploy.engine import build_engine
from vmoba_compile.deploy.engine_runner import EngineRunner
from vmoba_compile.deploy.onnx import export_onnx
from vmoba_compile.deploy.program import capture, relative_error
from vmoba_compile.deploy.torch_tensorrt import TorchTensorRT, export_torch_tensorrt
from vmoba_compile.zoo import preset

RESULTS = Path(__file__).parent / "results"
PARTS = ("vmoba", "dense", "onnx")
TOLERANCE = 1e-2
DENSE = VMoBAConfig(min_tokens=10**9)
LIBRARIES = ("torch-tensorrt", "torch-tensorrt-rtx", "tensorrt", "tensorrt_rtx", "triton", "onnx", "diffusers")
LOAD = """
import sys, time, torch
import diffusers.models.modeling_outputs  # the class of what the model returns
from vmoba_compile.deploy.torch_tensorrt import load_torch_tensorrt
inputs, wanted = torch.load(sys.argv[2])
start = time.perf_counter()
run = load_torch_tensorrt(sys.argv[1])
seconds = time.perf_counter() - start
with torch.no_grad():
    got = run(**inputs).sample
print("error", ((got.double() - wanted.double()).norm() / wanted.double().norm()).item(), seconds)
"""


def first(output: Any) -> Tensor:
    return torch.utils._pytree.tree_leaves(output)[0]


def used_bytes() -> int:
    """Of the GPU, by any library."""
    free, total = torch.cuda.mem_get_info()
    return total - free


def compiled(model: nn.Module, inputs: dict, config: VMoBAConfig | None) -> TorchTensorRT:
    return export_torch_tensorrt(model, (), inputs, config=config)


def facts_of(made: TorchTensorRT, held: int) -> dict[str, Any]:
    return {
        "library": made.library, "engines": made.engines, "seconds": made.seconds, "bytes_on_gpu": held,
        "in_pytorch": [str(left) for left in made.in_pytorch],
    }  # fmt: skip


def measure_models(model: nn.Module, inputs: dict, parts: list[str], console: Console) -> dict[str, Any]:
    """Engines with VMoBA between them, and dense ones, each beside Inductor's; all are timed in turns."""
    rows: dict[str, Any] = {}
    runs: dict[str, Callable[[], object]] = {}

    def add(name: str, inductor: nn.Module, config: VMoBAConfig | None) -> None:
        wanted = first(inductor(**inputs))
        runs[f"{name}, Inductor"] = lambda: inductor(**inputs)
        before = used_bytes()
        made = compiled(model, inputs, config)
        got = first(made(**inputs))
        row = facts_of(made, used_bytes() - before) | {"error": relative_error(got, wanted)}
        console.print(str(made), soft_wrap=True, highlight=False)
        rows[name] = row
        runs[f"{name}, engines"] = lambda: made(**inputs)
        if name == "vmoba":
            row |= reloaded(made, inputs, wanted)

    if "vmoba" in parts:
        guarded(rows, "vmoba", console, lambda: add("vmoba", vmoba_compile.optimize(model), None))
    if "dense" in parts:
        guarded(rows, "dense", console, lambda: add("dense", torch.compile(model), DENSE))
    if runs:
        times, repeats = interleaved(runs, "cuda", budget_ms=6000, least=5, most=40)
        rows["milliseconds"], rows["repeats"] = times, repeats
    return rows


def reloaded(made: TorchTensorRT, inputs: dict, wanted: Tensor) -> dict[str, Any]:
    """Saved, loaded in a new process, and run there on the same inputs."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        path = made.save(Path(folder) / "model.pt2")
        seconds = time.perf_counter() - start
        torch.save((inputs, wanted), Path(folder) / "case.pt")
        done = subprocess.run(
            [sys.executable, "-P", "-W", "ignore", "-c", LOAD, str(path), str(Path(folder) / "case.pt")],
            capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
        told = re.search(r"^error (\S+) (\S+)$", done.stdout, re.MULTILINE)
        if not told:
            raise RuntimeError(f"a new process cannot run what was saved: {(done.stdout + done.stderr)[-2000:]}")
        return {
            "saved_bytes": path.stat().st_size, "save_seconds": seconds, "error_in_new_process": float(told[1]),
            "load_seconds": float(told[2]),
        }  # fmt: skip


def measure_onnx(args: argparse.Namespace, dtype: torch.dtype, console: Console) -> dict[str, Any]:
    """An ONNX file with the portable body as an engine, against the rewritten program."""
    config, grid = VMoBAConfig(min_tokens=0), tuple(args.onnx_grid)
    model, inputs = preset(args.model).build(grid=grid, device="cuda", dtype=dtype, num_layers=args.onnx_layers)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        exported = export_onnx(model, (), inputs, Path(folder) / "model.onnx", config=config, grid=grid, verify=False)
        console.print(str(exported), soft_wrap=True, highlight=False)
        engine = build_engine(exported.path)
        console.print(str(engine), soft_wrap=True, highlight=False)
        start = time.perf_counter()
        runner = EngineRunner(engine)
        got = first(list(runner(**inputs).values()))
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        wanted = first(capture(model, (), inputs, config=config, grid=grid).program.module()(**inputs))
        times, _ = interleaved({"engine": lambda: runner(**inputs)}, "cuda", budget_ms=1000, least=3, most=20)
        return {
            "grid": grid, "layers": args.onnx_layers, "error": relative_error(got, wanted), "runtime": engine.runtime,
            "version": engine.version, "bytes": engine.bytes, "build_seconds": engine.seconds,
            "load_and_first_run_seconds": seconds, "milliseconds": times["engine"], "portable": list(engine.portable),
        }  # fmt: skip


def guarded(rows: dict[str, Any], name: str, console: Console, work: Callable[[], Any]) -> None:
    """A part that fails is reported and does not lose the others."""
    try:
        result = work()
        if result is not None:
            rows[name] = result
    except Exception as error:
        rows[name] = rows.get(name, {}) | {"failed": reason(error)}
        console.print(f"[red]{name} failed[/red]")
        console.print_exception(max_frames=12)
    finally:
        release("cuda")


def show(rows: dict[str, Any], console: Console) -> None:
    times = rows.get("milliseconds", {})
    table = empty_table(
        "engines", "part", "engines", "build s", "error", "after loading", "engines ms", "Inductor ms", "ratio"
    )
    for name in ("vmoba", "dense"):
        row = rows.get(name)
        if row is None or "error" not in row:
            continue
        own, inductor = times.get(f"{name}, engines"), times.get(f"{name}, Inductor")
        again = row.get("error_in_new_process")
        table.add_row(
            name, str(row["engines"]), f"{row['seconds']:.1f}", f"{row['error']:.1e}",
            "-" if again is None else f"{again:.1e}",
            *(f"{x:.2f}" if x else "-" for x in (own, inductor)), f"{inductor / own:.2f}x" if own and inductor else "-",
        )  # fmt: skip
    sparse, dense = times.get("vmoba, engines"), times.get("dense, engines")
    if sparse and dense:
        table.caption = f"engines with VMoBA between them: {dense / sparse:.2f}x as fast as dense engines"
    if table.row_count:
        console.print(table)
    row = rows.get("onnx")
    if row and "error" in row:
        table = empty_table("ONNX file with the portable body", "grid", "runtime", "error", "build s", "MiB", "ms")
        table.add_row(
            shape(row["grid"]), f"{row['runtime']} {row['version']}", f"{row['error']:.1e}",
            f"{row['build_seconds']:.1f}", f"{row['bytes'] / 2**20:.1f}", f"{row['milliseconds']:.2f}",
        )  # fmt: skip
        console.print(table)


def installed() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="wan2.1-1.3b", help="a named model, one of Wan's")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--grid", type=int, nargs=3, default=(21, 30, 52))
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="float16")
    parser.add_argument("--onnx-layers", type=int, default=2)
    parser.add_argument("--onnx-grid", type=int, nargs=3, default=(4, 12, 16))
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


@torch.no_grad()
def main() -> int:
    args, console = arguments(), Console(width=None if sys.stdout.isatty() else 150)
    if not torch.cuda.is_available():
        raise SystemExit("engines run on a GPU, and torch sees none")
    dtype, device = getattr(torch, args.dtype), torch.cuda.get_device_name()
    facts: dict[str, Any] = {
        "title": f"{device}, torch {torch.__version__}", "device": device, "machine": platform.machine(),
        "torch": torch.__version__, "cuda": torch.version.cuda, "libraries": installed(), "model": args.model,
        "layers": args.layers, "grid": list(args.grid), "dtype": args.dtype,
    }  # fmt: skip
    console.print(f"{facts['title']}, {facts['libraries']}", highlight=False)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / ("engines-" + re.sub(r"\W+", "_", device.lower()) + ".json")
    rows: dict[str, Any] = {}
    if {"vmoba", "dense"} & set(args.parts):
        torch.manual_seed(0)
        model, inputs = preset(args.model).build(
            grid=tuple(args.grid), device="cuda", dtype=dtype, num_layers=args.layers
        )
        rows |= measure_models(model.eval(), inputs, args.parts, console)
        del model, inputs
        path.write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")  # the rest may end the process
    if "onnx" in args.parts:
        guarded(rows, "onnx", console, lambda: measure_onnx(args, dtype, console))
    path.write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")
    show(rows, console)
    console.print(f"wrote {path}", soft_wrap=True)
    parts = [row for name, row in rows.items() if name in PARTS]
    errors = [row[key] for row in parts for key in ("error", "error_in_new_process") if key in row]
    return int(any("failed" in row for row in parts) or any(not error < TOLERANCE for error in errors))


if __name__ == "__main__":
    sys.exit(main())
