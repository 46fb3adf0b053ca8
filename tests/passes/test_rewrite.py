"""The rewrite as a whole: subgraphs, layers, dynamic shapes, metadata, exported programs."""

from __future__ import annotations

import pytest
import torch
from graphs import (
    EVERYTHING,
    Capture,
    VideoAttention,
    compiled,
    dense,
    exported,
    raster_tokens,
    rewritten,
    verdicts,
    video,
)
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from vmoba_compile.passes import rewrite

import vmoba_compile
from vmoba_compile import VMoBAConfig

SDPA = F.scaled_dot_product_attention
GRID = (2, 3, 4)


class Blocks(VideoAttention):
    """Two layers with a residual stream; ``between`` runs after the first."""

    between = staticmethod(lambda: None)

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        x = raster_tokens(self.patch(x))
        for block in self.blocks:
            x = self.run(block, x)
            self.between()
        return x

    def run(self, block, x):
        return block(x)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x):
        q, k, v = (part.unflatten(2, (2, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        return x + dense(q, k, v).transpose(1, 2).flatten(2)


def test_layers_and_paths():
    report = rewritten(Blocks(), video())
    assert [(s.path, s.layer, s.scheme) for s in report] == [("blocks.0", 0, "1d"), ("blocks.1", 1, "2d")]
    assert all(s.source.startswith("graphs.py:") for s in report)


def test_one_module_called_twice_is_two_layers():
    model = Blocks()
    model.blocks[1] = model.blocks[0]
    report = rewritten(model, video())
    assert [s.layer for s in report] == [0, 1]


def test_dense_layers_keep_their_number():
    capture, _ = compiled(Blocks(), video(), config=VMoBAConfig(min_tokens=0, dense_layers=(0,)))
    assert [(s.reason.value, s.layer) for s in capture.report] == [("dense_layer", 0), ("rewritten", 1)]


def test_too_few_tokens():
    capture, _ = compiled(Blocks(), video(), config=VMoBAConfig(min_tokens=25))
    assert verdicts(capture.report) == ["too_few_tokens"] * 2


def test_layer_numbers_go_on_over_graph_breaks():
    class Model(Blocks):
        def forward(self, x):
            x = self.blocks[0](raster_tokens(self.patch(x)))
            torch._dynamo.graph_break()
            return self.blocks[1](raster_tokens(self.patch(x.transpose(1, 2).reshape(2, 3, 2, 8, 8))))

    model, x = Model().eval(), video()
    torch._dynamo.reset()
    capture = Capture(EVERYTHING)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=capture)(x), model(x))
    assert len(capture.graphs) == 2
    assert [(s.path, s.layer) for s in capture.report.rewritten] == [("blocks.0", 0), ("blocks.1", 1)]


def test_grid_is_not_known_behind_a_graph_break():
    class Model(VideoAttention):
        def forward(self, x):
            x = raster_tokens(self.patch(x))
            torch._dynamo.graph_break()
            return dense(*self.split(x))

    capture, _ = compiled(Model(), video(), fullgraph=False)
    assert verdicts(capture.report) == ["no_grid"]
    assert "pass grid=(frames, rows, columns)" in capture.report.sites[0].detail
    capture, _ = compiled(Model(), video(), fullgraph=False, grid=GRID)
    assert verdicts(capture.report) == ["rewritten"]


@pytest.mark.parametrize("reentrant", [False])
def test_checkpointing(reentrant):
    class Model(Blocks):
        def run(self, block, x):
            return checkpoint(block, x, use_reentrant=reentrant)

    model, x = Model(), video()
    capture, found = compiled(model, x)
    assert verdicts(capture.report) == ["rewritten"] * 2
    found.square().sum().backward()
    grads = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    model(x).square().sum().backward()
    for got, parameter in zip(grads, model.parameters(), strict=True):
        if got is not None:
            torch.testing.assert_close(got, parameter.grad, atol=1e-4, rtol=1e-4)


def test_checkpointed_embeddings_of_two_videos_are_told_apart():
    class Model(VideoAttention):
        def embed(self, x):
            return raster_tokens(self.patch(x))

        def forward(self, x, y):
            q, _, _ = self.split(checkpoint(self.embed, x, use_reentrant=False))
            _, k, v = self.split(checkpoint(self.embed, y, use_reentrant=False))
            return SDPA(q, k, v)

    capture, _ = compiled(Model(), video(), video())
    assert verdicts(capture.report) == ["cross_attention"]


def test_autocast_and_no_grad_regions():
    class Model(VideoAttention):
        def forward(self, x):
            q, k, v = self.split(raster_tokens(self.patch(x)))
            with torch.no_grad():
                first = SDPA(q, k, v)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                second = SDPA(q, k, v)
            return first, second.float()

    x, model = video(), Model()
    with torch.no_grad():
        capture, found = compiled(model, x)
        wanted = model(x)
    assert verdicts(capture.report) == ["rewritten"] * 2
    torch.testing.assert_close(found[0], wanted[0])
    torch.testing.assert_close(found[1], wanted[1], atol=2e-2, rtol=2e-2)


def test_control_flow_is_reported():
    class Model(VideoAttention):
        def forward(self, x, flag):
            q, k, v = (t.clone() for t in self.split(raster_tokens(self.patch(x))))
            return torch.cond(flag.any(), lambda: dense(q, k, v), lambda: dense(q, k, v) * 2)

    capture, _ = compiled(Model(), video(), torch.tensor([True]))
    assert verdicts(capture.report) == ["control_flow"] * 2


def test_modules_and_attention_by_hand():
    class Model(VideoAttention):
        def __init__(self):
            super().__init__()
            self.opaque = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x):
            x = raster_tokens(self.patch(x))
            q, k, v = self.split(self.opaque(x, x, x, need_weights=False)[0] + x)
            by_hand = (q @ k.transpose(-1, -2) * 0.3).softmax(-1) @ v
            gates = self.qkv(x).softmax(-1)  # no attention
            return by_hand, gates

    capture, _ = compiled(Model(), video())
    assert [(s.reason.value, s.spelling) for s in capture.report] == [
        ("rewritten", "multi_head_attention_forward"),
        ("rewritten", "softmax"),
    ]


def test_lowered_attention_is_reported():
    program = torch.export.export(VideoAttention().eval(), (video(),)).run_decompositions()
    report = rewrite(program.graph_module, EVERYTHING)
    assert verdicts(report) == ["weights_used"]  # the softmax that it is lowered to is used twice


# Graphs


def test_graph_without_rewrite_is_untouched():
    program = torch.export.export(VideoAttention(lambda x: raster_tokens(x).flip(1)), (video(),))
    before = str(program.graph)
    assert not rewrite(program.graph_module, EVERYTHING).rewritten
    assert str(program.graph) == before


def test_new_nodes_carry_metadata():
    capture, _ = compiled(Blocks(), video())
    added = [n for n in capture.graphs[0].graph.nodes if "vmoba" in str(n.target)]
    assert len(added) == 4
    for node in added:
        assert "example_value" in node.meta and node.meta["nn_module_stack"] and node.meta["stack_trace"]


@pytest.mark.parametrize(("granularity", "tile"), [("token", 0), ("tile", 128)])
def test_granularity_reaches_the_operators(granularity, tile):
    config = VMoBAConfig(min_tokens=0, granularity=granularity)
    model, x = Blocks(), video()
    capture, found = compiled(model, x, config=config)
    added = [n for n in capture.graphs[0].graph.nodes if "vmoba" in str(n.target)]
    assert [node.kwargs["tile"] for node in added] == [tile] * 4
    rows = added[0].meta["example_value"].shape[2]
    assert rows == (2 if tile else 24)  # "1d": two boxes of a frame, one tile each
    found.sum().backward()
    assert model.patch.weight.grad.isfinite().all()


def test_tiles_in_an_exported_program():
    model, x = Blocks().eval(), video()
    report, program = exported(model, x, config=VMoBAConfig(min_tokens=0, granularity="tile", threshold=1.0))
    assert len(report.rewritten) == 2
    torch.testing.assert_close(program.run_decompositions({}).module()(x), model(x))


def test_exported_program_decomposes_and_runs():
    model, x = Blocks().eval(), video()
    report, program = exported(model, x)
    assert len(report.rewritten) == 2
    lowered = program.run_decompositions({})
    torch.testing.assert_close(lowered.module()(x), model(x))


def test_attention_that_is_an_output_keeps_its_name():
    _, program = exported(VideoAttention(), video())
    program.validate() if hasattr(program, "validate") else None
    assert [o.arg.name for o in program.graph_signature.output_specs] == [
        n.name for n in program.graph.output_node().args[0]
    ]


# Dynamic shapes


@pytest.mark.parametrize("granularity", ["token", "tile"])
def test_dynamic_grid_serves_every_size_without_recompiling(granularity):
    model = Blocks().eval()
    torch._dynamo.reset()
    capture = Capture(VMoBAConfig(threshold=1.0, min_tokens=0, granularity=granularity))
    run = torch.compile(model, backend=capture, dynamic=True, fullgraph=True)
    with torch.no_grad():
        for grid in [(2, 3, 4), (3, 4, 5), (5, 2, 7), (4, 6, 3)]:
            x = video(*grid, batch=grid[0])
            torch.testing.assert_close(run(x), model(x), atol=1e-5, rtol=1e-5)
    assert verdicts(capture.report) == ["rewritten"] * 2
    plain = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    run = torch.compile(model, backend=plain, dynamic=True, fullgraph=True)
    with torch.no_grad():
        for grid in [(2, 3, 4), (3, 4, 5), (5, 2, 7), (4, 6, 3)]:
            run(video(*grid, batch=grid[0]))
    assert len(capture.graphs) == plain.frame_count


def test_dynamic_text_length():
    class Model(VideoAttention):
        def forward(self, x, text, mask):
            q, k, v = self.split(torch.cat([text, raster_tokens(self.patch(x))], 1))
            return SDPA(q, k, v, attn_mask=F.pad(mask, (0, 24), value=True)[:, None, None])

    model, x = Model().eval(), video()
    torch._dynamo.reset()
    capture = Capture(EVERYTHING)
    run = torch.compile(model, backend=capture, fullgraph=True)
    for length in (5, 7, 9):
        text, mask = torch.randn(2, length, 16), torch.arange(length).expand(2, length) < 4
        if length == 5:
            torch._dynamo.mark_dynamic(text, 1)
            torch._dynamo.mark_dynamic(mask, 1)
        with torch.no_grad():
            torch.testing.assert_close(run(x, text, mask), model(x, text, mask), atol=1e-5, rtol=1e-5)
    assert verdicts(capture.report) == ["rewritten"] and len(capture.graphs) == 1


def test_symbolic_cut_that_only_fits_the_first_size_is_not_believed():
    class Model(VideoAttention):
        def forward(self, x, text):
            both = torch.cat([text, raster_tokens(self.patch(x))], 1)
            return dense(*self.split(both[:, 5:29]))

    x, text = video(), torch.randn(2, 5, 16)
    torch._dynamo.mark_dynamic(text, 1)
    capture, _ = compiled(Model(), x, text, dynamic=None)
    assert not capture.report.rewritten


def test_flex_attention_is_reported():
    from torch.nn.attention.flex_attention import flex_attention

    with torch.no_grad():
        capture, _ = compiled(VideoAttention(attend=lambda q, k, v: flex_attention(q, k, v)), video())
    assert [(s.reason.value, s.spelling) for s in capture.report] == [("spelling", "flex_attention")]


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_view_that_needs_the_strides_of_the_result(inner):
    """The dense operator's result lies as its queries do, which code may count on."""

    def attend(q, k, v):
        return dense(q, k, v).transpose(1, 2).view(2, 24, 16)

    model, x = VideoAttention(attend=attend), video()
    wanted = model(x)
    fast = vmoba_compile.optimize(model, EVERYTHING, inner=inner)
    torch.testing.assert_close(fast(x), wanted, atol=1e-5, rtol=1e-5)
    assert verdicts(vmoba_compile.report(fast)) == ["rewritten"]
    fast(x).square().sum().backward()
