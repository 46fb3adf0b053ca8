"""Attention as people write it by hand, captured by Dynamo and exported: it must be found, and compute what it did."""

from __future__ import annotations

import math

import pytest
import torch
from graph_runs import same_gradients, several
from graphs import VideoAttention, compiled, exported, raster_tokens, rewritten, verdicts, video
from torch.nn import functional as F

LOWEST = torch.finfo(torch.float32).min
KEEP = torch.arange(24)[None] < torch.tensor([[17], [24]])

# Query, key and value are [batch, heads, tokens, head_dim], keep is a bool mask [batch, tokens], False for padding.


def plain(q, k, v, keep):
    return (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1) @ v


def property_mt(q, k, v, keep):
    return torch.softmax(q @ k.mT, -1) @ v


def scale_on_both(q, k, v, keep):
    scale = q.shape[-1] ** -0.25
    return ((q * scale) @ (k * scale).transpose(-1, -2)).softmax(-1) @ v


def scale_as_tensor(q, k, v, keep):
    return (q @ k.mT / torch.sqrt(torch.tensor(8.0))).softmax(-1) @ v


def scale_in_place(q, k, v, keep):
    scores = q @ k.mT
    scores *= 0.3
    return scores.softmax(-1) @ v


def with_alpha(q, k, v, keep):
    q, k, v = (t.reshape(-1, 24, 8) for t in (q, k, v))
    empty = torch.empty(4, 24, 24)
    scores = torch.baddbmm(empty, q, k.transpose(-1, -2), beta=0, alpha=0.3)
    return torch.bmm(scores.softmax(dim=-1).to(q.dtype), v).reshape(2, 2, 24, 8)


def letters_and_spaces(q, k, v, keep):
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    weights = (torch.einsum("b i d, b j d -> b i j", q, k) * 0.3).softmax(dim=-1)
    return torch.einsum("b i j, b j d -> b i d", weights, v).unflatten(0, (2, 2))


def ellipsis(q, k, v, keep):
    weights = (torch.einsum("...id,...jd->...ij", q, k) * 0.3).softmax(-1)
    return torch.einsum("...ij,...jd->...id", weights, v)


def tokens_before_heads(q, k, v, keep):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.3).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)


def tokens_first(q, k, v, keep):
    q, k, v = (t.permute(2, 0, 1, 3) for t in (q, k, v))
    weights = (torch.einsum("sbhd,tbhd->bhst", q, k) * 0.3).softmax(-1)
    return torch.einsum("bhst,tbhd->sbhd", weights, v)


def channels_before_tokens(q, k, v, keep):
    """The U-Nets' way: one head is [channels, tokens]."""
    q, k, v = (t.transpose(2, 3).flatten(0, 1) for t in (q, k, v))
    scale = 1 / math.sqrt(math.sqrt(q.shape[1]))
    weight = torch.einsum("bct,bcs->bts", q * scale, k * scale)
    weight = torch.softmax(weight.float(), dim=-1).type(weight.dtype)
    return torch.einsum("bts,bcs->bct", weight, v)


def transposed_weights(q, k, v, keep):
    q, k, v = (t.transpose(2, 3).flatten(0, 1) for t in (q, k, v))
    weights = torch.bmm(q.permute(0, 2, 1), k) * 8**-0.5
    weights = F.softmax(weights, dim=2)
    return torch.bmm(v, weights.permute(0, 2, 1))


def keys_by_queries(q, k, v, keep):
    weights = (k @ q.mT * 0.3).softmax(-2)
    return (v.mT @ weights).mT


def five_dimensions(q, k, v, keep):
    q, k, v = (t[:, None] for t in (q, k, v))
    return (q @ k.transpose(-1, -2)).softmax(-1) @ v


def image_models(q, k, v, keep):
    """As in libraries of image models: the scale on the query, dropout that is off, heads joined at the end."""
    q = q * 8**-0.5
    weights = q @ k.transpose(-2, -1)
    weights = weights.softmax(dim=-1)
    weights = F.dropout(weights, 0.0, training=True)
    return (weights @ v).transpose(1, 2).reshape(2, 24, 16)


def language_models(q, k, v, keep):
    """As in libraries of language models: a mask that is added, a softmax in float32, dropout in training alone."""
    mask = torch.where(keep[:, None, None, :], 0.0, LOWEST)
    weights = torch.matmul(q, k.transpose(2, 3)) * 0.3
    weights = weights + mask[:, :, :, : k.shape[-2]]
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
    weights = F.dropout(weights, p=0.1, training=False)
    return torch.matmul(weights, v).transpose(1, 2).contiguous()


def repeated_keys(q, k, v, keep):
    """A key for a group of heads, repeated for each."""

    def repeat(t):
        batch, heads, tokens, width = t.shape
        return t[:, :, None].expand(batch, heads, 2, tokens, width).reshape(batch, heads * 2, tokens, width)

    k, v = repeat(k[:, :1]), repeat(v[:, :1])
    return (q @ k.mT * 0.3).softmax(-1) @ v


def shared_keys(q, k, v, keep):
    k, v = k[:, 0], v[:, 0]
    weights = (torch.einsum("bhid,bjd->bhij", q, k) * 0.3).softmax(-1)
    return torch.einsum("bhij,bjd->bhid", weights, v)


def cosines(q, k, v, keep):
    return (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * 5.0).softmax(-1) @ v


def stable_by_max(q, k, v, keep):
    scores = q @ k.mT * 0.3
    scores = scores - torch.max(scores, dim=-1, keepdim=True)[0]
    exp = scores.exp()
    return (exp / torch.sum(exp, dim=-1, keepdim=True)) @ v


def stable_by_values(q, k, v, keep):
    scores = q @ k.mT * 0.3
    exp = (scores - scores.max(dim=-1, keepdim=True).values.detach()).exp()
    return exp @ v / exp.sum(dim=-1, keepdim=True)


def logsumexp(q, k, v, keep):
    scores = q @ k.mT * 0.3
    return torch.exp(scores - torch.logsumexp(scores, dim=-1, keepdim=True)) @ v


def filled_in_place(q, k, v, keep):
    scores = q @ k.mT
    scores.masked_fill_(keep.logical_not()[:, None, None, :], float("-inf"))
    return scores.softmax(-1) @ v


def where(q, k, v, keep):
    scores = q @ k.mT
    return torch.where(keep[:, None, None], scores, torch.finfo(scores.dtype).min).softmax(-1) @ v


def where_of_a_tensor(q, k, v, keep):
    low = torch.full([], LOWEST, dtype=q.dtype)
    return torch.where(keep[:, None, None], q @ k.mT, low).softmax(-1) @ v


def one_minus_mask(q, k, v, keep):
    bias = (1.0 - keep[:, None, None].to(q.dtype)) * -10000.0
    return (q @ k.mT * 0.3 + bias).softmax(-1) @ v


def one_minus_mask_lowest(q, k, v, keep):
    bias = (1 - keep[:, None, None].float()) * torch.finfo(q.dtype).min
    return (q @ k.mT + bias).softmax(-1) @ v


def bias_filled_in_place(q, k, v, keep):
    bias = torch.zeros_like(keep, dtype=q.dtype)
    bias.masked_fill_(keep.logical_not(), float("-inf"))
    return (q @ k.mT + bias[:, None, None]).softmax(-1) @ v


def bias_for_folded_heads(q, k, v, keep):
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    bias = (1 - keep.repeat_interleave(2, dim=0)[:, None].float()) * -1e9
    return (torch.bmm(q, k.mT) + bias).softmax(-1) @ v


def bias_first(q, k, v, keep):
    """The bias goes into the product, times beta."""
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    bias = torch.where(keep[:, None, None].expand(2, 2, 1, 24).reshape(4, 1, 24), 0.0, -1e9).expand(4, 24, 24)
    return torch.baddbmm(bias, q, k.mT, alpha=0.3).softmax(-1) @ v


def two_masks(q, k, v, keep):
    scores = (q @ k.mT).masked_fill(~keep[:, None, None], -1e9) * 0.3
    scores = scores.masked_fill(torch.arange(24) % 7 == 3, -torch.inf)
    return scores.softmax(-1) @ v


WAYS = [
    plain, property_mt, scale_on_both, scale_as_tensor, scale_in_place, with_alpha, letters_and_spaces, ellipsis,
    tokens_before_heads, tokens_first, channels_before_tokens, transposed_weights, keys_by_queries, five_dimensions,
    image_models, language_models, repeated_keys, shared_keys, cosines, stable_by_max, stable_by_values, logsumexp,
    filled_in_place, where, where_of_a_tensor, one_minus_mask, one_minus_mask_lowest, bias_filled_in_place,
    bias_for_folded_heads, bias_first, two_masks,
]  # fmt: skip
GROUPS = [WAYS[i::3] for i in range(3)]


@pytest.mark.parametrize("ways", GROUPS, ids=["first", "second", "third"])
def test_by_hand(ways):
    report = rewritten(several(*ways).eval(), video(), KEEP)
    found = {way.__name__: (site.reason.value, site.detail) for way, site in zip(ways, report, strict=True)}
    assert found == dict.fromkeys(found, ("rewritten", ""))


@pytest.mark.parametrize("ways", GROUPS, ids=["first", "second", "third"])
def test_gradients(ways):
    report = same_gradients(several(*ways), video(), KEEP)
    assert verdicts(report) == ["rewritten"] * len(ways), str(report)


# What is not attended to as it stands


def expanded_mask(q, k, v, keep):
    """A mask over keys, expanded to all heads and queries."""
    return torch.where(keep[:, None, None].expand(2, 2, 24, 24), q @ k.mT, -1e9).softmax(-1) @ v


def mask_of_queries(q, k, v, keep):
    """Rows that see nothing are means of all values here, and zeros in the operator."""
    keep = keep[:, None, None] & keep[:, None, :, None]
    return torch.where(keep, q @ k.mT, -1e9).softmax(-1) @ v


def keys_of_another_sample(q, k, v, keep):
    return (q @ k.flip(0).mT).softmax(-1) @ v.flip(0)


def keys_of_the_first_sample(q, k, v, keep):
    return (q @ k[:1].mT).softmax(-1) @ v


def reversed_values(q, k, v, keep):
    return (q @ k.mT).softmax(-1) @ v.flip(2)


def causal(q, k, v, keep):
    later = torch.ones(24, 24, dtype=torch.bool).triu(1)
    return (q @ k.mT).masked_fill(later, -torch.inf).softmax(-1) @ v


def weights_are_returned(q, k, v, keep):
    weights = (q @ k.mT).softmax(-1)
    return weights @ v, weights


def active_dropout(q, k, v, keep):
    return F.dropout((q @ k.mT).softmax(-1), 0.1) @ v


DENSE = {
    mask_of_queries: "mask",
    keys_of_another_sample: "cross_attention",
    keys_of_the_first_sample: "layout",
    reversed_values: "not_raster",
    causal: "mask",
    weights_are_returned: "weights_used",
}


def test_left_dense():
    report = rewritten(several(expanded_mask, *DENSE), video(), KEEP)
    assert verdicts(report) == ["rewritten", *DENSE.values()], str(report)
    capture, _ = compiled(several(active_dropout), video(), KEEP)
    assert verdicts(capture.report) == ["dropout"]


@pytest.mark.parametrize("dims", [(0, 3, 4, 2, 1), (0, 2, 4, 3, 1)], ids=["time fastest", "rows fastest"])
def test_tokens_in_another_order(dims):
    def order(x):
        return x.permute(dims).flatten(1, 3)

    model = VideoAttention(order, plain)
    assert verdicts(rewritten(model, video(), KEEP)) == ["rewritten"]


# How query, key and value come about


def heads(t):
    return t.view(2, 24, 2, 8).transpose(1, 2)


CUTS = [
    lambda x: map(heads, x.chunk(3, dim=-1)),
    lambda x: map(heads, x.split(16, 2)),
    lambda x: map(heads, torch.split(x, [16, 16, 16], dim=-1)),
    lambda x: map(heads, (x.narrow(2, i, 16) for i in (0, 16, 32))),
    lambda x: map(heads, (x[..., :16], x[..., 16:32], x[:, :, -16:])),
    lambda x: x.reshape(2, 24, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0),
    lambda x: (x.reshape(2, 24, 3, 2, 8).permute(2, 0, 3, 1, 4)[i] for i in range(3)),
    lambda x: x.view(2, 24, 3, 2, 8).transpose(1, 3).unbind(2),
    lambda x: x.unflatten(-1, (2, 24)).transpose(1, 2).chunk(3, dim=-1),
    lambda x: (t.squeeze(2).transpose(1, 2) for t in x.unflatten(-1, (3, 2, 8)).split(1, dim=2)),
]


class Fused(VideoAttention):
    def forward(self, x, keep):
        x = raster_tokens(self.patch(x))
        return [plain(*cut(self.qkv(x)), keep) for cut in CUTS]


def test_fused_projections():
    report = rewritten(Fused().eval(), video(), KEEP)
    assert verdicts(report) == ["rewritten"] * len(CUTS), str(report)


# Less than float32


def upcast_weights(q, k, v, keep):
    return F.softmax(q @ k.mT * 0.3, -1, dtype=torch.float32).to(v.dtype) @ v


def upcast_scores(q, k, v, keep):
    return (q @ k.mT * 0.3).float().masked_fill(~keep[:, None, None], LOWEST).softmax(-1).type_as(v) @ v


def upcast_operands(q, k, v, keep):
    return ((q.float() @ k.float().mT * 0.3).softmax(-1) @ v.float()).to(q.dtype)


def upcast_query_times_scale(q, k, v, keep):
    q = q.to(torch.float32) * 0.3
    return (q @ k.to(torch.float32).mT).softmax(-1).to(v.dtype) @ v


def downcast_scores(q, k, v, keep):
    return (q @ k.mT * 0.3).half().float().softmax(-1).bfloat16().to(v.dtype) @ v


PRECISIONS = [plain, upcast_weights, upcast_scores, upcast_operands, upcast_query_times_scale, downcast_scores]


def close_to_float32(found, wanted, exact):
    """The rewritten model errs no more than the model does, but for a rounding of its results."""
    for got, low, high in zip(found, wanted, exact, strict=True):
        assert got.dtype == low.dtype
        assert (got.float() - high).abs().max() <= 1.5 * (low.float() - high).abs().max() + 0.02


@pytest.mark.parametrize("form", ["compiled", "exported"])
def test_bfloat16(form):
    model, x = several(*PRECISIONS).eval(), video()
    with torch.no_grad():
        exact = model(x, KEEP)
        model, x = model.bfloat16(), x.bfloat16()
        if form == "compiled":
            capture, found = compiled(model, x, KEEP)
            report = capture.report
        else:
            report, program = exported(model, x, KEEP)
            found = program.module()(x, KEEP)
        assert verdicts(report) == ["rewritten"] * len(PRECISIONS), str(report)
        close_to_float32(found, model(x, KEEP), exact)


def test_upcast_operands_are_attended_to_in_their_own_dtype():
    """Twice as fast, and as exact: the products of bfloat16 numbers are."""
    model, x = several(upcast_operands, upcast_query_times_scale).eval().bfloat16(), video().bfloat16()
    capture, _ = compiled(model, x, KEEP)
    calls = [n for n in capture.graphs[0].graph.nodes if n.target is torch.ops.vmoba.attention.default]
    assert [n.args[0].meta["example_value"].dtype for n in calls][1] == torch.bfloat16


def test_autocast():
    class Model(VideoAttention):
        def forward(self, x, keep):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward(x, keep)

    ways = [*PRECISIONS, *WAYS[:6], stable_by_values, language_models]
    model, x = Model(attend=lambda *args: [way(*args) for way in ways]).eval(), video()
    with torch.no_grad():
        exact = VideoAttention.forward(model, x, KEEP)
        capture, found = compiled(model, x, KEEP)
        assert verdicts(capture.report) == ["rewritten"] * len(ways), str(capture.report)
        close_to_float32(found, model(x, KEEP), exact)
