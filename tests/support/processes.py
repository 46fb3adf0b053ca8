"""A function on several processes of one process group, with a launcher that gives up in time; scripts as processes.

All are forked from a server that has imported the large libraries, which would take each of them some seconds.
"""

from __future__ import annotations

import datetime
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import runpy
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import torch
from torch import distributed as dist

# Not vmoba_compile, of which the server may see the sources in place of the installed package.
LIBRARIES = [
    "torch", "torch._inductor.compile_fx", "torch.distributed.fsdp", "triton", "matplotlib.pyplot",
    "diffusers.models.transformers.transformer_wan",
]  # fmt: skip
SERVER = "forkserver"
multiprocessing.set_forkserver_preload(LIBRARIES)


def run(
    function: Callable[..., Any], processes: int, folder: Path, *args: Any, kind: str = "cpu", seconds: float = 120
) -> list[Any]:
    """What ``function(rank, device, *args)`` returns on each of ``processes``, in the order of ranks.

    ``function`` is of an importable module, such as one in ``tests/support``. ``folder`` is new and empty. The processes
    are a process group (gloo on CPU, NCCL on GPU ``rank``). Where one raises, the others are ended, and
    ``torch.multiprocessing.ProcessRaisedException`` holds the first one's traceback; after ``seconds`` all are, with
    AssertionError.
    """
    context = torch.multiprocessing.start_processes(
        _work, (function, str(folder), processes, kind, args), nprocs=processes, join=False, start_method=SERVER
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


def run_script(script: Path, *words: Any, processes: int = 0, seconds: float = 300) -> CompletedProcess[str]:
    """``python -P script words``, as ``subprocess.run`` with text captured; TimeoutError after ``seconds``.

    With ``processes``, as many, as ``torchrun`` would start them; one that fails ends all. Their output is joined.
    """
    command = [str(script), *map(str, words)]
    environments = [dict(os.environ)]
    if processes:
        number = str(processes)
        group = {"WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
        group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        environments = [os.environ | group | {"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(processes)]
    with tempfile.TemporaryDirectory() as folder:
        files = [[Path(folder, f"{name}-{rank}") for rank in range(len(environments))] for name in ("out", "err")]
        started = [
            multiprocessing.get_context(SERVER).Process(target=_run_script, args=(command, paths, env, os.getcwd()))
            for env, *paths in zip(environments, *files, strict=True)
        ]
        for process in started:
            process.start()
        deadline = time.monotonic() + seconds
        while (late := _are_running(started)) and time.monotonic() < deadline:
            multiprocessing.connection.wait([p.sentinel for p in started if p.is_alive()], timeout=1)
        failed = next((process.exitcode for process in started if process.exitcode), 0)
        for process in started:
            process.kill()
            process.join()
        said = ["".join(path.read_text() for path in paths if path.exists()) for paths in files]
    if late:
        raise TimeoutError(f"{script.name} did not end within {seconds} s: {said[1]}")
    return CompletedProcess(command, failed, *said)


def _are_running(started: list[Any]) -> bool:
    """Some still run, and none has failed."""
    return any(process.is_alive() for process in started) and not any(process.exitcode for process in started)


def _free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def _run_script(command: list[str], files: list[Path], environment: dict[str, str], folder: str) -> None:
    for stream, file in enumerate(files, 1):
        with file.open("w") as opened:
            os.dup2(opened.fileno(), stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = command
    sys.path[:] = [place for place in sys.path if place and not place.startswith(str(Path(__file__).parents[1]))]
    runpy.run_path(command[0], run_name="__main__")
