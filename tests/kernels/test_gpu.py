"""The operators on a GPU give what the oracle gives."""

from __future__ import annotations

import oracle
import pytest
import torch
from vmoba_compile.kernels.api import POOLS

import vmoba_compile

pytestmark = pytest.mark.gpu

GRID, BLOCK = (5, 7, 9), (2, 3, 4)
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def tensors(dtype: torch.dtype, heads: int = 3, head_dim: int = 40) -> list[torch.Tensor]:
    tokens = 6 + GRID[0] * GRID[1] * GRID[2]
    made = [torch.randn(2, tokens, heads, head_dim, device="cuda").to(dtype).transpose(1, 2) for _ in range(3)]
    return [x.requires_grad_() for x in made]


@pytest.mark.parametrize("dtype", LIMITS, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("pool", POOLS)
def test_forward_and_backward(pool, dtype):
    q, k, v = tensors(dtype)
    key_mask = torch.rand(2, q.shape[2], device="cuda") > 0.2
    layout = {"prefix": 4, "suffix": 2, "key_mask": key_mask, "pool": pool}
    out = vmoba_compile.attention(q, k, v, GRID, block=BLOCK, **layout)
    weight = torch.randn_like(out)
    got = torch.autograd.grad((out * weight).sum(), (q, k, v))
    copies = [x.detach().cpu().double().requires_grad_() for x in (q, k, v)]
    layout["key_mask"] = key_mask.cpu()
    expected = oracle.attention(*copies, GRID, BLOCK, **layout)
    expected = expected[0] if isinstance(expected, tuple) else expected
    grads = torch.autograd.grad((expected * weight.cpu().double()).sum(), copies)
    for a, b in zip((out, *got), (expected, *grads), strict=True):
        assert float((a.detach().cpu().double() - b.detach()).norm() / b.detach().norm()) < LIMITS[dtype]


def test_selection_does_not_depend_on_tf32():
    q, k, _ = tensors(torch.float32, head_dim=128)
    exact = vmoba_compile.select(q, k, GRID, block=BLOCK, prefix=4, suffix=2).words
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert torch.equal(vmoba_compile.select(q, k, GRID, block=BLOCK, prefix=4, suffix=2).words, exact)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    cpu = vmoba_compile.select(q.cpu(), k.cpu(), GRID, block=BLOCK, prefix=4, suffix=2).words
    assert torch.equal(cpu, exact.cpu())
