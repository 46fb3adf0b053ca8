"""Replayed launches on a GPU give the bits that recorded ones give, wherever and whenever they run."""

from __future__ import annotations

import statistics
import threading
import time

import pytest
import torch
from kernel_cases import Case
from vmoba_compile.kernels import attention, implementations, launches

pytestmark = pytest.mark.gpu

HAS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
CASE = Case(grid=(9, 13, 17), block=(3, 5, 6), prefix=19, suffix=45, heads=4, kv_heads=4, head_dim=64)
CASES = {
    "plain": CASE,
    "masked": CASE.but(masked="tokens", batch=2),
    "grouped": CASE.but(heads=6, kv_heads=2, layout="packed"),
    "overall": CASE.but(pool="overall", batch=2),
    "block": CASE.but(pool="block"),
    "query_head": CASE.but(pool="query_head"),
    "topk": CASE.but(mode="topk", topk=3),
    "everything": CASE.but(threshold=1.0, prefix=0, suffix=0),
}

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_implementation = pytest.mark.parametrize("implementation", ["triton", "hopper"] if HAS_HOPPER else ["triton"])


def inputs(case: Case, device: str = "cuda") -> tuple:
    """q, k, v and key mask in bfloat16, strides kept."""
    return tuple(None if x is None else x.to(device) for x in case.tensors(torch.bfloat16))


def run(case: Case, implementation: str, tensors: tuple) -> torch.Tensor:
    q, k, v, mask = tensors
    return attention(
        q, k, v, case.grid, block=case.block, key_mask=mask, implementation=implementation,
        **case.layout_arguments, **case.selection,
    )  # fmt: skip


def recorded(case: Case, implementation: str, tensors: tuple) -> torch.Tensor:
    """The result of a first call; the plans of earlier ones stay as they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(implementations, "PLANS", launches.Plans())
        return run(case, implementation, tensors)


@every_implementation
@every_case
def test_other_inputs(case, implementation, plans):
    for seed in range(4):
        tensors = inputs(case.but(seed=seed))
        assert torch.equal(run(case, implementation, tensors), recorded(case, implementation, tensors))
    assert len(plans.plans) == 2
    assert None not in plans.plans.values()


@every_implementation
def test_samples_one_at_a_time(implementation, plans, tight):
    case = CASE.but(batch=3, masked="tokens")
    for seed in range(3):
        tensors = inputs(case.but(seed=seed))
        assert torch.equal(run(case, implementation, tensors), recorded(case, implementation, tensors))
    assert None not in plans.plans.values()


@every_implementation
@pytest.mark.parametrize("before", [0, 2], ids=["first_call", "later_call"])
def test_cuda_graph(before, implementation, plans):
    """The capture may be the call that is recorded, and later eager calls replay what it recorded."""
    tensors, others = inputs(CASE), inputs(CASE.but(seed=1))
    expected = [recorded(CASE, implementation, x) for x in (tensors, others)]
    for _ in range(before):
        run(CASE, implementation, tensors)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(CASE, implementation, tensors)
    assert len(plans.plans) == 2
    for values, wanted in zip((tensors, others), expected, strict=True):
        for x, y in zip(tensors[:3], [y.clone() for y in values[:3]], strict=True):
            x.copy_(y)
        assert torch.equal(run(CASE, implementation, tensors), wanted)
        graph.replay()
        assert torch.equal(out, wanted)


@every_implementation
def test_side_streams(implementation):
    """Each call runs on the stream that is current, and its memory belongs to that stream."""
    cases = [CASE.but(seed=seed) for seed in range(6)]
    tensors = [inputs(case) for case in cases]
    expected = [recorded(CASE, implementation, x) for x in tensors]
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    results = []
    for _ in range(3):
        for i, x in enumerate(tensors):
            with torch.cuda.stream(streams[i % 3]):
                torch.cuda._sleep(100_000)
                results.append(run(CASE, implementation, x))
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected[i % 6]) for i, out in enumerate(results))


@every_implementation
def test_threads(implementation):
    tensors = [inputs(CASE.but(seed=seed)) for seed in range(4)]
    expected = [recorded(CASE, implementation, x) for x in tensors]
    torch.cuda.synchronize()
    wrong = []

    def work(i: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(10):
                if not torch.equal(run(CASE, implementation, tensors[i]), expected[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@every_implementation
def test_other_devices(implementation, plans):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    tensors = inputs(CASE)
    expected = recorded(CASE, implementation, tensors)
    elsewhere = inputs(CASE, "cuda:1")
    for _ in range(3):
        assert torch.equal(run(CASE, implementation, tensors), expected)
        assert torch.equal(run(CASE, implementation, elsewhere).to("cuda:0"), expected)
    assert len(plans.plans) == 4


@every_implementation
def test_launch_hooks_see_every_launch(implementation):
    from triton import knobs

    tensors, names = inputs(CASE), []
    hook = lambda metadata: names.append(metadata.get()["name"])  # noqa: E731
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        counts = []
        for _ in range(3):
            before = len(names)
            run(CASE, implementation, tensors)
            counts.append(len(names) - before)
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert counts[0] == counts[1] == counts[2] > 15


def host_milliseconds(call, grad: bool) -> float:
    """The median of twenty calls, after ten."""
    times = []
    with torch.set_grad_enabled(grad):
        for _ in range(30):
            torch.cuda.synchronize()
            start = time.perf_counter()
            result = call()
            times.append((time.perf_counter() - start) * 1e3)
            del result
    return statistics.median(times[10:])


@every_implementation
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_host_time(implementation, grad, monkeypatch):
    """A forward returns sooner when it replays its launches than when it launches, the GPU idle before."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    torch.use_deterministic_algorithms(False)
    tensors = inputs(CASE.but(heads=12, kv_heads=12, head_dim=128, prefix=0, suffix=0))
    case = CASE.but(prefix=0, suffix=0)
    for x in tensors[:3]:
        x.requires_grad_(grad)
    replayed = host_milliseconds(lambda: run(case, implementation, tensors), grad)
    monkeypatch.setattr(launches, "launches_are_observed", lambda: True)
    launched = host_milliseconds(lambda: run(case, implementation, tensors), grad)
    assert replayed < 0.6 * launched, (replayed, launched)
