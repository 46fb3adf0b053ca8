"""The package and the oracle against what the released VMoBA code computed: selections, outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import oracle
import pytest
import torch
from kernel_cases import relative
from vmoba_compile.kernels import attention, select
from vmoba_compile.kernels.partition import box_of

FILES = sorted((Path(__file__).parents[1] / "golden").glob("*.npz"))


class Golden(NamedTuple):
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    selected: torch.Tensor
    block_of: torch.Tensor
    arguments: dict[str, Any]


@pytest.fixture(scope="module", params=FILES, ids=lambda path: path.stem)
def golden(request) -> Golden:
    with np.load(request.param) as file:
        meta = json.loads(str(file["meta"]))
        q, k, v, out = (torch.from_numpy(file[name]).transpose(0, 1)[None] for name in ("q", "k", "v", "out"))
        bits = np.unpackbits(file["selected"], axis=-1, count=meta["n_blocks"])
        block_of = torch.from_numpy(file["block_of"])
    arguments = {
        "grid": tuple(meta["grid"]), "block": tuple(meta["block"]), "pool": meta["pool"], "mode": meta["mode"],
        "threshold": meta["threshold"], "topk": meta["topk"] if meta["mode"] == "topk" else None,
    }  # fmt: skip
    return Golden(q, k, v, out, torch.from_numpy(bits).bool()[None], block_of, arguments)


def test_every_setting_is_there():
    assert len(FILES) == 21


def test_partition(golden):
    assert torch.equal(box_of(golden.arguments["grid"], golden.arguments["block"]), golden.block_of.long())


@pytest.mark.parametrize("choose", [lambda *a, **kw: select(*a, **kw).mask(), oracle.select], ids=["package", "oracle"])
def test_selection(golden, choose):
    assert torch.equal(choose(golden.q, golden.k, **golden.arguments), golden.selected)


@pytest.mark.parametrize("attend", [attention, oracle.attention], ids=["package", "oracle"])
def test_output(golden, attend):
    out = attend(golden.q, golden.k, golden.v, **golden.arguments)
    assert out.dtype == torch.float32
    assert relative(out, golden.out) < 1e-5
    assert (out - golden.out).abs().max() < 5e-6
