"""How benchmarks/training.py shows what it measured: tables and the plot."""

from __future__ import annotations

from pathlib import Path

from attention_measure import Case
from attention_report import empty_table, plot_ratios, shape
from rich.table import Table


def check_table(rows: list[dict]) -> Table:
    found = empty_table(
        "gradients against the reference in float32, relative error", "shape", "scheme", "dq", "dk", "dv", ""
    )
    for row in rows:
        errors = [f"{error:.1e}" for error in row.get("relative_errors", [])] or ["", "", ""]
        found.add_row(
            f"{row['label']} {shape(row['grid'])}", row["scheme"], *errors, "held" if row["held"] else "[red]FAILED"
        )
    return found


def operator_table(case: Case, rows: list[dict]) -> Table:
    """Forward and backward of one shape; what failed has been printed before."""
    title = f"{case.label}: {case.num_tokens} tokens, {case.heads} heads x {case.head_dim}, forward and backward"
    found = empty_table(
        title, "scheme", "block", "density", "sparse ms", "dense ms", "ratio", "peak GiB (of dense)", "host ms"
    )
    for row in rows:
        if "error" not in row:
            memory = (
                "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.2f} ({row['memory_ratio']:.2f}x)"
            )
            found.add_row(
                f"{row['scheme']} {row['implementation']}", shape(row["block"]), f"{row['density']:.3f}",
                f"{row['ms']:.3f}", f"{row['dense_ms']:.3f}", f"{row['ratio']:.2f}x", memory,
                "-" if row["host_ms"] is None else f"{row['host_ms']:.2f}",
            )  # fmt: skip
    return found


def model_table(rows: list[dict]) -> Table:
    found = empty_table(
        "training step of a whole model", "model", "grid", "layers", "density", "dense ms", "sparse ms", "ratio",
        "peak GiB, dense", "peak GiB, sparse",
    )  # fmt: skip
    for row in rows:
        if "error" not in row:
            peaks = [row[side]["peak_bytes"] for side in ("dense", "sparse")]
            found.add_row(
                row["model"], shape(row["grid"]), str(row["layers"]), f"{row['density']:.3f}",
                f"{row['dense']['ms']:.0f}", f"{row['sparse']['ms']:.0f}", f"{row['ratio']:.2f}x",
                *("-" if peak is None else f"{peak / 2**30:.1f}" for peak in peaks),
            )  # fmt: skip
    return found


def plot(facts: dict, path: Path) -> None:
    """Ratio to dense for every shape and scheme, and for whole training steps where they were measured."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in facts["rows"] if "error" not in row and row["implementation"] == facts["implementation"]]
    models = [row for row in facts["models"] if "error" not in row]
    widths = [1 + 0.85 * len({row["label"] for row in rows}), *([1 + 0.85 * len(models)] if models else [])]  # inches
    figure, axes = plt.subplots(
        1, len(widths), figsize=(max(6, sum(widths)), 4.5), width_ratios=widths, layout="constrained", squeeze=False
    )
    plot_ratios(axes[0, 0], rows, "forward and backward of one attention")
    if models:
        bars = axes[0, 1].bar([shape(row["grid"]) for row in models], [row["ratio"] for row in models], 0.4, color="C4")
        axes[0, 1].bar_label(bars, fmt="%.2f")
        axes[0, 1].axhline(1, color="grey", linewidth=1)
        axes[0, 1].set_title(f"training step, {models[0]['model']}", fontsize=9)
    figure.suptitle(facts["title"], fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)
