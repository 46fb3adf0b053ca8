"""Kandinsky 5 and 6."""

from __future__ import annotations

import torch

from .common import BATCH, GRID, TEXT, Pair, padding, ready, words


def _kandinsky_5(fractal: bool) -> Pair:
    from diffusers import Kandinsky5Transformer3DModel

    torch.manual_seed(0)
    axes = (8, 4, 4) if fractal else (4, 4, 4)
    model = ready(Kandinsky5Transformer3DModel(
        in_visual_dim=4, in_text_dim=16, in_text_dim2=8, time_dim=8, out_visual_dim=4, patch_size=(1, 2, 2),
        model_dim=2 * sum(axes), ff_dim=32, num_text_blocks=1, num_visual_blocks=3, axes_dims=axes,
        visual_cond=not fractal,
    ))  # fmt: skip
    grid = (3, 8, 16) if fractal else GRID
    frames, rows, columns = grid
    inputs = dict(
        hidden_states=torch.randn(BATCH, frames, 2 * rows, 2 * columns, 4 if fractal else 9),
        encoder_hidden_states=words(16), timestep=torch.tensor([10.0, 700.0]),
        pooled_projections=torch.randn(BATCH, 8), visual_rope_pos=tuple(torch.arange(extent) for extent in grid),
        text_rope_pos=torch.arange(TEXT), scale_factor=(1.0, 2.0, 2.0),
    )  # fmt: skip
    if fractal:
        for processor in model.attn_processors.values():  # set_attention_backend() would change it for every model
            processor._attention_backend = "flex"
        tiles = frames * rows * columns // 64
        inputs["sparse_params"] = dict(sta_mask=torch.eye(tiles, dtype=torch.bool), to_fractal=True, P=0.8)
    return model, inputs


def kandinsky_5() -> Pair:
    """Linear patches (view, permute): 3x4x6, 0, 0. Full: visual_transformer_blocks.{0..2}.self_attention. Others:
    text_transformer_blocks.0.self_attention (7 text), visual_transformer_blocks.*.cross_attention (7 text)."""
    return _kandinsky_5(fractal=False)


def kandinsky_5_fractal() -> Pair:
    """Grid 3x8x16 in tiles of 1x8x8 (no raster order), flex attention with a block mask (NABLA) everywhere: no plain
    self-attention. visual_transformer_blocks.*.self_attention, cross_attention and text blocks, all flex; the block
    mask comes from a hand-written softmax over pooled tiles."""
    return _kandinsky_5(fractal=True)


def _kandinsky_6(audio: bool) -> Pair:
    from diffusers import Kandinsky6Transformer3DModel

    torch.manual_seed(0)
    model = ready(Kandinsky6Transformer3DModel(
        in_visual_dim=4, out_visual_dim=4, in_text_dim=16, in_text_dim2=8, time_dim=8, patch_size=(1, 2, 2),
        model_dim=24, ff_dim=32, num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 4, 4), visual_cond=True,
        in_audio_dim=6, out_audio_dim=6, model_dim_a=36, time_dim_a=8, ff_dim_a=16, axes_dims_a=(4, 4, 4),
        ca_rope=True, visual_token_type_num_embeddings=2,
    ))  # fmt: skip
    inputs = dict(
        hidden_states=torch.randn(BATCH, 3, 8, 12, 9), encoder_hidden_states=words(16),
        pooled_projections=torch.randn(BATCH, 8), timestep=torch.tensor([10.0, 700.0]),
        encoder_attention_mask=padding(torch.bool), visual_token_type_ids=torch.tensor([[0, 1, 1], [0, 0, 1]]),
    )  # fmt: skip
    return model, inputs | (dict(audio_hidden_states=torch.randn(BATCH, 5, 6)) if audio else {})


def kandinsky_6() -> Pair:
    """3x4x6, 0, 0, linear patches. Full: visual_transformer_blocks.{0,1}.video_dec_block.self_attention. Others: text
    blocks of two streams (7 text, bool key mask), video_dec_block.cross_attention."""
    return _kandinsky_6(audio=False)


def kandinsky_6_audio() -> Pair:
    """As kandinsky_6 with 5 audio tokens: audio_dec_block.self_attention and .cross_attention, va_cross_attention and
    av_cross_attention besides."""
    return _kandinsky_6(audio=True)


def kandinsky_6_sr() -> Pair:
    """Grid 3x8x16 in tiles of 1x8x8 (no raster order), flex attention with a NABLA block mask:
    visual_transformer_blocks.{0,1}.self_attention. No plain self-attention, no text."""
    from diffusers import Kandinsky6SRTransformer3DModel

    torch.manual_seed(0)
    model = ready(Kandinsky6SRTransformer3DModel(
        in_visual_dim=4, out_visual_dim=6, time_dim=8, model_dim=32, ff_dim=32, num_visual_blocks=2,
        axes_dims=(8, 4, 4), nabla_window=(1, 1, 1), nabla_threshold=0.5,
    ))  # fmt: skip
    return model, dict(hidden_states=torch.randn(BATCH, 3, 8, 16, 9), timestep=torch.tensor([10.0, 700.0]))
