"""Train a small video diffusion transformer by flow matching, with dense or with sparse attention.

The model (video_dit.py) is ordinary PyTorch and does not name VMoBA: --attention only chooses how it is wrapped. Clips are
drawn as they are needed. A clip's index gives its glyphs, its noise and its time, so that all runs see the same in the same
order.

    python examples/train_video_dit.py --attention dense --steps 100 --out runs/dense       # tiny, for two CPU cores
    python examples/train_video_dit.py --attention vmoba --steps 100 --out runs/vmoba
    python examples/train_video_dit.py --compare runs/dense runs/vmoba --out runs/compared  # plot, table and JSON

On a GPU: --grid 24x32x48 --width 768 --layers 8 --heads 6 --batch 1 --steps 1000 --cooldown 300
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as in examples/demo.py
sys.path.append(str(Path(__file__).parent))  # python -P leaves it off

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from video_dit import Triple, VideoTransformer, draw_clip

import vmoba_compile
from vmoba_compile import VMoBAConfig
from vmoba_compile.__main__ import parse_grid

try:
    from safetensors.torch import load_file, save_file

    WEIGHTS = "weights.safetensors"
except ImportError:
    load_file, save_file = partial(torch.load, map_location="cpu", weights_only=True), torch.save
    WEIGHTS = "weights.pt"

# Kernels of dense attention, the fastest on a Hopper first: the comparison is to be with the best there is.
DENSE = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# As vmoba_compile has it: gradients of adaptive norms at batch 1 may be lost otherwise (pytorch/pytorch#193061).
SOUND = {"triton.mix_order_reduction": False}
HELD_OUT = 1 << 40  # clip indices from here on are never trained on
MOBA_CHUNKS, MOBA_DENSITY = 8, 0.22
# What a run shares with the one that it resumes.
SETTINGS = (
    "attention", "threshold", "grid", "width", "layers", "heads", "batch", "lr", "warmup", "cooldown", "seed", "held_out",
)  # fmt: skip


def examples(indices: Iterable[int], args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Clips and noises [B, 3, T, 2H, 2W] and times [B] of these indices, alike on every device."""
    clips, noises, times = [], [], []
    for index in indices:
        random = torch.Generator().manual_seed(index)
        clips.append(draw_clip(random, args.grid, args.device))
        noises.append(torch.randn(clips[-1].shape, generator=random).to(args.device))
        times.append(torch.randn((), generator=random).sigmoid().to(args.device))  # logit-normal
    return torch.stack(clips), torch.stack(noises), torch.stack(times)


def attention_config(attention: str, grid: Triple, threshold: float) -> VMoBAConfig | None:
    """VMoBA's rule, MoBA's at about the same density, or None for dense attention."""
    if attention == "dense":
        return None
    if attention == "vmoba":
        return VMoBAConfig(threshold=threshold, pool="head_global", min_tokens=0)
    # Chunks of the raster order, the same ones in every layer: whole frames, or parts of one where there are few.
    frames, rows, _ = grid
    chunk = (max(1, frames // MOBA_CHUNKS), max(1, rows // math.ceil(MOBA_CHUNKS / frames)), None)
    chunks = math.ceil(frames / chunk[0]) * math.ceil(rows / chunk[1])
    topk = min(chunks, max(2, round(MOBA_DENSITY * chunks)))  # one of them is the query's own
    blocks = dict.fromkeys(("1d", "2d", "3d"), chunk)
    return VMoBAConfig(mode="topk", topk=topk, pool="query_head", blocks=blocks, min_tokens=0)


def wrap(model: VideoTransformer, config: VMoBAConfig | None, device: torch.device) -> nn.Module:
    on_gpu = device.type == "cuda"
    if config is None:
        return torch.compile(model, options=SOUND) if on_gpu else model
    inner = "inductor" if on_gpu else "aot_eager"
    return vmoba_compile.optimize(model, config, inner=inner, expect=len(model.blocks))


@torch.no_grad()
def density(model: VideoTransformer, config: VMoBAConfig | None, args: argparse.Namespace) -> float:
    """Mean share of the token pairs that the layers keep: chosen for a held-out clip, in the model as it was written."""
    if config is None:
        return 1.0
    seen: list[Tensor] = []
    norms = [norm for block in model.blocks for norm in (block.q_norm, block.k_norm)]
    hooks = [norm.register_forward_hook(lambda _, args, out: seen.append(out)) for norm in norms]
    flow_loss(model, *examples([HELD_OUT], args))
    for hook in hooks:
        hook.remove()
    rule = {"pool": config.pool, "mode": config.mode, "threshold": config.threshold, "topk": config.topk}
    total = 0.0
    for layer, (q, k) in enumerate(zip(seen[::2], seen[1::2], strict=True)):
        sizes = zip(config.block_for(layer, args.grid)[1], args.grid, strict=True)
        block = tuple(extent if size is None else size for size, extent in sizes)
        total += float(vmoba_compile.select(q, k, args.grid, block=block, **rule).density().mean())
    return total / len(model.blocks)


def predict(model: nn.Module, video: Tensor, times: Tensor) -> Tensor:
    on_gpu = video.device.type == "cuda"
    with torch.autocast(video.device.type, torch.bfloat16, enabled=on_gpu), sdpa_kernel(DENSE, set_priority=True):
        return model(video, times).float()


def flow_loss(model: nn.Module, clips: Tensor, noises: Tensor, times: Tensor) -> Tensor:
    """Squared error of the velocity on the straight path from clip (time 0) to noise (time 1)."""
    mixed = torch.lerp(clips, noises, times[:, None, None, None, None])
    return (predict(model, mixed, times) - (noises - clips)).square().mean()


@torch.no_grad()
def held_out_loss(model: nn.Module, args: argparse.Namespace) -> float:
    """Over the same clips, noises and times at every call; in whole batches: another size would be compiled anew."""
    starts = range(HELD_OUT, HELD_OUT + args.held_out, args.batch)
    batches = (examples(range(start, start + args.batch), args) for start in starts)
    return sum(flow_loss(model, *batch).item() for batch in batches) / len(starts)


def learning_rate(step: int, args: argparse.Namespace) -> float:
    return args.lr * min(1.0, (step + 1) / args.warmup, (args.steps - step) / max(1, args.cooldown))


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, args: argparse.Namespace) -> float:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, args)
    loss = flow_loss(model, *examples(range(step * args.batch, (step + 1) * args.batch), args))
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()  # read last: it waits for the whole step, whose time is taken


def train(args: argparse.Namespace, console: Console) -> None:
    deadline = time.perf_counter() + args.seconds
    torch.manual_seed(args.seed)
    model = VideoTransformer(args.grid, args.width, args.layers, args.heads).to(args.device)
    config = attention_config(args.attention, args.grid, args.threshold)
    fast = wrap(model, config, args.device)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), fused=args.device.type == "cuda")
    step, seconds = start_run(model, optimizer, args)
    columns = [TextColumn("{task.description}"), MofNCompleteColumn(), TextColumn("{task.fields[state]}")]
    with (
        Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress,
        (args.out / "log.jsonl").open("a") as log,
    ):
        task = progress.add_task(args.attention, total=args.steps, completed=step, state="compiling")
        flow_loss(fast, *examples(range(args.batch), args)).backward()
        optimizer.zero_grad()
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        done = False
        while not done:
            start = time.perf_counter()
            loss = train_step(fast, optimizer, step, args)
            seconds, step = seconds + time.perf_counter() - start, step + 1
            done = step == args.steps or time.perf_counter() > deadline
            record = {"step": step, "loss": loss, "seconds": seconds}
            if done or step % args.validate == 0:
                record["held_out"] = held_out_loss(fast, args)
            if done:
                record["density"] = density(model, config, args)
            print(json.dumps(record), file=log, flush=True)
            if done or step % args.save == 0:
                save_checkpoint(model, optimizer, step, seconds, args)
            progress.update(task, completed=step, state=f"loss {loss:.4f}, {1e3 * seconds / step:.0f} ms/step")
    if config is not None:
        console.print(vmoba_compile.report(fast))
    console.print(write_sheet(sample(fast, args), args.out / "samples.png"), soft_wrap=True)
    facts = summary(args.out)
    console.print(
        f"{args.attention}: {facts['steps']} steps, train loss {facts['train_loss']:.4f} (last tenth), held-out loss "
        f"{facts['held_out']:.4f}, {facts['ms_per_step']:.1f} ms/step, density {facts['density']:.3f}",
        soft_wrap=True,
    )


def settings(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in SETTINGS}


def start_run(model: nn.Module, optimizer: torch.optim.Optimizer, args: argparse.Namespace) -> tuple[int, float]:
    """Make the run's folder, or load its newest checkpoint; returns steps and seconds of training so far."""
    log, state = args.out / "log.jsonl", {"step": 0, "seconds": 0.0}
    if args.resume:
        folder = newest_checkpoint(args.out)
        if folder is None:
            raise SystemExit(f"--resume finds no checkpoint in {args.out}")
        state = torch.load(folder / "state.pt", map_location=args.device, weights_only=True)
        for name, value in settings(args).items():
            if state["settings"][name] != value:
                raise SystemExit(f"--{name.replace('_', '-')} was {state['settings'][name]} in {args.out}, not {value}")
        model.load_state_dict(load_file(folder / WEIGHTS))
        optimizer.load_state_dict(state["optimizer"])
        kept = [record for record in read_log(args.out) if record["step"] <= state["step"]]
        log.write_text("".join(json.dumps(record) + "\n" for record in kept))
    elif log.exists():
        raise SystemExit(f"{args.out} holds a run; give --resume to go on with it, or another --out")
    if state["step"] >= args.steps:
        raise SystemExit(f"{args.out} is at step {state['step']} already; give more --steps")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "run.json").write_text(json.dumps(settings(args), indent=1) + "\n")
    return state["step"], state["seconds"]


def newest_checkpoint(run: Path) -> Path | None:
    return max(run.glob("checkpoint-[0-9]*"), default=None)


def save_checkpoint(
    model: nn.Module, optimizer: torch.optim.Optimizer, step: int, seconds: float, args: argparse.Namespace
) -> None:
    """Keep weights, optimizer and step: all else derives from the step. A run killed meanwhile has its older one."""
    older, folder = list(args.out.glob("checkpoint-*")), args.out / "checkpoint-new"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    save_file(model.state_dict(), folder / WEIGHTS)
    state = {"optimizer": optimizer.state_dict(), "step": step, "seconds": seconds, "settings": settings(args)}
    torch.save(state, folder / "state.pt")
    folder.rename(args.out / f"checkpoint-{step:08d}")
    for path in older:
        shutil.rmtree(path, ignore_errors=True)


@torch.no_grad()
def sample(model: nn.Module, args: argparse.Namespace) -> Tensor:
    """Clips made from noise in Euler steps from time 1 to 0: [samples, 3, T, 2H, 2W]."""
    clips = []
    for start in range(HELD_OUT, HELD_OUT + args.samples, args.batch):
        _, noises, _ = examples(range(start, start + args.batch), args)
        clips.append(denoise(model, noises, range(args.euler_steps, 0, -1), args))
    return torch.cat(clips)[: args.samples]


@torch.no_grad()
def denoise(model: nn.Module, video: Tensor, steps: Iterable[int], args: argparse.Namespace) -> Tensor:
    """An Euler step from time step / euler_steps for each of ``steps``, as many of them left as its number."""
    for step in steps:
        times = torch.full((len(video),), step / args.euler_steps, device=args.device)
        video = video - predict(model, video, times) / args.euler_steps
    return video


def write_sheet(clips: Tensor, path: Path, columns: int = 6) -> str:
    """A picture with a row for each clip and up to ``columns`` of its frames; returns what to tell about it."""
    frames = torch.linspace(0, clips.shape[2] - 1, min(columns, clips.shape[2])).round().long()
    shown = F.pad(clips[:, :, frames.to(clips.device)].clamp(-1, 1), (1, 1, 1, 1), value=1.0)
    rows = shown.permute(0, 3, 2, 4, 1).flatten(2, 3).flatten(0, 1)  # [clips * height, frames * width, 3]
    pixels = ((rows + 1) * 127.5).round().byte().cpu().numpy()
    try:
        from PIL import Image

        Image.fromarray(pixels).save(path)
    except ImportError:
        try:
            from matplotlib.image import imsave
        except ImportError:
            return "no picture of the samples: install pillow or matplotlib for one"
        imsave(path, pixels)
    return f"samples in {path}"


def read_log(run: Path) -> list[dict[str, Any]]:
    if not (run / "log.jsonl").exists():
        raise SystemExit(f"{run} holds no run: log.jsonl is missing")
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def summary(run: Path) -> dict[str, Any]:
    records = read_log(run)
    held_out = [record["held_out"] for record in records if "held_out" in record]
    tail = [record["loss"] for record in records[-math.ceil(len(records) / 10) :]]
    return {
        "run": str(run), "attention": json.loads((run / "run.json").read_text())["attention"],
        "steps": records[-1]["step"], "train_loss": sum(tail) / len(tail),
        "held_out": held_out[-1] if held_out else math.nan, "seconds": records[-1]["seconds"],
        "ms_per_step": 1e3 * records[-1]["seconds"] / records[-1]["step"],
        "density": records[-1].get("density", math.nan),
    }  # fmt: skip


def compare(runs: list[Path], out: Path, console: Console) -> None:
    rows = [summary(run) for run in runs]
    table = Table("run", "attention", "steps", "density", "held-out loss", "to first", "ms/step", "to first")
    for row in rows:
        row["held_out_ratio"] = row["held_out"] / rows[0]["held_out"]
        row["ms_per_step_ratio"] = row["ms_per_step"] / rows[0]["ms_per_step"]
        table.add_row(
            row["run"], row["attention"], str(row["steps"]), f"{row['density']:.3f}", f"{row['held_out']:.4f}",
            f"{row['held_out_ratio']:.3f}", f"{row['ms_per_step']:.1f}", f"{row['ms_per_step_ratio']:.3f}",
        )  # fmt: skip
    console.print(table)
    out.mkdir(parents=True, exist_ok=True)
    (out / "compare.json").write_text(json.dumps(rows, indent=1) + "\n")
    plot(runs, out / "compare.png")
    console.print(f"{out / 'compare.json'} and {out / 'compare.png'} written", soft_wrap=True)


def plot(runs: list[Path], path: Path) -> None:
    """Loss (mean of the last 2 % of the steps at each) against steps and time; held-out losses are dots."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    for panel, key, label in zip(panels, ("step", "seconds"), ("step", "seconds of training"), strict=True):
        for run in runs:
            records = read_log(run)
            window = max(1, len(records) // 50)
            losses = torch.tensor([record["loss"] for record in records]).unfold(0, window, 1).mean(1)
            (line,) = panel.plot([record[key] for record in records[window - 1 :]], losses, linewidth=1, alpha=0.6)
            marked = [record for record in records if "held_out" in record]
            values = [record["held_out"] for record in marked]
            panel.plot([r[key] for r in marked], values, "o-", color=line.get_color(), label=f"{run.name}, held out")
        panel.set(xlabel=label, yscale="log")
    panels[0].set_ylabel("flow-matching loss")
    panels[0].legend()
    figure.savefig(path, dpi=120)


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--attention", choices=("dense", "vmoba", "moba"), default="vmoba", help="how the model is wrapped")
    add("--threshold", type=float, default=0.25, help="share of the gate weight that vmoba's boxes hold")
    add("--grid", type=parse_grid, default=(4, 8, 8), metavar="TxHxW", help="tokens; the video is T x 2H x 2W pixels")
    add("--width", type=int, default=64, help="channels of the transformer")
    add("--layers", type=int, default=3, help="blocks of the transformer")
    add("--heads", type=int, default=2, help="heads of each attention")
    add("--batch", type=int, default=4, help="clips a step")
    add("--steps", type=int, default=100, help="steps to train for, those before --resume included")
    add("--seconds", type=float, default=math.inf, help="train no longer than this; results are still written")
    add("--lr", type=float, help="learning rate after the warm-up (8e-3 / sqrt(width))")
    add("--warmup", type=int, default=30, help="steps of linear warm-up")
    add("--cooldown", type=int, default=0, help="last steps, over which the learning rate falls to zero")
    add("--seed", type=int, default=0, help="of the initial weights")
    add("--validate", type=int, default=50, help="steps between held-out losses")
    add("--held-out", type=int, default=16, help="held-out clips, rounded up to whole batches")
    add("--save", type=int, default=100, help="steps between checkpoints; the newest is kept")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    add("--samples", type=int, default=4, help="clips on the final sheet")
    add("--euler-steps", type=int, default=20, help="steps from noise to a sample")
    add("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    add("--out", type=Path, help="folder for what is written (runs/<attention>, or runs/compare)")
    add("--compare", type=Path, nargs="+", metavar="RUN", help="train nothing; compare the runs in these folders")
    args = parser.parse_args(words)
    if args.width % args.heads:
        parser.error(f"--width {args.width} is not a multiple of --heads {args.heads}")
    args.lr = args.lr or 8e-3 / args.width**0.5
    args.out = args.out or Path("runs") / ("compare" if args.compare else args.attention)
    return args


def main() -> None:
    args, console = arguments(), Console(width=None if sys.stdout.isatty() else 120)
    if args.compare:
        compare(args.compare, args.out, console)
    else:
        train(args, console)


if __name__ == "__main__":
    main()
