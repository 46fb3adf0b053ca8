"""Changes that make something else of a spelling of attention, each at one stage of it.

Those in ``NEVER`` must be left dense. Those in ``PERHAPS`` leave, in some spellings, an attention that can be rewritten.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from graphs import getitem
from spellings import Part, Speller
from torch import fx
from torch.nn import functional as F
from vmoba_compile.passes.sizes import value_of

Change = Callable[["NearMiss", Part], Part]
NEVER: dict[str, tuple[tuple[str, ...], Change]] = {}
PERHAPS: dict[str, tuple[tuple[str, ...], Change]] = {}
OPERANDS, SCORES, WEIGHTS = ("query", "key", "value"), ("product", "scores"), ("product", "scores", "weights")


@dataclass
class NearMiss(Speller):
    """A spelling with one change; without it, all else stays as it is."""

    stage: str = ""
    made: Change | None = None
    outputs: list[fx.Node] = field(default_factory=list)
    gradients: bool = True  # off where autograd refuses the original

    def change(self, stage: str, part: Part) -> Part:
        return self.changed(part) if stage == self.stage else part

    def weights(self, scores: Part) -> tuple[Part, fx.Node | None]:
        return (self.changed(scores), None) if self.stage == "softmax" and self.made else super().weights(scores)

    def changed(self, part: Part) -> Part:
        own, self.random = self.random, Random(self.random.random())
        part = self.made(self, part) if self.made else part
        self.random = own
        return part

    def on(self, part: Part, target: Any, *args: Any, **kwargs: Any) -> Part:
        return Part(self.call(target, part.node, *args, **kwargs), part.dims)

    def effect(self, target: Any, *args: Any) -> None:
        """A call that is not made now."""
        self.tape.call(target, *args, holds=torch.zeros(()))

    def along(self, part: Part, letter: str) -> int:
        return next(place for place, dim in enumerate(part.dims) if letter in dim)

    def tokens_of(self, part: Part) -> str:
        return "q" if "q" in part.dims else "k"

    def given(self, part: Part, letters: str, make: Callable[..., torch.Tensor] = torch.randn) -> fx.Node:
        """A new input that varies over those letters, to be broadcast to the part."""
        shape = [
            n if set(dim) & set(letters) else 1 for n, dim in zip(value_of(part.node).shape, part.dims, strict=True)
        ]
        return self.give("given", make(shape))

    def reduced(self, part: Part, target: Any, letter: str = "k", **kwargs: Any) -> fx.Node:
        return self.call(target, part.node, self.along(part, letter), keepdim=True, **kwargs)

    def exp(self, part: Part, peak_of: str = "k") -> Part:
        return self.on(self.on(part, operator.sub, self.reduced(part, "amax", peak_of)), torch.exp)

    def linears(self) -> list[fx.Node]:
        return [node for node in self.tape.graph.nodes if node.op != "placeholder" and "linear" in node.name]


def never(name: str, stages: tuple[str, ...], change: Change) -> None:
    NEVER[name] = stages, change


def perhaps(name: str, stages: tuple[str, ...], change: Change) -> None:
    PERHAPS[name] = stages, change


def entered(table: Callable[..., None], *stages: str) -> Callable[[Change], Change]:
    def enter(change: Change) -> Change:
        table(change.__name__, stages, change)
        return change

    return enter


# Other tokens

never("reversal", OPERANDS, lambda s, part: s.on(part, "flip", s.along(part, s.tokens_of(part))))
never("rotation", OPERANDS, lambda s, part: s.on(part, "roll", 1, s.along(part, s.tokens_of(part))))
perhaps("detachment", OPERANDS, lambda s, part: s.on(part, "detach"))
perhaps("other sample", OPERANDS, lambda s, part: s.on(part, "flip", 0))


@entered(never, *OPERANDS)
def shuffle(s, part):
    tokens = s.tokens_of(part)
    order = torch.randperm(s.sizes[tokens]).roll(1)
    return s.on(part, "index_select", s.along(part, tokens), s.give("order", order))


@entered(never, *OPERANDS)
def other_video(s, part):
    tokens = s.tape.tokens(s.video(s.tape.grid, "other"))
    heads = s.heads if "q" in part.dims else s.key_heads
    wide = s.linear(tokens, s.size(heads) * value_of(part.node).shape[-1])
    return s.arrange(s.unfolded(Part(wide, ("b", s.tokens_of(part), f"{heads}d"))), part.dims)


@entered(perhaps, "key", "value")
def first_sample(s, part):
    return s.on(s.on(part, operator.getitem, slice(0, 1)), "expand", *value_of(part.node).shape)


@entered(perhaps, "key", "value")
def batch_and_heads_swapped(s, part):
    places = [s.along(part, "b")] + [place for place, dim in enumerate(part.dims) if dim in ("h", "g")]
    shape = value_of(part.node).shape
    return s.on(part, "transpose", *places) if len({shape[place] for place in places}) < len(places) else part


@entered(perhaps, "key", "value")
def heads_reversed(s, part):
    places = [place for place, dim in enumerate(part.dims) if dim in ("h", "g", "r")]
    return s.on(part, "flip", places) if places else part


# Scores


def small(s: NearMiss, part: Part, *numbers: float) -> Part:
    """A mask that does not take the keys away."""
    part, mask = s.aligned(part, "k")
    if s.chance():
        return s.on(part, "masked_fill", s.call("logical_not", mask), s.pick(*numbers, 0.0))
    left = s.call(operator.sub, 1.0, s.call("float", mask))
    return s.on(part, operator.add, s.call(operator.mul, left, s.pick(*numbers)))


FUNCTIONS = (torch.tanh, "sigmoid", F.relu, F.gelu, "abs", "exp", "square", "round", "sin")
never("function", WEIGHTS, lambda s, part: s.on(part, s.pick(*FUNCTIONS)))
never("clamp", WEIGHTS, lambda s, part: s.on(part, "clamp", -0.1, 0.1))
never("power", WEIGHTS, lambda s, part: s.on(part, operator.pow, 2))
never("floor", WEIGHTS, lambda s, part: s.on(part, torch.div, 0.3, rounding_mode=s.pick("floor", "trunc")))
never("times itself", WEIGHTS, lambda s, part: s.on(part, operator.mul, part.node))
never("sums so far", WEIGHTS, lambda s, part: s.on(part, "cumsum", s.along(part, "k")))
never("no gradient", WEIGHTS, lambda s, part: s.on(part, s.pick("detach", torch.detach)))
never("softcap", SCORES, lambda s, part: s.on(s.on(s.on(part, operator.truediv, 5.0), torch.tanh), operator.mul, 5.0))
never("sign", SCORES, lambda s, part: s.on(part, operator.mul, s.pick(-0.5, 0.0)))
never("negation", SCORES, lambda s, part: s.on(part, operator.neg))
never("huge shift", SCORES, lambda s, part: s.on(part, operator.add, 1e30))
never("small mask", SCORES, lambda s, part: small(s, part, -1.0, -100.0, 1e9))
never("active dropout", SCORES, lambda s, part: s.on(part, F.dropout, s.pick(0.5, 0.1), True))
never("softmax before", SCORES, lambda s, part: s.on(part, "softmax", s.along(part, "k")))
never("normed", SCORES, lambda s, part: s.on(part, operator.truediv, s.call(s.pick("std", "max", "norm"), part.node)))
never("centred", SCORES, lambda s, part: s.on(part, operator.sub, s.reduced(part, "mean", s.pick("q", "k"))))
never(
    "scale of tokens",
    SCORES,
    lambda s, part: s.on(part, operator.mul, s.given(part, s.pick("q", "k", "qk"), torch.rand)),
)
never(
    "bias",
    SCORES,
    lambda s, part: s.on(part, s.pick(operator.add, torch.sub), s.given(part, s.pick("k", "qk", "bhgrqk"))),
)
never(
    "bits", SCORES,
    lambda s, part: s.on(s.on(s.on(part, "to", torch.float16), "view", torch.bfloat16), "to", torch.float32),
)  # fmt: skip
perhaps(
    "queries and keys swapped", ("product",), lambda s, part: s.on(part, "transpose", *(s.along(part, x) for x in "qk"))
)
never("plus itself", SCORES, lambda s, part: s.on(part, operator.add, part.node))
never("rotation of keys", WEIGHTS, lambda s, part: s.on(part, "roll", 1, s.along(part, "k")))


@entered(perhaps, *SCORES)
def flat_shuffle(s, part):
    """Another permutation, under the same sizes."""
    shape = [*value_of(part.node).shape]
    permuted = s.on(part, "permute", *s.shuffled(range(len(shape))))
    if value_of(permuted.node).is_contiguous():
        return s.on(part, "flip", s.along(part, "k"))
    return s.on(permuted, "reshape", shape)


@entered(never, *SCORES)
def two_scales(s, part):
    """One for the first half of the keys, another for the rest."""
    place = s.along(part, "k")
    half = value_of(part.node).shape[place] // 2
    first = s.call("narrow", part.node, place, 0, half)
    rest = s.call("narrow", part.node, place, half, value_of(part.node).shape[place] - half)
    return Part(
        s.call(torch.cat, [s.call(operator.mul, first, 0.5), s.call(operator.mul, rest, 0.25)], place), part.dims
    )


@entered(never, *SCORES)
def float_mask_given(s, part):
    def mask(shape):
        return torch.where(torch.rand(shape) > 0.5, 0.0, -1e9).index_fill(-1, torch.tensor(0), 0.0)

    return s.on(part, operator.add, s.given(part, s.pick("k", "qk"), mask))


@entered(never, *SCORES)
def mask_of_queries(s, part):
    drop = s.given(part, s.pick("q", "qk"), lambda shape: torch.rand(shape) > 0.8)
    return s.on(part, "masked_fill", drop, s.low())


@entered(never, *SCORES)
def causal(s, part):
    tokens = s.sizes["q"]
    drop = s.call("triu", s.call(torch.ones, tokens, tokens, dtype=torch.bool), 1)
    if s.along(part, "q") > s.along(part, "k"):
        drop = s.call("transpose", drop, 0, 1)
    shape = [tokens if dim in ("q", "k") else 1 for dim in part.dims]
    return s.on(part, "masked_fill", s.call("view", drop, shape), s.low())


@entered(never, *WEIGHTS)
def whole_numbers(s, part):
    part = s.on(part, operator.mul, 100)
    return s.on(s.on(part, "to", s.pick(torch.int32, torch.int8, torch.bool)), "to", torch.float32)


@entered(never, *WEIGHTS)
def gradients_off(s, part):
    s.effect(torch._C._set_grad_enabled, False)
    part = s.on(part, "clone") if s.stage == "weights" else s.on(part, operator.mul, 1.0)
    s.effect(torch._C._set_grad_enabled, True)
    return part


@entered(never, *WEIGHTS)
def used_elsewhere(s, part):
    s.outputs.append(part.node if s.chance() else s.call(s.pick("sum", "exp", "flatten"), part.node))
    return part


@entered(perhaps, *WEIGHTS)
def used_for_nothing(s, part):
    s.call("sum", part.node)
    return part


@entered(never, *SCORES)
def second_product(s, part):
    shape = value_of(part.node).shape
    left, right = s.give("left", torch.randn(*shape[:-1], 2)), s.give("right", torch.randn(*shape[:-2], 2, shape[-1]))
    return s.on(part, operator.add, s.call(torch.matmul, left, right))


# Writes


@entered(never, "weights")
@entered(perhaps, *SCORES)
def written_to_beside(s, part):
    """The write is not what flows on, but the same memory is."""
    s.gradients = s.stage != "weights"
    spelled = s.pick("add_", "mul_", "setitem", "view", "narrow")
    if spelled == "setitem":
        s.call(operator.setitem, part.node, (..., 0), 2.0)
    elif spelled == "view":
        s.call("mul_", s.call("transpose", part.node, 0, -1), 2.0)
    elif spelled == "narrow":
        s.call("add_", s.call("narrow", part.node, s.along(part, "k"), 0, 1), 2.0)
    else:
        s.call(spelled, part.node, 2.0)
    return part


@entered(never, *WEIGHTS)
def patched(s, part):
    s.gradients = False
    s.call(operator.setitem, part.node, (..., 0, slice(None)), 0.1)
    return s.on(part, s.pick("clone", "contiguous", "float"))


@entered(perhaps, *WEIGHTS)
def write_to_operands(s, part):
    """Some of what is written to was copied before, and is read no more."""
    s.gradients = False
    for node in s.linears()[-s.pick(1, 2, 3) :]:
        target = s.pick(node, s.call("view", node, -1), getitem(s.tape, node, (..., slice(0, 1))))
        s.call(s.pick("mul_", "add_", "fill_"), target, 0.5)
    return part


@entered(perhaps, "result")
def write_after(s, part):
    s.gradients = False
    for node in s.linears():
        s.call("mul_", node, 0.5)
    return part


@entered(perhaps, "result")
def write_to_result(s, part):
    spelled = s.pick("mul_", "setitem", "view")
    if spelled == "setitem":
        s.call(operator.setitem, part.node, (..., 0), 2.0)
    elif spelled == "view":
        s.call("add_", s.call("transpose", part.node, 0, -1), 2.0)
    else:
        return s.on(part, "mul_", 2.0)
    return part


@entered(never, "scores")
def write_to_the_mask(s, part):
    """A mask that changes once it was used, before the result is made."""
    s.gradients = False
    part, mask = s.aligned(part, "k")
    part = s.on(part, "masked_fill", s.call("clone", mask) if s.chance() else mask, s.low())
    s.call("logical_not_", part.node.args[1])
    return part


@entered(never, *SCORES)
def mask_written_to_before_use(s, part):
    part, mask = s.aligned(part, "k")
    spelled = s.pick("setitem", "view", "mul", "number")
    if spelled == "number":
        number = s.call("float", mask)
        s.call(operator.setitem, number, (..., slice(0, 2)), 0.5)
        return s.on(part, operator.add, s.call(operator.mul, s.call(operator.sub, 1.0, number), -1e9))
    bias = s.call(torch.where, mask, 0.0, s.low())
    if spelled == "setitem":
        s.call(operator.setitem, bias, (..., slice(0, 2)), 1.0)
    else:
        s.call("add_", s.call("view", bias, -1), 1.0) if spelled == "view" else s.call("mul_", bias, 1e-12)
    return s.on(part, operator.add, bias)


@entered(perhaps, *SCORES)
def number_written_to_before_use(s, part):
    number = s.call(torch.tensor, 1.0)
    s.call("mul_", s.call("detach", number) if s.chance() else number, -0.5)
    return s.on(part, operator.mul, number)


@entered(never, *SCORES)
def out_argument(s, part):
    s.gradients = False
    buffer = s.give("buffer", torch.ones(value_of(part.node).shape))
    s.outputs += [buffer] if s.chance() else []
    return s.on(part, torch.mul, 0.5, out=buffer)


# Weights

AFTER = ("weights",)


def dropped(s: NearMiss, part: Part) -> fx.Node:
    return s.given(part, "k", lambda shape: torch.rand(shape) > 0.5)


never("mask after the softmax", AFTER, lambda s, part: s.on(part, "masked_fill", dropped(s, part), 0.0))
never("gate", AFTER, lambda s, part: s.on(part, operator.mul, s.given(part, s.pick("", "b", "q", "k"), torch.rand)))
never("factor", AFTER, lambda s, part: s.on(part, operator.mul, 2.0))
never("offset", AFTER, lambda s, part: s.on(part, operator.add, 0.1))
never("dropout in use", AFTER, lambda s, part: s.on(part, F.dropout, *s.pick((0.5,), (0.5, True))))
never("columns for rows", AFTER, lambda s, part: s.on(part, "transpose", s.along(part, "q"), s.along(part, "k")))
never("softmax again", AFTER, lambda s, part: s.on(part, "softmax", s.along(part, "k")))


@entered(never, "weights")
def renormed(s, part):
    return s.on(part, operator.truediv, s.call(operator.add, s.reduced(part, "sum", s.pick("q", "k")), 1.0))


@entered(never, "weights")
def top_keys(s, part):
    kept = s.call(operator.ge, part.node, s.reduced(part, "amax"))
    return Part(s.call(torch.where, kept, part.node, 0.0), part.dims)


@entered(never, "weights")
def mean_over_heads(s, part):
    mean = s.call("mean", part.node, 0, keepdim=True)
    return Part(s.call("expand", mean, *value_of(part.node).shape), part.dims)


# The softmax

INSTEAD = ("softmax",)
never("no softmax", INSTEAD, lambda s, part: s.on(part, s.pick(F.relu, torch.sigmoid, F.softplus)))
never("log_softmax", INSTEAD, lambda s, part: s.on(part, F.log_softmax, s.along(part, "k")))


@entered(never, "softmax")
def wrong_axis(s, part):
    letters = [letter for letter in f"qb{s.heads}" if letter in part.dims]
    return s.on(part, "softmax", s.along(part, s.pick(*letters)))


@entered(never, "softmax")
def softmax_of_two_axes(s, part):
    dims = (*f"b{s.heads}", "q", "k")
    both = s.call("softmax", s.call("flatten", s.arrange(s.unfolded(s.thin(part)), dims).node, -2), -1)
    return Part(s.call("view", both, [s.sizes[letter] for letter in dims]), dims)


def quotient(name: str, total: Callable[[NearMiss, Part, Part], fx.Node], peak_of: str = "k", **kwargs: Any) -> None:
    """An exp divided by something else than its sum."""

    def change(s: NearMiss, part: Part) -> Part:
        exp = s.exp(part, peak_of)
        return s.on(exp, torch.div, total(s, part, exp), **kwargs)

    never(name, INSTEAD, change)


quotient("epsilon", lambda s, part, exp: s.call(operator.add, s.reduced(exp, "sum"), s.pick(1e-6, 1.0)))
quotient("sum over another axis", lambda s, part, exp: s.reduced(exp, "sum", s.pick("q", "b")))
quotient("sum over everything", lambda s, part, exp: s.call("sum", exp.node))
quotient("sum of something else", lambda s, part, exp: s.reduced(s.on(part, torch.exp), "sum"))
quotient("rounded", lambda s, part, exp: s.reduced(exp, "sum"), rounding_mode="floor")
quotient("peak of another axis", lambda s, part, exp: s.reduced(exp, "sum"), peak_of="q")


@entered(never, "softmax")
def sum_of_whole_numbers(s, part):
    s.gradients = False
    exp = s.on(part, torch.exp)
    return s.on(exp, operator.truediv, s.call(operator.add, s.reduced(exp, "sum", dtype=torch.int64), 1))


@entered(never, "softmax")
def quotient_inverted(s, part):
    exp = s.exp(part)
    return Part(s.call(operator.truediv, s.reduced(exp, "sum"), exp.node), part.dims)


@entered(never, "softmax")
def shift_by_a_tensor(s, part):
    exp = s.on(s.on(part, operator.sub, s.given(part, s.pick("k", "qk"))), torch.exp)
    return s.on(exp, operator.truediv, s.reduced(exp, "sum"))


@entered(never, "softmax")
def logsumexp_of_another_kind(s, part):
    spelled = s.pick("twice", "detached", "axis")
    total = s.reduced(part, torch.logsumexp, s.pick("q", "b") if spelled == "axis" else "k")
    total = s.call("detach", total) if spelled == "detached" else total
    return s.on(s.on(part, torch.sub, total, **({"alpha": 2} if spelled == "twice" else {})), torch.exp)


@entered(never, "softmax")
def logsumexp_of_the_first_sample(s, part):
    total = s.reduced(part, torch.logsumexp)
    return s.on(s.on(part, operator.sub, getitem(s.tape, total, 0)), torch.exp)


@entered(never, "softmax")
def peak_of_the_first_sample(s, part):
    peak = getitem(s.tape, s.reduced(part, "amax"), 0)
    exp = s.on(s.on(part, operator.sub, peak), torch.exp)
    return s.on(exp, operator.truediv, s.reduced(exp, "sum"))
