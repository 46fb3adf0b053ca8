"""Sequence parallelism as one rank's graph shows it; groups that exchange nothing stand in for the other ranks."""

from __future__ import annotations

import pytest
import torch
from graphs import SPARSE, compiled, verdicts
from sharded_models import GRID, Sharded, inputs
from torch import distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from vmoba_compile import VMoBAConfig


@pytest.fixture(params=[(0, 2), (1, 2), (2, 4)], ids=["rank_0_of_2", "rank_1_of_2", "rank_2_of_4"])
def rank(request):
    place, count = request.param
    dist.init_process_group("fake", rank=place, world_size=count, store=FakeStore())
    yield place
    dist.destroy_process_group()


def sites(cut: str, by: str, text: bool = False, grad: bool = False, grid=None):
    with torch.set_grad_enabled(grad):
        capture, _ = compiled(Sharded(cut, by), *inputs(text), config=SPARSE, grid=grid)
    return capture.report


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("cut", ["chunk", "split", "slice", "narrow"])
def test_shards_are_put_together(rank, cut, grad):
    report = sites(cut, "to_heads", grad=grad)
    assert verdicts(report) == ["rewritten"] * 2
    for layer, site in enumerate(report):
        assert (site.grid, site.prefix, site.suffix, site.layer) == (GRID, 0, 0, layer)
        assert site.heads == 4 // dist.get_world_size()


@pytest.mark.parametrize("by", ["heads_first", "in_place"])
def test_other_layouts_of_the_exchange(rank, by):
    assert verdicts(sites("chunk", by)) == ["rewritten"] * 2


def test_text_and_video_in_shards_of_their_own(rank):
    """Each rank has text before its video: behind the exchange they take turns."""
    report = sites("chunk", "to_heads", text=True)
    assert verdicts(report) == ["rewritten"] * 2
    assert {(site.grid, site.prefix, site.suffix) for site in report} == {(GRID, 0, 16)}


@pytest.mark.parametrize("text", [False, True], ids=["video", "text_and_video"])
@pytest.mark.parametrize("pool", ["overall", "block", "head_global", "query_head"])
def test_pools_over_all_heads_stay_dense(rank, pool, text):
    """This rank has some of the heads: it would select otherwise than one that has all."""
    with torch.no_grad():
        capture, _ = compiled(Sharded(), *inputs(text), config=VMoBAConfig(pool=pool, min_tokens=0))
    assert set(verdicts(capture.report)) == {"layout" if pool in ("overall", "block") else "rewritten"}
    if pool == "overall":
        assert 'use "head_global"' in capture.report.sites[0].detail


@pytest.mark.parametrize("text", [False, True], ids=["video", "text_and_video"])
@pytest.mark.parametrize("cut", ["next rank's", "smaller", "every other", "whole"])
def test_what_is_no_shard_of_this_rank(rank, cut, text):
    """``whole`` is a sequence that every rank has all of: the exchange makes copies of it."""
    assert set(verdicts(sites(cut, "to_heads", text))) == {"not_raster"}


@pytest.mark.parametrize("by", ["ranks_last", "keys of another order"])
def test_other_orders_stay_dense(rank, by):
    assert set(verdicts(sites("chunk", by))) == {"not_raster"}


@pytest.mark.parametrize("by", ["nothing", "ring", "gathered keys"])
def test_shards_that_attend_without_an_exchange(rank, by):
    report = sites("chunk", by)
    assert set(verdicts(report)) == {"ring_attention"}
    assert not report.sites[0].reason.intended and "ulysses_degree" in report.sites[0].detail


@pytest.mark.parametrize("by", ["nothing", "ring", "gathered keys", "ranks_last"])
def test_a_given_grid_does_not_vouch_for_shards(rank, by):
    assert "rewritten" not in verdicts(sites("chunk", by, grid=GRID))
    frames = GRID[0] // dist.get_world_size()
    assert "rewritten" not in verdicts(sites("chunk", by, grid=(frames, *GRID[1:])))


def test_pieces_without_ranks_are_no_shards():
    """Half of a video that attends to itself, in a process alone, is a cut as before."""

    class Half(Sharded):
        def forward(self, video):
            x = self.embed(video).flatten(2).transpose(1, 2).chunk(2, dim=1)[0]
            q, k, v = (y.unflatten(2, (4, -1)) for y in self.qkv[0](x).chunk(3, dim=-1))
            return self.whole(q, k, v)

    with torch.no_grad():
        capture, _ = compiled(Half(), *inputs(), config=SPARSE)
    assert verdicts(capture.report) == ["not_raster"]


def test_uneven_exchanges_stay_dense(rank):
    class Uneven(Sharded):
        def forward(self, video):
            x = self.embed(video).flatten(2).transpose(1, 2)
            x = x.tensor_split(dist.get_world_size() + 1, dim=1)[dist.get_rank()]
            q, k, v = (y.unflatten(2, (4, -1)) for y in self.qkv[0](x).chunk(3, dim=-1))
            return self.attend(q, k, v)

    with torch.no_grad():
        capture, _ = compiled(Uneven(), *inputs(), config=SPARSE)
    assert "rewritten" not in verdicts(capture.report)
