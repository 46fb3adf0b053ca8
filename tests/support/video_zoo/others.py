"""Motif-Video, MiniMax, JoyImage, SANA-Video and SANA-WM."""

from __future__ import annotations

from typing import Any

import torch

from .common import BATCH, GRID, TEXT, TOKENS, Pair, padding, ready, video_latents, words
from .ltx import _LTX2


def _motif(image: bool, **overrides: Any) -> Pair:
    from diffusers import MotifVideoTransformer3DModel

    torch.manual_seed(0)
    model = ready(MotifVideoTransformer3DModel(**dict(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2, num_single_layers=2,
        patch_size=2, patch_size_t=1, text_embed_dim=16, rope_axes_dim=(4, 4, 4),
        image_embed_dim=10 if image else None,
    ) | overrides))  # fmt: skip
    inputs = dict(
        hidden_states=video_latents(9), timestep=torch.tensor([10, 700]), encoder_hidden_states=words(16),
        encoder_attention_mask=padding(),
    )  # fmt: skip
    return model, inputs | (dict(image_embeds=words(10, 5)) if image else {})


def motif_video() -> Pair:
    """3x4x6, prefix 0, suffix 7, bool key mask [2,1,1,79]. Full: transformer_blocks.{0,1}.attn,
    single_transformer_blocks.{0,1}.attn. No other attention."""
    return _motif(image=False)


def motif_video_i2v() -> Pair:
    """3x4x6, prefix 0, suffix 12 (5 image, 7 text), key mask. Full as motif_video. Others: transformer_blocks.*.cross_attn
    and single_transformer_blocks.*.cross_attn (7 text, bool mask)."""
    return _motif(image=True, enable_text_cross_attention_dual=True, enable_text_cross_attention_single=True)


def motif_video_decoder() -> Pair:
    """As motif_video, with a third single block over two copies of the grid, decoder 3x4x6 then encoder 3x4x6 (no mask,
    144 tokens, no text): single_transformer_blocks.2.attn holds two grids."""
    return _motif(image=False, num_single_layers=3, num_decoder_layers=1)


def minimax_h3() -> Pair:
    """Packed by index_copy: prefix 12 (7 text, 5 audio), 3x4x6, suffix 0; latents come patchified [2, 72, 16]. Full:
    transformer_blocks.{0..2}.attn. Others: token_refiner.refiner_blocks.0.attn (7 text)."""
    from diffusers import MiniMaxH3Transformer3DModel

    torch.manual_seed(0)
    model = ready(MiniMaxH3Transformer3DModel(
        num_attention_heads=2, attention_head_dim=16, hidden_size=24, num_layers=3, num_refiner_layers=1, ffn_dim=32,
        in_channels=4, audio_in_channels=6, text_dim=16, freq_dim=8, time_embed_hidden_dim=8, time_embed_dim=8,
        rope_freq_dim=2,
    ))  # fmt: skip
    axes = torch.meshgrid(*(torch.arange(extent, dtype=torch.float32) for extent in GRID), indexing="ij")
    positions = torch.zeros(TEXT + 5 + TOKENS, 3)
    positions[:TEXT, 0] = torch.arange(TEXT)
    positions[TEXT : TEXT + 5, 0] = TEXT + torch.arange(5)
    positions[TEXT + 5 :] = torch.stack(axes, dim=-1).reshape(-1, 3) + torch.tensor([float(TEXT), 0.0, 0.0])
    tags = torch.tensor([1] * TEXT + [2] * 5 + [0] * TOKENS)
    return model, dict(
        hidden_states=torch.randn(BATCH, TOKENS, 16), audio_hidden_states=torch.randn(BATCH, 5, 6),
        encoder_hidden_states=words(16), timestep=torch.tensor([0.0, 0.7]), timestep_indices=(tags != 1).long(),
        token_tags=tags, position_ids=positions, video_indices=torch.arange(TEXT + 5, TEXT + 5 + TOKENS),
        audio_indices=torch.arange(TEXT, TEXT + 5), text_indices=torch.arange(TEXT),
    )  # fmt: skip


_JOY = dict(
    patch_size=[1, 2, 2], in_channels=4, hidden_size=24, num_attention_heads=2, text_dim=16, mlp_width_ratio=1.0,
    num_layers=3, rope_dim_list=[4, 4, 4],
)  # fmt: skip


def joyimage_edit() -> Pair:
    """5-D latents: 3x4x6, prefix 0, suffix 7. Full: double_blocks.{0..2}.attn. No other attention."""
    from diffusers import JoyImageEditTransformer3DModel

    torch.manual_seed(0)
    model = ready(JoyImageEditTransformer3DModel(**_JOY | dict(rope_type="mrope")))
    return model, dict(hidden_states=video_latents(), timestep=torch.tensor([10, 700]), encoder_hidden_states=words(16))


def joyimage_edit_items() -> Pair:
    """6-D latents, three images of one frame as the frames of one grid, the last one first: 3x4x6, prefix 0, suffix 7.
    double_blocks.*.attn."""
    model, inputs = joyimage_edit()
    return model, inputs | dict(hidden_states=torch.randn(BATCH, 3, 4, 1, 8, 12))


def joyimage_edit_plus() -> Pair:
    """Latents come as patches [2, 40, 4, 1, 2, 2] of images of several sizes (1x4x6 and 1x4x4; 1x4x6 and 1x3x3, padded):
    no one grid; suffix 7, bool key mask. double_blocks.{0..2}.attn is joint attention over them."""
    from diffusers import JoyImageEditPlusTransformer3DModel

    torch.manual_seed(0)
    model = ready(JoyImageEditPlusTransformer3DModel(**_JOY))
    return model, dict(
        hidden_states=torch.randn(BATCH, 40, 4, 1, 2, 2), timestep=torch.tensor([10, 700]),
        encoder_hidden_states=words(16), encoder_hidden_states_mask=padding(),
        shape_list=[[(1, 4, 6), (1, 4, 4)], [(1, 4, 6), (1, 3, 3)]],
    )  # fmt: skip


def sana_video() -> Pair:
    """3x4x6; transformer_blocks.{0..2}.attn1 is linear attention (no softmax): nothing to rewrite. Others:
    transformer_blocks.*.attn2 (cross, 7, float mask). A conv2d over (frames, rows*columns) in every block."""
    from diffusers import SanaVideoTransformer3DModel

    torch.manual_seed(0)
    model = ready(SanaVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=3,
        num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=16,
        mlp_ratio=1.0, patch_size=(1, 2, 2), rope_max_seq_len=32,
    ))  # fmt: skip
    return model, dict(
        hidden_states=video_latents(), encoder_hidden_states=words(16), timestep=torch.tensor([10, 700]),
        encoder_attention_mask=padding(),
    )  # fmt: skip


def sana_wm() -> Pair:
    """3x4x6 (patches of one), 0, 0. Full, in bfloat16: blocks.{1,3}.attn.attn and blocks.{1,3}.attn.cam_attn (channels
    padded to 128). Others: blocks.{0,2}.attn (gated delta rule, no softmax), blocks.*.cross_attn (7, bool key mask)."""
    from diffusers import SanaWMTransformer3DModel

    torch.manual_seed(0)
    model = ready(SanaWMTransformer3DModel(
        in_channels=4, num_layers=4, hidden_size=48, num_attention_heads=2, softmax_every_n=2, linear_head_dim=24,
        chunk_plucker_channels=6, chunk_plucker_post_attn_blocks=-1, caption_channels=16, mlp_ratio=1.0,
    ))  # fmt: skip
    pose = torch.eye(4).repeat(BATCH, 3, 1, 1)
    pose[..., :3, 3] = torch.randn(BATCH, 3, 3)
    camera = torch.cat([pose.flatten(2), torch.tensor([5.0, 5.0, 3.0, 2.0]).expand(BATCH, 3, 4)], dim=-1)
    return model, dict(
        hidden_states=video_latents(4, 3, 4, 6), timestep=torch.full((BATCH, 1, 3), 700.0),
        encoder_hidden_states=words(16)[:, None], encoder_attention_mask=padding(torch.long),
        camera_conditions=camera, chunk_plucker=video_latents(6, 3, 4, 6),
    )  # fmt: skip


def _sana_wm_refiner(cached: bool) -> Pair:
    from diffusers import SanaWMLTX2RefinerTransformer3DModel
    from diffusers.models.transformers.transformer_sana_wm_refiner import SanaWMRefinerKVCache

    torch.manual_seed(0)
    model = ready(SanaWMLTX2RefinerTransformer3DModel(**_LTX2))
    rotary = model.build_rotary_emb_for_absolute_positions(BATCH, [4, 5, 6], 4, 6, torch.device("cpu"), 24.0)
    inputs = dict(
        hidden_states=torch.randn(BATCH, TOKENS, 8), encoder_hidden_states=words(16),
        timestep=torch.full((BATCH, TOKENS), 700), video_rotary_emb=rotary, encoder_attention_mask=padding(),
    )  # fmt: skip
    if cached:
        cache = SanaWMRefinerKVCache(2)
        cache.sink_pe = model.build_rotary_emb_for_absolute_positions(BATCH, [0], 4, 6, torch.device("cpu"), 24.0)
        for layer in range(2):
            cache.get(layer).store_sink(torch.randn(BATCH, 24, 24), torch.randn(BATCH, 24, 24))
            cache.get(layer).store_history(torch.randn(BATCH, 48, 24), torch.randn(BATCH, 48, 24))
        inputs |= dict(kv_cache=cache, kv_cache_mode="inject")
    return model, inputs


def sana_wm_refiner() -> Pair:
    """Packed latents [2, 72, 8], rotary tensors given: 3x4x6, 0, 0. Full: transformer_blocks.{0,1}.attn1. Others:
    transformer_blocks.*.attn2 (cross, 7, float mask). The audio parts are never run."""
    return _sana_wm_refiner(cached=False)


def sana_wm_refiner_cached() -> Pair:
    """As sana_wm_refiner with 24 + 48 cached keys before the block's own 72: keys hold more than the queries."""
    return _sana_wm_refiner(cached=True)
