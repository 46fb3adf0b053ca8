"""Legality: may this attention become VMoBA attention, and over which tokens? Nothing unproven is rewritten."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx

from .errors import GridError
from .recognise import AttentionCall, module_path
from .report import Reason
from .rules import name_of
from .sizes import ONE, Size, add, multiply, same, shape_of, size_of, value_of
from .tokens import Axes, Axis, Origin, axis_size, claims, describe, factors, raster_of, segment_size
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
    query, key, value = (scope.axes_of(node) or () for node in (call.query, call.key, call.value))
    if any(len(axes) != 4 for axes in (query, key, value)):
        return Decision(
            Reason.LAYOUT, f"query has {len(query)} dimensions; only [batch, heads, tokens, head_dim] is understood"
        )
    decision = _find_video(query, key, tracking, grid)
    if decision.layout is None:
        return decision
    return _obstacle(call, query, key, value) or decision


def _find_video(query: Axes, key: Axes, tracking: Tracking, grid: tuple[int, int, int] | None) -> Decision:
    tokens = query[2]
    rasters = [(index, raster) for index, segment in enumerate(tokens) if (raster := raster_of(segment))]
    if len(rasters) > 1:
        return Decision(Reason.SEVERAL_GRIDS, f"the sequence holds {len(rasters)} video grids: {describe(tokens)}")
    if rasters:
        index, raster = rasters[0]
        evidence = _evidence(tracking, raster.source)
        if grid is not None:
            _check_given(grid, multiply(list(raster.sizes)), evidence)
        layout = _layout(tokens, index, raster.sizes if grid is None else _sizes(grid), evidence)
        if grid is not None:
            layout = replace(layout, evidence=f"grid= given, at {evidence}")
        return Decision(Reason.REWRITTEN, layout=layout)
    if claims(tokens):
        return _not_a_raster(tokens)
    if claims(query[0]) or claims(query[1]):
        return Decision(
            Reason.FACTORISED, "frames, rows or columns are folded into the batch: each sequence is a part of the video"
        )
    if tokens != key[2] and not same(axis_size(tokens), axis_size(key[2])):
        return Decision(Reason.CROSS_ATTENTION, f"queries are {describe(tokens)}, keys are {describe(key[2])}")
    if grid is not None:
        index = _segment_of_size(tokens, multiply(list(_sizes(grid))))
        if index is not None:
            return Decision(Reason.REWRITTEN, layout=_layout(tokens, index, _sizes(grid), "grid= given"))
    return _no_grid(tokens, tracking, grid)


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


def _check_given(grid: tuple[int, int, int], found: Size, evidence: str) -> None:
    given = grid[0] * grid[1] * grid[2]
    if found.hint != given:
        raise GridError(
            f"grid={grid} has {given} tokens, but the video has {found} ({evidence}). "
            "Pass the latent grid after patching (frames, rows, columns), or leave grid out: it was found in the graph."
        )


def _obstacle(call: AttentionCall, query: Axes, key: Axes, value: Axes) -> Decision | None:
    """What forbids the rewrite although the queries are video tokens."""
    if key[2] != query[2]:
        return Decision(Reason.CROSS_ATTENTION, f"queries are {describe(query[2])}, keys are {describe(key[2])}")
    if value[2] != key[2]:
        return Decision(Reason.NO_GRID, f"keys are {describe(key[2])}, but values are {describe(value[2])}")
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


def key_mask_dims(mask: fx.Node) -> int | None:
    """Rank of the mask where it is bool and the same for every head and query, None otherwise."""
    value = value_of(mask)
    if not isinstance(value, torch.Tensor) or value.dtype != torch.bool or value.dim() not in (2, 4):
        return None
    sizes, strides = shape_of(mask) or [], value.stride()
    shared = [same(size, ONE) or (type(strides[dim]) is int and strides[dim] == 0) for dim, size in enumerate(sizes)]
    return value.dim() if all(shared[-3:-1]) else None


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
