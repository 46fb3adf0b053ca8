"""Attention over frames or over space alone: never over the whole video."""

from __future__ import annotations

import torch

from .common import BATCH, Pair, ready, video_latents, words


def latte() -> Pair:
    """Grid 3x4x6, factorised: transformer_blocks.{0,1}.attn1 (24 tokens of a frame), temporal_transformer_blocks.{0,1}.
    attn1 (3 frames); transformer_blocks.*.attn2 (cross, 7, float mask)."""
    from diffusers import LatteTransformer3DModel

    torch.manual_seed(0)
    model = ready(LatteTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=2,
        cross_attention_dim=24, attention_bias=True, sample_size=12, patch_size=2, norm_type="ada_norm_single",
        norm_elementwise_affine=False, caption_channels=16, video_length=3,
    ))  # fmt: skip
    return model, dict(
        hidden_states=video_latents(), timestep=torch.tensor([10, 700]), encoder_hidden_states=words(16),
    )  # fmt: skip


def transformer_temporal() -> Pair:
    """Input [6, 8, 4, 6], 3 frames: transformer_blocks.{0,1}.attn1 and .attn2 over 3 frames each; no patch embedding."""
    from diffusers import TransformerTemporalModel

    torch.manual_seed(0)
    model = ready(TransformerTemporalModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=8, num_layers=2, norm_num_groups=4
    ))  # fmt: skip
    return model, dict(hidden_states=torch.randn(6, 8, 4, 6), num_frames=3)


def unet_3d_condition() -> Pair:
    """Grid 3x8x12 and 3x4x6 halved, factorised: *.attentions.* (a frame's tokens; cross, 7), *.temp_attentions.* and
    transformer_in (3 frames)."""
    from diffusers import UNet3DConditionModel

    torch.manual_seed(0)
    model = ready(UNet3DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"), block_out_channels=(8, 16), layers_per_block=1,
        norm_num_groups=4, cross_attention_dim=16, attention_head_dim=4,
    ))  # fmt: skip
    return model, dict(sample=video_latents(), timestep=700, encoder_hidden_states=words(16))


def unet_motion() -> Pair:
    """AnimateDiff, grid 3x8x12 and 3x4x6, factorised: *.attentions.* (a frame's tokens; cross, 7), *.motion_modules.* (3
    frames, twice)."""
    from diffusers import UNetMotionModel

    torch.manual_seed(0)
    model = ready(UNetMotionModel(
        sample_size=8, in_channels=4, out_channels=4,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"), block_out_channels=(8, 16), layers_per_block=1,
        norm_num_groups=4, cross_attention_dim=16, num_attention_heads=2, motion_num_attention_heads=2,
    ))  # fmt: skip
    return model, dict(sample=video_latents(), timestep=700, encoder_hidden_states=words(16, batch=3 * BATCH))


def sparse_controlnet() -> Pair:
    """AnimateDiff's sparse control net, grid 3x8x12, factorised: *.attentions.* (a frame's tokens; cross, 7),
    *.motion_modules.* (3 frames)."""
    from diffusers import SparseControlNetModel

    torch.manual_seed(0)
    model = ready(SparseControlNetModel(
        in_channels=4, conditioning_channels=4, down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16, num_attention_heads=2,
        attention_head_dim=2, motion_num_attention_heads=2,
    ))  # fmt: skip
    return model, dict(
        sample=video_latents(), timestep=700, encoder_hidden_states=words(16, batch=3 * BATCH),
        controlnet_cond=video_latents(), conditioning_mask=torch.ones(BATCH, 1, 3, 8, 12),
    )  # fmt: skip
