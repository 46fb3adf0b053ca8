"""VideoMAE, ViViT and TimeSformer of transformers: encoders that read a video."""

from __future__ import annotations

import torch

from .common import BATCH, Pair, ready

_SIZES = dict(num_channels=4, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48)


def _clip(frames: int = 6) -> torch.Tensor:
    return torch.randn(BATCH, frames, 4, 8, 12)


def _videomae(attention: str) -> Pair:
    from transformers import VideoMAEConfig, VideoMAEModel

    torch.manual_seed(0)
    model = ready(VideoMAEModel(VideoMAEConfig(
        image_size=(8, 12), patch_size=2, num_frames=6, tubelet_size=2, attn_implementation=attention, **_SIZES
    )))  # fmt: skip
    return model, dict(pixel_values=_clip())


def videomae_eager() -> Pair:
    """3x4x6, 0, 0; softmax written out. Full: encoder.layer.{0..2}.attention.attention. No other attention."""
    return _videomae("eager")


def videomae_sdpa() -> Pair:
    """As videomae_eager with scaled_dot_product_attention."""
    return _videomae("sdpa")


def videomae_masked() -> Pair:
    """As videomae_sdpa with half of the tubelets masked: 36 visible tokens, others in each sample, and no grid. Full:
    none."""
    model, inputs = _videomae("sdpa")
    hidden = torch.stack([torch.randperm(72) < 36 for _ in range(BATCH)])
    return model, dict(**inputs, bool_masked_pos=hidden)


def _vivit(attention: str) -> Pair:
    from transformers import VivitConfig, VivitModel

    torch.manual_seed(0)
    model = ready(VivitModel(VivitConfig(
        image_size=(8, 12), num_frames=6, tubelet_size=(2, 2, 2), attn_implementation=attention, **_SIZES
    )))  # fmt: skip
    return model, dict(pixel_values=_clip())


def vivit_eager() -> Pair:
    """3x4x6, prefix 1 (class token), suffix 0; softmax written out. Full: layers.{0..2}.attention. No other attention."""
    return _vivit("eager")


def vivit_sdpa() -> Pair:
    """As vivit_eager with scaled_dot_product_attention."""
    return _vivit("sdpa")


def _timesformer(kind: str) -> Pair:
    """Softmax written out is its only attention. Its positions are for 6x6 patches and resized to 4x6."""
    from transformers import TimesformerConfig, TimesformerModel

    torch.manual_seed(0)
    model = ready(TimesformerModel(TimesformerConfig(
        image_size=12, patch_size=2, num_frames=3, attention_type=kind, **_SIZES
    )))  # fmt: skip
    return model, dict(pixel_values=_clip(3))


def timesformer() -> Pair:
    """Grid 3x4x6 with time fastest, factorised: encoder.layer.{0..2}.temporal_attention.attention (3 frames, no class
    token), .attention.attention (24 tokens of a frame behind a copy of the class token)."""
    return _timesformer("divided_space_time")


def timesformer_joint() -> Pair:
    """3x4x6 with time fastest, prefix 1, suffix 0. Full: encoder.layer.{0..2}.attention.attention. No other attention."""
    return _timesformer("joint_space_time")


def timesformer_space() -> Pair:
    """Grid 3x4x6, frames in the batch: encoder.layer.{0..2}.attention.attention (24 tokens of a frame, class token)."""
    return _timesformer("space_only")
