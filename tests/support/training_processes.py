"""Training on two processes: what each of them runs."""

from __future__ import annotations

import contextlib
import copy
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
import torch
import training
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import vmoba_compile
from vmoba_compile import VMoBAConfig

PROCESSES = 2
LAYERS = len(training.BLOCKS)
WIDE = 192  # a block of about a megabyte, the size of DDP's first bucket
Result = dict[str, Any]
Make = Callable[[nn.Module, torch.device], tuple[nn.Module, nn.Module]]


def model_and_videos(case: str, device: str = "cpu") -> tuple[training.VideoModel, list[Tensor]]:
    """The same on every process: the model of a case, and a batch for each of two steps."""
    torch.manual_seed(0)
    model = training.build(layers=LAYERS, width=WIDE if case.startswith("wide_") else 16)
    return model.to(device), [training.clip(2 * PROCESSES).to(device) for _ in range(2)]


def optimize(model: nn.Module, **options: Any) -> Any:
    return vmoba_compile.optimize(model, training.CONFIG, inner="aot_eager", **options)


def ddp(module: nn.Module, device: torch.device, **options: Any) -> DistributedDataParallel:
    return DistributedDataParallel(module, device_ids=[device] if device.type == "cuda" else None, **options)


def shard(*modules: nn.Module) -> None:
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for module in modules:
        fully_shard(module, mesh=mesh)


# Each takes the model and gives what is trained, and what was optimized.


def ddp_of_optimized(model, device):
    fast = optimize(model, fullgraph=True, expect=LAYERS)
    return ddp(fast, device), fast


def optimized_ddp(model, device):
    fast = optimize(ddp(model, device, bucket_cap_mb=1))
    return fast, fast


def optimized_ddp_expecting_four(model, device):
    fast = optimize(ddp(model, device, bucket_cap_mb=1), expect=LAYERS + 1)
    return fast, fast


def optimized_ddp_with_grid(model, device):
    fast = optimize(ddp(model, device, bucket_cap_mb=1), grid=training.GRID)
    return fast, fast


def optimized_ddp_uncut(model, device):
    torch._dynamo.config.optimize_ddp = False
    fast = optimize(ddp(model, device, bucket_cap_mb=1), expect=LAYERS)
    return fast, fast


def fsdp_whole(model, device):
    shard(model)
    fast = optimize(model, expect=LAYERS)
    return fast, fast


def fsdp_after(model, device):
    fast = optimize(model, fullgraph=True, expect=LAYERS)
    shard(fast)
    return fast, fast


def fsdp_blocks(model, device):
    shard(*model.blocks, model)
    fast = optimize(model)
    return fast, fast


def fsdp_optimized_blocks(model, device):
    """Each block is a model of its own, with the grid and the boxes of its layer."""
    for layer, block in enumerate(model.blocks):
        config = VMoBAConfig(min_tokens=0, threshold=training.CONFIG.threshold, blocks={"1d": training.BLOCKS[layer]})
        model.blocks[layer] = fast = vmoba_compile.optimize(
            block, config, grid=training.GRID, inner="aot_eager", fullgraph=True, expect=1
        )
        shard(fast)
    shard(model)
    return model, fast


CASES: dict[str, Make] = {
    "ddp": ddp_of_optimized,
    "ddp_no_sync": ddp_of_optimized,
    "one_bucket_optimized_ddp": optimized_ddp,
    "wide_optimized_ddp": optimized_ddp,
    "wide_optimized_ddp_expecting_four": optimized_ddp_expecting_four,
    "wide_optimized_ddp_with_grid": optimized_ddp_with_grid,
    "wide_optimized_ddp_uncut": optimized_ddp_uncut,
    "fsdp_whole": fsdp_whole,
    "fsdp_after": fsdp_after,
    "fsdp_blocks": fsdp_blocks,
    "fsdp_optimized_blocks": fsdp_optimized_blocks,
}


def train(case: str, rank: int, device: torch.device) -> Result:
    """Two steps of AdamW on this process's part of each batch; the gradients of the second."""
    model, videos = model_and_videos(case, str(device))
    if "expecting" in case:
        videos = videos[:1]
    trained, fast = CASES[case](copy.deepcopy(model), device)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=3e-3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for video in videos:
            optimizer.zero_grad()
            mine = video.chunk(PROCESSES)[rank]
            parts = mine.split(1) if case == "ddp_no_sync" else (mine,)
            for index, part in enumerate(parts):
                last = index == len(parts) - 1
                with contextlib.nullcontext() if last else trained.no_sync():
                    loss = training.loss_of(trained, part) / len(parts)
                    loss.backward()
            optimizer.step()
    whole = lambda x: x.full_tensor() if hasattr(x, "full_tensor") else x  # noqa: E731
    return {
        "gradients": {name: whole(x).cpu() for name, x in training.gradients(trained).items()},
        "parameters": {name: whole(x).cpu() for name, x in training.parameters(trained).items()},
        "warnings": [str(w.message) for w in caught if "vmoba" in str(w.message)],
        "counts": vmoba_compile.report(fast).counts,
    }


def work(rank: int, device: torch.device, cases: list[str]) -> dict[str, Result]:
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # the patch embedding would move the selection
    results: dict[str, Result] = {}
    for case in cases:
        torch._dynamo.reset()
        torch._dynamo.config.optimize_ddp = True
        try:
            results[case] = train(case, rank, device)
        except Exception as error:
            results[case] = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        dist.barrier()
    return results


def launch(folder: Path, cases: list[str], kind: str = "cpu", seconds: float = 300) -> list[dict[str, Result]]:
    """What every process found, by case."""
    return processes.run(work, PROCESSES, folder, cases, kind=kind, seconds=seconds)
