"""Token layouts of video transformers outside of diffusers, made again from plain modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .common import BATCH, GRID, TOKENS, Pair, ready, video_latents, words

WIDTH, HEADS = 32, 2
VIEWS = 2


class _Attention(nn.Module):
    """Queries of ``x``, keys and values of ``context`` or of ``x``: [batch, tokens, width]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key = nn.Linear(WIDTH, WIDTH)
        self.value = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = self.norm(x)
        context = x if context is None else self.norm(context)
        q, k, v = self.heads(self.query(x)), self.heads(self.key(context)), self.heads(self.value(context))
        return self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))


class _Softmax(_Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.matmul(q, k.transpose(-2, -1)) / q.shape[-1] ** 0.5
        return torch.matmul(scores.softmax(dim=-1), v)


class _Vchitect(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(4, WIDTH, 2, 2)
        self.text = nn.Linear(16, WIDTH)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"spatial": _Attention(), "temporal": _Attention(), "full": _Attention()}) for _ in range(3)
        )
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, latents: Tensor, text: Tensor) -> Tensor:
        batch, _, frames, _, _ = latents.shape
        x = self.embed(latents.transpose(1, 2).flatten(0, 1)).flatten(2).transpose(1, 2)
        text = self.text(text)
        for block in self.blocks:
            spatial = block["spatial"](x)
            by_pixel = x.unflatten(0, (batch, frames)).transpose(1, 2)  # [batch, pixels, frames, width]
            temporal = block["temporal"](by_pixel.flatten(0, 1)).view(by_pixel.shape)
            joint = block["full"](torch.cat([by_pixel.flatten(1, 2), text], dim=1))
            video, words = joint.split([by_pixel.shape[1] * frames, text.shape[1]], dim=1)
            by_pixel = temporal + video.view(by_pixel.shape)
            x = x + spatial + by_pixel.transpose(1, 2).flatten(0, 1)
            text = text + words
        return self.head(x)


def vchitect() -> Pair:
    """3x4x6 with time fastest ("b (h w t)"), prefix 0, suffix 7; frames in the batch between blocks. Full:
    blocks.{0..2}.full. Others: blocks.*.spatial (24 tokens of a frame), blocks.*.temporal (3 frames of a pixel)."""
    torch.manual_seed(0)
    return ready(_Vchitect()), dict(latents=video_latents(), text=words(16))


class _Dive(nn.Module):
    """``by_frame``: one conv2d for all frames of all views, instead of a conv3d for each view."""

    def __init__(self, by_frame: bool) -> None:
        super().__init__()
        self.by_frame = by_frame
        self.embed = nn.Conv2d(4, WIDTH, 2, 2) if by_frame else nn.Conv3d(4, WIDTH, (1, 2, 2), (1, 2, 2))
        self.text = nn.Linear(16, WIDTH)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"video": _Attention(), "views": _Attention(), "text": _Attention()}) for _ in range(3)
        )
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, latents: Tensor, text: Tensor) -> Tensor:
        batch, views, _, frames, _, _ = latents.shape
        if self.by_frame:
            x = self.embed(latents.transpose(2, 3).flatten(0, 2)).flatten(2).transpose(1, 2)
            x = x.unflatten(0, (batch * views, frames)).flatten(1, 2)
        else:
            x = self.embed(latents.flatten(0, 1)).flatten(2).transpose(1, 2)
        text = self.text(text).repeat_interleave(views, dim=0)
        for block in self.blocks:
            x = x + block["video"](x)
            split = x.view(batch, views, frames, -1, WIDTH).transpose(1, 2)  # [batch, frames, views, pixels, width]
            seen = block["views"](split.flatten(2, 3).flatten(0, 1)).view(split.shape)
            x = x + seen.transpose(1, 2).flatten(2, 3).flatten(0, 1)
            x = x + block["text"](x, text)
        return self.head(x)


def _dive(by_frame: bool) -> Pair:
    torch.manual_seed(0)
    latents = torch.randn(BATCH, VIEWS, 4, 3, 8, 12)
    return ready(_Dive(by_frame)), dict(latents=latents, text=words(16))


def dive() -> Pair:
    """3x4x6 for each of 2 views, which are folded into the batch, 0, 0. Full: blocks.{0..2}.video. Others:
    blocks.*.views (2 views x 24 positions of a frame, frames in the batch), blocks.*.text (cross, 7)."""
    return _dive(by_frame=False)


def dive_by_frame() -> Pair:
    """As dive with a conv2d over the frames of all views: the batch of its patch embedding is samples, views, frames."""
    return _dive(by_frame=True)


class _Shared(_Attention):
    """Joint attention of text and video. All samples see the first one's video; text keys are their own."""

    def forward(self, x: Tensor, length: int = 0) -> Tensor:
        x = self.norm(x)
        q, k, v = self.heads(self.query(x)), self.heads(self.key(x)), self.heads(self.value(x))
        if length:
            k, v = self.first(k, length), self.first(v, length)
        return self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))

    def first(self, x: Tensor, length: int) -> Tensor:
        """The first sample's video behind each sample's text."""
        return torch.cat([x[:, :, :length], x[:1, :, length:].expand(x.shape[0], -1, -1, -1)], dim=2)


class _Ditctrl(nn.Module):
    """``shared`` blocks at the end take keys and values of the first sample, or of ``source`` where that is given."""

    def __init__(self, layers: int, shared: int) -> None:
        super().__init__()
        self.embed = nn.Conv3d(4, WIDTH, (1, 2, 2), (1, 2, 2))
        self.text = nn.Linear(16, WIDTH)
        self.blocks = nn.ModuleList(_Shared() for _ in range(layers))
        self.shared = shared
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, latents: Tensor, text: Tensor) -> Tensor:
        text = self.text(text)
        x = torch.cat([text, self.embed(latents).flatten(2).transpose(1, 2)], dim=1)
        for index, block in enumerate(self.blocks):
            x = x + block(x, text.shape[1] if index >= len(self.blocks) - self.shared else 0)
        return self.head(x[:, text.shape[1] :])


def ditctrl() -> Pair:
    """3x4x6, prefix 7, suffix 0. Full: blocks.0. Others: blocks.{1,2}, whose queries are each sample's and whose video
    keys and values are the first sample's."""
    torch.manual_seed(0)
    return ready(_Ditctrl(3, 2)), dict(latents=video_latents(), text=words(16))


class _Branches(nn.Module):
    """A source video and a new one, each with its patches; the new one sees the source's keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv3d(4, WIDTH, (1, 2, 2), (1, 2, 2))
        self.text = nn.Linear(16, WIDTH)
        self.blocks = nn.ModuleList(_Attention() for _ in range(3))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, latents: Tensor, source: Tensor, text: Tensor) -> Tensor:
        text = self.text(text)
        x, y = (torch.cat([text, self.embed(video).flatten(2).transpose(1, 2)], dim=1) for video in (latents, source))
        for block in self.blocks:
            x, y = x + block(x, y), y + block(y)
        return self.head(x[:, text.shape[1] :])


def ditctrl_branches() -> Pair:
    """As ditctrl with two branches of 3x4x6, prefix 7. Full: blocks.{0..2}, of the source alone. Others: blocks.{0..2}
    (queries of the new video, keys and values of the source)."""
    torch.manual_seed(0)
    return ready(_Branches()), dict(latents=video_latents(), source=video_latents(), text=words(16))


class _Frames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(4, WIDTH, 2, 2)
        self.positions = nn.Parameter(torch.randn(1, TOKENS, WIDTH))
        self.blocks = nn.ModuleList(_Softmax() for _ in range(3))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, video: Tensor) -> Tensor:
        batch, frames = video.shape[:2]
        x = self.embed(video.reshape(batch * frames, *video.shape[2:]))  # [batch * frames, width, rows, columns]
        x = x.reshape(batch, frames, WIDTH, -1).transpose(2, 3).reshape(batch, -1, WIDTH) + self.positions
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def frames_conv2d() -> Pair:
    """3x4x6, 0, 0; frames [2,3,4,8,12] through a conv2d, a learned table of positions, softmax written out. Full:
    blocks.{0..2}. No other attention."""
    torch.manual_seed(0)
    return ready(_Frames()), dict(video=torch.randn(BATCH, GRID[0], 4, 8, 12))
