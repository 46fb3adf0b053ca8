"""The ``vmoba`` operators: schemas, fake kernels, autograd, FLOP formulas, and which implementation a device gets.

``vmoba::select`` chooses boxes, ``vmoba::attention`` attends to them, ``vmoba::attention_backward`` is its gradient.
All are functional, return contiguous tensors and take Tensor, int, float, bool and str arguments only. Sizes are
``SymInt``, so that one traced graph can serve several grids and layers. A ``key_mask`` without elements means: no mask.
``tile`` is 0 where every query selects for itself, else the tokens of a tile of queries that selects as one (64 or 128;
``partition.tile_of`` says which): ``selected`` is [B, H, N, W] or [B, H, M, W] with M tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import implementations
from .partition import Geometry, box_counts, box_order, queries_per_box, tiles_per_box

_SIZES = "SymInt t, SymInt h, SymInt w, SymInt bt, SymInt bh, SymInt bw, SymInt prefix, SymInt suffix"


def _geometry(t: int, h: int, w: int, bt: int, bh: int, bw: int, prefix: int, suffix: int) -> Geometry:
    return Geometry((t, h, w), (bt, bh, bw), prefix, suffix)


def _select(
    q: Tensor, k: Tensor, key_mask: Tensor, *sizes: int,
    pool: str, mode: str, threshold: float, topk: int, implementation: str = "auto", tile: int = 0,
) -> Tensor:  # fmt: skip
    return implementations.select(
        q, k, key_mask, _geometry(*sizes),
        pool=pool, mode=mode, threshold=threshold, topk=topk, implementation=implementation, tile=tile,
    )  # fmt: skip


def _attention(
    q: Tensor, k: Tensor, v: Tensor, selected: Tensor, key_mask: Tensor, *sizes: int,
    scale: float, threshold: float = 1.0, topk: int = 0, implementation: str = "auto", tile: int = 0,
    pool: str = "overall",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return implementations.attention(
        q, k, v, selected, key_mask, _geometry(*sizes),
        scale=scale, threshold=threshold, topk=topk, implementation=implementation, tile=tile, pool=pool,
    )  # fmt: skip


def _attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, selected: Tensor, key_mask: Tensor, out: Tensor, lse: Tensor,
    dlse: Tensor, *sizes: int, scale: float, threshold: float = 1.0, topk: int = 0, implementation: str = "auto",
    tile: int = 0, pool: str = "overall",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return implementations.attention_backward(
        dout, q, k, v, selected, key_mask, out, lse, dlse, _geometry(*sizes),
        scale=scale, threshold=threshold, topk=topk, implementation=implementation, tile=tile, pool=pool,
    )  # fmt: skip


_SCHEMAS = {
    "select": f"(Tensor q, Tensor k, Tensor key_mask, {_SIZES}, *, str pool, str mode, float threshold, int topk,"
    ' str implementation="auto", int tile=0) -> Tensor',
    # threshold, topk and pool are those of the selection; the defaults are for any. They bound the memory for its pairs.
    "attention": f"(Tensor q, Tensor k, Tensor v, Tensor selected, Tensor key_mask, {_SIZES}, *, float scale,"
    ' float threshold=1.0, int topk=0, str implementation="auto", int tile=0, str pool="overall") -> (Tensor, Tensor)',
    # dlse without elements where lse has no gradient.
    "attention_backward": "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor selected, Tensor key_mask, Tensor out,"
    f" Tensor lse, Tensor dlse, {_SIZES}, *, float scale, float threshold=1.0, int topk=0,"
    ' str implementation="auto",'
    ' int tile=0, str pool="overall") -> (Tensor, Tensor, Tensor)',
}


_LIBRARY = torch.library.Library("vmoba", "DEF")


def _define(name: str, body: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """One operator. ``torch.library.custom_op`` does the same, but dispatches more slowly."""
    _LIBRARY.define(name + _SCHEMAS[name], tags=(torch.Tag.pt2_compliant_tag,))
    for device in implementations.DEVICES:
        # Where Dynamo falls back to eager code it would otherwise trace into the body.
        _LIBRARY.impl(name, torch._disable_dynamo(body), device.upper())
    torch.library.register_fake(f"vmoba::{name}", fake, lib=_LIBRARY)


def _select_fake(
    q, k, key_mask, t, h, w, bt, bh, bw, prefix, suffix, *, pool, mode, threshold, topk, implementation="auto", tile=0
):
    counts = box_counts((t, h, w), (bt, bh, bw))
    boxes = counts[0] * counts[1] * counts[2]
    rows = boxes * tiles_per_box((t, h, w), (bt, bh, bw), tile) if tile else t * h * w
    return q.new_empty((q.shape[0], q.shape[1], rows, (boxes + 31) // 32), dtype=torch.int32)


def _accumulator(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _attention_fake(
    q, k, v, selected, key_mask, *sizes, scale, threshold=1.0, topk=0, implementation="auto", tile=0, pool="overall"
):
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=_accumulator(q))


def _attention_backward_fake(
    dout, q, k, v, selected, key_mask, out, lse, dlse,
    *sizes, scale, threshold=1.0, topk=0, implementation="auto", tile=0, pool="overall",
):  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_define("select", _select, _select_fake)
_define("attention", _attention, _attention_fake)
_define("attention_backward", _attention_backward, _attention_backward_fake)

if torch.distributed.is_available():
    from . import sharding

    sharding.register(_LIBRARY)


def _attention_setup_context(ctx, inputs, keyword_only_inputs, output):
    q, k, v, selected, key_mask, *ctx.sizes = inputs
    ctx.options = dict(keyword_only_inputs)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, selected, key_mask, *output)


def _attention_grad(ctx, dout: Tensor | None, dlse: Tensor | None):
    q, k, v, selected, key_mask, out, lse = ctx.saved_tensors
    no_grads = (None,) * (2 + len(ctx.sizes))
    if dout is None and dlse is None:
        return None, None, None, *no_grads
    dout = torch.zeros_like(out) if dout is None else dout
    dlse = lse.new_empty(0) if dlse is None else dlse
    grads = torch.ops.vmoba.attention_backward(
        dout, q, k, v, selected, key_mask, out, lse, dlse, *ctx.sizes, **ctx.options
    )
    return *grads, *no_grads


torch.library.register_autograd(
    "vmoba::attention", _attention_grad, setup_context=_attention_setup_context, lib=_LIBRARY
)


def _no_double_backward(ctx, *grads):
    raise RuntimeError(
        "vmoba::attention has no second derivative; use dense attention (`with model.dense():`) where one is needed"
    )


torch.library.register_autograd("vmoba::attention_backward", _no_double_backward, lib=_LIBRARY)


def _selected_pairs(selected: Tensor, geometry: Geometry, heads: int, batch: int, tile: int = 0) -> int:
    """(query, key) pairs that are computed: of the selected boxes, and all pairs with a condition token on either side.

    Without data (fake tensors) the selection is unknown, and all pairs are counted: an upper bound.
    """
    condition = geometry.num_condition
    with_condition = batch * heads * condition * (geometry.num_tokens + geometry.num_video)
    if isinstance(selected, torch._subclasses.FakeTensor) or selected.device.type == "meta":
        return with_condition + batch * heads * geometry.num_video**2
    _, starts = box_order(geometry.grid, geometry.block)
    sizes = torch.diff(torch.tensor(starts, device=selected.device))
    per_box = sum(
        queries_per_box(rows, geometry, tile) for sample in selected for rows in sample
    )  # one head at a time: the unpacked bits are 32 times the bit sets
    return with_condition + int((per_box * sizes).sum())


@register_flop_formula(torch.ops.vmoba.select)
def select_flops(q_shape, k_shape, mask_shape, *sizes, out_shape=None, **kwargs) -> int:
    """The gate: one product of every video query (with tiles: of every tile) with every box mean."""
    geometry = _geometry(*sizes)
    rows = geometry.by_tile(kwargs.get("tile", 0)).num_video
    return 2 * q_shape[0] * q_shape[1] * rows * geometry.num_boxes * q_shape[3]


@register_flop_formula(torch.ops.vmoba.attention, get_raw=True)
def attention_flops(q, k, v, selected, key_mask, *sizes, out_val=None, **kwargs) -> int:
    """Two products (scores, values) over the selected pairs."""
    tile = kwargs.get("tile", 0)
    return 4 * q.shape[3] * _selected_pairs(selected, _geometry(*sizes), q.shape[1], q.shape[0], tile)


@register_flop_formula(torch.ops.vmoba.attention_backward, get_raw=True)
def attention_backward_flops(
    dout, q, k, v, selected, key_mask, out, lse, dlse, *sizes, out_val=None, **kwargs
) -> int:  # fmt: skip
    """Five products over the selected pairs."""
    tile = kwargs.get("tile", 0)
    return 10 * q.shape[3] * _selected_pairs(selected, _geometry(*sizes), q.shape[1], q.shape[0], tile)
