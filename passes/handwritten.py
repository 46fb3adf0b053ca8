"""Read softmax attention that is written out by hand: two products with a softmax between them.

The walk starts at the softmax (or at an ``exp`` that is divided by its sum), goes up to the product of queries and keys
and down to the product with the values, and follows what each dimension stands for. Every step between must be one that
a scaled-dot-product attention has: a scale, a mask, a cast, a view, a dropout. Anything else, and anything that uses the
weights beside the values, leaves the attention dense.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import fx

from .effects import check_undisturbed, is_live
from .labels import CHANNELS, KEYS, QUERIES, VALUES, Dims, Labels
from .names import name_of
from .products import BROADCAST, Product, product_of
from .reading import CASTS, FLOOR, Mask, Operand, Reading, Unread, argument, called, is_floating, number_of, where_of
from .report import Reason
from .sizes import ONE, same, shape_of, value_of
from .softmax import Ends, ends_of

_SAME = CASTS | {"contiguous", "clone"}
_VIEWS = frozenset(["view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as"])
_SWAPS = frozenset(["transpose", "swapaxes", "swapdims", "mT", "permute"])
_SCALES = frozenset(["mul", "mul_", "div", "div_", "multiply", "divide", "true_divide", "neg"])
_MASKS = frozenset(["add", "add_", "sub", "sub_", "masked_fill", "masked_fill_", "where"])
_DROPOUT = frozenset(["dropout", "dropout_", "alpha_dropout", "feature_dropout"])
_STEPS = _SAME | _VIEWS | _SWAPS
_SWITCHES = frozenset(["_set_grad_enabled", "set_grad_enabled", "_enter_inference_mode", "_exit_inference_mode"])
_IN_PLACE = frozenset(name for name in _SCALES | _MASKS if name.endswith("_"))
ON_THE_WAY = _STEPS | _SCALES | _MASKS | _DROPOUT


def read(node: fx.Node) -> Reading:
    """The attention around a softmax or exp. Raises :class:`Unread` where it is not one, or not understood."""
    ends = ends_of(node)
    chain = _up(ends.scores, ends.reader)
    if chain is None:
        raise Unread(f"the scores of {name_of(node)} are no product of queries and keys that is understood")
    product, steps = chain
    reading, state = _scores(node, product)
    for step in steps:
        state.take(step)
    along = state.dims[ends.dim % len(state.dims)] if state.dims else ()
    if along not in ((QUERIES,), (KEYS,)):
        raise Unread(f"{name_of(node)} runs over {' x '.join(along) or 'nothing'}, not over the keys")
    if along == (QUERIES,):  # keys times queries: the other way round
        _swap(reading, state)
    _check_queries(reading)
    reading.result, inner = _down(ends, state)
    reading.nodes = _alone([product.node, *steps, *ends.inside, node, ends.weights, *inner])
    last = reading.result if ends.sum is None else inner[0]
    operands = [(product.left, product.node), (product.right, product.node), (reading.value.node, last)]
    _undisturbed(reading, product.node, [*operands, *state.read])
    reading.scale = state.scale
    return reading


def _same_dtype(*nodes: fx.Node) -> bool:
    return len({getattr(value_of(node), "dtype", None) for node in nodes}) == 1


# Upwards


def _up(node: object, reader: fx.Node, seen: set[fx.Node] | None = None) -> tuple[Product, list[fx.Node]] | None:
    """The product that a tensor is made of and the steps until it is read, nearest to the product first."""
    seen = set() if seen is None else seen
    if not isinstance(node, fx.Node) or len(seen) > 64:
        return None
    node = _written(node, reader)
    if node in seen:
        return None
    seen.add(node)
    product = product_of(node)
    if product is not None:
        return product, []
    if called(node) not in ON_THE_WAY:
        return None
    inputs = node.all_input_nodes if called(node) in _SCALES | _MASKS else node.all_input_nodes[:1]
    for given in inputs:
        found = _up(given, node, seen)
        if found is not None:
            return found[0], [*found[1], node]
    return None


def _written(node: fx.Node, reader: fx.Node) -> fx.Node:
    """The last step in place before a tensor is read: its result is the tensor."""
    steps = [x for x in node.users if called(x) in _IN_PLACE and argument(x, 0, "input", "self") is node and x < reader]
    return _written(max(steps), reader) if steps else node


def _tensor(node: object) -> object:
    """The tensor that steps in place wrote to."""
    while isinstance(node, fx.Node) and called(node) in _IN_PLACE:
        node = argument(node, 0, "input", "self")
    return node


def _tokens(product: Product) -> tuple[str, str]:
    """The rows and columns; where there are more, those that are equally many are tokens, the others heads."""
    left, right = (
        dict(zip(dims, shape_of(operand) or [], strict=True))
        for operand, dims in ((product.left, product.left_dims), (product.right, product.right_dims))
    )
    pairs = [(row, column) for row in product.rows for column in product.columns]
    pairs = [pair for pair in pairs if same(left[pair[0]], right[pair[1]])] if len(pairs) > 1 else pairs
    if len(pairs) != 1:
        raise Unread(f"{name_of(product.node)} of queries and keys that cannot be told from heads")
    return pairs[0]


def _scores(node: fx.Node, product: Product) -> tuple[Reading, _State]:
    row, column = _tokens(product)
    names = {row: QUERIES, column: KEYS, product.summed: CHANNELS, BROADCAST: BROADCAST}
    batch = [x for x in product.out_dims if x not in names]
    names |= {x: x for x in batch}
    labels = Labels()
    operands = []
    for operand, given in (
        (product.left, product.left_dims),
        (product.right, product.right_dims),
        (product.node, product.out_dims),
    ):
        sizes = shape_of(operand) or []
        labels.sizes |= {names[x]: size for x, size in zip(given, sizes, strict=True) if x}
        # What is one wide can stand anywhere, so that it is not followed through views.
        alone = [not x or (x in batch and size == ONE) for x, size in zip(given, sizes, strict=True)]
        operands.append(
            Operand(operand, tuple(() if one else (names[x],) for x, one in zip(given, alone, strict=True)))
        )
    query, key, scores = operands
    reading = Reading(node, query, key, query, node, scores.dims, labels, batch)
    made, left = (value_of(x) for x in (product.node, product.left))
    if isinstance(made, torch.Tensor) and isinstance(left, torch.Tensor) and made.dtype != left.dtype:
        reading.dtype = made.dtype
    state = _State(reading, scores.dims, scale=product.alpha, previous=product.node)
    if product.bias is not None:
        state.bias(product.bias, product.beta)
    return reading, state


def _swap(reading: Reading, state: _State) -> None:
    other = {QUERIES: KEYS, KEYS: QUERIES}

    def swapped(dims: Dims) -> Dims:
        return tuple(tuple(other.get(x, x) for x in names) for names in dims)

    query = replace(reading.query, dims=swapped(reading.query.dims))
    reading.query, reading.key = replace(reading.key, dims=swapped(reading.key.dims)), query
    sizes = reading.labels.sizes
    sizes[QUERIES], sizes[KEYS] = sizes[KEYS], sizes[QUERIES]
    reading.masks = [replace(mask, dims=swapped(mask.dims)) for mask in reading.masks]
    state.dims = swapped(state.dims)


def _check_queries(reading: Reading) -> None:
    labels = reading.labels
    present = {x for names in reading.query.dims for x in labels.leaves(names)}
    if any(x not in present and labels.sizes[x] != ONE for x in labels.leaves(reading.batch)):
        raise Unread("queries that are broadcast over the batch or the heads of the keys", Reason.LAYOUT)


@dataclass
class _State:
    """What the dimensions of the scores or weights stand for at one step, and what was done to them so far."""

    reading: Reading
    dims: Dims
    previous: fx.Node
    scale: float = 1.0
    weights: bool = False  # past the softmax
    read: list[tuple[fx.Node, fx.Node]] = field(default_factory=list)  # masks and factors, each with the step it is in
    step: fx.Node | None = None

    def take(self, step: fx.Node) -> None:
        self.step = step
        name, labels = name_of(step), self.reading.labels
        if not is_floating(step) or (name in _STEPS - CASTS and not _same_dtype(step, self.previous)):
            raise Unread(f"{name} of the scores as another type")
        if name in _VIEWS:
            dims = labels.reshape(self.dims, shape_of(step) or [], (QUERIES, KEYS))
            if dims is None:
                raise Unread(f"a {name} of the scores that cuts through their tokens")
            self.dims = dims
        elif name in _SWAPS:
            self.dims = _permuted(step, self.dims)
        elif name in _DROPOUT:
            self._dropout(step)
        elif name in _SAME:
            pass
        elif self.weights:
            raise Unread(f"{name} of the weights after the softmax")
        elif name in _SCALES:
            self._scale(step, name)
        else:
            self._mask(step, name)
        shape = shape_of(step) or []
        if len(self.dims) != len(shape) or not all(map(same, map(labels.size, self.dims), shape)):
            raise Unread(f"{name} changes the dimensions of the scores")
        self.previous = step

    def _dropout(self, step: fx.Node) -> None:
        training = argument(step, 2, "training", "train")
        chance = argument(step, 1, "p")
        # nn.functional.dropout drops unless told otherwise; a method or an aten operator is always told.
        if training is False or chance == 0:
            return
        if not self.weights:
            raise Unread("dropout of the scores before the softmax")
        self.reading.dropout = float(chance) if isinstance(chance, (int, float)) else 0.5

    def _scale(self, step: fx.Node, name: str) -> None:
        if name == "neg":
            self._by(-1.0)
            return
        first, other = self._operands(step)
        if step.kwargs.get("rounding_mode") is not None:
            raise Unread("a division of the scores that rounds")
        kind = "mul" if name.startswith("mul") else "div"
        if kind == "div" and not first:
            raise Unread("a division by the scores")
        number = number_of(other)
        if number is not None:
            if not number:
                raise Unread("scores multiplied or divided by zero")
            self._by(number if kind == "mul" else 1 / number)
            return
        if not isinstance(other, fx.Node):
            raise Unread(f"{name} of the scores by {other!r}")
        if self.reading.masks:
            raise Unread("scores scaled by a tensor after they were masked", Reason.MASK)
        dims = self._aligned(other)
        if any({QUERIES, KEYS} & set(names) for names in dims):
            raise Unread(f"{name} of the scores by a tensor that varies over the tokens")
        self.reading.factors.append((kind, Operand(other, dims)))

    def _operands(self, step: fx.Node) -> tuple[bool, object]:
        """Whether the scores are the first operand, and what the other one is."""
        first, second = argument(step, 0, "input", "self"), argument(step, 1, "other")
        if self._are_scores(first) == self._are_scores(second) or len(step.args) > 2:
            raise Unread(f"{name_of(step)} of the scores with themselves")
        return self._are_scores(first), second if self._are_scores(first) else first

    def _are_scores(self, node: object) -> bool:
        return _tensor(node) is _tensor(self.previous)

    def _by(self, number: float) -> None:
        self.scale *= number
        masks = self.reading.masks
        self.reading.masks = [replace(mask, scale=mask.scale * number) for mask in masks]

    def _mask(self, step: fx.Node, name: str) -> None:
        reading = self.reading
        if name.startswith(("add", "sub")):
            if step.kwargs.get("alpha", 1) != 1:
                raise Unread("a mask added with an alpha", Reason.MASK)
            first, other = self._operands(step)
            if name.startswith("sub") and not first:
                raise Unread("scores subtracted from something")
            number = number_of(other)
            if number is None:
                assert isinstance(other, fx.Node)
                self.bias(other, -1.0 if name.startswith("sub") else 1.0)
            elif not abs(number) < -FLOOR:  # another shift changes no weight; this one leaves no digits
                raise Unread(f"scores shifted by {number:g}")
            return
        if name == "where":
            condition, yes, no = where_of(step)
            kept = self._are_scores(yes)
            fill = no if kept else yes
            if not isinstance(condition, fx.Node) or kept == self._are_scores(no):
                raise Unread("where over scores that is not understood", Reason.MASK)
            kind = "keep" if kept else "drop"
        else:
            if not self._are_scores(argument(step, 0, "input", "self")):
                raise Unread("scores that fill something masked", Reason.MASK)
            condition, fill, kind = argument(step, 1, "mask"), argument(step, 2, "value"), "drop"
        number = number_of(fill)
        if number is None:
            raise Unread(f"scores are masked with {fill}, whose value is not known", Reason.MASK)
        assert isinstance(condition, fx.Node)
        reading.masks.append(Mask(kind, condition, self._aligned(condition), number))

    def bias(self, node: fx.Node, scale: float) -> None:
        self.reading.masks.append(Mask("bias", node, self._aligned(node), scale))

    def _aligned(self, mask: fx.Node) -> Dims:
        """What the dimensions of a mask or factor stand for; those of size one stand for nothing."""
        shape = shape_of(mask) or []
        self.read.append((mask, self.step or self.previous))
        if len(shape) > len(self.dims):
            raise Unread("a mask of more dimensions than the scores", Reason.MASK)
        here = self.dims[len(self.dims) - len(shape) :]
        return tuple(() if size == ONE else names for size, names in zip(shape, here, strict=True))


def _permuted(step: fx.Node, dims: Dims) -> Dims:
    rank = len(dims)
    if name_of(step) == "permute":
        given = step.args[1] if len(step.args) == 2 and isinstance(step.args[1], Sequence) else step.args[1:]
        dims_given = cast("Sequence[object]", given or step.kwargs.get("dims", ()))
        order = [x % rank for x in dims_given if isinstance(x, int)]
        if sorted(order) != list(range(rank)):
            raise Unread("a permutation of the scores that is not understood")
        return tuple(dims[x] for x in order)
    first, second = (
        (-2, -1) if name_of(step) == "mT" else (argument(step, 1, "dim0", "axis0"), argument(step, 2, "dim1", "axis1"))
    )
    if not isinstance(first, int) or not isinstance(second, int):
        raise Unread("a transpose of the scores that is not understood")
    swapped = list(dims)
    swapped[first % rank], swapped[second % rank] = swapped[second % rank], swapped[first % rank]
    return tuple(swapped)


# Downwards


def _down(ends: Ends, state: _State) -> tuple[fx.Node, list[fx.Node]]:
    """The result of the product with the values, and the steps on the way to it."""
    reading = state.reading
    state.weights, state.previous = True, ends.weights
    node, steps = ends.weights, []
    while True:
        live = [user for user in node.users if user not in ends.inside and is_live(user) and not _asks(user, node)]
        if len(live) != 1:
            raise Unread("the attention weights are used for more than the values", Reason.WEIGHTS_USED)
        product = product_of(live[0])
        if product is not None:
            break
        if name_of(live[0]) not in _STEPS | _DROPOUT:
            raise Unread(f"{name_of(live[0])} of the weights after the softmax")
        node = live[0]
        state.take(node)
        steps.append(node)
    _values(product, node, state)
    if ends.sum is None:
        return product.node, [*steps, product.node]
    (division,) = ends.sum.users
    beside = state.dims[:-1] == reading.dims[:-1] and (state.dims[-1], reading.dims[-1]) == ((KEYS,), (VALUES,))
    if division.args[0] is not product.node or steps or not beside:
        raise Unread("a sum of exponentials that divides something else than the result")
    return division, [product.node, division]


def _asks(user: fx.Node, node: fx.Node) -> bool:
    """True where only the dtype or the sizes of a node are used."""
    return called(user) in ("type_as", "view_as") and argument(user, 0, "input", "self") is not node


def _values(product: Product, weights: fx.Node, state: _State) -> None:
    """What the values' dimensions and the result's stand for, told by those of the weights."""
    left = product.left is weights
    if left == (product.right is weights) or product.bias is not None or product.alpha != 1:
        raise Unread("a product of the weights with more than the values")
    own, other = (product.left_dims, product.right_dims) if left else (product.right_dims, product.left_dims)
    value = product.right if left else product.left
    names = dict(zip(own, state.dims, strict=True))
    if names.get(product.summed) != (KEYS,) or BROADCAST in own:
        raise Unread("the weights are not summed over the keys")
    free, free_values = (product.rows, product.columns) if left else (product.columns, product.rows)
    if (QUERIES,) not in [names[x] for x in free] or len(free_values) != 1:
        raise Unread("the result of the weights is not one row for each query")
    names[free_values[0]] = (VALUES,)
    names[BROADCAST] = ()
    reading = state.reading
    reading.value = Operand(value, tuple(names[x] for x in other))
    reading.dims = tuple(names[x] for x in product.out_dims)
    for label, size in zip(other, shape_of(value) or [], strict=True):
        if names[label] == (VALUES,):
            reading.labels.sizes[VALUES] = size
        elif names[label] == (KEYS,) and not same(size, reading.labels.sizes[KEYS]):
            raise Unread("values of another number than the keys")


# What else happens to the tensors


def _alone(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """The nodes in order, the result last; no other node may need what comes before it."""
    inside, result = set(nodes), nodes[-1]
    for node in inside:
        if node.kwargs.get("out") is not None:
            raise Unread(f"{name_of(node)} writes to a tensor given as out=")
    for node in inside - {result}:
        others = [user for user in node.users if user not in inside and is_live(user)]
        if others:
            raise Unread(
                f"the scores or weights are also used by {name_of(others[0])}, so they must be computed",
                Reason.WEIGHTS_USED,
            )
    return [node for node in result.graph.nodes if node in inside]


def _undisturbed(reading: Reading, start: fx.Node, read: Sequence[tuple[fx.Node, fx.Node]]) -> None:
    """Nothing is written to an operand once it was ``read`` at a step, and gradients are not switched: the call that is
    spelled reads all of them where the result is made.
    """
    for operand, step in read:
        check_undisturbed([operand], step, reading.result)
    node = start
    while node is not reading.result:
        if called(node) in _SWITCHES:
            raise Unread("gradients are switched on or off between the products of the attention")
        node = node.next
