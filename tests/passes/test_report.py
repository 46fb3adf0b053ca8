"""The report: fields, tables, files."""

from __future__ import annotations

import pytest
from graphs import VideoAttention, compiled, raster_tokens, video
from vmoba_compile.passes import Layers, Reason, Report, Site


@pytest.fixture
def report():
    first, _ = compiled(VideoAttention(), video())
    second, _ = compiled(VideoAttention(lambda x: raster_tokens(x).flip(1)), video())
    return Report([*first.report.sites, *second.report.sites])


def test_fields(report):
    done, left = report
    assert done.rewritten and done.block and done.scheme == "1d" and done.density_bound == 1.0
    assert done.dense_flops == 4 * 2 * 2 * 24 * 24 * 8
    assert left.reason is Reason.NOT_RASTER and left.grid is None and left.layer is None and "flip" in left.detail


def test_text_names_verdict_and_reason(report):
    text = str(report)
    assert "1 of 2 attentions rewritten (left dense: 1 not_raster)" in text and "conv3d patch" in text


def test_json_there_and_back(report, tmp_path):
    report.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json").sites == report.sites


def test_page(report, tmp_path):
    report.save(tmp_path / "report.html")
    assert "not_raster" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("name", ["report.txt", "report"])
def test_other_endings_are_refused(report, tmp_path, name):
    with pytest.raises(ValueError, match=r"\.json or \.html"):
        report.save(tmp_path / name)


def test_other_versions_are_refused():
    with pytest.raises(ValueError, match="no report of vmoba_compile, or not of version 1"):
        Report.from_json('{"version": 2, "sites": []}')


def test_recompilation_replaces_a_site():
    site = Site("a", Reason.NO_GRID, "", "softmax", "f.py:1")
    again = Site("a", Reason.REWRITTEN, "", "softmax", "f.py:1")
    found = Report([site])
    found.merge(Report([again, site]))
    assert found.sites == [again, site]


def test_layers_keep_their_numbers():
    layers = Layers()
    keys = [("a", "f.py:1", 0), ("b", "f.py:1", 0), ("a", "f.py:1", 1), ("a", "f.py:9", 0), ("a", "f.py:1", 0)]
    assert [layers.number(key) for key in keys] == [0, 1, 2, 3, 0]


def test_only_losses_are_unintended():
    assert Reason.CROSS_ATTENTION.intended and not Reason.NO_GRID.intended and not Reason.NOT_RASTER.intended
