"""Cosmos 1, 2, 2.5 and 3."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import nn

from .common import BATCH, GRID, TEXT, TOKENS, Pair, padding, ready, video_latents, words

_COSMOS = dict(
    in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=18, num_layers=3, mlp_ratio=1.0,
    text_embed_dim=16, adaln_lora_dim=4, max_size=(4, 16, 16), patch_size=(1, 2, 2), concat_padding_mask=False,
)  # fmt: skip


def _torchvision(module: types.ModuleType) -> None:
    """What these modules use of torchvision, where it is not installed: a nearest resize."""
    if not hasattr(module, "transforms"):

        def resize(image: torch.Tensor, size: list[int], interpolation: object = None) -> torch.Tensor:
            return nn.functional.interpolate(image, size=size, mode="nearest")

        module.transforms = types.SimpleNamespace(
            functional=types.SimpleNamespace(resize=resize), InterpolationMode=types.SimpleNamespace(NEAREST="nearest")
        )


def cosmos_1() -> Pair:
    """Linear patches (reshape, permute), learned positions, padding mask: 3x4x6, 0, 0. Full:
    transformer_blocks.{0..2}.attn1. Others: transformer_blocks.*.attn2 (cross, 7, bool mask)."""
    from diffusers import CosmosTransformer3DModel
    from diffusers.models.transformers import transformer_cosmos

    _torchvision(transformer_cosmos)
    torch.manual_seed(0)
    model = ready(CosmosTransformer3DModel(**_COSMOS | dict(concat_padding_mask=True)))
    return model, dict(
        hidden_states=video_latents(), timestep=torch.tensor([0.1, 0.7]), encoder_hidden_states=words(16), fps=24,
        attention_mask=padding(torch.bool), padding_mask=torch.zeros(1, 1, 16, 24),
    )  # fmt: skip


def cosmos_2() -> Pair:
    """Cosmos Predict 2, a timestep per frame, condition mask: 3x4x6, 0, 0. Full: transformer_blocks.*.attn1. Others:
    transformer_blocks.*.attn2 (cross, 7)."""
    from diffusers import CosmosTransformer3DModel

    torch.manual_seed(0)
    model = ready(CosmosTransformer3DModel(**_COSMOS | dict(
        in_channels=5, extra_pos_embed_type=None, rope_scale=(1.0, 2.0, 2.0)
    )))  # fmt: skip
    condition = torch.zeros(BATCH, 1, 3, 8, 12)
    condition[:, :, 0] = 1
    return model, dict(
        hidden_states=video_latents(), timestep=torch.rand(BATCH, 1, 3, 1, 1), encoder_hidden_states=words(16), fps=16,
        condition_mask=condition,
    )  # fmt: skip


def cosmos_2_5() -> Pair:
    """Cosmos 2.5 Transfer: text and image context, residuals of a control net added in place: 3x4x6, 0, 0. Full:
    transformer_blocks.*.attn1. Others: attn2 twice (7 text, 5 image)."""
    from diffusers import CosmosTransformer3DModel

    torch.manual_seed(0)
    model = ready(CosmosTransformer3DModel(**_COSMOS | dict(
        extra_pos_embed_type=None, use_crossattn_projection=True, crossattn_proj_in_channels=20,
        encoder_hidden_states_channels=16, controlnet_block_every_n=2, img_context_dim_in=10, img_context_num_tokens=5,
        img_context_dim_out=36,
    )))  # fmt: skip
    return model, dict(
        hidden_states=video_latents(), timestep=torch.tensor([0.1, 0.7]),
        encoder_hidden_states=(words(20), words(10, 5)), fps=16,
        block_controlnet_hidden_states=[torch.randn(BATCH, TOKENS, 36) for _ in range(2)],
    )  # fmt: skip


def cosmos_controlnet() -> Pair:
    """Cosmos 2.5 control net: 3x4x6, 0, 0. Full: control_blocks.{0,1}.attn1. Others: control_blocks.*.attn2 (cross, 7)."""
    from diffusers.models.controlnets import controlnet_cosmos

    _torchvision(controlnet_cosmos)
    torch.manual_seed(0)
    model = ready(controlnet_cosmos.CosmosControlNetModel(
        n_controlnet_blocks=2, in_channels=8, latent_channels=6, model_channels=36, num_attention_heads=2,
        attention_head_dim=18, mlp_ratio=1.0, text_embed_dim=16, adaln_lora_dim=4, max_size=(4, 16, 16),
        rope_scale=(1.0, 2.0, 2.0),
    ))  # fmt: skip
    return model, dict(
        controls_latents=video_latents(), latents=video_latents(), timestep=torch.tensor([0.1, 0.7]),
        encoder_hidden_states=words(16), condition_mask=torch.zeros(BATCH, 1, 3, 8, 12), conditioning_scale=[1.0, 0.5],
        padding_mask=torch.zeros(1, 1, 16, 24), fps=16,
    )  # fmt: skip


def _cosmos_3(condition: bool, sound: bool) -> Pair:
    from diffusers import Cosmos3OmniTransformer

    torch.manual_seed(0)
    model = ready(Cosmos3OmniTransformer(
        head_dim=12, hidden_size=24, intermediate_size=32, latent_channel=4, latent_patch_size=2,
        num_attention_heads=2, num_hidden_layers=3, num_key_value_heads=1, patch_latent_dim=16, vocab_size=32,
        rope_axes_dim=(2, 2, 2), sound_gen=sound, sound_dim=5 if sound else None,
    ))  # fmt: skip
    noisy = torch.arange(1 if condition else 0, 3)
    axes = torch.meshgrid(*(torch.arange(extent, dtype=torch.float32) for extent in GRID), indexing="ij")
    vision = torch.stack(axes).flatten(1) + torch.tensor([[15000.0 + TEXT], [0.0], [0.0]])
    text = torch.arange(TEXT, dtype=torch.float32)[None].expand(3, -1)
    positions = [text, vision]
    length = TEXT + TOKENS
    inputs: dict[str, Any] = {}
    if sound:
        steps = torch.arange(5)
        positions.append(torch.stack([15000.0 + TEXT + steps, 0.0 * steps, 0.0 * steps]))
        inputs = dict(
            sound_tokens=[torch.randn(5, 5)], sound_token_shapes=[(5, 1, 1)], sound_sequence_indexes=length + steps,
            sound_mse_loss_indexes=length + steps, sound_timesteps=torch.full((5,), 700.0),
            sound_noisy_frame_indexes=[steps],
        )  # fmt: skip
        length += 5
    start = TEXT + 24 * (3 - len(noisy))
    return model, dict(
        input_ids=torch.randint(0, 32, (TEXT,)), text_indexes=torch.arange(TEXT),
        position_ids=torch.cat(positions, dim=1), und_len=TEXT, sequence_length=length,
        vision_tokens=[video_latents(batch=1)], vision_token_shapes=[GRID],
        vision_sequence_indexes=torch.arange(TEXT, TEXT + TOKENS),
        vision_mse_loss_indexes=torch.arange(start, TEXT + TOKENS),
        vision_timesteps=torch.full((24 * len(noisy),), 700.0), vision_noisy_frame_indexes=[noisy],
    ) | inputs  # fmt: skip


def cosmos_3_t2v() -> Pair:
    """Batch 1, packed, grouped heads: queries 3x4x6 (72), keys 7 text + 3x4x6 (prefix in the keys alone): layers.{0..2}.
    self_attn, second call. First call there: causal self-attention of the 7 text tokens."""
    return _cosmos_3(condition=False, sound=False)


def cosmos_3_i2v_sound() -> Pair:
    """As cosmos_3_t2v, first frame given, 5 sound tokens behind the video: queries 3x4x6 + 5, keys 7 + 3x4x6 + 5."""
    return _cosmos_3(condition=True, sound=True)
