"""Spell out attention that a graph holds as one opaque module call: ``nn.MultiheadAttention`` and encoder layers."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.operator_schemas import normalize_function
from torch.nn import functional as F

from .boolean import boolean_mask
from .builder import Builder
from .canonical import Spelled, attend
from .effects import is_live
from .names import name_of
from .reading import Mask, Unread
from .report import Reason
from .sizes import ONE, same, shape_of, value_of
from .track import Scope, type_nodes

aten = torch.ops.aten
Arguments = dict[str, Any]


@dataclass(frozen=True)
class _Weights:
    """Projections of one multi-head attention: of query, key and value together, or apart."""

    heads: int
    packed: fx.Node | None
    apart: tuple[fx.Node, ...]
    bias: fx.Node | None
    out: fx.Node
    out_bias: fx.Node | None


def spell_module(node: fx.Node, scope: Scope) -> Spelled:
    """Insert what the module computes, one node for each step. Raises :class:`Unread`, with the graph as it was."""
    spellings: dict[str, Callable[[fx.Node, Arguments, Builder], Spelled]] = {
        "multi_head_attention_forward": _functional,
        "_native_multi_head_attention": _native,
        "_transformer_encoder_layer_fwd": _encoder_layer,
    }
    normalized = normalize_function(
        node.target,  # type: ignore[arg-type]
        node.args,  # type: ignore[arg-type]
        dict(node.kwargs),
        normalize_to_only_use_kwargs=True,
    )
    if normalized is None:
        raise Unread(f"the arguments of {name_of(node)} cannot be read")
    builder = Builder(scope.module.graph, node, scope.writers)
    with builder.attempt():
        spelled = spellings[name_of(node)](node, normalized.kwargs, builder)
    type_nodes(scope, builder.added)
    return spelled


def _functional(node: fx.Node, given: Arguments, builder: Builder) -> Spelled:
    """``torch.nn.functional.multi_head_attention_forward``: tensors are [tokens, batch, channels]."""
    refused = [
        name
        for name in ("bias_k", "bias_v", "add_zero_attn", "static_k", "static_v")
        if given.get(name) not in (None, False)
    ]
    if refused:
        raise Unread(f"nn.MultiheadAttention with {refused[0]}")
    if len(shape_of(given["query"]) or []) != 3:
        raise Unread("nn.MultiheadAttention without a batch", Reason.LAYOUT)
    apart: tuple[fx.Node, ...] = ()
    if given.get("use_separate_proj_weight"):
        apart = tuple(given[f"{name}_proj_weight"] for name in "qkv")
    weights = _Weights(
        given["num_heads"], given.get("in_proj_weight"), apart, given.get("in_proj_bias"), given["out_proj_weight"],
        given.get("out_proj_bias"),
    )  # fmt: skip
    masks = [
        _padding(builder, given.get("key_padding_mask")),
        _scores_mask(builder, given.get("attn_mask"), weights.heads),
    ]
    call, out = _attention(
        builder, [given[name] for name in ("query", "key", "value")], weights, masks,
        dropout=given.get("dropout_p", 0.0) if given.get("training", True) else 0.0, tokens_first=True,
        # The flag is a hint beside a mask that says the same.
        causal=bool(given.get("is_causal", False)),
    )  # fmt: skip
    return Spelled(call, *_first_result(node, builder, out))


def _native(node: fx.Node, given: Arguments, builder: Builder) -> Spelled:
    """The inference kernel of ``nn.MultiheadAttention``: tensors are [batch, tokens, channels]."""
    weights = _Weights(
        given["num_head"], given["qkv_weight"], (), given["qkv_bias"], given["proj_weight"], given["proj_bias"]
    )
    tensors = [given[name] for name in ("query", "key", "value")]
    masks = _kernel_mask(builder, given)
    call, out = _attention(builder, tensors, weights, masks, dropout=0.0, tokens_first=False, causal=False)
    return Spelled(call, *_first_result(node, builder, out))


def _encoder_layer(node: fx.Node, given: Arguments, builder: Builder) -> Spelled:
    """The inference kernel of ``nn.TransformerEncoderLayer``."""
    masks = _kernel_mask(builder, given)
    weights = _Weights(
        given["num_heads"], given["qkv_weight"], (), given["qkv_bias"], given["proj_weight"], given["proj_bias"]
    )
    src, width, eps = given["src"], given["embed_dim"], given["eps"]

    def norm(x: fx.Node, index: int) -> fx.Node:
        return builder.call(F.layer_norm, x, [width], given[f"norm_weight_{index}"], given[f"norm_bias_{index}"], eps)

    def feed_forward(x: fx.Node) -> fx.Node:
        x = builder.call(F.linear, x, given["ffn_weight_1"], given["ffn_bias_1"])
        x = builder.call(F.gelu if given["use_gelu"] else F.relu, x)
        return builder.call(F.linear, x, given["ffn_weight_2"], given["ffn_bias_2"])

    def attention(x: fx.Node) -> tuple[fx.Node, fx.Node]:
        return _attention(builder, [x] * 3, weights, masks, dropout=0.0, tokens_first=False, causal=False)

    if given["norm_first"]:
        call, out = attention(norm(src, 1))
        x = builder.call(operator.add, src, out)
        x = builder.call(operator.add, x, feed_forward(norm(x, 2)))
    else:
        call, out = attention(src)
        x = norm(builder.call(operator.add, src, out), 1)
        x = norm(builder.call(operator.add, x, feed_forward(x)), 2)
    return Spelled(call, node, x, builder.added, [node])


def _first_result(
    node: fx.Node, builder: Builder, out: fx.Node
) -> tuple[fx.Node, fx.Node, list[fx.Node], list[fx.Node]]:
    """What :class:`Spelled` holds for a module that returns its output and its weights."""
    first = None
    for user in node.users:
        if user.target is operator.getitem and user.args[1] == 0 and first is None:
            first = user
        elif is_live(user):
            raise Unread("nn.MultiheadAttention's weights are used; pass need_weights=False", Reason.WEIGHTS_USED)
    if first is None:
        raise Unread("nn.MultiheadAttention's result is not used")
    return first, out, builder.added, [node, first]


def _attention(
    builder: Builder, tensors: list[fx.Node], weights: _Weights, masks: list[fx.Node | None], *, dropout: float,
    tokens_first: bool, causal: bool,
) -> tuple[fx.Node, fx.Node]:  # fmt: skip
    """The attention's call and the projected result."""
    width = (shape_of(weights.out) or [])[0].hint
    projected = _projected(builder, tensors, weights, width)
    to_heads = (1, 2, 0, 3) if tokens_first else (0, 2, 1, 3)
    # Head sizes are numbers: those of weights.
    split = [builder.call(aten.unflatten.int, x, 2, [weights.heads, width // weights.heads]) for x in projected]
    heads = [builder.call(aten.permute.default, x, to_heads) for x in split]
    given = [mask for mask in masks if mask is not None]
    mask = given[0] if given else None
    for other in given[1:]:
        mask = builder.call(aten.logical_and.default, mask, other)
    call = attend(builder, heads, mask, dropout_p=float(dropout), is_causal=causal and mask is None)
    back = builder.call(aten.permute.default, call, (2, 0, 1, 3) if tokens_first else (0, 2, 1, 3))
    return call, builder.call(
        F.linear, builder.call(aten.flatten.using_ints, back, 2, 3), weights.out, weights.out_bias
    )


def _projected(builder: Builder, tensors: list[fx.Node], weights: _Weights, width: int) -> list[fx.Node]:
    if weights.packed is not None and not weights.apart and tensors[0] is tensors[1] is tensors[2]:
        together = builder.call(F.linear, tensors[0], weights.packed, weights.bias)
        return [builder.call(aten.slice.Tensor, together, 2, i * width, (i + 1) * width) for i in range(3)]

    def rows(x: fx.Node | None, i: int) -> fx.Node | None:
        return None if x is None else builder.call(aten.slice.Tensor, x, 0, i * width, (i + 1) * width)

    own = [weights.apart[i] if weights.apart else rows(weights.packed, i) for i in range(3)]
    return [
        builder.call(F.linear, x, w, rows(weights.bias, i)) for i, (x, w) in enumerate(zip(tensors, own, strict=True))
    ]


def _padding(builder: Builder, mask: fx.Node | None) -> fx.Node | None:
    """A ``key_padding_mask`` [batch, tokens], True where a key is padding."""
    if mask is None:
        return None
    if len(shape_of(mask) or []) != 2:
        raise Unread("a key_padding_mask without a batch", Reason.MASK)
    keep = _keep(builder, mask)
    return builder.call(aten.unsqueeze.default, builder.call(aten.unsqueeze.default, keep, 1), 1)


def _keep(builder: Builder, mask: fx.Node) -> fx.Node:
    """True where the mask is False; or where it is zero, if it is one of numbers that are added to the scores."""
    value = value_of(mask)
    if isinstance(value, torch.Tensor) and value.dtype == torch.bool:
        return builder.call(aten.logical_not.default, mask)
    return boolean_mask(builder, Mask("bias", mask, ()))


def _kernel_mask(builder: Builder, given: Arguments) -> list[fx.Node | None]:
    if given.get("mask") is not None and given.get("mask_type") != 1:
        raise Unread("an inference kernel's mask that is no key_padding_mask", Reason.MASK)
    return [_padding(builder, given.get("mask"))]


def _scores_mask(builder: Builder, mask: fx.Node | None, heads: int) -> fx.Node | None:
    """An ``attn_mask`` [queries, keys] or [batch * heads, queries, keys], True where a pair is left out."""
    if mask is None:
        return None
    keep, shape = _keep(builder, mask), shape_of(mask) or []
    if len(shape) == 2:
        return builder.call(aten.unsqueeze.default, builder.call(aten.unsqueeze.default, keep, 0), 0)
    if same(shape[0], ONE) and heads == 1:
        return builder.call(aten.unsqueeze.default, keep, 0)
    return builder.call(aten.unflatten.int, keep, 0, [-1, heads])
