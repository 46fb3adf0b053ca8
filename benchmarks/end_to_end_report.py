"""How benchmarks/end_to_end.py shows what it measured: times of whole videos by arithmetic, tables and the plot."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from attention_report import empty_table, shape
from end_to_end_measure import GROUPS
from rich.table import Table

from vmoba_compile import VMoBAConfig

STEPS = 50  # of one video
Row = dict[str, Any]
Found = dict[str, dict[str, Row]]  # by mode, then by side, of one case


def by_case(rows: list[Row]) -> dict[str, Found]:
    """Rows that have a time."""
    found: dict[str, Found] = {}
    for row in rows:
        if "ms" in row:
            found.setdefault(row["case"], {}).setdefault(row["mode"], {})[row["side"]] = row
    return found


def difference(dense: list[float], sparse: list[float]) -> float:
    """Of outputs, relative to the dense one, over the values that rows keep."""
    return math.dist(dense, sparse) / math.hypot(*dense)


def summary(dense: Row, sparse: Row) -> Row:
    """One case: a forward, a denoising step, and videos with the first steps dense and with none."""
    first = VMoBAConfig().dense_step_count(STEPS)
    step = {side: row["forwards"] * row["ms"] / 1e3 for side, row in (("dense", dense), ("sparse", sparse))}
    videos = {
        "dense_s": STEPS * step["dense"],
        "first_dense_s": first * step["dense"] + (STEPS - first) * step["sparse"],
        "sparse_s": STEPS * step["sparse"],
    }
    return {
        "case": dense["case"], "mode": dense["mode"], "ratio": dense["ms"] / sparse["ms"], "step_s": step,
        "steps": STEPS, "dense_steps": first, "video": videos,
        "video_ratio": videos["dense_s"] / videos["first_dense_s"],
        "outputs_differ": difference(dense["output"], sparse["output"]),
    }  # fmt: skip


def summaries(rows: list[Row]) -> list[Row]:
    return [
        summary(sides["dense"], sides["sparse"])
        for found in by_case(rows).values()
        for sides in found.values()
        if {"dense", "sparse"} <= sides.keys()
    ]


def gigabytes(row: Row) -> str:
    return "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.1f}"


def forward_table(rows: list[Row]) -> Table:
    table = empty_table(
        "one forward, compiled", "case", "batch x tokens", "compiled", "dense ms", "sparse ms", "ratio", "density",
        "peak GiB, dense", "sparse", "outputs differ",
    )  # fmt: skip
    for facts in summaries(rows):
        found = by_case(rows)[facts["case"]]
        dense, sparse = (found[facts["mode"]][side] for side in ("dense", "sparse"))
        density = found.get("whole", {}).get("sparse", {}).get("density")
        table.add_row(
            f"{facts['case']} {shape(dense['grid'])}", f"{dense['batch']} x {dense['tokens']:,}", facts["mode"],
            f"{dense['ms']:.0f}", f"{sparse['ms']:.0f}", f"{facts['ratio']:.2f}x",
            "-" if density is None else f"{density:.3f}", gigabytes(dense), gigabytes(sparse),
            f"{facts['outputs_differ']:.1%}",
        )  # fmt: skip
    masked = [
        f"{name}, dense attention with its mask: {sides['dense-masked']['ms']:.0f} ms"
        for name, found in by_case(rows).items()
        for sides in found.values()
        if "dense-masked" in sides
    ]
    table.caption = "\n".join(masked) or None
    return table


def video_table(rows: list[Row]) -> Table:
    """By arithmetic from the forwards; the text encoder and the decoder are not in it."""
    first = VMoBAConfig().dense_step_count(STEPS)
    table = empty_table(
        f"a video of {STEPS} steps by arithmetic, the transformer alone", "case", "a step", "dense s",
        f"{first} steps dense s", "ratio", "all sparse s (trained)", "ratio",
    )  # fmt: skip
    for facts in summaries(rows):
        if facts["mode"] != "whole":
            continue
        row, video = by_case(rows)[facts["case"]]["whole"]["dense"], facts["video"]
        table.add_row(
            facts["case"], row["guidance"], f"{video['dense_s']:.1f}", f"{video['first_dense_s']:.1f}",
            f"{facts['video_ratio']:.2f}x", f"{video['sparse_s']:.1f}", f"{facts['ratio']:.2f}x",
        )  # fmt: skip
    return table


def compile_table(rows: list[Row]) -> Table:
    table = empty_table(
        "compile time: the first call, no kernel compiled before, less a later one", "case", "side", "compiled",
        "attentions", "graphs", "processes at a time", "compile s", "ms a forward",
    )  # fmt: skip
    for name, found in by_case(rows).items():
        for mode, sides in found.items():
            for side, row in sides.items():
                table.add_row(
                    name, side, mode, str(row["attentions"]), str(row["graphs"]), str(row["jobs"]),
                    f"{row['compile_s']:.1f}", f"{row['ms']:.0f}",
                )  # fmt: skip
    return table


def profile_table(rows: list[Row]) -> Table:
    """Shares of the kernels' time in one forward."""
    table = empty_table(
        "where a forward's time goes", "case", "side", "kernels ms", *(f"{group} %" for group in GROUPS)
    )
    for name, found in by_case(rows).items():
        for side, row in found.get("whole", {}).items():
            total = sum(row["groups_ms"].values())
            shares = (f"{100 * row['groups_ms'][group] / total:.1f}" for group in GROUPS)
            table.add_row(name, side, f"{total:.0f}", *shares)
    return table


def kernel_tables(rows: list[Row], count: int = 10) -> list[Table]:
    """The longest kernels of each sparse forward."""
    from end_to_end_measure import group_of

    tables = []
    for name, found in by_case(rows).items():
        row = found.get("whole", {}).get("sparse")
        if row:
            table = empty_table(f"{name}, sparse: the longest kernels", "kernel", "group", "ms", "%")
            total = sum(row["groups_ms"].values())
            for kernel, spent in list(row["kernels_ms"].items())[:count]:
                table.add_row(kernel[:80], group_of(kernel), f"{spent:.1f}", f"{100 * spent / total:.1f}")
            tables.append(table)
    return tables


def plot(facts: dict, path: Path) -> None:
    """A forward's time by group of kernels, dense beside sparse, and how many times as fast forwards and videos are."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = {name: found["whole"] for name, found in by_case(facts["rows"]).items() if "whole" in found}
    whole = [found for found in facts["cases"] if found["mode"] == "whole"]
    figure, (times, ratios) = plt.subplots(1, 2, figsize=(13, 4.5), layout="constrained")
    for place, sides in enumerate(cases.values()):
        for side, shift in (("dense", -0.2), ("sparse", 0.2)):
            if side not in sides:
                continue
            row, below = sides[side], 0.0
            total = sum(row["groups_ms"].values())
            for number, group in enumerate(GROUPS):
                height = row["ms"] / 1e3 * row["groups_ms"][group] / total
                label = group if (place, side) == (0, next(iter(sides))) else None
                times.bar(place + shift, height, 0.36, bottom=below, color=f"C{number}", label=label)
                below += height
            times.text(place + shift, below, f"{side}\n{below:.2f}", ha="center", va="bottom", fontsize=6)
    times.set_xticks(range(len(cases)), [name.replace("-", "\n") for name in cases], fontsize=6)
    times.set(ylabel="seconds", title="one forward, by kernels")
    times.margins(y=0.12)
    times.legend(fontsize=6)
    for shift, key, label in (
        (-0.2, "ratio", "a forward, and a video with every step sparse"),
        (0.2, "video_ratio", "a video with the first 25 % of the steps dense"),
    ):
        bars = ratios.bar([i + shift for i in range(len(whole))], [found[key] for found in whole], 0.36, label=label)
        ratios.bar_label(bars, fmt="%.2f", fontsize=7)
    ratios.set_xticks(range(len(whole)), [found["case"].replace("-", "\n") for found in whole], fontsize=6)
    ratios.axhline(1, color="grey", linewidth=1)
    ratios.set(title="speed against dense")
    ratios.margins(y=0.2)
    ratios.legend(fontsize=7)
    figure.suptitle(facts["title"], fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)
