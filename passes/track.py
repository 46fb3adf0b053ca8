"""Walk a graph once, in order, and give every tensor its token type.

Subgraphs that are called once (activation checkpointing, autocast regions) are entered with the types of the call's
arguments. Graphs from Dynamo are not functional: a write into a tensor refines or, where it contradicts, forgets what
was known of the tensor and of everything that shares its memory.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from .rules import (
    RULES,
    SLICES,
    IndexMap,
    Op,
    Result,
    elementwise,
    index_map,
    is_elementwise,
    name_of,
    slice_axis,
    slicing,
)
from .sizes import ONE, Size, same, shape_of
from .tokens import Axes, Axis, Origin, axis_size, claims, join, unknown, unknowns

_PARAMETER = re.compile(r"^(l_self_|l__self__|p_|b_|c_|getattr_)|_(parameters|buffers)_", re.IGNORECASE)
_VIEWS = {
    "getitem", "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "transpose", "permute", "t",
    "mT", "movedim", "swapaxes", "select", "slice", "narrow", "chunk", "split", "unbind", "split_with_sizes",
    "expand", "expand_as", "view_as", "view_as_real", "view_as_complex", "detach", "alias", "to", "float",
    "contiguous", "type_as", "type", "tensor_split",
}  # fmt: skip
_WRITES_SECOND_ARGUMENT = frozenset(["setitem", "copy_"])


@dataclass
class Scope:
    """One graph (the whole model's or a called subgraph's) with the types of its nodes."""

    module: fx.GraphModule
    types: dict[fx.Node, Result] = field(default_factory=dict)
    call: fx.Node | None = None  # the node in the caller's graph, None at the top
    calls: int = 1  # how often this subgraph is called
    roots: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def axes_of(self, node: fx.Node) -> Axes | None:
        found = self.types.get(node)
        return found if isinstance(found, tuple) else None


@dataclass
class Tracking:
    """The result: every graph walked, in execution order of its nodes, and the grid evidence found in it."""

    order: list[tuple[Scope, fx.Node]] = field(default_factory=list)
    unentered: list[tuple[Scope, fx.Node, fx.GraphModule]] = field(default_factory=list)
    grids: dict[str, fx.Node] = field(default_factory=dict)


def track(module: fx.GraphModule, wanted: Callable[[fx.Node], bool]) -> Tracking:
    """Types for the whole graph; ``wanted`` picks the nodes that are listed in ``order``."""
    tracking = Tracking()
    _walk(Scope(module), {}, tracking, wanted)
    return tracking


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
    place = 0
    for node in scope.module.graph.nodes:
        if node.op == "placeholder":
            scope.types[node] = inputs.get(place) or _input_axes(node)
            place += 1
            continue
        if node.op == "get_attr":
            scope.types[node] = unknowns(shape_of(node) or [], node.name, Origin.CONSTANT)
            continue
        if node.op not in ("call_function", "call_method"):
            continue
        graphs = graph_arguments(scope.module, node)
        if graphs:
            _enter(scope, node, graphs, calls, tracking, wanted)
            continue
        if wanted(node):
            tracking.order.append((scope, node))
        _type(scope, node)
        if name_of(node) in ("conv3d", "conv2d"):
            tracking.grids[node.name] = node


def _input_axes(node: fx.Node) -> Axes:
    origin = Origin.CONSTANT if _PARAMETER.search(node.name) else Origin.INPUT
    name = re.sub(r"^l_((kw)?args?_|self_)?|_$", "", node.name, flags=re.IGNORECASE) or node.name
    return unknowns(shape_of(node) or [], name, origin)


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
    placeholders = [n for n in graph.graph.nodes if n.op == "placeholder"]
    arguments = [arg for index, arg in enumerate(node.args) if index > position]
    if arguments and isinstance(arguments[0], (tuple, list)) and len(arguments) == 1:
        arguments = list(arguments[0])
    arguments = arguments[len(arguments) - len(placeholders) :]
    if others or len(arguments) != len(placeholders):
        tracking.unentered.extend((scope, node, inner) for _, inner in graphs)
        return
    inner = Scope(graph, call=node, calls=calls[id(graph)])
    types = {
        index: scope.types[arg]
        for index, arg in enumerate(arguments)
        if isinstance(arg, fx.Node) and arg in scope.types
    }
    _walk(inner, types, tracking, wanted)
    results = graph.graph.output_node().args[0]
    if isinstance(results, (tuple, list)):
        scope.types[node] = [inner.axes_of(r) or () if isinstance(r, fx.Node) else () for r in results]


def _type(scope: Scope, node: fx.Node) -> None:
    name = name_of(node)
    op = Op(node, name, scope.axes_of)
    source = node.args[0] if node.args else None
    if name in _VIEWS and isinstance(source, fx.Node):
        scope.roots[node] = scope.roots.get(source, source)
    if name in _WRITES_SECOND_ARGUMENT:
        _write(scope, node, name)
        return
    if name == "getitem" and isinstance(source, fx.Node) and isinstance(scope.types.get(source), list):
        index = node.args[1]
        parts = scope.types[source]
        known = isinstance(index, int) and -len(parts) <= index < len(parts)
        scope.types[node] = parts[index] if known else op.unknown()  # type: ignore[index]
        return
    rule = RULES.get(name)
    if rule is not None:
        result = rule(op)
    elif is_elementwise(name):
        result = elementwise(op)
    else:
        if (name.endswith("_") or "out" in node.kwargs) and node.all_input_nodes:
            for written in (node.all_input_nodes[0], node.kwargs.get("out")):
                if isinstance(written, fx.Node):
                    _forget(scope, written, node.name)
        result = op.unknown()
    if isinstance(result, tuple):
        result = _fitting(op, result)
    scope.types[node] = result


def _fitting(op: Op, axes: Axes) -> Axes:
    """The rule's result where it has the tensor's rank and, axis by axis, its size: a wrong rule cannot pass."""
    sizes = op.sizes
    if len(axes) != len(sizes):
        return op.unknown()
    return tuple(
        axis if _fits(axis, size) else unknown(size, f"{op.node.name}[{dim}]")
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
    scope.types[node] = axes
    mapping = index_map(len(axes), node.args[1] if name == "setitem" else ...)
    if mapping is None:
        _forget(scope, base, node.name)
    elif isinstance(value, fx.Node):
        _refine(scope, base, mapping, scope.axes_of(value) or (), node.name)


def _refine(scope: Scope, base: fx.Node, mapping: IndexMap, written: Axes, source: str) -> None:
    """Positions of ``base``, picked by ``mapping``, were overwritten by ``written``, and so were those it is cut from.

    Where the base is known to be video tokens, the written ones must be the same; where it is not, they tell what it
    is.
    """
    axes = list(scope.axes_of(base) or ())
    for (dim, item), other in zip(reversed(mapping), reversed(written), strict=False):
        if dim is None or same(axis_size(other), ONE):
            continue
        replaced = axes[dim] if item is None else slice_axis(axes[dim], item, axis_size(other), source)
        partly = item is not None and item.step not in (None, 1)
        if claims(axes[dim] if partly else replaced) and replaced != other:
            _forget(scope, base, source)
            return
        if item is None:
            axes[dim] = join(axes[dim], other, source)
    scope.types[base] = tuple(axes)
    if name_of(base) in SLICES and isinstance(base.args[0], fx.Node) and scope.axes_of(base.args[0]):
        outer = slicing(Op(base, name_of(base), scope.axes_of))
        if outer is not None:
            _refine(scope, base.args[0], outer, tuple(axes), source)


def _forget(scope: Scope, node: fx.Node, source: str) -> None:
    """Drop what is known of everything that shares memory with ``node``."""
    root = scope.roots.get(node, node)
    for other in [root, *(n for n, r in scope.roots.items() if r is root)]:
        shape = shape_of(other)
        if shape is not None:
            scope.types[other] = unknowns(shape, f"written by {source}")
