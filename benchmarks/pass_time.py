"""Time of the rewrite alone against the size of the graph: HunyuanVideo of diffusers, production width and tokens.

    python benchmarks/pass_time.py              # 20, 40 and 60 layers; two minutes on two cores
    python benchmarks/pass_time.py --layers 3

Weights and inputs are on the meta device: nothing is computed. Prints a table and writes JSON to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import fx, nn
from vmoba_compile.passes import rewrite

from vmoba_compile import VMoBAConfig
from vmoba_compile.zoo import preset

RESULTS = Path(__file__).parent / "results"


class Timed:
    """A backend that times the rewrite of each graph it is given."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def __call__(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        nodes, start = len(graph.graph.nodes), time.perf_counter()
        report = rewrite(graph, VMoBAConfig())
        seconds = time.perf_counter() - start
        self.rows.append(
            {"nodes": nodes, "seconds": seconds, "attentions": len(report), "rewritten": len(report.rewritten)}
        )
        return graph.forward


def measure(layers: int) -> dict[str, Any]:
    """The row of one depth: a third of the layers has two streams, as in the released model."""
    model, inputs = build(layers)
    torch.compiler.reset()
    timed = Timed()
    with torch.no_grad():
        torch.compile(model, backend=timed, dynamic=False, fullgraph=True)(**inputs)
    (row,) = timed.rows
    return {"layers": layers} | row | {"microseconds_per_node": 1e6 * row["seconds"] / row["nodes"]}


def build(layers: int) -> tuple[nn.Module, dict[str, Any]]:
    double = layers // 3
    return preset("hunyuanvideo").build(num_layers=double, num_single_layers=layers - double)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[20, 40, 60])
    parser.add_argument("--out", type=Path, default=RESULTS)
    args, console = parser.parse_args(), Console()
    rows = [measure(layers) for layers in args.layers]
    table = Table(title="the rewrite of a HunyuanVideo graph")
    for title in ("layers", "nodes", "attentions rewritten", "seconds", "µs a node"):
        table.add_column(title, justify="right")
    for row in rows:
        done = f"{row['rewritten']} of {row['attentions']}"
        table.add_row(
            str(row["layers"]), str(row["nodes"]), done, f"{row['seconds']:.2f}", f"{row['microseconds_per_node']:.0f}"
        )
    console.print(table)
    cores = os.cpu_count()
    facts = {
        "title": "time of the rewrite", "device": f"{cores} CPU cores", "machine": platform.machine(),
        "torch": torch.__version__, "rows": rows,
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"pass_time_{cores}_cpu_cores.json"
    path.write_text(json.dumps(facts, indent=1) + "\n")
    console.print(f"wrote {path}", soft_wrap=True)


if __name__ == "__main__":
    main()
