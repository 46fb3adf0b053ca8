"""The main job on a real video transformer: rewrite it, run it, account for it.

Takes diffusers' WanTransformer3DModel (random weights, three layers: one for each partition) at 81 frames of 480 x 832,
21 x 30 x 52 latent tokens, and prints what was rewritten, whether it is right, and what it saves.

    python examples/demo.py                     # two heads of 64 in float32 on a CPU, twelve of 128 in bfloat16 on a GPU
    python examples/demo.py --grid 4x6x8        # a small one
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Many small operations: on a busy CPU, threads that spin while they wait for each other would take the time of the rest.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, fx
from vmoba_compile.kernels import Geometry
from vmoba_compile.kernels.partition import box_of

import vmoba_compile
from vmoba_compile.__main__ import parse_grid
from vmoba_compile.zoo import preset

SAMPLED_QUERIES = 128
THRESHOLD = 0.25


@dataclass
class Call:
    """Inputs and result of one sparse attention that the model really made."""

    q: Tensor
    k: Tensor
    v: Tensor
    selection: vmoba_compile.Selection
    out: Tensor


class Recorder:
    """An inner compiler that runs the rewritten graph as it is and, when told to, keeps what its attentions did."""

    def __init__(self) -> None:
        self.calls: list[Call] | None = None
        self.advance: Callable[[], object] = lambda: None

    def __call__(self, gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        recorder = self

        class Recording(fx.Interpreter):
            def run_node(self, node: fx.Node) -> Any:
                result = super().run_node(node)
                if node.target is torch.ops.vmoba.attention.default and recorder.calls is not None:
                    args, _ = self.fetch_args_kwargs_from_env(node)
                    q, k, v, words, _, *sizes = args
                    geometry = Geometry(tuple(sizes[:3]), tuple(sizes[3:6]), *sizes[6:])
                    recorder.calls.append(Call(q, k, v, vmoba_compile.Selection(words, geometry), result[0]))
                    recorder.advance()
                return result

        return lambda *inputs: (Recording(gm).run if recorder.calls is not None else gm.forward)(*inputs)


def attention_error(call: Call) -> float:
    """Relative error against dense float64 attention under the selection's mask, on a sample of the queries."""
    geometry, batch = call.selection.geometry, call.q.shape[0]
    rows = torch.randperm(geometry.num_video, device=call.q.device)[:SAMPLED_QUERIES]
    boxes = box_of(geometry.grid, geometry.block, call.q.device)
    wrong = right = 0.0
    for head in range(call.q.shape[1]):
        q, k, v, out = (x[:, head].double() for x in (call.q, call.k, call.v, call.out))
        mask = call.selection.mask()[:, head, rows][..., boxes] if batch == 1 else None
        assert mask is not None and geometry.num_condition == 0
        scores = q[:, rows] @ k.transpose(1, 2) * q.shape[-1] ** -0.5
        expected = scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v
        wrong += float((out[:, rows] - expected).square().sum())
        right += float(expected.square().sum())
    return (wrong / right) ** 0.5


def selection_is_exact(call: Call) -> bool:
    """Check the paper's rule by its meaning: per head, the entries outside the query's own box are the largest gates,
    just enough of them to reach the threshold share of the weight.
    """
    geometry = call.selection.geometry
    boxes = box_of(geometry.grid, geometry.block, call.q.device)
    taken = call.selection.mask()[0]
    own = torch.nn.functional.one_hot(boxes, geometry.num_boxes).bool()
    size = torch.bincount(boxes).double()
    for head in range(call.q.shape[1]):
        keys = call.k[0, head].double()
        means = torch.zeros(geometry.num_boxes, keys.shape[1], dtype=keys.dtype, device=keys.device)
        means = means.index_add_(0, boxes, keys) / size[:, None]
        gate = call.q[0, head].double() @ means.T
        weight = (gate - gate.min()) / (gate.max() - gate.min())
        chosen, other = taken[head] & ~own, ~own & ~taken[head]
        total = weight.sum() + 1e-6
        share = weight[taken[head]].sum() / total
        smallest = weight[chosen].min()
        largest_left = weight[other].max() if other.any() else smallest - 1
        ordered = bool(smallest >= largest_left - 1e-9)
        reached = bool(share >= THRESHOLD - 1e-9 and share - smallest / total < THRESHOLD + 1e-9)
        if not (bool(taken[head][own].all()) and ordered and (reached or chosen.sum() == 1)):
            return False
    return True


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    start = time.perf_counter()
    result = run()
    synchronize()
    return time.perf_counter() - start, result


def arguments() -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=parse_grid, default=(21, 30, 52), metavar="TxHxW", help="latent tokens")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--heads", type=int, default=12 if on_gpu else 2)
    parser.add_argument("--head-dim", type=int, default=128 if on_gpu else 64)
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    args, console = arguments(), Console(width=None if sys.stdout.isatty() else 120)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    model, inputs = preset("wan2.1-1.3b").build(
        grid=args.grid, device=device, dtype=dtype, num_layers=args.layers, num_attention_heads=args.heads,
        attention_head_dim=args.head_dim, ffn_dim=4 * args.heads * args.head_dim,
    )  # fmt: skip
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    console.print(
        f"WanTransformer3DModel, {args.layers} layers, {args.heads} heads x {args.head_dim}, "
        f"{'x'.join(map(str, args.grid))} tokens, {str(dtype).removeprefix('torch.')}, torch {torch.__version__}, {where}"
    )

    recorder = Recorder()
    config = vmoba_compile.VMoBAConfig(threshold=THRESHOLD, min_tokens=0)
    fast = vmoba_compile.optimize(model.eval(), config, inner=recorder, fullgraph=True, expect=args.layers)
    with Progress(SpinnerColumn(), *Progress.get_default_columns(), TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("rewrite, first run", total=2 * args.layers + 3)
        recorder.calls, recorder.advance = [], lambda: progress.advance(task)
        fast(**inputs)
        calls, recorder.calls = recorder.calls, None
        errors, exact = [], []
        for number, call in enumerate(calls):
            progress.update(task, description=f"check layer {number}", advance=1)
            errors.append(attention_error(call))
            exact.append(selection_is_exact(call))
        progress.update(task, description="time sparse", advance=1)
        sparse_seconds, sparse = timed(lambda: fast(**inputs).sample)
        progress.update(task, description="time dense", advance=1)
        with fast.dense():
            fast(**inputs)
            dense_seconds, dense = timed(lambda: fast(**inputs).sample)
        progress.update(task, description="done", advance=1)

    report = vmoba_compile.report(fast)
    console.print(report)
    table = Table(title="rewritten attentions, checked against float64 attention", show_edge=False)
    for column in ("layer", "scheme", "boxes", "density", "dense TFLOP", "saved", "error", "selection"):
        table.add_column(column, justify="right")
    for site, call, error, right in zip(report.rewritten, calls, errors, exact, strict=True):
        density = float(call.selection.density().mean())
        table.add_row(
            str(site.layer), site.scheme, str(call.selection.geometry.num_boxes), f"{density:.3f}",
            f"{site.dense_flops / 1e12:.3f}", f"{1 - density:.1%}", f"{error:.1e}", "exact" if right else "WRONG",
        )  # fmt: skip
    console.print(table)
    change = float((sparse - dense).norm() / dense.norm())
    kernels = "Triton" if device == "cuda" else "reference"
    console.print(
        f"whole model: dense {dense_seconds:.2f} s, sparse {sparse_seconds:.2f} s, {dense_seconds / sparse_seconds:.2f}x "
        f"(eager layers, {kernels} kernels); outputs differ by {change:.1%} (random weights, threshold {THRESHOLD})"
    )
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    if max(errors) > limit or not all(exact):
        raise SystemExit(f"FAILED: errors {errors} (limit {limit}), selections exact: {exact}")


if __name__ == "__main__":
    main()
