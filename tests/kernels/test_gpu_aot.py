"""Chains compiled ahead of time and run by the CUDA driver alone give what the operators give, bit by bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import Case, mask_or_empty
from vmoba_compile.kernels import aot
from vmoba_compile.kernels.partition import Geometry

pytestmark = pytest.mark.gpu

GRID = (5, 12, 14)  # ragged in every block below
BASE = Case(grid=GRID, block=(2, 5, 4), heads=4, kv_heads=4, head_dim=64, layout="contiguous")
CASES = {
    "head_global": (BASE, torch.bfloat16),
    "overall": (BASE.but(pool="overall", prefix=7, suffix=3, batch=2), torch.float16),
    "block": (BASE.but(pool="block", masked="tokens", batch=2, kv_heads=2), torch.bfloat16),
    "query_head": (BASE.but(pool="query_head", head_dim=80, suffix=5), torch.bfloat16),
    "topk": (BASE.but(mode="topk", topk=3, head_dim=128, prefix=4, masked="boxes"), torch.float16),
    "overall-topk": (BASE.but(pool="overall", mode="topk", topk=4, kv_heads=1), torch.bfloat16),
    "query_head-topk": (BASE.but(pool="query_head", mode="topk", topk=3, head_dim=80, masked="tokens"), torch.float32),
    "fp32": (BASE.but(prefix=2, masked="sample", batch=2, kv_heads=2), torch.float32),
    "own box": (BASE.but(mode="topk", topk=1, batch=2), torch.bfloat16),
    "everything": (BASE.but(threshold=1.0, masked="tokens"), torch.bfloat16),
    "tile": (BASE.but(tile=128, head_dim=128, prefix=3, suffix=2, kv_heads=2, masked="tokens"), torch.bfloat16),
    "tile of 64": (BASE.but(tile=64, pool="query_head", batch=2, head_dim=80), torch.float16),
    "tile-fp32": (BASE.but(tile=64, block=(2, 12, 7)), torch.float32),
}


@pytest.fixture(scope="module")
def capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability()


def rule(case: Case) -> dict[str, Any]:
    return {"pool": case.pool, "threshold": case.threshold, "topk": case.topk or 0, "tile": case.tile}


def programs(case: Case, dtype: torch.dtype, capability: tuple[int, int], masked: bool) -> tuple[Any, Any]:
    from vmoba_compile.kernels import aot_ptx

    geometry = Geometry(case.grid, case.block, case.prefix, case.suffix)
    size = (case.batch, case.heads, case.num_tokens, case.head_dim)
    where: dict[str, Any] = {"capability": capability, "masked": masked}
    select = aot.record_select(size, case.kv_heads, dtype, geometry, mode=case.mode, **where, **rule(case))
    attend = aot.record_attention(size, case.kv_heads, dtype, geometry, scale=case.op_scale, **where, **rule(case))
    return tuple(aot_ptx.Program.from_json(aot_ptx.compile_chain(chain).to_json()) for chain in (select, attend))


def check(case: Case, dtype: torch.dtype, capability: tuple[int, int]) -> None:
    from vmoba_compile.kernels import aot_driver

    tensors = case.tensors(dtype)
    masked = tensors.key_mask is not None
    q, k, v, mask = (x.cuda().contiguous() for x in (*tensors[:3], mask_or_empty(tensors)))
    options = rule(case) | {"implementation": "triton"}
    words = torch.ops.vmoba.select(q, k, mask, *case.sizes, mode=case.mode, **options)
    out, lse = torch.ops.vmoba.attention(q, k, v, words, mask, *case.sizes, scale=case.op_scale, **options)
    inputs = {"q": q, "k": k, "v": v, "selected": words} | ({"key_mask": mask} if masked else {})
    select, attend = programs(case, dtype, capability, masked)
    (selected,) = aot_driver.run(select, inputs, poison=True)
    assert torch.equal(selected, words)
    result, logsum = aot_driver.run(attend, inputs | {"selected": selected}, poison=True)
    assert torch.isfinite(out).all() or case.masked == "sample"
    # The operator's kernels read packed keys through descriptors, and its chunks may be others: not the same code.
    limit = 1e-6 if dtype == torch.float32 else 4e-3
    assert float((result.double() - out.double()).norm() / out.double().norm()) < limit
    finite = lse.isfinite()
    assert torch.equal(finite, logsum.isfinite())
    assert float((logsum - lse)[finite].abs().max()) < 1e-4


@pytest.mark.parametrize("name", CASES)
def test_equals_the_operators(name, capability):
    check(*CASES[name], capability)


@pytest.mark.slow
@pytest.mark.parametrize("block", [(3, 30, 52), (21, 5, 13), (7, 5, 13)], ids=["1d", "2d", "3d"])
def test_a_layer_of_a_video_model(block, capability):
    """480p, 81 frames, 12 heads of 128; the time of the chain beside the operators', launches one by one."""
    from vmoba_compile.kernels import aot_driver

    case = BASE.but(grid=(21, 30, 52), block=block, heads=12, kv_heads=12, head_dim=128)
    check(case, torch.bfloat16, capability)
    q, k, v = (torch.randn(1, 12, case.num_tokens, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    empty = torch.empty(0, dtype=torch.bool, device="cuda")
    select, attend = programs(case, torch.bfloat16, capability, masked=False)
    options = rule(case) | {"implementation": "triton"}

    def chain() -> torch.Tensor:
        (words,) = aot_driver.run(select, {"q": q, "k": k})
        return aot_driver.run(attend, {"q": q, "k": k, "v": v, "selected": words})[0]

    def operators() -> torch.Tensor:
        words = torch.ops.vmoba.select(q, k, empty, *case.sizes, mode=case.mode, **options)
        return torch.ops.vmoba.attention(q, k, v, words, empty, *case.sizes, scale=case.op_scale, **options)[0]

    times = []
    for run in (chain, operators):
        run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(5):
            run()
        end.record()
        torch.cuda.synchronize()
        peak = (torch.cuda.max_memory_allocated() - before) >> 20
        times.append(f"{run.__name__} {begin.elapsed_time(end) / 5:.2f} ms, {peak} MiB")
    calls = len(select.chain.calls), len(attend.chain.calls)
    print(f"\n{block}: {'; '.join(times)}; calls {calls}; planned {aot.scratch_bytes(attend.chain) >> 20} MiB")
    assert float((chain().double() - operators().double()).norm() / operators().double().norm()) < 4e-3


def test_a_kernel_gets_what_it_declares(capability):
    from vmoba_compile.kernels import aot_driver

    case, dtype = CASES["head_global"]
    select, _ = programs(case, dtype, capability, masked=False)
    kernel = select.kernels[select.keys[0]]
    with pytest.raises(ValueError, match="takes other arguments"):
        aot_driver.driver().launch(kernel, (1, 1, 1), [0], [], [0])
    with pytest.raises(ValueError, match="q must be a contiguous CUDA tensor"):
        aot_driver.run(select, {"q": torch.zeros(1), "k": torch.zeros(1)})


def test_ptx_for_an_older_driver(capability):
    """A newer PTX version than the default runs as well, and a broken one is an error of the driver's."""
    import dataclasses

    from vmoba_compile.kernels import aot_driver, aot_ptx

    case, dtype = CASES["own box"]
    tensors = case.tensors(dtype)
    geometry = Geometry(case.grid, case.block, case.prefix, case.suffix)
    size = (case.batch, case.heads, case.num_tokens, case.head_dim)
    chain = aot.record_select(size, case.kv_heads, dtype, geometry, mode=case.mode, capability=capability, **rule(case))
    inputs = {"q": tensors.q.cuda().contiguous(), "k": tensors.k.cuda().contiguous()}
    (expected,) = aot_driver.run(aot_ptx.compile_chain(chain), inputs)
    program = aot_ptx.compile_chain(chain, ptx_version=86)
    assert ".version 8.6" in program.kernels[program.keys[0]].ptx
    assert torch.equal(aot_driver.run(program, inputs)[0], expected)
    with pytest.raises(RuntimeError, match=r"ptxas of this Triton refuses .* as PTX 9\.9"):
        aot_ptx.compile_chain(chain, ptx_version=99)
    broken = dataclasses.replace(program.kernels[program.keys[0]], key="broken", ptx="no PTX")
    with pytest.raises(aot_driver.DriverError, match="cuModuleLoadData"):
        aot_driver.driver().function(broken)
