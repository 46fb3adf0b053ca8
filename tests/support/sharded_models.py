"""Small video transformers in plain PyTorch whose sequence is shared out to the ranks of a group, right and wrong."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import _functional_collectives as collectives
from torch.nn.functional import scaled_dot_product_attention

from vmoba_compile.ulysses import to_heads, to_tokens

GRID = (4, 6, 8)
TEXT = 16


def piece(x: Tensor, how: str) -> Tensor:
    """This rank's shard of the tokens [batch, tokens, channels], or what only looks like it."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    length = x.shape[1] // ranks
    if how == "chunk":
        return x.chunk(ranks, dim=1)[rank]
    if how == "split":
        return x.split(length, dim=1)[rank]
    if how == "slice":
        return x[:, rank * length : (rank + 1) * length]
    if how == "narrow":
        return x.narrow(1, rank * length, length)
    if how == "next rank's":
        return x.chunk(ranks, dim=1)[(rank + 1) % ranks]
    if how == "smaller":
        return x.chunk(2 * ranks, dim=1)[rank]
    if how == "every other":
        return x[:, rank::ranks]
    if how == "whole":
        return x
    raise ValueError(how)


def exchange(x: Tensor) -> Tensor:
    return collectives.wait_tensor(collectives.all_to_all_single_autograd(x, None, None, dist.group.WORLD))


def exchange_in_place(x: Tensor) -> Tensor:
    """As most code spells it; without gradients."""
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x)
    return out


def heads_first(x: Tensor, exchange: Callable[[Tensor], Tensor] = exchange) -> Tensor:
    """[batch, heads, tokens / ranks, head_dim] to [batch, heads / ranks, tokens, head_dim], without flattening."""
    batch, heads, tokens, dim = x.shape
    ranks = dist.get_world_size()
    x = exchange(x.reshape(batch, ranks, heads // ranks, tokens, dim).transpose(0, 1).contiguous())
    return x.permute(1, 2, 0, 3, 4).reshape(batch, heads // ranks, ranks * tokens, dim)


def heads_first_back(x: Tensor, exchange: Callable[[Tensor], Tensor] = exchange) -> Tensor:
    batch, heads, tokens, dim = x.shape
    ranks = dist.get_world_size()
    x = exchange(x.reshape(batch, heads, ranks, tokens // ranks, dim).permute(2, 0, 1, 3, 4).contiguous())
    return x.transpose(0, 1).reshape(batch, ranks * heads, tokens // ranks, dim)


def ranks_last(x: Tensor) -> Tensor:
    """As ``heads_first``, with the ranks' tokens in turn: not the order of the sequence."""
    batch, heads, tokens, dim = x.shape
    ranks = dist.get_world_size()
    x = exchange(x.reshape(batch, ranks, heads // ranks, tokens, dim).transpose(0, 1).contiguous())
    return x.permute(1, 2, 3, 0, 4).reshape(batch, heads // ranks, ranks * tokens, dim)


class Sharded(nn.Module):
    """A patch embedding, then attention over video tokens, and text before them where there is any.

    ``cut`` and ``by`` say how the sequence becomes shards and how these are exchanged; ``ranks`` False is the model of one
    process. Forward takes a video [batch, 4, frames, rows, columns] and perhaps text [batch, tokens, width].
    """

    def __init__(self, cut: str = "chunk", by: str = "to_heads", ranks: bool = True, width: int = 32) -> None:
        super().__init__()
        self.cut, self.by, self.ranks, self.heads = cut, by, ranks, 4
        self.embed = nn.Conv3d(4, width, (1, 2, 2), (1, 2, 2))
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Of [batch, tokens, heads, head_dim] each."""
        if not self.ranks:
            return self.whole(q, k, v)
        group = dist.group.WORLD
        if self.by == "to_heads":
            q, k, v = (to_heads(x, group) for x in (q, k, v))
            return to_tokens(self.whole(q, k, v), group)
        if self.by == "in_place":
            q, k, v = (heads_first(x.transpose(1, 2), exchange_in_place) for x in (q, k, v))
            return heads_first_back(scaled_dot_product_attention(q, k, v), exchange_in_place).transpose(1, 2)
        if self.by in ("heads_first", "ranks_last"):
            there = heads_first if self.by == "heads_first" else ranks_last
            q, k, v = (there(x.transpose(1, 2)) for x in (q, k, v))
            return heads_first_back(scaled_dot_product_attention(q, k, v)).transpose(1, 2)
        if self.by == "keys of another order":
            q, k, v = (f(x.transpose(1, 2)) for f, x in ((heads_first, q), (ranks_last, k), (ranks_last, v)))
            return heads_first_back(scaled_dot_product_attention(q, k, v)).transpose(1, 2)
        if self.by == "gathered keys":
            k, v = (collectives.wait_tensor(collectives.all_gather_tensor(x.detach(), 1, group)) for x in (k, v))
        elif self.by == "ring":
            turn = [(i + 1) % dist.get_world_size() for i in range(dist.get_world_size())]
            sent = [collectives.permute_tensor(x.detach().flatten(), turn, group) for x in (k, v)]
            k, v = (collectives.wait_tensor(x).reshape(k.shape) for x in sent)
        return self.whole(q, k, v)  # "nothing", too

    def whole(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    def forward(self, video: Tensor, text: Tensor | None = None) -> Tensor:
        x = self.embed(video).flatten(2).transpose(1, 2)
        length = 0
        if self.ranks:
            x = piece(x, self.cut)
            text = None if text is None else piece(text, self.cut)
        if text is not None:
            length, x = text.shape[1], torch.cat([text, x], dim=1)
        for qkv, out in zip(self.qkv, self.out, strict=True):
            q, k, v = (y.unflatten(2, (self.heads, -1)) for y in qkv(x).chunk(3, dim=-1))
            x = x + out(self.attend(q, k, v).flatten(2))
        x = x[:, length:]
        if not self.ranks or torch.is_grad_enabled():  # gradients of a rank's own tokens: the sum over ranks is of all
            return x
        return collectives.wait_tensor(collectives.all_gather_tensor(x, 1, dist.group.WORLD))


def inputs(text: bool = False, batch: int = 2) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(1)
    frames, rows, columns = GRID
    video = torch.randn(batch, 4, frames, 2 * rows, 2 * columns, generator=draw)
    return (video, torch.randn(batch, TEXT, 32, generator=draw)) if text else (video,)
