"""``measure``: what the rewritten attentions keep of the dense ones, on one real input."""

from __future__ import annotations

import statistics
import time as clock
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from .backend import NO_ATTENTION, Rewriter, check_grid, warn
from .compiling import compile_with, plainly
from .config import VMoBAConfig, as_config
from .handover import Handover
from .kernels import Selection
from .kernels.ops import attention_flops, select_flops
from .kernels.partition import Geometry, Triple, box_of, tile_of, unpack_bits
from .optimize import OptimizedModel
from .passes import Report, RewriteError, Site
from .passes.recognise import module_path
from .passes.report import Picture

SELECT = torch.ops.vmoba.select.default
ATTENTION = torch.ops.vmoba.attention.default
CHUNK_SCORES = 2**24  # scores of the dense attention that are held at once: 64 MiB
RUNS = 3  # of which the median is the time


@torch.no_grad()
def measure(
    model: nn.Module,
    *args: Any,
    config: VMoBAConfig | Mapping[str, Any] | None = None,
    grid: Triple | None = None,
    queries: int = 256,
    picture: Triple | None = None,
    time: bool = False,
    **kwargs: Any,
) -> Report:
    """Run a model once, rewritten, and report what each rewritten attention keeps of the dense one.

    The sites of the report have, besides what :func:`explain` tells, ``density``, ``mass``, ``sparse_flops`` and
    ``picture``, and with ``time`` also ``dense_ms`` and ``sparse_ms``. They show in the report's table and on its page
    (``save("report.html")``). The model runs without gradients, in the mode (training or evaluation) that it is in; its
    compiled graphs are left alone. Where graph breaks make one graph serve several layers, the figures are the last one's.

    Args:
        model: a module, or what :func:`optimize` returned, whose configuration and grid are taken unless given here.
        args, kwargs: the model's own inputs. One named as an argument here (``time``, say) must come by position.
        queries: how many video queries, evenly spaced, the attention mass is taken over in every head (all, where there
            are fewer). Computed in float32 a few queries at a time. Condition tokens count as kept; keys that a mask
            removes count on neither side.
        picture: (frame, row, column) of the query whose boxes are shown, the middle of the grid unless given.
        time: measure also how long the sparse attention (selection included) and the dense one take where they run:
            the median of three runs after one to warm up.

    It warns where no attention was rewritten.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range, or the model is on the meta device.
        GridError: ``grid`` contradicts the graph. InputError: the model rejects the inputs.
    """
    if isinstance(queries, bool) or not isinstance(queries, int):
        raise TypeError(f"queries must be an integer, not {type(queries).__name__}")
    if queries < 1:
        raise ValueError(f"queries must be at least 1, not {queries}")
    place = None if picture is None else _place(picture)
    if isinstance(model, OptimizedModel):
        settings = model._vmoba.settings
        config = settings["config"] if config is None else config
        grid = settings["grid"] if grid is None else grid
    if isinstance(model, torch._dynamo.OptimizedModule):
        model = model._orig_mod
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    tensors = (*model.parameters(), *model.buffers(), *torch.utils._pytree.tree_leaves((args, kwargs)))
    if any(isinstance(x, Tensor) and x.device.type == "meta" for x in tensors):
        raise ValueError("measure computes, which the meta device cannot; use a CPU or a GPU, or explain()")
    watch = _Watch(queries, place, time)
    watch.rewriter = Rewriter(as_config(config), check_grid(grid), watch, handover=Handover())
    compiled = compile_with(model, watch.rewriter, {"dynamic": False})
    with plainly(model, (args, kwargs)):
        compiled(*args, **kwargs)
    report = watch.rewriter.report
    for found in watch.ran:
        report.merge(found)
    if not report.rewritten:
        found_instead = report.summary() if len(report) else NO_ATTENTION
        warn(f"vmoba_compile measured nothing in {type(model).__name__}: {found_instead}")
    return report


def _place(picture: object) -> Triple:
    if not isinstance(picture, (tuple, list)) or len(picture) != 3:
        raise ValueError(f"picture must be three integers (frame, row, column), not {picture!r}")
    for index in picture:
        if isinstance(index, bool) or not isinstance(index, int):
            raise TypeError(f"picture must hold integers, not {type(index).__name__} in {picture!r}")
        if index < 0:
            raise ValueError(f"picture counts frame, row and column from 0, not {picture!r}")
    return (picture[0], picture[1], picture[2])


class _Watch:
    """An inner compiler whose graphs run as they are, and measure each sparse attention as it comes by."""

    def __init__(self, queries: int, picture: Triple | None, timed: bool) -> None:
        self.queries = queries
        self.picture = picture
        self.timed = timed
        self.rewriter: Rewriter | None = None
        self.ran: list[Report] = []  # of each graph that ran, its own

    def __call__(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        assert self.rewriter is not None
        found = self.rewriter.latest  # the report of this graph, made just before
        assert found is not None
        nodes = list(attentions(graph))
        for node, place in zip(nodes, matched(nodes, found.sites), strict=True):
            self._observe(node, found, place)
        for module in {id(node.graph): node.graph.owning_module for node in nodes}.values():
            assert module is not None
            module.recompile()

        def run(*values: Any) -> Any:
            outputs = graph.forward(*values)
            self.ran.append(found)
            return outputs

        return run

    def _observe(self, node: fx.Node, found: Report, place: int) -> None:
        selecting = node.args[3]
        assert isinstance(selecting, fx.Node) and selecting.target is SELECT
        rule = dict(selecting.kwargs)

        def attention(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
            result = ATTENTION(*args, **options)
            # Under autocast float32 products would run in 16 bits.
            with torch.autocast(args[0].device.type, enabled=False):
                call = Call.of(args, options, rule)
                found.sites[place] = replace(found.sites[place], **self._measured(call, found.sites[place].path))
            return result

        node.target = attention

    def _measured(self, call: Call, path: str) -> dict[str, Any]:
        measured: dict[str, Any] = {
            "density": tuple(Selection(call.selected, call.geometry, call.tile).density().mean(0).tolist()),
            "mass": kept_mass(call, self.queries),
            "sparse_flops": call.flops(),
            "picture": pictured(call, self.picture, path),
        }
        if self.timed:
            measured |= {"dense_ms": milliseconds(call.dense, call.q), "sparse_ms": milliseconds(call.sparse, call.q)}
        return measured


def attentions(graph: fx.GraphModule) -> Iterator[fx.Node]:
    """The sparse attentions in the order in which they run, with those of the graphs that it calls (checkpointing)."""
    held = {name: module for name, module in graph.named_modules() if isinstance(module, fx.GraphModule)}
    for node in graph.graph.nodes:
        if node.target is ATTENTION:
            yield node
        called = [node] if node.op == "call_module" else [x for x in node.all_input_nodes if x.op == "get_attr"]
        for holder in called:
            if holder.target in held:
                yield from attentions(held[holder.target])


def matched(nodes: Sequence[fx.Node], sites: Sequence[Site]) -> list[int]:
    """For each sparse attention the place of its site: of those of its module in order, or, should paths differ, of all.

    Raises:
        RewriteError: they are not as many as the rewritten sites.
    """
    rewritten = [place for place, site in enumerate(sites) if site.rewritten]
    if len(nodes) != len(rewritten):
        raise RewriteError(
            f"{len(nodes)} sparse attentions were found in a graph for which {len(rewritten)} were reported; please report "
            "this with the model's class"
        )
    places: dict[str, list[int]] = defaultdict(list)
    for place in rewritten:
        places[sites[place].path].append(place)
    paths = [module_path(node) for node in nodes]
    if Counter(paths) != Counter(sites[place].path for place in rewritten):
        return rewritten
    return [places[path].pop(0) for path in paths]


@dataclass(frozen=True, eq=False)
class Call:
    """One call of the sparse attention: q [B, H, S, D], k, v [B, Hkv, S, D], the selected boxes and what chose them."""

    q: Tensor
    k: Tensor
    v: Tensor
    selected: Tensor  # int32 bit sets [B, H, N, W], or [B, H, M, W] of tiles
    key_mask: Tensor  # bool [B, S], or no elements
    geometry: Geometry
    options: Mapping[str, Any]
    rule: Mapping[str, Any]

    @classmethod
    def of(cls, args: Sequence[Any], options: Mapping[str, Any], rule: Mapping[str, Any]) -> Call:
        t, h, w, bt, bh, bw, prefix, suffix = map(int, args[5:])
        q, k, v, selected, key_mask = args[:5]
        return cls(q, k, v, selected, key_mask, Geometry((t, h, w), (bt, bh, bw), prefix, suffix), options, rule)

    @property
    def tile(self) -> int:
        return self.options.get("tile", 0)

    @property
    def sizes(self) -> tuple[int, ...]:
        return (*self.geometry.grid, *self.geometry.block, self.geometry.prefix, self.geometry.suffix)

    def flops(self) -> int:
        """Of the selection and of the attention to what it chose, as torch's FLOP counter has them."""
        gate = select_flops(self.q.shape, self.k.shape, self.key_mask.shape, *self.sizes, tile=self.tile)
        return gate + attention_flops(self.q, self.k, self.v, self.selected, self.key_mask, *self.sizes, tile=self.tile)

    def sparse(self) -> Tensor:
        selected = SELECT(self.q, self.k, self.key_mask, *self.sizes, **self.rule)
        return ATTENTION(self.q, self.k, self.v, selected, self.key_mask, *self.sizes, **self.options)[0]

    def dense(self) -> Tensor:
        mask = self.key_mask[:, None, None, :] if self.key_mask.numel() else None
        grouped = self.q.shape[1] != self.k.shape[1]
        scale = self.options["scale"]
        return F.scaled_dot_product_attention(self.q, self.k, self.v, mask, scale=scale, enable_gqa=grouped)


def kept_mass(call: Call, queries: int) -> tuple[float, ...]:
    """Share of the dense softmax's weights on attended keys, per head: mean over samples and evenly spaced queries.

    A query that may attend to no key at all does not count.
    """
    q, k, geometry = call.q, call.k, call.geometry
    device, group = q.device, q.shape[1] // k.shape[1]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    asked = torch.linspace(0, geometry.num_video - 1, min(queries, geometry.num_video), device=device).round().long()
    box = box_of(geometry.grid, geometry.block, device)
    step = max(1, CHUNK_SCORES // geometry.num_tokens)
    shares = []
    for head in range(q.shape[1]):
        of_head = []
        for sample in range(q.shape[0]):
            keys = k[sample, head // group].to(dtype)
            for part in asked.split(step):
                scores = q[sample, head, part + geometry.prefix].to(dtype) @ keys.T * call.options["scale"]
                if call.key_mask.numel():
                    scores.masked_fill_(~call.key_mask[sample], -torch.inf)
                weights = scores.softmax(-1)
                chosen = unpack_bits(_rows(call, sample, head, part), geometry.num_boxes)  # [queries, C]
                lost = weights[:, geometry.video].masked_fill_(chosen[:, box], 0.0).sum(-1)
                of_head.append(1 - lost)
        shares.append(float(torch.cat(of_head).double().nanmean().nan_to_num(1.0)))
    return tuple(shares)


def _rows(call: Call, sample: int, head: int, queries: Tensor) -> Tensor:
    """Bit sets int32 [n, W] of video queries."""
    if call.tile:
        queries = tile_of(call.geometry.grid, call.geometry.block, call.tile, queries.device)[queries]
    return call.selected[sample, head, queries]


def pictured(call: Call, place: Triple | None, path: str) -> Picture:
    """The boxes that one query of the first sample selected, per head; the middle one of the grid unless given."""
    geometry = call.geometry
    grid, block = geometry.grid, geometry.block
    if place is None:
        place = (grid[0] // 2, grid[1] // 2, grid[2] // 2)
    if any(index >= extent for index, extent in zip(place, grid, strict=True)):
        raise ValueError(f"picture={place} lies outside the grid {grid} of {path or 'the model'}; it counts from 0")
    query = torch.tensor([(place[0] * grid[1] + place[1]) * grid[2] + place[2]], device=call.q.device)
    rows = [unpack_bits(_rows(call, 0, head, query)[0], geometry.num_boxes) for head in range(call.q.shape[1])]
    within = (min(block[0], grid[0]), min(block[1], grid[1]), min(block[2], grid[2]))
    return Picture(place, grid, within, tuple(tuple(row.nonzero().flatten().tolist()) for row in rows))


def milliseconds(run: Callable[[], Any], on: Tensor) -> float:
    """Median time of a call on the tensor's device, after one to warm up."""
    run()
    times = []
    for _ in range(RUNS):
        if on.is_cuda:
            with torch.cuda.device(on.device):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                run()
                end.record()
                end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            before = clock.perf_counter()
            run()
            times.append((clock.perf_counter() - before) * 1e3)
    return statistics.median(times)
