"""What benchmarks/attention.py measures with: shapes, inputs, clocks, memory, and the dense and flex_attention sides."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import interpolate, scaled_dot_product_attention

import vmoba_compile
from vmoba_compile import VMoBAConfig
from vmoba_compile.bench_measure import device_times, host_times, warm_up_for_capture
from vmoba_compile.blocks import SCHEMES, default_block

THRESHOLD = 0.25
FLEX_TILE = 128
SMOOTH_STEPS = (4, 6, 6)  # tokens an axis to one value of the noise that smooth inputs are interpolated from
SMOOTH_NOISE = 0.2
EAGER = "eager"
Run = Callable[[], object]
Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Case:
    """One attention, without its block: batch 1, ``prefix`` and ``suffix`` condition tokens around the grid."""

    name: str
    grid: Triple
    heads: int = 12
    head_dim: int = 128
    prefix: int = 0
    suffix: int = 0
    inputs: str = "random"
    schemes: tuple[str, ...] = SCHEMES
    flex: bool = False  # also measure flex_attention at equal density
    portable: bool = False  # also measure implementation="triton" in the 3D scheme
    granularity: str = "token"  # of all schemes; "tile" is not the paper's exact rule

    @property
    def num_video(self) -> int:
        return math.prod(self.grid)

    @property
    def num_condition(self) -> int:
        return self.prefix + self.suffix

    @property
    def num_tokens(self) -> int:
        return self.num_condition + self.num_video

    @property
    def label(self) -> str:
        notes = [self.inputs] * (self.inputs != "random") + ["tiles"] * (self.granularity == "tile")
        return ", ".join([self.name, *notes])

    def smooth(self, *schemes: str) -> Case:
        return replace(self, inputs="smooth", schemes=schemes, flex=False, portable=False)

    def tiled(self, *schemes: str) -> Case:
        """The same with ``granularity="tile"``."""
        return replace(self, granularity="tile", schemes=schemes or self.schemes, flex=False, portable=False)

    def block(self, scheme: str) -> Triple:
        """vmoba_compile's own block for the scheme, in tokens."""
        steps = zip(default_block(scheme, self.grid), self.grid, strict=True)
        frames, rows, columns = (extent if step is None else step for step, extent in steps)
        return (frames, rows, columns)

    def sizes(self, scheme: str) -> tuple[int, ...]:
        """The operators' integer arguments."""
        return (*self.grid, *self.block(scheme), self.prefix, self.suffix)

    def pairs(self, density: float) -> float:
        """(query, key) pairs that must be computed: the selected ones, and all with a condition token on either side."""
        return self.heads * (density * self.num_video**2 + self.num_condition * (self.num_tokens + self.num_video))

    def facts(self) -> dict:
        return {
            "label": self.label, "grid": self.grid, "prefix": self.prefix, "suffix": self.suffix, "heads": self.heads,
            "head_dim": self.head_dim, "tokens": self.num_tokens, "inputs": self.inputs,
            "granularity": self.granularity,
        }  # fmt: skip


def make_inputs(case: Case, device: str, dtype: torch.dtype) -> list[Tensor]:
    """q, k and v [1, H, S, D] as views of [1, S, H, D] memory, the layout that models hand over."""
    torch.manual_seed(0)
    made = []
    for _ in range(3):
        x = torch.randn(1, case.num_tokens, case.heads, case.head_dim, device=device, dtype=dtype)
        if case.inputs == "smooth":
            field = smooth_field(case.grid, case.heads * case.head_dim, device)
            x[:, case.prefix : case.prefix + case.num_video] = field.view(1, -1, case.heads, case.head_dim)
        made.append(x.transpose(1, 2))
    return made


def smooth_field(grid: Triple, channels: int, device: str) -> Tensor:
    """[N, channels] that varies slowly over the grid, as video does: trilinear low-resolution noise, and some white."""
    coarse = [max(2, extent // step) for extent, step in zip(grid, SMOOTH_STEPS, strict=True)]
    low = torch.randn(1, channels, *coarse, device=device)
    field = interpolate(low, size=grid, mode="trilinear", align_corners=False).flatten(2)[0].T
    return field / field.std() + SMOOTH_NOISE * torch.randn(field.shape, device=device)


def reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def release(device: str) -> None:
    """Hand freed memory back, so that one shape's leftovers do not show in the next."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def captured(run: Run, *, graph: bool) -> tuple[Run, str]:
    """The run as a CUDA graph's replay, or as it is where it is not or cannot be captured; and what was done."""
    if not graph:
        return run, EAGER
    warm_up_for_capture(run)
    recorded = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(recorded):
            run()
    except RuntimeError as error:
        return run, f"{EAGER}, capture failed: {reason(error)}"
    return recorded.replay, "CUDA graph"


def interleaved(
    runs: dict[str, Run], device: str, *, budget_ms: float, least: int, most: int
) -> tuple[dict[str, float], int]:
    """Median milliseconds of each run, taken in turns so that all see the same clocks; and how many turns."""

    def turn() -> float:
        start = time.perf_counter()
        for run in runs.values():
            run()
        synchronize(device)
        return (time.perf_counter() - start) * 1e3

    turn()
    repeats = max(least, min(most, int(budget_ms / max(turn(), 1e-3))))
    times = in_turns(runs, device, repeats)
    return {name: statistics.median(values) for name, values in times.items()}, repeats


def in_turns(runs: dict[str, Run], device: str, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each run, ``repeats`` times in turns, by the device's own clock where it has one."""
    return (device_times if device == "cuda" else host_times)(runs, repeats)


def host_ms(run: Run, device: str, repeats: int = 7) -> float | None:
    """Median milliseconds until an eager call returns, the GPU still at work; None on a CPU."""
    if device != "cuda":
        return None
    times = []
    for _ in range(repeats + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = run()
        times.append((time.perf_counter() - start) * 1e3)
        del result
    torch.cuda.synchronize()
    return statistics.median(times[2:])


def peak_bytes(run: Run, tensors: list[Tensor], device: str) -> int | None:
    """Peak memory of a forward, its inputs ``tensors`` included, whatever else is allocated not; None on a CPU."""
    if device != "cuda":
        return None
    run()  # what is allocated once, by compilation or a library, does not count
    torch.cuda.synchronize()
    release(device)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = run()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before + sum(x.numel() * x.element_size() for x in tensors)


def sparse_runs(
    case: Case, scheme: str, tensors: list[Tensor], implementation: str
) -> tuple[dict[str, Run], vmoba_compile.Selection]:
    """Selection, attention to its result, and both in one, as calls; and what is selected."""
    q, k, v = tensors
    rule = {
        "block": case.block(scheme), "prefix": case.prefix, "suffix": case.suffix, "threshold": THRESHOLD,
        "implementation": implementation, "granularity": case.granularity,
    }  # fmt: skip
    selection = vmoba_compile.select(q, k, case.grid, **rule)
    return {
        "select": lambda: vmoba_compile.select(q, k, case.grid, **rule).words,
        "attention": lambda: attend(case, scheme, tensors, selection, implementation),
        "total": lambda: vmoba_compile.attention(q, k, v, case.grid, **rule),
    }, selection


def attend(
    case: Case, scheme: str, tensors: list[Tensor], selection: vmoba_compile.Selection, implementation: str
) -> Tensor:
    """Attention alone, to what was selected before."""
    mask = torch.empty(0, dtype=torch.bool, device=tensors[0].device)
    return torch.ops.vmoba.attention(
        *tensors, selection.words, mask, *case.sizes(scheme), scale=case.head_dim**-0.5, threshold=THRESHOLD, topk=0,
        implementation=implementation, tile=selection.tile, pool="head_global",
    )[0]  # fmt: skip


def implementation_used(name: str, head_dim: int, device: str, dtype: torch.dtype, granularity: str = "token") -> str:
    """What ``auto`` stands for: the first that takes such tensors when asked by name."""
    if name != "auto":
        return name
    if device == "cuda":
        x = torch.randn(1, 1, 96, head_dim, device=device, dtype=dtype)
        for candidate in ("hopper", "triton"):
            try:
                vmoba_compile.attention(
                    x, x, x, (2, 6, 8), block=(1, 3, 4), implementation=candidate, granularity=granularity
                )
            except ValueError:
                continue
            except Exception:  # "auto" takes it as well: the rows will say why it fails
                pass
            return candidate
    return "reference"


def dense_attention(device: str) -> tuple[Callable[[Tensor, Tensor, Tensor], Tensor], str]:
    """cuDNN's attention on a GPU that has it, PyTorch's choice elsewhere; and its name."""

    def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(q, k, v)

    def default(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v)

    if device != "cuda":
        return default, "PyTorch's default SDPA"
    try:
        cudnn(*torch.randn(3, 1, 2, 256, 64, device=device, dtype=torch.bfloat16))
    except RuntimeError as error:
        return default, f"PyTorch's default SDPA, since cuDNN's cannot run ({reason(error)})"
    return cudnn, "cuDNN SDPA"


def flex_at_density(tensors: list[Tensor], density: float) -> tuple[Run, float, int]:
    """flex_attention, compiled, on random tiles of 128 x 128 tokens; the density of whole tiles; and its tokens.

    Its fastest path: the tokens behind the last whole tile are left out, and every tile is marked as full.
    """
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    heads, across = tensors[0].shape[1], tensors[0].shape[2] // FLEX_TILE
    device, tokens = tensors[0].device, across * FLEX_TILE
    kept = max(1, round(density * across))
    tiles = torch.rand(1, heads, across, across, device=device).argsort(-1)
    tiles[..., :kept] = tiles[..., :kept].sort(-1).values
    tiles = tiles.to(torch.int32)
    counts = torch.full((1, heads, across), kept, dtype=torch.int32, device=device)
    mask = BlockMask.from_kv_blocks(
        torch.zeros_like(counts), tiles, counts, tiles, BLOCK_SIZE=FLEX_TILE, seq_lengths=(tokens, tokens)
    )
    q, k, v = (x[:, :, :tokens] for x in tensors)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, block_mask=mask), kept / across, tokens


@torch.no_grad()
def mean_density(model: nn.Module, config: VMoBAConfig, inputs: dict) -> float:
    """Share of (query, box) entries that the model's attentions select, mean over layers, heads and samples."""
    found: list[float] = []

    class Counting(torch.fx.Interpreter):
        def run_node(self, node: torch.fx.Node) -> object:
            result = super().run_node(node)
            if node.target is torch.ops.vmoba.select.default:
                t, h, w, bt, bh, bw = node.args[3:9]
                bits = sum(int(((result >> i) & 1).sum()) for i in range(32))
                boxes = math.prod(-(-extent // step) for extent, step in ((t, bt), (h, bh), (w, bw)))
                found.append(bits / (result[..., 0].numel() * boxes))
            return result

    model.eval()
    vmoba_compile.optimize(model, config, inner=lambda graph, _: Counting(graph).run)(**inputs)
    model.train()
    return sum(found) / len(found)
