"""Dense against sparse attention in the same video model, from the same noise: side by side, and in numbers.

    python examples/compare_videos.py                       # trains two tiny models first; runs anywhere
    python examples/compare_videos.py runs/dense runs/vmoba --out runs/videos   # runs of train_video_dit.py

Each run's weights are sampled with dense attention and with sparse attention: with the first quarter of the steps dense
(training-free use, for weights trained dense) and with none. Samples are compared with dense samples of the same weights
and noise. Besides, held-out clips are noised half-way and restored, and compared with what they were. PSNR in dB, and
SSIM (Wang et al., "Image quality assessment: from error visibility to structural similarity", 2004), means over the
frames of a clip; 100 dB stands for equal. Prints a table, writes JSON, the middle frames as a PNG, a GIF and, where
ffmpeg is installed, an MP4.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))  # python -P leaves it off

import torch
import torch.nn.functional as F
import train_video_dit as training
from rich.console import Console
from rich.table import Table
from torch import Tensor

import vmoba_compile

WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03  # of SSIM, as its authors have them
SAMPLED = {"dense": 1.0, "first 25 % dense": 0.25, "sparse": 0}  # dense_steps of each way to sample


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Of each clip [B, 3, T, H, W] in [-1, 1], in dB: [B]."""
    error = ((a.clamp(-1, 1) - b.clamp(-1, 1)) / 2).square().flatten(1).mean(1)
    return -10 * error.clamp(min=1e-10).log10()


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Of each clip [B, 3, T, H, W] in [-1, 1], mean over channels, frames and places: [B]."""
    x, y = ((clip.clamp(-1, 1) + 1) / 2 for clip in (a, b))
    images = [video.transpose(1, 2).flatten(0, 2)[:, None] for video in (x, y, x * x, y * y, x * y)]
    size = min(WINDOW, *a.shape[-2:])  # frames smaller than the window get a smaller one
    place = torch.arange(size, device=a.device) - (size - 1) / 2
    weights = (-place.square() / (2 * SIGMA**2)).exp()
    weights = weights / weights.sum()

    def blur(image: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(image, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))

    mean_x, mean_y, xx, yy, xy = map(blur, images)
    var_x, var_y, cov = xx - mean_x**2, yy - mean_y**2, xy - mean_x * mean_y
    c1, c2 = K1**2, K2**2
    found = (2 * mean_x * mean_y + c1) * (2 * cov + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return found.flatten(1).mean(1).view(len(a), -1).mean(1)


def load(run: Path, args: argparse.Namespace) -> tuple[training.VideoTransformer, dict[str, Any]]:
    """The newest weights of a run, and its settings."""
    folder = training.newest_checkpoint(run)
    if folder is None:
        raise SystemExit(f"{run} holds no checkpoint; make one with examples/train_video_dit.py --out {run}")
    facts = json.loads((run / "run.json").read_text())
    facts["grid"] = tuple(facts["grid"])
    model = training.VideoTransformer(facts["grid"], facts["width"], facts["layers"], facts["heads"])
    model.load_state_dict(training.load_file(folder / training.WEIGHTS))
    return model.to(args.device).eval(), facts


def train_tiny(args: argparse.Namespace, console: Console) -> list[Path]:
    """One run with dense and one with sparse attention, unless there are such from before."""
    runs = []
    for attention in ("dense", "vmoba"):
        out = args.out / attention
        words = ["--attention", attention, "--out", str(out), "--steps", str(args.train_steps), "--held-out", "4"]
        if training.newest_checkpoint(out) is None:
            training.train(training.arguments([*words, "--device", str(args.device)]), console)
        runs.append(out)
    return runs


class Sampler:
    """One model, its dense and its sparse graph; clips in batches of one size: another would be compiled anew."""

    def __init__(self, model: training.VideoTransformer, facts: dict[str, Any], args: argparse.Namespace) -> None:
        attention = "vmoba" if facts["attention"] == "dense" else facts["attention"]
        self.config = training.attention_config(attention, facts["grid"], facts["threshold"])
        self.fast = training.wrap(model, self.config, args.device)
        self.args = argparse.Namespace(**vars(args), grid=facts["grid"])
        self.density = training.density(model, self.config, self.args)
        for dense_steps in (1.0, 0):  # compiles both graphs
            self._run(self._examples(training.HELD_OUT)[1], range(1, 0, -1), dense_steps)

    def _examples(self, start: int) -> tuple[Tensor, Tensor]:
        return training.examples(range(start, start + self.args.batch), self.args)[:2]

    def _run(self, video: Tensor, steps: Sequence[int], dense_steps: float) -> Tensor:
        return training.denoise(self.fast, video, self.fast.schedule(steps, dense_steps), self.args)

    def _batches(self) -> Iterable[tuple[Tensor, Tensor]]:
        for start in range(training.HELD_OUT, training.HELD_OUT + self.args.clips, self.args.batch):
            yield self._examples(start)

    def sample(self, dense_steps: float) -> tuple[Tensor, float]:
        """Clips from noise, and the seconds that one took."""
        steps = range(self.args.euler_steps, 0, -1)
        synchronize(self.args.device)
        start = time.perf_counter()
        clips = torch.cat([self._run(noises, steps, dense_steps) for _, noises in self._batches()])
        synchronize(self.args.device)
        return clips[: self.args.clips], (time.perf_counter() - start) / len(clips)

    def restore(self, dense_steps: float) -> tuple[Tensor, Tensor]:
        """Held-out clips, and what is made of them after they were noised half-way."""
        steps = range(max(1, self.args.euler_steps // 2), 0, -1)
        pairs = []
        for clips, noises in self._batches():
            mixed = torch.lerp(clips, noises, steps[0] / self.args.euler_steps)
            pairs.append((clips, self._run(mixed, steps, dense_steps)))
        true, restored = (torch.cat(part)[: self.args.clips] for part in zip(*pairs, strict=True))
        return true, restored


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def compare(run: Path, args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Rows of one run's weights, and its samples by the way in which they were made."""
    model, facts = load(run, args)
    sampler = Sampler(model, facts, args)
    samples, rows = {}, []
    for name, dense_steps in SAMPLED.items():
        samples[name], seconds = sampler.sample(dense_steps)
        true, restored = sampler.restore(dense_steps)
        rows.append({
            "run": run.name, "trained": facts["attention"], "sampled": name, "dense_steps": dense_steps,
            "density": sampler.density, "seconds_per_clip": seconds,
            "psnr": psnr(samples[name], samples["dense"]).tolist(),
            "ssim": ssim(samples[name], samples["dense"]).tolist(),
            "restored_psnr": psnr(restored, true).tolist(), "restored_ssim": ssim(restored, true).tolist(),
        })  # fmt: skip
    return rows, samples


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def table(rows: list[dict[str, Any]]) -> Table:
    found = Table(title="the same noise, the same weights: dense against sparse; held-out clips restored")
    for column in (
        "weights trained", "sampled", "density", "PSNR to dense", "SSIM to dense", "restored PSNR", "restored SSIM",
        "s a clip",
    ):  # fmt: skip
        found.add_column(column, justify="right")
    for row in rows:
        itself = row["sampled"] == "dense"
        to_dense = ("", "") if itself else (f"{mean(row['psnr']):.2f} dB", f"{mean(row['ssim']):.4f}")
        found.add_row(
            f"{row['trained']} ({row['run']})", row["sampled"], "1" if itself else f"{row['density']:.3f}",
            *to_dense, f"{mean(row['restored_psnr']):.2f} dB", f"{mean(row['restored_ssim']):.4f}",
            f"{row['seconds_per_clip']:.2f}",
        )  # fmt: skip
    return found


def write_films(columns: dict[str, Tensor], out: Path, frames_per_second: int = 8) -> list[str]:
    """A film with a row for each clip and a column for each of ``columns``; returns what to tell about it."""
    try:
        import matplotlib
    except ImportError:
        return ["no film: install matplotlib for one"]
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.animation import FFMpegWriter, FuncAnimation, PillowWriter

    films = [((clips.clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 4, 1).cpu().numpy() for clips in columns.values()]
    count, frames, height, width = films[0].shape[:4]
    size = (2.2 * len(films), 2.2 * height / width * count + 0.4)  # inches
    figure, axes = plt.subplots(count, len(films), figsize=size, squeeze=False, layout="constrained")
    images = []
    for column, (title, film) in enumerate(zip(columns, films, strict=True)):
        axes[0, column].set_title(title, fontsize=7)
        for row in range(count):
            axes[row, column].axis("off")
            images.append((axes[row, column].imshow(film[row, 0], vmin=0, vmax=1), film[row]))

    def show(frame: int) -> list[Any]:
        for image, clip in images:
            image.set_data(clip[frame])
        return [image for image, _ in images]

    show(frames // 2)
    figure.savefig(out / "compare_videos.png")
    film = FuncAnimation(figure, show, frames=frames)
    film.save(out / "compare_videos.gif", writer=PillowWriter(fps=frames_per_second))
    told = [f"wrote {out / f'compare_videos.{kind}'}" for kind in ("png", "gif")]
    if FFMpegWriter.isAvailable():
        film.save(out / "compare_videos.mp4", writer=FFMpegWriter(fps=frames_per_second))
        told.append(f"wrote {out / 'compare_videos.mp4'}")
    else:
        told.append("no MP4: ffmpeg is not installed")
    plt.close(figure)
    return told


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "runs",
        type=Path,
        nargs="*",
        metavar="RUN",
        help="folders of train_video_dit.py; none: two tiny ones are trained",
    )
    add("--clips", type=int, default=4, help="clips that are compared")
    add("--batch", type=int, default=1, help="clips at a time")
    add("--euler-steps", type=int, default=20, help="steps from noise to a sample")
    add("--train-steps", type=int, default=60, help="of the tiny models")
    add("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    add("--out", type=Path, default=Path("runs") / "videos", help="folder for what is written")
    return parser.parse_args()


def main() -> None:
    args, console = arguments(), Console(width=None if sys.stdout.isatty() else 140)
    runs = args.runs or train_tiny(args, console)
    grids = {tuple(load_grid(run)) for run in runs}
    if len(grids) > 1:
        raise SystemExit(f"the runs are of different grids, {sorted(grids)}: their clips cannot be compared")
    rows: list[dict[str, Any]] = []
    columns: dict[str, Tensor] = {}
    for run in runs:
        found, samples = compare(run, args)
        rows += found
        trained = found[0]["trained"]
        for name, clips in samples.items():
            if trained == "dense" or name != "first 25 % dense":
                columns[f"{run.name}: trained {trained}\n{name}"] = clips
        torch.compiler.reset()
    console.print(table(rows))
    args.out.mkdir(parents=True, exist_ok=True)
    facts = {
        "device": torch.cuda.get_device_name() if args.device.type == "cuda" else "CPU", "torch": torch.__version__,
        "vmoba_compile": vmoba_compile.__version__, "euler_steps": args.euler_steps, "clips": args.clips, "rows": rows,
    }  # fmt: skip
    (args.out / "compare_videos.json").write_text(json.dumps(facts, indent=1) + "\n")
    for told in (f"wrote {args.out / 'compare_videos.json'}", *write_films(columns, args.out)):
        console.print(told, soft_wrap=True, highlight=False)


def load_grid(run: Path) -> list[int]:
    try:
        return json.loads((run / "run.json").read_text())["grid"]
    except FileNotFoundError:
        raise SystemExit(f"{run} holds no run: run.json is missing") from None


if __name__ == "__main__":
    main()
