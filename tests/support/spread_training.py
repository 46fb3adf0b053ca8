"""Three steps of examples/train_several_gpus.py as processes run them, and of one process with the plain model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh

import vmoba_compile

sys.path.append(str(Path(__file__).parents[2] / "examples"))

import train_several_gpus as several
import train_video_dit as training
from video_dit import VideoTransformer

STEPS = 3
WORDS = [
    "--grid",
    "4x4x4",
    "--width",
    "32",
    "--layers",
    "3",
    "--heads",
    "4",
    "--batch",
    "4",
    "--warmup",
    "1",
    "--steps",
    str(STEPS),
]


def made_loud(model: nn.Module) -> None:
    """Weights large enough for the attention to matter from the first step: by default a block begins as the identity."""
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, x in model.named_parameters():
            x.copy_(0.3 * torch.randn(x.shape, generator=random) + (2 if name.endswith("_norm.weight") else 0))


class Loud(several.SpreadTransformer):
    def __init__(self, *sizes: Any) -> None:
        super().__init__(*sizes)
        made_loud(self)


def arguments(words: list[str]) -> argparse.Namespace:
    args = several.arguments([*WORDS, *words])
    args.device = torch.device("cpu")
    return args


def whole(x: Tensor) -> Tensor:
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().clone()


def plain_name(name: str) -> str:
    return name.replace("_orig_mod.", "")


def watched(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    """Filled with the gradients of every step, just before they are used."""
    seen: list[dict[str, Tensor]] = []

    def look(*_: Any) -> None:
        seen.append({plain_name(name): whole(p.grad) for name, p in model.named_parameters()})

    optimizer.register_step_pre_hook(look)
    return seen


def train(
    rank: int, device: torch.device, words: list[str], kept: str = "", taken: str = "", through: int = STEPS
) -> dict[str, Any]:
    """Losses and gradients of the steps up to ``through``; a checkpoint is taken up from ``taken``, one left in ``kept``."""
    torch._dynamo.reset()
    several.SpreadTransformer = Loud
    args = arguments(words)
    model = several.build(args)
    optimizer = several.make_optimizer(model)
    first = several.load(model, optimizer, Path(taken)) if taken else 0
    gradients = watched(model, optimizer)
    losses = [several.train_step(model, optimizer, step, args) for step in range(first, through)]
    if kept:
        several.save(model, optimizer, through, Path(kept))
    shards = {type(p).__name__ for p in model.parameters()}
    return {"losses": losses, "gradients": gradients, "shards": shards}


def train_whole(rank: int, device: torch.device, kept: str) -> dict[str, Any]:
    """The same, with the model sharded and optimized as a whole."""
    torch._dynamo.reset()
    args, model = arguments([]), VideoTransformer((4, 4, 4), 32, 3, 4)
    made_loud(model)
    fully_shard(model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    config = training.attention_config("vmoba", args.grid, args.threshold)
    fast = vmoba_compile.optimize(model, config, inner="aot_eager", expect=3)
    optimizer = several.make_optimizer(fast)
    gradients = watched(fast, optimizer)
    losses = [several.train_step(fast, optimizer, step, args) for step in range(STEPS)]
    several.save(fast, optimizer, STEPS, Path(kept))
    return {"losses": losses, "gradients": gradients, "shards": {type(p).__name__ for p in model.parameters()}}


def many(rank: int, device: torch.device, cases: list[list[str]]) -> list[dict[str, Any]]:
    return [train(rank, device, words) for words in cases]


def alone(attention: str = "vmoba") -> dict[str, Any]:
    """The whole batch on one process, with no sharding of anything."""
    torch._dynamo.reset()
    args, model = arguments([]), VideoTransformer((4, 4, 4), 32, 3, 4)
    made_loud(model)
    config = training.attention_config(attention, args.grid, args.threshold)
    fast = model if config is None else vmoba_compile.optimize(model, config, inner="aot_eager", expect=3)
    optimizer = several.make_optimizer(model)
    gradients = watched(model, optimizer)
    losses = [training.train_step(fast, optimizer, step, args) for step in range(STEPS)]
    return {"losses": losses, "gradients": gradients, "weights": {k: whole(p) for k, p in model.named_parameters()}}
