"""Index arithmetic against loops over the grid."""

from __future__ import annotations

from itertools import pairwise

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vmoba_compile.kernels import Geometry
from vmoba_compile.kernels.partition import box_counts, box_of, box_order

GRIDS = st.tuples(*[st.integers(1, 7)] * 3)
BLOCKS = st.tuples(*[st.integers(1, 9)] * 3)


@given(GRIDS, BLOCKS)
def test_boxes(grid, block):
    boxes = oracle.boxes(grid, block)
    order, starts = box_order(grid, block)
    assert [order[start:end].tolist() for start, end in pairwise(starts)] == boxes
    assert starts[-1] == len(order) == grid[0] * grid[1] * grid[2]
    number_of = box_of(grid, block).tolist()
    assert all(number_of[token] == box for box, tokens in enumerate(boxes) for token in tokens)
    counts = box_counts(grid, block)
    assert counts[0] * counts[1] * counts[2] == len(boxes)


@pytest.mark.parametrize(
    ("grid", "block", "counts"),
    [
        ((21, 30, 52), (3, 30, 52), (7, 1, 1)),
        ((21, 30, 52), (21, 5, 13), (1, 6, 4)),
        ((21, 30, 52), (7, 5, 13), (3, 6, 4)),
        ((21, 30, 52), (8, 7, 9), (3, 5, 6)),
        ((1, 1, 1), (9, 9, 9), (1, 1, 1)),
        ((5, 3, 2), (1, 1, 1), (5, 3, 2)),
    ],
    ids=str,
)
def test_counts(grid, block, counts):
    assert box_counts(grid, block) == counts


@given(GRIDS, BLOCKS, st.integers(0, 5), st.integers(0, 5))
def test_geometry(grid, block, prefix, suffix):
    geometry = Geometry(grid, block, prefix, suffix)
    tokens = ["condition"] * prefix + ["video"] * (grid[0] * grid[1] * grid[2]) + ["condition"] * suffix
    assert geometry.num_tokens == len(tokens)
    assert geometry.num_video == tokens.count("video") == len(tokens[geometry.video])
    assert set(tokens[geometry.video]) == {"video"}
    condition = geometry.condition_index(torch.device("cpu")).tolist()
    assert condition == [position for position, kind in enumerate(tokens) if kind == "condition"]
    assert geometry.num_condition == len(condition)
    assert geometry.num_boxes == len(oracle.boxes(grid, block))
    assert (geometry.num_words - 1) * 32 < geometry.num_boxes <= geometry.num_words * 32
