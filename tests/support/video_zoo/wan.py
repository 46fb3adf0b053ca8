"""Wan and its descendants."""

from __future__ import annotations

from typing import Any

import torch

from .common import BATCH, TEXT, TOKENS, Pair, ready, video_latents, words

_WAN = dict(
    num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=32, ffn_dim=32,
    num_layers=3, rope_max_seq_len=32,
)  # fmt: skip
_WAN_I2V = dict(image_dim=10, added_kv_proj_dim=24)


def wan_t2v() -> Pair:
    """3x4x6, prefix 0, suffix 0. Full: blocks.{0..2}.attn1. Others: blocks.*.attn2 (cross to 7 text tokens)."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = ready(WanTransformer3DModel(**_WAN))
    return model, dict(hidden_states=video_latents(), timestep=torch.tensor([10, 700]), encoder_hidden_states=words(16))


def wan_i2v() -> Pair:
    """3x4x6, 0, 0. Full: blocks.*.attn1. Others: blocks.*.attn2 twice (5 image tokens; 512 text tokens, hard-coded)."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = ready(WanTransformer3DModel(**_WAN | _WAN_I2V))
    return model, dict(
        hidden_states=video_latents(), timestep=torch.tensor([10, 700]), encoder_hidden_states=words(16, 512),
        encoder_hidden_states_image=words(10, 5),
    )  # fmt: skip


def wan_flf2v() -> Pair:
    """First and last frame: 3x4x6, 0, 0. Full: blocks.*.attn1. Others: blocks.*.attn2 twice (2 x 5 image, 512 text)."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = ready(WanTransformer3DModel(**_WAN | _WAN_I2V | dict(pos_embed_seq_len=10)))
    return model, dict(
        hidden_states=video_latents(), timestep=torch.tensor([10, 700]), encoder_hidden_states=words(16, 512),
        encoder_hidden_states_image=words(10, 5, 2 * BATCH),
    )  # fmt: skip


def wan_ti2v_5b() -> Pair:
    """Wan 2.2 5B, a timestep per token: 3x4x6, 0, 0. Full: blocks.*.attn1. Others: blocks.*.attn2 (cross, 7)."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = ready(WanTransformer3DModel(**_WAN))
    timestep = torch.full((BATCH, TOKENS), 700)
    timestep[:, :24] = 0  # the first frame is given
    return model, dict(hidden_states=video_latents(), timestep=timestep, encoder_hidden_states=words(16))


def wan_animate() -> Pair:
    """3x4x6, 0, 0. Full: blocks.{0..3}.attn1. Others: attn2 twice (3 image, 512 text), face_adapter.{0,1} (per frame)."""
    from diffusers import WanAnimateTransformer3DModel

    torch.manual_seed(0)
    model = ready(WanAnimateTransformer3DModel(**_WAN | dict(
        in_channels=12, latent_channels=4, num_layers=4, image_dim=10, added_kv_proj_dim=24,
        motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8}, motion_encoder_size=16, motion_style_dim=8,
        motion_dim=4, motion_encoder_dim=8, face_encoder_hidden_dim=8, face_encoder_num_heads=4,
        inject_face_latents_blocks=2, motion_encoder_batch_size=8,
    )))  # fmt: skip
    return model, dict(
        hidden_states=video_latents(12), timestep=torch.tensor([10, 700]), encoder_hidden_states=words(16, 512),
        encoder_hidden_states_image=words(10, 3), pose_hidden_states=video_latents(4, 2),
        face_pixel_values=torch.randn(BATCH, 3, 5, 16, 16),
    )  # fmt: skip


def _wan_animate_2(cached: bool) -> Pair:
    from diffusers import WanAnimate2Transformer3DModel
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache
    from torch.nn.attention.flex_attention import create_block_mask

    torch.manual_seed(0)
    layers, hw, frames = 2, 24, 2
    model = ready(WanAnimate2Transformer3DModel(
        text_len=TEXT, in_dim=8, dim=24, ffn_dim=32, freq_dim=32, text_dim=16, out_dim=4, num_heads=2,
        num_layers=layers, use_img_emb=False,
    ))  # fmt: skip
    cache = WanAnimate2KVCache(layers)
    reference = torch.tensor([[2, 4, 6]])
    inputs = dict(
        hidden_states=[torch.randn(4, 3, 8, 12)], condition_latents=[torch.randn(4, 3, 8, 12)],
        timestep=torch.tensor([700]), encoder_hidden_states=[torch.randn(5, 16)], kv_cache=cache,
        kv_cache_mode="extract", seq_len=TOKENS, offset_grid_sizes=reference,
    )  # fmt: skip
    if cached:
        for layer in cache.layer_caches:
            layer.store(torch.randn(1, frames * hw, 2, 12), torch.randn(1, frames * hw, 2, 12))
        q_len, k_len, q_total = 72, 48, 128

        def seen(b: Any, h: Any, q: Any, k: Any) -> Any:
            own = k < q_len
            same = torch.where(k < q_total, k // hw, (k - q_total) // hw + 1) == q // hw
            valid = torch.where(k < q_total, own, k - q_total < k_len)
            return (q < q_len) & (own | (same & valid))

        # The class would compile this mask's construction; the same mask, made eagerly.
        model.block_masks[(frames, hw)] = create_block_mask(seen, None, None, q_total, q_total + 128, device="cpu")
        inputs |= dict(
            kv_cache_mode="cached", reference_grid_sizes=reference, origin_len=4, origin_area=[64, 96],
        )  # fmt: skip
    return model, inputs


def wan_animate_2_extract() -> Pair:
    """Batch 1, reference pass: 3x4x6, 0, 0. Full: blocks.{0,1}.self_attn. Others: blocks.*.cross_attn (7 text)."""
    return _wan_animate_2(cached=False)


def wan_animate_2_cached() -> Pair:
    """Batch 1: 72 tokens (3x4x6) packed into 128, keys 128 + 128 cached; flex attention with a block mask: no plain
    self-attention. blocks.{0,1}.self_attn (flex), blocks.*.cross_attn (7 text)."""
    return _wan_animate_2(cached=True)


def wan_vace() -> Pair:
    """3x4x6, 0, 0. Full: vace_blocks.{0,1}.attn1 (first), then blocks.{0..2}.attn1. Others: every attn2 (cross, 7)."""
    from diffusers import WanVACETransformer3DModel

    torch.manual_seed(0)
    model = ready(WanVACETransformer3DModel(**_WAN | dict(vace_layers=[0, 2], vace_in_channels=6)))
    return model, dict(
        hidden_states=video_latents(), timestep=torch.tensor([10, 700]), encoder_hidden_states=words(16),
        control_hidden_states=video_latents(6), control_hidden_states_scale=torch.tensor([0.5, 0.75]),
    )  # fmt: skip


def skyreels_v2() -> Pair:
    """3x4x6, 0, 0. Full: blocks.{0..2}.attn1. Others: blocks.*.attn2 (cross, 7)."""
    from diffusers import SkyReelsV2Transformer3DModel

    torch.manual_seed(0)
    model = ready(SkyReelsV2Transformer3DModel(**_WAN))
    return model, dict(hidden_states=video_latents(), timestep=torch.tensor([10, 700]), encoder_hidden_states=words(16))


def skyreels_v2_i2v() -> Pair:
    """3x4x6, 0, 0. Full: blocks.*.attn1. Others: blocks.*.attn2 twice (5 image tokens, 512 text tokens)."""
    from diffusers import SkyReelsV2Transformer3DModel

    torch.manual_seed(0)
    model = ready(SkyReelsV2Transformer3DModel(**_WAN | _WAN_I2V))
    return model, dict(
        hidden_states=video_latents(), timestep=torch.tensor([10, 700]), encoder_hidden_states=words(16, 512),
        encoder_hidden_states_image=words(10, 5),
    )  # fmt: skip


def skyreels_v2_df() -> Pair:
    """Diffusion forcing, a timestep per frame: 3x4x6, 0, 0. Full: blocks.{0..2}.attn1. Others: blocks.*.attn2 (cross, 7)."""
    model, inputs = skyreels_v2()
    timestep = torch.tensor([[0, 300, 700], [0, 200, 900]])
    return model, inputs | dict(timestep=timestep, enable_diffusion_forcing=True)


def skyreels_v2_df_fps() -> Pair:
    """As skyreels_v2_df with a frame rate given, which the class takes for batch 1 alone: 3x4x6, 0, 0."""
    from diffusers import SkyReelsV2Transformer3DModel

    torch.manual_seed(0)
    model = ready(SkyReelsV2Transformer3DModel(**_WAN | dict(inject_sample_info=True)))
    return model, dict(
        hidden_states=video_latents(batch=1), timestep=torch.tensor([[0, 300, 700]]),
        encoder_hidden_states=words(16, batch=1), enable_diffusion_forcing=True, fps=[1],
    )  # fmt: skip


def skyreels_v2_ar() -> Pair:
    """Causal over blocks of two frames: 4x3x6, 0, 0, bool mask [1,1,72,72]: a masked self-attention (blocks.*.attn1),
    not all to all. Others: blocks.*.attn2 (cross, 7)."""
    from diffusers import SkyReelsV2Transformer3DModel

    torch.manual_seed(0)
    model = ready(SkyReelsV2Transformer3DModel(**_WAN | dict(num_frame_per_block=2)))
    return model, dict(
        hidden_states=video_latents(4, 4, 6, 12), timestep=torch.tensor([[0, 0, 700, 700], [0, 0, 900, 900]]),
        encoder_hidden_states=words(16), enable_diffusion_forcing=True,
    )  # fmt: skip


def chronoedit() -> Pair:
    """3x4x6, 0, 0. Full: blocks.{0..2}.attn1. Others: blocks.*.attn2 twice (5 image, 512 text)."""
    from diffusers import ChronoEditTransformer3DModel

    torch.manual_seed(0)
    model = ready(ChronoEditTransformer3DModel(**_WAN | _WAN_I2V))
    return model, dict(
        hidden_states=video_latents(), timestep=torch.tensor([10, 700]), encoder_hidden_states=words(16, 512),
        encoder_hidden_states_image=words(10, 5),
    )  # fmt: skip


def chronoedit_two_frames() -> Pair:
    """First and last frame only, which takes other rotary positions: 2x4x6, 0, 0. Full: blocks.*.attn1. Others: attn2."""
    model, inputs = chronoedit()
    return model, inputs | dict(hidden_states=video_latents(4, 2))
