"""The report: fields, tables, files."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace

import pytest
from graphs import VideoAttention, compiled, raster_tokens, video
from vmoba_compile.passes import Layers, Reason, Report, Site
from vmoba_compile.passes.report import Picture


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
    assert "not_raster" in (tmp_path / "report.html").read_text(encoding="utf-8")


MEASURED = {
    "density": (0.25, 0.5),
    "mass": (0.7, 0.8),
    "sparse_flops": 123,
    "dense_ms": 2.0,
    "sparse_ms": 0.5,
    "picture": Picture((1, 0, 2), (2, 3, 4), (1, 3, 4), ((0,), (0, 1))),
}


def test_measured_values_there_and_back(report, tmp_path):
    """As the same types: a site is hashed, and compared to one that was measured."""
    report.sites[0] = replace(report.sites[0], **MEASURED)
    report.save(tmp_path / "report.json")
    again = Report.load(tmp_path / "report.json")
    assert again.sites == report.sites and hash(again.sites[0]) == hash(report.sites[0])


def test_files_from_before_there_were_measurements():
    """And without measurements files are as they were, for those who read them."""
    old = {
        "path": "a", "reason": "rewritten", "detail": "", "spelling": "softmax", "source": "f.py:1", "layer": 0,
        "tokens": 24, "heads": 2, "head_dim": 8, "grid": [2, 3, 4], "prefix": 0, "suffix": 0, "scheme": "1d",
        "block": [1, 3, 4], "evidence": "conv3d", "dense_flops": 5, "density_bound": 1.0,
    }  # fmt: skip
    (site,) = found = Report.from_json(json.dumps({"version": 1, "sites": [old]}))
    assert site.grid == (2, 3, 4) and site.density is None and site.picture is None
    assert json.loads(found.to_json())["sites"] == [old]


def test_table_has_columns_for_what_was_measured(report):
    assert "density" not in str(report) and "mass" not in str(report)
    report.sites[0] = replace(report.sites[0], density=(0.25, 0.5))
    assert "density" in str(report) and "0.375" in str(report) and "mass" not in str(report)
    report.sites[0] = replace(report.sites[0], **MEASURED)
    assert "mass kept" in str(report) and "0.750" in str(report)


def test_table_shows_brackets(monkeypatch):
    """Which rich would take for markup."""
    monkeypatch.setenv("COLUMNS", "180")
    text = str(Report([Site("a[red].b", Reason.MASK, "a mask over [B, 1, S] [bold]pairs[/bold]", "softmax", "f.py:1")]))
    assert "a[red].b" in text and "a mask over [B, 1, S] [bold]pairs[/bold]" in text


def test_figures_are_not_cut_in_a_narrow_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    site = Site(
        "a.long.module.path.0.attn1", Reason.REWRITTEN, "", "softmax", "f.py:1", tokens=32760, heads=12, head_dim=128
    )
    text = str(Report([dataclasses.replace(site, density=(0.2,), mass=(0.875,))]))
    for part in ("mass kept", "a.long.module.path.0.attn1", "0.200", "0.875", "rewritten", "why"):
        assert part in text


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
