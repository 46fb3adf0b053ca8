"""What ``bench`` measures with: one attention's tensors, its dense and sparse runs, and the clocks.

Runs are taken in turns, so that all see the same clocks; on a GPU as CUDA graphs, so that the times are the device's
alone. Inputs are normal: without the coherence of a video, which is the worst case for the selection.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from .blocks import SCHEMES, default_block
from .kernels import attention, select
from .kernels.partition import Triple
from .profit import MODES

BUDGET_MS = 2000  # of the turns at one size together
LEAST_TURNS, MOST_TURNS = 5, 30
WARM_UPS = 2  # turns

Run = Callable[[], object]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Timer = Callable[[Mapping[str, Run], torch.device], dict[str, list[float]]]  # milliseconds of every run, turn by turn
Row = dict[str, Any]


@dataclass(frozen=True)
class Setup:
    """The attention that is measured, but for its grid: batch 1, no condition tokens, the default selection."""

    device: torch.device
    heads: int
    head_dim: int
    dtype: torch.dtype
    backward: bool = False

    @property
    def mode(self) -> str:
        return MODES[self.backward]

    def __str__(self) -> str:
        what = "forward and backward" if self.backward else "forward"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.heads} heads x {self.head_dim}, {dtype}, {what}"


def inputs(grid: Triple, setup: Setup) -> list[Tensor]:
    """q, k, v and the gradient of the output [1, H, S, D], views of [1, S, H, D] memory as models hand them over."""
    torch.manual_seed(0)
    shape = (1, math.prod(grid), setup.heads, setup.head_dim)
    count = 3 + setup.backward
    made = [torch.randn(shape, device=setup.device, dtype=setup.dtype).transpose(1, 2) for _ in range(count)]
    for x in made[:3]:
        x.requires_grad_(setup.backward)
    return made


def dense_attention(setup: Setup) -> tuple[Attend, str]:
    """cuDNN's attention on a GPU where it takes such tensors, PyTorch's choice elsewhere; and its name."""

    def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(q, k, v)

    def default(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v)

    if setup.device.type != "cuda":
        return default, "PyTorch's default SDPA"
    try:
        _call(cudnn, inputs((1, 16, 16), setup), setup)()
    except RuntimeError:
        return default, "PyTorch's default SDPA, since cuDNN's does not take these tensors"
    return cudnn, "cuDNN SDPA"


def measure(grid: Triple, setup: Setup, dense: Attend, timer: Timer) -> Row:
    """Median milliseconds of dense attention, and of selection and attention for the default block of each scheme.

    "ratio" is dense time over the mean sparse time of the schemes, the median of the turns; "low" and "high" are the
    quartiles. "turn_ms" is what a turn of all runs takes.
    """
    _release(setup.device)
    tensors = inputs(grid, setup)
    runs = {"dense": _call(dense, tensors, setup)}
    for scheme in SCHEMES:
        runs[scheme] = _call(partial(attention, grid=grid, block=block_of(scheme, grid)), tensors, setup)
    times = timer(runs, setup.device)
    ms = {name: statistics.median(values) for name, values in times.items()}
    row: Row = {"grid": grid, "tokens": math.prod(grid), "dense_ms": ms["dense"]}
    for scheme in SCHEMES:
        row[scheme] = {"block": block_of(scheme, grid), "ms": ms[scheme], "ratio": ms["dense"] / ms[scheme]}
    turns = [
        len(SCHEMES) * dense_ms / sum(sparse_ms)
        for dense_ms, *sparse_ms in zip(times["dense"], *(times[scheme] for scheme in SCHEMES), strict=True)
    ]
    low, ratio, high = statistics.quantiles(turns, n=4, method="inclusive") if len(turns) > 1 else turns * 3
    return row | {"ratio": ratio, "low": low, "high": high, "turns": len(turns), "turn_ms": sum(ms.values())}


@torch.no_grad()
def densities(grid: Triple, setup: Setup) -> dict[str, float]:
    """Share of the pairs that each scheme keeps on these inputs."""
    q, k = inputs(grid, setup)[:2]
    return {s: float(select(q, k, grid, block=block_of(s, grid)).density().mean()) for s in SCHEMES}


def block_of(scheme: str, grid: Triple) -> Triple:
    """The scheme's default block in tokens."""
    steps = zip(default_block(scheme, grid), grid, strict=True)
    frames, rows, columns = (extent if step is None else step for step, extent in steps)
    return (frames, rows, columns)


def time_in_turns(runs: Mapping[str, Run], device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of each run, turn by turn, as often as the budget allows."""
    replays = {name: _captured(run) if device.type == "cuda" else run for name, run in runs.items()}
    clock = device_times if device.type == "cuda" else host_times
    warm = clock(replays, WARM_UPS)  # the first turn compiles and allocates
    spent = sum(values[-1] for values in warm.values())
    return clock(replays, max(LEAST_TURNS, min(MOST_TURNS, int(BUDGET_MS / max(spent, 1e-3)))))


def _call(attend: Attend, tensors: list[Tensor], setup: Setup) -> Run:
    q, k, v = tensors[:3]
    if setup.backward:
        return lambda: torch.autograd.grad(attend(q, k, v), (q, k, v), tensors[3])

    def forward() -> Tensor:
        with torch.no_grad():
            return attend(q, k, v)

    return forward


def host_times(runs: Mapping[str, Run], turns: int) -> dict[str, list[float]]:
    """Milliseconds of each run, ``turns`` times in turns so that all see the same clocks, on the host."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(turns):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) * 1e3)
    return times


def device_times(runs: Mapping[str, Run], turns: int) -> dict[str, list[float]]:
    """The same by the GPU's own clock."""
    for run in runs.values():
        run()  # in the queue before the first event: the host stays ahead of the GPU
    pairs: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in runs}
    for _ in range(turns):
        for name, run in runs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            pairs[name].append((start, end))
    torch.cuda.synchronize()
    return {name: [start.elapsed_time(end) for start, end in events] for name, events in pairs.items()}


def warm_up_for_capture(run: Run) -> None:
    """Run it on a stream of its own, as a CUDA graph wants before it is captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()


def _captured(run: Run) -> Run:
    """The run as a CUDA graph's replay, or as it is where it cannot be captured."""
    warm_up_for_capture(run)
    recorded = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(recorded):
            run()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return run
    return recorded.replay


def _release(device: torch.device) -> None:
    """Hand freed memory back: each size wants other shapes of it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
