"""Legality: may this attention become VMoBA attention, and over which tokens? Nothing unproven is rewritten."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import fx

from .effects import is_disturbed
from .errors import GridError
from .evidence import evidence_of
from .layout import (
    NOTHING,
    Layout,
    Order,
    Transposed,
    Written,
    around,
    in_packed,
    in_pieces,
    in_place,
    inside,
    packed_factor,
    rasters,
    too_short,
)
from .masks import token_mask
from .names import name_of
from .recognise import AttentionCall
from .report import Reason
from .shards import comes_from_ranks, is_shard
from .sizes import Size, add, is_learned, multiply, same, shape_of, size_of, value_of
from .tokens import (
    ROLES,
    Axes,
    Axis,
    Factor,
    Origin,
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
    if missing := inside(query[2], key[2]):
        decision = _among_more_keys(decision.layout, missing, axis_size(key[2]))
        if decision.layout is None:
            return decision
        query = (*query[:2], key[2], query[3])
    obstacle = _obstacle(call, scope, query, key, value)
    if obstacle is None and decision.layout is not None and is_learned(decision.layout.prefix, scope.lengths):
        obstacle = Decision(
            Reason.DYNAMIC_GRID, f"the video stands behind {decision.layout.prefix} tokens, counted by data"
        )
    if obstacle is None and decision.layout is not None and decision.layout.order is not None:
        obstacle = _not_gathered(decision.layout, decision.layout.order, call.node, scope)
    return obstacle or decision


def among_shards(scope: Scope, node: fx.Node) -> Decision | None:
    """Ring attention: the queries are a shard of the video, the keys this rank's too or sent by the others."""
    given = node.all_input_nodes
    if not scope.shards or len(given) < 2:
        return None
    query, key = (
        next((axis for axis in scope.axes_of(x) or () if is_shard(axis, scope.shards)), None) for x in given[:2]
    )
    if query is None:
        return None
    a_piece = not is_mixed(query)  # not one whose place among the ranks is unproven
    if not comes_from_ranks(given[1], exchanged=a_piece) and not (a_piece and key is not None):
        return None
    return Decision(
        Reason.RING_ATTENTION,
        f"queries are {describe(query)}, one shard of a sequence, and do not see the whole of it here: boxes are selected "
        "over the whole sequence, so exchange shards for heads (Ulysses: ulysses_degree, with ring_degree=1)",
    )


def _among_more_keys(layout: Layout, missing: tuple[Size, Size], keys: Size) -> Decision:
    """The video among keys that are more than the queries: the others become queries whose results are not used."""
    more = add(list(missing))
    if 4 * more.hint > keys.hint:
        return Decision(
            Reason.LAYOUT, f"{more} of {keys} keys are no queries, more than a quarter, such as those of a cache"
        )
    prefix, suffix = add([layout.prefix, missing[0]]), add([layout.suffix, missing[1]])
    if isinstance(layout.order, Written):  # gathered to the beginning
        prefix, suffix = layout.prefix, add([layout.suffix, more])
    return Decision(Reason.REWRITTEN, layout=replace(layout, prefix=prefix, suffix=suffix, missing=missing))


def _not_gathered(layout: Layout, order: Order, node: fx.Node, scope: Scope) -> Decision | None:
    """What forbids to bring the video tokens into order."""
    sizes = [*layout.grid, layout.prefix, layout.suffix, *layout.missing]
    if isinstance(order, Written):
        sizes += [order.first, order.start, order.whole]
    if not all(size.static for size in sizes):
        return Decision(
            Reason.DYNAMIC_GRID,
            "video tokens that are not in raster order stand among symbolic sizes; use dynamic=False",
        )
    if not isinstance(order, Written):
        return None
    if order.index.graph is not node.graph:
        return Decision(
            Reason.LAYOUT, f"where the video tokens stand ({order.index.name}) is not at hand in this subgraph"
        )
    if is_disturbed([order.index], order.index, node, scope.writers):
        return Decision(Reason.LAYOUT, f"where the video tokens stand ({order.index.name}) may have been overwritten")
    return None


def _find_video(query: Axes, key: Axes, tracking: Tracking, grid: tuple[int, int, int] | None) -> Decision:
    tokens = query[2]
    given = None if grid is None else _sizes(grid)
    readings = _readings(tokens, key[2])
    if readings:
        if given is not None and len(tokens) == 1 and same(axis_size(tokens), multiply(list(given))):
            return Decision(Reason.REWRITTEN, layout=Layout(given, NOTHING, NOTHING, "grid= given, for two readings"))
        told = " and ".join(dict.fromkeys(describe(axis) for axis in readings))
        return Decision(Reason.AMBIGUOUS_GRID, f"readings of the same tokens disagree: {told}; pass grid=")
    video = in_place(tokens) or in_packed(tokens, given) or in_pieces(tokens)
    if video is not None:
        evidence = evidence_of(tracking, video.raster.source)
        sizes = video.raster.sizes
        if grid is not None and given is not None:
            if not axis_size(tokens).static:
                return _dynamic(tokens)
            _check_given(grid, multiply(list(sizes)), evidence)
            if isinstance(video.order, Transposed) and given != sizes:
                return _not_a_raster(tokens)
            evidence, sizes = f"grid= given, at {evidence}", given
        return Decision(Reason.REWRITTEN, layout=Layout(sizes, video.before, video.after, evidence, video.order))
    if rasters(tokens):
        return Decision(
            Reason.SEVERAL_GRIDS, f"the sequence holds {len(rasters(tokens))} video grids: {describe(tokens)}"
        )
    if packed_factor(tokens) is not None and claims(tokens):
        detail = f"video tokens are written by index into a sequence of which this is {describe(tokens)}"
        if too_short(tokens):
            return Decision(Reason.NOT_VIDEO, f"{detail}, too short to hold them")
        return Decision(Reason.NOT_RASTER, f"{detail}: not proven to hold one video")
    images = _images(tokens, tracking)
    if images is not None:
        evidence = evidence_of(tracking, tokens[images][1].source)
        if given is not None and all(map(same, given, (factor.size for factor in tokens[images]))):
            layout = Layout(given, *around(tokens, images), f"grid= given, at {evidence}")
            return Decision(Reason.REWRITTEN, layout=layout)
        if given is None:
            return Decision(
                Reason.NO_GRID,
                f"tokens are {describe(tokens)} of {evidence}, which may be frames of a video or views; pass grid=",
            )
    if claims(tokens) and claims(key[2]):
        return _not_a_raster(tokens)
    if not claims(tokens) and (claims(query[0]) or claims(query[1]) or _folded_beside(tokens, query[0])):
        return Decision(
            Reason.FACTORISED, "frames, rows or columns are folded into the batch: each sequence is a part of the video"
        )
    if (
        claims(tokens)
        or claims(key[2])
        or not (same(axis_size(tokens), axis_size(key[2])) or (given and inside(tokens, key[2])))
    ):
        return _other_tokens(tokens, key[2], "keys")
    if given is not None:
        place = _segment_of_size(tokens, multiply(list(given)))
        if place is not None and not axis_size(tokens).static:
            return _dynamic(tokens)
        if place is not None:
            return Decision(Reason.REWRITTEN, layout=Layout(given, *around(tokens, place), "grid= given"))
    return _no_grid(tokens, tracking, grid)


def _readings(tokens: Axis, keys: Axis) -> tuple[Axis, ...]:
    """Grids that contradict each other: of the queries, or of queries and keys that are the same tokens."""
    found = next((f.readings for f in (*factors(tokens), *factors(keys)) if f.readings), ())
    grids = [raster_of(axis[0]) if len(axis) == 1 else None for axis in (tokens, keys)]
    if found or None in grids or grids[0] == grids[1]:
        return found
    return (tokens, keys) if len({grid.source for grid in grids if grid}) == 1 else ()


def _images(tokens: Axis, tracking: Tracking) -> int | None:
    """The segment that is rows and columns of images, and an input's axis before them: frames, or views of one frame."""
    for place, segment in enumerate(tokens):
        if [f.role for f in segment] == [None, *ROLES[1:]] and segment[1].source == segment[2].source:
            node = tracking.grids.get(segment[1].source)
            if node is not None and name_of(node) == "conv2d" and segment[0].origin is Origin.INPUT:
                return place
    return None


def _folded_beside(tokens: Axis, batch: Axis) -> bool:
    """True where several axes of the tensor that the tokens come from are folded into the batch."""

    def tensors(axis: Axis) -> list[str]:
        return [f.source.partition("[")[0] for f in factors(axis) if f.role is None and f.origin is Origin.INPUT]

    return any(tensors(batch).count(name) > 1 for name in tensors(tokens))


def _not_a_raster(tokens: Axis) -> Decision:
    roles = {f.role for f in factors(tokens) if f.role}
    if any(f.part is not None for f in factors(tokens)):
        return Decision(Reason.NOT_RASTER, f"the sequence holds only a cut of the video: {describe(tokens)}")
    others = [f for f in factors(tokens) if f.role is None]
    if roles < {"frame", "row", "column"} and all(f.origin is Origin.INPUT for f in others):
        return Decision(Reason.FACTORISED, f"the sequence holds only part of the axes of the video: {describe(tokens)}")
    return Decision(
        Reason.NOT_RASTER, f"video tokens are not in raster order (frame, row, column) but {describe(tokens)}"
    )


def _no_grid(tokens: Axis, tracking: Tracking, grid: tuple[int, int, int] | None) -> Decision:
    known = [f for f in factors(tokens) if f.origin is Origin.INPUT]
    # An input of a graph after a graph break may be anything.
    if tracking.grids and not tracking.given.told and known and len(known) == len(list(factors(tokens))):
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


def _obstacle(call: AttentionCall, scope: Scope, query: Axes, key: Axes, value: Axes) -> Decision | None:
    """What forbids the rewrite although the queries are video tokens."""
    if not _aligned(key[2], query[2]):
        return _other_tokens(query[2], key[2], "keys")
    if not _aligned(value[2], query[2]):
        return _other_tokens(query[2], value[2], "values")
    if unequal := _unequal(call):
        return Decision(Reason.LAYOUT, unequal)
    if not (_same_samples(query[0], key[0]) and _same_samples(query[0], value[0])):
        samples = ", ".join(f"{name} of {describe(axes[0])}" for name, axes in (("keys", key), ("values", value)))
        return Decision(
            Reason.CROSS_ATTENTION, f"queries are of samples {describe(query[0])}, {samples}: not proven to be the same"
        )
    if call.causal:
        return Decision(Reason.CAUSAL, "is_causal=True: each token sees only those before it")
    if call.dropout > 0:
        return Decision(
            Reason.DROPOUT, f"attention dropout of {call.dropout} is in use; set it to 0 or call model.eval()"
        )
    if call.mask is not None and token_mask(call.mask, call.node, scope.writers) is None:
        shape, dtype = _shape_text(call.mask), getattr(value_of(call.mask), "dtype", "unknown")
        return Decision(
            Reason.MASK, f"mask {shape} {dtype} is not proven to be a bool mask over keys, the same for all heads"
        )
    return None


def _other_tokens(tokens: Axis, others: Axis, name: str) -> Decision:
    """Cross-attention, or a self-attention one side of which was lost sight of: told apart, for that one is a loss."""
    detail = f"queries are {describe(tokens)}, {name} are {describe(others)}"
    alike = same(axis_size(tokens), axis_size(others))
    if (is_mixed(tokens) or is_mixed(others)) and (alike or (claims(tokens) and claims(others))):
        return Decision(Reason.NOT_RASTER, detail)
    if alike:
        lost = any(f.role is None and f.origin is Origin.OPERATOR for axis in (tokens, others) for f in factors(axis))
        if lost or name == "values":
            return Decision(Reason.NO_GRID, f"{detail}: not proven to be the same tokens")
    return Decision(Reason.CROSS_ATTENTION, detail)


def _aligned(tokens: Axis, video: Axis) -> bool:
    """True for the same sequence. Conditions beside a proven grid are seen by all, so that only their sizes matter."""
    if tokens == video or _have_a_reading_in_common(tokens, video):
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


def _have_a_reading_in_common(a: Axis, b: Axis) -> bool:
    """True for the same tokens where one of them, or both, have two readings: the grid is the user's then."""

    def readings(axis: Axis) -> tuple[Axis, ...]:
        return next((f.readings for f in factors(axis) if len(axis) == 1 and f.readings), ())

    found = readings(a), readings(b)
    if not any(found):
        return False
    return any(x == y for x in found[0] or (a,) for y in found[1] or (b,))


def _same_samples(a: Axis, b: Axis) -> bool:
    """True for batches of the same samples in the same order; those of two inputs of the model belong together.

    Heads may be among them, from another projection for each of query, key and value.
    """

    def is_heads(factor: Factor) -> bool:
        return factor.origin is Origin.CHANNELS

    def is_input(axis: Axis) -> bool:
        """A whole dimension of an input, beside heads."""
        own = [f for f in factors(axis) if not is_heads(f)]
        return len(own) == 1 and own[0].origin is Origin.INPUT and own[0].part is None and own[0].place is not None

    pairs = list(zip(factors(a), factors(b), strict=False))
    if len(a) != len(b) or any(len(x) != len(y) for x, y in zip(a, b, strict=True)):
        return False
    if any(is_heads(x) != is_heads(y) or not same(x.size, y.size) for x, y in pairs):
        return False
    own = [(x, y) for x, y in pairs if not is_heads(x)]
    if all(x == y for x, y in own):
        return True
    return is_input(a) and is_input(b) and len({f.source for pair in own for f in pair}) == 2


def _same_tokens(x: Segment, video: Segment) -> bool:
    """True where a table of positions has told the video's grid, and these are the tokens that it was joined to."""
    raster = raster_of(video)
    known = x[0] if len(x) == 1 and x[0].role is None and x[0].part is None else None
    return (
        raster is not None
        and known is not None
        and known.source == raster.source
        and known.picked == video[0].picked
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


def _shape_text(node: fx.Node) -> str:
    return "[" + ", ".join(str(size) for size in shape_of(node) or []) + "]"


def _segment_of_size(tokens: Axis, size: Size) -> int | None:
    matching = [index for index, segment in enumerate(tokens) if segment_size(segment).hint == size.hint]
    return matching[0] if len(matching) == 1 else None


def _sizes(grid: tuple[int, int, int]) -> tuple[Size, Size, Size]:
    return (size_of(grid[0]), size_of(grid[1]), size_of(grid[2]))
