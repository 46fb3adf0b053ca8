"""Check an optimized model on real inputs: the operators against the reference, and the rewrite against the model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from .config import VMoBAConfig, as_config
from .kernels import Selection
from .kernels.partition import Geometry, unpack_bits
from .optimize import OptimizedModel, optimize
from .passes import RewriteError
from .passes.recognise import module_path

SAMPLED = 128  # queries of each head whose attention mass is measured


@dataclass(frozen=True)
class VerifiedSite:
    """One rewritten attention, on the values that really reach it.

    ``attention_error`` is the relative error (2-norm) of the operator's output against the reference in float32, with
    the selection that the operator made; ``selection_error`` the share of (query, box) entries in which that differs from
    the reference's; ``density`` the kept share of video pairs, mean over samples and heads; ``mass`` the share of dense
    attention's weights that fall on the kept keys, mean over evenly spaced queries.
    """

    path: str
    attention_error: float
    selection_error: float
    density: float
    mass: float


@dataclass(frozen=True)
class Verification:
    """``rewrite_error`` is the relative error of the model's outputs with everything selected: that of the rewrite alone.

    ``sparse_error`` is that of the outputs with the configured selection, which VMoBA changes by design.
    """

    sites: tuple[VerifiedSite, ...]
    rewrite_error: float
    sparse_error: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def save(self, path: str | Path) -> None:
        """Write all figures as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n")

    def __rich__(self):
        from rich.console import Group
        from rich.table import Table

        table = Table(show_edge=False, pad_edge=False)
        for title in ("module", "attention error", "selection error", "density", "mass kept"):
            table.add_column(title, justify="left" if title == "module" else "right")
        for site in self.sites:
            table.add_row(
                site.path or "(top)", f"{site.attention_error:.1e}", f"{site.selection_error:.1e}", f"{site.density:.3f}",
                f"{site.mass:.3f}",
            )  # fmt: skip
        whole = f"outputs: {self.rewrite_error:.1e} off with everything selected, {self.sparse_error:.1e} as configured"
        return Group(table, whole)

    def __str__(self) -> str:
        from io import StringIO

        from rich.console import Console

        out = StringIO()
        Console(file=out, width=120).print(self)
        return out.getvalue()


@torch.no_grad()
def verify(
    model: nn.Module,
    *args: Any,
    config: VMoBAConfig | Mapping[str, Any] | None = None,
    grid: tuple[int, int, int] | None = None,
    **kwargs: Any,
) -> Verification:
    """Compare an optimized model with its reference on one input; ``args`` and ``kwargs`` are the model's own.

    The model runs three times: as it is, rewritten with everything selected (which must agree to rounding), and rewritten
    as configured, each attention beside the reference on the same values. Slow, and for a look rather than every day. The
    model's compiled graphs are left alone.

    Args:
        model: what :func:`optimize` returned, whose configuration and grid are taken, or a module to be judged with
            ``config`` and ``grid``.

    Raises:
        RewriteError: no attention of the model was rewritten.
    """
    if isinstance(model, OptimizedModel):
        if config is not None or grid is not None:
            raise ValueError("the optimized model has its own config and grid; pass the module itself to try others")
        settings = model._vmoba.settings
        config, grid, model = settings["config"], settings["grid"], model._orig_mod
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    chosen = as_config(config)
    everything = dataclasses.replace(chosen, mode="threshold", threshold=1.0, topk=None, pool="head_global")
    sites: list[VerifiedSite] = []
    wanted = _run(model, args, kwargs)
    whole = _run(optimize(model, everything, grid=grid, inner=_as_it_is), args, kwargs)
    sparse = _run(optimize(model, chosen, grid=grid, inner=_Probe(sites)), args, kwargs)
    if not sites:
        raise RewriteError(f"no attention of {type(model).__name__} was rewritten: nothing to verify; see explain()")
    return Verification(tuple(sites), _error(whole, wanted), _error(sparse, wanted))


def _run(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    devices = sorted({x.device.index for x in _tensors((args, kwargs)) if x.is_cuda})
    with torch.random.fork_rng(devices):
        return list(_tensors(call(*args, **kwargs)))


def _tensors(value: Any) -> Iterator[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(value)
    return (leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel())


def _as_it_is(graph: fx.GraphModule, inputs: object) -> Callable[..., Any]:
    return graph.forward


class _Probe:
    """An inner compiler whose graphs run as they are, and measure each sparse attention as it comes by."""

    def __init__(self, sites: list[VerifiedSite]) -> None:
        self.sites = sites

    def __call__(self, graph: fx.GraphModule, inputs: object) -> Callable[..., Any]:
        for module in graph.modules():
            if isinstance(module, fx.GraphModule):
                for node in module.graph.nodes:
                    if node.target is torch.ops.vmoba.attention.default:
                        self._watch(node)
                module.recompile()
        return graph.forward

    def _watch(self, node: fx.Node) -> None:
        path, selecting = module_path(node), node.args[3]
        assert isinstance(selecting, fx.Node)
        rule = dict(selecting.kwargs)

        def attention(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
            result = torch.ops.vmoba.attention.default(*args, **options)
            self.sites.append(_measure(path, args, options, rule, *result))
            return result

        node.target = attention


def _measure(
    path: str, args: tuple[Any, ...], options: dict[str, Any], rule: dict[str, Any], out: Tensor, lse: Tensor
) -> VerifiedSite:
    q, k, v, selected, key_mask, *sizes = args
    t, h, w, bt, bh, bw, prefix, suffix = map(int, sizes)
    geometry, tile = Geometry((t, h, w), (bt, bh, bw), prefix, suffix), options.get("tile", 0)
    exact = [x.float() if x.dtype != torch.float64 else x for x in (q, k, v)]
    reference = {"implementation": "reference"}
    wanted, _ = torch.ops.vmoba.attention(*exact, selected, key_mask, *sizes, **options | reference)
    entries = torch.ops.vmoba.select(*exact[:2], key_mask, *sizes, **rule | reference)
    different = unpack_bits(selected ^ entries, geometry.num_boxes)
    return VerifiedSite(
        path,
        attention_error=_error([out], [wanted]),
        selection_error=float(different.double().mean()),
        density=float(Selection(selected, geometry, tile).density().mean()),
        mass=_mass(exact[0], exact[1], key_mask, lse, geometry, options["scale"]),
    )


def _mass(q: Tensor, k: Tensor, key_mask: Tensor, lse: Tensor, geometry: Geometry, scale: float) -> float:
    """Share of the dense attention's weights on the kept keys: what their log-sum-exp lacks."""
    with torch.autocast(q.device.type, enabled=False):
        return _share(q, k, key_mask, lse, geometry, scale)


def _share(q: Tensor, k: Tensor, key_mask: Tensor, lse: Tensor, geometry: Geometry, scale: float) -> float:
    places = torch.linspace(0, geometry.num_video - 1, min(SAMPLED, geometry.num_video), device=q.device)
    places = places.round().long() + geometry.prefix
    shares = []
    for sample in range(q.shape[0]):
        for head in range(q.shape[1]):
            scores = q[sample, head, places] @ k[sample, head // (q.shape[1] // k.shape[1])].T * scale
            if key_mask.numel():
                scores = scores.masked_fill(~key_mask[sample], -torch.inf)
            shares.append((lse[sample, head, places].to(scores.dtype) - scores.logsumexp(-1)).exp())
    return float(torch.cat(shares).nanmean())


def _error(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest relative error of the tensors, in the 2-norm."""
    return max(
        float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30))
        for got, want in zip(found, wanted, strict=True)
    )
