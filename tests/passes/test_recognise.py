"""How attention is spelled, and where it stands."""

from __future__ import annotations

import pytest
import torch
from graphs import Tape
from torch.nn import functional as F
from vmoba_compile.passes.names import is_elementwise, name_of
from vmoba_compile.passes.recognise import attention_call, plain_path, spelling


@pytest.mark.parametrize(
    ("spelled", "plain"),
    [
        ("L['self']._modules['blocks'][0].attn1", "blocks.0.attn1"),
        ("L['self'].blocks[3].attn", "blocks.3.attn"),
        ("L['fn']._orig_mod.blocks[3]", "blocks.3"),
        ("blocks.0.attn", "blocks.0.attn"),
        ("L['self'].blocks[1].forward.__closure__[0].cell_contents.attn", "blocks.1.attn"),
        ("L['self'].forward.__closure__[0].cell_contents.__self__.blocks[1].attn", "blocks.1.attn"),
        ("L['fn'].__closure__[2].cell_contents.blocks[1].mod", "blocks.1.mod"),
        ("", ""),
    ],
)
def test_plain_path(spelled, plain):
    assert plain_path(spelled) == plain


def test_arguments_positional_and_by_keyword():
    tape = Tape()
    q, k, v, m = (tape.give(name, torch.randn(1, 2, 4, 8)) for name in "qkvm")
    m.meta["example_value"] = torch.ones(1, 1, 1, 4, dtype=torch.bool)
    first = tape.call(F.scaled_dot_product_attention, q, k, v, m, 0.0, False, scale=0.5)
    second = tape.call(F.scaled_dot_product_attention, query=q, key=k, value=v, is_causal=True)
    one, two = attention_call(first), attention_call(second)
    assert (one.mask, one.scale, one.causal, one.dropout) == (m, 0.5, False, 0.0)
    assert (two.query, two.mask, two.scale, two.causal) == (q, None, None, True)


def test_computed_scale_is_not_read():
    tape = Tape()
    q = tape.give("q", torch.randn(1, 2, 4, 8))
    s = tape.give("s", 0.5)
    assert attention_call(tape.call(F.scaled_dot_product_attention, q, q, q, scale=s)) is None


def test_softmax_without_products_is_no_attention():
    tape = Tape()
    x = tape.give("x", torch.randn(1, 2, 4, 4))
    assert spelling(tape.call("softmax", x, -1)) is None


def test_names_of_other_libraries_are_their_own():
    tape = Tape()
    x = tape.give("x", torch.randn(1, 2))

    def roll(x):
        return x

    assert name_of(tape.call(roll, x)).endswith("::roll")
    assert name_of(tape.call(torch.roll, x, 1)) == "roll"
    assert name_of(tape.call(torch.ops.aten.add.Tensor, x, x)) == "add"


@pytest.mark.parametrize("name", ["add", "add_", "gelu", "silu", "where"])
def test_elementwise(name):
    assert is_elementwise(name)


@pytest.mark.parametrize("name", ["roll", "sort", "matmul", "no_such_operator", "transpose_"])
def test_not_elementwise(name):
    assert not is_elementwise(name)
