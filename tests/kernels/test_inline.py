"""Operators that a compiler sees through: traced launches are the ordinary ones, and compute the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import DEVICE, Case, mask_or_empty

pytest.importorskip("triton")
import interpreter
from vmoba_compile.kernels import attend, attend_lists, attend_tiles, inline, turns

SCRIPT = Path(__file__).parents[1] / "support" / "trace_inline.py"
CASE = Case(grid=(2, 3, 4), block=(1, 2, 3), prefix=1, suffix=2, heads=2, kv_heads=1, head_dim=16)
CASES = {
    **{pool: CASE.but(pool=pool) for pool in ("head_global", "overall", "block", "query_head")},
    "topk": CASE.but(mode="topk", topk=2), "own_box": CASE.but(mode="topk", topk=1),
    "everything": CASE.but(threshold=1.0), "masked": CASE.but(masked="tokens"),
    "tile": CASE.but(tile=64), "ones": CASE.but(heads=1, batch=2, block=(1, 1, 1), suffix=0, head_dim=40),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def cured():
    if DEVICE == "cpu":
        interpreter.install()


def inputs(case: Case, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
    tensors = case.tensors(dtype)
    return tuple(x.to(DEVICE) for x in (*tensors[:3], mask_or_empty(tensors)))


def run(case: Case, tensors: tuple[torch.Tensor, ...], suffix: str, **options: str) -> tuple[torch.Tensor, ...]:
    """Bit sets, out and lse."""
    q, k, v, mask = tensors
    rule = {"tile": case.tile, "pool": case.pool, "threshold": case.threshold, "topk": case.topk or 0}
    select = getattr(torch.ops.vmoba, f"select{suffix}")
    attention = getattr(torch.ops.vmoba, f"attention{suffix}")
    words = select(q, k, mask, *case.sizes, mode=case.mode, **rule, **options)
    return (words, *attention(q, k, v, words, mask, *case.sizes, scale=case.op_scale, **rule, **options))


def assert_same(actual: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    for x, y in zip(actual, expected, strict=True):
        assert x.dtype == y.dtype and x.is_contiguous()
        assert torch.equal(x, y)


@pytest.mark.halved
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_inline_computes_the_same(case):
    """In the interpreter there is nothing to wrap: the same launches run at once."""
    tensors = inputs(case)
    expected = run(case, tensors, "", implementation="triton")
    assert_same(run(case, tensors, "_inline"), expected)


@pytest.mark.parametrize("name", ["head_global", "masked", "tile"])
def test_all_samples_at_a_time(name, monkeypatch):
    """What a symbolic batch makes of the plan, with numbers."""
    case = CASES[name].but(batch=2)
    tensors = inputs(case)
    expected = run(case, tensors, "", implementation="triton")
    for module in (attend, attend_lists, attend_tiles, turns):
        monkeypatch.setattr(module, "is_dynamic", lambda size: True)
    assert_same(run(case, tensors, "_inline"), expected)


@pytest.mark.slow
def test_all_samples_at_a_time_in_several_turns(monkeypatch, tight):
    case = CASE.but(grid=(4, 8, 8), block=(4, 2, 8), batch=2, heads=1, threshold=0.9)
    tensors = inputs(case)
    expected = run(case, tensors, "", implementation="triton")
    numbers = []
    ordinary = inline.Inline.launch

    def launch(work, kernel, grid, *args, **options):
        numbers.append(kernel.__name__)
        ordinary(work, kernel, grid, *args, **options)

    monkeypatch.setattr(inline.Inline, "launch", launch)
    monkeypatch.setattr(inline.Inline, "memory_factor", 0)
    for module in (attend, attend_lists, attend_tiles, turns):
        monkeypatch.setattr(module, "is_dynamic", lambda size: True)
    actual = run(case, tensors, "_inline")
    assert numbers.count("attend_tiles") > 1
    assert torch.equal(actual[0], expected[0])
    # Partial results are cut elsewhere, so the sums are rounded elsewhere.
    torch.testing.assert_close(actual[1:], expected[1:], rtol=2e-2, atol=2e-2)


def test_watch():
    with inline.watch() as outer, inline.watch() as names:
        run(CASE, inputs(CASE), "_inline")
    assert {"gate_range", "attend_tiles", "merge_chunks"} <= set(names) and not outer


def test_schemas_are_those_of_the_operators_without_implementation():
    for name in ("select", "attention"):
        plain, seen = (getattr(torch.ops.vmoba, f"{name}{suffix}").default._schema for suffix in ("", "_inline"))
        kept = {a.name: (a.type, a.default_value, a.kwarg_only) for a in plain.arguments if a.name != "implementation"}
        assert {a.name: (a.type, a.default_value, a.kwarg_only) for a in seen.arguments} == kept


def script(*words: str) -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", str(SCRIPT), *words],
        capture_output=True, text=True, timeout=900, env=environment | {"CUDA_VISIBLE_DEVICES": ""}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_traced_launches_are_the_ordinary_ones():
    """Kernels, warps, stages, grids, integers, floats and which memory: as the host code asks for them."""
    rows = {row.pop("case"): row for row in script("trace")}
    dynamic = rows.pop("dynamic")
    assert dynamic["free"] and not dynamic["guards"], "the batch was specialised"
    assert dynamic["dynamic_grids"] > 10
    assert len(rows) > 8
    for name, row in rows.items():
        written = [launch.pop("written") for launch in row["traced"]]
        assert row["traced"] == row["truth"], name
        assert all(written), name


@pytest.mark.slow
def test_inductor_lowers_the_kernels_without_copies():
    """Up to where a GPU is needed: Inductor's own signatures compile for sm_90, and nothing is copied on the way."""
    for row in script("inductor", "dynamic"):
        assert not row["errors"] and not row["copies"], row
        assert row["launches"] >= len(row["kernels"]) > 10


REFUSED = """
import torch
from vmoba_compile.kernels import inline
q = torch.randn(1, 2, 8, 16)
sizes = (2, 2, 2, 1, 2, 2, 0, 0)
mask = torch.empty(0, dtype=torch.bool)
torch.ops.vmoba.select_inline(q, q, mask, *sizes, pool="overall", mode="topk", threshold=0.0, topk=2)
"""


def test_refused_on_a_cpu():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", REFUSED], capture_output=True, text=True, timeout=300, env=environment, check=False
    )
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("ValueError: the VMoBA kernels cannot become part of a graph: the tensors are on the CPU")


class Symbol(torch.SymInt):
    """A size without a value: whoever asks for one fails."""

    def __init__(self) -> None:
        pass


def test_only_the_batch_may_be_dynamic():
    q = torch.randn(1, 2, 8, 16)
    reason = inline.why_not(
        torch.ops.vmoba.select.default, (q, q, None, Symbol(), 2, 2, 1, 2, 2, 0, 0), {"pool": "overall"}, lambda n: 8
    )
    assert "only the batch may be" in reason


def test_a_dynamic_batch_has_a_largest_size(monkeypatch):
    monkeypatch.setattr(inline, "is_dynamic", lambda size: size == 5)
    q = torch.randn(5, 2, 8, 16, device="meta")
    args = q, q, q, None, None, 2, 2, 2, 1, 2, 2, 0, 0
    why = lambda bound: inline.why_not(  # noqa: E731
        torch.ops.vmoba.attention.default, args, {"scale": 0.1, "threshold": 0.25}, lambda n: bound
    )
    assert not why(8)
    assert "has no largest size" in why(None) and "max=8" in why(None)
    assert "may be 40000; give it a largest size of at most 32767" in why(40000)


def test_why_not_names_what_the_kernels_cannot_do():
    q = torch.randn(1, 2, 8, 300)
    args = q, q, q, None, None, 2, 2, 2, 1, 2, 2, 0, 0
    reason = inline.why_not(torch.ops.vmoba.attention.default, args, {"scale": 0.1}, lambda n: 8)
    assert reason == "it takes head sizes up to 256, not 300"
