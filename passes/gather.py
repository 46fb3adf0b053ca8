"""Bring video tokens that stand elsewhere, or in another order, into one run in raster order, and back."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from .builder import Builder
from .layout import Layout, Pieces, Transposed, Written
from .sizes import multiply, value_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Gathered:
    """``order`` holds, for each place in the sequence that the operators take, the token that comes there; ``back`` the
    place of each token. Both are [tokens].
    """

    order: fx.Node
    back: fx.Node


def gather(builder: Builder, layout: Layout, key: fx.Node) -> Gathered:
    """The order of the tokens [tokens] of ``key`` [batch, heads, tokens, head_dim]; all sizes are numbers."""
    value = value_of(key)
    assert isinstance(value, torch.Tensor)
    counting = builder.call(aten.arange.default, int(value.shape[2]), dtype=torch.int64, device=value.device)
    if isinstance(layout.order, Transposed):
        order = _transposed(builder, layout, layout.order, counting)
    elif isinstance(layout.order, Pieces):
        order = _joined(builder, layout.order, counting, int(value.shape[2]))
    else:
        assert isinstance(layout.order, Written)
        order = _written(builder, layout, layout.order, counting, int(value.shape[2]))
    empty = builder.call(aten.zeros_like.default, order)
    return Gathered(order, builder.call(aten.scatter.src, empty, 0, order, counting))


def _transposed(builder: Builder, layout: Layout, order: Transposed, counting: fx.Node) -> fx.Node:
    """The video's run seen as its three axes, which are put into the order frame, row, column."""
    lengths = [layout.prefix.hint, multiply(list(layout.grid)).hint, layout.suffix.hint]
    pieces = builder.call(aten.split_with_sizes.default, counting, lengths)
    before, run, after = (builder.call(operator.getitem, pieces, i) for i in range(3))
    run = builder.call(aten.view.default, run, [layout.grid[axis].hint for axis in order.axes])
    run = builder.call(aten.permute.default, run, [order.axes.index(axis) for axis in range(3)])
    return builder.call(aten.cat.default, [before, builder.call(aten.reshape.default, run, [-1]), after])


def _joined(builder: Builder, order: Pieces, counting: fx.Node, tokens: int) -> fx.Node:
    """The video's runs one after another, and behind them all others as they stand."""
    others, position = [], 0
    for start, length in sorted(order.runs):
        others.append((position, start - position))
        position = start + length
    runs = [*order.runs, *others, (position, tokens - position)]
    pieces = [builder.call(aten.slice.Tensor, counting, 0, at, at + length) for at, length in runs if length]
    return builder.call(aten.cat.default, pieces)


def _written(builder: Builder, layout: Layout, order: Written, counting: fx.Node, tokens: int) -> fx.Node:
    """The video's tokens, and behind them all others as they stand."""
    video = multiply(list(layout.grid)).hint
    index = builder.call(aten.slice.Tensor, order.index, 0, order.first.hint, order.first.hint + video)
    index = builder.call(aten.to.dtype, index, torch.int64)
    index = builder.call(aten.remainder.Scalar, index, order.whole.hint)  # negative positions count from the end
    shift = layout.missing[0].hint - order.start.hint
    if shift or tokens != order.whole.hint:
        index = builder.call(aten.add.Scalar, index, shift)
        least, most = builder.call(aten.ge.Scalar, index, 0), builder.call(aten.lt.Scalar, index, tokens)
        within = builder.call(aten.all.default, builder.call(aten.logical_and.default, least, most))
        message = f"vmoba_compile: video tokens were written outside of the {tokens} tokens that attend; use dense()"
        builder.call(aten._assert_async.msg, within, message)
        index = builder.call(aten.clamp.default, index, 0, tokens - 1)
    taken = builder.call(aten.zeros_like.default, counting)
    taken = builder.call(aten.index_fill.int_Scalar, taken, 0, index, 1)
    different = builder.call(aten.eq.Scalar, builder.call(aten.sum.default, taken), video)
    message = "vmoba_compile: several video tokens were written to one place of a sequence; use dense()"
    builder.call(aten._assert_async.msg, different, message)
    others = builder.call(operator.getitem, builder.call(aten.sort.stable, taken, stable=True), 1)
    others = builder.call(aten.slice.Tensor, others, 0, 0, tokens - video)
    return builder.call(aten.cat.default, [index, others])
