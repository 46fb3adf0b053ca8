"""The ways to spell a mask of attention by hand: what the scores become where a bool mask says which keys are attended."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import fx
from vmoba_compile.passes.sizes import value_of

if TYPE_CHECKING:
    from spellings import Speller

Mask = Callable[["Speller", fx.Node, fx.Node], fx.Node]


def _bias(spell: Callable[[Speller, fx.Node], fx.Node]) -> Mask:
    def mask(speller: Speller, scores: fx.Node, keep: fx.Node) -> fx.Node:
        operands = [scores, spell(speller, keep)]
        return speller.call(speller.pick(operator.add, torch.add), *speller.shuffled(operands))

    return mask


def _zeros(speller: Speller, like: fx.Node) -> fx.Node:
    return speller.call(torch.zeros, list(value_of(like).shape), dtype=speller.dtype)


def _filled_later(speller: Speller, keep: fx.Node) -> fx.Node:
    bias = _zeros(speller, keep)
    speller.call("masked_fill_", bias, speller.call("logical_not", keep), speller.low())
    return bias


def _finite(speller: Speller) -> float:
    return speller.pick(-1e9, torch.finfo(speller.dtype).min)


# A mask is finite where it is multiplied with zeros.
MASKS: dict[str, Mask] = {
    "fill": lambda s, x, m: s.call("masked_fill", x, s.call(operator.invert, m), s.low()),
    "fill in place": lambda s, x, m: s.call("masked_fill_", s.call("clone", x), s.call("logical_not", m), s.low()),
    "fill by keyword": lambda s, x, m: s.call("masked_fill", x, mask=s.call(operator.invert, m), value=s.low()),
    "fill where zero": lambda s, x, m: s.call(torch.masked_fill, x, s.call(operator.eq, m, 0), s.low()),
    "where": lambda s, x, m: s.call(torch.where, m, x, s.pick(s.low(), s.call(torch.tensor, s.low()))),
    "where not": lambda s, x, m: s.call(torch.where, s.call(torch.logical_not, m), s.low(), x),
    "where of a method": lambda s, x, m: s.call("where", x, m, s.low()),
    "minus": lambda s, x, m: s.call(
        operator.sub, x, s.call(operator.mul, s.call("float", s.call(operator.invert, m)), 1e9)
    ),
    "bias where": _bias(lambda s, m: s.call(torch.where, m, 0.0, s.low())),
    "bias 1 - keep": _bias(
        lambda s, m: s.call(operator.mul, s.call(operator.sub, 1.0, s.call(s.pick("float", "int"), m)), _finite(s))
    ),
    "bias -(1 - keep)": _bias(
        lambda s, m: s.call(operator.mul, s.call(operator.neg, s.call(operator.sub, 1.0, s.call("float", m))), 1e9)
    ),
    "bias keep - 1": _bias(
        lambda s, m: s.call(operator.mul, s.call(operator.sub, s.call("float", m), 1.0), -_finite(s))
    ),
    "bias drop": _bias(
        lambda s, m: s.call(operator.mul, s.call("to", s.call(operator.invert, m), s.dtype), _finite(s))
    ),
    "bias bool": _bias(lambda s, m: s.call(operator.mul, s.call(operator.invert, m), -1e9)),
    "bias filled": _bias(
        lambda s, m: s.call("masked_fill", _zeros(s, m), s.call(operator.invert, m), s.low())
    ),
    "bias filled in place": _bias(
        lambda s, m: s.call("masked_fill_", _zeros(s, m), s.call(operator.invert, m), s.low())
    ),
    "bias filled later": _bias(_filled_later),
}  # fmt: skip
