"""Recorded chains: run in the interpreter from their data alone, and compiled for every architecture without a GPU."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import chains
import interpreter
import pytest
import torch
from kernel_cases import Case, Tensors, assert_close, choose, mask_or_empty
from vmoba_compile.kernels import aot, attend, attend_lists, attend_tiles, attend_triton
from vmoba_compile.kernels.partition import Geometry

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="needs Triton's interpreter; test_gpu_aot.py runs on a GPU"
)

SCRIPT = Path(__file__).parents[1] / "support" / "compile_chains.py"
CAPABILITIES = ("8.0", "9.0", "10.0", "12.0")

interpreter.install()


@pytest.fixture(autouse=True)
def small(monkeypatch):
    interpreter.small_selection(monkeypatch)
    monkeypatch.setattr(attend_lists, "GROUP", 16)
    monkeypatch.setattr(attend_lists, "TILE", 16)
    monkeypatch.setattr(attend_triton, "TILE", 16)
    monkeypatch.setattr(attend_triton, "QUERIES", 16)


def layout(case: Case, tensors: Tensors) -> tuple[Any, ...]:
    geometry = Geometry(case.grid, case.block, case.prefix, case.suffix)
    return tensors.q.shape, case.kv_heads, tensors.q.dtype, geometry


def record_select(case: Case, tensors: Tensors, capability=(9, 0)) -> aot.Chain:
    rule = case.selection | {"topk": case.topk or 0, "tile": case.tile}
    masked = tensors.key_mask is not None
    return aot.record_select(*layout(case, tensors), capability=capability, masked=masked, **rule)


def record_attention(case: Case, tensors: Tensors, capability=(9, 0), **changes: Any) -> aot.Chain:
    rule = {"threshold": case.threshold, "topk": case.topk or 0, "pool": case.pool, "tile": case.tile}
    rule |= {"scale": case.op_scale, "masked": tensors.key_mask is not None} | changes
    return aot.record_attention(*layout(case, tensors), capability=capability, **rule)


def contiguous(tensors: Tensors) -> Tensors:
    return Tensors(*(x if x is None else x.contiguous() for x in tensors))


def masks(tensors: Tensors) -> tuple[torch.Tensor, ...]:
    return () if tensors.key_mask is None else (tensors.key_mask,)


SELECTIONS = [
    Case(),
    Case(pool="overall", mode="topk", topk=3, prefix=2, batch=2),
    Case(pool="block", suffix=3, heads=4),
    Case(pool="query_head", masked="tokens", batch=2),
    Case(mode="topk", topk=1),  # the own box alone
    Case(threshold=1.0, masked="boxes"),  # everything
    Case(grid=(3, 6, 7), block=(2, 6, 4), tile=64, prefix=3, masked="tokens"),
    Case(head_dim=20, masked="sample", batch=2),
]


@pytest.mark.parametrize("case", SELECTIONS, ids=lambda case: f"{case.pool}-{case.mode}-{case.tile}-{case.masked}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_selection(case, dtype):
    tensors = contiguous(case.tensors(dtype))
    (selected,) = chains.interpret(record_select(case, tensors), tensors.q, tensors.k, *masks(tensors))
    rule = case.selection | {"topk": case.topk or 0, "tile": case.tile}
    expected = torch.ops.vmoba.select(
        tensors.q, tensors.k, mask_or_empty(tensors), *case.sizes, implementation="triton", **rule
    )
    assert torch.equal(selected, expected)
    if dtype == torch.float32:
        assert torch.equal(selected, choose(case, tensors).words)


ATTENTIONS = [
    Case(grid=(3, 4, 5)),
    Case(grid=(3, 4, 5), block=(2, 3, 3), prefix=3, suffix=2, batch=2, heads=2, kv_heads=1, masked="tokens"),
    Case(grid=(4, 4, 4), head_dim=20, pool="query_head", mode="topk", topk=2),
    Case(grid=(4, 4, 4), pool="block", masked="boxes"),
    Case(grid=(3, 4, 5), masked="sample", batch=2, prefix=1),
    Case(grid=(3, 4, 5), threshold=1.0, suffix=4),
    Case(grid=(3, 6, 7), block=(2, 6, 4), tile=64, prefix=3, masked="tokens", heads=4, kv_heads=2),
    Case(grid=(3, 8, 8), block=(2, 8, 8), tile=128, suffix=5),
]


@pytest.mark.parametrize("case", ATTENTIONS, ids=lambda case: f"{case.pool}-{case.mode}-{case.tile}-{case.masked}")
@pytest.mark.parametrize("memory", ["enough", "tight"])
def test_attention(case, memory, monkeypatch):
    if memory == "tight":  # many turns: results are filled one after the other, in place
        monkeypatch.setattr(attend, "MEMORY_FLOOR", 0)
        monkeypatch.setattr(attend, "MEMORY_SHARE", 0.01)
    monkeypatch.setattr(attend_tiles, "program_shape", lambda q: (16, 16, 4, 2))
    tensors = contiguous(case.tensors(torch.float32))
    words = choose(case, tensors).words
    chain = record_attention(case, tensors)
    results = [call for call in chain.calls if call.name in ("merge_chunks", "attend_queries")]
    assert len(results) > 1 if memory == "tight" else results
    out, lse = chains.interpret(chain, *tensors[:3], words, *masks(tensors))
    assert_close((out, lse), case.truth(tensors), torch.float32)


def test_more_pairs_than_the_rule_allows_is_nan():
    case = Case(grid=(4, 4, 4), block=(1, 1, 1), threshold=0.01)
    tensors = contiguous(case.tensors(torch.float32))
    everything = choose(case.but(threshold=1.0), tensors).words
    out, lse = chains.interpret(record_attention(case, tensors), *tensors[:3], everything)
    assert out.isnan().all()
    assert lse.isnan().all()


def test_calls_read_what_was_written():
    """Every value is made once, before it is read; what is changed in place is not read again."""
    case = ATTENTIONS[1]
    tensors = contiguous(case.tensors(torch.bfloat16))
    for chain in (record_select(case, tensors), record_attention(case, tensors)):
        there, gone = set(range(len(chain.inputs))), set()
        for call in chain.calls:
            assert {port.value for port in call.inputs} <= there - gone
            assert call.inputs
            for port in call.outputs:
                assert port.value not in there
                there.add(port.value)
                if port.alias >= 0:
                    changed = call.inputs[port.alias].value
                    assert chain.values[changed] == chain.values[port.value]
                    assert changed >= len(chain.inputs)
                    gone.add(changed)
        assert set(chain.outputs) <= there - gone


def test_an_order_that_may_break_is_refused():
    """A reader of a buffer that has no tie with the call that then changes it."""
    port = aot.Port
    value = aot.Value((4,), "float32")

    def call(name: str, inputs: list[aot.Port], outputs: list[aot.Port]) -> aot.Call:
        return aot.Call(f"m:{name}", {}, {}, {}, tuple(inputs), tuple(outputs), (1, 1, 1), {})

    calls = (
        call("make", [port("x", 0)], [port("y", 1)]),
        call("read", [port("y", 1)], [port("z", 2)]),
        call("change", [port("y", 1)], [port("", 3, 0)]),
    )
    chain = aot.Chain((9, 0), ("x",), (3,), (value,) * 4, calls)
    with pytest.raises(RuntimeError, match="change may change a buffer before read has read it"):
        aot.check_order(chain)
    tied = call("change", [port("y", 1), port("z", 2)], [port("", 3, 0)])
    aot.check_order(dataclasses.replace(chain, calls=(*calls[:2], tied)))


def test_parts_and_strides_are_refused():
    work = aot.Recorder(x=torch.empty(8, device="meta"))
    whole = work.empty(64, dtype=torch.int32)
    with pytest.raises(ValueError, match="whole tensors"):
        work.launch(aot.fill_zeros, (1,), whole[32:], 32, BLOCK=32)
    with pytest.raises(ValueError, match="contiguous"):
        aot.Recorder(x=torch.empty(4, 8, device="meta").T)


def test_what_nobody_wrote_is_not_read():
    work = aot.Recorder(x=torch.empty(8, device="meta"))
    with pytest.raises(ValueError, match="COUNT is read before"):
        work.launch(
            attend_lists.scan_groups,
            (1,),
            work.empty(4, dtype=torch.int32),
            work.empty(4, dtype=torch.int32),
            4,
            BLOCK=4,
        )


def test_unknown_kernels_are_refused(monkeypatch):
    monkeypatch.delitem(aot.ROLES, "fill_zeros")
    work = aot.Recorder(x=torch.empty(8, device="meta"))
    with pytest.raises(NotImplementedError, match="fill_zeros"):
        work.launch(aot.fill_zeros, (1,), work.empty(32, dtype=torch.int32), 32, BLOCK=32)


def test_sizes_that_no_kernel_takes():
    geometry = Geometry((2, 2, 2), (1, 1, 1))
    rule: dict[str, Any] = {"pool": "head_global", "threshold": 0.25, "topk": 0, "capability": (9, 0)}
    with pytest.raises(ValueError, match="grid and the condition tokens make 8"):
        aot.record_select((1, 2, 9, 64), 2, torch.float32, geometry, mode="threshold", **rule)
    with pytest.raises(ValueError, match="head sizes up to 256"):
        aot.record_select((1, 2, 8, 320), 2, torch.float32, geometry, mode="threshold", **rule)
    with pytest.raises(ValueError, match="do not divide"):
        aot.record_attention((1, 3, 8, 64), 2, torch.float32, geometry, scale=1.0, **rule)
    many = Geometry((64, 64, 64), (8, 8, 8))
    with pytest.raises(ValueError, match=r"fewer than 2\*\*31 pairs"):
        aot.record_attention(
            (8, 16, many.num_tokens, 64), 16, torch.bfloat16, many, scale=1.0, **rule | {"threshold": 1.0}
        )


def test_scratch_memory_is_that_of_live_values():
    value = aot.Value((256,), "int32")
    port = aot.Port
    calls = tuple(
        aot.Call("m:k", {}, {}, {}, inputs, outputs, (1, 1, 1), {})
        for inputs, outputs in [
            ((port("x", 0),), (port("a", 1), port("b", 2))),
            ((port("a", 1),), (port("", 3, 0),)),  # in place: no memory of its own
            ((port("b", 2), port("a", 3)), (port("c", 4),)),
        ]
    )
    assert aot.scratch_bytes(aot.Chain((9, 0), ("x",), (4,), (value,) * 5, calls)) == 2 * 1024


def test_tiles_suit_the_target():
    """Where the operands of a product lie decides on the tile, and it is that of the target, not of this machine."""
    case = Case(head_dim=64)
    tensors = contiguous(case.tensors(torch.bfloat16))
    blocks = [
        next(
            call for call in record_attention(case, tensors, capability).calls if call.name == "attend_tiles"
        ).constants["BLOCK"]
        for capability in ((8, 0), (9, 0), (10, 0), (12, 0))
    ]
    assert blocks == [32, 64, 64, 32]


@cache
def compiled(capability: str) -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-P", str(SCRIPT), capability], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.xdist_group("compile")
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_kernel_becomes_ptx(capability):
    """As declared, and accepted by ptxas; that its accesses are those of ROLES is checked while it is compiled."""
    results = compiled(capability)
    assert {kernel["function"] for kernel in results["kernels"]} == set(aot.ROLES)
    target = capability.replace(".", "")
    for kernel in results["kernels"]:
        assert kernel["target"].removesuffix("a") == f"sm_{target}", kernel
        assert kernel["declared"] == kernel["inputs"] + len(kernel["numbers"]) + kernel["outputs"]
        assert kernel["version"] == results["version"]
        assert not kernel["paths"], kernel["function"]
        assert kernel["cubin"] > 1000
    assert results["round_trip"]
    assert results["differ_from_jit"] == []


@pytest.mark.slow
@pytest.mark.xdist_group("compile")
def test_equal_kernels_are_compiled_once():
    results = compiled("9.0")
    assert len(results["kernels"]) < results["calls"]
    assert results["kernels_of_two_layers"] == results["kernels_of_one_layer"]
