"""A function on several processes of one process group, and a launcher that gives up in time."""

from __future__ import annotations

import datetime
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist


def run(
    function: Callable[..., Any], processes: int, folder: Path, *args: Any, kind: str = "cpu", seconds: float = 120
) -> list[Any]:
    """What ``function(rank, device, *args)`` returns on each of ``processes``, in the order of ranks.

    ``function`` is of an importable module, such as one in ``tests/support``. ``folder`` is new and empty. The processes
    are a process group (gloo on CPU, NCCL on GPU ``rank``). Where one raises, the others are ended, and
    ``torch.multiprocessing.ProcessRaisedException`` holds the first one's traceback; after ``seconds`` all are, with
    AssertionError.
    """
    context = torch.multiprocessing.spawn(
        _work, (function, str(folder), processes, kind, args), nprocs=processes, join=False
    )
    assert context is not None
    deadline = time.monotonic() + seconds
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, f"the processes did not end within {seconds} s"
    except torch.multiprocessing.ProcessRaisedException as error:
        cause = min((torch.load(path) for path in folder.glob("failure-*.pt")), default=(0.0, error.msg))[1]
        raise torch.multiprocessing.ProcessRaisedException(cause, error.error_index, error.error_pid) from None
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(processes)]


def _work(
    rank: int, function: Callable[..., Any], folder: str, processes: int, kind: str, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=processes,
        timeout=datetime.timedelta(seconds=60),
    )
    try:
        torch.save(function(rank, device, *args), f"{folder}/{rank}.pt")
        dist.barrier()
    except Exception:
        # It makes the others fail soon after, in other words, and they may be seen first.
        torch.save((time.time(), f"process {rank}: {traceback.format_exc()}"), f"{folder}/failure-{rank}.pt")
        raise
    dist.destroy_process_group()
