"""The operators on ``DTensor``: samples and heads may be spread over a mesh, the tokens of a sequence may not.

Heads only where the pool is of one head, and where every rank gets whole groups of query heads with their key head.
Whatever else comes (a sharded sequence or head size, a pending sum) is redistributed first, never computed in parts: a
sequence sharded over ranks becomes heads sharded over the same ranks, by an all-to-all.

Rules of dispatch rather than ``torch.distributed.tensor.experimental.register_sharding``, which remembers its decisions by
the integers among the options alone, so that one pool's would be taken for another's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from .partition import HEAD_POOLS

BATCH, HEADS = 0, 1

# Of every operator: its arguments that are [B, heads, ...], and its mask [B, S]. A tensor without elements is whole.
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "select": ("q", "k", "mask"),
    "attention": ("q", "k", "v", "selected", "mask"),
    "attention_backward": ("dout", "q", "k", "v", "selected", "mask", "out", "lse", "dlse"),
}


def layout(asked: Sequence[Sequence[Placement]], mesh: Sequence[int], batch: int, heads: int) -> list[Placement]:
    """Where samples and heads lie, for each dimension of a mesh of that shape, by what the inputs are placed as.

    Args:
        asked: placements of the inputs [B, heads, S, ...], those first that are to decide. Who shards samples or heads is
            followed, where that goes; a sharded sequence becomes sharded heads, else sharded samples.
        mesh: extents of the mesh.
        batch, heads: how many there are to share out, evenly; 1 where they may not be.
    """
    found: list[Placement] = []
    left = {BATCH: batch, HEADS: heads}  # on one rank so far
    for axis, extent in enumerate(mesh):
        wishes = [getattr(placements[axis], "dim", None) for placements in asked if placements[axis].is_shard()]
        wishes += [dim for wish in wishes if wish not in left for dim in (HEADS, BATCH)]
        dim = next((wish for wish in wishes if wish in left and left[wish] % extent == 0), None)
        if dim is None:
            found.append(Replicate())
        else:
            left[dim] //= extent
            found.append(Shard(dim))
    return found


def _placed(x: DTensor, name: str, found: list[Placement]) -> list[Placement]:
    if not x.numel():
        return [Replicate()] * len(found)
    if name == "mask":  # [B, S]
        return [p if p == Shard(BATCH) else Replicate() for p in found]
    return found


def _mesh_of(op: str, tensors: dict[str, Any]) -> DeviceMesh:
    distributed = {name: x for name, x in tensors.items() if isinstance(x, DTensor)}
    plain = [name for name, x in tensors.items() if name not in distributed and x.numel()]
    if plain:
        raise TypeError(
            f"vmoba::{op} was given {', '.join(distributed)} as DTensor and {', '.join(plain)} as a plain tensor; give all"
            " as DTensor on one mesh (distribute_tensor), or all as local tensors (to_local)"
        )
    meshes = {x.device_mesh for x in distributed.values()}
    if len(meshes) > 1:
        raise ValueError(f"vmoba::{op} was given DTensors on several meshes: {', '.join(map(str, meshes))}")
    return meshes.pop()


def _on_shards(cls: type, func: torch._ops.OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    """Run an operator on what this rank has, after redistribution, and say how its results are placed."""
    op = func._opname
    names, options = ARGUMENTS[op], kwargs or {}
    tensors: dict[str, Any] = dict(zip(names, args, strict=False))
    mesh = _mesh_of(op, tensors)
    # Whole groups: the key heads are shared out. A pool over all heads of a sample needs these in one place, and the
    # memory for what it selected has a bound for all of them together only.
    heads = tensors["k"].shape[HEADS] if options.get("pool", "overall") in HEAD_POOLS else 1
    deciding = [name for name in ("out", "q", "k", "v") if name in tensors]
    found = layout([tensors[name].placements for name in deciding], mesh.shape, tensors["k"].shape[BATCH], heads)

    def local(name: str) -> Tensor:
        x = tensors[name]
        if not isinstance(x, DTensor):
            return x
        placed = _placed(x, name, found)
        if list(x.placements) == placed:
            return x.to_local()
        held: Any = x.detach()  # below autograd torch 2.11 cannot redistribute what requires gradients
        return held.redistribute(placements=placed).to_local()

    with torch.no_grad():
        results = func(*(local(name) for name in names), *args[len(names) :], **options)
        if isinstance(results, Tensor):
            return DTensor.from_local(results, mesh, found, run_check=False)
        return tuple(DTensor.from_local(result, mesh, found, run_check=False) for result in results)


def register(library: torch.library.Library) -> None:
    """Tell the operators of ``library`` what to do with DTensors."""
    for name in ARGUMENTS:
        torch.library.register_torch_dispatch(f"vmoba::{name}", DTensor, _on_shards, lib=library)
