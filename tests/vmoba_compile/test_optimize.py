"""The wrapper behaves as ``torch.compile``'s does, switches between two graphs, and says what it did."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
import warnings

import models
import pytest
import torch
from torch import nn

import vmoba_compile
from vmoba_compile import CoverageError, Report, VMoBAConfig


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


@pytest.fixture
def wan():
    model, inputs = models.build("wan", batch=1)
    return model.eval(), inputs


def optimize(model, config=models.CONFIG, **kwargs):
    return vmoba_compile.optimize(model, config, inner="eager", **kwargs)


class TestModule:
    def test_attributes_and_mode(self, wan):
        model, _ = wan
        fast = optimize(model)
        assert fast.config.num_layers == 3 and fast.blocks is model.blocks
        assert isinstance(fast, torch._dynamo.OptimizedModule)
        assert fast.state_dict().keys() == torch.compile(model).state_dict().keys()
        fast.train()
        assert model.training and fast.training
        fast.eval()
        assert not model.training
        assert [id(p) for p in fast.parameters()] == [id(p) for p in model.parameters()]

    def test_load_state_dict_changes_the_result(self, wan):
        model, inputs = wan
        fast = optimize(model)
        with torch.no_grad():
            before = fast(**inputs).sample
            fast.load_state_dict({key: torch.zeros_like(value) for key, value in fast.state_dict().items()})
            assert before.abs().sum() > 0 and fast(**inputs).sample.abs().sum() == 0

    def test_pickle(self, wan):
        model, inputs = wan
        fast = optimize(model)
        buffer = io.BytesIO()
        torch.save(fast, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
        with torch.no_grad():
            assert torch.equal(loaded(**inputs).sample, fast(**inputs).sample)
        assert vmoba_compile.report(loaded).counts == vmoba_compile.report(fast).counts

    def test_model_is_not_changed(self, wan):
        model, inputs = wan
        with torch.no_grad():
            before = model(**inputs).sample
            optimize(model)(**inputs)
            assert torch.equal(model(**inputs).sample, before)

    def test_device_and_dtype_moves(self, wan):
        model, inputs = wan
        fast = optimize(model)
        with torch.no_grad():
            fast(**inputs)
            fast.to(torch.bfloat16)
            low = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
            assert fast(**low).sample.dtype == torch.bfloat16
        assert len(vmoba_compile.report(fast).rewritten) == 3


class TestSwitch:
    def test_dense_is_the_model_itself(self, wan):
        model, inputs = wan
        fast = optimize(model)
        with torch.no_grad():
            sparse = fast(**inputs).sample
            with fast.dense():
                assert torch.equal(fast(**inputs).sample, model(**inputs).sample)
            assert torch.equal(fast(**inputs).sample, sparse)

    def test_switching_compiles_each_graph_once(self, wan):
        model, inputs = wan
        graphs = []

        def inner(gm, example_inputs):
            graphs.append(sum("vmoba" in str(node.target) for node in gm.graph.nodes))
            return gm.forward

        fast = vmoba_compile.optimize(model, models.CONFIG, inner=inner)
        with torch.no_grad():
            for _ in fast.schedule(8, dense_steps=3):
                fast(**inputs)
            for _ in fast.schedule(6):
                fast(**inputs)
        assert graphs == [0, 6], "one dense graph, and one with select and attention in three layers"

    def test_dense_nests_and_survives_errors(self, wan):
        fast = optimize(wan[0])
        with pytest.raises(KeyError), fast.dense():
            with fast.dense():
                pass
            assert fast._vmoba.dense
            raise KeyError
        assert not fast._vmoba.dense


class TestTorchCompile:
    def test_backend_by_name(self, wan):
        model, inputs = wan
        report = Report()
        options = {"threshold": 0.3, "min_tokens": 0, "blocks": dict(models.CONFIG.blocks), "inner": "eager"}
        compiled = torch.compile(model, backend="vmoba", options=options | {"report": report})
        with torch.no_grad():
            assert torch.equal(compiled(**inputs).sample, optimize(model)(**inputs).sample)
        assert len(report.rewritten) == 3
        assert vmoba_compile.report(compiled) is report

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"treshold": 0.3}, "unknown option 'treshold'"),
            ({"threshold": -1.0}, "threshold must be greater than 0"),
            ({"config": VMoBAConfig(), "threshold": 0.5}, "either config or its fields"),
            ({"min_tokens": 0, "inner": "eager", "expect": 4}, "expect=4, but 3 attentions were rewritten"),
            ({"inner": "nothing"}, "inner must be a callable or one of"),
        ],
        ids=["unknown", "range", "both", "expect", "inner"],
    )
    def test_wrong_options(self, wan, options, message):
        model, inputs = wan
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=message), torch.no_grad():
            torch.compile(model, backend="vmoba", options=options)(**inputs)

    def test_no_report(self, wan):
        with pytest.raises(TypeError, match=r"no report: pass a model from vmoba_compile\.optimize"):
            vmoba_compile.report(torch.compile(wan[0]))
        with pytest.raises(TypeError, match="no report"):
            vmoba_compile.report(wan[0])


class TestCoverage:
    def test_strict_and_expect_are_met(self, wan):
        model, inputs = wan
        with torch.no_grad():
            optimize(model, strict=True, expect=3)(**inputs)

    def test_expect_too_many(self, wan):
        model, inputs = wan
        fast = optimize(model, expect=4)
        for _ in range(2):  # at the second call too, which compiles nothing
            with pytest.raises(CoverageError, match="expect=4, but 3 attentions were rewritten"), torch.no_grad():
                fast(**inputs)

    def test_strict_names_the_site_and_the_cause(self, wan):
        model, inputs = wan
        config = VMoBAConfig(min_tokens=100_000)
        with pytest.raises(CoverageError, match=r"blocks\.0\.attn1: too_few_tokens: 192 tokens"), torch.no_grad():
            optimize(model, config, strict=True)(**inputs)

    def test_nothing_rewritten_warns(self, wan):
        model, inputs = wan
        with pytest.warns(UserWarning, match=r"left WanTransformer3DModel dense: 0 of 6 .* 3 too_few_tokens"):
            optimize(model, VMoBAConfig(min_tokens=100_000))(**inputs)

    def test_no_warning_where_something_was_rewritten(self, wan):
        model, inputs = wan
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="vmoba_compile")
            fast = optimize(model)
            fast(**inputs)
        assert len(vmoba_compile.report(fast).rewritten) == 3

    def test_dense_layers(self, wan):
        model, inputs = wan
        config = VMoBAConfig.from_dict(models.CONFIG.to_dict() | {"dense_layers": [1]})
        fast = optimize(model, config)
        with torch.no_grad():
            fast(**inputs)
        video = [site for site in vmoba_compile.report(fast) if site.path.endswith("attn1")]
        assert [site.reason.value for site in video] == ["rewritten", "dense_layer", "rewritten"]
        assert [site.scheme for site in video] == ["1d", None, "3d"]


def test_several_resolutions(wan):
    """Each size is compiled and accounted for by itself; the layers keep their numbers."""
    model, inputs = wan
    fast = optimize(model, dynamic=False)
    with torch.no_grad():
        for size in (12, 16):
            fast(**inputs | {"hidden_states": torch.randn(1, 4, 4, size, size)})
            sites = vmoba_compile.report(fast).rewritten
            assert [site.layer for site in sites] == [0, 1, 2]
            assert {site.grid for site in sites} == {(4, size // 2, size // 2)}


@pytest.mark.parametrize("dynamic", [True, None])
def test_dynamic_shapes(wan, dynamic):
    """At most two graphs serve five sizes, with the numbers of each size's own graph; None is Dynamo's own choice."""
    model, inputs = wan
    fast = optimize(model, dynamic=dynamic)
    sizes = [(4, 12, 16), (3, 16, 12), (6, 8, 20), (5, 10, 14), (7, 18, 8)]
    with torch.no_grad():
        for frames, height, width in sizes:
            latent = torch.randn(1, 4, frames, height, width)
            got = fast(**inputs | {"hidden_states": latent}).sample
            alone = optimize(model, dynamic=False)(**inputs | {"hidden_states": latent}).sample
            assert models.relative(got, alone) < 1e-5
    assert fast._vmoba.made.rewriter.graphs <= 2
    sites = vmoba_compile.report(fast).rewritten
    assert len(sites) == 3 and all(isinstance(extent, str) for extent in sites[0].grid)


class PlainVideoModel(nn.Module):
    """A model of one's own: conv3d patches, text in front, attention over both."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.patch = nn.Conv3d(3, 16, (1, 2, 2), (1, 2, 2))
        self.qkv = nn.Linear(16, 48)
        self.causal = causal

    def forward(self, video, text):
        tokens = torch.cat([text, self.patch(video).flatten(2).transpose(1, 2)], dim=1)
        q, k, v = self.qkv(tokens).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return out.transpose(1, 2).flatten(2)


def test_own_model_with_text_in_front():
    video, text = torch.randn(1, 3, 4, 8, 8), torch.randn(1, 5, 16)
    fast = optimize(PlainVideoModel(), fullgraph=True)
    fast(video, text)
    (site,) = vmoba_compile.report(fast)
    assert (site.reason.value, site.grid, site.prefix, site.suffix) == ("rewritten", (4, 4, 4), 5, 0)


class Blocks(nn.Module):
    """Three attention layers, and what happens between them."""

    def __init__(self, between=lambda: None) -> None:
        super().__init__()
        self.patch = nn.Conv3d(3, 16, (1, 2, 2), (1, 2, 2))
        self.layers = nn.ModuleList(nn.Linear(16, 48) for _ in range(3))
        self.between = between

    def forward(self, video):
        x = self.patch(video).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = x + self.attend(layer, x)
            self.between()
        return x

    def attend(self, layer, x):
        q, k, v = layer(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def clip(rows: int = 8, frames: int = 4) -> torch.Tensor:
    return torch.randn(1, 3, frames, 2 * rows, 16)


class TestNeverSilentlyDense:
    """Wherever Dynamo runs the model without a rewritten graph, the user is told."""

    def test_a_model_that_dynamo_leaves_alone(self):
        class Disabled(Blocks):
            @torch.compiler.disable
            def forward(self, video):
                return super().forward(video)

        with pytest.raises(CoverageError, match="no compiled graph with attention ran"):
            optimize(Disabled(), strict=True)(clip())
        with pytest.warns(UserWarning, match="left Disabled dense: no compiled graph with attention ran"):
            optimize(Disabled())(clip())

    def test_past_the_recompile_limit(self):
        fast = optimize(Blocks())
        with torch._dynamo.config.patch(recompile_limit=2):
            fast(clip(8))
            fast(clip(6))
            with pytest.warns(UserWarning, match="recompile_limit not reached"):
                fast(clip(4))

    def test_inside_another_compiled_model(self):
        class Parent(nn.Module):
            def __init__(self, child):
                super().__init__()
                self.child = child

            def forward(self, x):
                return self.child(x) * 2

        fast, video = optimize(Blocks(), expect=3), clip()
        expected = 2 * fast(video)
        assert torch.equal(torch.compile(Parent(fast), backend="eager")(video), expected)
        assert torch.equal(torch.compile(fast, backend="eager")(video) * 2, expected)

    def test_one_graph_for_several_layers(self):
        class Layer(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = nn.Linear(16, 48)

            def forward(self, x):
                return x + Blocks.attend(self, self.inner, x)

        class Broken(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = nn.ModuleList(Layer() for _ in range(3))

            def forward(self, x):
                for layer in self.layers:
                    x = layer(x)
                    print(end="")
                return x

        tokens = torch.randn(1, 4 * 8 * 8, 16)
        with pytest.warns(UserWarning, match="served 3 layers, which so share a layer number and a scheme"):
            optimize(Broken(), grid=(4, 8, 8))(tokens)
        with pytest.raises(CoverageError, match="strict=True, but one compiled graph of Broken served 3 layers"):
            optimize(Broken(), grid=(4, 8, 8), strict=True)(tokens)

    def test_each_call_is_judged_by_itself(self):
        fast = optimize(Blocks(), VMoBAConfig(min_tokens=200), expect=3)
        fast(clip(8))
        for _ in range(2):
            with pytest.raises(CoverageError, match="expect=3, but 0"):
                fast(clip(4))
            fast(clip(8))
            assert len(vmoba_compile.report(fast).rewritten) == 3, "the report tells of the graph that ran last"


_WARM = """
import json, sys, torch, vmoba_compile
from torch import nn
torch.manual_seed(0)
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch, self.qkv = nn.Conv3d(3, 32, (1, 2, 2), (1, 2, 2)), nn.Linear(32, 96)
    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        for _ in range(2):
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
            x = x + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x * float(sys.argv[1])
fast = vmoba_compile.optimize(Model(), vmoba_compile.VMoBAConfig(min_tokens=0), fullgraph=True)
with torch.no_grad():
    total = float(fast(torch.randn(1, 3, 4, 8, 12)).double().square().sum())
hits = torch._dynamo.utils.counters["inductor"]["fxgraph_cache_hit"]
print(json.dumps({"hits": hits, "total": total, "report": json.loads(vmoba_compile.report(fast).to_json())}))
"""


@models.needs_compiler
@pytest.mark.slow
def test_warm_cache_gives_the_same_report():
    """A second process finds the compiled graph in the cache, and still accounts for every site."""
    # A number that no earlier run has compiled: a cache of its own would take a minute to fill with compiled headers.
    command = [sys.executable, "-P", "-c", _WARM, str(1 + random.SystemRandom().random())]
    env = dict(os.environ, TORCHINDUCTOR_FX_GRAPH_CACHE="1")
    cold, warm = (
        json.loads(subprocess.run(command, env=env, check=True, capture_output=True).stdout) for _ in range(2)
    )
    assert cold["hits"] == 0 and warm["hits"] > 0
    assert warm["report"] == cold["report"] and len(cold["report"]["sites"]) == 2
    assert warm["total"] == cold["total"]


@pytest.mark.parametrize("regional", [False, True], ids=["whole", "regional"])
def test_graphs_are_dumped(wan, tmp_path, regional):
    model, inputs = wan
    fast = optimize(model, regional=regional, dump_dir=tmp_path / "graphs")
    with torch.no_grad():
        fast(**inputs)
    names = sorted(path.name for path in (tmp_path / "graphs").iterdir())
    assert len(names) == (6 if regional else 2) and all(name.endswith(("_before.py", "_after.py")) for name in names)
    for path in (tmp_path / "graphs").iterdir():
        assert ("vmoba.attention" in path.read_text()) == path.name.endswith("_after.py")


def test_the_backend_dumps_every_graph(wan, tmp_path):
    model, inputs = wan
    for size in (12, 16):
        torch._dynamo.reset()
        options = {"config": models.CONFIG, "inner": "eager", "dump_dir": str(tmp_path)}
        fast = torch.compile(model, backend="vmoba", options=options, dynamic=False)
        with torch.no_grad():
            fast(**inputs | {"hidden_states": torch.randn(1, 4, 4, size, size)})
    assert len(list(tmp_path.glob("*_before.py"))) == len(list(tmp_path.glob("*_after.py"))) == 2
