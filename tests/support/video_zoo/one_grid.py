"""Mochi, Allegro and EasyAnimate."""

from __future__ import annotations

import torch

from .common import BATCH, GRID, TEXT, Pair, padding, ready, video_latents, words


def _mochi(batch: int) -> Pair:
    from diffusers import MochiTransformer3DModel

    torch.manual_seed(0)
    model = ready(MochiTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=3, pooled_projection_dim=16,
        in_channels=4, text_embed_dim=16, time_embed_dim=8, max_sequence_length=TEXT,
    ))  # fmt: skip
    return model, dict(
        hidden_states=video_latents(batch=batch), encoder_hidden_states=words(16, batch=batch),
        timestep=torch.tensor([10, 700])[:batch], encoder_attention_mask=padding(torch.bool, batch=batch),
    )  # fmt: skip


def mochi() -> Pair:
    """3x4x6, prefix 0, suffix the valid text (5 and 4 tokens): one attention a sample, text picked by nonzero(). Full:
    transformer_blocks.{0..2}.attn1, twice each. Others: time_embed.pooler (one query, 8 keys)."""
    return _mochi(BATCH)


def mochi_batch_1() -> Pair:
    """As mochi for one sample: 3x4x6, prefix 0, suffix 5 (a size that depends on the mask)."""
    return _mochi(1)


def _allegro(masked: bool) -> Pair:
    from diffusers import AllegroTransformer3DModel
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    torch.manual_seed(0)
    model = ready(AllegroTransformer3DModel(
        patch_size=2, patch_size_t=1, num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
        num_layers=3, cross_attention_dim=24, sample_height=8, sample_width=12, sample_frames=3, caption_channels=16,
    ))  # fmt: skip
    *freqs, _, _, _ = get_3d_rotary_pos_embed_allegro(12, ((0, 0), (4, 6)), (4, 6), 3, (1.0, 1.0, 1.0))
    axes = torch.meshgrid(*(torch.arange(extent) for extent in GRID), indexing="ij")
    positions = tuple(axis.reshape(1, -1).contiguous() for axis in axes)
    inputs = dict(
        hidden_states=video_latents(), encoder_hidden_states=words(16), timestep=torch.tensor([10, 700]),
        encoder_attention_mask=padding(), image_rotary_emb=(tuple(freqs), positions),
    )  # fmt: skip
    if masked:
        mask = torch.ones(BATCH, 3, 8, 12)
        mask[1, 2:] = 0
        inputs["attention_mask"] = mask
    return model, inputs


def allegro() -> Pair:
    """3x4x6, 0, 0. Full: transformer_blocks.{0..2}.attn1. Others: transformer_blocks.*.attn2 (cross, 7, float mask)."""
    return _allegro(masked=False)


def allegro_masked() -> Pair:
    """As allegro with the last frame of one sample masked: float mask [2,2,1,72] over keys alone on attn1."""
    return _allegro(masked=True)


def easyanimate() -> Pair:
    """3x4x6, prefix 12 (7 text, 5 T5), suffix 0; rotary written into slices in place. Full:
    transformer_blocks.{0..2}.attn1 (the last without projections for the text). No other attention."""
    from diffusers import EasyAnimateTransformer3DModel

    torch.manual_seed(0)
    model = ready(EasyAnimateTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, patch_size=2, num_layers=3,
        mmdit_layers=2, time_embed_dim=8, text_embed_dim=16, text_embed_dim_t5=10,
    ))  # fmt: skip
    return model, dict(
        hidden_states=video_latents(), timestep=torch.tensor([10.0, 700.0]), encoder_hidden_states=words(16),
        encoder_hidden_states_t5=words(10, 5),
    )  # fmt: skip
