"""What the tiny models share: sizes, inputs, weights away from zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

Pair = tuple[nn.Module, dict[str, Any]]

GRID = (3, 4, 6)
TOKENS = 72
TEXT = 7
BATCH = 2


def ready(model: nn.Module) -> nn.Module:
    """Weights away from zero everywhere (several classes start with zeros, which would hide an attention)."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model.eval()


def words(width: int, length: int = TEXT, batch: int = BATCH) -> torch.Tensor:
    return torch.randn(batch, length, width)


def padding(dtype: torch.dtype = torch.float32, length: int = TEXT, batch: int = BATCH, cut: int = 2) -> torch.Tensor:
    """Ones, and zeros at the end: ``cut`` in the first sample, one more in each further sample."""
    mask = torch.ones(batch, length, dtype=dtype)
    for row in range(batch):
        mask[row, length - cut - row :] = 0
    return mask


def video_latents(
    channels: int = 4, frames: int = 3, rows: int = 8, columns: int = 12, batch: int = BATCH
) -> torch.Tensor:
    return torch.randn(batch, channels, frames, rows, columns)


def rotary(tokens: int = TOKENS, width: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.rand(tokens, width // 2).repeat_interleave(2, dim=1)
    return angles.cos(), angles.sin()
