"""What one graph knows of the tensors that it returns, handed to the graph that takes them: after a graph break."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import fx

from .names import name_of
from .recognise import module_path
from .sizes import ONE, same, shape_of
from .tokens import (
    MIXED,
    Axes,
    Axis,
    Factor,
    axis_size,
    claims,
    factors,
    is_mixed,
    plain_source,
    unknowns,
)
from .track import Given, Scope, Tracking


class Shard(NamedTuple):
    """``piece`` is the ``place``-th of ``pieces`` equal pieces of ``whole``."""

    piece: Axis
    pieces: int
    place: int
    whole: Axis


@dataclass(frozen=True)
class Evidence:
    """The token types of one returned tensor. ``graph`` tells graphs apart; ``told`` names the source of each grid.

    ``shards`` says what the tensor's axes, or runs of tokens in them, were cut from.
    """

    axes: Axes
    graph: int
    told: tuple[tuple[str, str], ...]
    where: str = "before a graph break"
    shards: tuple[Shard, ...] = ()

    def fits(self, shape: Sequence[int]) -> bool:
        """True for a tensor of this shape."""
        return len(shape) == len(self.axes) and all(
            is_mixed(axis) or axis_size(axis).expr == size for axis, size in zip(self.axes, shape, strict=True)
        )


_EARLIER = "an earlier graph"

Handed = tuple[Evidence | None, ...]


def evidence_of(tracking: Tracking, source: str) -> str:
    """What showed the grid of that source: an operator and its module."""
    if source in tracking.given.told:
        return tracking.given.told[source]
    node = tracking.grids.get(source)
    return plain_source(source) if node is None else f"{name_of(node)} {module_path(node) or node.name}"


def hand_over(scope: Scope, tracking: Tracking, graph: int) -> list[Evidence | None]:
    """Evidence on each output of a graph that was walked; None where it tells nothing of a video."""
    outputs = scope.module.graph.output_node().args[0]
    nodes = outputs if isinstance(outputs, (tuple, list)) else [outputs]
    return [evidence_at(scope, node, tracking, graph) if isinstance(node, fx.Node) else None for node in nodes]


def evidence_at(scope: Scope, node: fx.Node, tracking: Tracking, graph: int = 0) -> Evidence | None:
    """Evidence on one value of a graph, as far as it holds outside of that graph; None where it tells nothing of a video."""
    axes = scope.axes_of(node)
    sizes = shape_of(node) or []
    if axes is None or not any(claims(axis) for axis in axes):
        return None
    # Symbols mean nothing in another graph, and nodes are not there.
    if any(claims(axis) and not is_mixed(axis) and not all(map(_lasting, _all_factors(axis))) for axis in axes):
        return None
    others = unknowns(sizes, scope.label + node.name)
    kept = tuple(
        ((Factor(ONE, MIXED, _EARLIER),),)
        if is_mixed(axis)
        else axis
        if all(map(_lasting, _all_factors(axis)))
        else other
        for axis, other in zip(axes, others, strict=True)
    )
    sources = dict.fromkeys(factor.source for axis in kept for factor in _all_factors(axis) if factor.role)
    told = tuple((source, evidence_of(tracking, source)) for source in sources)
    return Evidence(kept, graph, told, shards=tuple(_shards(kept, scope)))


def _shards(axes: Axes, scope: Scope) -> Iterator[Shard]:
    """What is remembered of these axes as pieces, and holds in other graphs."""
    pieces = {piece for axis in axes if claims(axis) for piece in (axis, *((segment,) for segment in axis))}
    for (piece, count, index), whole in scope.shards.items():
        if piece in pieces and whole is not None and all(map(_lasting, _all_factors(whole))):
            yield Shard(piece, count, index, whole)


def _lasting(factor: Factor) -> bool:
    return factor.size.static and not factor.writes and factor.bundle is None


def _all_factors(axis: Axis) -> Iterator[Factor]:
    for factor in factors(axis):
        yield factor
        if factor.part is not None:
            yield from _all_factors((factor.part[0],))


def numbered(handed: Sequence[Evidence | None]) -> Handed:
    """The graphs that the evidence comes from in the order in which they appear: equal where the evidence is."""
    order: dict[int, int] = {}
    return tuple(None if x is None else replace(x, graph=order.setdefault(x.graph, len(order))) for x in handed)


def canonical(known: Mapping[str, Evidence]) -> dict[str, Evidence]:
    """The same evidence with what is no video named by its order of appearance: equal for modules that take the same."""
    names: dict[str, str] = {}

    def rename(source: str) -> str:
        return names.setdefault(source, f"value {len(names)}")

    kept = {source for evidence in known.values() for source, _ in evidence.told} | {_EARLIER}
    return {
        argument: _renamed(replace(evidence, where="in the whole model"), lambda x: x if x in kept else rename(x))
        for argument, evidence in known.items()
    }


def given(module: fx.GraphModule, handed: Handed) -> Given:
    """Types for the inputs of a graph; sources of another graph get names of their own here."""
    placeholders = module.graph.find_nodes(op="placeholder")
    found = Given()
    for index, (node, evidence) in enumerate(zip(placeholders, handed, strict=True)):
        if evidence is None:
            continue
        prefix = f"graph {evidence.graph}: "
        sizes = shape_of(node) or []
        evidence = _renamed(evidence, prefix.__add__)
        known = tuple(
            ((replace(axis[0][0], size=size),),) if is_mixed(axis) else axis
            for axis, size in zip(evidence.axes, sizes, strict=False)
        )
        if len(sizes) != len(known) or not all(map(same, map(axis_size, known), sizes)):
            continue
        found.axes[index] = known
        found.told |= {prefix + source: f"{text}, {evidence.where}" for source, text in evidence.told}
        found.shards |= {(piece, count, place): whole for piece, count, place, whole in evidence.shards}
    return found


def _renamed(evidence: Evidence, name: Callable[[str], str]) -> Evidence:
    def axis(given: Axis) -> Axis:
        return tuple(tuple(_renamed_factor(factor, name) for factor in segment) for segment in given)

    shards = tuple(shard._replace(piece=axis(shard.piece), whole=axis(shard.whole)) for shard in evidence.shards)
    return replace(evidence, axes=tuple(map(axis, evidence.axes)), shards=shards)


def _renamed_factor(factor: Factor, name: Callable[[str], str]) -> Factor:
    part = factor.part
    if part is not None:
        part = (tuple(_renamed_factor(inner, name) for inner in part[0]), part[1])
    folded = None if factor.folded is None else name(factor.folded)
    place = factor.place and factor.place._replace(tensor=name(factor.place.tensor))
    picked = tuple(map(name, factor.picked))
    return replace(factor, source=name(factor.source), part=part, folded=folded, place=place, picked=picked)
