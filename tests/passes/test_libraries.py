"""Attention that is one call: operators of other libraries, here stand-ins with their signatures, and SDPA's ranks."""

from __future__ import annotations

import operator

import pytest
import torch
from graph_runs import same_gradients, several
from graphs import Tape, VideoAttention, raster_tokens, rewritten, verdicts, video
from torch.nn import functional as F
from vmoba_compile.passes.tokens import raster_of

FLASH_ATTN = torch.library.Library("vmoba_test_flash_attn", "FRAGMENT")  # the libraries may be installed
DIFFUSERS = torch.library.Library("vmoba_test_flash_attn_3", "FRAGMENT")
XFORMERS = torch.library.Library("vmoba_test_xformers", "FRAGMENT")
FLASH_ATTN.define(
    "_flash_attn_forward(Tensor q, Tensor k, Tensor v, float dropout_p, float softmax_scale, bool causal, "
    "int window_size_left, int window_size_right, float softcap, Tensor? alibi_slopes, bool return_softmax) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
DIFFUSERS.define(
    "_flash_attn_forward(Tensor q, Tensor k, Tensor v, float? softmax_scale=None, bool causal=False, Tensor? qv=None, "
    "Tensor? q_descale=None, Tensor? k_descale=None, Tensor? v_descale=None, int attention_chunk=0, float softcap=0.0, "
    "int num_splits=1, bool? pack_gqa=None, bool deterministic=False, int sm_margin=0) -> (Tensor, Tensor)"
)
XFORMERS.define(
    "efficient_attention_forward_cutlass(Tensor query, Tensor key, Tensor value, Tensor? attn_bias=None, "
    "Tensor? seqstart_q=None, Tensor? seqstart_k=None, int? max_seqlen_q=None, float dropout_p=0.0, "
    "bool compute_logsumexp=False, int custom_mask_type=0, float? scale=None, Tensor? seqlen_k=None, "
    "int? window_size=None) -> (Tensor, Tensor, int, int)"
)


def attention_and_logsumexp(q, k, v, scale=None):
    """[batch, tokens, heads, head_dim] to the same, contiguous, and the log-sum-exps [batch, heads, tokens]."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (scores.softmax(-1) @ v).transpose(1, 2).contiguous(), scores.logsumexp(-1)


def _flash(q, k, v, dropout_p, softmax_scale, causal, left, right, softcap, alibi_slopes, return_softmax):
    out, lse = attention_and_logsumexp(q, k, v, softmax_scale)
    return out, lse, q.new_empty(0), q.new_empty(2)


def _flash_3(q, k, v, softmax_scale=None, *more, **options):
    return attention_and_logsumexp(q, k, v, softmax_scale)


def _cutlass(
    query, key, value, bias=None, q_start=None, k_start=None, longest=None, p=0.0, lse=False, kind=0, scale=None, *more
):
    return *attention_and_logsumexp(query, key, value, scale), 0, 0


for library, name, body in [
    (FLASH_ATTN, "_flash_attn_forward", _flash),
    (DIFFUSERS, "_flash_attn_forward", _flash_3),
    (XFORMERS, "efficient_attention_forward_cutlass", _cutlass),
]:
    library.impl(name, body, "CompositeExplicitAutograd")

FLASH = torch.ops.vmoba_test_flash_attn._flash_attn_forward
FLASH_3 = torch.ops.vmoba_test_flash_attn_3._flash_attn_forward
CUTLASS = torch.ops.vmoba_test_xformers.efficient_attention_forward_cutlass


def flash(q, k, v, dropout=0.0, scale=0.3, causal=False, left=-1, right=-1, softcap=0.0, alibi=None):
    return FLASH(q, k, v, dropout, scale, causal, left, right, softcap, alibi, False)


def of_libraries(*ways):
    """They take [batch, tokens, heads, head_dim]."""

    def swapped(way):
        return lambda q, k, v: way(*(t.transpose(1, 2) for t in (q, k, v)))

    return several(*map(swapped, ways), heads=4)


OPERATORS = [
    lambda q, k, v: flash(q, k, v)[0],
    lambda q, k, v: flash(q, k[:, :, :1], v[:, :, :1])[0],
    lambda q, k, v: flash(q, k[:, :, ::2], v[:, :, ::2])[0].flatten(2),
    lambda q, k, v: FLASH_3(q, k, v)[0].view(2, 24, -1),
    lambda q, k, v: FLASH_3(q, k, v, 0.7, pack_gqa=False, num_splits=2)[0],
    lambda q, k, v: FLASH_3(q, k[:, :, ::2], v[:, :, ::2], softmax_scale=0.7)[0],
    lambda q, k, v: CUTLASS(q, k, v)[0],
    lambda q, k, v: CUTLASS(q, k, v, scale=0.2, compute_logsumexp=True)[0],
]
DENSE = {
    "causal": ("causal", lambda q, k, v: flash(q, k, v, causal=True)[0]),
    "left": ("spelling", lambda q, k, v: flash(q, k, v, left=4)[0]),
    "right": ("spelling", lambda q, k, v: flash(q, k, v, right=0)[0]),
    "softcap": ("spelling", lambda q, k, v: flash(q, k, v, softcap=30.0)[0]),
    "alibi": ("spelling", lambda q, k, v: flash(q, k, v, alibi=q.new_ones(4))[0]),
    "logsumexp": ("weights_used", lambda q, k, v: flash(q, k, v)[:2]),
    "dropout": ("dropout", lambda q, k, v: flash(q, k, v, dropout=0.1)[0]),
    "scale": ("layout", lambda q, k, v: flash(q, k, v, scale=-0.3)[0]),
    "qv": ("spelling", lambda q, k, v: FLASH_3(q, k, v, qv=q)[0]),
    "descale": ("spelling", lambda q, k, v: FLASH_3(q, k, v, q_descale=q.new_ones(1))[0]),
    "chunk": ("spelling", lambda q, k, v: FLASH_3(q, k, v, attention_chunk=8)[0]),
    "softcap of 3": ("spelling", lambda q, k, v: FLASH_3(q, k, v, softcap=10.0)[0]),
    "bias": ("mask", lambda q, k, v: CUTLASS(q, k, v, q.new_ones(2, 4, 24, 24))[0]),
    "packed": ("spelling", lambda q, k, v: CUTLASS(q, k, v, None, torch.tensor([0, 24]))[0]),
    "lower triangle": ("spelling", lambda q, k, v: CUTLASS(q, k, v, custom_mask_type=1)[0]),
    "window": ("spelling", lambda q, k, v: CUTLASS(q, k, v, window_size=4)[0]),
    "other values": ("not_raster", lambda q, k, v: flash(q, k, v.flip(1))[0]),
}


def test_operators():
    report = rewritten(of_libraries(*OPERATORS).eval(), video())
    assert verdicts(report) == ["rewritten"] * len(OPERATORS), str(report)


def test_operators_left_dense():
    reasons, ways = zip(*DENSE.values(), strict=True)
    report = rewritten(of_libraries(*ways).eval(), video())
    assert dict(zip(DENSE, verdicts(report), strict=True)) == dict(zip(DENSE, reasons, strict=True)), str(report)


class Blocks(VideoAttention):
    """Attention after attention: what one of them does with its operands is what the next starts from."""

    def forward(self, x):
        x = raster_tokens(self.patch(x))
        for attend in OPERATORS:
            x = x + attend(*(t.transpose(1, 2) for t in self.split(x))).reshape(x.shape)
        return x


def test_blocks():
    report = rewritten(Blocks(heads=4).eval(), video())
    assert verdicts(report) == ["rewritten"] * len(OPERATORS), str(report)


OTHER = torch.library.Library("other_library", "FRAGMENT")
OTHER.define("mean_of_tokens(Tensor x) -> Tensor")
OTHER.define("shuffle_tokens_(Tensor(a!) x) -> Tensor")


@pytest.mark.parametrize("overload", [False, True], ids=["packet", "overload"])
@pytest.mark.parametrize("writes", [False, True], ids=["reads", "writes"])
def test_an_operator_writes_where_its_schema_says_so(writes, overload):
    tape = Tape()
    x = tape.tokens(tape.patches((2, 3, 4)))
    operators = torch.ops.other_library
    target = operators.shuffle_tokens_ if writes else operators.mean_of_tokens
    tape.call(target.default if overload else target, x, holds=torch.zeros(2, 2))
    same = tape.call(operator.mul, x, 1.0)
    assert bool(raster_of(tape.axes(same)[1][0])) != writes


# Scaled dot-product attention

SDPA = F.scaled_dot_product_attention
KEEP = torch.arange(24)[None] < torch.tensor([[17], [24]])
CALLS = [
    lambda q, k, v, keep: SDPA(q[:, None], k[:, None], v[:, None], keep[:, None, None, None]),
    lambda q, k, v, keep: SDPA(q, k, v, torch.where(keep[:, None, None], 0.0, -torch.inf)),
    lambda q, k, v, keep: SDPA(q, k, v, attn_mask=torch.zeros(2, 1, 1, 24).masked_fill(~keep[:, None, None], -1e9)),
    lambda q, k, v, keep: SDPA(q, k, v, scale=0.3 * q.shape[-1] ** 0.5),
]


def test_calls():
    report = rewritten(several(*CALLS).eval(), video(), KEEP)
    assert verdicts(report) == ["rewritten"] * len(CALLS), str(report)
    report = same_gradients(several(*CALLS), video(), KEEP)
    assert verdicts(report) == ["rewritten"] * len(CALLS), str(report)
