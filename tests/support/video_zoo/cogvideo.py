"""CogVideoX 1.0 and 1.5, ConsisID."""

from __future__ import annotations

from typing import Any

import torch

from .common import BATCH, TEXT, Pair, ready, rotary, words

_COGVIDEOX = dict(
    num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=16,
    num_layers=3, sample_width=12, sample_height=8, sample_frames=9, patch_size=2, max_text_seq_length=TEXT,
)  # fmt: skip


def _cogvideox_inputs(frames: int = 3, channels: int = 4) -> dict[str, Any]:
    return dict(
        hidden_states=torch.randn(BATCH, frames, channels, 8, 12), encoder_hidden_states=words(16),
        timestep=torch.tensor([10, 700]),
    )  # fmt: skip


def cogvideox() -> Pair:
    """CogVideoX 5B, rotary: 3x4x6, prefix 7, suffix 0. Full: transformer_blocks.{0..2}.attn1. No other attention."""
    from diffusers import CogVideoXTransformer3DModel

    torch.manual_seed(0)
    model = ready(CogVideoXTransformer3DModel(**_COGVIDEOX, use_rotary_positional_embeddings=True))
    return model, _cogvideox_inputs() | dict(image_rotary_emb=rotary())


def cogvideox_sincos() -> Pair:
    """CogVideoX 2B, sines and cosines added: 3x4x6, prefix 7, suffix 0. Full: transformer_blocks.*.attn1."""
    from diffusers import CogVideoXTransformer3DModel

    torch.manual_seed(0)
    model = ready(CogVideoXTransformer3DModel(**_COGVIDEOX))
    return model, _cogvideox_inputs()


def cogvideox_i2v() -> Pair:
    """CogVideoX 5B I2V, a learned position for all 79 tokens: 3x4x6, prefix 7, suffix 0. transformer_blocks.*.attn1."""
    from diffusers import CogVideoXTransformer3DModel

    torch.manual_seed(0)
    model = ready(CogVideoXTransformer3DModel(**_COGVIDEOX | dict(
        in_channels=8, use_rotary_positional_embeddings=True, use_learned_positional_embeddings=True
    )))  # fmt: skip
    return model, _cogvideox_inputs(channels=8) | dict(image_rotary_emb=rotary())


def cogvideox_1_5() -> Pair:
    """CogVideoX 1.5, patches of two frames through a linear layer (reshape, permute): 3x4x6, prefix 7, suffix 0. Full:
    transformer_blocks.{0..2}.attn1. No other attention."""
    from diffusers import CogVideoXTransformer3DModel

    torch.manual_seed(0)
    model = ready(CogVideoXTransformer3DModel(
        **_COGVIDEOX, patch_size_t=2, ofs_embed_dim=8, patch_bias=False, use_rotary_positional_embeddings=True
    ))  # fmt: skip
    return model, _cogvideox_inputs(6) | dict(ofs=torch.full((1,), 2.0), image_rotary_emb=rotary())


def consisid() -> Pair:
    """3x4x6, prefix 7, suffix 0. Full: transformer_blocks.{0..3}.attn1. Others, written out by hand:
    local_facial_extractor (perceiver), perceiver_cross_attention.{0,1} (video to 5 identity tokens)."""
    from diffusers import ConsisIDTransformer3DModel

    torch.manual_seed(0)
    model = ready(ConsisIDTransformer3DModel(**_COGVIDEOX | dict(
        num_attention_heads=3, num_layers=4, use_rotary_positional_embeddings=True, is_train_face=True,
        cross_attn_interval=2, cross_attn_dim_head=8, cross_attn_num_heads=2, LFE_id_dim=8, LFE_vit_dim=8, LFE_depth=2,
        LFE_dim_head=4, LFE_num_heads=2, LFE_num_id_token=2, LFE_num_querie=5, LFE_output_dim=32, LFE_ff_mult=1,
        LFE_num_scale=2,
    )))  # fmt: skip
    return model, _cogvideox_inputs() | dict(
        image_rotary_emb=rotary(), id_cond=torch.randn(BATCH, 8), id_vit_hidden=[torch.randn(BATCH, 9, 8)] * 2
    )
