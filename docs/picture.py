"""Draw docs/picture.png: the three partitions of a video grid, and what one query attends to.

python docs/picture.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from vmoba_compile.kernels.partition import box_of

import vmoba_compile

GRID = (6, 6, 8)
BLOCKS = {
    "layer 0: 1D, temporal": (2, 6, 8),
    "layer 1: 2D, spatial": (6, 3, 4),
    "layer 2: 3D, spatio-temporal": (3, 3, 4),
}
QUERY = (1, 1, 0)


def draw(axes, colours: np.ndarray, shown: np.ndarray, title: str) -> None:
    """Tokens as voxels: frames run to the right, columns to the back, rows upwards."""
    axes.voxels(
        shown.transpose(0, 2, 1)[:, :, ::-1],
        facecolors=colours.transpose(0, 2, 1, 3)[:, :, ::-1],
        edgecolor=(0, 0, 0, 0.15),
        linewidth=0.3,
    )
    axes.set_title(title, fontsize=10, y=0.94)
    axes.set_box_aspect((6, 8, 6))
    axes.set_axis_off()
    axes.view_init(22, -55)


def main() -> None:
    torch.manual_seed(1)
    fields = torch.randn(2, 16, 3, 3, 4)
    q, k = torch.nn.functional.interpolate(fields, GRID, mode="trilinear").flatten(2).mT[:, None, None]
    figure, places = plt.subplots(1, 4, figsize=(13, 3.4), subplot_kw={"projection": "3d"}, layout="constrained")
    palette = plt.get_cmap("tab10")
    for axes, (title, block) in zip(places, BLOCKS.items(), strict=False):
        boxes = box_of(GRID, block).view(GRID).numpy()
        draw(axes, palette(boxes % 10), np.ones(GRID, bool), title)
    block = (2, 3, 2)
    selection = vmoba_compile.select(q, k, GRID, block=block)
    boxes = box_of(GRID, block).view(GRID)
    query = (QUERY[0] * GRID[1] + QUERY[1]) * GRID[2] + QUERY[2]
    taken = selection.mask()[0, 0, query][boxes].numpy()
    colours = np.where(taken[..., None], (0.12, 0.47, 0.71, 0.9), (0.6, 0.6, 0.6, 0.06))
    colours[QUERY] = (0.84, 0.15, 0.16, 1)
    kept = taken.mean()
    draw(places[3], colours, np.ones(GRID, bool), f"one query (red) attends to {kept:.0%} of the tokens")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
