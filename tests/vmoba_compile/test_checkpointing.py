"""Activation checkpointing in, around and without the rewritten graph."""

from __future__ import annotations

import functools

import models
import pytest
import torch
import training
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from training import EXACT, Recorder, assert_same, clip, gradients, optimize, step, with_oracle

import vmoba_compile

pytestmark = pytest.mark.usefixtures("fresh")


OPERATORS = (torch.ops.vmoba.select.default, torch.ops.vmoba.attention.default)


def save_attention(ctx, op, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if op in OPERATORS else CheckpointPolicy.PREFER_RECOMPUTE


def recompute_attention(ctx, op, *args, **kwargs):
    return CheckpointPolicy.MUST_RECOMPUTE if op in OPERATORS else CheckpointPolicy.PREFER_SAVE


def save_selection(ctx, op, *args, **kwargs):
    saved = op is torch.ops.vmoba.select.default
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


POLICIES = {
    # name: (policy, the operators that the backward graph computes again)
    "everything": (None, {"select": 2, "attention": 2}),
    "save_attention": (save_attention, {}),
    "recompute_attention": (recompute_attention, {"select": 2, "attention": 2}),
    "save_selection": (save_selection, {"attention": 2}),
}
every_policy = pytest.mark.parametrize(("policy", "again"), POLICIES.values(), ids=POLICIES)


def checkpointing(policy):
    options = {"use_reentrant": False}
    if policy:
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, policy)
    return functools.partial(checkpoint, **options)


@every_policy
def test_blocks(policy, again):
    """The bits of the gradients without it, dropout included; what a policy saves is not computed again."""
    video = clip(2)
    found, recorders = [], []
    model = training.build(dropout=0.3)
    for around in (None, checkpointing(policy)):
        torch._dynamo.reset()
        model.around = around
        recorders.append(Recorder())
        torch.manual_seed(1)
        found.append(step(optimize(model, recorders[-1]), video))
    assert torch.equal(found[0][0], found[1][0])
    assert_same(found[1][1], found[0][1], 0)
    assert recorders[0].counts("backward") == {"attention_backward": 2}
    assert recorders[1].counts("forward") == {"select": 2, "attention": 2}
    assert recorders[1].counts("backward") == {"attention_backward": 2} | again
    # The backward graph goes through the layers from the last to the first.
    chosen, chosen_again = recorders[1].selections["forward"], recorders[1].selections["backward"][::-1]
    assert len(chosen_again) == again.get("select", 0)
    assert all(torch.equal(a, b) for a, b in zip(chosen, chosen_again, strict=False))
    assert not torch.equal(chosen[0], chosen[1])


def test_equal_the_oracle():
    model, video = training.build(around=checkpointing(None)), clip(2)
    twin = with_oracle(model)
    twin.around = None
    assert_same(step(optimize(model), video)[1], step(twin, video)[1], EXACT)


def test_diffusers():
    """The model's own checkpointing leaves its attentions sparse, and the recomputed selection is the same."""
    model, inputs = models.build("wan", batch=1)
    model.train().enable_gradient_checkpointing()
    recorder = Recorder()
    fast = vmoba_compile.optimize(model, models.CONFIG, inner=recorder, fullgraph=True, expect=3)
    fast(**inputs).sample.square().sum().backward()
    assert recorder.counts("forward") == {"select": 3, "attention": 3}
    assert recorder.counts("backward") == {"select": 3, "attention": 3, "attention_backward": 3}
    chosen = recorder.selections
    assert all(torch.equal(a, b) for a, b in zip(chosen["forward"], chosen["backward"][::-1], strict=True))


@pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])
@pytest.mark.parametrize("compiled", [False, True], ids=["first_call", "compiled_before"])
def test_around_the_optimized_model(compiled, reentrant, ran):
    """Around the whole: its forward runs a second time in the backward pass."""
    model, video = training.build(), clip(2).requires_grad_()
    twin = with_oracle(model)
    twin(video.detach()).square().mean().backward()
    fast = optimize(model)
    if compiled:
        fast(video)
    ran.clear()
    checkpoint(fast, video, use_reentrant=reentrant).square().mean().backward()
    assert ran == {"select": 4, "attention": 4, "attention_backward": 2}
    assert_same(gradients(model), gradients(twin), EXACT)


@every_policy
def test_operator_in_eager_mode(policy, again, ran):
    """``vmoba_compile.attention`` within a checkpoint that torch.compile never sees."""
    tensors = [torch.randn(1, 2, 64, 8, requires_grad=True) for _ in range(3)]

    def attend(q, k, v):
        return vmoba_compile.attention(2 * q, k, v, training.GRID, block=(2, 3, 2)).square()

    expected = torch.autograd.grad(attend(*tensors).sum(), tensors)
    ran.clear()
    found = torch.autograd.grad(checkpointing(policy)(attend, *tensors).sum(), tensors)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert ran == {name: 2 if name in again else 1 for name in ("select", "attention")} | {"attention_backward": 1}


@pytest.mark.parametrize("compiled", [False, True], ids=["first_call", "compiled_before"])
def test_saved_on_the_cpu(compiled):
    """Hooks on saved tensors see those of the graph."""
    model, video = training.build(), clip()
    _, truth = step(with_oracle(model), video)
    fast = optimize(model)
    if compiled:
        fast(video)
    with torch.autograd.graph.save_on_cpu():
        loss = training.loss_of(fast, video)
    loss.backward()
    assert_same(gradients(model), truth, EXACT)
