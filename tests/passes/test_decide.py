"""Which attentions are rewritten, and why the others are not. Every case in torch IR and as an exported program."""

from __future__ import annotations

import pytest
import torch
from graphs import VideoAttention, compiled, dense, raster_tokens, rewritten, verdicts, video
from torch import nn
from torch.nn import functional as F
from vmoba_compile.passes import GridError

SDPA = F.scaled_dot_product_attention
GRID = (2, 3, 4)


def only(report):
    assert len(report) == 1, str(report)
    return report.sites[0]


# Conditions beside the video


@pytest.mark.parametrize(("before", "after"), [(0, 0), (0, 1), (1, 0), (5, 0), (0, 7), (3, 4)])
def test_conditions(before, after):
    def order(x):
        x = raster_tokens(x)
        return torch.cat([x.new_ones(2, before, 16), x, x.new_zeros(2, after, 16)], 1)

    site = only(rewritten(VideoAttention(order), video()))
    assert (site.grid, site.prefix, site.suffix) == (GRID, before, after)


def test_padding_is_a_condition():
    model = VideoAttention(lambda x: F.pad(raster_tokens(x), (0, 0, 2, 6)))
    site = only(rewritten(model, video()))
    assert (site.prefix, site.suffix) == (2, 6)


def test_padded_buffer_is_a_condition():
    def order(x):
        buffer = x.new_zeros(2, 32, 16)
        buffer[:, :24] = raster_tokens(x)
        return buffer

    site = only(rewritten(VideoAttention(order), video()))
    assert (site.grid, site.prefix, site.suffix) == (GRID, 0, 8)


def test_text_joined_in_another_order_for_keys():
    def attend(q, k, v):
        text = q.new_ones(2, 2, 5, 8)
        return SDPA(torch.cat([text, q], 2), torch.cat([k, text], 2), torch.cat([v, text], 2))

    assert not rewritten(VideoAttention(attend=attend), video()).rewritten


def test_values_in_another_order():
    def attend(q, k, v):
        text = q.new_ones(2, 2, 5, 8)
        return SDPA(torch.cat([text, q], 2), torch.cat([text, k], 2), torch.cat([v, text], 2))

    assert not rewritten(VideoAttention(attend=attend), video()).rewritten
    flipped = VideoAttention(attend=lambda q, k, v: SDPA(q, k, v.flip(2)))
    assert verdicts(rewritten(flipped, video())) == ["not_raster"]


def test_keys_in_another_order():
    assert verdicts(rewritten(VideoAttention(attend=lambda q, k, v: SDPA(q, k.flip(2), v)), video())) == ["not_raster"]
    assert verdicts(rewritten(VideoAttention(attend=lambda q, k, v: SDPA(q.roll(1, 2), k, v)), video())) == [
        "not_raster"
    ]


def test_separate_conditions_of_queries_and_keys():
    def attend(q, k, v):
        return SDPA(*(torch.cat([t.new_full((2, 2, 3, 8), i), t], 2) for i, t in enumerate((q, k, v))))

    assert only(rewritten(VideoAttention(attend=attend), video())).prefix == 3


@pytest.mark.parametrize("length", [7, 24])
def test_cross_attention(length):
    class Model(VideoAttention):
        def forward(self, x, text):
            q, _, _ = self.split(raster_tokens(self.patch(x)))
            _, k, v = self.split(text)
            return SDPA(q, k, v) + SDPA(k, q, q).sum()

    report = rewritten(Model(), video(), torch.randn(2, length, 16))
    assert verdicts(report) == ["cross_attention", "cross_attention"]


def test_two_videos_of_one_size():
    class Model(VideoAttention):
        def __init__(self):
            super().__init__()
            self.other = nn.Conv3d(3, 16, (1, 2, 2), stride=(1, 2, 2))

        def forward(self, x, y):
            x, y = raster_tokens(self.patch(x)), raster_tokens(self.other(y))
            (q, k, _), (q2, k2, v2) = self.split(x), self.split(y)
            both = self.split(torch.cat([x, y], 1))
            return SDPA(q, k2, v2), SDPA(q, k, v2), SDPA(q2, k2, v2), SDPA(*both), SDPA(*self.split(x + y))

    report = rewritten(Model(), video(), video())
    assert verdicts(report) == ["cross_attention", "no_grid", "rewritten", "several_grids", "rewritten"]


def test_one_embedding_used_for_two_videos():
    class Model(VideoAttention):
        def forward(self, x, y):
            q, _, _ = self.split(raster_tokens(self.patch(x)))
            _, k, v = self.split(raster_tokens(self.patch(y)))
            return SDPA(q, k, v)

    assert verdicts(rewritten(Model(), video(), video())) == ["cross_attention"]


def test_text_refiner_is_no_video():
    class Model(VideoAttention):
        def forward(self, x, text):
            return super().forward(x), SDPA(*self.split(text))

    assert verdicts(rewritten(Model(), video(), torch.randn(2, 24, 16))) == ["rewritten", "not_video"]


# Convolutions


class ImageModel(VideoAttention):
    def __init__(self, order):
        super().__init__(order)
        self.patch = nn.Conv2d(3, 16, 2, stride=2)


def test_frames_folded_into_the_batch():
    def forward(self, x):
        images = self.patch(x.transpose(1, 2).flatten(0, 1))
        return self.attend(*self.split(images.flatten(2).transpose(1, 2).reshape(2, -1, 16)))

    model = type("Model", (ImageModel,), {"forward": forward})(None)
    assert only(rewritten(model, video())).grid == GRID


def test_images_are_no_video():
    assert not rewritten(ImageModel(raster_tokens), torch.randn(2, 3, 6, 8)).rewritten


def test_stacked_copies_of_an_image_are_no_frames():
    model = ImageModel(lambda x: torch.stack([raster_tokens(x), raster_tokens(x) * 2], 1).flatten(1, 2))
    assert not rewritten(model, torch.randn(2, 3, 6, 8)).rewritten


class Inner(VideoAttention):
    def __init__(self, conv, **kwargs):
        super().__init__(**kwargs)
        self.inner = conv

    def forward(self, x):
        return self.attend(*self.split(self.order(self.inner(self.patch(x)))))


def test_depthwise_convolution_keeps_the_grid():
    site = only(rewritten(Inner(nn.Conv3d(16, 16, 3, padding=1, groups=16)), video()))
    assert site.grid == GRID and site.evidence == "conv3d patch"


def test_downsampling_convolution_makes_a_new_grid():
    site = only(rewritten(Inner(nn.Conv3d(16, 16, (1, 1, 2), stride=(1, 1, 2))), video()))
    assert site.grid == (2, 3, 2) and site.evidence == "conv3d inner"


def test_convolution_in_windows_makes_no_grid():
    class Model(VideoAttention):
        def __init__(self):
            super().__init__()
            self.inner = nn.Conv2d(16, 16, 3, padding=1)

        def forward(self, x):
            x = self.patch(x)[:, :, 0]
            x = x.unflatten(3, (2, 2)).permute(0, 3, 1, 2, 4).flatten(0, 1)
            x = self.inner(x).flatten(2).transpose(1, 2).reshape(2, -1, 16)
            return dense(*self.split(x))

    assert not rewritten(Model(), video()).rewritten


def test_transposed_convolution_is_no_evidence():
    assert not rewritten(Inner(nn.ConvTranspose3d(16, 16, 1)), video()).rewritten


# Arguments of the call


@pytest.mark.parametrize(
    ("attend", "reason"),
    [
        (lambda q, k, v: SDPA(q, k, v, None, 0.0, True), "causal"),
        (lambda q, k, v: SDPA(q, k, v, is_causal=True), "causal"),
        (lambda q, k, v: SDPA(q, k, v, scale=0.3), "rewritten"),
        (lambda q, k, v: SDPA(query=q, key=k, value=v, attn_mask=None, dropout_p=0.0), "rewritten"),
        (lambda q, k, v: SDPA(q[0], k[0], v[0]), "rewritten"),
        (lambda q, k, v: SDPA(*(t.flatten(0, 1) for t in (q, k, v))), "rewritten"),
        (lambda q, k, v: SDPA(q[None], k[None], v[None]), "rewritten"),
        (lambda q, k, v: SDPA(q, k[:, :1], v[:, :1], enable_gqa=True), "rewritten"),
        (lambda q, k, v: SDPA(q, k[:, :1], v[:, :1]), "rewritten"),
        (lambda q, k, v: SDPA(q, k[:1], v[:1]), "layout"),
        (lambda q, k, v: SDPA(q, k, v[..., :4]), "layout"),
        (lambda q, k, v: SDPA(q[:, :, None].squeeze(2), k.clone(), v.contiguous()), "rewritten"),
    ],
)
def test_arguments(attend, reason):
    assert verdicts(rewritten(VideoAttention(attend=attend), video())) == [reason]


def test_grouped_queries():
    attend = lambda q, k, v: SDPA(q, k[:, ::2], v[:, ::2], enable_gqa=True)  # noqa: E731
    assert only(rewritten(VideoAttention(attend=attend, heads=4), video())).rewritten


def test_dropout():
    class Model(VideoAttention):
        def forward(self, x):
            q, k, v = self.split(raster_tokens(self.patch(x)))
            return SDPA(q, k, v, dropout_p=0.1 if self.training else 0.0)

    capture, _ = compiled(Model().train(), video())
    assert verdicts(capture.report) == ["dropout"]
    assert verdicts(rewritten(Model().eval(), video())) == ["rewritten"]


# Masks

KEYS = torch.arange(24) % 5 != 0


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (KEYS.expand(2, 1, 1, 24).clone(), "rewritten"),
        (torch.stack([KEYS, ~KEYS])[:, None, None], "rewritten"),
        (KEYS[None, None, None], "rewritten"),
        (KEYS[None], "rewritten"),
        (torch.rand(24, 24) > 0.3, "mask"),
        (torch.rand(2, 1, 24, 24) > 0.3, "mask"),
        (torch.rand(2, 2, 1, 24) > 0.3, "mask"),
        (torch.randn(2, 1, 1, 24), "mask"),
        (torch.zeros(24, 24), "mask"),
        (torch.ones(2, 1, 1, 1, dtype=torch.bool), "rewritten"),
        (KEYS.expand(2, 2, 24, 24), "mask"),  # a graph input: its strides are not the graph's to know
    ],
)
def test_masks(mask, reason):
    report = rewritten(VideoAttention(attend=lambda q, k, v, m: SDPA(q, k, v, attn_mask=m)), video(), mask)
    assert verdicts(report) == [reason]


@pytest.mark.parametrize("shape", [(2, 2, 24, 24), (2, 1, 24, 24), (24, 24)])
def test_mask_expanded_in_the_graph(shape):
    model = VideoAttention(attend=lambda q, k, v, m: SDPA(q, k, v, attn_mask=m.expand(shape)))
    assert verdicts(rewritten(model, video(), KEYS)) == ["rewritten"]


def test_mask_of_text_and_video():
    def attend(q, k, v, m):
        text = q.new_ones(2, 2, 4, 8)
        return SDPA(
            *(torch.cat([text, t], 2) for t in (q, k, v)), attn_mask=F.pad(m, (0, 24), value=True)[:, None, None]
        )

    mask = torch.tensor([[True, True, False, False], [True, True, True, False]])
    assert only(rewritten(VideoAttention(attend=attend), video(), mask)).prefix == 4


# The grid given by the caller


class Tokens(VideoAttention):
    """Tokens that come patched already, with or without text."""

    def forward(self, x, *text):
        return dense(*self.split(torch.cat([x, *text], 1) if text else x))


def test_given_grid():
    x = torch.randn(2, 24, 16)
    assert verdicts(rewritten(Tokens(), x)) == ["no_grid"]
    assert only(rewritten(Tokens(), x, grid=GRID)).grid == GRID
    assert verdicts(rewritten(Tokens(), x, grid=(2, 3, 5))) == ["no_grid"]


def test_given_grid_beside_text():
    x, text = torch.randn(2, 24, 16), torch.randn(2, 5, 16)
    site = only(rewritten(Tokens(), x, text, grid=GRID))
    assert (site.prefix, site.suffix) == (0, 5)
    site = only(rewritten(Tokens(), text, x, grid=GRID))
    assert (site.prefix, site.suffix) == (5, 0)
    assert verdicts(rewritten(Tokens(), x, x.clone(), grid=GRID)) == ["no_grid"]  # which of the two?


def test_given_grid_wins_over_the_one_found():
    assert only(rewritten(VideoAttention(), video(), grid=(4, 3, 2))).grid == (4, 3, 2)


def test_wrong_given_grid():
    with pytest.raises(GridError, match=r"has 30 tokens, but the video has 24 \(conv3d patch\)"):
        try:
            compiled(VideoAttention(), video(), grid=(2, 3, 5))
        except torch._dynamo.exc.BackendCompilerFailed as error:
            raise error.inner_exception from None


def test_given_grid_does_not_overrule_a_known_reordering():
    assert verdicts(
        rewritten(VideoAttention(lambda x: raster_tokens(x)[:, torch.arange(23, -1, -1)]), video(), grid=GRID)
    ) == ["not_raster"]


def test_given_grid_needs_static_sizes():
    capture, _ = compiled(Tokens(), torch.randn(2, 24, 16), grid=GRID, dynamic=True)
    assert verdicts(capture.report) == ["dynamic_grid"]
