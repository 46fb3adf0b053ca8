"""Tiny random models of every video transformer (and video UNet) of diffusers 0.42.1, with inputs for one forward.

Beside them transformers' video models, and token layouts of models elsewhere, written down again in plain PyTorch.

``ZOO`` maps a name to a function that returns ``(model, kwargs)``: float32, CPU, no weights downloaded, seeded.
``EXPECT`` says for each of them which module paths hold full spatio-temporal self-attention over one video grid, the
grid (frames, rows, columns) in tokens, and how many condition tokens stand before and after it in the sequence.

Unless an entry says otherwise the token grid is 3 x 4 x 6 (72 tokens), the text has 7 tokens, of which the last are
padding in one or both samples, and the batch is 2. Numbers in the docstrings were read off an eager run.

Where names and classes differ:
  - MiniMax: the class is MiniMaxH3Transformer3DModel (video and audio); MiniMaxMusic3* are audio only.
  - Cosmos 3: the class is Cosmos3OmniTransformer (text, video, sound, action in one packed sequence).
  - Kandinsky 6 has no block-mask option of its own; only Kandinsky5 (``sparse_params``) and the super-resolution model
    Kandinsky6SRTransformer3DModel flatten fractally, and both then use flex attention with a block mask.
  - "FAR variant" is AnyFlowFARTransformer3DModel; its attention is flex attention only.
  - JoyImage Edit / Edit Plus are image editors whose latents have a frame axis (one frame an image).
  - TransformerSpatioTemporalModel (Stable Video Diffusion) is no model of its own; UNetSpatioTemporalConditionModel
    holds it. AnimateDiffTransformer3D likewise sits in UNetMotionModel.
  - SanaVideo and SanaWM: their self-attention is linear attention, SanaWM's every n-th layer softmax.
Left out on purpose: Flux3, QwenImage*, NucleusMoE, HunyuanImage (its refiner takes 5-D latents, of one frame) and the
other image models; autoencoders (per-frame attention); LTX2VideoDiffusionDecoderModel (a pixel decoder whose only
attention is neighbourhood flex attention).
"""

from __future__ import annotations

from collections.abc import Callable

from . import (
    autoregressive,
    cogvideo,
    cosmos,
    factorised,
    hunyuan,
    kandinsky,
    ltx,
    one_grid,
    others,
    plain,
    recognition,
    wan,
)
from .common import GRID, Pair

ZOO: dict[str, Callable[[], Pair]] = {
    function.__name__: function
    for function in (
        wan.wan_t2v,
        wan.wan_i2v,
        wan.wan_flf2v,
        wan.wan_ti2v_5b,
        wan.wan_animate,
        wan.wan_animate_2_extract,
        wan.wan_animate_2_cached,
        wan.wan_vace,
        wan.skyreels_v2,
        wan.skyreels_v2_i2v,
        wan.skyreels_v2_df,
        wan.skyreels_v2_df_fps,
        wan.skyreels_v2_ar,
        wan.chronoedit,
        wan.chronoedit_two_frames,
        hunyuan.hunyuan_video,
        hunyuan.hunyuan_video_i2v_token_replace,
        hunyuan.hunyuan_video_i2v_latent_concat,
        hunyuan.hunyuan_video_15_t2v,
        hunyuan.hunyuan_video_framepack,
        hunyuan.hunyuan_video_framepack_batch_1,
        cogvideo.cogvideox,
        cogvideo.cogvideox_sincos,
        cogvideo.cogvideox_i2v,
        cogvideo.cogvideox_1_5,
        cogvideo.consisid,
        ltx.ltx,
        ltx.ltx_video_coords,
        ltx.ltx2,
        ltx.ltx2_3,
        ltx.ltx2_self_mask,
        one_grid.mochi,
        one_grid.mochi_batch_1,
        one_grid.allegro,
        one_grid.allegro_masked,
        one_grid.easyanimate,
        cosmos.cosmos_1,
        cosmos.cosmos_2,
        cosmos.cosmos_2_5,
        cosmos.cosmos_controlnet,
        cosmos.cosmos_3_t2v,
        cosmos.cosmos_3_i2v_sound,
        kandinsky.kandinsky_5,
        kandinsky.kandinsky_5_fractal,
        kandinsky.kandinsky_6,
        kandinsky.kandinsky_6_audio,
        kandinsky.kandinsky_6_sr,
        autoregressive.helios,
        autoregressive.helios_amplified,
        autoregressive.helios_first,
        autoregressive.anyflow,
        autoregressive.anyflow_far_train,
        autoregressive.anyflow_far_inference,
        others.motif_video,
        others.motif_video_i2v,
        others.motif_video_decoder,
        others.minimax_h3,
        others.joyimage_edit,
        others.joyimage_edit_items,
        others.joyimage_edit_plus,
        others.sana_video,
        others.sana_wm,
        others.sana_wm_refiner,
        others.sana_wm_refiner_cached,
        factorised.latte,
        factorised.transformer_temporal,
        factorised.unet_3d_condition,
        factorised.unet_motion,
        factorised.sparse_controlnet,
        recognition.videomae_eager,
        recognition.videomae_sdpa,
        recognition.videomae_masked,
        recognition.vivit_eager,
        recognition.vivit_sdpa,
        recognition.timesformer,
        recognition.timesformer_joint,
        recognition.timesformer_space,
        plain.vchitect,
        plain.dive,
        plain.dive_by_frame,
        plain.ditctrl,
        plain.ditctrl_branches,
        plain.frames_conv2d,
    )
}

# name: (paths of full video self-attention in execution order, grid, prefix, suffix, kind). The kinds:
#   plain      one raster grid, every token attends to every token (a bool mask over keys included): rewrite it
#   pair_mask  a mask over pairs or one in float: needs more than the plain operator
#   extra_keys the keys hold tokens that are no queries
#   packed     the tokens are written by index: gathered, with all others behind them
#   several    more than one grid in the sequence; grid, prefix and suffix are those of the new latents
#   flex       flex attention with a block mask
#   none       no softmax self-attention over the whole video
Expectation = tuple[list[str], tuple[int, int, int], int, int, str]


def _paths(*runs: tuple[str, int]) -> list[str]:
    return [pattern.format(i) for pattern, count in runs for i in range(count)]


_DUAL = _paths(("transformer_blocks.{}.attn", 2), ("single_transformer_blocks.{}.attn", 2))

EXPECT: dict[str, Expectation] = {
    **{
        name: (_paths(("blocks.{}.attn1", 3)), GRID, 0, 0, "plain")
        for name in ("wan_t2v", "wan_i2v", "wan_flf2v", "wan_ti2v_5b", "skyreels_v2", "skyreels_v2_i2v",
                     "skyreels_v2_df", "skyreels_v2_df_fps", "chronoedit", "helios_first", "anyflow")
    },
    "wan_animate": (_paths(("blocks.{}.attn1", 4)), GRID, 0, 0, "plain"),
    "wan_animate_2_extract": (_paths(("blocks.{}.self_attn", 2)), GRID, 0, 0, "plain"),
    "wan_animate_2_cached": (_paths(("blocks.{}.self_attn", 2)), GRID, 0, 0, "flex"),
    "wan_vace": (_paths(("vace_blocks.{}.attn1", 2), ("blocks.{}.attn1", 3)), GRID, 0, 0, "plain"),
    "skyreels_v2_ar": (_paths(("blocks.{}.attn1", 3)), (4, 3, 6), 0, 0, "pair_mask"),
    "chronoedit_two_frames": (_paths(("blocks.{}.attn1", 3)), (2, 4, 6), 0, 0, "plain"),
    **{
        name: (_DUAL, GRID, 0, 7, "plain")
        for name in ("hunyuan_video", "hunyuan_video_i2v_token_replace", "hunyuan_video_i2v_latent_concat",
                     "motif_video")
    },
    "hunyuan_video_15_t2v": (_paths(("transformer_blocks.{}.attn", 2)), GRID, 0, 15, "pair_mask"),
    "hunyuan_video_framepack": (_DUAL, GRID, 56, 12, "several"),
    "hunyuan_video_framepack_batch_1": (_DUAL, GRID, 56, 10, "several"),
    **{
        name: (_paths(("transformer_blocks.{}.attn1", 3)), GRID, 7, 0, "plain")
        for name in ("cogvideox", "cogvideox_sincos", "cogvideox_i2v", "cogvideox_1_5")
    },
    "consisid": (_paths(("transformer_blocks.{}.attn1", 4)), GRID, 7, 0, "plain"),
    **{
        name: (_paths(("transformer_blocks.{}.attn1", 3)), GRID, 0, 0, "plain")
        for name in ("ltx", "ltx_video_coords", "allegro", "cosmos_1", "cosmos_2", "cosmos_2_5")
    },
    "allegro_masked": (_paths(("transformer_blocks.{}.attn1", 3)), GRID, 0, 0, "pair_mask"),
    **{
        name: (_paths(("transformer_blocks.{}.attn1", 2)), GRID, 0, 0, "plain")
        for name in ("ltx2", "ltx2_3", "sana_wm_refiner")
    },
    "ltx2_self_mask": (_paths(("transformer_blocks.{}.attn1", 2)), GRID, 0, 0, "pair_mask"),
    "mochi": ([p for p in _paths(("transformer_blocks.{}.attn1", 3)) for _ in range(2)], GRID, 0, 5, "plain"),
    "mochi_batch_1": (_paths(("transformer_blocks.{}.attn1", 3)), GRID, 0, 5, "plain"),
    "easyanimate": (_paths(("transformer_blocks.{}.attn1", 3)), GRID, 12, 0, "plain"),
    "cosmos_controlnet": (_paths(("control_blocks.{}.attn1", 2)), GRID, 0, 0, "plain"),
    "cosmos_3_t2v": (_paths(("layers.{}.self_attn", 3)), GRID, 0, 7, "packed"),
    "cosmos_3_i2v_sound": (_paths(("layers.{}.self_attn", 3)), GRID, 0, 12, "packed"),
    "kandinsky_5": (_paths(("visual_transformer_blocks.{}.self_attention", 3)), GRID, 0, 0, "plain"),
    "kandinsky_5_fractal": (_paths(("visual_transformer_blocks.{}.self_attention", 3)), (3, 8, 16), 0, 0, "flex"),
    **{
        name: (_paths(("visual_transformer_blocks.{}.video_dec_block.self_attention", 2)), GRID, 0, 0, "plain")
        for name in ("kandinsky_6", "kandinsky_6_audio")
    },
    "kandinsky_6_sr": (_paths(("visual_transformer_blocks.{}.self_attention", 2)), (3, 8, 16), 0, 0, "flex"),
    "helios": (_paths(("blocks.{}.attn1", 3)), GRID, 56, 0, "several"),
    "helios_amplified": (_paths(("blocks.{}.attn1", 3)), GRID, 56, 0, "several"),
    "anyflow_far_train": (_paths(("blocks.{}.attn1", 2)), GRID, 6, 0, "flex"),
    "anyflow_far_inference": (_paths(("blocks.{}.attn1", 2)), GRID, 0, 0, "extra_keys"),
    "motif_video_i2v": (_DUAL, GRID, 0, 12, "plain"),
    "motif_video_decoder": (_DUAL, GRID, 0, 7, "plain"),  # and single_transformer_blocks.2.attn: several
    "minimax_h3": (_paths(("transformer_blocks.{}.attn", 3)), GRID, 0, 12, "packed"),
    "joyimage_edit": (_paths(("double_blocks.{}.attn", 3)), GRID, 0, 7, "plain"),
    "joyimage_edit_items": (_paths(("double_blocks.{}.attn", 3)), GRID, 0, 7, "plain"),
    "joyimage_edit_plus": ([], (1, 4, 6), 0, 0, "none"),
    "sana_video": ([], GRID, 0, 0, "none"),
    "sana_wm": (["blocks.1.attn.attn", "blocks.1.attn.cam_attn", "blocks.3.attn.attn", "blocks.3.attn.cam_attn"],
                GRID, 0, 0, "plain"),
    "sana_wm_refiner_cached": (_paths(("transformer_blocks.{}.attn1", 2)), GRID, 0, 0, "extra_keys"),
    **{
        name: ([], GRID, 0, 0, "none")
        for name in ("latte", "transformer_temporal", "unet_3d_condition", "unet_motion", "sparse_controlnet",
                     "videomae_masked", "timesformer", "timesformer_space")
    },
    **{
        name: (_paths(("encoder.layer.{}.attention.attention", 3)), GRID, 0, 0, "plain")
        for name in ("videomae_eager", "videomae_sdpa")
    },
    **{name: (_paths(("layers.{}.attention", 3)), GRID, 1, 0, "plain") for name in ("vivit_eager", "vivit_sdpa")},
    "timesformer_joint": (_paths(("encoder.layer.{}.attention.attention", 3)), GRID, 1, 0, "plain"),
    "vchitect": (_paths(("blocks.{}.full", 3)), GRID, 0, 7, "plain"),
    **{name: (_paths(("blocks.{}.video", 3)), GRID, 0, 0, "plain") for name in ("dive", "dive_by_frame")},
    "ditctrl": (["blocks.0"], GRID, 7, 0, "plain"),
    "ditctrl_branches": (_paths(("blocks.{}", 3)), GRID, 7, 0, "plain"),
    "frames_conv2d": (_paths(("blocks.{}", 3)), GRID, 0, 0, "plain"),
}  # fmt: skip
