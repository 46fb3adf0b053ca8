"""LTX-Video 1 and 2."""

from __future__ import annotations

from typing import Any

import torch

from .common import BATCH, GRID, TOKENS, Pair, padding, ready, words

_LTX = dict(
    in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24, num_layers=3,
    caption_channels=16,
)  # fmt: skip


def _coords(per: int = 1) -> torch.Tensor:
    """(frame, row, column) of every token in raster order, [batch, 3, tokens]."""
    axes = torch.meshgrid(*(torch.arange(extent, dtype=torch.float32) for extent in GRID), indexing="ij")
    return torch.stack(axes).flatten(1)[None].repeat(BATCH, 1, 1) * per


def ltx() -> Pair:
    """Packed latents [2, 72, 8], grid given as numbers: 3x4x6, 0, 0. Full: transformer_blocks.{0..2}.attn1. Others:
    transformer_blocks.*.attn2 (cross, 7 text, float mask)."""
    from diffusers import LTXVideoTransformer3DModel

    torch.manual_seed(0)
    model = ready(LTXVideoTransformer3DModel(**_LTX))
    return model, dict(
        hidden_states=torch.randn(BATCH, TOKENS, 8), encoder_hidden_states=words(16),
        timestep=torch.tensor([10, 700]), encoder_attention_mask=padding(), num_frames=3, height=4, width=6,
        rope_interpolation_scale=(8 / 25, 32, 32),
    )  # fmt: skip


def ltx_video_coords() -> Pair:
    """As ltx, coordinates given as a tensor [2, 3, 72] and a timestep per token (image conditioning): 3x4x6, 0, 0."""
    model, inputs = ltx()
    for name in ("num_frames", "height", "width", "rope_interpolation_scale"):
        del inputs[name]
    timestep = torch.full((BATCH, TOKENS), 700)
    timestep[:, :24] = 0
    return model, inputs | dict(video_coords=_coords(), timestep=timestep)


_LTX2 = dict(
    in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24,
    audio_in_channels=6, audio_out_channels=6, audio_num_attention_heads=2, audio_attention_head_dim=8,
    audio_cross_attention_dim=16, num_layers=2, caption_channels=16,
)  # fmt: skip


def _ltx2_inputs() -> dict[str, Any]:
    return dict(
        hidden_states=torch.randn(BATCH, TOKENS, 8), audio_hidden_states=torch.randn(BATCH, 5, 6),
        encoder_hidden_states=words(16), audio_encoder_hidden_states=words(16), timestep=torch.tensor([10, 700]),
        encoder_attention_mask=padding(), audio_encoder_attention_mask=padding(), num_frames=3, height=4, width=6, fps=25.0,
        audio_num_frames=5,
    )  # fmt: skip


def ltx2() -> Pair:
    """Packed [2, 72, 8]: 3x4x6, 0, 0. Full: transformer_blocks.{0,1}.attn1. Others a block: audio_attn1 (5 audio
    tokens), attn2 and audio_attn2 (7 text, float mask), audio_to_video_attn, video_to_audio_attn."""
    from diffusers import LTX2VideoTransformer3DModel

    torch.manual_seed(0)
    return ready(LTX2VideoTransformer3DModel(**_LTX2)), _ltx2_inputs()


def ltx2_3() -> Pair:
    """LTX 2.3: gated, modulated prompts, split rotary, perturbed attention in block 1: 3x4x6, 0, 0. Full:
    transformer_blocks.*.attn1. Others as ltx2. Coordinates given as a tensor [2, 3, 72, 2]."""
    from diffusers import LTX2VideoTransformer3DModel

    torch.manual_seed(0)
    model = ready(LTX2VideoTransformer3DModel(**_LTX2, gated_attn=True, cross_attn_mod=True, audio_gated_attn=True,
        audio_cross_attn_mod=True, rope_type="split", perturbed_attn=True))  # fmt: skip
    inputs = _ltx2_inputs()
    for name in ("num_frames", "height", "width"):
        del inputs[name]
    coords = _coords()
    return model, inputs | dict(
        video_coords=torch.stack([coords, coords + 1], dim=-1), sigma=torch.tensor([0.1, 0.7]),
        spatio_temporal_guidance_blocks=[1], perturbation_mask=torch.tensor([1.0, 0.0]), use_cross_timestep=True,
    )  # fmt: skip


def ltx2_self_mask() -> Pair:
    """As ltx2 with a float mask over pairs of video tokens ([4, 72, 72], heads repeated) on transformer_blocks.*.attn1:
    a masked self-attention, not all to all."""
    model, inputs = ltx2()
    mask = torch.ones(BATCH, TOKENS, TOKENS)
    mask[:, :24, 24:] = 0
    return model, inputs | dict(video_self_attention_mask=mask)
