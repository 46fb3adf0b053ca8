"""One process of benchmarks/several_gpus.py: its part of a model's forward under diffusers' Ulysses, dense or sparse.

Every process has the whole model and, between two attentions, a part of the tokens; for an attention it has all tokens of a
part of the heads. What the processes measure is put together, and the first one writes it.
"""

from __future__ import annotations

import datetime
import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.append(str(Path(__file__).parent))  # python -P leaves it off

import torch
from attention_measure import in_turns, reason, synchronize
from end_to_end_measure import GROUPS, Settings, first, group_of, kernel_times, preferring_cudnn, sampled
from torch import distributed as dist
from torch import nn

import vmoba_compile
from vmoba_compile import balance
from vmoba_compile.zoo import Inputs, preset

COMMUNICATION = re.compile(r"nccl|gloo|c10d", re.IGNORECASE)
Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What all runs share."""

    model: str
    grid: tuple[int, int, int]
    settings: Settings

    def build(self) -> tuple[nn.Module, Inputs]:
        """The same weights and inputs on every process."""
        torch.manual_seed(0)
        heads = {"num_attention_heads": 4} if self.settings.tiny else {}
        dtype = torch.bfloat16 if self.settings.on_gpu else torch.float32
        model, inputs = preset(self.model).build(
            grid=self.grid,
            device=self.settings.device,
            dtype=dtype,
            as_loaded=True,
            num_layers=self.settings.layers,
            **heads,
        )
        return model.eval().requires_grad_(False), inputs | {"return_dict": False}  # as pipelines: for diffusers' hooks


def spread(model: nn.Module, ranks: int) -> None:
    """diffusers' Ulysses over all processes."""
    if ranks > 1:
        from diffusers import ContextParallelConfig

        # diffusers takes a rank modulo the accelerators, of which a CPU has none.
        count = max(1, torch.accelerator.device_count())
        with mock.patch.object(torch.accelerator, "device_count", return_value=count):
            model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=ranks))


def compiled(model: nn.Module, side: str, settings: Settings) -> nn.Module:
    if side == "sparse":
        return vmoba_compile.optimize(model, settings.config, inner=settings.compiler, expect=settings.layers)
    return torch.compile(model, backend=settings.compiler, dynamic=False)


def grouped(times: dict[str, float]) -> dict[str, float]:
    """Milliseconds of each group of kernels, communication apart from the rest."""
    found = dict.fromkeys((*GROUPS, "communication"), 0.0)
    for kernel, spent in times.items():
        found["communication" if COMMUNICATION.search(kernel) else group_of(kernel)] += spent
    return found


def timed(run: Callable[[], object], device: str, longest_s: float = 6.0) -> list[float]:
    """Milliseconds of some calls that all processes begin together."""
    run()
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    spent = [time.perf_counter() - start]
    dist.broadcast_object_list(spent)  # as many calls on all
    count = max(3, min(10, int(longest_s / spent[0]))) if device == "cuda" else 3
    dist.barrier()
    return in_turns({"forward": run}, device, count)["forward"]


@torch.no_grad()
def measure(plan: Plan, side: str, ranks: int) -> Row:
    """What this process sees of one side: times of a forward, kernels by group, memory, and some of the output."""
    settings = plan.settings
    model, inputs = plan.build()
    spread(model, ranks)
    row: Row = {"parameters": sum(p.numel() for p in model.parameters())}
    with preferring_cudnn(settings.on_gpu):
        fast = compiled(model, side, settings)
        start = time.perf_counter()
        row["output"] = sampled(first(fast(**inputs)))
        synchronize(settings.device)
        row["first_s"] = time.perf_counter() - start
        if settings.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        row["all_ms"] = timed(lambda: fast(**inputs), settings.device)
        row["ms"] = statistics.median(row["all_ms"])
        row["peak_bytes"] = torch.cuda.max_memory_allocated() if settings.on_gpu else None
        kernels = kernel_times(lambda: fast(**inputs), settings.device)
    row["groups_ms"] = grouped(kernels)
    row["attention_kernels"] = [name for name in kernels if "attention" in group_of(name)]
    if side == "sparse" and ranks == 1:  # of the heads, wherever they will be
        del fast
        torch.compiler.reset()
        found = vmoba_compile.measure(model, config=settings.config, queries=1, **inputs)
        row["densities"] = balance.densities(found).tolist()
    return row


def together(rows: list[Row]) -> Row:
    """One row of all processes': the slowest one's time, and means of the kernels' times.

    A process that waits for another does so in a kernel of communication. The least time in these is that of the process
    that comes last: ``communication_ms``. What the others have more, on the mean, is ``waiting_ms``.
    """
    groups = {name: statistics.fmean(row["groups_ms"][name] for row in rows) for name in rows[0]["groups_ms"]}
    spent = [row["groups_ms"]["communication"] for row in rows]
    peaks = [row["peak_bytes"] for row in rows if row["peak_bytes"] is not None]
    return rows[0] | {
        "ms": max(row["ms"] for row in rows), "rank_ms": [row["ms"] for row in rows], "groups_ms": groups,
        "communication_ms": min(spent), "waiting_ms": statistics.fmean(spent) - min(spent),
        "kernels_ms": sum(groups.values()), "peak_bytes": max(peaks, default=None),
    }  # fmt: skip


def begin(rank: int, body: Callable[..., None], folder: str, *args: Any) -> None:
    """What each process runs. A failure is written down at once: it makes the others fail soon after, in other words."""
    try:
        body(rank, folder, *args)
    except Exception as error:
        (Path(folder) / f"error-{rank}.json").write_text(json.dumps([time.time(), f"process {rank}: {reason(error)}"]))
        raise


def first_error(folder: Path) -> str | None:
    found = sorted(json.loads(path.read_text()) for path in folder.glob("error-*.json"))
    return found[0][1] if found else None


def work(rank: int, folder: str, ranks: int, plan: Plan, side: str) -> None:
    """One process's part of a side on so many; the first one writes ``row.json``."""
    torch.set_num_threads(1)  # each its own; tensors on a CPU are tiny here
    if plan.settings.on_gpu:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if plan.settings.on_gpu else "gloo", init_method=f"file://{folder}/rendezvous", rank=rank,
        world_size=ranks, timeout=datetime.timedelta(minutes=10),
        device_id=torch.device("cuda", rank) if plan.settings.on_gpu else None,
    )  # fmt: skip
    rows: list[Any] = [None] * ranks
    dist.all_gather_object(rows, measure(plan, side, ranks))
    if rank == 0:
        (Path(folder) / "row.json").write_text(json.dumps(together(rows)))
    dist.barrier()
    dist.destroy_process_group()
