"""How benchmarks/attention.py shows what it measured: tables and the plot."""

from __future__ import annotations

from pathlib import Path

from attention_measure import Case
from rich.table import Table

from vmoba_compile.blocks import SCHEMES

FLEX_LABEL = "flex_attention, tile-level selection of equal density (not the same rule)"


def shape(numbers: tuple[int, ...]) -> str:
    return "x".join(map(str, numbers))


def empty_table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def check_table(rows: list[dict]) -> Table:
    table = empty_table(
        "against the reference in float32", "grid", "inputs", "tokens", "heads", "scheme", "block", "relative error",
        "largest", "selection differs", "",
    )  # fmt: skip
    for row in rows:
        inputs = row["inputs"] + ", tiles" * (row["granularity"] == "tile")
        numbers = ["", "", ""]
        if "error" not in row:
            differs = f"{row['differing']} of {row['entries']}"
            numbers = [f"{row['relative_error']:.1e}", f"{row['largest_error']:.1e}", differs]
        table.add_row(
            shape(row["grid"]), inputs, f"{row['tokens']} ({row['prefix']} + {row['suffix']} condition)",
            f"{row['heads']} x {row['head_dim']}", row["scheme"], shape(row["block"]), *numbers,
            "held" if row["held"] else "[red]FAILED",
        )  # fmt: skip
    return table


def case_table(case: Case, rows: list[dict], peers: list[dict]) -> Table:
    """Sparse rows and flex_attention's of one shape; what failed has been printed before."""
    rows, peers = ([row for row in group if "error" not in row] for group in (rows, peers))
    condition = f", {case.num_condition} of them condition" if case.num_condition else ""
    table = empty_table(
        f"{case.label}: {case.num_tokens} tokens{condition}, {case.heads} heads x {case.head_dim}",
        "scheme", "block", "density", "select ms", "attention ms", "total ms", "dense ms", "ratio",
        "useful TFLOP/s (dense)", "peak GiB (of dense)", "host ms",
    )  # fmt: skip
    for row in rows:
        memory = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.2f} ({row['memory_ratio']:.2f}x)"
        table.add_row(
            f"{row['scheme']} {row['implementation']}", shape(row["block"]), f"{row['density']:.3f}",
            *(f"{row[name]:.3f}" for name in ("select_ms", "attention_ms", "total_ms", "dense_ms")),
            f"{row['ratio']:.2f}x", f"{row['useful_tflops']:.0f} ({row['dense_tflops']:.0f})", memory,
            "-" if row["host_ms"] is None else f"{row['host_ms']:.2f}",
        )  # fmt: skip
    for row in peers:
        table.add_row(
            "flex_attention *", "tiles 128x128", f"{row['density']:.3f}", "-", f"{row['attention_ms']:.3f}", "-",
            f"{row['dense_ms']:.3f}", f"{row['ratio']:.2f}x", f"{row['useful_tflops']:.0f}",
            "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.2f}", "-",
        )  # fmt: skip
    notes = [f"* {FLEX_LABEL}; without making a selection"] if peers else []
    notes += sorted({row["timing"] for row in rows + peers} - {"CUDA graph", "eager"})
    table.caption = "\n".join(notes) or None
    return table


def scaling_table(facts: dict) -> Table:
    table = empty_table(
        facts["what"], "grid", "tokens", "dense ms", *(f"{s} ms (density)" for s in SCHEMES), "mean ms", "ratio"
    )
    for row in facts["rows"]:
        if "error" not in row:
            table.add_row(
                shape(row["grid"]), str(row["tokens"]), f"{row['dense_ms']:.3f}",
                *(f"{row[s]['total_ms']:.3f} ({row[s]['density']:.2f})" for s in SCHEMES),
                f"{row['total_ms']:.3f}", f"{row['ratio']:.2f}x",
            )  # fmt: skip
    found = facts["crossover_tokens"]
    table.caption = (
        f"sparse is faster from {found:,} tokens on" if found else "sparse is not faster at the largest size"
    )
    if facts["crossover_at_smallest"]:
        table.caption += ", the smallest size measured"
    return table


def plot(facts: dict, path: Path) -> None:
    """Ratio to dense for every shape and scheme, and where there is a scaling run its times over the tokens."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in facts["rows"] if "error" not in row]
    scaling = [row for row in facts.get("scaling", {}).get("rows", []) if "error" not in row]
    widths = [1 + 0.85 * len({row["label"] for row in rows}), *([5] if scaling else [])]  # inches
    figure, axes = plt.subplots(
        1, len(widths), figsize=(sum(widths), 4.5), width_ratios=widths, layout="constrained", squeeze=False
    )
    plot_ratios(axes[0, 0], rows, "selection and attention")
    if scaling:
        _plot_scaling(axes[0, 1], scaling, facts["scaling"])
    figure.suptitle(facts["title"], fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_ratios(axes, rows: list[dict], title: str) -> None:
    labels = list(dict.fromkeys(row["label"] for row in rows))
    for place, scheme in enumerate(SCHEMES):
        mine = [row for row in rows if row["scheme"] == scheme]
        at = [labels.index(row["label"]) + (place - 1) * 0.27 for row in mine]
        bars = axes.bar(at, [row["ratio"] for row in mine], 0.25, label=scheme)
        axes.bar_label(bars, fmt="%.1f", fontsize=6)
    axes.axhline(1, color="grey", linewidth=1)
    names = [label.replace(", ", "\n").replace(" ", "\n") for label in labels]
    axes.set_xticks(range(len(labels)), names, fontsize=6)
    axes.set(ylabel="speed against dense", title=title)
    axes.margins(y=0.15)
    axes.legend(ncols=len(SCHEMES), loc="upper center")


def _plot_scaling(axes, rows: list[dict], facts: dict) -> None:
    tokens = [row["tokens"] for row in rows]
    axes.loglog(tokens, [row["dense_ms"] for row in rows], "o-", color="black", label="dense")
    axes.loglog(tokens, [row["total_ms"] for row in rows], "o-", label="sparse")
    found = facts["crossover_tokens"]
    if found:
        axes.axvline(found, color="grey", linewidth=1, label=f"faster from {found:,} tokens")
    axes.set(xlabel="tokens", ylabel="ms")
    axes.set_title(facts["what"], fontsize=9)
    axes.legend()
