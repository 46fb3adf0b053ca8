"""Orders of heads: permutations that even out the ranks' loads, and weights permuted by them."""

from __future__ import annotations

import itertools
import types

import pytest
import torch
from graphs import VideoAttention, video
from rich.console import Console
from torch import nn
from vmoba_compile.passes import Report

import vmoba_compile
from vmoba_compile import VMoBAConfig, balance


def test_imbalance_by_hand():
    density = torch.tensor([[0.1, 0.1, 0.3, 0.5], [0.2, 0.2, 0.2, 0.2], [0.0, 0.0, 0.0, 0.0]])
    assert balance.imbalance(density, 2).tolist() == pytest.approx([1.6, 1.0, 0.0])
    order = torch.tensor([[0, 3, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3]])
    assert balance.imbalance(density, 2, order).tolist() == pytest.approx([1.2, 1.0, 0.0])
    assert balance.imbalance(density, 4).tolist()[0] == pytest.approx(2.0)


def test_head_order_by_hand():
    density = torch.tensor([[0.5, 0.4, 0.2, 0.1]])
    assert balance.head_order(density, 2).tolist() == [[0, 3, 1, 2]]
    assert balance.head_order(density, 1).tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize(("heads", "ranks", "group"), [(12, 2, 1), (12, 4, 1), (40, 8, 1), (16, 2, 4), (16, 4, 2)])
def test_orders_are_better_permutations(heads, ranks, group):
    density = torch.rand(20, heads) ** 3
    order = balance.head_order(density, ranks, group=group)
    assert torch.equal(order.sort(1).values, torch.arange(heads).expand(20, heads))
    groups = order.unflatten(1, (-1, group))
    assert torch.equal(groups, groups[..., :1] // group * group + torch.arange(group)), "groups stay together"
    before, after = balance.imbalance(density, ranks), balance.imbalance(density, ranks, order)
    assert bool((after <= before).all()) and after.mean() < before.mean()


def test_near_the_best():
    """Against every way to halve eight heads: the greedy order is within a twentieth on the mean."""
    density = torch.rand(10, 8)
    best = []
    for row in density:
        halves = (sum(row[i] for i in half) for half in itertools.combinations(range(8), 4))
        best.append(min(max(half, row.sum() - half) for half in halves) / (row.sum() / 2))
    found = balance.imbalance(density, 2, balance.head_order(density, 2))
    assert 1 <= float((found / torch.tensor(best)).mean()) < 1.05


def not_measured() -> Report:
    """One attention that was rewritten."""
    return vmoba_compile.explain(VideoAttention(), video(), config=VMoBAConfig(min_tokens=0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: balance.imbalance(torch.ones(2, 6), 4), "6 heads cannot be spread"),
        (lambda: balance.imbalance(torch.ones(6), 2), r"must be \[layers, heads\]"),
        (lambda: balance.imbalance(torch.full((1, 2), torch.nan), 2), "negative or NaN"),
        (lambda: balance.imbalance(torch.ones(2, 4), 2, torch.zeros(2, 4, dtype=torch.int64)), "every head once"),
        (lambda: balance.imbalance(torch.ones(2, 4), 2, torch.zeros(2, 3, dtype=torch.int64)), "order must be"),
        (lambda: balance.head_order(torch.ones(2, 6), 3, group=4), "cannot be spread"),
        (lambda: balance.head_order(torch.ones(2, 6), 0), "at least 1"),
        (lambda: balance.densities(Report()), r"no rewritten attention \(.*min_tokens=0"),
        (lambda: balance.densities(not_measured()), "no densities"),
    ],
)
def test_what_does_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()


class Attention(nn.Module):
    """``joint``: one projection to q, k and v. Four query heads share ``4 // key_heads`` key heads each."""

    def __init__(self, joint: bool, key_heads: int = 4, across: bool = True) -> None:
        super().__init__()
        self.joint, self.key_heads = joint, key_heads
        if joint:
            self.qkv = nn.Linear(32, 96)
        else:
            self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 8 * key_heads), nn.Linear(32, 8 * key_heads)
        self.norm = nn.RMSNorm(32) if across else nn.Identity()  # over all heads, as Wan has it
        self.out = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1) if self.joint else (self.q(x), self.k(x), self.v(x))
        q, k, v = (y.unflatten(-1, (-1, 8)).transpose(1, 2) for y in (self.norm(q), k, v))
        y = vmoba_compile.attention(q, k, v, (4, 4, 4), block=(2, 2, 2))
        return self.out(y.transpose(1, 2).flatten(2))


def random_attention(**options) -> Attention:
    model = Attention(**options)
    for x in model.parameters():
        nn.init.normal_(x, std=0.5)
    return model


ORDER = torch.tensor([2, 0, 3, 1])


@pytest.mark.parametrize("joint", [False, True])
def test_permuted_weights_compute_the_same(joint):
    model, x = random_attention(joint=joint), torch.randn(2, 64, 32)
    before, wanted = {name: p.clone() for name, p in model.named_parameters()}, model(x)
    made = [model.qkv] if joint else [model.q, model.k, model.v]
    balance.permute_heads(ORDER, rows=[*made, model.norm], columns=[model.out], head_size=8)
    assert not torch.equal(made[0].weight, before["qkv.weight" if joint else "q.weight"])
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)
    balance.permute_heads(ORDER.argsort(), rows=[*made, model.norm], columns=[model.out], head_size=8)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_groups_share_their_key_heads():
    model, x = random_attention(joint=False, key_heads=2), torch.randn(1, 64, 32)
    wanted = model(x)
    order = torch.tensor([2, 3, 0, 1])
    balance.permute_heads(order, rows=[model.q, model.norm], columns=[model.out], head_size=8)
    balance.permute_heads(order[::2] // 2, rows=[model.k, model.v], head_size=8)
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)


def test_nothing_is_changed_where_something_does_not_fit():
    model = random_attention(joint=False)
    before = model.q.weight.clone()
    for rows, message in (([model.q, nn.RMSNorm(8)], "stays as it is"), ([model.q, nn.Identity()], "no weight")):
        with pytest.raises(ValueError, match=message):
            balance.permute_heads(ORDER, rows=rows, columns=[model.out], head_size=8)
    with pytest.raises(ValueError, match="every head once"):
        balance.permute_heads(torch.tensor([0, 0, 1, 2]), rows=[model.q], head_size=8)
    sharded = nn.Linear(32, 32)
    sharded.weight.full_tensor = types.MethodType(lambda self: self, sharded.weight)
    with pytest.raises(TypeError, match="before fully_shard"):
        balance.permute_heads(ORDER, rows=[model.q, sharded], head_size=8)
    assert torch.equal(model.q.weight, before)


def test_wan_from_measurement_to_permutation():
    """Densities of a measured Wan; its permuted weights give its output, and the loads that were predicted."""
    pytest.importorskip("diffusers")
    from vmoba_compile.zoo import preset

    model, inputs = preset("tiny-wan").build(device="cpu", num_attention_heads=4, grid=(4, 6, 8))
    with torch.no_grad():
        for block in model.blocks:
            block.attn1.norm_q.weight.mul_(torch.tensor([0.1, 0.1, 30.0, 30.0]).repeat_interleave(12))
    config = VMoBAConfig(min_tokens=0)
    density = balance.densities(vmoba_compile.measure(model, config=config, **inputs))
    assert density.shape == (3, 4)
    order = balance.head_order(density, 2)
    fast = vmoba_compile.optimize(model, config, inner="eager", expect=3)
    with torch.no_grad():
        wanted = fast(**inputs).sample
        for block, heads in zip(model.blocks, order, strict=True):
            a = block.attn1
            rows = [a.to_q, a.to_k, a.to_v, a.norm_q, a.norm_k]
            balance.permute_heads(heads, rows=rows, columns=[a.to_out[0]], head_size=12)
        torch.testing.assert_close(fast(**inputs).sample, wanted, rtol=1e-4, atol=1e-5)
    after = balance.densities(vmoba_compile.measure(model, config=config, **inputs))
    torch.testing.assert_close(after, density.gather(1, order), rtol=0.02, atol=1e-3)
    predicted = balance.imbalance(density, 2, order)
    torch.testing.assert_close(balance.imbalance(after, 2), predicted, rtol=0.02, atol=1e-3)
    assert (predicted < balance.imbalance(density, 2)).any()
    console = Console(width=100, record=True)
    console.print(balance.table(density, 2))
    shown = console.export_text()
    assert "attention gains" in shown and shown.splitlines()[-1].split()[0] == "all"
