"""Verification: what it measures is right where the answer is known, and it notices what is wrong."""

from __future__ import annotations

import json
from unittest import mock

import models
import pytest
import torch
from vmoba_compile.kernels import implementations

import vmoba_compile
from vmoba_compile import RewriteError, VMoBAConfig


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


@pytest.fixture
def wan():
    model, inputs = models.build("wan", batch=1)
    return model.eval(), inputs


def test_of_an_optimized_model(wan, tmp_path):
    model, inputs = wan
    fast = vmoba_compile.optimize(model, models.CONFIG, inner="eager")
    found = vmoba_compile.verify(fast, **inputs)
    assert [site.path for site in found.sites] == [f"blocks.{i}.attn1" for i in range(3)]
    assert found.rewrite_error < 1e-5 < found.sparse_error
    for site in found.sites:
        assert site.attention_error < 1e-5 and site.selection_error == 0
        assert 0.2 < site.density < 0.7 and site.density / 2 < site.mass < 1
    found.save(tmp_path / "found.json")
    assert json.loads((tmp_path / "found.json").read_text())["sites"][0]["path"] == "blocks.0.attn1"
    assert "blocks.2.attn1" in str(found) and "mass kept" in str(found)


def test_everything_selected_keeps_all_mass(wan):
    model, inputs = wan
    found = vmoba_compile.verify(model, config=VMoBAConfig(threshold=1.0, min_tokens=0), **inputs)
    assert all(site.density == 1 and site.mass == pytest.approx(1, abs=1e-5) for site in found.sites)
    assert found.sparse_error == pytest.approx(found.rewrite_error) and found.sparse_error < 1e-5


def test_a_wrong_kernel_is_seen(wan):
    model, inputs = wan
    right = implementations.attention

    def wrong(q, *args, **options):
        out, lse = right(q, *args, **options)
        return (out, lse) if options["implementation"] == "reference" else (out * 1.01, lse)

    with mock.patch.object(implementations, "attention", wrong):
        found = vmoba_compile.verify(model, config=models.CONFIG, **inputs)
    assert all(site.attention_error == pytest.approx(0.01, rel=0.01) for site in found.sites)
    assert found.rewrite_error > 1e-4


def test_padded_text_and_top_k():
    model, inputs = models.build("hunyuanvideo")
    config = VMoBAConfig(min_tokens=0, mode="topk", topk=2, blocks=models.CONFIG.blocks)
    found = vmoba_compile.verify(model.eval(), config=config, **inputs)
    assert len(found.sites) == 4 and found.rewrite_error < 1e-5
    assert all(site.attention_error < 1e-5 and 0 < site.mass < 1 + 1e-5 for site in found.sites)


def test_nothing_to_verify(wan):
    model, inputs = wan
    with (
        pytest.warns(UserWarning, match="dense"),
        pytest.raises(RewriteError, match="was rewritten: nothing to verify"),
    ):
        vmoba_compile.verify(model, config=VMoBAConfig(min_tokens=10**6), **inputs)


def test_an_optimized_model_has_its_own_config(wan):
    model, inputs = wan
    with pytest.raises(ValueError, match="its own config"):
        vmoba_compile.verify(vmoba_compile.optimize(model), config=VMoBAConfig(), **inputs)
