"""The operators on DTensors, as processes run them, against the same operators on whole tensors."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import Placement

import vmoba_compile
from vmoba_compile import VMoBAConfig

GRID = (4, 4, 4)
POOLS = ("head_global", "query_head", "block", "overall")
TOKENS = 4 * 4 * 4 + 3
Placed = tuple[Placement, ...]


def tensors(batch: int = 2, heads: int = 8, key_heads: int = 4) -> tuple[list[Tensor], Tensor, Tensor]:
    """q, k and v; the gradient of the output; and a mask over keys."""
    torch.manual_seed(0)
    inputs = [torch.randn(batch, count, TOKENS, 8) for count in (heads, key_heads, key_heads)]
    return inputs, torch.randn(batch, heads, TOKENS, 8), torch.rand(batch, TOKENS) > 0.2


def settings(pool: str, granularity: str = "token", mode: str = "threshold") -> dict[str, Any]:
    rule = {"mode": "topk", "topk": 3} if mode == "topk" else {"threshold": 0.3}
    return {"block": (2, 2, 2), "prefix": 1, "suffix": 2, "pool": pool, "granularity": granularity, **rule}


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def compare(mesh_shape: tuple[int, ...], placements: list[Placed], options: dict[str, Any], sizes: dict[str, int],
            masked: bool) -> list[dict[str, Any]]:  # fmt: skip
    """For each way to place q, k and v: whether the selection is the same, errors, and where the output lies."""
    mesh = init_device_mesh("cpu", mesh_shape)
    inputs, gradient, mask = tensors(**sizes)
    whole = [x.clone().requires_grad_() for x in inputs]
    key_mask = mask if masked else None
    wanted = vmoba_compile.attention(*whole, GRID, key_mask=key_mask, **options)
    wanted.backward(gradient)
    chosen = vmoba_compile.select(*whole[:2], GRID, key_mask=key_mask, **options)
    everywhere = [Replicate()] * mesh.ndim
    found = []
    for placed in placements:
        parts = [distribute_tensor(x, mesh, placed).requires_grad_() for x in inputs]
        part_mask = distribute_tensor(mask, mesh, everywhere) if masked else None
        selection = vmoba_compile.select(*parts[:2], GRID, key_mask=part_mask, **options)
        out = vmoba_compile.attention(*parts, GRID, key_mask=part_mask, **options)
        # As the next layer has it: the gradient need not lie as the output does.
        out.backward(distribute_tensor(gradient, mesh, placed))
        pairs = [(out, wanted), *((x.grad, y.grad) for x, y in zip(parts, whole, strict=True))]
        found.append({
            "same_selection": torch.equal(selection.mask(), chosen.mask()),
            "same_density": torch.equal(selection.density(), chosen.density()),
            "errors": [error(x.full_tensor(), y) for x, y in pairs],
            "placements": out.placements,
            "computed": tuple(out.to_local().shape),
        })  # fmt: skip
    return found


def many(
    rank: int, device: torch.device, mesh_shape: tuple[int, ...], cases: list[tuple[Any, ...]]
) -> list[list[dict[str, Any]]]:
    return [compare(mesh_shape, *case) for case in cases]


def pools_in_turn(rank: int, device: torch.device) -> list[Placed]:
    """Placements of the output, of calls that differ in their pool alone."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    inputs = [distribute_tensor(x, mesh, [Shard(1)]) for x in tensors()[0]]
    return [vmoba_compile.attention(*inputs, GRID, **settings(pool)).placements for pool in (*POOLS, "head_global")]


def misused(rank: int, device: torch.device) -> list[str]:
    """What is said where DTensors and plain tensors are mixed."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    (q, k, v), _, mask = tensors()
    placed = [distribute_tensor(x, mesh, [Shard(1)]) for x in (q, k, v)]
    said = []
    for inputs, key_mask in (((placed[0], k, v), None), (placed, mask)):
        try:
            vmoba_compile.attention(*inputs, GRID, key_mask=key_mask, **settings("head_global"))
        except TypeError as caught:
            said.append(str(caught))
    return said


class Attention(nn.Module):
    """Projections and sparse attention. ``head_size`` and not the number of heads, of which a rank has some."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_size, self.direct = width // heads, True
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.direct:
            y = vmoba_compile.attention(q, k, v, GRID, block=(2, 2, 2), threshold=0.3)
        else:
            y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.patch = nn.Conv3d(3, width, (1, 2, 2), (1, 2, 2))
        self.blocks = nn.ModuleList(Attention(width, heads) for _ in range(2))

    def calls_sparse(self, direct: bool) -> None:
        for block in self.blocks:
            block.direct = direct

    def forward(self, video: Tensor) -> Tensor:
        x = self.patch(video).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = x + block(x)
        return x


BLOCKS = {name: (2, 2, 2) for name in ("1d", "2d", "3d")}
CONFIG = VMoBAConfig(threshold=0.3, min_tokens=0, blocks=BLOCKS)


def tensor_parallel(rank: int, device: torch.device, way: str) -> dict[str, Any]:
    """One training step of a tensor-parallel model against the plain one: errors of the output and of each gradient.

    ``way``: the model calls the attention on "dtensors" or on "local" tensors, is "compiled" on top of the former, or
    calls dense attention on local tensors and is "optimized" ("left dense": against the dense model), told the grid.
    """
    torch.manual_seed(0)
    model = Model()
    with torch.no_grad():
        for block in model.blocks:
            block.q.weight *= 6
    model.calls_sparse(way != "left dense")
    twin = copy.deepcopy(model)
    twin.calls_sparse(way not in ("optimized", "left dense"))
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    video = torch.randn(2, 3, 4, 8, 8)
    column = ColwiseParallel(use_local_output=way not in ("dtensors", "compiled"))
    for block in twin.blocks:
        parallelize_module(block, mesh, {"q": column, "k": column, "v": column, "out": RowwiseParallel()})
    run: Any = twin
    if way in ("optimized", "left dense"):
        run = vmoba_compile.optimize(twin, CONFIG, grid=GRID, inner="aot_eager")
    if way == "compiled":
        run = torch.compile(twin, backend="aot_eager", fullgraph=True)
    wanted, found = model(video), run(video)
    for out in (wanted, found):
        out.square().mean().backward()
    grads = {
        name: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for name, p in twin.named_parameters()
    }
    # A bias of the keys moves all scores of a query alike: its gradient is rounding.
    errors = {name: error(grads[name], p.grad) for name, p in model.named_parameters() if not name.endswith("k.bias")}
    return {"out": error(found, wanted), **errors}
