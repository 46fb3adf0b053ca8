"""Legality: may this attention become VMoBA attention, and over which tokens? Nothing unproven is rewritten."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx

from .errors import GridError
from .names import name_of
from .recognise import AttentionCall, module_path
from .report import Reason
from .sizes import ONE, Size, add, memory_of, multiply, same, shape_of, size_of, value_of
from .tokens import (
    Axes,
    Axis,
    Origin,
    Raster,
    Segment,
    axis_size,
    claims,
    describe,
    factors,
    is_mixed,
    raster_of,
    segment_size,
    unknowns,
)
from .track import Scope, Tracking


@dataclass(frozen=True)
class Layout:
    """Where the video tokens lie in the sequence, and how that is known."""

    grid: tuple[Size, Size, Size]
    prefix: Size
    suffix: Size
    evidence: str


@dataclass(frozen=True)
class Decision:
    """``reason`` is REWRITTEN where the rewrite is legal; ``detail`` says in a sentence why it is not."""

    reason: Reason
    detail: str = ""
    layout: Layout | None = None


def decide(call: AttentionCall, scope: Scope, tracking: Tracking, grid: tuple[int, int, int] | None) -> Decision:
    """Prove that the call attends all to all among the tokens of one video grid and of conditions beside it."""
    for name, node in (("query", call.query), ("key", call.key), ("value", call.value)):
        rank = len(shape_of(node) or [])
        if rank != 4:
            return Decision(
                Reason.LAYOUT, f"{name} has {rank} dimensions; only [batch, heads, tokens, head_dim] is understood"
            )
    query, key, value = (
        scope.axes_of(node) or unknowns(shape_of(node) or [], scope.label + node.name)
        for node in (call.query, call.key, call.value)
    )
    decision = _find_video(query, key, tracking, grid)
    if decision.layout is None:
        return decision
    return _obstacle(call, query, key, value) or decision


def _find_video(query: Axes, key: Axes, tracking: Tracking, grid: tuple[int, int, int] | None) -> Decision:
    tokens = query[2]
    rasters = [
        (index, raster)
        for index, segment in enumerate(tokens)
        if (raster := raster_of(segment)) and segment[0].origin is not Origin.TABLE
    ]
    if rasters:
        main = _main_grid(rasters)
        if main is None:
            return Decision(Reason.SEVERAL_GRIDS, f"the sequence holds {len(rasters)} video grids: {describe(tokens)}")
        index, raster = main
        evidence = _evidence(tracking, raster.source)
        if grid is not None:
            if not axis_size(tokens).static:
                return _dynamic(tokens)
            _check_given(grid, multiply(list(raster.sizes)), evidence)
        layout = _layout(tokens, index, raster.sizes if grid is None else _sizes(grid), evidence)
        if grid is not None:
            layout = replace(layout, evidence=f"grid= given, at {evidence}")
        return Decision(Reason.REWRITTEN, layout=layout)
    if claims(tokens) and claims(key[2]):
        return _not_a_raster(tokens)
    if not claims(tokens) and (claims(query[0]) or claims(query[1]) or _folded_beside(tokens, query[0])):
        return Decision(
            Reason.FACTORISED, "frames, rows or columns are folded into the batch: each sequence is a part of the video"
        )
    if claims(tokens) or claims(key[2]) or not same(axis_size(tokens), axis_size(key[2])):
        return _other_tokens(tokens, key[2], "keys")
    if grid is not None:
        place = _segment_of_size(tokens, multiply(list(_sizes(grid))))
        if place is not None and not axis_size(tokens).static:
            return _dynamic(tokens)
        if place is not None:
            return Decision(Reason.REWRITTEN, layout=_layout(tokens, place, _sizes(grid), "grid= given"))
    return _no_grid(tokens, tracking, grid)


def _folded_beside(tokens: Axis, batch: Axis) -> bool:
    """True where several axes of the tensor that the tokens come from are folded into the batch."""

    def tensors(axis: Axis) -> list[str]:
        return [f.source.partition("[")[0] for f in factors(axis) if f.role is None and f.origin is Origin.INPUT]

    return any(tensors(batch).count(name) > 1 for name in tensors(tokens))


def _main_grid(rasters: list[tuple[int, Raster]]) -> tuple[int, Raster] | None:
    """The largest grid, where the others together are no larger: history or reference frames are conditions then."""
    sizes = [multiply(list(raster.sizes)).hint for _, raster in rasters]
    largest = max(sizes)
    return rasters[sizes.index(largest)] if sum(sizes) <= 2 * largest and sizes.count(largest) == 1 else None


def _not_a_raster(tokens: Axis) -> Decision:
    roles = {f.role for f in factors(tokens) if f.role}
    if any(f.part is not None for f in factors(tokens)):
        return Decision(Reason.NOT_RASTER, f"the sequence holds only a cut of the video: {describe(tokens)}")
    if roles < {"frame", "row", "column"} and not any(len(segment) > 2 for segment in tokens):
        return Decision(Reason.FACTORISED, f"the sequence holds only part of the axes of the video: {describe(tokens)}")
    return Decision(
        Reason.NOT_RASTER, f"video tokens are not in raster order (frame, row, column) but {describe(tokens)}"
    )


def _no_grid(tokens: Axis, tracking: Tracking, grid: tuple[int, int, int] | None) -> Decision:
    known = [f for f in factors(tokens) if f.origin is Origin.INPUT]
    if tracking.grids and known and len(known) == len(list(factors(tokens))):
        return Decision(Reason.NOT_VIDEO, f"tokens are {describe(tokens)}, none from a video patch embedding")
    given = f" and grid={grid} has {grid[0] * grid[1] * grid[2]} tokens" if grid else ""
    remedy = "pass the grid of this input" if grid else "pass grid=(frames, rows, columns)"
    return Decision(
        Reason.NO_GRID,
        f"no video grid is known for the {axis_size(tokens)} tokens ({describe(tokens)}){given}; {remedy}",
    )


def _dynamic(tokens: Axis) -> Decision:
    return Decision(
        Reason.DYNAMIC_GRID,
        f"grid= is for one size, but the {axis_size(tokens)} tokens are symbolic; compile with dynamic=False",
    )


def _check_given(grid: tuple[int, int, int], found: Size, evidence: str) -> None:
    given = grid[0] * grid[1] * grid[2]
    if found.hint != given:
        raise GridError(
            f"grid={grid} has {given} tokens, but the video has {found} ({evidence}). "
            "Pass the latent grid after patching (frames, rows, columns), or leave grid out: it was found in the graph."
        )


def _obstacle(call: AttentionCall, query: Axes, key: Axes, value: Axes) -> Decision | None:
    """What forbids the rewrite although the queries are video tokens."""
    if not _aligned(key[2], query[2]):
        return _other_tokens(query[2], key[2], "keys")
    if not _aligned(value[2], query[2]):
        return _other_tokens(query[2], value[2], "values")
    if unequal := _unequal(call):
        return Decision(Reason.LAYOUT, unequal)
    if call.causal:
        return Decision(Reason.CAUSAL, "is_causal=True: each token sees only those before it")
    if call.dropout > 0:
        return Decision(
            Reason.DROPOUT, f"attention dropout of {call.dropout} is in use; set it to 0 or call model.eval()"
        )
    if call.mask is not None and key_mask_dims(call.mask) is None:
        shape, dtype = _shape_text(call.mask), getattr(value_of(call.mask), "dtype", "unknown")
        return Decision(Reason.MASK, f"mask {shape} {dtype} is not a bool mask over keys alone, [batch, 1, 1, tokens]")
    return None


def _other_tokens(tokens: Axis, others: Axis, name: str) -> Decision:
    """Cross-attention, or a self-attention one side of which was lost sight of: told apart, for that one is a loss."""
    detail = f"queries are {describe(tokens)}, {name} are {describe(others)}"
    if same(axis_size(tokens), axis_size(others)):
        if is_mixed(tokens) or is_mixed(others):
            return Decision(Reason.NOT_RASTER, detail)
        lost = any(f.role is None and f.origin is Origin.OPERATOR for axis in (tokens, others) for f in factors(axis))
        if lost or name == "values":
            return Decision(Reason.NO_GRID, f"{detail}: not proven to be the same tokens")
    return Decision(Reason.CROSS_ATTENTION, detail)


def _aligned(tokens: Axis, video: Axis) -> bool:
    """True for the same sequence. Conditions beside a proven grid are seen by all, so that only their sizes matter."""
    if tokens == video:
        return True
    return (
        len(tokens) == len(video)
        and all(
            x == y
            or _same_tokens(x, y)
            or (not claims((x,)) and not claims((y,)) and same(segment_size(x), segment_size(y)))
            for x, y in zip(tokens, video, strict=True)
        )
        and any(raster_of(segment) for segment in video)
    )


def _same_tokens(x: Segment, video: Segment) -> bool:
    """True where a table of positions has told the video's grid, and these are the tokens that it was joined to."""
    raster = raster_of(video)
    known = x[0] if len(x) == 1 and x[0].role is None and x[0].part is None else None
    return (
        raster is not None
        and known is not None
        and known.source == raster.source
        and same(known.size, segment_size(video))
    )


def _unequal(call: AttentionCall) -> str | None:
    """What the dense operator broadcasts and the sparse one does not."""
    query, key, value = (shape_of(node) or [] for node in (call.query, call.key, call.value))
    if not all(same(query[0], other[0]) for other in (key, value)):
        return f"batch sizes of query, key and value differ: {query[0]}, {key[0]}, {value[0]}"
    if not same(query[3], value[3]) or not query[3].static:
        return f"head sizes must be equal numbers: query has {query[3]}, value {value[3]}"
    heads = (query[1], key[1], value[1])
    if not same(key[1], value[1]) or not all(size.static for size in heads) or query[1].hint % key[1].hint:
        return f"numbers of heads must divide: query has {heads[0]}, key {heads[1]}, value {heads[2]}"
    return None


def key_mask_dims(mask: fx.Node) -> int | None:
    """Rank of the mask where it is bool and the same for every head and query, None otherwise."""
    value = value_of(mask)
    if not isinstance(value, torch.Tensor) or value.dtype != torch.bool or value.dim() not in (2, 4):
        return None
    sizes, strides = shape_of(mask) or [], value.stride()
    expanded = [type(stride) is int and stride == 0 and not _given_expanded(mask) for stride in strides]
    shared = [same(size, ONE) or expanded[dim] for dim, size in enumerate(sizes)]
    return value.dim() if all(shared[-3:-1]) else None


def _given_expanded(mask: fx.Node) -> bool:
    """True where the mask is a graph input, or a view of one: an exported program may get other strides at its run."""
    memory = memory_of(value_of(mask))
    return memory is None or any(
        isinstance(given := value_of(node), torch.Tensor) and memory_of(given) == memory and 0 in given.stride()
        for node in mask.graph.nodes
        if node.op == "placeholder"
    )


def _shape_text(node: fx.Node) -> str:
    return "[" + ", ".join(str(size) for size in shape_of(node) or []) + "]"


def _layout(tokens: Axis, index: int, grid: tuple[Size, Size, Size], evidence: str) -> Layout:
    before = add([segment_size(segment) for segment in tokens[:index]])
    after = add([segment_size(segment) for segment in tokens[index + 1 :]])
    return Layout(grid, before, after, evidence)


def _segment_of_size(tokens: Axis, size: Size) -> int | None:
    matching = [index for index, segment in enumerate(tokens) if segment_size(segment).hint == size.hint]
    return matching[0] if len(matching) == 1 else None


def _sizes(grid: tuple[int, int, int]) -> tuple[Size, Size, Size]:
    return (size_of(grid[0]), size_of(grid[1]), size_of(grid[2]))


def _evidence(tracking: Tracking, source: str) -> str:
    node = tracking.grids.get(source)
    if node is None:
        return source
    return f"{name_of(node)} {module_path(node) or node.name}"
