"""From how many tokens sparse attention is faster than dense on this device: what ``min_tokens="auto"`` rests on.

``python -m vmoba_compile bench --calibrate`` finds the same for your own device, and for training; this draws the plot.

    python benchmarks/crossover.py              # a few minutes on two CPU cores

Times one attention, selection included, against ``F.scaled_dot_product_attention`` of the same tensors (cuDNN's on a
GPU, as PyTorch picks it elsewhere) for the default blocks of each scheme, on random inputs. Prints a table and writes
JSON and a plot to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as in examples/demo.py

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel

import vmoba_compile
from vmoba_compile.__main__ import parse_grid
from vmoba_compile.blocks import SCHEMES, default_block
from vmoba_compile.profit import crossover

GRIDS = [(5, 8, 14), (7, 11, 20), (9, 15, 26), (11, 20, 34), (13, 22, 40), (17, 26, 45), (21, 30, 52)]
RESULTS = Path(__file__).parent / "results"


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Least of a few runs, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def measure(grid: tuple[int, int, int], heads: int, head_dim: int, repeats: int, device: str) -> dict:
    tokens = grid[0] * grid[1] * grid[2]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v = (torch.randn(1, tokens, heads, head_dim, device=device, dtype=dtype).transpose(1, 2) for _ in range(3))
    backend = sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if device == "cuda" else nullcontext()
    with backend:
        dense = seconds(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v), repeats)
    row: dict = {"grid": grid, "tokens": tokens, "dense_s": dense}
    for scheme in SCHEMES:
        steps = zip(default_block(scheme, grid), grid, strict=True)
        block = tuple(extent if step is None else step for step, extent in steps)
        sparse = seconds(lambda block=block: vmoba_compile.attention(q, k, v, grid, block=block), repeats)
        density = float(vmoba_compile.select(q, k, grid, block=block).density().mean())
        row[scheme] = {"block": block, "seconds": sparse, "density": density, "speedup": dense / sparse}
    row["ratio"] = len(SCHEMES) * dense / sum(row[scheme]["seconds"] for scheme in SCHEMES)
    return row


def plot(rows: list[dict], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for scheme in SCHEMES:
        axes.plot([row["tokens"] for row in rows], [row[scheme]["speedup"] for row in rows], "o-", label=scheme)
    axes.axhline(1, color="grey", linewidth=1)
    axes.set(xscale="log", xlabel="tokens", ylabel="speed against dense", title=title)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grids", type=parse_grid, nargs="+", default=GRIDS, metavar="TxHxW")
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU cores"
    torch.manual_seed(0)
    with torch.no_grad():
        rows = [
            measure(grid, args.heads, args.head_dim, args.repeats, device)
            for grid in track(args.grids, description="grids")
        ]
    table = Table("grid", "tokens", "dense ms", *(f"{scheme} ms (density)" for scheme in SCHEMES), "mean speed")
    for row in rows:
        cells = [f"{row[s]['seconds'] * 1e3:.1f} ({row[s]['density']:.2f})" for s in SCHEMES]
        grid, dense_ms = "x".join(map(str, row["grid"])), f"{row['dense_s'] * 1e3:.1f}"
        table.add_row(grid, str(row["tokens"]), dense_ms, *cells, f"{row['ratio']:.2f}x")
    found = crossover(rows)
    title = f"{name}, torch {torch.__version__}, {args.heads} heads x {args.head_dim}"
    console = Console()
    console.print(table, title)
    console.print("sparse is faster from", f"{found} tokens on" if found else "none of these sizes on")
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / ("crossover_" + re.sub(r"\W+", "_", name.lower()))
    facts = {
        "device": name, "machine": platform.machine(), "torch": torch.__version__, "heads": args.heads,
        "head_dim": args.head_dim, "implementation": "reference", "crossover_tokens": found, "rows": rows,
    }  # fmt: skip
    path.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
    plot(rows, title, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
