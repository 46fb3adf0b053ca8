"""Gradients of sparse attention: against numerical differences, and against autograd through the oracle."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from kernel_cases import TOLERANCE, Case, Tensors, cases, operator, sparse

CASES = {
    "plain": Case(grid=(2, 3, 2), block=(1, 2, 2), head_dim=3),
    "condition": Case(grid=(2, 2, 3), block=(2, 1, 2), head_dim=3, prefix=2, suffix=1),
    "mask": Case(grid=(2, 3, 2), block=(1, 2, 2), head_dim=3, batch=2, prefix=1, suffix=1, masked="tokens"),
    "masked_boxes": Case(grid=(4, 2, 2), block=(1, 2, 2), head_dim=3, suffix=1, masked="boxes"),
    "grouped_heads": Case(grid=(2, 2, 2), block=(1, 2, 1), head_dim=5, heads=6, kv_heads=2, prefix=1),
    "topk": Case(grid=(3, 2, 2), block=(1, 1, 2), head_dim=4, mode="topk", topk=2, pool="query_head"),
    "scale": Case(grid=(2, 2, 2), block=(1, 2, 2), head_dim=3, scale=1.5),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def norm(x: torch.Tensor) -> float:
    return torch.linalg.vector_norm(x.double()).item()


def check(case: Case, dtype: torch.dtype, *, floor: float, from_rounded_out: bool) -> None:
    """Compare with autograd through the oracle; ``floor``: the part of the three gradients' common norm that an error
    is at least measured by."""
    tensors = case.leaves(dtype)
    truth = case.truth(tensors)
    generator = torch.Generator().manual_seed(case.seed)
    # Rounded beforehand: both sides get the same incoming gradient.
    weight = torch.randn(truth.out.shape, generator=generator, dtype=torch.float64).to(dtype)
    out = sparse(case, tensors)
    ours = torch.autograd.grad(out, tensors[:3], weight)
    change = ((truth.out - out.double()) * weight.double()).sum(-1).detach() * from_rounded_out
    expected = torch.autograd.grad([truth.out, truth.lse], tensors[:3], [weight.double(), change])
    common = math.hypot(*map(norm, expected))
    for name, x, got, wanted in zip("qkv", tensors, ours, expected, strict=False):
        assert (got.dtype, got.shape) == (dtype, x.shape)
        assert norm(got.double() - wanted.double()) <= TOLERANCE[dtype] * max(norm(wanted), floor * common), name


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@given(case=cases())
def test_equal_the_oracle(case, dtype):
    """The gradients of q and k are differences, and cancel where a query sees one key or two.

    What is left then is the rounding of the forward pass's ``out``, from which the backward pass takes the row sums of
    dout * out. Their error acts as a gradient of lse, and the oracle is given the same.
    """
    check(case, dtype, floor=0.1, from_rounded_out=True)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("head_dim", [40, 64])
def test_each_equals_the_oracle(dtype, head_dim):
    case = Case((4, 6, 8), (2, 3, 4), prefix=5, suffix=2, heads=4, kv_heads=2, head_dim=head_dim, masked="tokens")
    check(case, dtype, floor=0.0, from_rounded_out=False)


@every_case
def test_equal_numerical_differences(case):
    """``torch.autograd.gradcheck``, with the selection held as it is."""
    tensors = case.leaves()
    attend = operator(case, tensors)
    alive = attend(*tensors[:3])[1].isfinite()

    def results(q, k, v):
        out, lse = attend(q, k, v)
        return out, lse[alive]

    assert torch.autograd.gradcheck(results, tensors[:3], fast_mode=True)


@every_case
def test_through_lse(case):
    tensors = case.leaves()
    truth = case.truth(tensors)
    alive = truth.pairs.any(-1)
    out, lse = operator(case, tensors)(*tensors[:3])
    for ours, expected in [
        (lse[alive].sin().sum(), truth.lse[alive].sin().sum()),
        (lse[alive].sin().sum() + out.cos().sum(), truth.lse[alive].sin().sum() + truth.out.cos().sum()),
    ]:
        got = torch.autograd.grad(ours, tensors[:3], retain_graph=True, allow_unused=True)
        wanted = torch.autograd.grad(expected, tensors[:3], retain_graph=True, allow_unused=True)
        for x, y in zip(got, wanted, strict=True):
            torch.testing.assert_close(x, torch.zeros_like(x) if y is None else y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("wanted", ["q", "k", "v", "qk", "qv", "kv"])
def test_only_some_inputs(wanted):
    case = CASES["mask"]
    everything = case.leaves()
    sparse(case, everything).square().sum().backward()
    some = Tensors(
        *(x.detach().requires_grad_(name in wanted) for name, x in zip("qkv", everything, strict=False)),
        everything.key_mask,
    )
    sparse(case, some).square().sum().backward()
    for name, x, reference in zip("qkv", some, everything, strict=False):
        if name in wanted:
            assert torch.equal(x.grad, reference.grad)
        else:
            assert x.grad is None


def test_nothing_to_attend_to_has_no_gradient():
    case = Case(batch=2, prefix=1, masked="sample")
    tensors = case.leaves()
    sparse(case, tensors).square().sum().backward()
    for x in tensors[:3]:
        assert not x.grad[1].any()
        assert x.grad[0].any()


def test_masked_keys_have_no_gradient():
    case = Case(batch=2, prefix=2, suffix=2, masked="tokens")
    tensors = case.leaves()
    sparse(case, tensors).square().sum().backward()
    removed = ~tensors.key_mask[:, None, :, None]
    for x in (tensors.k, tensors.v):
        assert not x.grad.masked_select(removed).any()
        assert x.grad.masked_select(~removed).all()


def test_broadcast_incoming_gradient():
    """``sum().backward()`` hands over an expanded scalar, without memory of its own."""
    case = CASES["condition"]
    tensors = case.leaves()
    ours = torch.autograd.grad(sparse(case, tensors).sum(), tensors[:3])
    for x, y in zip(ours, torch.autograd.grad(case.truth(tensors).out.sum(), tensors[:3]), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


def test_second_derivative_is_refused():
    case = CASES["plain"]
    tensors = case.leaves()
    (grad,) = torch.autograd.grad(sparse(case, tensors).square().sum(), tensors.q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_autograd(mode):
    case = Case(grid=(3, 2, 5), block=(2, 2, 2), prefix=1, heads=3, kv_heads=1)
    tensors = case.leaves()
    with mode():
        out = sparse(case, tensors)
    assert out.grad_fn is None
    assert not out.requires_grad
    # What the first call cached under inference mode serves training too.
    trained = sparse(case, tensors)
    trained.sum().backward()
    assert torch.equal(trained, out)


def test_one_training_step_lowers_the_loss():
    case = Case(prefix=2, heads=4, kv_heads=2, layout="packed")
    tensors = case.leaves(torch.float32)
    target = torch.randn(tensors.q.shape)
    before = (sparse(case, tensors) - target).square().mean()
    grads = torch.autograd.grad(before, tensors[:3])
    moved = Tensors(*(x - 1.0 * g for x, g in zip(tensors, grads, strict=False)), None)
    assert (sparse(case, moved) - target).square().mean() < before
