"""Real diffusers models: the right sites, and the same numbers as the model's own code with the oracle inside."""

from __future__ import annotations

import models
import pytest
import torch

import vmoba_compile
from vmoba_compile import VMoBAConfig

NAMES = list(models.TINY)


@pytest.fixture(params=NAMES)
def name(request) -> str:
    torch._dynamo.reset()
    return request.param


def check_report(name: str, report: vmoba_compile.Report) -> None:
    _, paths, grid, prefix, suffix, dense = models.TINY[name]
    assert [site.path for site in report.rewritten] == paths
    for layer, site in enumerate(report.rewritten):
        assert (site.layer, site.grid, site.prefix, site.suffix) == (layer, grid, prefix, suffix)
        assert site.block == models.expected_block(layer, grid)
        assert site.source.endswith(tuple("0123456789")) and site.evidence.startswith(("conv2d ", "conv3d "))
    assert {reason: count for reason, count in report.counts.items() if reason != "rewritten"} == dense


def test_forward_and_sites(name):
    model, inputs = models.build(name)
    fast = vmoba_compile.optimize(model.eval(), models.CONFIG, inner="eager", fullgraph=True)
    with torch.no_grad():
        expected = models.with_oracle(name, model)(**inputs).sample
        got, dense = fast(**inputs).sample, model(**inputs).sample
    assert models.relative(got, expected) < 1e-4
    assert models.relative(dense, expected) > 1e-3, "the selection must matter, or this test shows nothing"
    check_report(name, vmoba_compile.report(fast))


def test_gradients(name):
    model, inputs = models.build(name, batch=1)
    reference = models.with_oracle(name, model.train())
    fast = vmoba_compile.optimize(model, models.CONFIG, inner="aot_eager", fullgraph=True)
    for candidate in (reference, fast):
        out = candidate(**inputs).sample
        (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    check_report(name, vmoba_compile.report(fast))
    expected = {key: p.grad for key, p in reference.named_parameters() if p.grad is not None}
    got = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == expected.keys() and len(got) > 30
    scale = max(float(grad.norm()) for grad in expected.values())
    for key, grad in expected.items():
        assert float((got[key] - grad).norm()) < 1e-4 * max(float(grad.norm()), 1e-3 * scale), key


def test_gradient_checkpointing(name):
    """Attention sits in a subgraph of its own, and the recomputed selection is the same."""
    model, inputs = models.build(name, batch=1)
    model.train()

    def gradients(module) -> list[torch.Tensor]:
        model.zero_grad()
        module(**inputs).sample.square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients(vmoba_compile.optimize(model, models.CONFIG, inner="aot_eager"))
    model.enable_gradient_checkpointing()
    torch._dynamo.reset()
    fast = vmoba_compile.optimize(model, models.CONFIG, inner="aot_eager")
    checkpointed = gradients(fast)
    check_report(name, vmoba_compile.report(fast))
    assert len(plain) == len(checkpointed)
    scale = max(float(grad.norm()) for grad in plain)
    for a, b in zip(plain, checkpointed, strict=True):
        assert float((a - b).norm()) < 1e-4 * max(float(a.norm()), 1e-3 * scale)


def test_threshold_one_is_the_dense_model(name):
    model, inputs = models.build(name)
    fast = vmoba_compile.optimize(model.eval(), VMoBAConfig(threshold=1.0, min_tokens=0), inner="eager")
    with torch.no_grad():
        assert models.relative(fast(**inputs).sample, model(**inputs).sample) < 1e-5
    assert len(vmoba_compile.report(fast).rewritten) == len(models.TINY[name][1])


def test_exported_program(name):
    """The same pure function serves exported programs."""
    from vmoba_compile.passes import rewrite

    model, inputs = models.build(name)
    program = torch.export.export(model.eval(), (), inputs)
    report = rewrite(program.graph_module, models.CONFIG)
    check_report(name, report)
    with torch.no_grad():
        expected = models.with_oracle(name, model)(**inputs).sample
        assert models.relative(program.module()(**inputs).sample, expected) < 1e-4


def test_explain_agrees(name):
    model, inputs = models.build(name)
    report = vmoba_compile.explain(model, config=models.CONFIG, **inputs)
    check_report(name, report)
    assert all(p.device.type == "cpu" and type(p) is torch.nn.Parameter for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast(name, dtype):
    """Under autocast attention runs in the low precision, dense or sparse."""
    model, inputs = models.build(name, batch=1)
    fast = vmoba_compile.optimize(model.eval(), VMoBAConfig(threshold=1.0, min_tokens=0), inner="eager")
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        got, dense = fast(**inputs).sample, model(**inputs).sample
    with torch.no_grad():
        exact = model(**inputs).sample
    assert got.dtype == dense.dtype
    noise = models.relative(dense.float(), exact)
    assert 0 < noise < 0.2 and models.relative(got.float(), exact) < 1.5 * noise
    assert len(vmoba_compile.report(fast).rewritten) == len(models.TINY[name][1])


@models.needs_compiler
@pytest.mark.slow
def test_inductor(name):
    model, inputs = models.build(name, batch=1)
    fast = vmoba_compile.optimize(model.eval(), models.CONFIG, fullgraph=True)
    with torch.no_grad():
        expected = models.with_oracle(name, model)(**inputs).sample
        assert models.relative(fast(**inputs).sample, expected) < 1e-4
    check_report(name, vmoba_compile.report(fast))
