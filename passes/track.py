"""Walk a graph once, in order, and give every tensor its token type.

Subgraphs that are called once (activation checkpointing, autocast regions) are entered with the types of the call's
arguments. Graphs from Dynamo are not functional: a write into a tensor refines or, where it contradicts, forgets what
was known of the tensor and of everything that shares its memory.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from .effects import mutates
from .indexing import SLICES, IndexMap, index_map, index_write, number, slice_axis, slicing
from .names import is_elementwise, name_of
from .op import Op, Result, Shards
from .rules import RULES, elementwise
from .shards import note_shards
from .sizes import ONE, Lengths, Size, memory_of, same, shape_of, value_of
from .tokens import (
    ROLES,
    Axes,
    Axis,
    Origin,
    Raster,
    axis_size,
    claims,
    factors,
    grid_axis,
    join,
    mixed,
    ordered,
    splice,
    unknown,
    unknowns,
    unpatched,
)

_PARAMETER = re.compile(r"^(l_self_|l__self__|p_|b_|c_|getattr_)|_(parameters|buffers)_", re.IGNORECASE)
_WRITES_SECOND_ARGUMENT = frozenset(["setitem", "copy_"])
_NEW = frozenset(["empty", "empty_like", "new_empty", "zeros", "zeros_like", "new_zeros"])  # memory without tokens


@dataclass
class Scope:
    """One graph (the whole model's or a called subgraph's) with the types of its nodes."""

    module: fx.GraphModule
    types: dict[fx.Node, Result] = field(default_factory=dict)
    call: fx.Node | None = None  # the node in the caller's graph, None at the top
    calls: int = 1  # how often this subgraph is called
    label: str = ""  # precedes the names of its nodes, which other graphs use again
    sharing: dict[int, list[fx.Node]] = field(default_factory=dict)  # nodes by the memory that they lie in
    lengths: Lengths = field(default_factory=dict)  # of the whole model
    shards: Shards = field(default_factory=dict)  # of the whole model
    writers: list[fx.Node] = field(default_factory=list)  # nodes that write to a tensor, in order

    def op(self, node: fx.Node) -> Op:
        return Op(node, name_of(node), self.axes_of, self.label, self.lengths, self.shards)

    def axes_of(self, node: fx.Node) -> Axes | None:
        found = self.types.get(node)
        return found if isinstance(found, tuple) else None


@dataclass
class Given:
    """What is known of the graph's inputs before the walk: types by their places, and what showed each grid in them."""

    axes: dict[int, Axes] = field(default_factory=dict)
    told: dict[str, str] = field(default_factory=dict)
    shards: Shards = field(default_factory=dict)


@dataclass
class Tracking:
    """The result: every graph walked, in execution order of its nodes, and the grid evidence found in it."""

    top: Scope
    given: Given = field(default_factory=Given)
    order: list[tuple[Scope, fx.Node]] = field(default_factory=list)
    unentered: list[tuple[Scope, fx.Node, fx.GraphModule]] = field(default_factory=list)
    grids: dict[str, fx.Node] = field(default_factory=dict)


def track(module: fx.GraphModule, wanted: Callable[[fx.Node], bool], given: Given | None = None) -> Tracking:
    """Types for the whole graph; ``wanted`` picks the nodes that are listed in ``order``."""
    given = given or Given()
    tracking = Tracking(Scope(module, shards=dict(given.shards)), given)
    _walk(tracking.top, tracking.given.axes, tracking, wanted)
    found = _unpatched_inputs(tracking.top)
    if found:  # what happens to the tokens at the end tells what they are from the beginning
        inputs = tracking.given.axes | {place: axes for place, (axes, _) in found.items()}
        tracking = Tracking(Scope(module, shards=dict(given.shards)), given)
        tracking.grids |= {source: node for _, grids in found.values() for source, node in grids.items()}
        _walk(tracking.top, inputs, tracking, wanted)
    return tracking


def _unpatched_inputs(scope: Scope) -> dict[int, tuple[Axes, dict[str, fx.Node]]]:
    """Inputs that are sequences of video tokens, as the graph's results show; by place, with that node for each source."""
    rasters: dict[str, set[Raster]] = {}
    nodes: dict[str, fx.Node] = {}
    outputs = scope.module.graph.find_nodes(op="output")
    for node in outputs[0].all_input_nodes if outputs else ():
        raster = unpatched(scope.axes_of(node) or ())
        if raster is not None:
            rasters.setdefault(raster.source, set()).add(raster)
            nodes.setdefault(raster.source, node)
    found = {}
    for place, node in enumerate(scope.module.graph.find_nodes(op="placeholder")):
        axes = list(scope.axes_of(node) or ())
        grids = {}
        for dim, axis in enumerate(axes):
            source = axis[0][0].source if len(axis) == 1 and len(axis[0]) == 1 else ""
            if len(rasters.get(source, ())) == 1:
                (raster,) = rasters[source]
                pieces = zip(raster.sizes, ROLES, strict=True)
                axes[dim] = (tuple(grid_axis(size, role, source)[0][0] for size, role in pieces),)
                grids[source] = nodes[source]
        if grids:
            found[place] = (tuple(axes), grids)
    return found


def subgraph_calls(module: fx.GraphModule) -> Iterator[tuple[fx.Node, list[tuple[int, fx.GraphModule]]]]:
    """Higher-order calls: the node, and (argument position, GraphModule) of the graphs it is given."""
    for node in module.graph.nodes:
        graphs = graph_arguments(module, node)
        if graphs:
            yield node, graphs


def graph_arguments(module: fx.GraphModule, node: fx.Node) -> list[tuple[int, fx.GraphModule]]:
    found = []
    if node.op == "call_function":
        for position, arg in enumerate(node.args):
            if isinstance(arg, fx.Node) and arg.op == "get_attr":
                target = _attribute(module, str(arg.target))
                if isinstance(target, fx.GraphModule):
                    found.append((position, target))
    return found


def _attribute(module: torch.nn.Module, path: str) -> object:
    found: object = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


def _walk(scope: Scope, inputs: Mapping[int, Result], tracking: Tracking, wanted: Callable[[fx.Node], bool]) -> None:
    calls = Counter(id(graph) for _, graphs in subgraph_calls(scope.module) for _, graph in graphs)
    for node in scope.module.graph.nodes:
        for memory in _memory(node):
            scope.sharing.setdefault(memory, []).append(node)
        if mutates(node):
            scope.writers.append(node)
    place = 0
    for node in scope.module.graph.nodes:
        if node.op == "placeholder":
            scope.types[node] = inputs.get(place) or _input_axes(scope, node)
            place += 1
            continue
        if node.op == "get_attr":
            scope.types[node] = unknowns(shape_of(node) or [], scope.label + node.name, Origin.CONSTANT)
            continue
        if node.op not in ("call_function", "call_method"):
            continue
        graphs = graph_arguments(scope.module, node)
        if wanted(node):
            tracking.order.append((scope, node))
        elif graphs:
            _enter(scope, node, graphs, calls, tracking, wanted)
            continue
        _type(scope, node)
        for axis in scope.axes_of(node) or ():
            for factor in factors(axis):
                if factor.role in ROLES:
                    tracking.grids.setdefault(factor.source, node)


def _memory(node: fx.Node) -> list[int]:
    """Where the node's tensors lie. Example values alias each other as the tensors do when the graph runs."""
    value = value_of(node)
    places = [memory_of(tensor) for tensor in (value if isinstance(value, (tuple, list)) else [value])]
    return [place for place in places if place is not None]


def _input_axes(scope: Scope, node: fx.Node) -> Axes:
    origin = Origin.CONSTANT if _PARAMETER.search(node.name) else Origin.INPUT
    return unknowns(shape_of(node) or [], scope.label + node.name, origin)


def _enter(
    scope: Scope,
    node: fx.Node,
    graphs: list[tuple[int, fx.GraphModule]],
    calls: Counter[int],
    tracking: Tracking,
    wanted: Callable[[fx.Node], bool],
) -> None:
    """Type a higher-order call by walking its graph, where it has one and its inputs are the call's arguments."""
    (position, graph), *others = graphs
    placeholders = graph.graph.find_nodes(op="placeholder")
    arguments = [arg for index, arg in enumerate(node.args) if index > position]
    if arguments and isinstance(arguments[0], (tuple, list)) and len(arguments) == 1:
        arguments = list(arguments[0])
    arguments = arguments[len(arguments) - len(placeholders) :]
    if others or len(arguments) != len(placeholders):
        tracking.unentered.extend((scope, node, inner) for _, inner in graphs)
        return
    inner = Scope(graph, call=node, calls=scope.calls * calls[id(graph)], label=f"{scope.label}{node.name}/")
    inner.lengths, inner.shards = scope.lengths, scope.shards
    types = {
        index: scope.types[arg]
        for index, arg in enumerate(arguments)
        if isinstance(arg, fx.Node) and arg in scope.types
    }
    _walk(inner, types, tracking, wanted)
    for index, passed in types.items():
        if inner.types[placeholders[index]] != passed:  # written to, inside
            _forget(scope, arguments[index], inner.label)  # type: ignore[arg-type]
    results = graph.graph.output_node().args[0]
    if isinstance(results, (tuple, list)):
        scope.types[node] = [inner.axes_of(r) or () if isinstance(r, fx.Node) else () for r in results]


def _type(scope: Scope, node: fx.Node) -> None:
    name = name_of(node)
    op = scope.op(node)
    source = node.args[0] if node.args else None
    if name in _WRITES_SECOND_ARGUMENT and isinstance(source, fx.Node):
        _write(scope, node, name)
        return
    parts = scope.types.get(source) if name == "getitem" and isinstance(source, fx.Node) else None
    if isinstance(parts, list):
        index = node.args[1]
        if isinstance(index, int) and -len(parts) <= index < len(parts):
            scope.types[node] = parts[index]
        else:
            scope.types[node] = op.unknown()
        return
    rule = RULES.get(name)
    if rule is not None:
        result = rule(op)
    elif is_elementwise(name):
        result = elementwise(op)
    else:
        result = op.unknown()
        written = _written(node, name)
        if name == "index_put_" and _is_number(node.args[2]):
            scope.types[node] = scope.axes_of(written[0]) or op.unknown()
            return
        if name in ("index_put_", "index_copy_") and _write_by_index(scope, node, written[0]):
            return
        for tensor in written:
            _forget(scope, tensor, op.label)
        if written and name.endswith("_"):  # in place: the result is the tensor itself
            result = scope.axes_of(written[0]) or result
    out = node.kwargs.get("out")
    if out is not None:
        for target in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(target, fx.Node):
                _forget(scope, target, op.label)
        result = op.unknown()
    if isinstance(result, tuple):
        result = _fitting(op, result)
    scope.types[node] = result
    note_shards(op, result)


def type_nodes(scope: Scope, nodes: Iterable[fx.Node]) -> None:
    """Types for nodes that were inserted after the walk, in order."""
    for node in nodes:
        _type(scope, node)


def _written(node: fx.Node, name: str) -> list[fx.Node]:
    """Tensors that an operator without a rule writes to, as its schema or its name tells."""
    if not mutates(node):
        return []
    if name.endswith("_"):
        return node.all_input_nodes[:1]
    known = isinstance(node.target, torch._ops.OpOverload)
    return node.all_input_nodes if known or name == "triton_kernel_wrapper_mutation" or "::" in name else []


def _fitting(op: Op, axes: Axes) -> Axes:
    """The rule's result where it has the tensor's rank and, axis by axis, its size: a wrong rule cannot pass."""
    sizes = op.sizes
    if len(axes) != len(sizes):
        return op.unknown()
    return tuple(
        axis if _fits(axis, size) else unknown(size, f"{op.label}[{dim}]")
        for dim, (axis, size) in enumerate(zip(axes, sizes, strict=True))
    )


def _fits(axis: Axis, size: Size) -> bool:
    return same(axis_size(axis), size)


def _write(scope: Scope, node: fx.Node, name: str) -> None:
    """``base[index] = value`` or ``view.copy_(value)``: what the value says of its axes is joined to the base's."""
    base, value = node.args[0], node.args[2 if name == "setitem" else 1]
    assert isinstance(base, fx.Node)
    axes = scope.axes_of(base)
    if axes is None:
        return
    mapping = index_map(len(axes), node.args[1] if name == "setitem" else ...)
    label = scope.label + node.name
    if name == "setitem" and _write_by_index(scope, node, base):
        return
    if isinstance(value, fx.Node) and not _is_number(value):
        written = scope.axes_of(value)
        chain = _chain(base)
        elsewhere = any(
            claims(axis) for other in _sharing(scope, base) if other not in chain for axis in scope.axes_of(other) or ()
        )
        blind = elsewhere and not any(claims(axis) for axis in axes)
        whole = mapping is not None and mapping == [(dim, None) for dim in range(len(axes))]
        if (
            whole
            and written is not None
            and name_of(base) in _NEW
            and min(base.users) is node
            and _covers(axes, written)
        ):
            scope.types[base] = written  # nothing else was ever there
        elif mapping is None or written is None or blind:
            _forget(scope, base, label)
        else:
            _refine(scope, base, mapping, written, label)
    scope.types[node] = scope.axes_of(base) or ()


def _covers(axes: Axes, written: Axes) -> bool:
    return len(axes) == len(written) and all(_fits(a, axis_size(b)) for a, b in zip(axes, written, strict=True))


def _write_by_index(scope: Scope, node: fx.Node, base: fx.Node) -> bool:
    """Types after tokens were written into a tensor by index, in place; False where this write is none such."""
    placed = index_write(scope.op(node))
    if placed is None:
        return False
    _forget(scope, base, scope.label + node.name)  # views of it that were taken before
    scope.types[base] = scope.types[node] = placed
    return True


def _is_number(value: object) -> bool:
    """True for what moves no token wherever it is written."""
    shape = shape_of(value) if isinstance(value, fx.Node) else None
    return shape is None or all(same(size, ONE) for size in shape)


def _chain(base: fx.Node) -> list[fx.Node]:
    """A slice, the tensor that it is a slice of, and so on."""
    found = [base]
    while name_of(found[-1]) in SLICES and isinstance(found[-1].args[0], fx.Node):
        found.append(found[-1].args[0])
    return found


def _refine(scope: Scope, base: fx.Node, mapping: IndexMap, written: Axes, source: str) -> None:
    """Positions of ``base``, picked by ``mapping``, were overwritten by ``written``, and so were those it is cut from.

    Where the base is known to be video tokens, the written ones must be the same; where it is not, they tell what it
    is. Video tokens written one by one are not followed.
    """
    axes = list(scope.axes_of(base) or ())
    kept = {dim for dim, _ in mapping}
    if any(ordered(axis) for dim, axis in enumerate(axes) if dim not in kept):
        _forget(scope, base, source)
        return
    for (dim, item), other in zip(reversed(mapping), reversed(written), strict=False):
        single = same(axis_size(other), ONE)  # may be written to many positions
        if dim is None or (single and item is None and not claims(other)):
            continue
        replaced = axes[dim] if item is None else slice_axis(axes[dim], item, axis_size(other), source, scope.lengths)
        partly = item is not None and item.step not in (None, 1)
        if ordered(axes[dim] if partly else replaced) and replaced != other:
            _forget(scope, base, source)
            return
        if item is None:
            axes[dim] = join(axes[dim], other, source)
        elif claims(other) and not claims(axes[dim]):
            start = number(item.start, scope.lengths)
            axes[dim] = (
                mixed((other,), axis_size(axes[dim]), source)
                if partly or single or start is None or start.hint < 0
                else splice(axes[dim], start, other, source)
            )
    scope.types[base] = tuple(axes)
    if name_of(base) in SLICES and isinstance(base.args[0], fx.Node) and scope.axes_of(base.args[0]):
        outer = slicing(scope.op(base))
        if outer is not None:
            _refine(scope, base.args[0], outer, tuple(axes), source)


def _sharing(scope: Scope, node: fx.Node) -> list[fx.Node]:
    """The node and every other that lies in the same memory."""
    return [node, *(other for memory in _memory(node) for other in scope.sharing.get(memory, ()) if other is not node)]


def _forget(scope: Scope, node: fx.Node, source: str) -> None:
    """The tensor was overwritten in a way that is not followed: whatever shares its memory holds mixed tokens."""
    label = f"a write by {source}"
    for other in _sharing(scope, node):
        axes = scope.axes_of(other)
        if axes is not None:
            scope.types[other] = tuple(mixed((axis,), axis_size(axis), f"{label}[{i}]") for i, axis in enumerate(axes))
        elif isinstance(found := scope.types.get(other), list):
            scope.types[other] = [
                tuple(mixed((axis,), axis_size(axis), f"{label}[{i}]") for i, axis in enumerate(axes)) for axes in found
            ]
