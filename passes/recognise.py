"""Find attention in a graph: what is spelled how, and with which arguments."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import cast

import torch
from torch import fx
from torch.fx.operator_schemas import normalize_function

from .calls import LIBRARY, SDPA
from .handwritten import ON_THE_WAY
from .names import is_elementwise, name_of
from .products import PRODUCTS
from .sizes import shape_of, value_of
from .softmax import SOFTMAX

MODULES = frozenset(["multi_head_attention_forward", "_native_multi_head_attention", "_transformer_encoder_layer_fwd"])
_PASSES = ON_THE_WAY | SOFTMAX | {"expand"}


@dataclass(frozen=True)
class AttentionCall:
    """Arguments of one scaled-dot-product attention; tensors are nodes, the rest Python values."""

    node: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: fx.Node | None
    dropout: float
    causal: bool
    scale: float | None


def spelling(node: fx.Node) -> str | None:
    """How this node spells attention: an operator's name, "softmax" or "exp" where it is written out, or None."""
    name = name_of(node)
    if name == SDPA or name in MODULES or name == "flex_attention" or LIBRARY.search(name):
        return name
    if (name in SOFTMAX or name == "exp") and _is_handwritten(node):
        return "exp" if name == "exp" else "softmax"
    return None


def _is_handwritten(node: fx.Node) -> bool:
    """True where a softmax weighs tokens by tokens: a product of two activations feeds it, and a product takes it."""
    if len(shape_of(node) or []) < 3:
        return False
    return _meets_product(node, upwards=True) and _meets_product(node, upwards=False)


def _meets_product(node: fx.Node, *, upwards: bool, steps: int = 12) -> bool:
    """True where casts, views and elementwise operators alone lie between the node and a product."""
    seen, front = {node}, [node]
    for _ in range(steps + 1):
        near = {x for at in front for x in (at.all_input_nodes if upwards else at.users)} - seen
        names = {x: name_of(x) if x.op in ("call_function", "call_method") else "" for x in near}
        if not PRODUCTS.isdisjoint(names.values()):
            return True
        seen |= near
        front = [x for x, name in names.items() if name in _PASSES or is_elementwise(name)]
    return False


def attention_call(node: fx.Node) -> AttentionCall | None:
    """The arguments of a plain ``scaled_dot_product_attention``; None where they must be read and spelled anew.

    Plain is one over four dimensions, with a bool mask or none and a scale that is a number.
    """
    normalized = normalize_function(
        node.target,  # type: ignore[arg-type]
        node.args,  # type: ignore[arg-type]
        dict(node.kwargs),
        normalize_to_only_use_kwargs=True,
    )
    if normalized is None:
        return None
    kwargs = normalized.kwargs
    tensors = [kwargs.get(name) for name in ("query", "key", "value")]
    dropout, scale, mask = kwargs.get("dropout_p", 0.0), kwargs.get("scale"), kwargs.get("attn_mask")
    if not all(isinstance(t, fx.Node) for t in tensors) or isinstance(dropout, fx.Node) or isinstance(scale, fx.Node):
        return None
    query, key, value = (cast(fx.Node, t) for t in tensors)
    if any(len(shape_of(x) or []) != 4 for x in (query, key, value)):
        return None
    if isinstance(mask, fx.Node) and getattr(value_of(mask), "dtype", None) != torch.bool:
        return None
    return AttentionCall(
        node, query, key, value,
        mask=cast("fx.Node | None", mask),
        dropout=float(dropout or 0.0),
        causal=bool(kwargs.get("is_causal", False)),
        scale=scale,
    )  # fmt: skip


def module_path(node: fx.Node) -> str:
    """Dotted path of the module whose forward made the node, as ``model.named_modules()`` spells it."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    return plain_path(next(reversed(stack.values()))[0])


def plain_path(spelled: str) -> str:
    """A module path without Dynamo's spelling of it.

    ``L['self']._modules['blocks'][0].attn1`` and hooks' ``…forward.__closure__[0].cell_contents…`` and
    ``…forward.func…forward.__self__…`` give ``blocks.0.attn1``.
    """
    hook = r"(\.forward)?(\.func)?\.__closure__\[\d+\]\.cell_contents(\.forward)?(\.__self__)?"
    spelled = re.sub(rf"{hook}|\.forward\.__self__", "", spelled)
    parts = re.findall(r"\[['\"]?([^'\"\]]+)['\"]?\]|([A-Za-z_0-9]+)", spelled)
    names = [quoted or bare for quoted, bare in parts]
    if names and names[0] in ("L", "G"):  # a frame's local or global variable, and the variable's name
        names = names[2:]
    skip = {"_modules", "__dict__", "__self__", "__func__", "__wrapped__", "_orig_mod"}
    return ".".join(name for name in names if name not in skip)


def source_line(node: fx.Node) -> str:
    """``file.py:123`` of the innermost user frame that made the node."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    return f"{frames[-1][0].rsplit('/', 1)[-1]}:{frames[-1][1]}" if frames else ""
