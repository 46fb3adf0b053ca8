"""Where a grid is known from: patches without a convolution, rotary tables, several grids; and where it is not."""

from __future__ import annotations

import pytest
import torch
from graphs import VideoAttention, dense, raster_tokens, rewritten, verdicts, video
from torch import nn
from torch.nn import functional as F

GRID = (2, 3, 4)


def only(report):
    assert len(report) == 1, str(report)
    return report.sites[0]


class Patches(VideoAttention):
    """Patches cut out by reshape and permute; ``cut(x)`` makes [batch, tokens, 12] of [batch, 3, frames, rows, columns]."""

    def __init__(self, cut, **kwargs):
        super().__init__(**kwargs)
        self.cut = cut
        self.project = nn.Linear(12, 16)

    def forward(self, x, *more):
        return self.attend(*self.split(self.project(self.cut(x))), *more)


def patches(x):
    """[batch, frames, rows, columns, 12]."""
    b, c, t, h, w = x.shape
    x = x.reshape(b, c, t, h // 2, 2, w // 2, 2)
    return x.permute(0, 2, 3, 5, 1, 4, 6).flatten(4)


@pytest.mark.parametrize(
    "cut",
    [
        lambda x: patches(x).flatten(1, 3),
        lambda x: patches(x).reshape(2, 24, 12),
        lambda x: patches(x).flatten(1, 2).flatten(1, 2),
        lambda x: patches(torch.cat([x, torch.zeros_like(x[:, :1])], 1)[:, :3]).flatten(1, 3),
    ],
    ids=["flatten", "reshape", "step by step", "with a channel more"],
)
def test_patches_without_a_convolution(cut):
    assert only(rewritten(Patches(cut), video())).grid == GRID


def test_pixel_unshuffle_is_not_followed():
    model = Patches(lambda x: F.pixel_unshuffle(x.transpose(1, 2), 2).permute(0, 1, 3, 4, 2).flatten(1, 3))
    assert verdicts(rewritten(model, video())) == ["no_grid"]


@pytest.mark.parametrize(
    "cut",
    [
        lambda x: patches(x).flip(2).flatten(1, 3),
        lambda x: patches(x)[:, :, torch.tensor([0, 2, 1])].flatten(1, 3),
        lambda x: x.reshape(2, 3, 2, 3, 2, 2, 4).permute(0, 2, 4, 5, 3, 1, 6).flatten(1, 4).flatten(2),  # windows
        lambda x: patches(x).flatten(0, 1).flatten(1, 2),  # a frame at a time
    ],
    ids=["flipped", "picked", "windows", "frame by frame"],
)
def test_patches_in_another_order(cut):
    assert not rewritten(Patches(cut), video()).rewritten


class Rotary(nn.Module):
    """Tokens come as a sequence; ``table(q)`` counts their places up: [tokens, 3] or more."""

    def __init__(self, table, attend=dense, on=(True, True)):
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.table, self.attend, self.on = table, attend, on

    def forward(self, x, *more):
        q, k, v = (part.unflatten(2, (2, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        angles = self.table(x)[..., :1].cos()
        return self.attend(q * angles if self.on[0] else q, k * angles if self.on[1] else k, v, *more)


def counted(x, sizes=GRID):
    axes = [torch.arange(size, dtype=torch.float32) for size in sizes]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2)


def expanded(x, sizes=GRID):
    t, h, w = (torch.arange(size, dtype=torch.float32) for size in sizes)
    parts = t[:, None, None].expand(sizes), h[None, :, None].expand(sizes), w[None, None, :].expand(sizes)
    return torch.stack(parts, -1).reshape(-1, 3)


@pytest.mark.parametrize("table", [counted, expanded])
@pytest.mark.parametrize("on", [(True, True), (True, False)])
def test_rotary_table(table, on):
    site = only(rewritten(Rotary(table, on=on), torch.randn(2, 24, 16)))
    assert (site.reason.value, site.grid) == ("rewritten", GRID)


def test_the_table_is_not_the_tokens():
    """Two videos at the same places: their attention to each other is no self-attention."""

    class Model(Rotary):
        def forward(self, x, y):
            angles = self.table(x)[..., :1].cos()
            q, _, _ = (part.unflatten(2, (2, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
            _, k, v = (part.unflatten(2, (2, 8)).transpose(1, 2) for part in self.qkv(y).chunk(3, dim=-1))
            return dense(q * angles, k * angles, v)

    assert verdicts(rewritten(Model(counted), torch.randn(2, 24, 16), torch.randn(2, 24, 16))) == ["cross_attention"]


class TwoReadings(VideoAttention):
    """Patches of one grid, and a table that counts another one up."""

    def __init__(self, sizes=(4, 3, 2), on=(True, True)):
        super().__init__()
        self.sizes, self.on = sizes, on

    def parts(self, x):
        q, k, v = self.split(raster_tokens(self.patch(x)))
        angles = counted(x, self.sizes)[..., :1].cos()
        return q * angles if self.on[0] else q, k * angles if self.on[1] else k, v

    def forward(self, x):
        return dense(*self.parts(x))


@pytest.mark.parametrize("on", [(True, True), (True, False), (False, True)], ids=["both", "queries", "keys"])
def test_a_table_that_contradicts_the_patches(on):
    site = only(rewritten(TwoReadings(on=on), video()))
    assert site.reason.value == "ambiguous_grid"
    assert "video 2x3x4" in site.detail and "video 4x3x2" in site.detail


def test_a_given_grid_decides_between_two_readings():
    assert only(rewritten(TwoReadings(), video(), grid=(4, 3, 2))).grid == (4, 3, 2)
    assert verdicts(rewritten(TwoReadings(), video(), grid=(4, 3, 1))) == ["ambiguous_grid"]


def test_two_tables_that_disagree():
    class Model(Rotary):
        def forward(self, x):
            q, k, v = (part.unflatten(2, (2, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
            return dense(q * counted(x)[..., :1].cos(), k * counted(x, (3, 2, 4))[..., :1].cos(), v)

    assert verdicts(rewritten(Model(counted), torch.randn(2, 24, 16))) == ["ambiguous_grid"]


def test_a_table_of_two_axes_is_no_grid():
    def flat(x):
        return torch.stack(torch.meshgrid(torch.arange(4.0), torch.arange(6.0), indexing="ij"), -1).flatten(0, 1)

    assert verdicts(rewritten(Rotary(flat), torch.randn(2, 24, 16))) == ["no_grid"]


@pytest.mark.parametrize(("history", "verdict"), [((1, 3, 4), "rewritten"), ((2, 3, 4), "several_grids")])
@pytest.mark.parametrize("first", [True, False])
def test_history_beside_the_video(history, verdict, first):
    class Model(VideoAttention):
        def forward(self, x, y):
            x, y = raster_tokens(self.patch(x)), raster_tokens(self.patch(y))
            return dense(*self.split(torch.cat([y, x] if first else [x, y], 1)))

    site = only(rewritten(Model(), video(), video(*history)))
    assert site.reason.value == verdict
    if verdict == "rewritten":
        assert (site.grid, site.prefix, site.suffix) == (GRID, 12 if first else 0, 0 if first else 12)


def test_texts_of_two_lengths_in_a_batch():
    """Samples are attended one by one, each with its own text, and joined again."""

    class Model(VideoAttention):
        def forward(self, x, text):
            x = raster_tokens(self.patch(x))
            for _ in range(2):
                parts = [dense(*self.split(torch.cat([x[i : i + 1], text[i : i + 1, : 3 + i]], 1))) for i in range(2)]
                joined = torch.cat([F.pad(part, (0, 0, 0, 1 - i)) for i, part in enumerate(parts)])
                x = x + joined.transpose(1, 2).flatten(2)[:, :24]
            return x

    report = rewritten(Model(), video(), torch.randn(2, 5, 16))
    assert verdicts(report) == ["rewritten"] * 4 and [site.suffix for site in report] == [3, 4, 3, 4]


def test_several_axes_folded_into_the_batch():
    def attend(q, k, v):
        return dense(q, k, v)

    class Model(VideoAttention):
        def forward(self, x):
            b, c, t, h, w = x.shape
            x = x.permute(0, 3, 4, 2, 1).reshape(b * h * w, t, c)
            return attend(*self.split(F.pad(x, (0, 13))))

    assert verdicts(rewritten(Model(), video(3, 2, 2))) == ["factorised"]


class Unpatched(nn.Module):
    """Tokens come as a sequence; ``back(pixels)`` makes a video of [batch, tokens, 12]."""

    def __init__(self, back):
        super().__init__()
        self.split, self.out, self.back = VideoAttention().split, nn.Linear(16, 12), back

    def forward(self, x):
        x = x + dense(*self.split(x)).transpose(1, 2).flatten(2)
        return self.back(self.out(x))


def pixels(x, sizes=GRID):
    x = x.reshape(2, *sizes, 1, 2, 2, 3)
    return x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)


@pytest.mark.parametrize(
    "back",
    [pixels, lambda x: pixels(x).transpose(1, 2), lambda x: x.unflatten(1, GRID)],
    ids=["channels first", "frames first", "unflatten"],
)
def test_what_the_output_is_taken_apart_into(back):
    assert only(rewritten(Unpatched(back), torch.randn(2, 24, 16))).grid == GRID


@pytest.mark.parametrize(
    "back",
    [
        lambda x: (pixels(x), pixels(x, (4, 3, 2))),
        lambda x: pixels(x).permute(0, 1, 3, 2, 4),
        lambda x: x.unflatten(1, GRID).transpose(1, 3),
        lambda x: x.reshape(2, 2, 3, 4, 12)[:, :, :, :, None],
        lambda x: x.unflatten(1, (6, 4)),
        lambda x: x.flip(1).unflatten(1, GRID),
    ],
    ids=["in two ways", "rows first", "columns first", "six dimensions", "rows and columns", "flipped"],
)
def test_outputs_that_show_no_grid(back):
    assert verdicts(rewritten(Unpatched(back), torch.randn(2, 24, 16))) == ["no_grid"]
