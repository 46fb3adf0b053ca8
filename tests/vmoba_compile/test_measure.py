"""What ``measure`` reports, against the oracle and a plain softmax on the values that reach each attention."""

from __future__ import annotations

import dataclasses
import sys

import models
import oracle
import pytest
import torch
import training
from vmoba_compile.kernels.partition import Geometry
from vmoba_compile.passes import Reason, Report, RewriteError, Site

import vmoba_compile
from vmoba_compile import VMoBAConfig, kernels
from vmoba_compile.measure import Call, kept_mass, matched, measure

MODULE = sys.modules["vmoba_compile.measure"]  # whose name in the package is the function's

pytestmark = pytest.mark.usefixtures("fresh")


@dataclasses.dataclass
class Truth:
    """One attention as the oracle has it: density and mass per head, the selection of the first sample, FLOPs."""

    density: list[float]
    mass: list[float]
    selected: torch.Tensor  # bool [H, N, C]
    flops: int


@pytest.fixture
def truths(monkeypatch):
    """Of every attention that the oracle computes for a twin, in order; ``truths.rule`` is added to its selection."""
    found = _Truths()
    plain = oracle.attention

    def attention(q, k, v, grid, block, *, prefix=0, suffix=0, key_mask=None, scale=None, **selection):
        layout = {"prefix": prefix, "suffix": suffix, "key_mask": key_mask}
        selected = oracle.select(q, k, grid, block, **layout, **selection | found.rule)
        found.append(truth(q, k, selected, grid, block, **layout))
        return plain(q, k, v, grid, block, **layout, scale=scale, **selection | found.rule)

    monkeypatch.setattr(oracle, "attention", attention)
    return found


class _Truths(list):
    def __init__(self) -> None:
        self.rule: dict[str, object] = {}


def truth(q, k, selected, grid, block, *, prefix=0, suffix=0, key_mask=None) -> Truth:
    video = slice(prefix, q.shape[2] - suffix)
    kept = oracle.allowed(selected, grid, block, prefix=prefix, suffix=suffix)
    keys = k.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q.double() @ keys.mT * q.shape[-1] ** -0.5
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None], -torch.inf)
    mass = (scores.softmax(-1) * kept)[:, :, video].sum(-1).mean((0, 2))
    density = kept[:, :, video, video].double().mean((0, 2, 3))
    gate = 2 * q.shape[0] * q.shape[1] * selected.shape[2] * selected.shape[3] * q.shape[3]
    return Truth(density.tolist(), mass.tolist(), selected[0], gate + int(kept.sum()) * 4 * q.shape[3])


def agree(report, truths, query=None):
    assert len(report.rewritten) == len(truths)
    for site, right in zip(report.rewritten, truths, strict=True):
        assert site.density == pytest.approx(right.density, abs=1e-6)
        assert site.mass == pytest.approx(right.mass, abs=1e-5)
        assert site.sparse_flops == right.flops
        _, rows, columns = site.grid
        frame, row, column = site.picture.query
        assert query in (None, site.picture.query)
        boxes = right.selected[:, (frame * rows + row) * columns + column]
        assert site.picture.boxes == tuple(tuple(x.nonzero().flatten().tolist()) for x in boxes)


@pytest.mark.parametrize("name", ["wan", "hunyuanvideo"])
def test_of_real_models(name, truths):
    """Hunyuan has condition tokens after the video, of which a mask removes some."""
    model, inputs = models.build(name, batch=2 if name == "wan" else 1)
    model.eval()
    report = measure(model, config=models.CONFIG, **inputs)
    with torch.no_grad():
        models.with_oracle(name, model)(**inputs)
    agree(report, truths)
    assert all(0.2 < share < 0.8 for site in report.rewritten for share in site.density)
    assert any(site.density[0] != site.density[1] for site in report.rewritten)  # heads are told apart
    # the rest is what explain says
    plain = dict(density=None, mass=None, sparse_flops=None, picture=None)
    torch._dynamo.reset()
    explained = vmoba_compile.explain(model, config=models.CONFIG, **inputs)
    assert [dataclasses.replace(site, **plain) for site in report] == explained.sites
    assert Report.from_json(report.to_json()).sites == report.sites


def test_tiles_of_queries_with_a_chosen_picture(truths):
    truths.rule = {"tile": 128}
    model, video = training.build(), training.clip(2, (2, 10, 18))
    config = VMoBAConfig(
        min_tokens=0, threshold=0.3, granularity="tile", blocks={"1d": (1, None, None), "2d": (None, 5, 9)}
    )
    report = measure(model, video, config=config, picture=(1, 9, 2), queries=10_000)
    twin = training.with_oracle(model, (2, 10, 18))
    for block, size in zip(twin.blocks, ((1, 10, 18), (2, 5, 9)), strict=True):
        block.attend.keywords["block"] = size
    with torch.no_grad():
        twin(video)
    for found in truths:  # the gate has a product for every tile instead
        found.flops = None
    report.sites = [dataclasses.replace(site, sparse_flops=None) for site in report]
    agree(report, truths, query=(1, 9, 2))
    assert report.sites[0].picture.grid == (2, 10, 18) and report.sites[1].picture.block == (2, 5, 9)


def test_an_optimized_model_brings_its_configuration(truths):
    model, video = training.build(), training.clip()
    fast = training.optimize(model, "eager")
    with torch.no_grad():
        before = fast(video)
    report = measure(fast, video)
    with torch.no_grad():
        training.with_oracle(model)(video)
        assert torch.equal(fast(video), before)
    agree(report, truths, query=(2, 2, 2))
    assert all(site.density is None for site in vmoba_compile.report(fast))
    other = measure(fast, video, config=dataclasses.replace(training.CONFIG, threshold=1.0))
    assert all(site.density == (1, 1) and site.mass == pytest.approx((1, 1)) for site in other)


def test_under_checkpointing(truths):
    """The attention then lies in graphs that the graph calls."""
    model, video = training.build().train(), training.clip()
    model.around = lambda block, x: torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
    report = measure(model, video, config=training.CONFIG)
    model.around = None
    with torch.no_grad():
        training.with_oracle(model)(video)
    agree(report, truths)


class Broken(training.VideoModel):
    """A graph for each of two blocks."""

    def forward(self, video):
        grid = self.patch(video)
        x = self.blocks[0](grid.flatten(2).transpose(1, 2))
        torch._dynamo.graph_break()
        x = self.blocks[1](x)
        return self.unpatch(x.transpose(1, 2).unflatten(2, grid.shape[2:]))


def test_over_a_graph_break(truths):
    model, video = Broken(), training.clip()
    report = measure(model, video, config=training.CONFIG)
    with torch.no_grad():
        training.with_oracle(model)(video)
    assert [site.layer for site in report] == [0, 1]
    agree(report, truths)


def call_of(heads=4, groups=2, dtype=torch.float32, **options) -> tuple[Call, Truth]:
    """With fewer key heads than heads, condition tokens on both sides, and keys that are masked."""
    grid, block, prefix, suffix = (3, 5, 4), (2, 2, 3), 3, 2
    tokens = prefix + 60 + suffix
    q = torch.randn(2, heads, tokens, 8, dtype=dtype) * 2
    k, v = torch.randn(2, 2, heads // groups, tokens, 8, dtype=dtype)
    key_mask = torch.rand(2, tokens) < 0.8
    layout = {"prefix": prefix, "suffix": suffix, "key_mask": key_mask}
    chosen = kernels.select(q, k, grid, block=block, threshold=0.3, **layout)
    right = truth(q, k, chosen.mask(), grid, block, **layout)
    return Call(q, k, v, chosen.words, key_mask, Geometry(grid, block, prefix, suffix), {"scale": 8**-0.5}, {}), right


@pytest.mark.parametrize("scores", [2**24, 200])  # in one chunk, and three queries at a time
def test_mass_with_grouped_heads_and_masked_keys(monkeypatch, scores):
    monkeypatch.setattr(MODULE, "CHUNK_SCORES", scores)
    call, right = call_of()
    assert kept_mass(call, 60) == pytest.approx(right.mass, abs=1e-6)
    assert kept_mass(call, 10**6) == kept_mass(call, 60)


def test_mass_over_some_queries():
    """Evenly spaced, first and last among them."""
    call, _ = call_of()
    some = torch.tensor([0, 20, 39, 59]) + 3
    keys = call.k.double().repeat_interleave(2, dim=1)
    scores = (call.q.double() @ keys.mT * 8**-0.5).masked_fill(~call.key_mask[:, None, None], -torch.inf)
    mask = kernels.Selection(call.selected, call.geometry).mask()
    kept = oracle.allowed(mask, (3, 5, 4), (2, 2, 3), prefix=3, suffix=2)
    wanted = (scores.softmax(-1) * kept)[:, :, some].sum(-1).mean((0, 2))
    assert kept_mass(call, 4) == pytest.approx(wanted.tolist(), abs=1e-6)


def test_queries_without_a_key_do_not_count():
    call, _ = call_of()
    call.key_mask[1] = False
    alone = Call(
        *(x[:1] for x in (call.q, call.k, call.v, call.selected, call.key_mask)), call.geometry, call.options, {}
    )
    assert kept_mass(call, 60) == pytest.approx(kept_mass(alone, 60))


def test_in_float32_under_autocast(truths, monkeypatch):
    seen = []

    def mass(call, queries):
        seen.append((torch.is_autocast_enabled("cpu"), call.q.dtype))
        return kept_mass(call, queries)

    monkeypatch.setattr(MODULE, "kept_mass", mass)
    with torch.autocast("cpu", torch.bfloat16):
        measure(training.build(), training.clip(), config=training.CONFIG)
    assert seen == [(False, torch.bfloat16)] * 2


def test_time():
    report = measure(training.build(), training.clip(), config=training.CONFIG, time=True)
    assert all(0 < site.dense_ms < 1e4 and 0 < site.sparse_ms < 1e4 for site in report)
    assert all(site.dense_ms is None for site in measure(training.build(), training.clip(), config=training.CONFIG))


@pytest.mark.gpu
def test_on_a_gpu():
    """As on a CPU, but for entries at the cut-off that fall to the other side; times are those of the kernels."""
    model, video = training.build(), training.clip(2)
    right = measure(model, video, config=training.CONFIG)
    torch._dynamo.reset()
    found = measure(model.cuda(), video.cuda(), config=training.CONFIG, time=True)
    for site, other in zip(found, right, strict=True):
        assert site.density == pytest.approx(other.density, abs=0.01) and site.mass == pytest.approx(
            other.mass, abs=0.01
        )
        assert 0 < site.dense_ms < 1e3 and 0 < site.sparse_ms < 1e3


def test_mode_and_gradients_are_left_alone():
    model = training.build().train()
    seen = []
    model.blocks[0].register_forward_hook(lambda block, _, out: seen.append((block.training, out.requires_grad)))
    measure(model, training.clip(), config=training.CONFIG)
    assert (True, False) in seen and model.training and all(p.grad is None for p in model.parameters())


def test_nothing_rewritten_is_told():
    with pytest.warns(UserWarning, match=r"measured nothing in VideoModel: 0 of 2 .*too_few_tokens"):
        report = measure(training.build(), training.clip(), config={"min_tokens": 10**6})
    assert all(site.density is None for site in report)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"queries": 0}, ValueError, "queries must be at least 1, not 0"),
        ({"queries": 2.5}, TypeError, "queries must be an integer, not float"),
        ({"picture": (1, 2)}, ValueError, r"picture must be three integers \(frame, row, column\), not \(1, 2\)"),
        ({"picture": (1, 2, 0.5)}, TypeError, "picture must hold integers, not float"),
        ({"picture": (0, 0, -1)}, ValueError, "counts frame, row and column from 0"),
        ({"picture": (4, 0, 0)}, ValueError, r"picture=\(4, 0, 0\) lies outside the grid \(4, 4, 4\) of blocks.0"),
        ({"grid": (3, 3, 3)}, vmoba_compile.GridError, "3"),
    ],
)
def test_wrong_arguments(wrong, error, message):
    with pytest.raises(error, match=message):
        measure(training.build(), training.clip(), config=training.CONFIG, **wrong)


def test_wrong_models():
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, not function"):
        measure(lambda x: x, training.clip())
    with pytest.raises(ValueError, match="the meta device cannot; use a CPU or a GPU, or explain"):
        measure(training.build().to("meta"), training.clip().to("meta"))
    with pytest.raises(vmoba_compile.InputError, match="VideoModel itself rejects these inputs"):
        measure(training.build(), torch.randn(1, 4, 4, 8, 8), config=training.CONFIG)


def test_sites_are_matched_by_module():
    def node(path):
        made = torch.fx.Graph().placeholder("x")
        made.meta["nn_module_stack"] = {"": (path, None)}
        return made

    sites = [
        Site(path, reason, "", "", "")
        for path, reason in (
            ("a", Reason.REWRITTEN),
            ("a", Reason.MASK),
            ("b", Reason.REWRITTEN),
            ("a", Reason.REWRITTEN),
        )
    ]
    assert matched([node("b"), node("a"), node("a")], sites) == [2, 0, 3]
    assert matched([node("x"), node("y"), node("z")], sites) == [0, 2, 3]  # paths that say nothing: in order
    with pytest.raises(RewriteError, match="1 sparse attentions were found in a graph for which 3 were reported"):
        matched([node("a")], sites)
