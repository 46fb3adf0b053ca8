"""Heads over several GPUs: how unevenly their densities load the ranks, and an order of heads that evens it out.

Where heads are spread over ranks (Ulysses, tensor parallelism), each rank gets as many, one after the other, and all wait
for the one whose heads kept the most pairs. A static order of heads, from the densities that ``measure`` found, helps:

    density = balance.densities(vmoba_compile.measure(model, ...))      # of one process, on real inputs
    rich.print(balance.table(density, ranks=8))                         # what an order would gain
    order = balance.head_order(density, ranks=8)
    for block, heads in zip(model.blocks, order):                       # before sharding, compiling and optimizers
        attention = block.attn1
        balance.permute_heads(heads, rows=[attention.to_q, attention.to_k, attention.to_v, attention.norm_q,
            attention.norm_k], columns=[attention.to_out[0]], head_size=128)

Attention takes its heads in any order, and the output projection undoes it: the model computes what it did.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .passes import Report

if TYPE_CHECKING:
    from rich.table import Table


def densities(report: Report) -> Tensor:
    """Kept fraction of the video pairs, float64 [layers, heads], of a report's rewritten attentions in their order.

    Raises:
        ValueError: there are none, they were not measured, or their numbers of heads differ.
    """
    found = [site.density for site in report.rewritten]
    if not found:
        raise ValueError(
            f"the report has no rewritten attention ({report.summary()}); min_tokens=0 is for small models"
        )
    if any(share is None for share in found):
        raise ValueError("the report has no densities; give the one that vmoba_compile.measure(model, ...) returns")
    if len({len(share) for share in found if share is not None}) > 1:
        raise ValueError("the attentions differ in their numbers of heads; balance those of one number at a time")
    return torch.tensor(found, dtype=torch.float64)


def imbalance(density: Tensor, ranks: int, order: Tensor | None = None) -> Tensor:
    """Load of the fullest rank over the mean, float64 [layers]: 1 is even, 1.2 costs a fifth of the attention's time.

    Args:
        density: [layers, heads], as from :func:`densities`.
        ranks: over which the heads are spread evenly, in order.
        order: int [layers, heads], as from :func:`head_order`; as they are, unless given.

    Raises:
        ValueError: shapes do not fit, or the heads do not divide by ``ranks``.
    """
    density = _checked(density, ranks)
    if order is not None:
        density = density.gather(1, _checked_order(order, density.shape[1]).expand_as(density))
    load = density.unflatten(1, (ranks, -1)).sum(-1)
    return load.amax(1) / load.mean(1).clamp_min(torch.finfo(load.dtype).tiny)


def head_order(density: Tensor, ranks: int, *, group: int = 1) -> Tensor:
    """The order of heads, int64 [layers, heads], that gives each rank as many and about as much to do.

    The densest first, each to the rank with the least so far that has room (the longest processing time first); a layer
    that is no better so keeps its order. Rank r gets heads ``order[layer, r * n : (r + 1) * n]``, n = heads / ranks.

    Args:
        density: [layers, heads], as from :func:`densities`.
        group: query heads that share a key head, and stay together.

    Raises:
        ValueError: the heads do not divide by ``ranks * group``.
    """
    density = _checked(density, ranks * group)
    heads = density.shape[1]
    together = density.unflatten(1, (-1, group)).sum(-1)
    orders = torch.stack([_layer_order(loads, ranks) for loads in together.tolist()])
    order = (orders[:, :, None] * group + torch.arange(group)).flatten(1)
    as_is = torch.arange(heads)
    better = imbalance(density, ranks, order) < imbalance(density, ranks)
    return torch.where(better[:, None], order, as_is)


def _layer_order(loads: list[float], ranks: int) -> Tensor:
    room = len(loads) // ranks
    taken: list[list[int]] = [[] for _ in range(ranks)]
    queue = [(0.0, rank) for rank in range(ranks)]  # a heap: the rank with the least first
    for head in sorted(range(len(loads)), key=lambda head: -loads[head]):
        load, rank = heapq.heappop(queue)
        taken[rank].append(head)
        if len(taken[rank]) < room:
            heapq.heappush(queue, (load + loads[head], rank))
    return torch.tensor([head for heads in taken for head in sorted(heads)])


def table(density: Tensor, ranks: int, *, group: int = 1) -> Table:
    """For each layer its density, its imbalance as it is and by :func:`head_order`, and the predicted gain in speed."""
    from rich.table import Table

    density = _checked(density, ranks * group)
    before, after = imbalance(density, ranks), imbalance(density, ranks, head_order(density, ranks, group=group))
    shown = Table(title=f"heads over {ranks} ranks (predicted from densities)", show_edge=False, pad_edge=False)
    for title in ("layer", "density", "imbalance", "balanced", "attention gains"):
        shown.add_column(title, justify="right")
    for layer, share in enumerate(density.mean(1)):
        old, new = float(before[layer]), float(after[layer])
        shown.add_row(str(layer), f"{share:.3f}", f"{old:.3f}", f"{new:.3f}", f"{old / new:.3f}x")
    weights = density.sum(1)  # layers one after another: the time is the sum of the fullest ranks' loads
    old, new = (float((weights * x).sum() / weights.sum()) for x in (before, after))
    shown.add_row("all", f"{density.mean():.3f}", f"{old:.3f}", f"{new:.3f}", f"{old / new:.3f}x")
    return shown


@torch.no_grad()
def permute_heads(
    order: Tensor, *, rows: Iterable[nn.Module] = (), columns: Iterable[nn.Module] = (), head_size: int
) -> None:
    """Reorder the heads of one attention's weights, in place.

    ``order.argsort()`` takes it back. With fewer key heads than query heads (``group`` of :func:`head_order`) permute the
    key and value projections by ``order[::group] // group``, in a call of their own.

    Args:
        order: int [heads], one layer of :func:`head_order`.
        rows: modules that make the heads, and norms over all heads: their weights and biases have ``heads * head_size``
            rows, or a multiple, as a joint projection to q, k and v does ([q | k | v], not interleaved).
        columns: modules that take the heads: their weights have ``heads * head_size`` columns.
        head_size: features of a head; a norm over one head's is shared by all, and not for ``rows``.

    Raises:
        ValueError: ``order`` is no permutation, or a weight has another size. TypeError: a weight is a DTensor or is
            not floating point. All are checked before the first is changed.
    """
    order = _checked_order(order[None], order.numel())[0]
    heads, moves = order.numel(), []
    for modules, dim in ((rows, 0), (columns, 1)):
        for module in modules:
            own = dict(module.named_parameters(recurse=False))
            found = own if dim == 0 else {name: x for name, x in own.items() if name == "weight"}
            if "weight" not in found:
                raise ValueError(f"{type(module).__name__} has no weight of its own, so no heads to permute")
            for name, x in found.items():
                moves.append((x, dim, _head_axis(x, dim, heads, head_size, f"{type(module).__name__}.{name}")))
    for x, dim, shape in moves:
        place = order.to(x.device)
        x.copy_(x.unflatten(dim, shape).index_select(dim + 1, place).flatten(dim, dim + 2))


def _head_axis(x: Tensor, dim: int, heads: int, head_size: int, name: str) -> tuple[int, int, int]:
    if hasattr(x, "full_tensor"):
        raise TypeError(f"{name} is sharded already; permute the heads before fully_shard or parallelize_module")
    if not x.is_floating_point():
        raise TypeError(f"{name} is {x.dtype}; permute the heads before quantization")
    size = x.shape[dim] if x.dim() > dim else 0
    if size == 0 or size % (heads * head_size) or (dim == 1 and size != heads * head_size):
        raise ValueError(
            f"{name} {list(x.shape)} has no {heads} heads of {head_size} in dimension {dim}; a norm over one head's"
            " features is shared by all heads and stays as it is"
        )
    return (size // (heads * head_size), heads, head_size)


def _checked(density: Tensor, divisor: int) -> Tensor:
    density = torch.as_tensor(density, dtype=torch.float64, device="cpu")
    if density.dim() != 2 or not density.numel():
        raise ValueError(f"density must be [layers, heads], not {list(density.shape)}")
    if not bool((density >= 0).all()):
        raise ValueError("density must not be negative or NaN")
    if isinstance(divisor, bool) or not isinstance(divisor, int) or divisor < 1:
        raise ValueError(f"ranks and group must be integers of at least 1, not {divisor!r} of them together")
    if density.shape[1] % divisor:
        raise ValueError(
            f"{density.shape[1]} heads cannot be spread evenly over {divisor} ranks (times heads of a group)"
        )
    return density


def _checked_order(order: Tensor, heads: int) -> Tensor:
    order = torch.as_tensor(order, device="cpu")
    if order.dim() != 2 or order.is_floating_point() or order.shape[1] != heads:
        raise ValueError(f"order must be integers [layers, {heads}], not {list(order.shape)} of {order.dtype}")
    order = order.long()
    if not bool((order.sort(1).values == torch.arange(heads)).all()):
        raise ValueError("order must hold every head once")
    return order
