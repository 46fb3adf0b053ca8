"""Work of which one process fails while the others wait for it."""

from __future__ import annotations

import datetime
from typing import Any

import torch
from torch import distributed as dist


def in_a_group(rank: int, *_: Any) -> None:
    """Under ``processes.run``."""
    if rank == dist.get_world_size() - 1:
        raise ValueError("out of luck\nin two lines")
    dist.all_reduce(torch.ones(1))


def by_itself(rank: int, folder: str, ranks: int, *_: Any) -> None:
    """In the place of the benchmark's ``work``."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks,
        timeout=datetime.timedelta(seconds=300),
    )  # fmt: skip
    in_a_group(rank)
