"""Attention inside torch's own modules: ``nn.MultiheadAttention`` and encoder layers, as one call or spelled out."""

from __future__ import annotations

import pytest
import torch
from graph_runs import same_gradients
from graphs import VideoAttention, compiled, raster_tokens, rewritten, verdicts, video
from torch import nn

KEEP = torch.arange(24)[None] < torch.tensor([[17], [24]])


class Opaque(VideoAttention):
    """Attention that is one call in the graph."""

    def __init__(self, module, **options):
        super().__init__()
        self.module, self.options = module, options

    def forward(self, x, *masks):
        x = raster_tokens(self.patch(x))
        batch_first = getattr(self.module, "batch_first", True)
        x = x if batch_first else x.transpose(0, 1)
        options = dict(self.options)
        if masks:
            options["key_padding_mask"] = ~masks[0]
        return self.module(x, x, x, **options)[0]


@pytest.mark.parametrize(("batch_first", "training"), [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("weights", [False, True])
def test_multi_head_attention(batch_first, training, masked, weights):
    module = nn.MultiheadAttention(16, 2, batch_first=batch_first)
    model = Opaque(module, need_weights=weights).train(training)
    report = rewritten(model, video(), *([KEEP] if masked else []))
    assert verdicts(report) == ["rewritten"], str(report)


@pytest.mark.parametrize("options", [{"bias": False}, {"kdim": 12, "vdim": 20}, {"vdim": 20}])
def test_multi_head_attention_with_other_weights(options):
    class Model(VideoAttention):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True, **options)
            self.key = nn.Linear(16, options.get("kdim", 16))
            self.value = nn.Linear(16, options.get("vdim", 16))

        def forward(self, x):
            x = raster_tokens(self.patch(x))
            return self.attention(x, self.key(x), self.value(x), need_weights=False)[0]

    for training in (False, True):
        report = rewritten(Model().train(training), video())
        assert verdicts(report) == ["rewritten"], str(report)


@pytest.mark.parametrize(
    ("settings", "options", "reason"),
    [
        ({"add_bias_kv": True}, {}, "spelling"),
        ({"add_zero_attn": True}, {}, "spelling"),
        ({"dropout": 0.1}, {}, "dropout"),
        ({}, {"attn_mask": torch.arange(24 * 24).view(24, 24) % 5 == 3}, "mask"),
        ({}, {"attn_mask": torch.linspace(0, 1, 24 * 24).view(24, 24)}, "mask"),
    ],
    ids=["extra key", "zeros", "dropout", "bool mask", "float mask"],
)
def test_multi_head_attention_left_dense(settings, options, reason):
    module = nn.MultiheadAttention(16, 2, batch_first=True, **settings)
    capture, _ = compiled(Opaque(module, need_weights=False, **options).train(), video())
    assert verdicts(capture.report) == [reason], str(capture.report)


def test_weights_of_multi_head_attention():
    class Model(Opaque):
        def forward(self, x):
            x = raster_tokens(self.patch(x))
            return self.module(x, x, x)

    module = nn.MultiheadAttention(16, 2, batch_first=True)
    assert verdicts(rewritten(Model(module).train(), video())) == ["weights_used"]


@pytest.mark.parametrize(("norm_first", "activation"), [(False, "relu"), (True, "gelu")])
def test_encoder_layer(norm_first, activation):
    class Model(VideoAttention):
        def __init__(self):
            super().__init__()
            kwargs = {"batch_first": True, "norm_first": norm_first, "activation": activation, "dropout": 0.0}
            self.layers = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, **kwargs) for _ in range(2))

        def forward(self, x):
            x = raster_tokens(self.patch(x))
            for layer in self.layers:
                x = layer(x)
            return x

    for training in (False, True):
        report = rewritten(Model().train(training), video())
        assert verdicts(report) == ["rewritten"] * 2, str(report)


def test_encoder_layer_with_padding():
    class Model(VideoAttention):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)

        def forward(self, x, keep):
            return self.layer(raster_tokens(self.patch(x)), src_key_padding_mask=~keep)

    for training in (False, True):
        report = rewritten(Model().train(training), video(), KEEP)
        assert verdicts(report) == ["rewritten"], str(report)


def test_gradients():
    class Model(VideoAttention):
        def __init__(self):
            super().__init__()
            self.first = nn.MultiheadAttention(16, 2, batch_first=True)
            self.second = nn.MultiheadAttention(16, 2, vdim=8)
            self.value = nn.Linear(16, 8)
            self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)

        def forward(self, x):
            x = raster_tokens(self.patch(x))
            x = x + self.first(x, x, x, need_weights=False)[0]
            t = x.transpose(0, 1)
            x = x + self.second(t, t, self.value(t))[0].transpose(0, 1)
            return [self.layer(x)]

    report = same_gradients(Model(), video())
    assert verdicts(report) == ["rewritten"] * 3, str(report)
