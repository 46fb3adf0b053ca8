"""Read attention that is one call: ``scaled_dot_product_attention`` of any rank, and other libraries' operators."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping

import torch
from torch import fx
from torch.fx.operator_schemas import normalize_function

from .effects import check_undisturbed, is_live
from .labels import CHANNELS, KEYS, QUERIES, VALUES, Labels
from .names import name_of
from .reading import Mask, Operand, Reading, Unread, number_of
from .report import Reason
from .sizes import ONE, same, shape_of, value_of

SDPA = "scaled_dot_product_attention"
LIBRARY = re.compile(r"^_scaled_dot_product|::.*(flash_attn|flash_attention|sage_?attn|efficient_attention|attn_fwd)")
_HEADS_FIRST = re.compile(r"^_?scaled_dot_product")

# What an argument means, by the names that libraries give it.
_ROLES = {
    "query": ("query", "q"), "key": ("key", "k"), "value": ("value", "v"),
    "scale": ("scale", "softmax_scale", "sm_scale"), "dropout": ("dropout_p", "dropout", "p"),
    "causal": ("is_causal", "causal"), "mask": ("attn_mask", "attn_bias"),
}  # fmt: skip
# Arguments that change nothing about the result, and those that do unless they have this value.
_HARMLESS = frozenset(
    ["return_softmax", "return_debug_mask", "return_softmax_lse", "return_lse", "compute_log_sumexp", "compute_logsumexp",
     "deterministic", "num_splits", "pack_gqa", "sm_margin", "enable_gqa", "need_attn_weights", "seqlen"]
)  # fmt: skip
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "window_size": ((-1, -1), [-1, -1]), "window_size_left": (-1,), "window_size_right": (-1,), "softcap": (0.0, 0),
    "attention_chunk": (0,), "custom_mask_type": (0,), "is_rotary_interleaved": (True, False),
}  # fmt: skip


def read_call(node: fx.Node) -> Reading:
    """The attention of a call. Raises :class:`Unread` where an argument is not understood."""
    given = _arguments(node)
    tensors = [given.get(name) for name in ("query", "key", "value")]
    if not all(isinstance(tensor, fx.Node) for tensor in tensors):
        raise Unread(f"{name_of(node)} without query, key and value")
    query, key, value = tensors
    assert isinstance(query, fx.Node) and isinstance(key, fx.Node) and isinstance(value, fx.Node)
    result, rank = _result(node), len(shape_of(query) or [])
    heads_first = _HEADS_FIRST.search(name_of(node)) is not None
    if rank < 3 or (not heads_first and rank != 4) or any(len(shape_of(x) or []) != rank for x in (key, value, result)):
        raise Unread(f"query has {rank} dimensions, key {len(shape_of(key) or [])}", Reason.LAYOUT)
    check_undisturbed(node.all_input_nodes, node, result)  # it is spelled anew where its result is taken out
    labels = Labels()
    batch = [f"b{i}" for i in range(rank - 2)]
    place = rank - 2 if heads_first else 1  # of the tokens

    def operand(x: fx.Node, tokens: str, channels: str) -> Operand:
        names = [*batch[:place], tokens, *batch[place:], channels]
        dims: list[tuple[str, ...]] = []
        for name, size, whole in zip(names, shape_of(x) or [], shape_of(query) or [], strict=True):
            if name in batch and size == ONE != whole:
                dims.append(())
                continue
            if name == batch[-1] and size.static and whole.static and size != whole and not whole.hint % size.hint:
                name = labels.grouped(name, size)  # a key for each group of heads
            dims.append((name,))
            if not same(labels.sizes.setdefault(name, size), size):
                raise Unread(f"query and key or value differ in a dimension: {whole} and {size}", Reason.LAYOUT)
        return Operand(x, tuple(dims))

    operands = operand(query, QUERIES, CHANNELS), operand(key, KEYS, CHANNELS), operand(value, KEYS, VALUES)
    dims = tuple((VALUES,) if names == (CHANNELS,) else names for names in operands[0].dims)
    reading = Reading(
        node, *operands, result, dims, labels, batch, nodes=[node, result] if result is not node else [node]
    )
    _options(reading, given, query)
    return reading


def _options(reading: Reading, given: Mapping[str, object], query: fx.Node) -> None:
    scale = given.get("scale")
    number = number_of(scale)
    if scale is not None and number is None:
        if not isinstance(scale, fx.Node):
            raise Unread(f"a scale of {scale!r}")
        reading.factors.append(("mul", Operand(scale, ())))
    head_dim = (shape_of(query) or [])[-1]
    if scale is None and not head_dim.static:
        raise Unread(f"head size {head_dim} is no number", Reason.LAYOUT)
    reading.scale = head_dim.hint**-0.5 if scale is None else (1.0 if number is None else number)
    dropout = given.get("dropout") or 0.0
    reading.dropout = float(dropout) if isinstance(dropout, (int, float)) else 0.5
    causal = given.get("causal") or False
    reading.causal = causal is not False
    mask = given.get("mask")
    if isinstance(mask, fx.Node):
        value, shape = value_of(mask), shape_of(mask) or []
        here = [*((name,) for name in reading.batch), (QUERIES,), (KEYS,)]
        if len(shape) > len(here) or not isinstance(value, torch.Tensor):
            raise Unread("a mask of more dimensions than the scores", Reason.MASK)
        dims = tuple(
            () if size == ONE else names for size, names in zip(shape, here[len(here) - len(shape) :], strict=True)
        )
        keep = value.dtype == torch.bool
        reading.masks.append(Mask("keep" if keep else "bias", mask, dims, -torch.inf if keep else 1.0))


def _arguments(node: fx.Node) -> dict[str, object]:
    """Arguments by what they mean; :class:`Unread` where one that is not understood may change the result."""
    normalized = normalize_function(
        node.target,  # type: ignore[arg-type]
        node.args,  # type: ignore[arg-type]
        dict(node.kwargs),
        normalize_to_only_use_kwargs=True,
    )
    if normalized is None:
        raise Unread(f"the arguments of {name_of(node)} cannot be read")
    roles = {alias: role for role, aliases in _ROLES.items() for alias in aliases}
    found: dict[str, object] = {}
    for name, value in normalized.kwargs.items():
        if name in roles:
            found[roles[name]] = value
        elif value is not None and name not in _HARMLESS and value not in _NEUTRAL.get(name, ()):
            raise Unread(f"{name_of(node)} is called with {name}={value}, which is not understood")
    return found


def _result(node: fx.Node) -> fx.Node:
    """The attended values: the call itself, or the first of its results where nothing else needs the others."""
    if not isinstance(value_of(node), (tuple, list)):
        return node
    first = None
    for user in node.users:
        if user.target is operator.getitem and user.args[1] == 0 and first is None:
            first = user
        elif is_live(user):
            raise Unread(
                f"other results of {name_of(node)} are used too, such as its log-sum-exps", Reason.WEIGHTS_USED
            )
    if first is None:
        raise Unread(f"the result of {name_of(node)} is not used")
    return first
