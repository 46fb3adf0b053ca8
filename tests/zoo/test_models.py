"""Every video transformer of diffusers: which attentions are rewritten, which are not, and that nothing else changes.

With everything selected (threshold 1) the rewritten model must give the outputs and gradients of the untouched one.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from video_zoo import EXPECT, ZOO
from video_zoo.outcomes import OUTCOMES, Outcome
from video_zoo.table import support_table

import vmoba_compile
from vmoba_compile import VMoBAConfig

pytest.importorskip("diffusers")
EVERYTHING = VMoBAConfig(threshold=1.0, min_tokens=0)
FLEX = {name for name, (*_, kind) in EXPECT.items() if kind == "flex"}  # which has no backward on a CPU
# Its linear attention divides by small sums: in float32 it is 3e-5 off itself in float64.
TOLERANCE = {"sana_wm": 1e-4}


def tensors(value: Any) -> list[Tensor]:
    """The floating-point tensors of a model's output, in order."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() and value.numel() else []
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in parts for tensor in tensors(part)]


def run(call: Any, model: nn.Module, inputs: dict[str, Any], gradients: bool) -> list[Tensor]:
    """Outputs, and with ``gradients`` those of all weights in one vector."""
    torch.manual_seed(1)
    with torch.set_grad_enabled(gradients):
        outputs = tensors(call(**inputs))
    if not gradients:
        return outputs
    model.zero_grad(set_to_none=True)
    sum(output.square().sum() for output in outputs if output.requires_grad).backward()
    grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return [*(output.detach() for output in outputs), grads]


@pytest.mark.parametrize("name", ZOO)
def test_model(name: str) -> None:
    torch._dynamo.reset()
    outcome: Outcome = OUTCOMES[name]
    model, inputs = ZOO[name]()
    gradients = name not in FLEX and outcome.rewritten > 0
    wanted = run(model, model, inputs, gradients)
    fast = vmoba_compile.optimize(model, EVERYTHING, inner="eager", grid=outcome.grid)
    found = run(fast, model, inputs, gradients)
    report = vmoba_compile.report(fast)

    paths, grid, prefix, suffix, _ = EXPECT[name]
    assert [site.path for site in report.rewritten] == paths[: outcome.rewritten], str(report)
    for site in report.rewritten:
        # The length of a text without its padding is read from a tensor: a symbol.
        assert (site.grid, site.prefix) == (grid, prefix) and site.suffix in (suffix, str(site.suffix)), str(report)
    assert Counter(site.reason.value for site in report if not site.rewritten) == outcome.dense, str(report)
    for got, want in zip(found, wanted, strict=True):
        error = float((got - want).norm() / want.norm().clamp(min=1e-12))
        assert error < TOLERANCE.get(name, 1e-5), error


# What blocks compiled one by one lose: masks in floating point that are made outside of them, video tokens written into a
# packed sequence, and blocks that are not called as modules.
REGIONAL = {
    "wan_vace": None,
    "skyreels_v2_df": None,
    "hunyuan_video_i2v_token_replace": None,
    "ltx2": None,
    "mochi": None,
    "kandinsky_5": None,
    "helios": None,
    "motif_video": None,
    "ditctrl": None,
    "vchitect": {"not_compiled": 3},  # it calls parts of its blocks
    "allegro_masked": {"mask": 3},
    "cosmos_3_t2v": {"no_grid": 3},
}


@pytest.mark.parametrize("name", REGIONAL)
def test_regional(name: str) -> None:
    """Blocks compiled one by one: the whole model's sites and layers, or the loss is reported as one."""
    torch._dynamo.reset()
    outcome: Outcome = OUTCOMES[name]
    model, inputs = ZOO[name]()
    wanted = run(model, model, inputs, False)
    fast = vmoba_compile.optimize(model, EVERYTHING, inner="eager", grid=outcome.grid, regional=True)
    found = run(fast, model, inputs, False)
    for got, want in zip(found, wanted, strict=True):
        assert float((got - want).norm() / want.norm().clamp(min=1e-12)) < 1e-5
    report = vmoba_compile.report(fast)
    lost = REGIONAL[name]
    if lost is not None:
        assert Counter(site.reason.value for site in report if not site.reason.intended) == lost, str(report)
        return
    torch._dynamo.reset()
    whole = vmoba_compile.optimize(model, EVERYTHING, inner="eager", grid=outcome.grid)
    run(whole, model, inputs, False)
    keep = ("path", "layer", "scheme", "grid", "prefix", "block", "reason")
    sites, expected = (
        [[getattr(site, name) for name in keep] for site in vmoba_compile.report(x)] for x in (fast, whole)
    )
    assert sites == expected, str(report)


def test_every_model_has_an_outcome() -> None:
    assert set(ZOO) == set(EXPECT) == set(OUTCOMES)
    assert all(outcome.why for name, outcome in OUTCOMES.items() if outcome.rewritten < len(EXPECT[name][0]))


def test_readme_has_the_table() -> None:
    assert support_table() in (Path(__file__).parents[2] / "README.md").read_text()
