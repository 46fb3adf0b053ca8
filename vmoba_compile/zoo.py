"""Known video transformers of diffusers by name: their published shapes, random weights, inputs for a token grid.

For the command line, the demo, the benchmarks and the tests. The rewrite itself knows no model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .kernels.partition import Triple

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Preset:
    """One model: its diffusers class, what its configuration overrides, and how inputs for a token grid are made."""

    class_name: str
    inputs: Callable[[Mapping[str, Any], Triple, int], Inputs]
    grid: Triple = (21, 30, 52)
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def build(
        self,
        *,
        grid: Triple | None = None,
        batch: int = 1,
        device: torch.device | str = "meta",
        dtype: torch.dtype = torch.float32,
        as_loaded: bool = False,
        **overrides: Any,
    ) -> tuple[nn.Module, Inputs]:
        """The model with random weights, and its forward's keyword arguments for ``grid`` tokens (after patching).

        Weights are made on ``device`` in ``dtype``, with no copy in another. ``as_loaded`` leaves in float32 what
        ``from_pretrained(torch_dtype=dtype)`` and diffusers' pipelines do: tables, and modules that the class names.

        Raises:
            ImportError: diffusers is not installed.
        """
        try:
            import diffusers
        except ImportError as error:
            raise ImportError("the named models are diffusers'; pip install 'vmoba_compile[diffusers]'") from error
        with torch.device(device):
            with default_dtype(dtype):
                model = getattr(diffusers, self.class_name)(**{**self.overrides, **overrides})
            inputs = self.inputs(model.config, grid or self.grid, batch)

        def cast(x: Any) -> Any:
            return x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x

        if dtype != torch.float32 and as_loaded:
            keep = set(model._keep_in_fp32_modules or ())
            for name, parameter in model.named_parameters():
                if keep.intersection(name.split(".")):
                    parameter.data = parameter.data.float()
            inputs = {name: cast(value) for name, value in inputs.items()}  # rotary tables, in tuples, stay
        elif dtype != torch.float32:
            model = model.to(dtype)
            inputs = torch.utils._pytree.tree_map(cast, inputs)
        return model, inputs


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """What tensors that name no dtype are made in."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _wan_inputs(config: Mapping[str, Any], grid: Triple, batch: int) -> Inputs:
    latent = [extent * patch for extent, patch in zip(grid, config["patch_size"], strict=True)]
    return {
        "hidden_states": torch.randn(batch, config["in_channels"], *latent),
        "timestep": torch.randint(0, 1000, (batch,)),
        "encoder_hidden_states": torch.randn(batch, 512, config["text_dim"]),
    }


def _cogvideox_inputs(config: Mapping[str, Any], grid: Triple, batch: int) -> Inputs:
    frames, rows, columns = grid
    patch, tokens = config["patch_size"], frames * rows * columns
    frames *= config["patch_size_t"] or 1
    inputs: Inputs = {
        "hidden_states": torch.randn(batch, frames, config["in_channels"], rows * patch, columns * patch),
        "timestep": torch.randint(0, 1000, (batch,)),
        "encoder_hidden_states": torch.randn(batch, config["max_text_seq_length"], config["text_embed_dim"]),
    }
    if config["use_rotary_positional_embeddings"]:
        head_dim = config["attention_head_dim"]
        inputs["image_rotary_emb"] = (torch.randn(tokens, head_dim), torch.randn(tokens, head_dim))
    return inputs


def _hunyuan_inputs(config: Mapping[str, Any], grid: Triple, batch: int) -> Inputs:
    frames, rows, columns = grid
    patch, text = config["patch_size"], 256
    inputs: Inputs = {
        "hidden_states": torch.randn(
            batch, config["in_channels"], frames * config["patch_size_t"], rows * patch, columns * patch
        ),
        "timestep": torch.randint(0, 1000, (batch,)),
        "encoder_hidden_states": torch.randn(batch, text, config["text_embed_dim"]),
        "encoder_attention_mask": (torch.arange(text) < text - 56).float().expand(batch, text),
        "pooled_projections": torch.randn(batch, config["pooled_projection_dim"]),
    }
    if config["guidance_embeds"]:
        inputs["guidance"] = torch.full((batch,), 6000.0)
    return inputs


_TINY_WAN = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16,
    "freq_dim": 32, "ffn_dim": 32, "num_layers": 3, "rope_max_seq_len": 32,
}  # fmt: skip
_TINY_COGVIDEOX = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "time_embed_dim": 8,
    "text_embed_dim": 8, "num_layers": 3, "sample_width": 16, "sample_height": 16, "sample_frames": 9, "patch_size": 2,
    "max_text_seq_length": 8, "use_rotary_positional_embeddings": True,
}  # fmt: skip
_TINY_HUNYUAN = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 10, "num_layers": 2,
    "num_single_layers": 2, "num_refiner_layers": 1, "patch_size": 1, "patch_size_t": 1, "guidance_embeds": True,
    "text_embed_dim": 16, "pooled_projection_dim": 8, "rope_axes_dim": (2, 4, 4),
}  # fmt: skip

PRESETS: Mapping[str, Preset] = {
    "wan2.1-1.3b": Preset(
        "WanTransformer3DModel",
        _wan_inputs,
        overrides={"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30},
    ),
    "wan2.1-14b": Preset("WanTransformer3DModel", _wan_inputs, grid=(21, 45, 80)),
    "hunyuanvideo": Preset(
        "HunyuanVideoTransformer3DModel", _hunyuan_inputs, grid=(33, 45, 80), overrides={"guidance_embeds": True}
    ),
    "cogvideox-5b": Preset(
        "CogVideoXTransformer3DModel",
        _cogvideox_inputs,
        grid=(13, 30, 45),
        overrides={"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True},
    ),
    "cogvideox1.5-5b": Preset(
        "CogVideoXTransformer3DModel",
        _cogvideox_inputs,
        grid=(11, 48, 85),
        overrides={
            "num_attention_heads": 48,
            "num_layers": 42,
            "patch_size_t": 2,
            "patch_bias": False,
            "use_rotary_positional_embeddings": True,
        },
    ),
    "tiny-wan": Preset("WanTransformer3DModel", _wan_inputs, (4, 6, 8), _TINY_WAN),
    "tiny-cogvideox": Preset("CogVideoXTransformer3DModel", _cogvideox_inputs, (3, 8, 8), _TINY_COGVIDEOX),
    "tiny-cogvideox1.5": Preset(
        "CogVideoXTransformer3DModel",
        _cogvideox_inputs,
        (3, 8, 8),
        {**_TINY_COGVIDEOX, "patch_size_t": 2, "patch_bias": False},
    ),
    "tiny-hunyuanvideo": Preset("HunyuanVideoTransformer3DModel", _hunyuan_inputs, (3, 6, 8), _TINY_HUNYUAN),
}


def preset(name: str) -> Preset:
    """The preset of that name. Raises ValueError that lists the names there are."""
    try:
        return PRESETS[name]
    except KeyError:
        raise ValueError(f"unknown model {name!r}; the models are {', '.join(PRESETS)}") from None
