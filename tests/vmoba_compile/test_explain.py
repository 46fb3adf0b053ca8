"""The dry run: on the meta device, in seconds, without touching the model."""

from __future__ import annotations

import time

import models
import pytest
import torch

import vmoba_compile
from vmoba_compile import RewriteError, VMoBAConfig, backend
from vmoba_compile.zoo import PRESETS


def test_real_weights_are_not_computed_with():
    """A model too slow to run here is explained at once, on its own device, and is what it was."""
    torch._dynamo.reset()
    model, inputs = models.build("hunyuanvideo", batch=1)
    before = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    report = vmoba_compile.explain(model, config=models.CONFIG, **inputs)
    assert len(report.rewritten) == 4
    for name, parameter in model.named_parameters():
        assert id(parameter) == before[name][0] and torch.equal(parameter, before[name][1])
    with torch.no_grad():
        assert model(**inputs).sample.isfinite().all()


def test_explain_then_optimize():
    """The dry run leaves nothing behind that the real one would trip over."""
    torch._dynamo.reset()
    model, inputs = models.build("wan", batch=1)
    dry = vmoba_compile.explain(model, config=models.CONFIG, **inputs)
    fast = vmoba_compile.optimize(model.eval(), models.CONFIG, inner="eager")
    with torch.no_grad():
        assert fast(**inputs).sample.isfinite().all()
    assert vmoba_compile.report(fast).sites == dry.sites
    assert vmoba_compile.explain(fast, config=models.CONFIG, **inputs).sites == dry.sites


class Broken(torch.nn.Module):
    def __init__(self, between) -> None:
        super().__init__()
        self.model, self.inputs = models.build("wan", batch=1)
        self.between = between

    def forward(self, latents):
        out = self.model(**self.inputs | {"hidden_states": latents}).sample
        self.between(out)
        return self.model(**self.inputs | {"hidden_states": out}).sample


def test_goes_on_past_a_graph_break():
    torch._dynamo.reset()
    model = Broken(lambda out: torch._dynamo.graph_break())
    report = vmoba_compile.explain(model, model.inputs["hidden_states"], config=models.CONFIG)
    assert len(report.rewritten) in (3, 6)  # the second call may find the first one's graph


def test_a_number_read_from_a_tensor_is_no_end():
    torch._dynamo.reset()
    model = Broken(lambda out: out.max().item())
    report = vmoba_compile.explain(model, model.inputs["hidden_states"], config=models.CONFIG)
    assert len(report) == 12  # both calls, in one graph


def test_says_where_a_dry_run_ends():
    torch._dynamo.reset()
    model = Broken(lambda out: out if out.max() > 0 else -out)
    with pytest.raises(RewriteError, match=r"needs a tensor's value .* use optimize\(\) and report\(\)"):
        vmoba_compile.explain(model, model.inputs["hidden_states"], config=models.CONFIG)


def test_auto_min_tokens_is_by_device():
    torch._dynamo.reset()
    model, inputs = models.build("wan", batch=1)
    report = vmoba_compile.explain(model, **inputs)
    assert report.counts == {"too_few_tokens": 3, "cross_attention": 3}
    assert f"min_tokens={VMoBAConfig().least_tokens(torch.device('cpu'), False)}" in report.sites[0].detail


@pytest.mark.slow
def test_a_14b_model_on_the_meta_device(monkeypatch):
    """Forty layers of forty heads: under 60 s on two cores, under 3 s of it in the passes."""
    torch._dynamo.reset()
    spent = []
    rewrite = backend.rewrite_one

    def timed(*args, **kwargs):
        start = time.process_time()  # the wall's clock also counts what a busy machine does for others
        try:
            return rewrite(*args, **kwargs)
        finally:
            spent.append(time.process_time() - start)

    monkeypatch.setattr(backend, "rewrite_one", timed)
    start = time.process_time()
    model, inputs = PRESETS["wan2.1-14b"].build()
    report = vmoba_compile.explain(model, **inputs)
    total = time.process_time() - start
    assert sum(p.numel() for p in model.parameters()) > 13e9
    assert len(report.rewritten) == 40 and report.counts["cross_attention"] == 40
    site = report.rewritten[1]
    assert (site.tokens, site.heads, site.grid, site.scheme, site.block) == (75600, 40, (21, 45, 80), "2d", (21, 9, 10))
    print(f"explained in {total:.1f} s, {sum(spent):.2f} s of it in the passes")
    assert total < 60 and sum(spent) < 3
