"""A package of a Wan 2.1 transformer beside the optimized model: times and errors, in Python and in C++.

    python benchmarks/package.py                    # 4 layers, 21x30x52 tokens, bfloat16, on a GPU: three minutes

The package runs in a process that never imports vmoba_compile, then in examples/package_cpp, which is built here. Prints a
table and writes JSON to benchmarks/results/. Times are medians of calls: of the models in turns, by the GPU's clock; of the
package by the host's, each call waited for.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parent))  # python -P leaves it off

from attention_measure import in_turns
from rich.console import Console
from rich.table import Table

import vmoba_compile
from vmoba_compile.__main__ import parse_grid
from vmoba_compile.deploy.package import export_package
from vmoba_compile.deploy.program import relative_error
from vmoba_compile.zoo import preset

RESULTS = Path(__file__).parent / "results"
PROGRAM = Path(__file__).parents[1] / "examples" / "package_cpp"

ALONE = """
import statistics, sys, time, torch
folder, repeats = sys.argv[1], int(sys.argv[2])
start = time.perf_counter()
model = torch._inductor.aoti_load_package(folder + "/model.pt2")
loaded = time.perf_counter() - start
inputs = torch.load(folder + "/kwargs.pt")
(output,) = model(**inputs)
torch.save(output, folder + "/python.pt")
times = []
for _ in range(repeats):
    torch.cuda.synchronize()
    start = time.perf_counter()
    model(**inputs)
    torch.cuda.synchronize()
    times.append(1e3 * (time.perf_counter() - start))
assert not any(name.startswith("vmoba") for name in sys.modules)
print(statistics.median(times), loaded, torch.cuda.max_memory_allocated())
"""


def run(*words: Any) -> str:
    """What a program prints. Raises RuntimeError with what it said where it fails."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{words[0]} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def in_cpp(folder: Path, repeats: int) -> float:
    """Build the example and run the package with it."""
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    run("cmake", "-S", PROGRAM, "-B", folder / "build", "-DCMAKE_BUILD_TYPE=Release", prefix)
    run("cmake", "--build", folder / "build")
    said = run(
        folder / "build" / "run_package", folder / "model.pt2", folder / "inputs.pt", folder / "cpp.pt", repeats
    )  # fmt: skip
    return float(re.search(r"calls: ([\d.]+) ms", said).group(1))  # type: ignore[union-attr]


@torch.no_grad()
def in_process(
    model: torch.nn.Module, inputs: dict[str, Any], layers: int, repeats: int, device: str = "cuda"
) -> tuple[dict[str, dict[str, Any]], torch.Tensor]:
    """Rows of the dense and of the optimized model, and what the latter computes."""
    dense = torch.compile(model, dynamic=False)
    fast = vmoba_compile.optimize(model, expect=layers)
    dense(**inputs)  # compiles it
    (output,) = fast(**inputs)
    torch.cuda.reset_peak_memory_stats()
    fast(**inputs)
    peak = torch.cuda.max_memory_allocated()
    runs = {"dense, torch.compile": lambda: dense(**inputs), "optimized": lambda: fast(**inputs)}
    times = in_turns(runs, device, repeats)
    rows: dict[str, dict[str, Any]] = {name: {"ms": statistics.median(times[name])} for name in runs}
    rows["optimized"]["peak_bytes"] = peak
    return rows, output


def measure(layers: int, grid: tuple[int, int, int], repeats: int, folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    model, inputs = preset("wan2.1-1.3b").build(grid=grid, device="cuda", dtype=torch.bfloat16, num_layers=layers)
    model.eval()
    inputs["return_dict"] = False
    package = export_package(model, (), inputs, folder / "model.pt2", expect=layers)
    rows, expected = in_process(model, inputs, layers, repeats)
    torch.save(inputs, folder / "kwargs.pt")
    leaves = torch.utils._pytree.tree_leaves(((), inputs))
    torch.save([x.cpu() for x in leaves if isinstance(x, torch.Tensor)], folder / "inputs.pt")
    facts = {
        "compile_s": package.seconds, "bytes": package.bytes, "kernels": package.kernels
    }  # fmt: skip
    del model
    torch.cuda.empty_cache()
    ms, loaded, peak = run(sys.executable, "-P", "-W", "ignore", "-c", ALONE, folder, repeats).split()
    error = relative_error(torch.load(folder / "python.pt").cpu(), expected.cpu())
    rows["package in Python"] = {"ms": float(ms), "load_s": float(loaded), "peak_bytes": int(peak), "error": error}
    ms = in_cpp(folder, repeats)
    rows["package in C++"] = {"ms": ms, "error": relative_error(torch.load(folder / "cpp.pt")[0], expected.cpu())}
    return {"layers": layers, "grid": grid, "package": facts, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--grid", type=parse_grid, default=(21, 30, 52), metavar="TxHxW")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args, console = parser.parse_args(), Console()
    if not torch.cuda.is_available():
        parser.error("packages with VMoBA attention are for NVIDIA GPUs, and there is none")
    with tempfile.TemporaryDirectory() as folder:
        facts = measure(args.layers, args.grid, args.repeats, Path(folder))
    table = Table("", "ms", "peak GiB", "error against optimized")
    for name, row in facts["rows"].items():
        peak = f"{row['peak_bytes'] / 2**30:.2f}" if "peak_bytes" in row else ""
        table.add_row(name, f"{row['ms']:.2f}", peak, f"{row['error']:.1e}" if "error" in row else "")
    device = torch.cuda.get_device_name()
    shape = "x".join(map(str, args.grid))
    console.print(table, f"Wan 2.1 1.3B, {args.layers} layers, {shape} tokens, bfloat16, {device}")
    made = facts["package"]
    console.print(
        f"{made['bytes'] / 2**20:.0f} MiB, compiled in {made['compile_s']:.0f} s, {len(made['kernels'])} kernels"
    )
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / ("package-" + re.sub(r"\W+", "_", device.lower()) + ".json")
    path.write_text(json.dumps({"device": device, "torch": torch.__version__} | facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
