"""Recorded launches: replayed on other memory, told apart by all that they depend on, and given up where they must be."""

from __future__ import annotations

import gc
import threading
import weakref

import numpy
import pytest
import torch
from fake_kernels import Descriptor, Kernel
from vmoba_compile.kernels import launches
from vmoba_compile.kernels.launches import Plans, Work

f32, i32 = numpy.float32, numpy.int32


def add(x: f32, y: f32, out: f32, size, factor):
    out(size)[:] = x(size) + factor * y(size)


def count(x: f32, counters: i32, size):
    counters(4)[:] += (x(size) > 0).sum()


def finish(partial: f32, counters: i32, out: f32, size):
    out(size)[:] = partial(size) + counters(4).sum()


class Computation:
    """``x + factor * y + 4 * (number of positive x)``: scratch memory, zeros, three launches."""

    def __init__(self) -> None:
        self.add, self.count, self.finish = map(Kernel, (add, count, finish))
        self.kernels = self.add, self.count, self.finish
        self.scratch: list[weakref.ref] = []

    def __call__(self, work: Work, x: torch.Tensor, y: torch.Tensor, factor: float) -> torch.Tensor:
        size = x.numel()
        out = work.output(*x.shape, dtype=x.dtype)
        spare, partial = work.empty(3, dtype=torch.int16), work.empty(size, dtype=torch.float32)
        counters = work.zeros(2, 4, dtype=torch.int32)[1]
        self.scratch = [weakref.ref(made) for made in (spare, partial, counters)]
        work.launch(self.add, (size, 2), x, y, partial, size, factor=factor, num_warps=4)
        work.launch(self.count, (1,), x, counters, size)
        work.launch(self.count, (1, 0), x, counters, size)  # nothing
        work.launch(self.finish, (2, 3, 4), partial, counters, out, size)
        return out

    def expected(self, x, y, factor):
        return x + factor * y + 4 * (x > 0).sum()

    @property
    def launched(self) -> tuple[int, int]:
        """Launches by way of Triton, and replayed ones."""
        return sum(kernel.calls for kernel in self.kernels), sum(len(kernel.replayed) for kernel in self.kernels)


@pytest.fixture
def computation():
    return Computation()


@pytest.fixture(autouse=True)
def stream(monkeypatch):
    """The current stream, as the test sets it."""
    current = [7]
    monkeypatch.setattr(launches, "current_stream", lambda device: current[0])
    return current


def call(plans: Plans, computation: Computation, x, y, factor=2.0, options=()):
    return plans.run((factor, options), (x, y), lambda work: computation(work, x, y, factor))


def test_a_replay_computes_the_same(computation, plans, stream):
    results = []
    for _ in range(3):
        x, y = torch.randn(2, 4, 5)
        out = call(plans, computation, x, y)
        assert torch.equal(out, computation.expected(x, y, 2.0))
        assert out.shape == x.shape
        results.append(out)
        stream[0] += 1
    assert computation.launched == (3, 6)
    assert len({out.data_ptr() for out in results}) == 3
    assert [(call.grid, call.stream) for call in computation.finish.replayed] == [((2, 3, 4), 8), ((2, 3, 4), 9)]
    assert computation.add.replayed[0].grid == (20, 2, 1)
    (plan,) = plans.plans.values()
    assert plan.scratch_bytes == 2 * launches.ALIGNMENT
    assert plan.zero_bytes == launches.ALIGNMENT


def test_a_replay_makes_three_allocations(computation, plans, monkeypatch):
    x, y = torch.randn(2, 4, 5)
    call(plans, computation, x, y)
    made = []
    for name in ("empty", "zeros"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, name=name, make=make, **k: made.append(name) or make(*a, **k))
    call(plans, computation, x, y)
    assert made == ["empty", "empty", "zeros"]


def test_scratch_memory_of_a_replay_is_poisoned(plans):
    """What nothing wrote is NaN, as in a recorded call."""

    def copied(source: f32, to: f32):
        to(2)[:] = source(2)

    copy = Kernel(copied)

    def compute(work: Work) -> torch.Tensor:
        out = work.output(2, dtype=torch.float32)
        work.launch(copy, (1,), work.empty(2, dtype=torch.float32), out)
        return out

    x = torch.zeros(1)
    for _ in range(2):
        assert plans.run("copy", (x,), compute).isnan().all()
    assert len(copy.replayed) == 1


def test_plans_hold_no_memory(computation, plans):
    x, y = torch.randn(2, 4, 5)
    gc.disable()  # freed at once, not when somebody collects: the memory serves whoever comes next on the stream
    try:
        for _ in range(2):
            output = weakref.ref(call(plans, computation, x, y))
            assert not any(made() is not None for made in (output, *computation.scratch))
    finally:
        gc.enable()


def change(x: torch.Tensor, what: str) -> torch.Tensor:
    if what == "dtype":
        return x.to(torch.float64)
    if what == "shape":
        return x.reshape(5, 4)
    if what == "strides":
        return x.T.contiguous().T
    assert what == "alignment"
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("what", ["dtype", "shape", "strides", "alignment"])
def test_what_a_plan_depends_on(what, which, plans):
    seen = []
    tensors = list(torch.randn(2, 4, 5).unbind())
    for inputs in (tensors, [x.clone() for x in tensors]):
        plans.run("name", inputs, lambda work: seen.append("same") or work.output(1, dtype=torch.int32))
    assert seen == ["same"]
    tensors[which] = change(tensors[which], what)
    plans.run("name", tensors, lambda work: seen.append("other") or work.output(1, dtype=torch.int32))
    assert seen == ["same", "other"]


def test_options_and_numbers_are_told_apart(computation, plans):
    x, y = torch.randn(2, 4, 5)
    for factor in (2.0, 3.0, 2.0):
        for options in ("a", "b"):
            assert torch.equal(call(plans, computation, x, y, factor, options), computation.expected(x, y, factor))
    assert computation.launched == (12, 6)
    assert len(plans.plans) == 4


def test_one_tensor_given_twice(computation, plans):
    """Else both pointers would be taken for the first input's when others come."""
    x, y = torch.randn(2, 4, 5)
    for first, second in ((x, x), (x, y), (y, x), (y, y), (x, x)):
        assert torch.equal(call(plans, computation, first, second), computation.expected(first, second, 2.0))
    assert computation.launched == (6, 9)


def test_the_least_recently_used_plan_goes_first(computation):
    plans = Plans(limit=3)
    x, y = torch.randn(2, 4, 5)
    for options in (0, 1, 2, 0, 3, 0):
        call(plans, computation, x, y, options=options)
    assert [key[0][1] for key in plans.plans] == [2, 3, 0]
    assert computation.launched == (12, 6)


def test_threads(computation, plans):
    """They record the same plan at once, and replay it at once."""
    start, wrong = threading.Barrier(8), []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        start.wait()
        for i in range(50):
            x, y = torch.randn(2, 3 + i % 2, 5, generator=generator)
            if not torch.equal(call(plans, computation, x, y), computation.expected(x, y, 2.0)):
                wrong.append((seed, i))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(plans.plans) == 2
    assert sum(computation.launched) == 8 * 50 * 3


def test_a_call_that_fails_leaves_no_plan(computation, plans):
    def fail(work: Work) -> torch.Tensor:
        raise ValueError("no such mode")

    x, y = torch.randn(2, 4, 5)
    with pytest.raises(ValueError, match="no such mode"):
        plans.run((2.0, ()), (x, y), fail)
    assert not plans.plans
    assert torch.equal(call(plans, computation, x, y), computation.expected(x, y, 2.0))


def not_replayed(plans: Plans, compute, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """Results of two calls, neither of which may be a replay."""
    computed = []
    results = [plans.run("name", inputs, lambda work: computed.append(work) or compute(work)) for _ in range(2)]
    assert len(computed) == 2
    assert list(plans.plans.values()) == [None]
    return results


def test_foreign_memory_is_not_replayed(plans):
    x, y, kernel = torch.ones(4), torch.full((4,), 2.0), Kernel(add)

    def compute(work: Work) -> torch.Tensor:
        out = work.output(4, dtype=torch.float32)
        work.launch(kernel, (1,), x, y * 2, out, 4, 1.0)
        return out

    assert all((out == 5).all() for out in not_replayed(plans, compute, x, y))


def test_a_part_of_an_input_is_not_replayed(plans):
    """It might lie in two inputs at once; ``Work.part`` says in which."""
    x, kernel = torch.arange(8.0), Kernel(add)

    def compute(work: Work) -> torch.Tensor:
        out = work.output(4, dtype=torch.float32)
        work.launch(kernel, (1,), x, x[4:], out, 4, 1.0)
        return out

    assert all(torch.equal(out, x[:4] + x[4:]) for out in not_replayed(plans, compute, x))


@pytest.mark.parametrize("what", ["torch", "order", "input"])
def test_a_result_that_is_no_output_is_not_replayed(what, plans):
    x = torch.ones(4)

    def compute(work: Work) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = (work.output(4, dtype=torch.float32).fill_(i) for i in range(2))
        return {"torch": (a, b + 1), "order": (b, a), "input": (a, x)}[what]

    not_replayed(plans, compute, x)


class Holder:
    def data_ptr(self) -> int:
        return 0


@pytest.mark.parametrize("argument", [(1, 2), [3], Holder()], ids=["tuple", "list", "data_ptr"])
def test_arguments_that_may_hide_pointers_are_not_replayed(argument, plans):
    kernel = Kernel(lambda x: None)

    def compute(work: Work) -> torch.Tensor:
        work.launch(kernel, (1,), argument)
        return work.output(4, dtype=torch.float32)

    not_replayed(plans, compute, torch.ones(1))


def test_a_kernel_without_compiled_code_is_not_replayed(plans):
    """The interpreter's kernels, or one that a hook of Triton's has kept from compiling."""
    kernel = {(1,): lambda: None}

    def compute(work: Work) -> torch.Tensor:
        work.launch(kernel, (1,))
        return work.output(4, dtype=torch.float32)

    not_replayed(plans, compute, torch.ones(1))


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_launch_hooks_see_every_launch(name, computation, plans):
    knobs = pytest.importorskip("triton").knobs
    x, y = torch.randn(2, 4, 5)
    hook = lambda metadata: None  # noqa: E731
    chain = getattr(knobs.runtime, name)
    call(plans, computation, x, y)
    chain.add(hook)
    try:
        assert torch.equal(call(plans, computation, x, y), computation.expected(x, y, 2.0))
        assert computation.launched == (6, 0)
    finally:
        chain.remove(hook)
    call(plans, computation, x, y)
    assert computation.launched == (6, 3)


def test_descriptors_come_to_describe_the_new_memory(plans):
    fill, read = Kernel(add), Kernel(add)
    held = []

    def compute(work: Work, x: torch.Tensor) -> torch.Tensor:
        out, packed = work.output(4, dtype=torch.float32), work.empty(2, 4, dtype=torch.float32)
        descriptors = [Descriptor(packed[i], (4,), (2,)) for i in range(2)]
        held.extend(weakref.ref(d.base) for d in descriptors)
        work.launch(fill, (1,), x, x, descriptors[0], 4, 1.0)
        work.launch(fill, (1,), x, x, descriptors[1], 4, 2.0)
        work.launch(read, (1,), *descriptors, out, 4, 1.0)
        return out

    for _ in range(3):
        x = torch.randn(4)
        out = plans.run("name", (x,), lambda work, x=x: compute(work, x))
        torch.testing.assert_close(out, 5 * x)
    assert len(fill.replayed) == 4
    (plan,) = plans.plans.values()
    assert len(plan.descriptors) == 2
    gc.collect()
    assert not any(tensor() is not None for tensor in held)
    first, second = (call.arguments[2] for call in fill.replayed[:2])
    assert type(first) is Descriptor
    assert (first.shape, first.block_shape) == ((4,), (2,))
    assert second.base.data_ptr() - first.base.data_ptr() == 16
    assert read.replayed[0].arguments[0] is first  # described once a call


def test_samples_and_sections(plans):
    """Work on one sample after the other: parts of inputs and outputs, and scratch memory that serves again."""
    step, kernel_count = Kernel(add), Kernel(count)

    def compute(work: Work, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        out, before = work.output(*x.shape, dtype=x.dtype), work.empty(4, dtype=torch.float32)
        work.launch(step, (1,), y, y, before, 4, 0.0)
        for i in range(3):
            some = slice(i, i + 1)
            mine, others = work.part(x, some), work.part(y[:0], some)
            with work.section():
                partial = work.empty(4, dtype=torch.float32)
                counters = work.zeros(4, dtype=torch.int32)
                work.launch(kernel_count, (1,), mine, counters, 4)
                work.launch(step, (1,), mine, before, partial, 4, 2.0)
                work.launch(step, (1,), partial, mine, out[some], 4, 1.0)
                assert others.numel() == 0
        return out

    for _ in range(3):
        x, y = torch.randn(3, 4), torch.randn(4)
        out = plans.run("name", (x, y), lambda work, x=x, y=y: compute(work, x, y))
        torch.testing.assert_close(out, 2 * x + 2 * y)
    (plan,) = plans.plans.values()
    assert plan.scratch_bytes == 2 * launches.ALIGNMENT
    assert plan.zero_bytes == 3 * launches.ALIGNMENT


def test_inputs_that_overlap_are_not_replayed(plans):
    """A sample of one input is another input: it cannot be told which of the two a kernel works on."""
    memory, kernel = torch.arange(12.0).view(3, 4), Kernel(add)
    x, y = memory[:2], memory[1:]

    def compute(work: Work) -> torch.Tensor:
        out = work.output(4, dtype=torch.float32)
        work.launch(kernel, (1,), work.part(x, slice(1, 2)), y, out, 4, 1.0)
        return out

    assert all(torch.equal(out, 2 * memory[1]) for out in not_replayed(plans, compute, x, y))
