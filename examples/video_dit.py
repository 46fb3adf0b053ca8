"""What train_video_dit.py trains: a small video diffusion transformer in ordinary PyTorch, and the clips that it learns.

Nothing here names VMoBA.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Triple = tuple[int, int, int]


def box(x: Tensor, y: Tensor, half_width: float, half_height: float) -> Tensor:
    return torch.maximum(x.abs() - half_width, y.abs() - half_height)


# Distance to the outline in radii, negative inside; near enough to the true one for anti-aliasing.
SHAPES: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    lambda x, y: torch.hypot(x, y) - 1,  # disc
    lambda x, y: (torch.hypot(x, y) - 0.75).abs() - 0.25,  # ring
    lambda x, y: box(x, y, 0.8, 0.8),  # square
    lambda x, y: torch.maximum(y, 0.866 * x.abs() - 0.5 * y) - 0.5,  # triangle
    lambda x, y: torch.minimum(box(x, y, 0.95, 0.3), box(x, y, 0.3, 0.95)),  # cross
    lambda x, y: box(x, y, 0.95, 0.3),  # bar
)


def bounce(place: Tensor, low: float, high: float) -> Tensor:
    """Fold a straight path into [low, high], as if it were reflected at both ends."""
    return high - (torch.remainder(place - low, 2 * (high - low)) - (high - low)).abs()


def draw_clip(random: torch.Generator, grid: Triple, device: torch.device) -> Tensor:
    """Glyphs that move, turn, bounce off the borders and hide each other: [3, T, 2H, 2W] in [-1, 1]."""
    frames, height, width = grid[0], 2 * grid[1], 2 * grid[2]
    frame = torch.arange(frames, device=device)[:, None, None]
    row = torch.arange(height, device=device)[:, None] + 0.5
    column = torch.arange(width, device=device) + 0.5
    background, first_hue, count = torch.rand(3, generator=random).tolist()
    clip = torch.full((3, frames, height, width), 0.3 * background - 1, device=device)
    count = 2 + int(3 * count)
    for number in range(count):
        shape, size, x, y, heading, speed, angle, spin = torch.rand(8, generator=random).tolist()
        radius = (0.14 + 0.12 * size) * min(height, width)
        step = (0.02 + 0.05 * speed) * min(height, width)
        start = radius + x * (width - 2 * radius), radius + y * (height - 2 * radius)
        across = column - bounce(start[0] + step * math.cos(math.tau * heading) * frame, radius, width - radius)
        down = row - bounce(start[1] + step * math.sin(math.tau * heading) * frame, radius, height - radius)
        turn = math.tau * angle + 0.4 * (spin - 0.5) * frame
        x_turned = (across * turn.cos() + down * turn.sin()) / radius
        y_turned = (down * turn.cos() - across * turn.sin()) / radius
        cover = (0.5 - radius * SHAPES[int(len(SHAPES) * shape)](x_turned, y_turned)).clamp(0, 1)
        colour = torch.tensor(colorsys.hsv_to_rgb((first_hue + number / count) % 1, 0.85, 1.0), device=device) * 2 - 1
        clip = torch.lerp(clip, colour[:, None, None, None].expand_as(clip), cover)
    return clip


def waves(place: Tensor, width: int, longest: float = 1e4) -> Tensor:
    """Sines and cosines of ``place`` [N] at falling frequencies: [N, width], zeros at the end where width is odd."""
    angles = place[:, None] * longest ** -torch.linspace(0, 1, width // 2, device=place.device)
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, width % 2))


def positions(grid: Triple, width: int) -> Tensor:
    """Sines and cosines of every token's frame, row and column, a third of the width each: [N, width]."""
    places = torch.meshgrid(*(torch.arange(size).float() for size in grid), indexing="ij")
    widths = (width - 2 * (width // 3), width // 3, width // 3)
    return torch.cat([waves(p.flatten(), w, longest=100.0) for p, w in zip(places, widths, strict=True)], dim=1)


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = nn.RMSNorm(width // heads), nn.RMSNorm(width // heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(6, -1)
        y = self.norm1(x) * (1 + scale1) + shift1
        q, k, v = self.qkv(y).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        y = self.attend(self.q_norm(q), self.k_norm(k), v)
        x = x + gate1 * self.out(y.transpose(1, 2).flatten(2))
        y = self.norm2(x) * (1 + scale2) + shift2
        return x + gate2 * self.mlp(y)


class VideoTransformer(nn.Module):
    """Predicts the velocity, noise minus clip, from a noisy clip and its time."""

    def __init__(self, grid: Triple, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.width = width
        self.patch = nn.Conv3d(3, width, (1, 2, 2), (1, 2, 2))
        self.register_buffer("position", positions(grid, width), persistent=False)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.unpatch = nn.Linear(width, 3 * 2 * 2)
        # Every block starts as the identity, and the model at zero velocity.
        for layer in (self.unpatch, self.modulation[1], *(block.modulation[1] for block in self.blocks)):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def run_blocks(self, x: Tensor, condition: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, condition)
        return x

    def forward(self, video: Tensor, time: Tensor) -> Tensor:
        patches = self.patch(video)
        x = patches.flatten(2).transpose(1, 2) + self.position
        condition = self.time(waves(1000 * time, self.width))
        x = self.run_blocks(x, condition)
        shift, scale = self.modulation(condition)[:, None].chunk(2, -1)
        x = self.unpatch(self.norm(x) * (1 + scale) + shift)
        x = x.unflatten(1, patches.shape[2:]).unflatten(-1, (3, 2, 2))  # [B, T, H, W, 3, 2, 2]
        return x.permute(0, 4, 1, 2, 5, 3, 6).flatten(5).flatten(3, 4)
