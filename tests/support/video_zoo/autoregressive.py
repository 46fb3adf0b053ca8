"""Helios and AnyFlow: video made piece by piece."""

from __future__ import annotations

from typing import Any

import torch

from .common import BATCH, Pair, ready, video_latents, words
from .wan import _WAN


def _helios(history: bool, **overrides: Any) -> Pair:
    from diffusers import HeliosTransformer3DModel

    torch.manual_seed(0)
    config = {k: v for k, v in _WAN.items() if k != "rope_max_seq_len"}
    model = ready(HeliosTransformer3DModel(**config | dict(rope_dim=(4, 4, 4)) | overrides))
    inputs = dict(hidden_states=video_latents(), timestep=torch.tensor([10, 700]), encoder_hidden_states=words(16))
    if history:
        inputs |= dict(
            indices_hidden_states=torch.arange(8, 11)[None].repeat(BATCH, 1),
            indices_latents_history_short=torch.tensor([[0, 7]]).repeat(BATCH, 1),
            indices_latents_history_mid=torch.tensor([[5, 6]]).repeat(BATCH, 1),
            indices_latents_history_long=torch.arange(1, 5)[None].repeat(BATCH, 1),
            latents_history_short=video_latents(4, 2), latents_history_mid=video_latents(4, 2),
            latents_history_long=video_latents(4, 4),
        )  # fmt: skip
    return model, inputs


def helios() -> Pair:
    """Four grids: 1x1x2, 1x2x3, 2x4x6 (history), then 3x4x6: prefix 56, suffix 0. Full: blocks.{0..2}.attn1. Others:
    blocks.*.attn2 (cross, 7; the 72 new tokens alone)."""
    return _helios(history=True)


def helios_amplified() -> Pair:
    """As helios, the keys of the history scaled (cut and joined), every token to the text: 3x4x6, prefix 56, suffix 0."""
    return _helios(history=True, is_amplify_history=True, guidance_cross_attn=False, zero_history_timestep=False)


def helios_first() -> Pair:
    """The first chunk, without history: 3x4x6, 0, 0. Full: blocks.*.attn1. Others: blocks.*.attn2 (cross, 7)."""
    return _helios(history=False)


_ANYFLOW = {k: v for k, v in _WAN.items()}


def anyflow() -> Pair:
    """3x4x6, 0, 0. Full: blocks.{0..2}.attn1. Others: blocks.*.attn2 (cross, 7)."""
    from diffusers import AnyFlowTransformer3DModel

    torch.manual_seed(0)
    model = ready(AnyFlowTransformer3DModel(**_ANYFLOW))
    return model, dict(
        hidden_states=torch.randn(BATCH, 3, 4, 8, 12), timestep=torch.full((BATCH, 3), 700),
        r_timestep=torch.full((BATCH, 3), 500), encoder_hidden_states=words(16),
    )  # fmt: skip


def anyflow_far_train() -> Pair:
    """Causal over chunks: 1x2x3 compressed tokens, then 3x4x6, padded to 128; flex attention with a block mask
    (blocks.{0,1}.attn1): no plain self-attention. Others: blocks.*.attn2 (cross, 7)."""
    from diffusers import AnyFlowFARTransformer3DModel

    torch.manual_seed(0)
    model = ready(AnyFlowFARTransformer3DModel(**_ANYFLOW | dict(num_layers=2, full_chunk_limit=2)))
    return model, dict(
        hidden_states=torch.randn(BATCH, 4, 4, 8, 12), timestep=torch.full((BATCH, 4), 700),
        r_timestep=torch.full((BATCH, 4), 500), encoder_hidden_states=words(16), chunk_partition=[1, 1, 2],
    )  # fmt: skip


def anyflow_far_inference() -> Pair:
    """One chunk after a cached one: queries 3x4x6, keys 24 cached + 72, both padded by 56; flex attention without mask
    (blocks.{0,1}.attn1): keys hold more than the queries. Others: blocks.*.attn2 (cross, 7)."""
    from diffusers import AnyFlowFARTransformer3DModel

    torch.manual_seed(0)
    model = ready(AnyFlowFARTransformer3DModel(**_ANYFLOW | dict(num_layers=2)))
    cache = [
        dict(compressed_cache=torch.zeros(2, BATCH, 2, 6, 12), full_cache=torch.randn(2, BATCH, 2, 48, 12))
        for _ in range(2)
    ]
    return model, dict(
        hidden_states=torch.randn(BATCH, 3, 4, 8, 12), timestep=torch.full((BATCH, 3), 700),
        r_timestep=torch.full((BATCH, 3), 500), encoder_hidden_states=words(16), chunk_partition=[1, 3],
        kv_cache=cache, kv_cache_flag=dict(is_cache_step=False, num_cached_chunks=1),
    )  # fmt: skip
