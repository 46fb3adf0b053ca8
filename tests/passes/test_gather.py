"""Video tokens in another order, written by index, or among more keys: rewritten as if they stood in raster order.

With everything selected any order gives the same result, so that these tests select few boxes and compare with the
attention over tokens that the test itself puts in order.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from graphs import (
    SPARSE,
    VideoAttention,
    compiled,
    dense,
    exported,
    raster_tokens,
    rewritten,
    verdicts,
    video,
)
from torch.nn import functional as F

import vmoba_compile

GRID = (4, 3, 5)
TOKENS = 60


def only(report):
    assert len(report) == 1, str(report)
    return report.sites[0]


def sparse(q, k, v, site, order, queries=None):
    """The attention over tokens put in ``order``, which holds the video's places first, at the places where they were."""
    back = order.argsort()
    q, k, v = (x[:, :, order] for x in (q, k, v))
    out = vmoba_compile.attention(q, k, v, GRID, block=site.block, suffix=len(order) - TOKENS, threshold=0.25)
    return out[:, :, back] if queries is None else out[:, :, back][:, :, queries]


def check(model, inputs, wanted, **kwargs):
    """Both graph forms against ``wanted(site)``, with gradients of the Dynamo graph; returns the site."""
    capture, found = compiled(model, *inputs, config=SPARSE, **kwargs)
    site = only(capture.report)
    assert site.rewritten and site.grid == GRID, str(capture.report)
    expected = wanted(site)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, model(*inputs), atol=1e-3)  # boxes were really left out
    weights = list(model.parameters())
    for got, want in zip(
        torch.autograd.grad(found.sum(), weights), torch.autograd.grad(expected.sum(), weights), strict=True
    ):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        report, program = exported(model, *inputs, config=SPARSE, **kwargs)
        assert verdicts(report) == ["rewritten"]
        torch.testing.assert_close(program.module()(*inputs), expected, atol=1e-5, rtol=1e-5)
    return site


ORDERS = {
    "time fastest": (3, 4, 2),
    "columns before rows": (2, 4, 3),
    "rows before frames": (3, 2, 4),
    "reversed": (4, 3, 2),
    "columns first": (4, 2, 3),
}


@pytest.mark.parametrize("dims", ORDERS.values(), ids=ORDERS.keys())
@pytest.mark.parametrize("text", [0, 7])
def test_axes_in_another_order(dims, text):
    class Model(VideoAttention):
        def tokens(self, x, words):
            x = self.patch(x).permute(0, *dims, 1).flatten(1, 3)
            return torch.cat([words[:, :2], x, words[:, 2:]], 1) if text else x

        def forward(self, x, words):
            return dense(*self.split(self.tokens(x, words)))

    model, inputs = Model(), (video(*GRID), torch.randn(2, 7, 16))
    places = torch.arange(TOKENS).view([GRID[dim - 2] for dim in dims])
    places = places.permute([dims.index(dim) for dim in (2, 3, 4)]).flatten()
    if text:
        places = torch.cat([places + 2, torch.tensor([0, 1, *range(62, 67)])])
    site = check(model, inputs, lambda site: sparse(*model.split(model.tokens(*inputs)), site, places))
    assert (site.prefix, site.suffix) == ((2, 5) if text else (0, 0))


@pytest.mark.parametrize("cuts", [(30,), (7, 22, 51)], ids=["halves", "uneven"])
@pytest.mark.parametrize("text", [0, 7])
def test_video_cut_into_pieces(cuts, text):
    """Pieces of the video in another order, text between them: as shards of text and video stand after an exchange."""
    ends = (0, *cuts, TOKENS)

    class Model(VideoAttention):
        def tokens(self, x, words):
            x = raster_tokens(self.patch(x))
            pieces = [x[:, first:last] for first, last in pairwise(ends)][::-1]
            return torch.cat([pieces[0], words, *pieces[1:]] if text else pieces, 1)

        def forward(self, x, words):
            return dense(*self.split(self.tokens(x, words)))

    model, inputs = Model(), (video(*GRID), torch.randn(2, 7, 16))
    pieces = [torch.arange(first, last) for first, last in pairwise(ends)][::-1]
    words = torch.arange(TOKENS, TOKENS + text)
    stands = torch.cat([pieces[0], words, *pieces[1:]])  # which token stands at each place
    site = check(model, inputs, lambda site: sparse(*model.split(model.tokens(*inputs)), site, stands.argsort()))
    assert (site.prefix, site.suffix) == (0, text)


class Packed(VideoAttention):
    """Video and text rows are written into one sequence, each at its own places."""

    def __init__(self, write):
        super().__init__()
        self.write = write

    def tokens(self, x, words, places, others):
        rows = raster_tokens(self.patch(x))
        return self.write(rows, words, places, others)

    def forward(self, *inputs):
        return dense(*self.split(self.tokens(*inputs)))


def by_setitem(rows, words, places, others):
    sequence = torch.zeros(2, 71, 16)
    sequence[:, others] = words
    sequence[:, places] = rows
    return sequence


def by_index_copy(rows, words, places, others):
    return rows.new_zeros(2, 71, 16).index_copy(1, places, rows).index_copy(1, others, words)


def by_index_copy_(rows, words, places, others):
    return rows.new_zeros(2, 71, 16).index_copy_(1, places, rows).index_copy_(1, others, words)


def by_index_put(rows, words, places, others):
    return torch.ops.aten.index_put(rows.new_zeros(2, 71, 16), [None, places], rows)


WRITES = [by_setitem, by_index_copy, by_index_copy_, by_index_put]
SHUFFLED = torch.randperm(71, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("write", "places"),
    [
        *((write, places) for write in WRITES for places in ("behind", "shuffled")),
        *((write, "negative") for write in (by_setitem, by_index_put)),  # index_copy takes none
    ],
    ids=lambda x: x if isinstance(x, str) else x.__name__,
)
def test_tokens_written_by_index(write, places):
    order = SHUFFLED if places == "shuffled" else torch.cat([torch.arange(11, 71), torch.arange(11)])
    model = Packed(write)
    given = order[:TOKENS] - 71 if places == "negative" else order[:TOKENS]
    inputs = (video(*GRID), torch.randn(2, 11, 16), given, order[TOKENS:])
    check(model, inputs, lambda site: sparse(*model.split(model.tokens(*inputs)), site, order))


def test_other_places_need_no_other_graph():
    model = Packed(by_index_copy)
    fast = vmoba_compile.optimize(model, SPARSE, inner="eager", fullgraph=True)
    for seed in range(3):
        order = torch.randperm(71, generator=torch.Generator().manual_seed(seed))
        inputs = (video(*GRID), torch.randn(2, 11, 16), order[:TOKENS], order[TOKENS:])
        site = only((fast(*inputs), vmoba_compile.report(fast))[1])
        wanted = sparse(*model.split(model.tokens(*inputs)), site, order)
        torch.testing.assert_close(fast(*inputs), wanted, atol=1e-5, rtol=1e-5)


def test_a_given_grid_tells_which_written_tokens_are_the_video():
    model = VideoAttention()
    model.forward = lambda rows, *rest: dense(*model.split(by_index_copy(rows, *rest)))
    inputs = (torch.randn(2, TOKENS, 16), torch.randn(2, 11, 16), SHUFFLED[:TOKENS], SHUFFLED[TOKENS:])
    assert verdicts(rewritten(model, *inputs)) == ["no_grid"]
    assert verdicts(rewritten(model, *inputs, grid=(5, 3, 5))) == ["no_grid"]
    capture, found = compiled(model, *inputs, config=SPARSE, grid=GRID)
    wanted = sparse(*model.split(by_index_copy(*inputs)), only(capture.report), SHUFFLED)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def masked(sequence, rows, places):
    sequence[:, torch.zeros(71).bool().index_fill(0, places, True)] = rows
    return sequence


NOT_FOLLOWED = {
    "at places that vary by sample": lambda s, r, p: s.scatter(1, p[None, :, None].expand_as(r), r),
    "by a mask": masked,
    "added up": lambda s, r, p: torch.ops.aten.index_put(s, [None, p], r, True),
    "and shifted": lambda s, r, p: s.index_copy(1, p, r).roll(1, 1),
    "and picked again": lambda s, r, p: s.index_copy(1, p, r)[:, p.flip(0)],
    "and overwritten": lambda s, r, p: F.pad(s.index_copy(1, p, r)[:, 3:], (0, 0, 3, 0)),
    "twice": lambda s, r, p: s.index_copy(1, p, r).index_copy(1, (p + 1) % 71, r),
    "flipped before": lambda s, r, p: s.index_copy(1, p, r.flip(1)),
}


@pytest.mark.parametrize("write", NOT_FOLLOWED.values(), ids=NOT_FOLLOWED.keys())
def test_writes_that_are_not_followed(write):
    model = Packed(lambda rows, words, places, others: write(rows.new_zeros(2, 71, 16), rows, places))
    inputs = (video(*GRID), torch.randn(2, 11, 16), SHUFFLED[:TOKENS], SHUFFLED[TOKENS:])
    assert not rewritten(model, *inputs, both_forms=False).rewritten


def test_places_that_change_before_the_attention():
    class Model(Packed):
        def forward(self, x, words, places, others):
            places = places.clone()
            q, k, v = self.split(by_index_copy(raster_tokens(self.patch(x)), words, places, others))
            places += 1
            return dense(q, k, v) + places.sum()

    inputs = (video(*GRID), torch.randn(2, 11, 16), SHUFFLED[:TOKENS], SHUFFLED[TOKENS:])
    assert not rewritten(Model(by_index_copy), *inputs, both_forms=False).rewritten


# Queries that are a part of the keys


class MoreKeys(VideoAttention):
    """Queries are the video's tokens alone, ``joined(video, words)`` the keys' sequence."""

    def __init__(self, joined):
        super().__init__()
        self.joined = joined

    def parts(self, x, words):
        rows = raster_tokens(self.patch(x))
        q, _, _ = self.split(rows)
        _, k, v = self.split(self.joined(rows, words))
        return q, k, v

    def forward(self, x, words):
        return dense(*self.parts(x, words))


@pytest.mark.parametrize("place", ["before", "behind", "both"])
def test_keys_beside_the_video(place):
    before = {"before": 9, "behind": 0, "both": 4}[place]
    model = MoreKeys(lambda rows, words: torch.cat([words[:, :before], rows, words[:, before:]], 1))
    inputs = (video(*GRID), torch.randn(2, 9, 16))

    def wanted(site):
        q, k, v = model.parts(*inputs)
        q = F.pad(q, (0, 0, before, 9 - before))
        order = torch.tensor([*range(before, before + TOKENS), *range(before), *range(before + TOKENS, TOKENS + 9)])
        return sparse(q, k, v, site, order, slice(before, before + TOKENS))

    site = check(model, inputs, wanted)
    assert (site.prefix, site.suffix) == (before, 9 - before)


OTHER_KEYS = {
    "more than a quarter": (lambda rows, words: torch.cat([words, rows], 1), 21, "layout"),
    "other video": (lambda rows, words: torch.cat([words, rows.flip(1)], 1), 9, "not_raster"),
    "without the video's last": (lambda rows, words: torch.cat([words, rows[:, 1:]], 1), 9, "cross_attention"),
    "text alone": (lambda rows, words: words, 9, "cross_attention"),
}


@pytest.mark.parametrize(("joined", "text", "verdict"), OTHER_KEYS.values(), ids=OTHER_KEYS.keys())
def test_other_keys_stay_dense(joined, text, verdict):
    site = only(rewritten(MoreKeys(joined), video(*GRID), torch.randn(2, text, 16)))
    assert site.reason.value == verdict


def test_a_part_of_the_video_among_all():
    """Queries of one frame, keys of all: not the whole grid."""

    class Model(VideoAttention):
        def forward(self, x):
            rows = raster_tokens(self.patch(x))
            q, _, _ = self.split(rows[:, :15])
            _, k, v = self.split(rows)
            return dense(q, k, v)

    assert not rewritten(Model(), video(*GRID)).rewritten


def test_words_among_video_keys():
    """Queries are the text of a joint sequence."""

    class Model(VideoAttention):
        def forward(self, x, words):
            q, _, _ = self.split(words)
            _, k, v = self.split(torch.cat([words, raster_tokens(self.patch(x))], 1))
            return dense(q, k, v)

    assert verdicts(rewritten(Model(), video(*GRID), torch.randn(2, 9, 16))) == ["cross_attention"]


# What is not known until the graph runs


def test_two_tokens_at_one_place():
    order = torch.cat([torch.arange(59), torch.tensor([58])])
    fast = vmoba_compile.optimize(Packed(by_index_copy), SPARSE, inner="eager")
    fast(video(*GRID), torch.randn(2, 11, 16), torch.arange(60), torch.arange(60, 71))
    with pytest.raises(RuntimeError, match="several video tokens were written to one place"):
        fast(video(*GRID), torch.randn(2, 11, 16), order, torch.arange(60, 71))


def test_a_given_grid_does_not_overrule_an_order_that_is_known():
    model = Packed(
        lambda rows, *rest: by_index_copy(rows.unflatten(1, GRID).permute(0, 2, 3, 1, 4).flatten(1, 3), *rest)
    )
    inputs = (video(*GRID), torch.randn(2, 11, 16), SHUFFLED[:TOKENS], SHUFFLED[TOKENS:])
    assert verdicts(rewritten(model, *inputs)) == ["not_raster"]
    assert verdicts(rewritten(model, *inputs, grid=GRID)) == ["not_raster"]


@pytest.mark.parametrize("order", ["time fastest", "raster"])
@pytest.mark.parametrize("side", ["before", "behind", "around"])
def test_a_number_of_words_read_from_a_tensor(side, order):
    """Whatever the number, boxes are of the video tokens where they are, or the attention stays dense."""

    class Model(VideoAttention):
        def parts(self, words, count):
            n = count.item()
            head, tail = words[:, :n], words[:, -n:]
            return {"before": (head, head[:, :0]), "behind": (tail[:, :0], tail), "around": (tail, head)}[side]

        def tokens(self, x, words, count):
            x = self.patch(x)
            x = x.permute(0, 3, 4, 2, 1).flatten(1, 3) if order == "time fastest" else raster_tokens(x)
            before, after = self.parts(words, count)
            return torch.cat([before, x, after], 1)

        def forward(self, *inputs):
            return dense(*self.split(self.tokens(*inputs)))

    torch._dynamo.reset()  # each number may be a graph
    model, (frames, rows, columns) = Model(), GRID
    fast = vmoba_compile.optimize(model, SPARSE, inner="eager")
    places = torch.arange(TOKENS)
    if order == "time fastest":
        places = places.view(rows, columns, frames).permute(2, 0, 1).flatten()
    for count in (3, 5, 1, 7, 0, 9):
        inputs = (video(*GRID), torch.randn(2, 7, 16), torch.tensor(count))
        found, (site,) = fast(*inputs), vmoba_compile.report(fast)
        if site.rewritten:
            before, after = (part.shape[1] for part in model.parts(*inputs[1:]))
            others = [*range(before), *range(before + TOKENS, before + TOKENS + after)]
            wanted = sparse(
                *model.split(model.tokens(*inputs)),
                site,
                torch.cat([places + before, torch.tensor(others, dtype=torch.long)]),
            )
        else:
            assert site.reason.value == "dynamic_grid"
            wanted = model(*inputs)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert site.rewritten or (side, order) != ("behind", "raster")
