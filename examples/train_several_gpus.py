"""The model of train_video_dit.py trained on several GPUs: FSDP2, activation checkpointing, and Ulysses for long videos.

    torchrun --standalone --nproc-per-node 2 examples/train_several_gpus.py                   # gloo without GPUs
    torchrun --standalone --nproc-per-node 4 examples/train_several_gpus.py --ulysses 2       # 2 videos x 2 parts of each
    torchrun --standalone --nproc-per-node 8 examples/train_several_gpus.py --resume --steps 40 --batch 8

On 8 GPUs: --grid 24x32x48 --width 768 --layers 8 --heads 8 --batch 8 --steps 1000 --ulysses 2

Parameters, gradients and the optimizer's state are sharded over all processes, block by block. Each block is optimized by
itself, since FSDP's hooks cut a model into its blocks; the grid, which a block does not show, is given. With --ulysses N, N
processes share each video: a part of the tokens each, and for the attention, which the blocks then call themselves, all
tokens of a part of the heads. Losses and gradients are those of one process with the same --batch. Checkpoints are
torch.distributed.checkpoint's, with the names of the plain model.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))  # python -P leaves it off

import torch
import torch.distributed.checkpoint as dcp
import train_video_dit as training
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DeviceMesh, DTensor, Partial, Replicate, Shard, init_device_mesh
from torch.utils.checkpoint import checkpoint
from video_dit import Triple, VideoTransformer

import vmoba_compile
from vmoba_compile import VMoBAConfig
from vmoba_compile.__main__ import parse_grid

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class SpreadTransformer(VideoTransformer):
    """The same model with activation checkpointing, its tokens spread over the ranks of ``mesh`` if there is one."""

    mesh: DeviceMesh | None = None
    checkpointing = True

    def forward(self, video: Tensor, time: Tensor) -> Tensor:
        return super().forward(video, time).clone()  # FSDP warns of views

    def run_blocks(self, x: Tensor, condition: Tensor) -> Tensor:
        if self.mesh is not None:
            x = x.chunk(self.mesh.size(), dim=1)[self.mesh.get_local_rank()]
        for block in self.blocks:
            x = checkpoint(block, x, condition, use_reentrant=False) if self.checkpointing else block(x, condition)
        if self.mesh is None:
            return x
        whole = DTensor.from_local(x, self.mesh, [Shard(1)]).redistribute(placements=[Replicate()])
        # All ranks go on to the same loss. Its gradient, summed over them, makes the mean that FSDP takes over ranks
        # their sum: each has the gradients of its own tokens.
        return whole.to_local(grad_placements=[Partial()])


def exchanged(mesh: DeviceMesh, attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Ulysses: this rank's tokens of all heads for all tokens of its heads, attention, and back. [B, H, S, D] each."""

    def swap(x: Tensor, given: int, wanted: int) -> Tensor:
        return DTensor.from_local(x, mesh, [Shard(given)]).redistribute(placements=[Shard(wanted)]).to_local()

    return swap(attend(*(swap(x, 2, 1) for x in (q, k, v))), 1, 2)


def sizes_of(config: VMoBAConfig, layer: int, grid: Triple) -> Triple:
    """A box of this layer in tokens."""
    block = config.block_for(layer, grid)[1]
    frames, rows, columns = (extent if size is None else size for size, extent in zip(block, grid, strict=True))
    return (frames, rows, columns)


def sparse_attend(config: VMoBAConfig, layer: int, grid: Triple) -> Attend:
    return partial(
        vmoba_compile.attention, grid=grid, block=sizes_of(config, layer, grid), pool=config.pool, mode=config.mode,
        threshold=config.threshold, topk=config.topk,
    )  # fmt: skip


def compiled(block: nn.Module, config: VMoBAConfig | None, layer: int, args: argparse.Namespace) -> nn.Module:
    """A block by itself: its grid and its layer's boxes are not to be seen in it. Rewritten, or as it is without config."""
    on_gpu = args.device.type == "cuda"
    if config is None:
        return torch.compile(block, options=training.SOUND) if on_gpu else torch.compile(block, backend=args.inner)
    own = VMoBAConfig.from_dict(config.to_dict() | {"blocks": {"1d": sizes_of(config, layer, args.grid)}})
    inner = "inductor" if on_gpu else args.inner
    return vmoba_compile.optimize(block, own, grid=args.grid, inner=inner, expect=1)


def build(args: argparse.Namespace) -> SpreadTransformer:
    """The model of this process: its part of the parameters, and its part of the tokens if videos are shared."""
    ranks = dist.get_world_size()
    torch.manual_seed(args.seed)  # the same weights everywhere, then shards of them
    model = SpreadTransformer(args.grid, args.width, args.layers, args.heads).to(args.device)
    model.checkpointing = not args.no_checkpointing
    config = training.attention_config(args.attention, args.grid, args.threshold)
    if args.ulysses > 1:
        mesh = init_device_mesh(
            args.device.type, (ranks // args.ulysses, args.ulysses), mesh_dim_names=("data", "ulysses")
        )
        model.mesh = mesh["ulysses"]
    for layer, block in enumerate(model.blocks):
        if model.mesh is not None:
            attend = block.attend if config is None else sparse_attend(config, layer, args.grid)
            block.attend = partial(exchanged, model.mesh, attend)
        model.blocks[layer] = compiled(block, None if model.mesh else config, layer, args)
    everyone = init_device_mesh(args.device.type, (ranks,))
    for part in (*model.blocks, model):
        fully_shard(part, mesh=everyone)
    return model


def batch(step: int, args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """This process's videos of a step, the same ones for those that share them."""
    group, groups = dist.get_rank() // args.ulysses, dist.get_world_size() // args.ulysses
    each = args.batch // groups
    start = step * args.batch + group * each
    return training.examples(range(start, start + each), args)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, args: argparse.Namespace) -> float:
    """The loss over all processes' videos."""
    for group in optimizer.param_groups:
        group["lr"] = training.learning_rate(step, args)
    loss = training.flow_loss(model, *batch(step, args))
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    total = loss.detach()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99))


def save(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, folder: Path) -> None:
    weights, state = get_state_dict(model, optimizer)  # names of the plain model, without _orig_mod
    dcp.save({"model": weights, "optimizer": state, "step": step}, checkpoint_id=folder)


def load(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> int:
    """Into any number of processes; returns the steps done."""
    weights, state = get_state_dict(model, optimizer)
    found: dict[str, Any] = {"model": weights, "optimizer": state, "step": 0}
    dcp.load(found, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=found["model"], optim_state_dict=found["optimizer"])
    return found["step"]


def train(args: argparse.Namespace) -> None:
    model = build(args)
    optimizer = make_optimizer(model)
    checkpoints = sorted(args.out.glob("checkpoint-*")) if args.resume else []
    if args.resume and not checkpoints:
        raise SystemExit(f"--resume finds no checkpoint in {args.out}")
    first = load(model, optimizer, checkpoints[-1]) if checkpoints else 0
    if first >= args.steps:
        raise SystemExit(f"{args.out} is at step {first} already; give more --steps")
    told = dist.get_rank() == 0
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "log.jsonl").open("a" if args.resume else "w") if told else open(os.devnull, "w") as log:
        for step in range(first, args.steps):
            start = time.perf_counter()
            loss = train_step(model, optimizer, step, args)
            record = {"step": step + 1, "loss": loss, "seconds": time.perf_counter() - start}
            print(json.dumps(record), file=log, flush=True)
            if told:
                print(f"step {step + 1}: loss {loss:.4f}, {1e3 * record['seconds']:.0f} ms", flush=True)
            if step + 1 == args.steps or (args.save and (step + 1) % args.save == 0):
                save(model, optimizer, step + 1, args.out / f"checkpoint-{step + 1:08d}")
    if told:
        shared = f", {args.ulysses} to a video" if args.ulysses > 1 else ""
        print(f"{args.attention} on {dist.get_world_size()} processes{shared}: {args.steps} steps, saved in {args.out}")


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--attention", choices=("dense", "vmoba", "moba"), default="vmoba")
    add("--ulysses", type=int, default=1, metavar="N", help="processes that share each video")
    add("--save", type=int, default=0, metavar="N", help="save every N steps, not at the end alone")
    add("--threshold", type=float, default=0.25, help="share of the gate weight that vmoba's boxes hold")
    add("--grid", type=parse_grid, default=(4, 8, 8), metavar="TxHxW", help="tokens; the video is T x 2H x 2W pixels")
    add("--width", type=int, default=64, help="channels of the transformer")
    add("--layers", type=int, default=3, help="blocks of the transformer")
    add("--heads", type=int, default=4, help="heads of each attention")
    add("--batch", type=int, default=4, help="clips a step, of all processes together")
    add("--steps", type=int, default=20, help="steps to train for, those before --resume included")
    add("--lr", type=float, help="learning rate after the warm-up (8e-3 / sqrt(width))")
    add("--warmup", type=int, default=30, help="steps of linear warm-up")
    add("--cooldown", type=int, default=0, help="last steps, over which the learning rate falls to zero")
    add("--seed", type=int, default=0, help="of the initial weights")
    add("--no-checkpointing", action="store_true", help="keep all activations for the backward pass")
    add("--inner", default="aot_eager", help="compiler of the blocks without a GPU")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    add("--out", type=Path, default=Path("runs/several_gpus"), help="folder for what is written")
    args = parser.parse_args(words)
    args.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.lr = args.lr or 8e-3 / args.width**0.5
    return args


def check(args: argparse.Namespace, ranks: int) -> None:
    """SystemExit unless everything can be shared out evenly."""
    if args.ulysses < 1 or ranks % args.ulysses:
        raise SystemExit(f"--ulysses {args.ulysses} does not divide the {ranks} processes")
    for name, count, by in (
        ("--batch", args.batch, ranks // args.ulysses),
        ("--heads", args.heads, args.ulysses),
        ("tokens of --grid", math.prod(args.grid), args.ulysses),
        ("--width", args.width, args.heads),
    ):
        if count % by:
            raise SystemExit(f"{name} {count} is not a multiple of {by}")


def main() -> None:
    args = arguments()
    if "RANK" not in os.environ:
        raise SystemExit(
            "start it with torchrun: torchrun --standalone --nproc-per-node 2 examples/train_several_gpus.py"
        )
    check(args, int(os.environ["WORLD_SIZE"]))
    if args.device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
    train(args)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
