"""Masks that tell tokens apart: over keys, over queries, or both at once; and masks over pairs, which are not read."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from graphs import EVERYTHING, SPARSE, VideoAttention, compiled, raster_tokens, rewritten, verdicts, video
from torch.nn import functional as F

import vmoba_compile

GRID = (2, 3, 4)
TOKENS, TEXT = 24, 5
WHOLE = TOKENS + TEXT


class Joint(VideoAttention):
    """Video and text; ``spell(seen)`` makes the mask of [batch, tokens] bool, True for what is no padding."""

    def __init__(self, spell):
        super().__init__()
        self.spell = spell

    def parts(self, x, words):
        return self.split(torch.cat([raster_tokens(self.patch(x)), words], 1))

    def forward(self, x, words, seen):
        return F.scaled_dot_product_attention(*self.parts(x, words), attn_mask=self.spell(seen))


def inputs(pad=(2, 0)):
    seen = torch.ones(2, WHOLE, dtype=torch.bool)
    for sample, count in enumerate(pad):
        seen[sample, WHOLE - count :] = False
    return video(*GRID), torch.randn(2, TEXT, 16), seen


def rows(seen):
    return seen[:, None, None, :].repeat(1, 1, WHOLE, 1)


def heads_folded(seen):
    """[batch * heads, 1, tokens] seen as [batch, heads, 1, tokens]."""
    return seen[:, None].repeat_interleave(2, dim=0).view(2, 2, 1, WHOLE)


KEYS = {
    "for each head, folded": heads_folded,
    "of one row": lambda seen: seen[:, None, None],
    "repeated": rows,
    "expanded": lambda seen: seen[:, None, None].expand(-1, 2, WHOLE, -1),
    "repeated for each head": lambda seen: seen[:, None, None].repeat(1, 2, 1, 1),
    "and another": lambda seen: seen[:, None, None] & rows(~(~seen)),
    "transposed back": lambda seen: rows(seen).transpose(2, 3).mT,
}
BOTH = {
    "outer product": lambda seen: rows(seen) & rows(seen).transpose(2, 3),
    "of broadcast parts": lambda seen: seen[:, None, None, :] & seen[:, None, :, None],
    "logical_and": lambda seen: torch.logical_and(seen[:, None, :, None], seen[:, None, None]).bool(),
    "permuted": lambda seen: (rows(seen) & rows(seen).permute(0, 1, 3, 2)).contiguous() & rows(seen),
    "of three": lambda seen: rows(seen) & (rows(seen).mT & seen[:, None, None]),
}


def wanted(model, x, words, seen, site, both):
    q, k, v = model.parts(x, words)
    out = vmoba_compile.attention(
        q, k, v, GRID, block=site.block, suffix=TEXT, threshold=SPARSE.threshold, key_mask=seen
    )  # fmt: skip
    return out * seen[:, None, :, None] if both else out


@pytest.mark.parametrize(
    ("spell", "both"),
    [*((spell, False) for spell in KEYS.values()), *((spell, True) for spell in BOTH.values())],
    ids=[*KEYS, *BOTH],
)
def test_masks_over_tokens(spell, both):
    model, given = Joint(spell), inputs()
    assert verdicts(rewritten(model, *given)) == ["rewritten"]
    capture, found = compiled(model, *given, config=SPARSE)
    expected = wanted(model, *given, capture.report.sites[0], both)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for got, want in zip(
        torch.autograd.grad(found.square().sum(), model.parameters()),
        torch.autograd.grad(expected.square().sum(), model.parameters()),
        strict=True,
    ):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_nothing_over_pairs_is_left():
    """Neither the large mask nor what made it stays in the graph."""
    capture, _ = compiled(Joint(BOTH["outer product"]), *inputs())
    for node in capture.graphs[0].graph.nodes:
        value = node.meta.get("example_value")
        assert not isinstance(value, torch.Tensor) or value.shape[-2:] != (WHOLE, WHOLE), node


def test_a_sample_that_sees_nothing():
    model = Joint(BOTH["outer product"])
    assert verdicts(rewritten(model, *inputs((WHOLE, 0)))) == ["rewritten"]


def band(seen):
    near = torch.arange(WHOLE)
    return rows(seen) & ((near[:, None] - near[None]).abs() < 9)


def written(seen):
    mask = rows(seen)
    mask[:, :, 3, 4] = False
    return mask


def written_between(seen):
    keys = rows(seen)
    both = keys & keys.mT
    keys[:, :, 3, 4] = False
    return both & keys


PAIRS = {
    "of samples in turn": lambda seen: seen[:, None].repeat(2, 1, 1).view(2, 2, 1, WHOLE),
    "a band": band,
    "either": lambda seen: rows(seen) | rows(seen).mT,  # some queries see all keys
    "but for one pair": written,
    "written after it was read": written_between,
    "of each head its own": lambda seen: rows(seen).expand(-1, 2, -1, -1) & torch.tensor([True, False])[:, None, None],
    "block causal": lambda seen: torch.ones(WHOLE, WHOLE, dtype=torch.bool).tril(6),
    "rolled": lambda seen: rows(seen) & rows(seen).mT.roll(1, 3),
    "added": lambda seen: (rows(seen).float() + rows(seen).mT.float()) > 0,
    "reshaped": lambda seen: rows(seen).reshape(2, 1, WHOLE * WHOLE).roll(3, 2).reshape(2, 1, WHOLE, WHOLE),
}


@pytest.mark.parametrize("spell", PAIRS.values(), ids=PAIRS.keys())
def test_masks_over_pairs(spell):
    assert verdicts(rewritten(Joint(spell), *inputs(), both_forms=False)) == ["mask"]


def float_mask(seen, low=-1e9):
    return torch.zeros(seen.shape).masked_fill(~seen, low)[:, None, None]


VOUCHED = dataclasses.replace(EVERYTHING, float_masks="padding")


def by_hand(q, k, v, mask):
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5 + mask, -1) @ v


def dense_masked(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class FromOutside(VideoAttention):
    def __init__(self, attend):
        super().__init__(attend=attend)

    def forward(self, x, words, mask):
        return self.attend(*self.split(torch.cat([raster_tokens(self.patch(x)), words], 1)), mask)


@pytest.mark.parametrize("attend", [dense_masked, by_hand], ids=["SDPA", "by hand"])
def test_a_float_mask_from_outside(attend):
    model = FromOutside(attend)
    x, words, seen = inputs()
    assert verdicts(rewritten(model, x, words, float_mask(seen))) == ["mask"]
    assert verdicts(rewritten(model, x, words, float_mask(seen), config=VOUCHED, both_forms=False)) == ["rewritten"]


@pytest.mark.parametrize("value", [-1.0, 0.5, float("nan")])
def test_a_float_mask_that_is_no_padding(value):
    x, words, seen = inputs()
    fast = vmoba_compile.optimize(FromOutside(dense_masked), VOUCHED, inner="eager")
    fast(x, words, float_mask(seen))
    with pytest.raises(RuntimeError, match="float_masks='padding', but a mask holds"):
        fast(x, words, float_mask(seen, value))


def test_a_learned_mask_is_no_padding():
    class Model(FromOutside):
        def __init__(self):
            super().__init__(dense_masked)
            self.bias = torch.nn.Parameter(torch.zeros(1, 1, 1, WHOLE))

        def forward(self, x, words):
            return super().forward(x, words, self.bias)

    model, (x, words, _) = Model(), inputs()
    fast = vmoba_compile.optimize(model, VOUCHED, inner="eager")
    fast(x, words).square().sum().backward()
    assert verdicts(vmoba_compile.report(fast)) == ["mask"] and model.bias.grad is not None
