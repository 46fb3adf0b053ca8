"""Random programs on coordinates: whatever order tracking claims, the data are really in."""

from __future__ import annotations

import operator

import torch
from graphs import Tape, getitem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from vmoba_compile.passes.sizes import value_of

GRIDS = [(2, 3, 4), (2, 2, 2), (3, 2, 2), (1, 2, 3), (2, 1, 3), (4, 2, 4)]


def _rank(node):
    return value_of(node).dim()


def _dim(draw, node):
    return draw(st.integers(0, _rank(node) - 1))


def _size(node, dim):
    return value_of(node).shape[dim]


def _order(draw, tape, node, dim):
    size = _size(node, dim)
    return tape.give(f"order_{len(tape.graph.nodes)}", torch.tensor(draw(st.permutations(range(size)))))


def permute(draw, tape, node, others):
    return tape.call("permute", node, *draw(st.permutations(range(_rank(node)))))


def transpose(draw, tape, node, others):
    return tape.call("transpose", node, _dim(draw, node), _dim(draw, node))


def flatten(draw, tape, node, others):
    first = _dim(draw, node)
    return tape.call("flatten", node, first, draw(st.integers(first, _rank(node) - 1)))


def unflatten(draw, tape, node, others):
    dim = _dim(draw, node)
    size = _size(node, dim)
    outer = draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
    return tape.call("unflatten", node, dim, (outer, size // outer))


def grid_view(draw, tape, node, others):
    """Back from tokens to the grid, or to a grid of the wrong order."""
    dims = [d for d in range(_rank(node)) if _size(node, d) == tape.grid[0] * tape.grid[1] * tape.grid[2]]
    if not dims:
        return None
    dim = draw(st.sampled_from(dims))
    return tape.call("unflatten", node, dim, draw(st.permutations(tape.grid)))


def reshape(draw, tape, node, others):
    """Any sizes of as many elements."""
    sizes = list(value_of(node).shape)
    merged = draw(st.permutations(sizes))
    return tape.call("reshape", node, *merged)


def slicing(draw, tape, node, others):
    dim = _dim(draw, node)
    start = draw(st.integers(0, _size(node, dim) - 1))
    stop = draw(st.integers(start + 1, _size(node, dim)))
    step = draw(st.sampled_from([None, None, 2]))
    return getitem(tape, node, (*[slice(None)] * dim, slice(start, stop, step)))


def select(draw, tape, node, others):
    dim = _dim(draw, node)
    return tape.call("select", node, dim, draw(st.integers(0, _size(node, dim) - 1))) if _rank(node) > 2 else None


def flip(draw, tape, node, others):
    return tape.call("flip", node, [_dim(draw, node)])


def roll(draw, tape, node, others):
    return tape.call(torch.roll, node, 1, _dim(draw, node))


def index_select(draw, tape, node, others):
    dim = _dim(draw, node)
    return tape.call("index_select", node, dim, _order(draw, tape, node, dim))


def index(draw, tape, node, others):
    dim = _dim(draw, node)
    return getitem(tape, node, (*[slice(None)] * dim, _order(draw, tape, node, dim)))


def cat_other(draw, tape, node, others):
    dim = _dim(draw, node)
    shape = list(value_of(node).shape)
    shape[dim] = draw(st.integers(1, 3))
    other = tape.give(f"text_{len(tape.graph.nodes)}", torch.full(shape, Tape.OTHER))
    return tape.call(torch.cat, [node, other] if draw(st.booleans()) else [other, node], dim)


def cat_pieces(draw, tape, node, others):
    dim = _dim(draw, node)
    pieces = tape.call("chunk", node, 2, dim)
    parts = [getitem(tape, pieces, i) for i in range(len(value_of(pieces)))]
    return tape.call(torch.cat, parts if draw(st.booleans()) else parts[::-1], dim)


def piece(draw, tape, node, others):
    pieces = tape.call("chunk", node, 2, _dim(draw, node))
    return getitem(tape, pieces, draw(st.integers(0, len(value_of(pieces)) - 1)))


def restack(draw, tape, node, others):
    dim = _dim(draw, node)
    if _rank(node) < 3:
        return None
    pieces = tape.call("unbind", node, dim)
    parts = [getitem(tape, pieces, i) for i in draw(st.permutations(range(_size(node, dim))))]
    return tape.call(torch.stack, parts, draw(st.integers(0, _rank(node) - 1)))


def pad(draw, tape, node, others):
    widths = [draw(st.integers(0, 2)) for _ in range(2 * draw(st.integers(1, _rank(node))))]
    return tape.call(F.pad, node, widths, "constant", Tape.OTHER)


def repeat(draw, tape, node, others):
    return tape.call("repeat_interleave", node, 2, _dim(draw, node))


def expand(draw, tape, node, others):
    new = tape.call("unsqueeze", node, _dim(draw, node))
    sizes = [2 if size == 1 else size for size in value_of(new).shape]
    return tape.call("expand", new, *sizes)


def clone(draw, tape, node, others):
    return tape.call("clone", node)


def add_bias(draw, tape, node, others):
    dim = _dim(draw, node)
    bias = tape.give(f"bias_{len(tape.graph.nodes)}", torch.zeros(value_of(node).shape[dim:], dtype=torch.long))
    adds = [operator.add, torch.add, *([operator.iadd] if _writable(node) else [])]
    return tape.call(draw(st.sampled_from(adds)), node, bias)


def empty_like(draw, tape, node, others):
    return tape.call(torch.full_like, node, Tape.OTHER)


def conv_inside(draw, tape, node, others):
    """A depthwise convolution, which keeps the places of what it is given."""
    rank = _rank(node)
    again = any(
        n.name == "l_self_inner_weight_" for n in tape.graph.nodes
    )  # over what the first one made: new evidence
    if rank not in (4, 5) or again:
        return None
    weight = tape.give("l_self_inner_weight_", torch.zeros(1))
    return tape.call(F.conv3d if rank == 5 else F.conv2d, node, weight, holds=value_of(node).clone())


def _writable(node):
    return 0 not in value_of(node).stride() or value_of(node).numel() == 1


def write(draw, tape, node, others):
    """Part of a tensor overwritten by a tensor of its shape, or by a number."""
    if not _writable(node):
        return None
    where = []
    for size in value_of(node).shape:
        start = draw(st.integers(0, size - 1))
        whole, stop = draw(st.integers(0, 3)), draw(st.integers(start + 1, size))
        where.append(
            slice(None) if whole else draw(st.sampled_from([start, slice(start, stop), slice(start, None, 2)]))
        )
    shape = value_of(node)[tuple(where)].shape
    values = [n for n in others if value_of(n).shape == shape and value_of(n) is not value_of(node)]
    if not values or draw(st.integers(0, 5)) == 0:
        tape.call(operator.setitem, node, tuple(where), Tape.OTHER)
    else:
        source = tape.call("clone", draw(st.sampled_from(values)))
        tape.call(operator.setitem, node, tuple(where), source)
    return node


def write_permuted(draw, tape, node, others):
    if not _writable(node):
        return None
    dim = _dim(draw, node)
    order = _order(draw, tape, node, dim)
    source = tape.call("clone", node)
    how = draw(st.sampled_from(["setitem", "copy_", "index_copy_", "out", "view"]))
    if how == "setitem":
        tape.call(operator.setitem, node, (*[slice(None)] * dim, order), source)
    elif how == "copy_":
        tape.call("copy_", node, tape.call("index_select", source, dim, order))
    elif how == "index_copy_":
        tape.call("index_copy_", node, dim, order, source)
    elif how == "out":
        tape.call(torch.index_select, source, dim, order, out=node)
    else:
        view = tape.call("transpose", node, 0, -1)
        flipped = tape.call("flip", tape.call("transpose", source, 0, -1), [0])
        tape.call("copy_", view, flipped)
    return node


OPERATIONS = [
    permute, transpose, flatten, flatten, unflatten, grid_view, reshape, slicing, select, flip, roll, index_select,
    index, cat_other, cat_pieces, piece, restack, pad, repeat, expand, clone, add_bias, empty_like, write, write,
    write_permuted, conv_inside,
]  # fmt: skip


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.data())
def test_claimed_orders_are_real(data):
    tape = Tape()
    grid = data.draw(st.sampled_from(GRIDS))
    start = tape.patches(grid) if data.draw(st.booleans()) else tape.folded_patches(grid)
    live = [start, tape.tokens(start)]
    live.append(tape.call("unflatten", live[1], 1, grid))
    for _ in range(data.draw(st.integers(2, 9))):
        operation = data.draw(st.sampled_from(OPERATIONS))
        node = data.draw(st.sampled_from(live[-4:]))
        if value_of(node).numel() > 3000:
            continue
        result = operation(data.draw, tape, node, live)
        if result is not None:
            live.append(result)
    tape.check()
