"""Work on several gloo processes that cannot hang a test: what each returned, or the cause of the first failure."""

from __future__ import annotations

import datetime
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist


def run(work: Callable[..., Any], count: int, folder: Path, *args: Any, seconds: float = 90) -> list[Any]:
    """``work(rank, *args)`` on ``count`` processes of one gloo group; its results by rank.

    ``work`` is a function of a module that the processes can import (``tests/support``). One that raises ends all, and
    its traceback is the RuntimeError; all are killed after ``seconds``.
    """
    processes = torch.multiprocessing.spawn(_begin, (work, count, str(folder), args), nprocs=count, join=False)
    deadline = time.monotonic() + seconds
    try:
        while not processes.join(timeout=1):
            if time.monotonic() > deadline:
                raise TimeoutError(f"the processes did not end within {seconds} s")
    except torch.multiprocessing.ProcessRaisedException as error:
        failures = sorted(torch.load(path, weights_only=False) for path in folder.glob("failure-*.pt"))
        raise RuntimeError(failures[0][1] if failures else str(error)) from None
    finally:
        for process in processes.processes:
            if process.is_alive():
                process.kill()
    return [torch.load(folder / f"result-{rank}.pt", weights_only=False) for rank in range(count)]


def _begin(rank: int, work: Callable[..., Any], count: int, folder: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=count,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    try:
        torch.save(work(rank, *args), f"{folder}/result-{rank}.pt")
        dist.barrier()
    except Exception:
        # It makes the others fail soon after, in other words: the first is the cause.
        torch.save((time.time(), f"process {rank}: {traceback.format_exc()}"), f"{folder}/failure-{rank}.pt")
        raise
    dist.destroy_process_group()
