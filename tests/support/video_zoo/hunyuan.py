"""HunyuanVideo, 1.5 and FramePack."""

from __future__ import annotations

from typing import Any

import torch

from .common import BATCH, Pair, padding, ready, video_latents, words

_HUNYUAN = dict(
    in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2, num_single_layers=2,
    num_refiner_layers=1, patch_size=2, patch_size_t=1, text_embed_dim=16, pooled_projection_dim=8,
    rope_axes_dim=(4, 4, 4),
)  # fmt: skip


def _hunyuan_inputs() -> dict[str, Any]:
    return dict(
        hidden_states=video_latents(), timestep=torch.tensor([10, 700]), encoder_hidden_states=words(16),
        encoder_attention_mask=padding(), pooled_projections=torch.randn(BATCH, 8),
    )  # fmt: skip


def hunyuan_video() -> Pair:
    """3x4x6, prefix 0, suffix 7, bool key mask [2,1,1,79]. Full: transformer_blocks.{0,1}.attn,
    single_transformer_blocks.{0,1}.attn. Others: context_embedder...attn (text alone, bool mask [2,1,7,7])."""
    from diffusers import HunyuanVideoTransformer3DModel

    torch.manual_seed(0)
    model = ready(HunyuanVideoTransformer3DModel(**_HUNYUAN | dict(guidance_embeds=True)))
    return model, _hunyuan_inputs() | dict(guidance=torch.tensor([6000.0, 5000.0]))


def hunyuan_video_i2v_token_replace() -> Pair:
    """As hunyuan_video (3x4x6, 0, 7, key mask), with the first frame's 24 tokens modulated apart: cut and joined again
    in every block. Full: transformer_blocks.*.attn, single_transformer_blocks.*.attn. Others: text refiner."""
    from diffusers import HunyuanVideoTransformer3DModel

    torch.manual_seed(0)
    model = ready(
        HunyuanVideoTransformer3DModel(**_HUNYUAN | dict(guidance_embeds=False, image_condition_type="token_replace"))
    )
    return model, _hunyuan_inputs()


def hunyuan_video_i2v_latent_concat() -> Pair:
    """As hunyuan_video without guidance, more input channels: 3x4x6, 0, 7, key mask. Full: both kinds of blocks' attn."""
    from diffusers import HunyuanVideoTransformer3DModel

    torch.manual_seed(0)
    model = ready(HunyuanVideoTransformer3DModel(
        **_HUNYUAN | dict(in_channels=9, guidance_embeds=False, image_condition_type="latent_concat")
    ))  # fmt: skip
    return model, _hunyuan_inputs() | dict(hidden_states=video_latents(9))


def _hunyuan_video_15(image: bool) -> Pair:
    from diffusers import HunyuanVideo15Transformer3DModel

    torch.manual_seed(0)
    model = ready(HunyuanVideo15Transformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2,
        num_refiner_layers=1, patch_size=1, patch_size_t=1, text_embed_dim=16, text_embed_2_dim=10, image_embed_dim=8,
        rope_axes_dim=(4, 4, 4), task_type="i2v" if image else "t2v",
    ))  # fmt: skip
    return model, dict(
        hidden_states=video_latents(4, 3, 4, 6), timestep=torch.tensor([10.0, 700.0]), encoder_hidden_states=words(16),
        encoder_attention_mask=padding(), encoder_hidden_states_2=words(10, 5),
        encoder_attention_mask_2=padding(length=5, cut=1),
        image_embeds=torch.randn(BATCH, 3, 8) if image else torch.zeros(BATCH, 3, 8),
    )  # fmt: skip


def hunyuan_video_15_t2v() -> Pair:
    """3x4x6, prefix 0, suffix 15 (7 text, 5 glyph, 3 image). Bool mask [2,1,87,87]: keys and queries masked alike. Full:
    transformer_blocks.{0,1}.attn. Others: context_embedder...attn (text alone)."""
    return _hunyuan_video_15(image=False)


def _framepack(batch: int) -> Pair:
    from diffusers import HunyuanVideoFramepackTransformer3DModel

    torch.manual_seed(0)
    model = ready(HunyuanVideoFramepackTransformer3DModel(
        **_HUNYUAN | dict(guidance_embeds=True, has_image_proj=True, image_proj_dim=10, has_clean_x_embedder=True)
    ))  # fmt: skip
    return model, dict(
        hidden_states=video_latents(batch=batch), timestep=torch.tensor([10, 700])[:batch],
        encoder_hidden_states=words(16, batch=batch), encoder_attention_mask=padding(torch.long, batch=batch),
        pooled_projections=torch.randn(batch, 8), image_embeds=words(10, 5, batch),
        indices_latents=torch.arange(8, 11), guidance=torch.full((batch,), 6000.0),
        latents_clean=video_latents(4, 2, batch=batch), indices_latents_clean=torch.tensor([0, 7]),
        latents_history_2x=video_latents(4, 2, batch=batch), indices_latents_history_2x=torch.tensor([5, 6]),
        latents_history_4x=video_latents(4, 4, batch=batch), indices_latents_history_4x=torch.arange(1, 5),
    )  # fmt: skip


def hunyuan_video_framepack() -> Pair:
    """Four grids: 1x1x2, 1x2x3, 2x4x6 (history), then 3x4x6: prefix 56; suffix 12 (5 image, 7 text); bool key mask
    [2,1,1,140]. Full: transformer_blocks.{0,1}.attn, single_transformer_blocks.{0,1}.attn. Others: text refiner."""
    return _framepack(BATCH)


def hunyuan_video_framepack_batch_1() -> Pair:
    """As above for one sample: no mask, the text is cut to its 5 tokens by a tensor's value: suffix 10, prefix 56."""
    return _framepack(1)
