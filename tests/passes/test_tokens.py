"""The arithmetic of token types, static and symbolic."""

from __future__ import annotations

import operator

import pytest
import sympy
import torch
from graphs import Tape, getitem
from torch.utils._sympy.functions import FloorDiv
from vmoba_compile.passes import tokens as T
from vmoba_compile.passes.reshaping import reshape
from vmoba_compile.passes.sizes import Size, add, multiply, same, size_of

S0, S1 = (sympy.Symbol(name, integer=True, positive=True) for name in ("s0", "s1"))


def size(n):
    return Size(n, n)


def grid_axes(frames=2, rows=3, columns=4, source="conv"):
    return tuple(T.grid_axis(size(n), role, source) for n, role in zip((frames, rows, columns), T.ROLES, strict=True))


def raster(source="conv"):
    return reshape(grid_axes(source=source), [size(24)], "flatten")[0]


def text(n=5, source="text"):
    return T.unknown(size(n), source)


def test_flattened_grid_is_a_raster():
    assert T.raster_of(raster()[0]).sizes == (size(2), size(3), size(4))


def test_reshape_there_and_back():
    assert reshape((raster(),), [size(2), size(3), size(4)], "view") == grid_axes()
    assert reshape((raster(),), [size(2), size(12)], "view") == (
        grid_axes()[0],
        reshape(grid_axes()[1:], [size(12)], "")[0],
    )


@pytest.mark.parametrize("sizes", [(3, 2, 4), (4, 6), (12, 2), (8, 3), (2, 2, 6)])
def test_reshape_through_a_grid_is_mixed(sizes):
    axes = reshape((raster(),), [size(n) for n in sizes], "view")
    assert any(T.is_mixed(axis) for axis in axes) or sizes == (2, 2, 6)
    assert T.raster_of(reshape(axes, [size(24)], "back")[0][0]) is None


def test_single_rows_and_columns_stay_with_their_grid():
    axes = (text(7, "channels"), *grid_axes(4, 1, 1))
    tokens = reshape(axes, [size(7), size(4)], "flatten")[1]
    assert T.raster_of(tokens[0]).sizes == (size(4), size(1), size(1))


def test_cut_and_joined_again():
    joined = T.concatenate([text(), raster(), text(3, "register")])
    left, right = T.cut(joined, size(0), size(9), "a"), T.cut(joined, size(9), size(23), "b")
    assert T.raster_of(T.cut(joined, size(5), size(24), "c")[0])
    assert T.concatenate([left, right]) == joined
    assert not any(T.raster_of(s) for s in T.concatenate([right, left]))


def test_symbolic_cut_is_proven_not_guessed():
    joined = T.concatenate([T.unknown(Size(S0, 5), "text"), raster()])
    assert T.raster_of(T.cut(joined, Size(S0, 5), size(24), "after the text")[0])
    assert T.is_mixed(T.cut(joined, size(5), size(24), "after five tokens"))


def test_join_prefers_what_is_known():
    assert T.join(raster(), text(24), "add") == T.join(text(24), raster(), "add") == raster()
    assert T.join(raster(), T.UNIT, "add") == raster()
    assert T.join(raster(), T.mixed((raster(),), size(24), "flip"), "add") == raster()


def test_join_of_contradictions_is_mixed():
    frame, row, column = grid_axes(3, 3, 3)
    assert T.is_mixed(T.join(frame, row, "add"))
    other = reshape((column, row, frame), [size(27)], "flatten")[0]
    assert T.is_mixed(T.join(reshape((frame, row, column), [size(27)], "f")[0], other, "add"))


def test_join_of_two_videos_keeps_the_first():
    assert T.join(raster("one"), raster("two"), "add") == raster("one")


def test_pieces_of_one_axis_are_told_apart():
    whole = text(24)
    outer = reshape((whole,), [size(2), size(3), size(4)], "view")[1]
    inner = reshape((whole,), [size(4), size(3), size(2)], "view")[1]
    assert outer != inner


def test_splice():
    axis = T.splice(text(30, "buffer"), size(2), raster(), "write")
    assert [T.segment_size(s).hint for s in axis] == [2, 24, 4] and T.raster_of(axis[1])


def test_sizes():
    assert same(multiply([Size(S0, 2), Size(S1, 3)]), multiply([Size(S1, 3), Size(S0, 2)]))
    assert same(Size(FloorDiv(S0**2 * S1, S0), 6), multiply([Size(S0, 2), Size(S1, 3)]))
    assert not same(Size(S0, 4), size(4)) and not same(Size(S0, 4), Size(S1, 4))
    assert not same(Size(FloorDiv(S0, 2) * 2, 4), Size(S0, 4))
    assert size_of(3) == add([size(1), size(2)]) and add([Size(S0, 2), Size(-S0, -2)]) == size(0)


def test_inputs_and_variables_of_one_name_are_told_apart():
    tape = Tape()
    first = tape.give("l_x_", torch.zeros(2, 4))
    second = tape.give("x", torch.zeros(2, 4))
    types = {
        node: axes
        for node, axes in ((n, tape.axes(n)) for n in (tape.call("clone", first), tape.call("clone", second)))
    }
    assert len(set(types.values())) == 2


def test_write_through_an_alias_is_seen_by_all():
    tape = Tape()
    tokens = tape.tokens(tape.patches((2, 3, 4)))
    copy = tape.call("clone", tokens)
    alias = tape.call("add_", copy, 0)
    tape.call(operator.setitem, alias, (slice(None),), tape.call("flip", tokens, [1]))
    assert T.is_mixed(tape.axes(tape.call("clone", copy))[1])
    assert T.raster_of(tape.axes(tape.call("clone", tokens))[1][0])


@pytest.mark.parametrize("index", [[2, 0, 1], torch.tensor([2, 0, 1])])
def test_index_reorders_its_axis_only(index):
    tape = Tape()
    grid = tape.patches((2, 3, 4))
    if isinstance(index, torch.Tensor):
        index = tape.give("order", index)
    axes = tape.axes(getitem(tape, grid, (slice(None), slice(None), slice(None), index)))
    assert [T.is_mixed(axis) for axis in axes] == [False, False, False, True, False]
    assert axes[4] == tape.axes(grid)[4]
