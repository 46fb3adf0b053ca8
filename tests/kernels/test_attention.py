"""Sparse attention against the oracle, forward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from kernel_cases import TOLERANCE, Case, Tensors, cases, operator, relative, sparse
from vmoba_compile.kernels import reference_attention


def test_uninitialised_memory_is_poisoned():
    """Otherwise nothing here would see an element that a kernel forgets to write."""
    x = torch.empty(1000)
    assert torch.stack([x, torch.empty_like(x), x.new_empty(1000)]).isnan().all()


def test_relative_error_sees_nan():
    x = torch.ones(3)
    assert not relative(x / 0 - x / 0, x) < 1


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@given(case=cases())
def test_equals_the_oracle(case, dtype):
    tensors = case.tensors(dtype)
    truth = case.truth(tensors)
    out = sparse(case, tensors)
    assert (out.dtype, out.shape) == (dtype, tensors.q.shape)
    assert out.is_contiguous()
    assert relative(out, truth.out) < TOLERANCE[dtype]
    again, lse = operator(case, tensors)(*tensors[:3])
    assert torch.equal(again, out)
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    rtol, atol = (1e-13, 1e-12) if dtype == torch.float64 else (1e-6, 1e-5)
    torch.testing.assert_close(lse.double(), truth.lse, rtol=rtol, atol=atol)


@pytest.mark.parametrize("pool", ["head_global", "query_head", "block", "overall"])
@pytest.mark.parametrize("masked", ["none", "tokens", "boxes", "sample"])
def test_everything_selected_is_dense_attention(pool, masked):
    case = Case(
        prefix=3, suffix=2, batch=2, heads=6, kv_heads=2, pool=pool, threshold=1.0, masked=masked, layout="packed"
    )
    q, k, v, key_mask = tensors = case.tensors()
    mask = None if key_mask is None else key_mask[:, None, None, :]
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(sparse(case, tensors), dense.nan_to_num(), rtol=0, atol=1e-12)


def test_own_box_alone():
    case = Case(grid=(4, 2, 3), block=(1, 2, 3), mode="topk", topk=1)
    q, k, v, _ = tensors = case.tensors()
    per_frame = [F.scaled_dot_product_attention(*(x[:, :, n : n + 6] for x in (q, k, v))) for n in range(0, 24, 6)]
    torch.testing.assert_close(sparse(case, tensors), torch.cat(per_frame, dim=2), rtol=0, atol=1e-12)


def test_nothing_to_attend_to():
    """Zeros and an lse of -inf in the sample without keys, the condition queries included; nothing else changes."""
    case = Case(prefix=2, batch=2, masked="sample", heads=4)
    tensors = case.tensors(torch.float32)
    out, lse = operator(case, tensors)(*tensors[:3])
    assert not out[1].any()
    assert (lse[1] == -torch.inf).all()
    first = Tensors(*(x[:1] for x in tensors[:3]), None)
    assert torch.equal(out[:1], sparse(case, first))
    assert lse[0].isfinite().all()


def test_condition_queries_see_everything():
    case = Case(prefix=3, suffix=2, mode="topk", topk=1)
    q, k, v, _ = tensors = case.tensors()
    condition = [0, 1, 2, 63, 64]
    dense = F.scaled_dot_product_attention(q, k, v)[:, :, condition]
    torch.testing.assert_close(sparse(case, tensors)[:, :, condition], dense, rtol=0, atol=1e-12)


def test_samples_do_not_see_each_other():
    case = Case(batch=3, prefix=1, suffix=2, heads=4, kv_heads=2, masked="tokens", pool="overall")
    tensors = case.tensors(torch.float32)
    out = sparse(case, tensors)
    for sample in range(3):
        alone = Tensors(*(x[sample : sample + 1] for x in tensors))
        assert torch.equal(sparse(case, alone), out[sample : sample + 1])


def test_memory_layouts_agree():
    case = Case(prefix=2, heads=4, kv_heads=2, batch=2)
    reference = sparse(case, case.but(layout="contiguous").tensors())
    for layout in ("permuted", "packed"):
        tensors = case.but(layout=layout).tensors()
        assert not tensors.q.is_contiguous()
        torch.testing.assert_close(sparse(case, tensors), reference, rtol=0, atol=1e-13)


def test_inputs_are_left_alone():
    case = Case(prefix=2, masked="tokens")
    tensors = case.tensors()
    copies = [x.clone() for x in tensors]
    sparse(case, tensors)
    assert all(map(torch.equal, tensors, copies))


@pytest.mark.parametrize("factor", [30.0, 1e4])
def test_large_scores(factor):
    """The running softmax keeps its maximum: no overflow where scores differ by thousands from box to box."""
    case = Case(prefix=2, threshold=0.5)
    q, k, v, _ = case.tensors()
    tensors = Tensors(q * factor, k, v, None)
    torch.testing.assert_close(sparse(case, tensors), case.truth(tensors).out, rtol=0, atol=1e-9)


@pytest.mark.parametrize("limit", [1, 300, 2000])
def test_cutting_into_chunks_changes_nothing(monkeypatch, limit):
    case = Case(prefix=3, suffix=2, heads=4, kv_heads=2, masked="tokens")
    tensors = case.leaves()

    def results() -> list[torch.Tensor]:
        out, lse = operator(case, tensors)(*tensors[:3])
        return [out, lse, *torch.autograd.grad(out.square().sum() + lse.sin().sum(), tensors[:3])]

    whole = results()
    monkeypatch.setitem(reference_attention.CHUNK_SCORES, "cpu", limit)
    for ours, expected in zip(results(), whole, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-11)
