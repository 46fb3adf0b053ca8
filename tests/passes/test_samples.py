"""Queries and keys of the same places in different videos, views or samples attend to each other: that stays dense."""

from __future__ import annotations

import pytest
import torch
from graphs import VideoAttention, dense, raster_tokens, rewritten, verdicts, video
from torch import nn

import vmoba_compile

GRID = (2, 3, 4)


class Pair(VideoAttention):
    """Queries of ``first(tokens)``, keys and values of ``second(tokens)``; tokens [batch, tokens, channels]."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x, *more):
        tokens = raster_tokens(self.patch(x))
        q, _, _ = self.split(self.first(tokens, *more))
        _, k, v = self.split(self.second(tokens, *more))
        return dense(q, k, v)


def whole(x, *_):
    return x


OTHERS = {
    "index": (lambda x: x[0][None], lambda x: x[1][None]),
    "last": (lambda x: x[0][None], lambda x: x[-1][None]),
    "select": (lambda x: x.select(0, 0)[None], lambda x: x.select(0, 1)[None]),
    "unbind": (lambda x: x.unbind(0)[0][None], lambda x: x.unbind(0)[1][None]),
    "slices": (lambda x: x[:1], lambda x: x[1:2]),
    "chunk": (lambda x: x.chunk(2)[0], lambda x: x.chunk(2)[1]),
    "guidance halves": (lambda x: x.unflatten(0, (2, -1))[0], lambda x: x.unflatten(0, (2, -1))[1]),
    "outer and inner halves": (lambda x: x.unflatten(0, (2, -1))[:, 0], lambda x: x.unflatten(0, (2, -1))[0]),
    "flipped": (whole, lambda x: x.flip(0)),
    "rolled": (whole, lambda x: x.roll(1, 0)),
    "picked": (whole, lambda x: x[[1, 0, 3, 2]]),
    "swapped": (whole, lambda x: torch.cat(x.chunk(2)[::-1])),
    "one for all": (whole, lambda x: x[:1].expand(4, -1, -1)),
    "one for all, modulated": (lambda x: x * torch.arange(4.0)[:, None, None], lambda x: x[:1] * x[:, :1, :1]),
    "mean": (whole, lambda x: x.mean(0, keepdim=True).expand(4, -1, -1)),
    "stacked the other way": (whole, lambda x: torch.stack([x[1], x[0], x[2], x[3]])),
}


@pytest.mark.parametrize(("first", "second"), OTHERS.values(), ids=OTHERS.keys())
def test_other_samples(first, second):
    assert verdicts(rewritten(Pair(first, second), video(batch=4))) in (["cross_attention"], ["not_raster"])


SAME = {
    "index": lambda x: x[2][None],
    "unbind": lambda x: x.unbind(0)[1][None],
    "swapped": lambda x: torch.cat(x.chunk(2)[::-1]),
    "cut and joined": lambda x: torch.cat(x.chunk(2)),
    "flipped": lambda x: x.flip(0),
    "one": lambda x: x[1:2],
    "modulated by what was read off one": lambda x: x * (1 + x[0].mean()),
}


@pytest.mark.parametrize("pick", SAME.values(), ids=SAME.keys())
def test_the_same_samples(pick):
    """Picked once, for queries, keys and values alike."""

    class Model(VideoAttention):
        def forward(self, x):
            return dense(*self.split(pick(raster_tokens(self.patch(x)))))

    assert verdicts(rewritten(Model(), video(batch=4))) == ["rewritten"]


def test_heads_and_samples_folded_in_another_order():
    class Model(VideoAttention):
        def forward(self, x):
            q, k, v = self.split(raster_tokens(self.patch(x)))
            return dense(q.flatten(0, 1), *(t.transpose(0, 1).flatten(0, 1) for t in (k, v)))

    assert verdicts(rewritten(Model(), video())) == ["cross_attention"]


def test_queries_keys_and_values_stacked_and_taken_apart():
    class Model(VideoAttention):
        def forward(self, x):
            return dense(*torch.stack(self.split(raster_tokens(self.patch(x)))).unbind(0))

    assert verdicts(rewritten(Model(), video())) == ["rewritten"]


@pytest.mark.parametrize("swap", [False, True])
def test_two_videos_stacked(swap):
    class Model(VideoAttention):
        def forward(self, x, y):
            both = torch.stack([raster_tokens(self.patch(x)), raster_tokens(self.patch(y))])
            (q, _, _), (_, k, v) = self.split(both[0]), self.split(both[int(swap)])
            return dense(q, k, v)

    assert not rewritten(Model(), video(), video()).rewritten  # whose tokens these are is lost


@pytest.mark.parametrize("axis", [1, 2])
def test_views_are_no_frames(axis):
    """Images of [batch, views, frames, ...] or [batch, frames, views, ...], a patch embedding for each."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch = nn.Conv2d(3, 16, 2, 2)
            self.split = VideoAttention().split

        def forward(self, x):
            images = self.patch(x.flatten(0, 2)).unflatten(0, x.shape[:3])
            tokens = images.movedim(axis, 2).flatten(0, 1).permute(0, 1, 3, 4, 2).flatten(1, 3)
            return dense(*self.split(tokens))

    x = torch.randn(1, 2, 2, 3, 6, 8)
    assert verdicts(rewritten(Model(), x)) == ["no_grid"]
    assert verdicts(rewritten(Model(), x, grid=GRID)) == ["rewritten"]


def test_a_model_called_on_its_own_output():
    """Pixels that a grid was taken apart into are a video again."""

    class Model(VideoAttention):
        def __init__(self):
            super().__init__()
            self.back = nn.Linear(16, 12)

        def once(self, x):
            grid = self.patch(x)
            out = dense(*self.split(raster_tokens(grid))).transpose(1, 2).flatten(2)
            pixels = self.back(out).view(2, *grid.shape[2:], 3, 2, 2)
            return pixels.permute(0, 4, 1, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)

        def forward(self, x):
            return self.once(self.once(x))

    report = rewritten(Model(), video())
    assert verdicts(report) == ["rewritten"] * 2 and [site.grid for site in report] == [GRID] * 2


def test_verdicts_name_the_samples():
    (site,) = vmoba_compile.explain(Pair(whole, lambda x: x.flip(0)), video(), config={"min_tokens": 0})
    assert "queries are of samples" in site.detail and "keys of flip" in site.detail
