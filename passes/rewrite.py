"""The rewrite: one pure function over a graph. Recognise, track, decide, replace, and account for every attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx

from ..kernels.partition import HEAD_POOLS, TILE_OF
from .builder import Builder
from .calls import SDPA, read_call
from .canonical import Spelled, spell
from .decide import Decision, among_shards, decide
from .evidence import Evidence, Handed, given, hand_over
from .handwritten import read
from .landmarks import Landmarks, is_landmark
from .masks import masks_queries
from .modules import spell_module
from .reading import Unread
from .recognise import MODULES, AttentionCall, attention_call, module_path, source_line, spelling
from .replace import numbers, replace_attention
from .report import Layers, Reason, Report, Site, SiteKey, site_keys
from .shards import has_some_heads
from .sizes import Size, shape_of, value_of
from .track import Scope, Tracking, track

Triple = tuple[int, int, int]


class Policy(Protocol):
    """What the rewrite asks of a configuration."""

    @property
    def pool(self) -> str: ...
    @property
    def mode(self) -> str: ...
    @property
    def threshold(self) -> float: ...
    @property
    def topk(self) -> int | None: ...
    @property
    def granularity(self) -> str: ...
    @property
    def float_masks(self) -> str: ...
    @property
    def dense_layers(self) -> tuple[int, ...]: ...

    def least_tokens(self, device: torch.device, training: bool) -> int:
        """Sequences shorter than this stay dense on that device; ``training`` where a backward follows."""

    def least_tokens_named(self, device: torch.device, training: bool) -> str:
        """That number and where it comes from, for a sentence: "fewer than ..."."""

    def block_for(self, layer: int, grid: Triple) -> tuple[str, tuple[int | None, int | None, int | None]]:
        """Scheme and block size of a layer; None is a whole axis."""


def rewrite(gm: fx.GraphModule, config: Policy, *, grid: Triple | None = None, layers: Layers | None = None) -> Report:
    """Replace the dense video self-attention in ``gm``, in place, by the ``vmoba`` operators.

    Args:
        gm: a graph of torch IR from Dynamo, or the ``graph_module`` of an exported program. Node metadata must hold
            example values, as both make them.
        config: threshold, pool, blocks and the other choices, a ``VMoBAConfig``.
        grid: (frames, rows, columns) of the video tokens where the graph does not show them, or to overrule it.
        layers: layer numbers so far, where the graph is one of several of a model.

    Returns:
        A report with one site for every attention found. What is not proven legal stays as it was.

    Raises:
        GridError: ``grid`` contradicts the token count that the graph proves.
    """
    return rewrite_one(gm, config, grid, Layers() if layers is None else layers)[0]


def rewrite_one(
    gm: fx.GraphModule,
    config: Policy,
    grid: Triple | None,
    layers: Layers,
    handed: Handed | None = None,
    number: int = 0,
    landmarks: Landmarks | None = None,
) -> tuple[Report, list[Evidence | None]]:
    """As :func:`rewrite`, for one of several graphs of a model, cut apart by graph breaks.

    Takes what graphs before it told of its inputs, one entry for each; returns what it tells of its outputs. ``number``
    is different for each graph. ``landmarks`` takes what is known at the marks in the graph.
    """

    def wanted(node: fx.Node) -> bool:
        return spelling(node) is not None or is_landmark(node)

    tracking = track(gm, wanted, given(gm, handed) if handed else None)
    told = hand_over(tracking.top, tracking, number)
    if landmarks is not None:
        landmarks.take(tracking)
    order = [(scope, node) for scope, node in tracking.order if not is_landmark(node)]
    keys = site_keys((module_path(node), source_line(node)) for _, node in order)
    plan = [_plan(scope, node, tracking, grid, config.float_masks == "padding") for scope, node in order]
    report = Report()
    for key, found in zip(keys, plan, strict=True):
        report.sites.append(_carry_out(found, config, layers, key))
    report.sites.extend(_unentered(tracking))
    for module in {id(found.scope.module): found.scope.module for found in plan}.values():
        module.graph.lint()
        module.recompile()
    return report, told


@dataclass
class _Found:
    """An attention of the graph, the call that spells it out, and what was decided."""

    scope: Scope
    node: fx.Node
    decision: Decision
    call: AttentionCall | None = None
    spelled: Spelled | None = None


def _plan(scope: Scope, node: fx.Node, tracking: Tracking, grid: Triple | None, trusts_masks: bool) -> _Found:
    """Read the attention and prove it; a spelling of its own stays in the graph only where it will be used."""
    if (local := among_shards(scope, node)) is not None:
        return _Found(scope, node, local)
    try:
        call, spelled = _read(scope, node, trusts_masks)
    except Unread as unread:
        return _Found(scope, node, Decision(unread.reason, unread.detail))
    decision = decide(call, scope, tracking, grid)
    if decision.reason is Reason.REWRITTEN and spelled is not None and spelled.problem is not None:
        decision = Decision(spelled.problem.reason, spelled.problem.detail)
    if (
        decision.reason is Reason.REWRITTEN
        and spelled is not None
        and masks_queries(call.mask, call.node, scope.writers)
    ):
        decision = Decision(
            Reason.MASK, "a mask over queries: rows that see no key are zeros in scaled_dot_product_attention alone"
        )
    if decision.reason is Reason.REWRITTEN and scope.calls > 1:
        decision = Decision(
            Reason.SHARED_SUBGRAPH,
            f"one subgraph serves {scope.calls} layers, which need blocks of their own; compile the model as a whole",
        )
    return _Found(scope, node, decision, call, spelled)


def _read(scope: Scope, node: fx.Node, trusts_masks: bool) -> tuple[AttentionCall, Spelled | None]:
    """The attention as one call over [batch, heads, tokens, head_dim]; :class:`Unread` where it cannot be read."""
    name = spelling(node)
    call = attention_call(node) if name == SDPA else None
    if call is not None:
        return call, None
    if name == "flex_attention":
        raise Unread("flex_attention's score and block functions are not read; use scaled_dot_product_attention")
    if name in MODULES:
        spelled = spell_module(node, scope)
    else:
        spelled = spell(read(node) if name in ("softmax", "exp") else read_call(node), scope, trusts_masks)
    call = attention_call(spelled.call)
    assert call is not None
    return call, spelled


def _carry_out(found: _Found, config: Policy, layers: Layers, key: SiteKey) -> Site:
    facts = _facts(found)
    if found.call is None or found.decision.reason is not Reason.REWRITTEN:
        site = Site(reason=found.decision.reason, detail=found.decision.detail, **facts)
    else:
        call = attention_call(found.call.node)  # its arguments may be attentions that were replaced since
        assert call is not None
        site = _apply(found, call, config, layers, key, facts)
    if found.spelled is not None and not site.rewritten:
        found.spelled.undo()
    return site


def _apply(
    found: _Found,
    call: AttentionCall,
    config: Policy,
    layers: Layers,
    key: SiteKey,
    facts: dict[str, Any],
) -> Site:
    """Carry out a legal rewrite, unless the configuration keeps this site dense."""
    layout = found.decision.layout
    assert layout is not None
    tokens = (shape_of(call.query) or [])[2]
    where = _device(call.query), _needs_gradients(call)
    if tokens.hint < config.least_tokens(*where):
        return Site(
            reason=Reason.TOO_FEW_TOKENS,
            detail=f"{tokens} tokens are fewer than {config.least_tokens_named(*where)}",
            **facts,
        )
    if config.pool not in HEAD_POOLS and any(
        has_some_heads(axis, found.scope.shards) for axis in found.scope.axes_of(call.query) or ()
    ):
        return Site(
            reason=Reason.LAYOUT,
            detail=f'pool="{config.pool}" selects over all heads together, of which this process has some; use "head_global"'
            ' or "query_head"',
            **facts,
        )
    layer = layers.number(key)
    hints = (layout.grid[0].hint, layout.grid[1].hint, layout.grid[2].hint)
    scheme, steps = config.block_for(layer, hints)
    facts |= {"layer": layer}
    if layer in config.dense_layers:
        return Site(reason=Reason.DENSE_LAYER, detail=f"layer {layer} is in dense_layers", **facts)
    builder = Builder(found.scope.module.graph, call.node, found.scope.writers)
    sizes = numbers(builder, layout, call.query)
    if sizes is None:
        return Site(
            reason=Reason.DYNAMIC_GRID,
            detail="the grid is symbolic and not at hand in this subgraph; compile with dynamic=False",
            **facts,
        )
    selection = {
        "pool": config.pool, "mode": config.mode, "threshold": float(config.threshold), "topk": config.topk or 0,
        "tile": TILE_OF[config.granularity],
    }  # fmt: skip
    block = [extent if step is None else step for step, extent in zip(steps, sizes[:3], strict=True)]
    attended = replace_attention(call, builder, layout, sizes, block, selection)
    if found.spelled is not None:
        found.spelled.take_place(attended)
    return Site(
        reason=Reason.REWRITTEN,
        detail="",
        scheme=scheme,
        block=tuple(_plain(extent) if step is None else step for step, extent in zip(steps, layout.grid, strict=True)),
        density_bound=_density_bound(config, hints, steps),
        **facts,
    )


def _density_bound(config: Policy, grid: Triple, steps: tuple[int | None, ...]) -> float:
    """Largest fraction of (query or tile, box) entries kept: the own box, and the share that the rule may add."""
    boxes = 1
    for extent, step in zip(grid, steps, strict=True):
        boxes *= -(-extent // step) if step else 1
    if config.mode == "topk":
        return min(config.topk or 1, boxes) / boxes
    return min(1.0, 1 / boxes + config.threshold)


def _facts(found: _Found) -> dict[str, Any]:
    """Fields of a site that do not depend on the verdict."""
    node, call, decision = found.node, found.call, found.decision
    facts: dict[str, Any] = {
        "path": module_path(node),
        "spelling": spelling(node) or "",
        "source": source_line(node),
    }
    if call is not None:
        shape, keys = shape_of(call.query) or [], shape_of(call.key) or []
        if len(shape) == 4:
            batch, heads, tokens, head_dim = shape
            facts |= {"heads": _plain(heads), "tokens": _plain(tokens), "head_dim": _plain(head_dim)}
            if all(size.static for size in (*shape, keys[2])):
                facts["dense_flops"] = 4 * batch.hint * heads.hint * tokens.hint * keys[2].hint * head_dim.hint
    if decision.layout is not None:
        layout = decision.layout
        facts |= {
            "grid": tuple(_plain(size) for size in layout.grid),
            "prefix": _plain(layout.prefix),
            "suffix": _plain(layout.suffix),
            "evidence": layout.evidence,
        }
    return facts


def _plain(size: Size) -> int | str:
    return size.expr if isinstance(size.expr, int) else str(size)


def _device(node: fx.Node) -> torch.device:
    value = value_of(node)
    return value.device if isinstance(value, torch.Tensor) else torch.device("cpu")


def _needs_gradients(call: AttentionCall) -> bool:
    """True where the result requires gradients: one of q, k and v does, and the graph does not switch gradients off."""
    value = value_of(call.node)
    return isinstance(value, torch.Tensor) and value.requires_grad


def _unentered(tracking: Tracking) -> list[Site]:
    """Attention in the branches of control flow, where token types are not followed."""
    return [
        Site(
            path=module_path(node),
            reason=Reason.CONTROL_FLOW,
            detail=f"inside {caller.name}: token types are not followed into control flow",
            spelling=spelling(node) or "",
            source=source_line(node),
        )
        for _, caller, graph in tracking.unentered
        for node in _all_calls(graph)
        if spelling(node)
    ]


def _all_calls(graph: fx.GraphModule) -> Iterator[fx.Node]:
    """Calls of a graph and of the graphs that it holds."""
    for module in graph.modules():
        if isinstance(module, fx.GraphModule):
            yield from (node for node in module.graph.nodes if node.op in ("call_function", "call_method"))
