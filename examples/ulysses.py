"""One long video over several GPUs: each has a part of the tokens, and for the attention all tokens of some heads.

    torchrun --standalone --nproc-per-node 2 examples/ulysses.py               # gloo without GPUs, else NCCL
    torchrun --standalone --nproc-per-node 4 examples/ulysses.py --grid 21x45x80 --width 1536 --heads 12 --balance

Sparse attention needs whole sequences, since a head's queries compete for boxes: shard heads, never tokens. The exchange
(DeepSpeed Ulysses, arXiv 2309.14509) is an all-to-all before the attention and one after it, here by DTensor. Compares a
training step with that of one process, and prints errors and times.
"""

import argparse
import gc
import os
import time

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DeviceMesh, DTensor, Shard, init_device_mesh

import vmoba_compile
from vmoba_compile import balance
from vmoba_compile.__main__ import parse_grid


def exchange(x: Tensor, mesh: DeviceMesh | None, given: int, wanted: int) -> Tensor:
    """This rank's share of dimension ``given``, for its share of dimension ``wanted``; gradients go the other way."""
    if mesh is None:
        return x
    return DTensor.from_local(x, mesh, [Shard(given)]).redistribute(placements=[Shard(wanted)]).to_local()


class Block(nn.Module):
    def __init__(self, width: int, heads: int, grid: tuple[int, int, int], block: tuple[int, int, int]) -> None:
        super().__init__()
        self.heads, self.grid, self.block = heads, grid, block
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x: Tensor, mesh: DeviceMesh | None) -> Tensor:  # [B, this rank's tokens, width]
        qkv = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = exchange(qkv, mesh, 1, 3).permute(2, 0, 3, 1, 4).unbind(0)  # [B, this rank's heads, tokens, D]
        if not torch.is_grad_enabled():
            self.density = vmoba_compile.select(q, k, self.grid, block=self.block).density()[0]
        y = vmoba_compile.attention(q, k, v, self.grid, block=self.block).transpose(1, 2)
        x = x + self.out(exchange(y, mesh, 2, 1).flatten(2))
        return x + self.mlp(x)


class VideoTransformer(nn.Module):
    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        blocks = [(3, None, None), (None, 3, 4), (3, 3, 4)]  # along time, along space, along both, and so on
        sizes = [tuple(size or extent for size, extent in zip(block, args.grid, strict=True)) for block in blocks]
        self.patch = nn.Conv3d(3, args.width, (1, 2, 2), (1, 2, 2))
        self.blocks = nn.ModuleList(Block(args.width, args.heads, args.grid, sizes[i % 3]) for i in range(args.layers))
        self.unpatch = nn.Linear(args.width, 3 * 2 * 2)

    def forward(self, video: Tensor, mesh: DeviceMesh | None = None) -> Tensor:
        x = self.patch(video).flatten(2).transpose(1, 2)
        if mesh is not None:
            x = x.chunk(mesh.size(), dim=1)[mesh.get_local_rank()]
        for block in self.blocks:
            x = block(x, mesh)
        return self.unpatch(x)


def step(model: VideoTransformer, video: Tensor, mesh: DeviceMesh | None) -> tuple[list[Tensor], float]:
    """The output's squared mean and its gradients, of all ranks together, and seconds."""
    if video.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    loss = model(video, mesh).square().mean()
    found = [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]
    if mesh is not None:  # each rank's mean is over its tokens, as many as any other's
        for x in found:
            dist.all_reduce(x, dist.ReduceOp.SUM)
            x /= mesh.size()
    if video.is_cuda:
        torch.cuda.synchronize()
    return found, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=parse_grid, default=(6, 6, 8), metavar="TxHxW", help="tokens")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument(
        "--balance", action="store_true", help="put heads in an order that gives all ranks as much to do"
    )
    args = parser.parse_args()
    if "RANK" not in os.environ:
        raise SystemExit("start it with torchrun: torchrun --standalone --nproc-per-node 2 examples/ulysses.py")
    kind, local = ("cuda" if torch.cuda.is_available() else "cpu"), int(os.environ["LOCAL_RANK"])
    ranks, tokens = int(os.environ["WORLD_SIZE"]), args.grid[0] * args.grid[1] * args.grid[2]
    if tokens % ranks or args.heads % ranks:
        raise SystemExit(f"{tokens} tokens and {args.heads} heads must both be multiples of the {ranks} processes")
    if kind == "cuda":
        torch.cuda.set_device(local)
        torch.backends.cudnn.allow_tf32 = False  # the patch embedding would move the selection
    mesh = init_device_mesh(kind, (ranks,))
    torch.manual_seed(0)  # the same model and video on every rank
    model = VideoTransformer(args).to(kind)
    with torch.no_grad():
        for block in model.blocks:  # heads that look sharply, and heads that look everywhere
            sharpness = torch.linspace(1, 6, args.heads, device=kind).repeat_interleave(args.width // args.heads)
            block.qkv.weight[: args.width].mul_(sharpness[:, None])
    video = torch.randn(1, 3, args.grid[0], 2 * args.grid[1], 2 * args.grid[2], device=kind)

    with torch.no_grad():
        model(video)
    density = torch.stack([block.density for block in model.blocks]).double().cpu()
    before = balance.imbalance(density, ranks)
    if args.balance:
        order = balance.head_order(density, ranks)
        for block, heads in zip(model.blocks, order, strict=True):
            balance.permute_heads(heads, rows=[block.qkv], columns=[block.out], head_size=args.width // args.heads)
        density = density.gather(1, order)
    (wanted, _), (found, _) = step(model, video, None), step(model, video, mesh)
    errors = [float((x - y).norm() / y.norm()) for x, y in zip(found, wanted, strict=True)]
    times = {name: min(step(model, video, use)[1] for _ in range(3)) for name, use in (("one", None), ("all", mesh))}
    if mesh.get_rank() == 0:
        print(f"{ranks} processes ({kind}), {tokens} tokens, density {float(density.mean()):.3f}")
        print(f"loss {float(found[0]):.6f}, error {errors[0]:.1e}; largest error of a gradient {max(errors[1:]):.1e}")
        now = balance.imbalance(density, ranks)
        print(f"imbalance of the heads {float(before.mean()):.3f}, as run {float(now.mean()):.3f}")
        print(f"a step: one process {times['one'] * 1e3:.1f} ms, {ranks} processes {times['all'] * 1e3:.1f} ms")
    if max(errors) > 1e-4:
        raise SystemExit(f"rank {mesh.get_rank()}: the results differ by {max(errors):.1e}")
    dist.barrier()


if __name__ == "__main__":
    main()
    gc.collect()  # tensors of a finished exchange that outlive the group may abort the process at its end
    dist.destroy_process_group()
