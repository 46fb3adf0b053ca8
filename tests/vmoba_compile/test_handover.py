"""What a graph knows of its tensors outlives a graph break, and nothing that only looks alike."""

from __future__ import annotations

import pytest
import torch
from graphs import EVERYTHING, SPARSE, VideoAttention, dense, raster_tokens, verdicts, video
from torch import nn

import vmoba_compile


class Broken(VideoAttention):
    """A graph break between the patch embedding and the attention; ``between`` runs there, as it is."""

    def __init__(self, between=lambda x: x, order=None):
        super().__init__(order)
        self.between = torch.compiler.disable(between)

    def tokens(self, x):
        return self.between(self.order(self.patch(x)))

    def forward(self, x):
        return dense(*self.split(self.tokens(x)))


def sparse(model, x, grid):
    block = vmoba_compile.explain(VideoAttention(), video(*grid), config=SPARSE).sites[0].block
    return vmoba_compile.attention(*model.split(model.tokens(x)), grid, block=block, threshold=SPARSE.threshold)


def optimized(model, config=SPARSE, **kwargs):
    torch._dynamo.reset()
    return vmoba_compile.optimize(model, config, inner=kwargs.pop("inner", "eager"), **kwargs)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_grid_after_a_graph_break(inner):
    model, x = Broken(), video(4, 3, 5)
    fast = optimized(model, inner=inner)
    out, wanted = fast(x), sparse(model, x, (4, 3, 5))
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)
    for got, want in zip(
        torch.autograd.grad(out.sum(), model.parameters()),
        torch.autograd.grad(wanted.sum(), model.parameters()),
        strict=True,
    ):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    (site,) = vmoba_compile.report(fast)
    assert (site.grid, site.evidence) == ((4, 3, 5), "conv3d patch, before a graph break")


def test_explain_sees_it_too():
    (site,) = vmoba_compile.explain(Broken(), video(), config=SPARSE)
    assert site.rewritten and site.grid == (2, 3, 4)


def test_over_two_breaks():
    class Model(Broken):
        def forward(self, x):
            x = self.between(self.tokens(x) + 1)
            return dense(*self.split(self.between(x * 2)))

    model, x = Model(), video()
    fast = optimized(model, EVERYTHING)
    torch.testing.assert_close(fast(x), model(x), atol=1e-5, rtol=1e-5)
    assert verdicts(vmoba_compile.report(fast)) == ["rewritten"]


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_another_grid_of_as_many_tokens(inner):
    """The graph behind the break is the same for both; what it makes of its input is not."""
    model = Broken()
    fast = optimized(model, inner=inner)
    for grid in [(4, 3, 5), (3, 4, 5), (4, 3, 5), (5, 4, 3)]:
        x = video(*grid)
        out = fast(x)
        torch.testing.assert_close(out, sparse(model, x, grid), atol=1e-5, rtol=1e-5)
        assert [site.grid for site in vmoba_compile.report(fast)] == [grid]
        out.sum().backward()


def test_another_size_with_symbols():
    model = Broken()
    fast = optimized(model, EVERYTHING, dynamic=True)
    for grid in [(4, 3, 5), (3, 4, 5), (2, 3, 4)]:
        x = video(*grid)
        torch.testing.assert_close(fast(x), model(x), atol=1e-5, rtol=1e-5)


ORDER = torch.randperm(24, generator=torch.Generator().manual_seed(0))


def permuted(x):
    return x[:, ORDER]


def permuted_in_place(x):
    return x.copy_(x[:, ORDER].clone())


@pytest.mark.parametrize("between", [permuted, permuted_in_place])
@torch.no_grad()
def test_what_happens_between_is_not_known(between):
    model, x = Broken(between), video()
    fast = optimized(model, EVERYTHING)
    torch.testing.assert_close(fast(x), model(x), atol=1e-5, rtol=1e-5)
    assert verdicts(vmoba_compile.report(fast)) == ["no_grid"]


@torch.no_grad()
def test_written_to_once_in_a_while():
    """The first call leaves the tokens alone, the second one permutes them: the graph behind the break is the same."""
    change = False
    model = Broken(lambda x: permuted_in_place(x) if change else x)
    fast, x = optimized(model), video()
    fast(x)
    assert verdicts(vmoba_compile.report(fast)) == ["rewritten"]
    change = True
    torch.testing.assert_close(fast(x), model(x), atol=1e-5, rtol=1e-5)
    assert verdicts(vmoba_compile.report(fast)) == ["no_grid"]


def test_lost_order_stays_lost():
    """A grid given by the user does not overrule what is known before the break."""
    model, x = Broken(order=lambda x: raster_tokens(x)[:, ORDER]), video()
    fast = optimized(model, EVERYTHING, grid=(2, 3, 4))
    torch.testing.assert_close(fast(x), model(x), atol=1e-5, rtol=1e-5)
    assert verdicts(vmoba_compile.report(fast)) == ["not_raster"]


def test_inference_mode_counts_no_writes():
    model, x = Broken(), video()
    fast = optimized(model, EVERYTHING)
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), model(x), atol=1e-5, rtol=1e-5)
    assert verdicts(vmoba_compile.report(fast)) == ["no_grid"]


@torch.no_grad()
def test_outputs_that_come_back_are_new_inputs():
    """A sampler feeds the model with what it returned."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = VideoAttention()
            self.back = nn.ConvTranspose3d(16, 3, (1, 2, 2), stride=(1, 2, 2))

        def forward(self, x):
            grid = self.inner.patch(x)
            out = self.inner(x).transpose(1, 2).flatten(2).transpose(1, 2)
            return self.back(grid + out.view_as(grid))

    model, x = Model(), video()
    fast = optimized(model, EVERYTHING)
    found, wanted = x, x
    for _ in range(3):
        found, wanted = fast(found), model(wanted)
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert verdicts(vmoba_compile.report(fast)) == ["rewritten"]
    assert fast._vmoba.made.rewriter.graphs == 1


class Two(Broken):
    """Two results of the first graph, or of two runs of it; ``between`` runs on both."""

    def __init__(self, parts, between=lambda *x: x):
        super().__init__()
        self.parts = parts
        self.between = torch.compiler.disable(between)

    def forward(self, *inputs):
        first, second = self.between(*self.parts(self, *inputs))
        (q, _, _), (_, k, v) = self.split(first), self.split(second)
        return dense(q, k, v)


def embedded(self, x):
    return raster_tokens(self.patch(x))


@torch.compiler.disable(recursive=False)
def each(self, *inputs):
    return [self.embed(x) for x in inputs]


class Runs(Two):
    def __init__(self):
        super().__init__(each)

    def embed(self, x):
        return raster_tokens(self.patch(x))


@torch.no_grad()
def test_one_graph_that_ran_on_two_videos():
    model, videos = Runs(), (video(), video())
    fast = optimized(model, EVERYTHING)
    torch.testing.assert_close(fast(*videos), model(*videos), atol=1e-5, rtol=1e-5)
    assert "rewritten" not in verdicts(vmoba_compile.report(fast))


SAMPLES = {
    "flipped": lambda self, x: (x := embedded(self, x), x.flip(0)),
    "halves": lambda self, x: (x := embedded(self, x), x)[1].clone().chunk(2),
}


@pytest.mark.parametrize("parts", SAMPLES.values(), ids=SAMPLES.keys())
@torch.no_grad()
def test_samples_after_a_break(parts):
    model, x = Two(parts), video()
    fast = optimized(model, EVERYTHING)
    torch.testing.assert_close(fast(x), model(x), atol=1e-5, rtol=1e-5)
    assert "rewritten" not in verdicts(vmoba_compile.report(fast))


def write_to_the_second(first, second):
    second.copy_(second.clone().flip(1))
    return first, first


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
@torch.no_grad()
def test_results_that_share_memory(inner):
    """What is written to one of them is not counted for the other by every compiler."""
    model, x = (
        Two(lambda self, x: (x := embedded(self, x).contiguous(), x.view(2, 24, 16)), write_to_the_second),
        video(),
    )
    fast = optimized(model, EVERYTHING, inner=inner)
    torch.testing.assert_close(fast(x), model(x), atol=1e-5, rtol=1e-5)
    assert verdicts(vmoba_compile.report(fast)) == ["no_grid"]
