"""Tiny diffusers models, and the same models with their video self-attention computed by the oracle."""

from __future__ import annotations

import copy
import functools
import os
import shutil
from collections.abc import Callable
from typing import Any
from unittest import mock

import oracle
import pytest
import torch
from torch import Tensor, nn

from vmoba_compile import VMoBAConfig
from vmoba_compile.zoo import PRESETS

# Blocks that leave ragged boxes on the tiny grids, and something to choose.
CONFIG = VMoBAConfig(
    min_tokens=0,
    threshold=0.3,
    blocks={"1d": (2, None, None), "2d": (None, 4, 3), "3d": (2, 3, 4)},
)
BLOCKS = {"1d": (2, 99, 99), "2d": (99, 4, 3), "3d": (2, 3, 4)}
SCHEMES = ("1d", "2d", "3d")

TINY = {
    # name: (preset, video self-attentions in execution order, grid, prefix, suffix, attentions left dense and why)
    "wan": ("tiny-wan", [f"blocks.{i}.attn1" for i in range(3)], (4, 6, 8), 0, 0, {"cross_attention": 3}),
    "cogvideox": ("tiny-cogvideox", [f"transformer_blocks.{i}.attn1" for i in range(3)], (3, 8, 8), 8, 0, {}),
    "hunyuanvideo": (
        "tiny-hunyuanvideo",
        [f"transformer_blocks.{i}.attn" for i in range(2)] + [f"single_transformer_blocks.{i}.attn" for i in range(2)],
        (3, 6, 8),
        0,
        256,
        {"not_video": 1},
    ),
}


def build(name: str, batch: int = 2, **overrides: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A tiny model whose weights are large enough for the selection to matter, and its inputs."""
    model, inputs = PRESETS[TINY[name][0]].build(device="cpu", batch=batch, **overrides)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2).add_(torch.randn_like(parameter), alpha=0.02)
    return model, inputs


def expected_block(layer: int, grid: tuple[int, int, int]) -> tuple[int, ...]:
    return tuple(min(size, extent) for size, extent in zip(BLOCKS[SCHEMES[layer % 3]], grid, strict=True))


def with_oracle(name: str, model: nn.Module, threshold: float = CONFIG.threshold) -> nn.Module:
    """A copy of the model whose processors hand the video self-attention to the oracle."""
    _, paths, grid, prefix, suffix, _ = TINY[name]
    replaced = copy.deepcopy(model)
    processors = dict(replaced.attn_processors)
    for layer, path in enumerate(paths):
        inner = processors[f"{path}.processor"]

        def sdpa(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *, _layer: int = layer, **_: Any):
            key_mask = None if attn_mask is None else attn_mask[:, 0, 0].expand(q.shape[0], -1)
            out = oracle.attention(
                q, k, v, grid, expected_block(_layer, grid), prefix=prefix, suffix=suffix, key_mask=key_mask,
                threshold=threshold,
            )  # fmt: skip
            out = out[0] if isinstance(out, tuple) else out
            return out.to(q.dtype)

        processors[f"{path}.processor"] = _Patched(inner, sdpa)
    replaced.set_attn_processor(processors)
    return replaced


class _Patched:
    """An attention processor whose softmax attention is another function."""

    def __init__(self, inner: Callable[..., Any], sdpa: Callable[..., Tensor]) -> None:
        self.inner = inner
        self.sdpa = sdpa

        # diffusers passes only the arguments that it finds in a processor's signature.
        self.__class__ = type(
            "Patched", (_Patched,), {"__call__": functools.wraps(type(inner).__call__)(_Patched._run)}
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        def call(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **rest: Any) -> Tensor:
            return self.sdpa(query, key, value, attn_mask, **rest)

        with mock.patch("torch.nn.functional.scaled_dot_product_attention", call):
            return self.inner(*args, **kwargs)


needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None and shutil.which("clang++") is None,
    reason="Inductor needs a C++ compiler on a CPU",
)


def relative(a: Tensor, b: Tensor) -> float:
    """Relative error in the 2-norm."""
    return float((a - b).norm() / b.norm().clamp(min=1e-12))
