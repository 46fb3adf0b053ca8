"""One side of one case of benchmarks/end_to_end.py, in a process of its own: it writes its row, whatever happens.

    python benchmarks/end_to_end_measure.py wan2.1-1.3b-480p sparse whole row.json

A process has one model on the GPU and starts without compiled kernels, so that compile times do not depend on what ran
before; with ``--turn`` several may compile beside each other, and the GPU computes for one at a time. ``dense`` is
``torch.compile`` with cuDNN's attention preferred. Where a case has a text mask its text fills the whole length and
``dense`` leaves the mask out, which then changes nothing and is the most that dense attention can do; ``dense-masked``
keeps it, and ``sparse`` always does.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))  # python -P leaves it off

import torch
from attention_measure import in_turns, mean_density, reason, synchronize
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

import vmoba_compile
from vmoba_compile import VMoBAConfig
from vmoba_compile.backend import Inner, inner_compiler
from vmoba_compile.compiling import whole_graphs
from vmoba_compile.zoo import Inputs, preset

Triple = tuple[int, int, int]
SIDES = ("dense", "sparse", "dense-masked")
MODES = ("whole", "regional")
DENSE = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
GROUPS = ("VMoBA attention", "selection", "dense attention", "matrix products", "rest")
OUTPUTS = 64  # values of the output that a row keeps, to compare sides by
LONGEST = 15  # kernels that a row names


@dataclass(frozen=True)
class ModelCase:
    """A model at a token grid, and how often its pipeline runs it in a denoising step."""

    name: str
    preset: str
    grid: Triple
    guidance: str
    batch: int = 1
    forwards: int = 1
    text: int = 0  # condition tokens in the video's self-attention
    text_mask: bool = False

    @property
    def tokens(self) -> int:
        frames, rows, columns = self.grid
        return frames * rows * columns + self.text

    def facts(self) -> dict[str, Any]:
        return {
            "case": self.name, "model": self.preset, "grid": self.grid, "tokens": self.tokens, "text": self.text,
            "batch": self.batch, "forwards": self.forwards, "guidance": self.guidance,
        }  # fmt: skip


_TWICE = {"forwards": 2, "guidance": "two forwards a step, with and without the prompt"}
_BATCH = {"batch": 2, "guidance": "one forward a step, of a batch of two: with and without the prompt"}
_INPUT = {"guidance": "one forward a step: the guidance is an input of the model"}
CASES = (
    ModelCase("wan2.1-1.3b-480p", "wan2.1-1.3b", (21, 30, 52), **_TWICE),
    ModelCase("wan2.1-1.3b-720p", "wan2.1-1.3b", (21, 45, 80), **_TWICE),
    ModelCase("wan2.1-14b-480p", "wan2.1-14b", (21, 30, 52), **_TWICE),
    ModelCase("wan2.1-14b-720p", "wan2.1-14b", (21, 45, 80), **_TWICE),
    ModelCase("cogvideox1.5-5b", "cogvideox1.5-5b", (11, 48, 85), text=226, **_BATCH),
    ModelCase("hunyuanvideo-720p", "hunyuanvideo", (33, 45, 80), text=256, text_mask=True, **_INPUT),
)
TINY = (
    ModelCase("tiny-wan", "tiny-wan", (4, 6, 8), **_TWICE),
    ModelCase("tiny-cogvideox1.5", "tiny-cogvideox1.5", (3, 8, 8), text=8, **_BATCH),
    ModelCase("tiny-hunyuanvideo", "tiny-hunyuanvideo", (3, 6, 8), text=256, text_mask=True, **_INPUT),
)


class Turn:
    """The GPU, which processes that compile beside each other have one at a time: a lock on a file; none without one."""

    def __init__(self, path: Path | None = None) -> None:
        self.file = path.open("w") if path else None
        self.waited = 0.0  # seconds

    def take(self) -> None:
        start = time.perf_counter()
        if self.file:
            fcntl.flock(self.file, fcntl.LOCK_EX)
        self.waited += time.perf_counter() - start

    def give(self) -> None:
        if self.file:
            fcntl.flock(self.file, fcntl.LOCK_UN)

    def after(self, compiler: Inner) -> Inner:
        """``compiler``, whose graphs run only in turn: what compiled them keeps the GPU until the process ends."""

        def compile_and_take(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
            made = compiler(graph, inputs)
            self.take()
            return made

        return compile_and_take


@dataclass(frozen=True)
class Settings:
    """What all rows of a run share."""

    tiny: bool = False
    layers: int | None = None  # of each stack, instead of the model's own number
    device: str = "cpu"
    turn: Turn = field(default_factory=Turn)

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def config(self) -> VMoBAConfig:
        return VMoBAConfig(min_tokens=0) if self.tiny else VMoBAConfig()

    @property
    def compiler(self) -> Inner:
        """Of both sides."""
        return self.turn.after(inner_compiler("inductor" if self.on_gpu else "eager"))


def build(case: ModelCase, settings: Settings) -> tuple[nn.Module, Inputs]:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if settings.on_gpu else torch.float32
    layers: dict[str, int] = {}
    if settings.layers or settings.tiny:
        layers["num_layers"] = settings.layers or 2
        if "hunyuan" in case.preset:
            layers["num_single_layers"] = layers["num_layers"]
    model, inputs = preset(case.preset).build(
        grid=case.grid, batch=case.batch, device=settings.device, dtype=dtype, as_loaded=True, **layers
    )
    if case.text_mask:
        inputs["encoder_attention_mask"] = torch.ones_like(inputs["encoder_attention_mask"])
    return model.eval().requires_grad_(False), inputs


def video_attentions(model: nn.Module) -> int:
    return model.config["num_layers"] + model.config.get("num_single_layers", 0)


def without_masks(compiler: Inner) -> Inner:
    """``compiler``, given graphs whose attentions take no mask: for masks that hide nothing."""

    def compile_unmasked(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        for node in graph.graph.nodes:
            if node.target is scaled_dot_product_attention:
                if len(node.args) > 3:
                    node.args = (*node.args[:3], None, *node.args[4:])
                node.kwargs = {name: value for name, value in node.kwargs.items() if name != "attn_mask"}
        graph.graph.eliminate_dead_code()
        graph.recompile()
        return compiler(graph, inputs)

    return compile_unmasked


def compile_blocks(model: nn.Module, backend: Inner) -> nn.Module:
    """Each repeated block by itself: as diffusers names them, else the modules of the longest list."""
    if getattr(model, "_repeated_blocks", None):
        model.compile_repeated_blocks(backend=backend, dynamic=False)
        return model
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    for block in max(lists, key=len):
        block.compile(backend=backend, dynamic=False)
    return model


def compiled(model: nn.Module, case: ModelCase, side: str, mode: str, settings: Settings) -> nn.Module:
    compiler = settings.compiler
    if side == "sparse":
        options = {"regional": True} if mode == "regional" else {}
        expect = video_attentions(model)
        return vmoba_compile.optimize(model, settings.config, inner=compiler, expect=expect, **options)
    if case.text_mask and side == "dense":
        compiler = without_masks(compiler)
    return (
        compile_blocks(model, compiler) if mode == "regional" else torch.compile(model, backend=compiler, dynamic=False)
    )


@contextlib.contextmanager
def preferring_cudnn(on_gpu: bool) -> Iterator[None]:
    with sdpa_kernel(DENSE, set_priority=True) if on_gpu else contextlib.nullcontext():
        yield


def kernel_times(run: Callable[[], object], device: str) -> dict[str, float]:
    """Milliseconds of one call by kernel, or by operator on a CPU; the longest first."""
    activity, kind = (
        (ProfilerActivity.CUDA, DeviceType.CUDA) if device == "cuda" else (ProfilerActivity.CPU, DeviceType.CPU)
    )
    with profile(activities=[activity]) as found:
        run()
        synchronize(device)
    times: dict[str, float] = {}
    for event in found.key_averages():
        if event.device_type == kind and not getattr(event, "is_user_annotation", False):
            spent = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
            times[event.key] = times.get(event.key, 0.0) + spent / 1e3
    return dict(sorted(times.items(), key=lambda item: -item[1]))


@functools.cache
def own_kernels() -> dict[str, str]:
    """VMoBA's kernels, read from its sources: name to group."""
    jitted = re.compile(r"^@(?:triton|gluon)\.jit\b.*\n(?:@.*\n)*def (\w+)", re.MULTILINE)
    found = {}
    for path in sorted(Path(vmoba_compile.kernels.__file__).parent.glob("*.py")):
        group = "selection" if path.stem.startswith("select_") else "VMoBA attention"
        found |= dict.fromkeys(jitted.findall(path.read_text()), group)
    return found


def group_of(kernel: str) -> str:
    if kernel in own_kernels():
        return own_kernels()[kernel]
    if kernel.startswith("vmoba::"):
        return "selection" if "select" in kernel else "VMoBA attention"
    for group, names in (
        ("dense attention", r"sdpa|scaled_dot_product|flash|fmha|attention"),
        ("matrix products", r"gemm|nvjet|cutlass|cublas|xmma|splitk|gemv|aten::(addmm|mm|bmm|baddbmm|linear)$"),
    ):
        if re.search(names, kernel, re.IGNORECASE):
            return group
    return "rest"


def grouped(times: dict[str, float]) -> dict[str, float]:
    """Milliseconds of each group of kernels."""
    found = dict.fromkeys(GROUPS, 0.0)
    for kernel, spent in times.items():
        found[group_of(kernel)] += spent
    return found


def first(output: Any) -> Tensor:
    return torch.utils._pytree.tree_leaves(output)[0]


def sampled(output: Tensor) -> list[float]:
    """Some values of an output, evenly apart. Raises RuntimeError where not all are finite."""
    if not bool(output.isfinite().all()):
        raise RuntimeError("the output has values that are not finite: its time would tell nothing")
    flat = output.flatten()
    return flat[:: max(1, flat.numel() // OUTPUTS)][:OUTPUTS].tolist()


@torch.no_grad()
def measure(
    case: ModelCase, side: str, mode: str, settings: Settings, save: Callable[[dict], None] = lambda row: None
) -> dict[str, Any]:
    """One row: seconds of the first call, then milliseconds of later ones; kernels, memory and density."""
    device, turn = settings.device, settings.turn
    turn.take()
    model, inputs = build(case, settings)
    row: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "weight_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "attentions": video_attentions(model),
    }
    with preferring_cudnn(settings.on_gpu), whole_graphs():
        if settings.on_gpu:  # what Inductor starts once, its processes for example, is no model's compile time
            torch.compile(lambda x: x.sin() + 1, backend=settings.compiler)(torch.ones(1024, device=device))
            synchronize(device)
        torch._dynamo.utils.counters.clear()
        fast = compiled(model, case, side, mode, settings)
        turn.give()
        start = time.perf_counter() - turn.waited
        output = first(fast(**inputs))
        synchronize(device)
        row["first_s"] = time.perf_counter() - turn.waited - start
        row["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        row["output"] = sampled(output)
        del output
        save(row)
        kernels = kernel_times(lambda: fast(**inputs), device)
        row["groups_ms"], row["kernels_ms"] = grouped(kernels), dict(list(kernels.items())[:LONGEST])
        row["attention_kernels"] = [name for name in kernels if "attention" in group_of(name)]
        if settings.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        # A few seconds of calls, three at least; the profiled one shows how many these are.
        count = max(3, min(10, int(6000 / max(1.0, sum(kernels.values()))))) if settings.on_gpu else 1
        times = in_turns({side: lambda: fast(**inputs)}, device, count)[side]
        row["peak_bytes"] = torch.cuda.max_memory_allocated() if settings.on_gpu else None
        row["ms"], row["all_ms"] = statistics.median(times), times
        row["compile_s"] = row["first_s"] - row["ms"] / 1e3
        save(row)
        if side == "sparse" and mode == "whole":  # regional compilation selects the same
            del fast
            torch.compiler.reset()
            row["density"] = mean_density(model, settings.config, inputs)
    return row


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=[case.name for case in CASES + TINY])
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("mode", choices=MODES, help="the model compiled as a whole, or its blocks one by one")
    parser.add_argument("row", type=Path, help="the JSON file to write")
    parser.add_argument("--layers", type=int, help="of each stack of blocks; the model's own number unless given")
    parser.add_argument("--turn", type=Path, metavar="FILE", help="locked while the GPU is in use")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)  # tensors this small take longer on many
    (case,) = (case for case in CASES + TINY if case.name == args.case)
    settings = Settings(case in TINY, args.layers, device, Turn(args.turn))

    def save(row: dict) -> None:
        args.row.write_text(json.dumps(row))

    row: dict[str, Any] = {}
    try:
        row = measure(case, args.side, args.mode, settings, save)
    except Exception as error:
        row = (json.loads(args.row.read_text()) if args.row.exists() else {}) | {"error": reason(error)}
        save(row)
        raise
    save(row)


if __name__ == "__main__":
    main()
