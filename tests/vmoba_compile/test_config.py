"""The configuration: checked, frozen, and the same after JSON and pickle. Blocks: the known good sizes, sane elsewhere."""

from __future__ import annotations

import dataclasses
import json
import pickle
from math import ceil, prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vmoba_compile import VMoBAConfig
from vmoba_compile.blocks import SCHEMES, default_block

CONFIGS = {
    "default": VMoBAConfig(),
    "topk": VMoBAConfig(mode="topk", topk=3, pool="query_head"),
    "blocks": VMoBAConfig(blocks={"1d": (3, None, None), "3d": {"count": (3, 6, 4)}}),
    "tile": VMoBAConfig(granularity="tile"),
    "dense": VMoBAConfig(dense_steps=5, dense_layers=[3, 0], min_tokens=1000),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_round_trips(config):
    assert VMoBAConfig.from_json(config.to_json()) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert hash(VMoBAConfig.from_dict(json.loads(config.to_json()))) == hash(config)


def test_frozen():
    config = VMoBAConfig(blocks={"1d": (3, None, None)})
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.threshold = 0.5
    with pytest.raises(TypeError):
        config.blocks["2d"] = (1, 1, 1)


def test_schemes_cycle():
    assert [VMoBAConfig().block_for(layer, (21, 30, 52))[0] for layer in range(5)] == ["1d", "2d", "3d", "1d", "2d"]


def test_blocks_by_size_and_count():
    config = VMoBAConfig(blocks={"1d": (3, None, None), "3d": {"count": (3, 6, None)}})
    assert config.block_for(0, (21, 30, 52)) == ("1d", (3, None, None))
    assert config.block_for(1, (21, 30, 52)) == ("2d", (None, 5, 13)), "left out: the default"
    assert config.block_for(2, (20, 31, 52)) == ("3d", (7, 6, None))


KNOWN_GOOD = {
    (21, 30, 52): [(3, None, None), (None, 5, 13), (7, 5, 13)],
    (21, 45, 80): [(3, None, None), (None, 9, 10), (7, 15, 20)],
    (24, 36, 64): [(3, None, None), (None, 6, 8), (8, 12, 8)],
}


@pytest.mark.parametrize("grid", KNOWN_GOOD, ids=lambda grid: "x".join(map(str, grid)))
def test_known_good_blocks(grid):
    assert [default_block(scheme, grid) for scheme in SCHEMES] == KNOWN_GOOD[grid]


@given(st.tuples(st.integers(12, 40), st.integers(16, 68), st.integers(16, 120)))
def test_default_blocks_have_the_papers_counts(grid):
    counts = [
        prod(ceil(extent / (step or extent)) for extent, step in zip(grid, default_block(scheme, grid), strict=True))
        for scheme in SCHEMES
    ]
    assert 4 <= counts[0] <= 14 and 20 <= counts[1] <= 64 and 27 <= counts[2] <= 96


@given(st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12)))
def test_default_blocks_fit_any_grid(grid):
    for scheme in SCHEMES:
        for extent, step in zip(grid, default_block(scheme, grid), strict=True):
            assert step is None or 1 <= step <= max(extent, 3)


@pytest.mark.parametrize(
    ("dense_steps", "steps", "expected"), [(0.25, 50, 12), (0.25, 4, 1), (0, 50, 0), (3, 2, 2), (1.0, 7, 7)]
)
def test_dense_step_count(dense_steps, steps, expected):
    assert VMoBAConfig(dense_steps=dense_steps).dense_step_count(steps) == expected


def test_least_tokens_as_given():
    for device in ("cpu", "cuda", "meta"):
        config = VMoBAConfig(min_tokens=25)
        assert [config.least_tokens(torch.device(device), training) for training in (False, True)] == [25, 25]
    assert VMoBAConfig(min_tokens=0).least_tokens(torch.device("cpu"), True) == 0


def test_least_tokens_of_the_device(tmp_path, monkeypatch):
    """The figure stays out of the configuration itself, which goes from one machine to another."""
    path = tmp_path / "calibration.json"
    monkeypatch.setenv("VMOBA_COMPILE_CALIBRATION", str(path))
    config = VMoBAConfig()
    assert config.least_tokens(torch.device("meta"), False) == 8192
    assert config.least_tokens(torch.device("cpu"), False) == 7480
    path.write_text(json.dumps({"version": 1, "devices": {"cpu": {"forward": 100, "training": 200}}}))
    assert [config.least_tokens(torch.device("cpu"), training) for training in (False, True)] == [100, 200]
    assert config.to_dict()["min_tokens"] == "auto"
