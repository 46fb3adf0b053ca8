"""How benchmarks/several_gpus.py shows what it measured: tables and the plot."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from attention_report import empty_table, shape
from rich.table import Table

Row = dict[str, Any]


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def efficiency_table(facts: Row) -> Table:
    title = (
        f"one forward of {facts['model']}, {facts['layers']} layers, {shape(facts['grid'])} tokens, diffusers' Ulysses"
    )
    table = empty_table(
        title, "GPUs", "side", "ms", "efficiency", "communication", "waiting", "differs from one", "to dense", "imbalance",
        "balanced",
    )  # fmt: skip
    for found in facts["gpus"]:
        for side in ("dense", "sparse"):
            if side not in found:
                continue
            row, sparse = found[side], side == "sparse"
            uneven = [
                statistics.fmean(found[name]) if sparse and name in found else None
                for name in ("imbalance", "balanced")
            ]
            table.add_row(
                str(found["gpus"]), side, f"{row['ms']:.1f}", number(row["efficiency"], ".0%"),
                f"{row['communication']:.1%}", f"{row['waiting']:.1%}", number(row["differs"], ".1e"),
                number(found.get("ratio") if sparse else None, ".2f") + ("x" if sparse and "ratio" in found else ""),
                *(number(value, ".3f") for value in uneven),
            )  # fmt: skip
    return table


def group_table(rows: list[Row]) -> Table:
    """Mean milliseconds of each group of kernels, over the processes."""
    measured = [row for row in rows if "ms" in row]
    groups = list(measured[0]["groups_ms"]) if measured else []
    table = empty_table("where a forward's time goes, ms of kernels", "GPUs", "side", *groups, "peak GiB")
    for row in measured:
        peak = None if row["peak_bytes"] is None else row["peak_bytes"] / 2**30
        times = (f"{row['groups_ms'][group]:.1f}" for group in groups)
        table.add_row(str(row["gpus"]), row["side"], *times, number(peak, ".1f"))
    return table


def plot(facts: Row, path: Path) -> None:
    """Time against GPUs, with what perfect scaling would be, and how many times as fast as dense."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    figure, (times, ratios) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for side, colour in (("dense", "C0"), ("sparse", "C1")):
        points = [(found["gpus"], found[side]["ms"]) for found in facts["gpus"] if side in found]
        if not points:
            continue
        gpus, spent = zip(*points, strict=True)
        times.plot(gpus, spent, "o-", color=colour, label=side)
        times.plot(gpus, [spent[0] * gpus[0] / count for count in gpus], ":", color=colour, linewidth=1)
    times.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="ms a forward", title="dotted: perfect scaling")
    counts = sorted({found["gpus"] for found in facts["gpus"]})
    times.set_xticks(counts, [str(count) for count in counts])
    times.minorticks_off()
    times.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    times.yaxis.set_major_formatter("{x:,.0f}")
    if times.lines:
        times.legend()
    both = [found for found in facts["gpus"] if "ratio" in found]
    bars = ratios.bar([str(found["gpus"]) for found in both], [found["ratio"] for found in both], 0.5, color="C1")
    ratios.bar_label(bars, fmt="%.2f")
    ratios.axhline(1, color="grey", linewidth=1)
    ratios.set(xlabel="GPUs", title="dense time / sparse time")
    figure.suptitle(
        f"{facts['model']}, {facts['layers']} layers, {shape(facts['grid'])} tokens; {facts['title']}", fontsize=8
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)
