"""Whole models on a GPU: compiled by Inductor, in bfloat16, forward and backward."""

from __future__ import annotations

import models
import pytest
import torch

import vmoba_compile
from vmoba_compile import InputError, VMoBAConfig

pytestmark = pytest.mark.gpu


@pytest.fixture(params=list(models.TINY))
def on_gpu(request):
    torch._dynamo.reset()
    model, inputs = models.build(request.param, batch=1)
    move = lambda x: x.cuda() if isinstance(x, torch.Tensor) else x  # noqa: E731
    return request.param, model.cuda(), torch.utils._pytree.tree_map(move, inputs)


def test_inductor_training(on_gpu, monkeypatch):
    name, model, inputs = on_gpu
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # the patch embedding would move the selection
    reference = models.with_oracle(name, model.train())
    fast = vmoba_compile.optimize(model, models.CONFIG, fullgraph=True)
    out, expected = fast(**inputs).sample, reference(**inputs).sample
    out.square().sum().backward()
    expected.square().sum().backward()
    assert models.relative(out.detach(), expected.detach()) < 1e-4
    assert [site.path for site in vmoba_compile.report(fast).rewritten] == models.TINY[name][1]
    expected_grads = {key: p.grad for key, p in reference.named_parameters() if p.grad is not None}
    scale = max(float(grad.norm()) for grad in expected_grads.values())
    for key, parameter in model.named_parameters():
        if key in expected_grads:
            error = float((parameter.grad - expected_grads[key]).norm())
            assert error < 1e-4 * max(float(expected_grads[key].norm()), 1e-2 * scale), key


def test_bfloat16_threshold_one_is_dense(on_gpu):
    _, model, inputs = on_gpu
    with torch.no_grad():
        exact = model.eval()(**inputs).sample
        model.bfloat16()
        low = {k: v.bfloat16() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}
        if "image_rotary_emb" in low:
            low["image_rotary_emb"] = tuple(x.bfloat16() for x in low["image_rotary_emb"])
        fast = vmoba_compile.optimize(model, VMoBAConfig(threshold=1.0, min_tokens=0))
        noise = models.relative(model(**low).sample.float(), exact)
        assert models.relative(fast(**low).sample.float(), exact) < 1.5 * noise < 0.5
        with fast.dense():
            assert models.relative(fast(**low).sample.float(), exact) < 1.5 * noise


def test_inputs_on_mixed_devices(on_gpu):
    _, model, inputs = on_gpu
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"].cpu()
    fast = vmoba_compile.optimize(model, models.CONFIG, inner="eager")
    with pytest.raises(
        InputError, match=r"several devices: parameter .* on cuda:0; input encoder_hidden_states on cpu"
    ):
        fast(**inputs)


def test_cuda_graphs(on_gpu):
    """Nothing in the forward waits for the host: mode="reduce-overhead" takes it into its CUDA graphs."""
    _, model, inputs = on_gpu
    with torch.no_grad():
        plain = vmoba_compile.optimize(model.eval(), models.CONFIG, inner="eager")(**inputs).sample
        fast = vmoba_compile.optimize(model, models.CONFIG, mode="reduce-overhead")
        for _ in range(3):
            out = fast(**inputs).sample.clone()
    assert models.relative(out, plain) < 1e-3
