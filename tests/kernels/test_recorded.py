"""The package's own host code is recorded in full: each pointer is known, and torch computes nothing in between."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch
from fake_kernels import pointer
from kernel_cases import Case, mask_or_empty
from torch.utils._python_dispatch import TorchDispatchMode
from vmoba_compile.kernels.launches import Recording
from vmoba_compile.kernels.partition import Geometry

pytest.importorskip("triton")
from vmoba_compile.kernels import attend, launches, select_triton

CASE = Case(grid=(3, 4, 5), block=(2, 2, 3), prefix=3, suffix=5, batch=2, heads=4, kv_heads=2, head_dim=64)
GEOMETRY = Geometry(CASE.grid, CASE.block, CASE.prefix, CASE.suffix)
CASES = {
    **{pool: CASE.but(pool=pool) for pool in ("head_global", "overall", "block", "query_head")},
    "topk": CASE.but(mode="topk", topk=2), "own_box": CASE.but(mode="topk", topk=1),
    "everything": CASE.but(threshold=1.0), "masked": CASE.but(masked="tokens"),
}  # fmt: skip
every_attention = pytest.mark.parametrize("implementation", ["triton", "hopper"])
ALLOCATIONS_AND_VIEWS = {
    "empty", "zeros", "empty_strided", "fill_", "zero_",  # fill_, zero_: of memory just allocated, by torch itself
    "slice", "select", "view", "unbind", "alias", "as_strided", "detach", "_unsafe_view",
}  # fmt: skip


class Recorder(Recording):
    """Kernels do nothing, and their launches are listed: (name, grid, arguments with addresses for tensors)."""

    def __init__(self, inputs, log: list) -> None:
        super().__init__(inputs)
        self.log = log

    def launch(self, kernel, grid, *args, **options) -> None:
        name = kernel.fn.__name__

        def run(x, y, z, stream, function, metadata, launch_metadata, enter, leave, *values) -> None:
            self.log.append((name, (x, y, z), [plain(value) for value in values]))

        def triton_launch(*args, **options):
            given = signature.bind(*args, **{key: options[key] for key in options if key in signature.parameters})
            run(*(*grid, 1, 1)[:3], *[None] * 6, *given.arguments.values())
            return SimpleNamespace(run=run, function=0, packed_metadata=())

        signature = inspect.signature(kernel.fn)
        stub = type("Stub", (), {"signature": signature, "__getitem__": lambda self, grid: triton_launch})()
        super().launch(stub, grid, *args, **options)


def plain(value):
    if hasattr(value, "block_shape"):
        return "descriptor", pointer(value.base), tuple(value.shape), tuple(value.strides), tuple(value.block_shape)
    return ("pointer", value.data_ptr()) if isinstance(value, torch.Tensor) else value


def inputs_of(case: Case, with_words: bool, with_results: bool = False) -> tuple[torch.Tensor, ...]:
    tensors = case.tensors(torch.bfloat16)
    if not with_words:
        return (*tensors[:2], mask_or_empty(tensors))
    words = torch.zeros(case.batch, case.heads, case.num_video, GEOMETRY.num_words, dtype=torch.int32)
    results = ()
    if with_results:
        lse = torch.zeros(tensors[0].shape[:3])
        results = torch.zeros_like(tensors[0]), torch.zeros(tensors[0].shape, dtype=torch.bfloat16), lse, lse.clone()
    return (*tensors[:3], words, mask_or_empty(tensors), *results)


@pytest.fixture
def hopper(monkeypatch):
    """A GPU as far as the host code looks at it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    monkeypatch.setattr(attend, "why_not_hopper", lambda q, k, v: "")
    monkeypatch.setattr(launches, "current_stream", lambda device: 0)


def select(case: Case, work: Recording, q, k, mask):
    rule = case.selection | {"topk": case.topk or 0}
    return select_triton.select(work, q, k, mask, GEOMETRY, **rule)


def attention(case: Case, implementation: str, work: Recording, *tensors):
    return attend.attention(work, *tensors, GEOMETRY, 0.125, implementation=implementation, share=0.25, by_head=True)


def backward(case: Case, implementation: str, work: Recording, q, k, v, words, mask, *results):
    """``results``: gradient of the output, output, log-sum-exps and their gradient."""
    dout, *rest = results
    return attend.attention_backward(
        work,
        dout,
        q,
        k,
        v,
        words,
        mask,
        *rest,
        GEOMETRY,
        0.125,
        implementation=implementation,
        share=0.25,
        by_head=True,
    )


def check(case: Case, compute, with_words: bool, with_results: bool = False) -> int:
    """Record, replay on other memory, compare the launches one by one; their number."""
    inputs, log = inputs_of(case, with_words, with_results), []
    recording = Recorder(inputs, log)
    result = compute(case, recording, *inputs)
    plan = recording.plan(result)
    assert plan is not None, recording.problem
    recorded = log.copy()
    log.clear()
    others = inputs_of(case.but(seed=1), with_words, with_results)
    again = plan.replay([x.data_ptr() for x in others])
    assert [name for name, _, _ in log] == [name for name, _, _ in recorded]
    moved: dict[int, int] = {}  # addresses of the record to those of the replay
    for (name, grid, before), (_, new_grid, after) in zip(recorded, log, strict=True):
        assert new_grid == grid
        for x, y in zip(before, after, strict=True):
            kind, address, *rest = x if isinstance(x, tuple) else (None, None)
            if kind == "pointer":
                assert moved.setdefault(address, y) == y, name
            elif kind == "descriptor":
                assert y[0] == kind and y[2:] == tuple(rest)
                assert moved.setdefault(address, y[1]) == y[1], name
            else:
                assert x == y
    assert len(set(moved.values())) == len(moved)
    results, new = ((x,) if isinstance(x, torch.Tensor) else x for x in (result, again))
    for old, other in zip((*inputs, *results), (*others, *new), strict=True):
        assert moved.get(old.data_ptr(), other.data_ptr()) == other.data_ptr()
    assert all((x.shape, x.dtype) == (y.shape, y.dtype) for x, y in zip(results, new, strict=True))
    return len(log)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_selection(case, hopper):
    assert check(case, select, with_words=False) in (3, 12, 14)


@every_attention
@pytest.mark.parametrize("masked", ["none", "tokens"])
def test_attention(implementation, masked, hopper):
    run = lambda case, *rest: attention(case, implementation, *rest)  # noqa: E731
    check(CASE.but(masked=masked), run, with_words=True)


@every_attention
@pytest.mark.parametrize("masked", ["none", "tokens"])
def test_backward(implementation, masked, hopper):
    run = lambda case, *rest: backward(case, implementation, *rest)  # noqa: E731
    check(CASE.but(masked=masked), run, with_words=True, with_results=True)


@every_attention
@pytest.mark.parametrize("masked", ["none", "tokens"])
@pytest.mark.parametrize(("batch", "groups"), [(1, 3), (3, 9)])
def test_backward_in_groups(implementation, masked, batch, groups, hopper, tight):
    """Slices of inputs and outputs keep their offsets in a replay. Scratch memory of one group serves the next again."""
    case = CASE.but(masked=masked, batch=batch, heads=6, kv_heads=3)
    inputs, log = inputs_of(case, True, True), []
    recording = Recorder(inputs, log)
    results = backward(case, implementation, recording, *inputs)
    plan = recording.plan(results)
    assert plan is not None, recording.problem
    recorded = log.copy()
    log.clear()
    others = inputs_of(case.but(seed=1), True, True)
    new = plan.replay([x.data_ptr() for x in others])
    assert sum(name == "scan_groups" for name, _, _ in recorded) == groups
    sliced = 0
    for (name, grid, before), (new_name, new_grid, after) in zip(recorded, log, strict=True):
        assert (name, grid) == (new_name, new_grid)
        for x, y in zip(before, after, strict=True):
            if isinstance(x, tuple) and x[0] == "pointer":
                for old, other in zip((*inputs, *results), (*others, *new), strict=True):
                    offset = x[1] - old.data_ptr()
                    if 0 <= offset < old.untyped_storage().nbytes() and old.numel():
                        assert y - other.data_ptr() == offset, name
                        sliced += offset > 0
    assert sliced


@every_attention
def test_samples_one_at_a_time(implementation, hopper, tight):
    """Each sample takes the scratch memory of the one before."""
    sizes = {}
    for batch in (1, 3):
        case = CASE.but(batch=batch)
        inputs = inputs_of(case, True)
        recording = Recorder(inputs, [])
        plan = recording.plan(attention(case, implementation, recording, *inputs))
        assert plan is not None, recording.problem
        sizes[batch] = plan.scratch_bytes, len(plan.steps)
    assert sizes[3][0] == sizes[1][0]
    assert sizes[3][1] == 3 * sizes[1][1]


class Operations(TorchDispatchMode):
    """Names of what torch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(function.name().removeprefix("aten::").split(".")[0])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("masked", ["none", "tokens"])
@pytest.mark.parametrize("what", ["select", "attention", "backward"])
@every_attention
def test_torch_computes_nothing(what, implementation, masked, hopper):
    """A replay would leave it out."""
    for case in CASES.values() if what == "select" else [CASE]:
        case = case.but(masked=masked)
        inputs = inputs_of(case, what != "select", what == "backward")
        recording = Recorder(inputs, [])
        with Operations() as operations:
            if what == "select":
                select(case, recording, *inputs)
            else:
                {"attention": attention, "backward": backward}[what](case, implementation, recording, *inputs)
        assert operations.seen <= ALLOCATIONS_AND_VIEWS
