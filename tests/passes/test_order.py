"""Tokens in another order than the raster stay dense; those that come back to it do not. Both graph forms."""

from __future__ import annotations

import pytest
import torch
from graphs import VideoAttention, dense, raster_tokens, rewritten, verdicts, video
from torch.nn import functional as F

SDPA = F.scaled_dot_product_attention
GRID = (2, 3, 4)
PERM = torch.randperm(24, generator=torch.Generator().manual_seed(1))


def only(report):
    assert len(report) == 1, str(report)
    return report.sites[0]


def test_plain_self_attention():
    site = only(rewritten(VideoAttention(), video()))
    assert site.rewritten and site.grid == GRID and (site.prefix, site.suffix) == (0, 0)
    assert site.evidence == "conv3d patch" and (site.tokens, site.heads, site.head_dim) == (24, 2, 8)


def windows(x):
    """[B, C, T, H, W] to windows of half the columns, one after the other."""
    return x.unflatten(4, (2, -1)).permute(0, 4, 2, 3, 5, 1).flatten(1, 4)


def written_in_place(x):
    tokens = raster_tokens(x).clone()
    tokens[:, PERM] = tokens.clone()
    return tokens


def written_through_view(x):
    tokens = raster_tokens(x).clone()
    tokens.view(2, 12, 2, 16).copy_(tokens.view(2, 12, 2, 16).clone().flip(1))
    return tokens


def written_by_method(name):
    def order(x):
        tokens = raster_tokens(x).clone()
        source = tokens.clone()
        if name == "scatter_":
            tokens.scatter_(1, PERM[None, :, None].expand_as(tokens), source)
        else:
            getattr(tokens, name)(1, PERM, source)
        return tokens

    return order


def swapped_tokens(x):
    tokens = raster_tokens(x).clone()
    first = tokens[:, 3].clone()
    tokens[:, 3] = tokens[:, 7].clone()
    tokens[:, 7] = first
    return tokens


def written_into_chunk(x):
    tokens = raster_tokens(x).clone()
    left, _ = tokens.chunk(2, dim=-1)
    left.copy_(left.clone().flip(1))
    return tokens


def buffer_half_permuted(x):
    tokens = raster_tokens(x)
    buffer = torch.empty_like(tokens)
    buffer[..., :8] = tokens[..., :8].flip(1)
    buffer[..., 8:] = tokens[..., 8:]
    return buffer


def copied(into, *sources):
    for source in sources:
        into.copy_(source)
    return into


def new_rows_read_in_another_order(x):
    tokens = raster_tokens(x)
    new = torch.empty_like(tokens)
    rows = new.view(2, 12, 2, 16)  # a view from before the write
    new.copy_(tokens)
    return rows.flip(1).flatten(1, 2)


REORDERED = {
    "windows": windows,
    "indexed": lambda x: raster_tokens(x)[:, PERM],
    "index_select": lambda x: raster_tokens(x).index_select(1, PERM),
    "gather": lambda x: raster_tokens(x).gather(1, PERM[None, :, None].expand(2, 24, 16)),
    "flip": lambda x: raster_tokens(x).flip(1),
    "flipped frames": lambda x: raster_tokens(x.flip(2)),
    "frames in another order": lambda x: raster_tokens(x[:, :, [1, 0]]),
    "restacked frames": lambda x: raster_tokens(torch.stack(x.unbind(2)[::-1], 2)),
    "roll": lambda x: raster_tokens(x).roll(3, 1),
    "shifted window": lambda x: raster_tokens(x.roll((1, 1), (3, 4))),
    "a half twice": lambda x: torch.cat([raster_tokens(x).chunk(2, dim=1)[1]] * 2, 1),
    "halves of two grids": lambda x: torch.cat(
        [*raster_tokens(x).chunk(2, dim=1)[:1], raster_tokens(x.flip(2))[:, 12:]], 1
    ),
    "most of it": lambda x: torch.cat([raster_tokens(x)[:, 14:], raster_tokens(x)[:, :12]], 1),
    "tokens paired": lambda x: raster_tokens(x).unflatten(1, (12, 2)).transpose(1, 2).flatten(1, 2),
    "written in place": written_in_place,
    "written through a view": written_through_view,
    "index_copy_": written_by_method("index_copy_"),
    "scatter_": written_by_method("scatter_"),
    "two tokens swapped": swapped_tokens,
    "written into a chunk": written_into_chunk,
    "half a buffer": buffer_half_permuted,
    "new memory": lambda x: copied(torch.empty_like(raster_tokens(x)), raster_tokens(x)[:, PERM]),
    "new memory, written over": lambda x: copied(torch.empty_like(x), x, x.flip(2)).flatten(2).transpose(1, 2),
}


@pytest.mark.parametrize("order", REORDERED.values(), ids=REORDERED.keys())
def test_reordered_tokens_stay_dense(order):
    assert verdicts(rewritten(VideoAttention(order), video())) == ["not_raster"]


def test_a_view_from_before_the_write_stays_dense():
    assert not rewritten(VideoAttention(new_rows_read_in_another_order), video()).rewritten


def test_sorted_tokens_stay_dense():
    model = VideoAttention(lambda x: raster_tokens(x).sort(dim=1).values)
    assert verdicts(rewritten(model, video())) == ["no_grid"]


def test_out_argument_is_a_write():
    def order(x):
        tokens = raster_tokens(x).contiguous()
        into = tokens.clone()
        torch.index_select(tokens, 1, PERM, out=into)
        return into

    assert not rewritten(VideoAttention(order), video(), both_forms=False, fullgraph=False).rewritten


KEPT = {
    "there and back": lambda x: raster_tokens(x.flatten(2).unflatten(2, GRID)),
    "permuted twice": lambda x: x.permute(0, 3, 4, 2, 1).permute(0, 3, 1, 2, 4).flatten(1, 3),
    "frames first": lambda x: x.transpose(1, 2).flatten(3).transpose(2, 3).flatten(1, 2),
    "reshape": lambda x: x.movedim(1, -1).reshape(2, -1, 16),
    "cut and joined": lambda x: torch.cat(raster_tokens(x).chunk(2, dim=1), 1),
    "in place sum": lambda x: raster_tokens(x).clone().add_(1.0),
    "augmented sum": lambda x: augmented(raster_tokens(x).clone()),
    "a constant written": lambda x: constant_written(raster_tokens(x).clone()),
    "a buffer filled": lambda x: filled(raster_tokens(x)),
    "new memory": lambda x: copied(torch.empty_like(raster_tokens(x)[:, PERM]), raster_tokens(x)),
    "new memory, transposed": lambda x: (
        copied(torch.zeros_like(x.flip(2)).transpose(3, 4), x.transpose(3, 4))
        .transpose(3, 4)
        .flatten(2)
        .transpose(1, 2)
    ),
    "normalised": lambda x: raster_tokens(F.group_norm(x, 2)),
    "single precision copy": lambda x: raster_tokens(x).double().float().contiguous(),
}


def augmented(x):
    x += 1.0
    x *= 2.0
    return x


def constant_written(x):
    x[x > 2] = 0.0
    x[:, 0] = 1.0
    return x


def filled(x):
    out = torch.empty_like(x)
    out[..., 0::2] = -x[..., 1::2]
    out[..., 1::2] = x[..., 0::2]
    return out


@pytest.mark.parametrize("order", KEPT.values(), ids=KEPT.keys())
def test_raster_order_is_followed(order):
    assert only(rewritten(VideoAttention(order), video())).grid == GRID


def test_residual_puts_tokens_back_in_order():
    class Model(VideoAttention):
        def forward(self, x):
            tokens = raster_tokens(self.patch(x))
            q, k, v = self.split(tokens[:, PERM])
            back = dense(q, k, v).transpose(1, 2).flatten(2)[:, PERM.argsort()]
            return dense(*self.split(tokens + back))

    assert verdicts(rewritten(Model(), video())) == ["not_raster", "rewritten"]


# Shape traps


@pytest.mark.parametrize("grid", [(2, 2, 2), (3, 3, 3), (1, 1, 4), (1, 4, 1), (4, 1, 1), (2, 1, 2), (1, 3, 3)])
@pytest.mark.parametrize("batch", [1, 2])
def test_equal_and_unit_sizes(grid, batch):
    assert only(rewritten(VideoAttention(), video(*grid, batch=batch))).grid == grid


def test_heads_and_tokens_mixed():
    class Model(VideoAttention):
        def split(self, x):
            return [part.reshape(2, 2, 24, 8) for part in self.qkv(x).chunk(3, dim=-1)]

    assert not rewritten(Model(), video()).rewritten


def test_batch_flattened_into_tokens():
    model = VideoAttention(lambda x: raster_tokens(x).reshape(1, -1, 16))
    assert verdicts(rewritten(model, video())) == ["not_raster"]
    assert verdicts(rewritten(model, video(batch=1))) == ["rewritten"]


def test_attention_over_heads_is_none_over_tokens():
    model = VideoAttention(attend=lambda q, k, v: SDPA(*(t.transpose(1, 2) for t in (q, k, v))))
    assert verdicts(rewritten(model, video())) == ["factorised"]


FACTORISED = {
    "spatial": lambda x: x.permute(0, 2, 3, 4, 1).flatten(0, 1).flatten(1, 2),
    "temporal": lambda x: x.permute(0, 3, 4, 2, 1).flatten(0, 2),
}


@pytest.mark.parametrize("order", FACTORISED.values(), ids=FACTORISED.keys())
def test_factorised(order):
    assert verdicts(rewritten(VideoAttention(order), video())) == ["factorised"]


CUTS = {
    "every second": lambda x: raster_tokens(x)[:, ::2],
    "first": lambda x: raster_tokens(x)[:, :10],
    "last": lambda x: raster_tokens(x)[:, 5:],
    "first frame": lambda x: raster_tokens(x)[:, :12],
    "repeated": lambda x: raster_tokens(x).repeat(1, 2, 1),
    "pooled": lambda x: raster_tokens(F.avg_pool3d(x, (1, 3, 2))),
    "twice": lambda x: torch.cat([raster_tokens(x)] * 2, 1),
}


@pytest.mark.parametrize("order", CUTS.values(), ids=CUTS.keys())
def test_dropped_and_repeated_tokens(order):
    assert not rewritten(VideoAttention(order), video()).rewritten


def test_frames_cut_before_flattening_are_a_smaller_grid():
    model = VideoAttention(lambda x: raster_tokens(x[:, :, 1:]))
    report = rewritten(model, video(3))
    assert not report.rewritten or report.sites[0].grid == (2, 3, 4)
