"""Training with blocks compiled one by one: gradients, checkpoints that a backward pass computes again, the plain model."""

from __future__ import annotations

import copy
import functools
import json

import pytest
import torch
import training
from torch.utils.checkpoint import checkpoint
from training import EXACT, assert_same, clip, gradients, step, with_oracle

import vmoba_compile
from vmoba_compile import VMoBAConfig

pytestmark = pytest.mark.usefixtures("fresh")


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_training(checkpointed, reentrant):
    """Gradients of the oracle's twin, also where the backward pass calls the blocks again."""
    video = clip(2).requires_grad_()  # reentrant checkpoints want an input that asks for a gradient
    model = training.build(layers=3)
    if checkpointed:
        model.around = functools.partial(checkpoint, use_reentrant=reentrant)
    fast = vmoba_compile.optimize(model, training.CONFIG, inner="aot_eager", regional=True, expect=3)
    twin = with_oracle(model)
    for _ in range(2):
        loss, grads = step(fast, video)
        expected, truth = step(twin, video)
        torch.testing.assert_close(loss, expected, rtol=EXACT, atol=0)
        assert_same(grads, truth, EXACT)


def test_the_plain_model_beside_it_in_training():
    """What is kept for the backward pass of the one is not used by the other, nor by a graph of the whole model."""
    video = clip(2)
    model = training.build(layers=2)
    model.around = functools.partial(checkpoint, use_reentrant=False)
    fast = vmoba_compile.optimize(model, training.CONFIG, inner="aot_eager", regional=True, expect=2)
    whole = vmoba_compile.optimize(model, training.CONFIG, inner="aot_eager", expect=2)
    twin = with_oracle(model)
    dense, dense_grads = step(copy.deepcopy(model), video)
    for _ in range(2):
        for optimized in (fast, whole):
            loss, grads = step(optimized, video)
            expected, truth = step(twin, video)
            torch.testing.assert_close(loss, expected, rtol=EXACT, atol=0)
            assert_same(grads, truth, EXACT)
        step(fast, video)
        loss, grads = step(model, video)
        torch.testing.assert_close(loss, dense)
        assert_same(grads, dense_grads, EXACT)


def test_min_tokens_of_training(monkeypatch, tmp_path):
    """Layers are numbered where only training is worth it."""
    entry = {"forward": 100, "training": 50, "largest": {}, "torch": torch.__version__, "measured": "2026-01-31"}
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"version": 1, "devices": {"cpu": entry}}))
    monkeypatch.setenv("VMOBA_COMPILE_CALIBRATION", str(path))
    config = VMoBAConfig.from_dict(training.CONFIG.to_dict() | {"min_tokens": "auto"})
    fast = vmoba_compile.optimize(training.build(layers=4), config, inner="aot_eager", regional=True)
    fast(clip()).sum().backward()
    assert [site.layer for site in vmoba_compile.report(fast)] == [0, 1, 2, 3]
    with torch.no_grad(), pytest.warns(UserWarning, match="4 too_few_tokens"):
        fast(clip())


BETWEEN = {
    "without gradients": lambda fast, video: torch.no_grad()(fast)(video),
    "dense": lambda fast, video: run_dense(fast, video),
    "another size": lambda fast, video: fast(clip(1, (3, 4, 6))),
}


def run_dense(fast, video):
    with fast.dense():
        return fast(video)


@pytest.mark.parametrize("between", BETWEEN.values(), ids=BETWEEN)
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_is_computed_again_as_it_was(reentrant, between):
    """Whatever runs between a forward pass and its backward."""
    model = training.build(layers=3)
    model.around = functools.partial(checkpoint, use_reentrant=reentrant)
    fast = vmoba_compile.optimize(model, training.CONFIG, inner="aot_eager", regional=True, expect=3)
    video = clip(2).requires_grad_()
    between(fast, clip(2))
    loss = training.loss_of(fast, video)
    between(fast, clip(2))
    model.zero_grad()
    loss.backward()
    _, truth = step(with_oracle(model), video)
    assert_same(gradients(model), truth, EXACT)


def test_the_plain_model_after_gradients():
    model, video = training.build(layers=2), clip()
    with torch.no_grad():
        dense = model(video)
    fast = vmoba_compile.optimize(model, training.CONFIG, inner="aot_eager", regional=True, expect=2)
    fast(video)
    with torch.no_grad():
        torch.testing.assert_close(model(video), dense)
        checked = vmoba_compile.verify(fast, video)
        assert checked.rewrite_error < 1e-5
