"""Single graphs that look like another: equal sizes, repeated keys, shared softmaxes, odd names, long chains."""

from __future__ import annotations

import operator
from collections import Counter
from random import Random

import pytest
import torch
from graph_runs import rewritten_graph
from graphs import verdicts
from hypothesis import given, settings
from hypothesis import strategies as st
from near_misses import NearMiss
from spellings import Part, Speller
from torch import fx
from torch.nn import functional as F
from vmoba_compile.passes.sizes import value_of


def built(attend, batch=2, heads=4, width=2, gradients=True, key_heads=None):
    """The verdicts on ``attend(s, q, k, v)``, whose tensors are [batch, heads, tokens, width]."""
    torch.manual_seed(0)
    s = NearMiss(Random(0))
    s.sizes |= {"b": batch, "d": heads * width, "q": 8, "k": 8}
    x = s.tape.tokens(s.video((2, 2, 2)))
    parts = []
    for n in (heads, key_heads or heads, key_heads or heads):
        parts.append(s.call("transpose", s.call("unflatten", s.linear(x, n * width), 2, (n, width)), 1, 2))
    result = attend(s, *parts)
    return verdicts(rewritten_graph(s.tape, result, *s.outputs, gradients=gradients))


def scores_of(s, q, k):
    return s.call(operator.mul, s.call(operator.matmul, q, s.call("transpose", k, 2, 3)), 0.5)


@pytest.mark.parametrize("order", ["groups", "interleaved"])
def test_grouped_keys_repeated_for_heads(order):
    """Whether a query's key is h // groups or h % groups, it stays that."""

    def attend(s, q, k, v):
        if order == "groups":
            k, v = (s.call("repeat_interleave", x, 2, dim=1) for x in (k, v))
        else:
            k, v = (s.call("repeat", x, 1, 2, 1, 1) for x in (k, v))
        return s.call(operator.matmul, s.call("softmax", scores_of(s, q, k), -1), v)

    assert built(attend, key_heads=2) == ["rewritten"]


@pytest.mark.parametrize("order", ["bgrqd,bgkd->bgrqk", "brgqd,bgkd->brgqk"])
def test_grouped_keys_in_an_einsum(order):
    def attend(s, q, k, v):
        q = s.call("unflatten", q, 1, (2, 2))
        weights = s.call("softmax", s.call(torch.einsum, order, q, k), -1)
        left, right = order.split("->")[1], order.split(",")[1].split("->")[0]
        out = left.replace("k", "d")
        return s.call("flatten", s.call(torch.einsum, f"{left},{right}->{out}", weights, v), 1, 2)

    assert built(attend, key_heads=2) == ["rewritten"]


def test_weights_that_stand_beside_a_product():
    """``baddbmm`` with beta=0 takes the weights and does nothing with them."""

    def attend(s, q, k, v):
        weights = s.call("softmax", s.call("flatten", scores_of(s, q, k), 0, 1), -1)
        other = s.give("other", torch.randn(8, 8, 8))
        return s.call(torch.baddbmm, weights, other, other, beta=0)

    assert built(attend) == ["spelling"]


def test_a_softmax_for_two_products():
    def attend(s, q, k, v):
        weights = s.call("softmax", scores_of(s, q, k), -1)
        s.outputs.append(s.call(operator.matmul, weights, s.call("roll", v, 1, 2)))
        return s.call(operator.matmul, weights, v)

    assert built(attend) == ["weights_used"]


def test_two_softmaxes_of_the_same_scores():
    def attend(s, q, k, v):
        scores = scores_of(s, q, k)
        first, second = (s.call(operator.matmul, s.call("softmax", scores, dim), v) for dim in (-1, -2))
        return s.call(operator.sub, first, second)

    assert built(attend) == ["weights_used", "spelling"]


@pytest.mark.parametrize("wider", ["mask", "scale", "both"])
def test_batch_that_comes_from_a_mask_or_scale(wider):
    """A batch of one is broadcast to that of the mask."""

    def attend(s, q, k, v):
        scores = scores_of(s, q, k)
        if wider != "scale":
            scores = s.call("masked_fill", scores, s.give("drop", torch.rand(3, 1, 1, 8) > 0.7), -torch.inf)
        if wider != "mask":
            scores = s.call(operator.mul, scores, s.give("scale", torch.rand(3, 1, 1, 1)))
        return s.call(operator.matmul, s.call("softmax", scores, -1), v)

    assert built(attend, batch=1) == ["spelling"]


def test_values_written_to_before_the_sum_divides():
    def attend(s, q, k, v):
        v = s.call("clone", v)
        exp = s.call("exp", scores_of(s, q, k))
        result = s.call(operator.matmul, exp, v)
        s.call("zero_", v)
        return s.call(operator.truediv, result, s.call("sum", exp, -1, keepdim=True))

    assert built(attend, gradients=False) == ["spelling"]


def test_attention_of_attention():
    """The second reads what the first was, and is replaced after it."""

    def attend(s, q, k, v):
        for _ in range(3):
            q = s.call(operator.matmul, s.call("softmax", scores_of(s, q, k), -1), v)
            v = s.call(F.scaled_dot_product_attention, q, k, v)
        return v

    assert built(attend) == ["rewritten"] * 6


def test_keywords():
    def attend(s, q, k, v):
        scores = s.call(torch.matmul, input=q, other=s.call(torch.transpose, input=k, dim0=2, dim1=3))
        scores = s.call(torch.mul, input=scores, other=0.5)
        keep = s.give("keep", torch.arange(8) < 5)
        scores = s.call(torch.where, condition=keep, input=scores, other=-1e9)
        scores = s.call(torch.add, input=scores, other=s.call(torch.where, keep, 0.0, other=-1e9))
        peak = s.call(torch.amax, input=scores, dim=-1, keepdim=True)
        exp = s.call(torch.exp, input=s.call(torch.sub, input=scores, other=peak))
        weights = s.call(torch.div, input=exp, other=s.call(torch.sum, input=exp, dim=-1, keepdim=True))
        return s.call(torch.matmul, input=weights, other=v)

    assert built(attend) == ["rewritten"]


@pytest.mark.parametrize("name", ["tensor", "full", "to", "float", "amax", "sub", "zeros", "where", "mul", "softmax"])
def test_inputs_named_like_operators(name):
    def attend(s, q, k, v):
        given = s.tape.give(name, torch.tensor(0.5))
        scores = s.call(operator.mul, scores_of(s, q, k), given)
        scores = s.call(operator.add, scores, s.tape.give(f"{name}_1", torch.tensor(0.5)))
        return s.call(operator.matmul, s.call("softmax", scores, -1), v)

    assert built(attend) == ["mask"]


def test_long_chains_that_lead_to_no_product():
    """Every second step has two ways up; a walk that takes each of them anew never ends."""

    def attend(s, q, k, v):
        scores = s.give("scores", torch.randn(2, 4, 8, 8))
        for _ in range(80):
            scores = s.call(operator.add, s.call(operator.mul, scores, 0.5), s.call(operator.mul, scores, 0.4))
        scores = s.call(operator.mul, scores, scores_of(s, q, k))
        for _ in range(400):
            v = s.call(operator.add, s.call(operator.mul, v, 0.5), s.call(operator.mul, v, 0.5))
        return s.call(operator.matmul, s.call("softmax", scores, -1), v)

    assert built(attend, gradients=False) == ["spelling"]


def test_many_layers():
    """What follows an attention is as deep as the model, deeper than Python's stack."""

    def attend(s, q, k, v):
        for _ in range(60):
            q = s.call(F.layer_norm, q, (2,))
            out = s.call(operator.matmul, s.call("softmax", scores_of(s, q, k), -1), v)
            for _ in range(20):
                out = s.call("tanh", out)
            q = s.call(operator.add, q, out)
        return q

    assert built(attend, gradients=False) == ["rewritten"] * 60


# Products in which every dimension is as long as every other: nothing but what they stand for tells them apart


def mutated(random: Random, letters: str) -> str:
    """The letters, some of which were swapped or replaced."""
    found = [*letters]
    for _ in range(random.choice([0, 0, 0, 0, 0, 0, 1, 2])):
        first, second = (random.randrange(len(found)) for _ in range(2))
        if random.randrange(2):
            found[first], found[second] = found[second], found[first]
        else:
            found[first] = random.choice("bhqkd")
    return "".join(found)


def product(speller: Speller, left: Part, right: Part, out: str) -> fx.Node:
    """One that is right, or has letters or dimensions in wrong places."""
    parts, random = (left, right), speller.random
    if speller.chance():
        *terms, last = (mutated(random, term) for term in ("".join(left.dims), "".join(right.dims), out))
        last = "".join(dict.fromkeys(letter for letter in last if letter in "".join(terms)))
        return speller.call(torch.einsum, f"{','.join(terms)}->{last}", left.node, right.node)
    nodes = []
    for part, ends in zip(parts, ("qd", "dk") if "k" in out else ("qk", "kd"), strict=True):
        order = [part.dims.index(letter) for letter in mutated(random, "bh" + ends) if letter in part.dims]
        nodes.append(speller.call("permute", part.node, *order) if sorted(order) == [0, 1, 2, 3] else part.node)
    return speller.call(torch.matmul, *nodes)


def test_products_of_equal_sizes():
    found = Counter()

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(seed=st.integers(0, 2**32 - 1))
    def each(seed):
        torch.manual_seed(seed)
        speller = Speller(Random(seed))
        speller.sizes |= dict.fromkeys("bhqkd", 4)
        speller.heads = speller.key_heads = "h"
        x = speller.tape.tokens(speller.video((2, 2, 1)))
        query, key, value = (speller.permuted(part, speller.shuffled(part.dims)) for part in speller.projected(x))
        scores = product(speller, query, key, "bhqk")
        if value_of(scores).dim() != 4:
            return
        weights = speller.call("softmax", scores, speller.pick(3, 3, 3, 3, 3, 2, 1, 0))
        if speller.chance(6):
            weights = speller.call("permute", weights, *speller.shuffled(range(4)))
        result = product(speller, Part(weights, tuple("bhqk")), value, "bhqd")
        found.update(verdicts(rewritten_graph(speller.tape, result)))

    each()
    assert min(found["rewritten"], found.total() - found["rewritten"]) > 15, found
