"""What the rewrite makes of each model of the zoo: how many attentions it rewrites, and why it leaves the others."""

from __future__ import annotations

from typing import NamedTuple

from .common import GRID


class Outcome(NamedTuple):
    """``rewritten`` attentions, all of those in ``EXPECT`` or the first of them; ``dense`` ones by their reason."""

    rewritten: int
    dense: dict[str, int]
    grid: tuple[int, int, int] | None = None  # given by the user
    why: str = ""  # attentions over the whole video stay dense


OUTCOMES: dict[str, Outcome] = {
    "wan_t2v": Outcome(3, {"cross_attention": 3}),
    "wan_i2v": Outcome(3, {"cross_attention": 6}),
    "wan_flf2v": Outcome(3, {"cross_attention": 6}),
    "wan_ti2v_5b": Outcome(3, {"cross_attention": 3}),
    "wan_animate": Outcome(4, {"cross_attention": 10}),
    "wan_animate_2_extract": Outcome(0, {"cross_attention": 1, "no_grid": 1}, why="graph break before each attention"),
    "wan_animate_2_cached": Outcome(0, {"cross_attention": 1, "spelling": 1}, why="flex attention"),
    "wan_vace": Outcome(5, {"cross_attention": 5}),
    "skyreels_v2": Outcome(3, {"cross_attention": 3}),
    "skyreels_v2_i2v": Outcome(3, {"cross_attention": 6}),
    "skyreels_v2_df": Outcome(3, {"cross_attention": 3}),
    "skyreels_v2_df_fps": Outcome(3, {"cross_attention": 3}),
    "skyreels_v2_ar": Outcome(0, {"cross_attention": 3, "mask": 3}, why="causal mask over blocks"),
    "chronoedit": Outcome(3, {"cross_attention": 6}),
    "chronoedit_two_frames": Outcome(3, {"cross_attention": 6}),
    "hunyuan_video": Outcome(4, {"not_video": 1}),
    "hunyuan_video_i2v_token_replace": Outcome(4, {"not_video": 1}),
    "hunyuan_video_i2v_latent_concat": Outcome(4, {"not_video": 1}),
    "hunyuan_video_15_t2v": Outcome(2, {"not_video": 1}),
    "hunyuan_video_framepack": Outcome(4, {"not_video": 1}),
    "hunyuan_video_framepack_batch_1": Outcome(4, {"not_video": 1}),
    "cogvideox": Outcome(3, {}),
    "cogvideox_sincos": Outcome(3, {}),
    "cogvideox_i2v": Outcome(3, {}),
    "cogvideox_1_5": Outcome(3, {}),
    "consisid": Outcome(4, {"cross_attention": 4}),
    "ltx": Outcome(3, {"cross_attention": 3}),
    "ltx_video_coords": Outcome(3, {"cross_attention": 3}, grid=GRID),
    "ltx2": Outcome(2, {"cross_attention": 8, "not_video": 2}),
    "ltx2_3": Outcome(0, {"cross_attention": 4, "no_grid": 3}, why="graph breaks"),
    "ltx2_self_mask": Outcome(0, {"cross_attention": 8, "mask": 2, "not_video": 2}, why="float mask over pairs"),
    "mochi": Outcome(6, {"cross_attention": 1}),
    "mochi_batch_1": Outcome(3, {"cross_attention": 1}),
    "allegro": Outcome(3, {"cross_attention": 3}),
    "allegro_masked": Outcome(3, {"cross_attention": 3}),
    "easyanimate": Outcome(3, {}),
    "cosmos_1": Outcome(3, {"cross_attention": 3}),
    "cosmos_2": Outcome(3, {"cross_attention": 3}),
    "cosmos_2_5": Outcome(3, {"cross_attention": 6}),
    "cosmos_controlnet": Outcome(2, {"cross_attention": 2}),
    "cosmos_3_t2v": Outcome(3, {"not_video": 3}),
    "cosmos_3_i2v_sound": Outcome(3, {"not_video": 3}),
    "kandinsky_5": Outcome(3, {"cross_attention": 3, "not_video": 1}),
    "kandinsky_5_fractal": Outcome(0, {"spelling": 7}, why="flex attention"),
    "kandinsky_6": Outcome(2, {"cross_attention": 2, "not_video": 2}),
    "kandinsky_6_audio": Outcome(2, {"cross_attention": 8, "not_video": 4}),
    "kandinsky_6_sr": Outcome(0, {"spelling": 2}, why="flex attention"),
    "helios": Outcome(3, {"cross_attention": 3}),
    "helios_amplified": Outcome(3, {"cross_attention": 3}),
    "helios_first": Outcome(3, {"cross_attention": 3}),
    "anyflow": Outcome(3, {"cross_attention": 3}),
    "anyflow_far_train": Outcome(0, {"cross_attention": 2, "spelling": 2}, why="flex attention"),
    "anyflow_far_inference": Outcome(0, {"cross_attention": 2, "spelling": 2}, why="flex attention"),
    "motif_video": Outcome(4, {}),
    "motif_video_i2v": Outcome(4, {"cross_attention": 4}),
    "motif_video_decoder": Outcome(4, {"several_grids": 1}),
    "minimax_h3": Outcome(3, {"no_grid": 1}, grid=GRID),
    "joyimage_edit": Outcome(3, {}),
    "joyimage_edit_items": Outcome(3, {}),
    "joyimage_edit_plus": Outcome(0, {"no_grid": 3}),
    "sana_video": Outcome(0, {"cross_attention": 3}),
    "sana_wm": Outcome(4, {"cross_attention": 4}),
    "sana_wm_refiner": Outcome(2, {"cross_attention": 2}, grid=GRID),
    "sana_wm_refiner_cached": Outcome(0, {"cross_attention": 2, "layout": 2}, grid=GRID, why="half the keys from a cache"),
    "latte": Outcome(0, {"cross_attention": 2, "factorised": 4}),
    "transformer_temporal": Outcome(0, {"factorised": 4}),
    "unet_3d_condition": Outcome(0, {"cross_attention": 4, "factorised": 14}),
    "unet_motion": Outcome(0, {"cross_attention": 4, "factorised": 18}),
    "sparse_controlnet": Outcome(0, {"cross_attention": 2, "factorised": 4}),
    "videomae_eager": Outcome(3, {}),
    "videomae_sdpa": Outcome(3, {}),
    "videomae_masked": Outcome(0, {"not_raster": 3}),
    "vivit_eager": Outcome(3, {}),
    "vivit_sdpa": Outcome(3, {}),
    "timesformer": Outcome(0, {"factorised": 6}),
    "timesformer_joint": Outcome(3, {}),
    "timesformer_space": Outcome(0, {"factorised": 3}),
    "vchitect": Outcome(3, {"factorised": 6}),
    "dive": Outcome(3, {"cross_attention": 3, "factorised": 3}),
    "dive_by_frame": Outcome(3, {"cross_attention": 3, "factorised": 3}, grid=GRID),
    "ditctrl": Outcome(1, {"cross_attention": 2}),
    "ditctrl_branches": Outcome(3, {"cross_attention": 3}),
    "frames_conv2d": Outcome(3, {}),
}  # fmt: skip
