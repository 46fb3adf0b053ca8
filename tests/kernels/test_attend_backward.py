"""The Triton kernels of the backward against autograd through the oracle: on a GPU, or in the Triton interpreter."""

from __future__ import annotations

from types import SimpleNamespace

import interpreter
import pytest
import torch
from hypothesis import Phase, given, settings
from kernel_cases import DEVICE, LAYOUTS, MASKS, TOLERANCE, Case, Tensors, cases, choose, mask_or_empty, relative
from vmoba_compile.kernels import (
    attend,
    attend_backward,
    attend_lists,
    attend_triton,
    backward_triton,
    launches,
    partition,
)
from vmoba_compile.kernels.api import attention

ON_GPU = torch.cuda.is_available()
HAS_HOPPER = ON_GPU and torch.cuda.get_device_capability() == (9, 0)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The kernels for Hopper take 16 bits alone.
WITH_DTYPE = [("triton", torch.float32)] + [("hopper", torch.bfloat16), ("hopper", torch.float16)] * HAS_HOPPER

every_implementation = pytest.mark.parametrize(
    ("implementation", "dtype"), WITH_DTYPE, ids=[f"{name}-{dtype}" for name, dtype in WITH_DTYPE]
)
interpreter.install()

CASE = Case(grid=(3, 4, 5), block=(2, 2, 3), prefix=3, suffix=5, batch=1, heads=2, kv_heads=1, head_dim=40)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Small tiles and groups, so that tiny problems have many of them."""
    if not ON_GPU:
        monkeypatch.setattr(attend_lists, "GROUP", 16)
        monkeypatch.setattr(attend_lists, "TILE", 16)
        monkeypatch.setattr(backward_triton, "TILE", 16)
        monkeypatch.setattr(attend_triton, "TILE", 16)
        monkeypatch.setattr(attend_backward, "QUERIES", 16)


def gradients(
    case: Case, tensors: Tensors, implementation: str, words: torch.Tensor | None = None, lse_too=False,
    dout_dtype: torch.dtype | None = None, loss_scale: float = 1.0, shift: int = 0, **options,
):  # fmt: skip
    """dq, dk, dv of the operator for a random gradient of ``out`` in the layout of projections, on the device."""
    words = choose(case, tensors).words if words is None else words
    q, k, v, words, mask = (x.to(DEVICE) for x in (*tensors[:3], words, mask_or_empty(tensors)))
    rule = {"scale": case.op_scale, "tile": case.tile}
    out, lse = torch.ops.vmoba.attention(q, k, v, words, mask, *case.sizes, implementation="reference", **rule)
    generator = torch.Generator().manual_seed(case.seed)
    shape = case.batch, case.num_tokens, case.heads, case.head_dim
    dout = loss_scale * torch.randn(shape, generator=generator).to(dout_dtype or q.dtype)
    dout = dout.to(device=DEVICE, dtype=q.dtype).transpose(1, 2)
    if shift:
        memory = torch.empty(shift + dout.numel(), dtype=q.dtype, device=DEVICE)
        dout = memory[shift:].view(dout.shape).copy_(dout)
    dlse = torch.randn(lse.shape, generator=generator).to(lse) if lse_too else lse.new_empty(0)
    result = torch.ops.vmoba.attention_backward(
        dout, q, k, v, words, mask, out, lse, dlse, *case.sizes, implementation=implementation, **rule, **options
    )
    return [x.cpu() for x in result]


def check(case: Case, dtype: torch.dtype, implementation: str = "triton", lse_too=False, **options) -> None:
    """Against the reference, which is held to autograd through the oracle, in float64 on the same numbers.

    Where gradients cancel float32 itself is further off than the tolerance: then by a few times as much as the reference.
    """
    tensors = case.tensors(dtype)
    words = choose(case, tensors).words
    as_float64 = tensors._replace(**{name: getattr(tensors, name).double() for name in "qkv"})
    exact = gradients(case, as_float64, "reference", words, lse_too, dtype)
    reference = gradients(case, tensors, "reference", words, lse_too)
    got = gradients(case, tensors, implementation, words, lse_too, **options)
    norms = [torch.linalg.vector_norm(x).item() for x in exact]
    for name, mine, theirs, wanted, norm in zip("qkv", got, reference, exact, norms, strict=True):
        assert mine.dtype == dtype
        assert mine.is_contiguous()
        error, own = (torch.linalg.vector_norm(x.double() - wanted).item() for x in (mine, theirs))
        assert error <= max(TOLERANCE[dtype] * max(norm, 0.1 * max(norms)), 4 * own), name


@settings(max_examples=60 if ON_GPU else 4, phases=[Phase.explicit, Phase.generate], deadline=None)
@given(case=cases())
def test_equals_the_reference(case):
    check(case, torch.float32)


@settings(max_examples=120, phases=[Phase.explicit, Phase.generate], deadline=None)
@given(case=cases())
@pytest.mark.skipif(not HAS_HOPPER, reason="needs a GPU of compute capability 9.0")
def test_hopper_equals_the_reference(case):
    check(case.but(head_dim=8 * -(-case.head_dim // 8)), torch.bfloat16, "hopper")


SIZES = [(8, torch.float32), (40, torch.bfloat16), (64, torch.float16), (72, torch.float32), (128, torch.bfloat16)]
if ON_GPU:  # the interpreter is slow
    SIZES = [(head_dim, dtype) for head_dim in (8, 40, 64, 72, 128) for dtype in DTYPES]


@pytest.mark.parametrize(("head_dim", "dtype"), SIZES, ids=[f"{head_dim}-{dtype}" for head_dim, dtype in SIZES])
def test_head_sizes(head_dim, dtype):
    check(CASE.but(head_dim=head_dim, grid=(3, 4, 4)), dtype)
    if HAS_HOPPER and dtype != torch.float32:
        check(CASE.but(head_dim=head_dim, grid=(9, 11, 13), block=(4, 5, 6)), dtype, "hopper")


@pytest.mark.parametrize("head_dim", [3, 200, 256] if ON_GPU else [3, 200])
def test_odd_and_large_head_sizes(head_dim):
    check(CASE.but(head_dim=head_dim, grid=(2, 3, 4)), torch.float32)


@every_implementation
@pytest.mark.parametrize("masked", MASKS)
def test_masks(masked, implementation, dtype):
    check(CASE.but(masked=masked, batch=2), dtype, implementation)


@every_implementation
@pytest.mark.parametrize("layout", LAYOUTS if ON_GPU else ["permuted"])
def test_layouts(layout, implementation, dtype):
    check(CASE.but(layout=layout, batch=2, heads=4, kv_heads=2), dtype, implementation)


@every_implementation
def test_gradient_of_the_log_sum_exp(implementation, dtype):
    check(CASE.but(batch=2), dtype, implementation, lse_too=True)


@every_implementation
@pytest.mark.parametrize("pool", ["overall", "head_global"])
def test_little_memory(pool, implementation, dtype, tight):
    case = CASE.but(heads=4, kv_heads=2, batch=2) if ON_GPU else CASE.but(heads=4, kv_heads=2, grid=(2, 3, 4))
    check(case, dtype, implementation, pool=pool, threshold=case.threshold)


@pytest.mark.parametrize("tile", [64, 128])
def test_tiles_of_queries(tile, monkeypatch):
    monkeypatch.setitem(partition.TILE_OF, "tile", tile)
    check(CASE.but(tile=tile, grid=(4, 6, 8), block=(2, 6, 8)), torch.float32)


@every_implementation
def test_same_bits_every_time(implementation, dtype, tight):
    tensors = CASE.tensors(dtype)
    first, second = (gradients(CASE, tensors, implementation) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every_implementation
def test_more_pairs_than_the_rule_allows_is_nan(implementation, dtype):
    case = Case(grid=(4, 6, 6), block=(1, 1, 2), heads=2, kv_heads=2, head_dim=64, threshold=1.0)
    for x in gradients(case, case.tensors(dtype), implementation, threshold=0.01):
        assert x.isnan().all()


@every_implementation
def test_nan_stays_with_its_query_and_its_boxes(implementation, dtype):
    """Keys of boxes that a query has not selected do not get its NaN."""
    case = CASE.but(prefix=0, suffix=0, heads=1, batch=1)
    tensors = case.tensors(dtype)
    selection = choose(case, tensors)
    tensors.q[0, 0, 20] = torch.nan
    dq, dk, _ = gradients(case, tensors, implementation, selection.words)
    assert dq[0, 0].isnan().any(-1).nonzero().flatten().tolist() == [20]
    boxes = selection.mask()[0, 0, 20]
    assert torch.equal(dk[0, 0].isnan().any(-1), boxes[partition.box_of(case.grid, case.block)])


@every_implementation
def test_large_gradients_in_float16(implementation, dtype):
    """A scaled loss: what is left of a query's partial gradients must not overflow where the gradient itself does not."""
    dtype = torch.float16
    case = Case(grid=(2, 4, 4), block=(2, 2, 4), heads=1, kv_heads=1, head_dim=128)
    got, exact = (
        gradients(case, case.tensors(dtype), name, loss_scale=6000.0) for name in (implementation, "reference")
    )
    for mine, theirs in zip(got, exact, strict=True):
        assert theirs.isfinite().all()
        assert relative(mine, theirs) < TOLERANCE[dtype]


@every_implementation
def test_misaligned_gradient_of_the_output(implementation, dtype):
    """Contiguous, but not at a multiple of 16 bytes, as the gradient of a concatenation's part."""
    tensors = CASE.tensors(dtype)
    aligned, shifted = (gradients(CASE, tensors, implementation, shift=shift) for shift in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(aligned, shifted, strict=True))


@pytest.mark.parametrize("batch", [1, 3, 4, 16])
@pytest.mark.parametrize("by_head", [True, False], ids=["by_head", "of_all"])
def test_partial_gradients_are_counted_in_32_bits(by_head, batch, monkeypatch):
    """No buffer of partial gradients has 2**31 elements, however much memory the tensors allow."""
    largest = 0

    class Launches(launches.Work):
        def launch(self, kernel, grid, *args, **options):
            nonlocal largest
            if kernel is attend_backward.add_up:
                largest = max(largest, args[0].numel())

    heads, geometry = 40, partition.Geometry((33, 45, 80), (11, 15, 20))
    q = torch.empty(batch, heads, geometry.num_tokens, 128, dtype=torch.bfloat16, device="meta")
    words = torch.empty(batch, heads, geometry.num_tokens, geometry.num_words, dtype=torch.int32, device="meta")
    lse, nothing = torch.empty(q.shape[:3], device="meta"), torch.empty(0, device="meta")
    monkeypatch.setattr(attend, "why_not_hopper", lambda q, k, v: "")
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    attend.attention_backward(
        Launches(torch.device("meta")), q, q, q, q, words, nothing.bool(), q, lse, nothing, geometry, 0.1,
        implementation="hopper", share=0.25, by_head=by_head,
    )  # fmt: skip
    assert 0 < largest < 2**31


@every_implementation
def test_autograd_keeps_the_implementation(implementation, dtype):
    tensors = CASE.tensors(dtype)
    q, k, v = (x.to(DEVICE).requires_grad_() for x in tensors[:3])
    words, mask = choose(CASE, tensors).words.to(DEVICE), mask_or_empty(tensors).to(DEVICE)
    grads = {}
    for name in ("reference", implementation):
        out, lse = torch.ops.vmoba.attention(
            q, k, v, words, mask, *CASE.sizes, scale=CASE.op_scale, implementation=name
        )
        grads[name] = torch.autograd.grad(out.sin().sum() + lse.cos().sum(), (q, k, v))
    for a, b in zip(*grads.values(), strict=True):
        assert relative(a.cpu(), b.cpu()) < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@every_implementation
def test_many_tiles(implementation, dtype, head_dim):
    """Programs that go through many tiles and many blocks of keys: what is in shared memory is used again and again."""
    case = Case(grid=(12, 24, 40), block=(6, 12, 10), suffix=77, heads=2, kv_heads=2, head_dim=head_dim)
    check(case, dtype, implementation)


@pytest.mark.gpu
@every_implementation
def test_cuda_graph(implementation, dtype):
    """Forward and backward in one graph, replayed on other numbers."""
    case = Case(grid=(9, 13, 17), block=(3, 5, 6), prefix=19, suffix=45, heads=4, kv_heads=2, head_dim=64)
    q, k, v = (x.to(DEVICE).requires_grad_() for x in case.tensors(dtype)[:3])
    others = [x.to(DEVICE) for x in case.but(seed=1).tensors(dtype)[:3]]

    def step():
        out = attention(q, k, v, case.grid, block=case.block, implementation=implementation, **case.layout_arguments)
        return torch.autograd.grad(out.float().square().sum(), (q, k, v))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    with torch.no_grad():
        for x, y in zip((q, k, v), others, strict=True):
            x.copy_(y)
    graph.replay()
    for got, wanted in zip(results, step(), strict=True):
        assert torch.equal(got, wanted)
