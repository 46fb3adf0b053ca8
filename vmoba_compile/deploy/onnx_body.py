"""The portable bodies of ``VMoBASelect`` and ``VMoBAAttention``: the same mathematics in standard ONNX operators.

Any runtime can run them, at the cost of dense attention and of memory that is quadratic in the tokens: see
:func:`body_bytes`. What decides a selection is computed in float32, and without a sort, which runtimes bound: the cut-off
is halved in ``STEPS`` steps, far below the difference of two float32 weights that can matter. Sizes are tensors, so one
body serves every grid. Source: arXiv 2506.23858, sections 3.1, 3.3 and 3.4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..kernels.partition import WORD_BITS, Geometry
from ..kernels.reference_select import RANGE_FLOOR, SUM_FLOOR

if TYPE_CHECKING:
    import onnx_ir as ir

DOMAIN, VERSION = "vmoba", 1
# Not plain "Attention": TensorRT's parser tells operators apart by their type alone, whatever the domain.
SELECT, ATTENTION = "VMoBASelect", "VMoBAAttention"
STEPS = 34  # halvings of weights between 0 and 2
FAR = 1e38  # stands for infinity, which 16-bit engines do not keep apart from NaN
TINY = 1e-30
FLOAT, INT32, INT64, BOOL = 1, 6, 7, 9  # onnx.TensorProto's numbers

Value = Any  # of onnx_ir


@dataclass(frozen=True)
class Rule:
    """How the attentions of one model select; the operators' arguments of the same names."""

    pool: str
    mode: str
    threshold: float
    topk: int
    tile: int


def functions(rule: Rule, opset: int) -> list[ir.Function]:
    """Model-local functions ``VMoBASelect`` and ``VMoBAAttention`` for that opset of the standard operators."""
    import onnx_ir as ir
    from onnxscript import build_function

    def names(*inputs: str) -> list[Any]:
        return [ir.Value(name=name) for name in inputs]

    imports = {"": opset}
    scale = ir.Attr("scale", ir.AttributeType.FLOAT, None)
    return [
        build_function(
            lambda op, *inputs: select(op, rule, *inputs), names("q", "k", "key_mask", "sizes"),
            domain=DOMAIN, name=SELECT, opset_imports=imports,
        ),
        build_function(
            lambda op, *inputs: attention(op, rule, *inputs), names("q", "k", "v", "selected", "key_mask", "sizes"),
            domain=DOMAIN, name=ATTENTION, attributes=[scale], opset_imports=imports,
        ),
    ]  # fmt: skip


def body_bytes(geometry: Geometry, batch: int, heads: int) -> int:
    """Bytes that the larger body holds at its peak: three float32 numbers for a pair of tokens, or five for an entry."""
    pairs = batch * heads * geometry.num_tokens**2
    entries = batch * heads * geometry.num_video * geometry.num_boxes
    return max(12 * pairs, 20 * entries)


class Grid:
    """Scalars and index tensors of one attention's ``sizes`` (int64 [8]: grid, block, prefix, suffix)."""

    def __init__(self, op: Any, sizes: Value) -> None:
        self.op = op
        numbers = [op.Gather(sizes, op.Constant(value_int=i)) for i in range(8)]
        self.grid, self.block, self.prefix, self.suffix = numbers[:3], numbers[3:6], numbers[6], numbers[7]
        self.counts = [
            op.Div(op.Sub(op.Add(size, step), op.Constant(value_int=1)), step)
            for size, step in zip(self.grid, self.block, strict=True)
        ]
        self.video = self._product(self.grid)
        self.boxes = self._product(self.counts)

    def _product(self, factors: list[Value]) -> Value:
        op = self.op
        return op.Mul(op.Mul(factors[0], factors[1]), factors[2])

    def range(self, end: Value) -> Value:
        op = self.op
        return op.Range(op.Constant(value_int=0), end, op.Constant(value_int=1))

    def shape(self, *extents: Value | int) -> Value:
        """A shape from scalars."""
        op = self.op
        parts = [
            op.Constant(value_ints=[x]) if isinstance(x, int) else op.Reshape(x, op.Constant(value_ints=[1]))
            for x in extents
        ]
        return op.Concat(*parts, axis=0)

    def of_video(self, x: Value, axis: int) -> Value:
        """The video tokens of ``x`` along ``axis``."""
        op = self.op
        end = op.Add(self.prefix, self.video)
        return op.Slice(x, self.shape(self.prefix), self.shape(end), op.Constant(value_ints=[axis]))

    def place(self, n: Value) -> tuple[list[Value], list[Value]]:
        """Box and place within it, on each axis, of video tokens ``n``."""
        op = self.op
        plane = op.Mul(self.grid[1], self.grid[2])
        frame = op.Div(n, plane)
        rest = op.Sub(n, op.Mul(frame, plane))
        row = op.Div(rest, self.grid[2])
        at = [frame, row, op.Sub(rest, op.Mul(row, self.grid[2]))]
        box = [op.Div(x, step) for x, step in zip(at, self.block, strict=True)]
        inside = [op.Sub(x, op.Mul(b, step)) for x, b, step in zip(at, box, self.block, strict=True)]
        return box, inside

    def box_number(self, box: list[Value]) -> Value:
        op = self.op
        return op.Add(op.Mul(op.Add(op.Mul(box[0], self.counts[1]), box[1]), self.counts[2]), box[2])

    def box_of(self, n: Value) -> Value:
        return self.box_number(self.place(n)[0])

    def extents(self, box: list[Value]) -> list[Value]:
        """Tokens of boxes on each axis; those at the edge are shorter."""
        op = self.op
        return [
            op.Min(step, op.Sub(size, op.Mul(b, step)))
            for b, size, step in zip(box, self.grid, self.block, strict=True)
        ]

    def parts(self, tile: int) -> Value:
        """Tiles of a box; see ``kernels.partition.tiles_per_box``."""
        op = self.op
        largest = self._product([op.Min(step, size) for size, step in zip(self.grid, self.block, strict=True)])
        return op.Div(op.Add(largest, op.Constant(value_int=tile - 1)), op.Constant(value_int=tile))

    def tile_of(self, n: Value, tile: int) -> Value:
        """Tile of queries of video tokens; see ``kernels.partition.tile_of``."""
        op = self.op
        box, inside = self.place(n)
        extent = self.extents(box)
        rank = op.Add(op.Mul(op.Add(op.Mul(inside[0], extent[1]), inside[1]), extent[2]), inside[2])
        parts = self.parts(tile)
        part = op.Div(op.Mul(rank, parts), self._product(extent))
        return self.box_number([op.Add(op.Mul(box[0], parts), part), box[1], box[2]])

    def tiles(self, tile: int) -> tuple[Value, Value]:
        """Box of every tile [M], and which video tokens its mean query is of, bool [M, N]."""
        op = self.op
        parts, plane = self.parts(tile), op.Mul(self.counts[1], self.counts[2])
        m = self.range(op.Mul(self.boxes, parts))
        slab = op.Div(m, plane)  # frames of boxes * parts + part
        rest = op.Sub(m, op.Mul(slab, plane))
        a = op.Div(slab, parts)
        part = op.Sub(slab, op.Mul(a, parts))
        b = op.Div(rest, self.counts[2])
        box = [a, b, op.Sub(rest, op.Mul(b, self.counts[2]))]
        size, one = self._product(self.extents(box)), op.Constant(value_int=1)
        first = op.Div(op.Sub(op.Add(op.Mul(part, size), parts), one), parts)
        last = op.Div(op.Sub(op.Add(op.Mul(op.Add(part, one), size), parts), one), parts)
        first = op.Where(
            op.Equal(first, last), op.Sub(first, one), first
        )  # one without tokens takes the query before it
        n = self.range(self.video)
        place, inside = self.place(n)
        extent = self.extents(place)
        rank = op.Add(op.Mul(op.Add(op.Mul(inside[0], extent[1]), inside[1]), extent[2]), inside[2])
        own = self.box_number(box)
        of_box = op.Equal(_column(op, own), _row(op, self.box_number(place)))
        within = op.And(
            op.GreaterOrEqual(_row(op, rank), _column(op, first)), op.Less(_row(op, rank), _column(op, last))
        )
        return own, op.And(of_box, within)


def _column(op: Any, x: Value) -> Value:
    return op.Unsqueeze(x, op.Constant(value_ints=[1]))


def _row(op: Any, x: Value) -> Value:
    return op.Unsqueeze(x, op.Constant(value_ints=[0]))


def _wide(op: Any, x: Value) -> Value:
    return op.Cast(x, to=FLOAT)


def _number(op: Any, value: float) -> Value:
    return op.Constant(value_float=value)


def _total(op: Any, x: Value) -> Value:
    return op.ReduceSum(x, op.Constant(value_ints=[-1]), keepdims=1)


def _per_head(op: Any, grid: Grid, x: Value, q: Value) -> Value:
    """Rows of every kv head [B, Hkv, R, D] for the heads that share it [B, H, R, D]."""
    heads, kv = (op.Shape(y, start=1, end=2) for y in (q, x))
    lead, tail = op.Shape(x, start=0, end=2), op.Shape(x, start=2, end=4)
    spread = op.Expand(op.Unsqueeze(x, op.Constant(value_ints=[2])), op.Concat(lead, op.Div(heads, kv), tail, axis=0))
    return op.Reshape(spread, op.Concat(op.Shape(x, start=0, end=1), heads, tail, axis=0))


def select(op: Any, rule: Rule, q: Value, k: Value, key_mask: Value, sizes: Value) -> Value:
    """Bit sets int32 [B, H, N, W], of tiles [B, H, M, W], as the operator ``vmoba::select``."""
    grid = Grid(op, sizes)
    n = grid.range(grid.video)
    box = grid.range(grid.boxes)
    member = op.Equal(_column(op, box), _row(op, grid.box_of(n)))  # [C, N]
    seen = grid.of_video(key_mask, 1)  # [B, N]
    keys = _wide(op, grid.of_video(k, 2))
    keys = op.Where(op.Unsqueeze(seen, op.Constant(value_ints=[1, 3])), keys, _number(op, 0.0))
    held = op.And(op.Unsqueeze(member, op.Constant(value_ints=[0])), op.Unsqueeze(seen, op.Constant(value_ints=[1])))
    held = _wide(op, held)  # [B, C, N]
    count = op.ReduceSum(held, op.Constant(value_ints=[2]), keepdims=0)  # [B, C]
    sums = op.MatMul(op.Unsqueeze(held, op.Constant(value_ints=[1])), keys)  # [B, Hkv, C, D]
    means = op.Div(sums, op.Unsqueeze(op.Max(count, _number(op, 1.0)), op.Constant(value_ints=[1, 3])))
    means = _per_head(op, grid, means, q)
    queries = _wide(op, grid.of_video(q, 2))
    if rule.tile:
        own, of_tile = grid.tiles(rule.tile)
        weight = _wide(op, of_tile)
        mean = op.Div(op.MatMul(weight, queries), _total(op, weight))
        queries = _wide(op, op.CastLike(mean, q))
    else:
        own = grid.box_of(n)
    gate = op.MatMul(queries, op.Transpose(means, perm=[0, 1, 3, 2]))  # [B, H, M, C]
    shape = op.Shape(gate)
    own = op.Expand(op.Equal(_column(op, own), _row(op, box)), shape)
    filled = op.Expand(op.Unsqueeze(op.Greater(count, _number(op, 0.0)), op.Constant(value_ints=[1, 2])), shape)
    chosen = _choose(op, grid, gate, own, filled, rule)
    return _pack(op, grid, chosen)


# Within a pool, entries run by box, then query, then head: how [B, H, M, C] is turned, and the pools' leading axes.
_POOLS = {
    "query_head": ([0, 1, 2, 3], [0, 0, 0, -1]),
    "head_global": ([0, 1, 3, 2], [0, 0, -1]),
    "block": ([0, 3, 2, 1], [0, 0, -1]),
    "overall": ([0, 3, 2, 1], [0, -1]),
}


def _choose(op: Any, grid: Grid, gate: Value, own: Value, valid: Value, rule: Rule) -> Value:
    """Entries taken from their pools, bool [B, H, M, C]."""
    if rule.mode == "threshold" and rule.threshold >= 1:
        return op.Or(own, valid)
    if rule.mode == "topk" and rule.topk == 1:
        return own
    turn, flat_shape = _POOLS[rule.pool]
    turned = op.Transpose(gate, perm=turn)
    turned_shape = op.Shape(turned)

    def pooled(x: Value) -> Value:
        return op.Reshape(op.Transpose(x, perm=turn), op.Constant(value_ints=flat_shape))

    mine, full = pooled(own), pooled(valid)
    value = op.Reshape(turned, op.Constant(value_ints=flat_shape))
    far, one, none = _number(op, FAR), _number(op, 1.0), _number(op, 0.0)
    last = op.Constant(value_ints=[-1])
    low = op.ReduceMin(op.Where(full, value, far), last, keepdims=1)
    high = op.ReduceMax(op.Where(full, value, op.Neg(far)), last, keepdims=1)
    width = op.Sub(high, low)
    is_flat = op.Not(op.Greater(width, _number(op, RANGE_FLOOR)))
    weight = op.Where(is_flat, one, op.Div(op.Sub(value, low), op.Where(is_flat, one, width)))
    weight = op.Where(full, weight, none)
    other = op.And(full, op.Not(mine))
    order = op.Where(other, weight, op.Neg(one))
    if rule.mode == "threshold":
        share, total = weight, op.Add(_total(op, weight), _number(op, SUM_FLOOR))
        kept = op.Div(_total(op, op.Where(mine, weight, none)), total)
        amount = op.Mul(op.Max(op.Sub(_number(op, rule.threshold), kept), none), total)
    else:
        share, amount = op.Where(other, one, none), _others(op, grid, gate, rule)
    most = op.ReduceMax(order, last, keepdims=1)
    below, above = op.Mul(most, none), op.Add(op.Mul(most, none), _number(op, 2.0))
    below, above = _halve(op, order, share, amount, most, below, above)
    certain = op.GreaterOrEqual(order, above)
    tied = op.And(op.GreaterOrEqual(order, below), op.Not(certain))
    so_far = op.CumSum(
        op.Where(tied, op.Max(share, _number(op, TINY)), none), op.Constant(value_int=len(flat_shape) - 1), exclusive=1
    )
    so_far = op.Add(so_far, _total(op, op.Where(certain, share, none)))
    taken = op.And(tied, op.Less(so_far, op.Max(amount, _number(op, TINY))))  # the first of all is always taken
    chosen = op.Reshape(op.Or(mine, op.Or(certain, taken)), turned_shape)
    back = [turn.index(axis) for axis in range(4)]
    return op.Transpose(chosen, perm=back)


def _halve(
    op: Any, order: Value, share: Value, amount: Value, most: Value, below: Value, above: Value
) -> tuple[Value, ...]:
    """The cut-off between ``below`` and ``above`` halved ``STEPS`` times.

    As a loop: unrolled, two numbers that depend on each other crosswise take TensorRT time exponential in the steps.
    """
    import onnx_ir as ir

    def scalar(name: str, kind: int) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(ir.DataType(kind)), shape=ir.Shape([]))

    def wide(name: str) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT))

    def step(op: Any, _: Value, go_on: Value, low: Value, high: Value) -> tuple[Value, ...]:
        trial = op.Mul(op.Add(low, high), _number(op, 0.5))
        reached = _total(op, op.Where(op.GreaterOrEqual(order, trial), share, _number(op, 0.0)))
        enough = op.And(op.GreaterOrEqual(reached, amount), op.GreaterOrEqual(most, trial))
        return op.Identity(go_on), op.Where(enough, trial, low), op.Where(enough, high, trial)

    body = op.builder.subgraph(
        step,
        [scalar("step", INT64), scalar("go_on", BOOL), wide("low"), wide("high")],
        [scalar("still", BOOL), wide("next_low"), wide("next_high")],
        name="halve",
    )
    for number, node in enumerate(body):  # the builder numbers from zero again; ONNX wants names of their own
        for value in node.outputs:
            value.name = f"halve_{number}_{value.name}"
    true = op.Cast(op.Constant(value_int=1), to=BOOL)
    return op.Loop(op.Constant(value_int=STEPS), true, below, above, body=body, _outputs=2)


def _others(op: Any, grid: Grid, gate: Value, rule: Rule) -> Value:
    """How many entries beside a query's own a pool takes, as a float32 scalar; exact up to 2**24."""
    number = op.Sub(op.Min(grid.boxes, op.Constant(value_int=rule.topk)), op.Constant(value_int=1))
    if rule.pool != "query_head":
        number = op.Mul(number, op.Squeeze(op.Shape(gate, start=2, end=3)))
    if rule.pool == "overall":
        number = op.Mul(number, op.Squeeze(op.Shape(gate, start=1, end=2)))
    return _wide(op, number)


def _pack(op: Any, grid: Grid, chosen: Value) -> Value:
    """Bool [B, H, M, C] to bit sets int32 [B, H, M, W]."""
    bits = op.Constant(value_int=WORD_BITS)
    words = op.Div(op.Sub(op.Add(grid.boxes, bits), op.Constant(value_int=1)), bits)
    pad = op.Sub(op.Mul(words, bits), grid.boxes)
    padded = op.Pad(_wide(op, chosen), op.Concat(op.Constant(value_ints=[0] * 7), grid.shape(pad), axis=0))
    grouped = op.Reshape(op.Cast(padded, to=INT32), op.Constant(value_ints=[0, 0, 0, -1, WORD_BITS]))
    powers = _int32(op, [1 << i for i in range(WORD_BITS - 1)] + [-(1 << (WORD_BITS - 1))])
    return op.ReduceSum(op.Mul(grouped, powers), op.Constant(value_ints=[-1]), keepdims=0)


def _unpack(op: Any, grid: Grid, words: Value) -> Value:
    """Bit sets int32 [B, H, M, W] to float32 zeros and ones [B, H, M, C]; without shifts, which int32 has not in ONNX."""
    top = op.Less(words, _int32(op, [0]))
    rest = op.Where(top, op.Sub(words, _int32(op, [-(1 << 31)])), words)
    last = op.Constant(value_ints=[-1])
    shifted = op.Div(op.Unsqueeze(rest, last), _int32(op, [1 << i for i in range(WORD_BITS - 1)]))
    two = _int32(op, [2])
    low = op.Sub(shifted, op.Mul(op.Div(shifted, two), two))
    bits = op.Concat(low, op.Unsqueeze(op.Cast(top, to=INT32), last), axis=-1)
    flat = op.Reshape(bits, op.Constant(value_ints=[0, 0, 0, -1]))
    start, axis = op.Constant(value_ints=[0]), op.Constant(value_ints=[3])
    return _wide(op, op.Slice(flat, start, grid.shape(grid.boxes), axis))


def _int32(op: Any, values: list[int]) -> Value:
    import numpy as np
    import onnx_ir as ir

    return op.Constant(value=ir.tensor(np.array(values, dtype=np.int32)))


def attention(
    op: Any, rule: Rule, q: Value, k: Value, v: Value, selected: Value, key_mask: Value, sizes: Value
) -> tuple[Value, Value]:
    """``out`` [B, H, S, D] in q's dtype and ``lse`` float32 [B, H, S], as the operator ``vmoba::attention``."""
    import onnx_ir as ir

    grid = Grid(op, sizes)
    tokens = op.Add(op.Add(grid.prefix, grid.video), grid.suffix)
    allowed = _unpack(op, grid, selected)
    if rule.tile:
        allowed = op.Gather(allowed, grid.tile_of(grid.range(grid.video), rule.tile), axis=2)
    # Condition queries attend to every box, and every query to the condition tokens, which are one more box.
    pads = op.Concat(
        op.Constant(value_ints=[0, 0]), grid.shape(grid.prefix), op.Constant(value_ints=[0, 0, 0]),
        grid.shape(grid.suffix), op.Constant(value_ints=[1]), axis=0,
    )  # fmt: skip
    allowed = op.Pad(allowed, pads, _number(op, 1.0))  # [B, H, S, C + 1]
    n = op.Sub(grid.range(tokens), grid.prefix)
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    is_video = op.And(op.GreaterOrEqual(n, zero), op.Less(n, grid.video))
    inside = op.Min(op.Max(n, zero), op.Sub(grid.video, one))
    box = op.Where(is_video, grid.box_of(inside), grid.boxes)
    seen = op.Greater(op.Gather(allowed, box, axis=3), _number(op, 0.5))
    seen = op.And(seen, op.Unsqueeze(key_mask, op.Constant(value_ints=[1, 2])))  # [B, H, S, S]

    none = _number(op, 0.0)
    values = op.Where(op.Unsqueeze(key_mask, op.Constant(value_ints=[1, 3])), _wide(op, v), none)
    keys, values = (_per_head(op, grid, x, q) for x in (_wide(op, k), values))
    scale = op.Constant(value_float=ir.RefAttr("value_float", "scale", ir.AttributeType.FLOAT))
    scores = op.MatMul(op.Mul(_wide(op, q), scale), op.Transpose(keys, perm=[0, 1, 3, 2]))
    scores = op.Where(seen, scores, _number(op, -FAR))
    peak = op.ReduceMax(scores, op.Constant(value_ints=[-1]), keepdims=1)
    weights = op.Where(seen, op.Exp(op.Sub(scores, peak)), none)
    total = _total(op, weights)
    anything = op.Greater(total, none)
    divisor = op.Where(anything, total, _number(op, 1.0))
    out = op.CastLike(op.Div(op.MatMul(weights, values), divisor), q)
    lse = op.Where(anything, op.Add(peak, op.Log(divisor)), _number(op, -math.inf))
    return out, op.Squeeze(lse, op.Constant(value_ints=[-1]))
