"""Wrong use: one clear error each, of the right type, with the cause and the remedy."""

from __future__ import annotations

import models
import pytest
import torch
from torch import nn

import vmoba_compile
from vmoba_compile import GridError, InputError, RewriteError, VMoBAConfig


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


class NoAttention(nn.Module):
    def forward(self, x):
        return x * 2


def linear():
    return nn.Linear(4, 4)


AT_ONCE = {
    "model is no module": (lambda: vmoba_compile.optimize(3), TypeError, "model must be a torch.nn.Module, not int"),
    "compiled already": (
        lambda: vmoba_compile.optimize(torch.compile(linear())), TypeError, "model is compiled already",
    ),
    "unknown option": (
        lambda: vmoba_compile.optimize(linear(), treshold=0.3), TypeError, "unknown option 'treshold'.*config=VMoBAConfig",
    ),
    "backend given": (
        lambda: vmoba_compile.optimize(linear(), backend="eager"), ValueError, "compiler of the rewritten graph with inner=",
    ),
    "unknown inner": (lambda: vmoba_compile.optimize(linear(), inner="x"), ValueError, "inner must be a callable or one of"),
    "mode for eager": (
        lambda: vmoba_compile.optimize(linear(), inner="eager", mode="max-autotune"), ValueError, "are for inner='inductor'",
    ),
    "config of another type": (lambda: vmoba_compile.optimize(linear(), 0.25), TypeError, "config must be a VMoBAConfig"),
    "unknown config field": (
        lambda: vmoba_compile.optimize(linear(), {"tau": 0.3}), ValueError, "unknown option 'tau'; the options are",
    ),
    "disabled": (lambda: vmoba_compile.optimize(linear(), disable=True), ValueError, "disable=True leaves nothing"),
    "expect is no number": (lambda: vmoba_compile.optimize(linear(), expect="all"), ValueError, "expect must be a number"),
    "grid of two": (
        lambda: vmoba_compile.optimize(linear(), grid=(30, 52)), ValueError, r"grid must be three integers .*\(30, 52\)",
    ),
    "grid of zero": (lambda: vmoba_compile.optimize(linear(), grid=(0, 30, 52)), ValueError, "integers of at least 1"),
    "grid of floats": (lambda: vmoba_compile.optimize(linear(), grid=(2.0, 3, 4)), TypeError, "must hold integers"),
    "threshold": (lambda: VMoBAConfig(threshold=0), ValueError, "threshold must be greater than 0"),
    "threshold type": (lambda: VMoBAConfig(threshold="0.3"), TypeError, "threshold must be a number, not str"),
    "pool": (lambda: VMoBAConfig(pool="head"), ValueError, "pool must be one of 'head_global'"),
    "mode": (lambda: VMoBAConfig(mode="top"), ValueError, "mode must be one of 'threshold', 'topk'"),
    "topk missing": (lambda: VMoBAConfig(mode="topk"), ValueError, "needs topk of at least 1"),
    "topk in block": (lambda: VMoBAConfig(mode="topk", topk=2, pool="block"), ValueError, "'block' has no top-k rule"),
    "granularity": (lambda: VMoBAConfig(granularity="box"), ValueError, "granularity must be one of 'token', 'tile'"),
    "blocks scheme": (lambda: VMoBAConfig(blocks={"4d": (1, 1, 1)}), ValueError, "unknown scheme '4d'"),
    "blocks size": (lambda: VMoBAConfig(blocks={"1d": (0, 1, 1)}), ValueError, r"blocks\['1d'\] must be three integers"),
    "blocks count": (lambda: VMoBAConfig(blocks={"1d": {"boxes": 3}}), ValueError, "must be sizes or {'count'"),
    "blocks type": (lambda: VMoBAConfig(blocks=(3, 4, 5)), TypeError, "blocks must map"),
    "dense_steps": (lambda: VMoBAConfig(dense_steps=1.5), ValueError, "must be in 0 to 1, not 1.5; give an int"),
    "dense_layers": (lambda: VMoBAConfig(dense_layers=(-1,)), ValueError, "dense_layers must hold layer numbers"),
    "min_tokens": (lambda: VMoBAConfig(min_tokens="few"), ValueError, "min_tokens must be 'auto' or an int"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), AT_ONCE.values(), ids=AT_ONCE.keys())
def test_at_once(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def wan_with(**changes):
    model, inputs = models.build("wan", batch=1)
    return model.eval(), inputs | changes


LATENT = (1, 4, 4, 12, 16)
AT_THE_FIRST_CALL = {
    # name: (changed inputs, optimize's arguments, error, message)
    "wrong grid": ({}, {"grid": (4, 6, 9)}, GridError, r"grid=\(4, 6, 9\) has 216 tokens, but the video has 192"),
    "too many frames": (
        {"hidden_states": torch.zeros(1, 4, 40, 12, 16)}, {}, InputError,
        r"WanTransformer3DModel itself rejects these inputs at transformer_wan.py:\d+: shape '\[40, 1, 1, -1\]' is invalid",
    ),
    "odd text width": (
        {"encoder_hidden_states": torch.zeros(1, 12, 17)}, {}, InputError, "same reduction dim.*check the inputs' dtype",
    ),
    "inputs on mixed devices": (
        {"encoder_hidden_states": torch.zeros(1, 12, 16, device="meta")}, {}, InputError,
        "several devices: parameter .* on cpu; input encoder_hidden_states on meta. Move them to one device",
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", ["optimize", "explain"])
@pytest.mark.parametrize(
    ("changes", "kwargs", "kind", "message"), AT_THE_FIRST_CALL.values(), ids=AT_THE_FIRST_CALL.keys()
)
def test_at_the_first_call(how, changes, kwargs, kind, message):
    model, inputs = wan_with(**changes)
    with pytest.raises(kind, match=message) as error, torch.no_grad():
        if how == "optimize":
            vmoba_compile.optimize(model, models.CONFIG, inner="eager", **kwargs)(**inputs)
        else:
            vmoba_compile.explain(model, config=models.CONFIG, **kwargs, **inputs)
    assert isinstance(error.value, RewriteError)
    assert len(str(error.value)) < 600


def test_model_without_video_attention():
    fast = vmoba_compile.optimize(NoAttention(), inner="eager")
    with pytest.warns(UserWarning, match="left NoAttention dense: no compiled graph with attention ran"):
        fast(torch.ones(3))
    assert len(vmoba_compile.report(fast)) == 0
    with pytest.raises(vmoba_compile.CoverageError, match="strict=True, but no attention was rewritten"):
        vmoba_compile.optimize(NoAttention(), inner="eager", strict=True)(torch.ones(3))


def test_errors_lose_nothing():
    """After an error the model runs as before, and with the right arguments it is rewritten."""
    model, inputs = wan_with()
    with pytest.raises(GridError), torch.no_grad():
        vmoba_compile.optimize(model, models.CONFIG, inner="eager", grid=(1, 1, 1))(**inputs)
    with torch.no_grad():
        model(**inputs)
        fast = vmoba_compile.optimize(model, models.CONFIG, inner="eager", grid=(4, 6, 8))
        fast(**inputs)
    sites = vmoba_compile.report(fast).rewritten
    assert len(sites) == 3 and sites[0].evidence.startswith("grid= given")
