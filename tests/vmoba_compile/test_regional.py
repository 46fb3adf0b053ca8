"""Blocks compiled one by one: the same sites and results as the whole model, and few graphs."""

from __future__ import annotations

import copy
import functools
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor

import models
import pytest
import torch
import training
from torch import nn
from training import clip
from vmoba_compile.passes import CoverageError, GridError, Reason, RewriteError

import vmoba_compile
from vmoba_compile import VMoBAConfig

pytestmark = pytest.mark.usefixtures("fresh")

KEPT = ("path", "layer", "scheme", "grid", "prefix", "suffix", "block", "reason")


class Counted:
    """An inner compiler that counts the graphs it is given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, gm, inputs):
        self.graphs += 1
        return gm.forward


def optimize(model, inner="eager", config=models.CONFIG, **options):
    return vmoba_compile.optimize(model, config, inner=inner, regional=True, **options)


def sites(optimized):
    return [tuple(getattr(site, name) for name in KEPT) for site in vmoba_compile.report(optimized)]


# name, layers, and how many graphs the blocks make: one for each class and scheme, and one more for a first block whose
# input lies in memory otherwise than the others'
@pytest.mark.parametrize(
    ("name", "layers", "most"),
    [("wan", {"num_layers": 7}, 3), ("cogvideox", {"num_layers": 7}, 4), ("hunyuanvideo", {}, 6)],
    ids=["wan", "cogvideox", "hunyuanvideo"],
)
def test_same_as_the_whole_model(name, layers, most):
    model, inputs = models.build(name, **layers)
    counted = Counted()
    fast = optimize(model, counted, strict=True)
    with torch.no_grad():
        whole = vmoba_compile.optimize(model, models.CONFIG, inner="eager")
        expected = whole(**inputs)[0]
        assert models.relative(fast(**inputs)[0], expected) < 1e-6
        assert counted.graphs <= most
        assert sites(fast) == sites(whole)
        before = counted.graphs
        fast(**inputs)
        assert counted.graphs == before


def test_the_model_is_left_as_it_was():
    model, inputs = models.build("wan")
    with torch.no_grad():
        dense = model(**inputs)[0]
        fast = optimize(model)
        assert models.relative(fast(**inputs)[0], dense) > 1e-3
        torch.testing.assert_close(model(**inputs)[0], dense)
        assert all("_compiled_call_impl" not in module.__dict__ for module in model.modules())
        assert not any(module._forward_pre_hooks for module in model.modules())


def test_dense_and_back():
    model, inputs = models.build("wan", num_layers=4)
    counted = Counted()
    fast = optimize(model, counted)
    with torch.no_grad():
        expected = model(**inputs)[0]
        sparse = fast(**inputs)[0]
        with fast.dense():
            torch.testing.assert_close(fast(**inputs)[0], expected)
        graphs = counted.graphs
        torch.testing.assert_close(fast(**inputs)[0], sparse)
        with fast.dense():
            fast(**inputs)
    assert counted.graphs == graphs == 4


def test_sizes_in_turn():
    """Each size has a plan of its own: grids, blocks and results are those of the size."""
    model, inputs = models.build("wan")
    fast = optimize(model, strict=True)
    with torch.no_grad():
        for size in (12, 16, 12):
            given = inputs | {
                "hidden_states": torch.randn(1, 4, 4, size, size),
                "encoder_hidden_states": inputs["encoder_hidden_states"][:1],
                "timestep": inputs["timestep"][:1],
            }
            got = fast(**given)[0]
            alone = vmoba_compile.optimize(model, models.CONFIG, inner="eager")(**given)[0]
            assert models.relative(got, alone) < 1e-6
            assert {site.grid for site in vmoba_compile.report(fast).rewritten} == {(4, size // 2, size // 2)}
            assert [site.layer for site in vmoba_compile.report(fast).rewritten] == [0, 1, 2]


def test_dense_layers():
    model, inputs = models.build("wan", num_layers=5)
    config = VMoBAConfig.from_dict(models.CONFIG.to_dict() | {"dense_layers": [1, 3]})
    fast = optimize(model, config=config)
    with torch.no_grad():
        whole = vmoba_compile.optimize(model, config, inner="eager")
        assert models.relative(fast(**inputs)[0], whole(**inputs)[0]) < 1e-6
    assert sites(fast) == sites(whole)
    assert vmoba_compile.report(fast).counts["dense_layer"] == 2


def test_many_dry_runs_are_told():
    class Counted(training.VideoModel):
        def forward(self, video, step):
            return super().forward(video) * step

    fast = vmoba_compile.optimize(Counted(layers=2), training.CONFIG, inner="eager", regional=True)
    with torch.no_grad(), pytest.warns(UserWarning, match="pass what changes at every step"):
        for step in range(8):
            fast(clip(), step)


class Memo(training.VideoModel):
    """Keeps tensors of its own between calls, and counts them."""

    def __init__(self, **options):
        super().__init__(**options)
        self.memo, self.cache = {}, None

    def forward(self, video):
        if self.cache is None:
            self.cache = torch.zeros(1)
        if video.shape not in self.memo:
            self.memo[video.shape] = torch.ones(1)
        return super().forward(video * self.memo[video.shape] + self.cache)


def test_a_dry_run_leaves_nothing_in_the_model():
    model = Memo(layers=2)
    vmoba_compile.explain(model, clip())
    assert not model.memo and model.cache is None
    fast = vmoba_compile.optimize(model, training.CONFIG, inner="eager", regional=True, expect=2)
    with torch.no_grad():
        assert type(fast(clip())) is torch.Tensor
    assert [type(x) for x in (model.cache, *model.memo.values())] == [torch.Tensor] * 2
    assert not any(module._forward_pre_hooks for module in model.modules())


class Order(training.VideoModel):
    """Patches a video whose axes an attribute and an argument order."""

    axes = None

    def forward(self, video, scale=1.0):
        if self.axes is not None:
            video = video.permute(0, 1, *self.axes)
        if scale != 1.0:
            video = video.transpose(3, 4)
        return super().forward(video)


def same_as_afresh(fast, model, *inputs, layers=2):
    with torch.no_grad():
        expected = vmoba_compile.optimize(model, training.CONFIG, inner="eager", expect=layers)(*inputs)
        torch.testing.assert_close(fast(*inputs), expected)
    assert len(vmoba_compile.report(fast).rewritten) == layers


@torch._dynamo.config.patch(recompile_limit=64)  # of the models to compare with, in torch without isolate_recompiles
def test_the_plan_belongs_to_the_model_as_it_is():
    """Attributes, arguments, modules and their order may change between calls."""
    model = Order(layers=2)
    fast = vmoba_compile.optimize(model, training.CONFIG, inner="eager", regional=True, strict=True)
    video = clip(1, (4, 4, 6))
    same_as_afresh(fast, model, video)
    model.axes = (2, 4, 3)
    same_as_afresh(fast, model, video)
    model.axes = None
    same_as_afresh(fast, model, video, 2.0)
    model.patch = nn.Conv3d(3, 16, (2, 2, 1), (2, 2, 1))
    model.unpatch = nn.ConvTranspose3d(16, 3, (2, 2, 1), (2, 2, 1))
    same_as_afresh(fast, model, video)
    model.blocks.append(training.Block(16, 2, 0.0))
    same_as_afresh(fast, model, video, layers=3)
    model.blocks = nn.ModuleList(reversed(model.blocks))
    same_as_afresh(fast, model, video, layers=3)


def test_strict_judges_every_graph():
    model = training.build(layers=3)
    fast = vmoba_compile.optimize(model, training.CONFIG, inner="eager", regional=True, strict=True)
    with torch.no_grad():
        fast(clip())
        for block in model.blocks:
            block.attend = functools.partial(nn.functional.scaled_dot_product_attention, is_causal=True)
        with pytest.raises(CoverageError, match="causal"):
            fast(clip())


def test_hooks_on_blocks_come_after_what_is_told():
    """A hook of the model's own that reorders tokens is part of the block's graph."""
    model = training.build(layers=2)

    def swap(module, args):
        return (args[0].unflatten(1, (4, 4, 4)).transpose(1, 3).flatten(1, 3),)

    model.blocks[1].register_forward_pre_hook(swap)
    fast = vmoba_compile.optimize(model, training.CONFIG, inner="eager", regional=True)
    whole = vmoba_compile.optimize(model, training.CONFIG, inner="eager")
    with torch.no_grad():
        torch.testing.assert_close(fast(clip()).shape, clip().shape)
        video = clip()
        torch.testing.assert_close(fast(video), whole(video))
    assert sites(fast) == sites(whole)


def test_threads():
    model = training.build(layers=2)
    fast = vmoba_compile.optimize(model, training.CONFIG, inner="eager", regional=True, expect=2)
    videos = [clip(1, (4, 4, 4)), clip(1, (3, 4, 6))]
    with torch.no_grad():
        expected = [fast(video) for video in videos]

    def run(place):
        with torch.no_grad():
            return [float((fast(videos[place]) - expected[place]).abs().max()) for _ in range(10)]

    with ThreadPoolExecutor(2) as pool:
        errors = [error for result in pool.map(run, [0, 1]) for error in result]
    assert max(errors) < 1e-5


def test_a_copy_keeps_its_mode():
    fast = vmoba_compile.optimize(training.build(), training.CONFIG, inner="eager")
    fast.set_dense(True)
    assert copy.deepcopy(fast).is_dense() and pickle.loads(pickle.dumps(fast)).is_dense()


def test_compiled_parts_are_refused():
    inner = vmoba_compile.optimize(training.build(), training.CONFIG, inner="eager")
    with pytest.raises(TypeError, match="0 is compiled already"):
        vmoba_compile.optimize(nn.Sequential(inner), training.CONFIG, inner="eager")


def test_state_pickle_and_copy():
    model = training.build(layers=2)
    fast = vmoba_compile.optimize(model, training.CONFIG, inner="eager", regional=True)
    video = clip()
    expected = fast(video)
    assert fast.state_dict().keys() == {f"_orig_mod.{name}" for name in model.state_dict()}
    for twin in (pickle.loads(pickle.dumps(fast)), copy.deepcopy(fast)):
        torch.testing.assert_close(twin(video), expected)
        assert len(vmoba_compile.report(twin).rewritten) == 2


def test_inference_mode():
    model = training.build(layers=2)
    fast = vmoba_compile.optimize(model, training.CONFIG, inner="eager", regional=True, expect=2)
    with torch.inference_mode():
        torch.testing.assert_close(fast(clip()).shape, clip().shape)


class Rolled(training.VideoModel):
    """Calls its first block again on the same tokens in another order."""

    def forward(self, video):
        grid = self.patch(video)
        x = self.blocks[0](grid.flatten(2).transpose(1, 2))
        x = self.blocks[0](x.roll(1, 1))
        x = self.blocks[1](x.roll(-1, 1))
        return self.unpatch(x.transpose(1, 2).unflatten(2, grid.shape[2:]))


def test_a_block_whose_calls_differ_is_dense():
    torch.manual_seed(0)
    model = Rolled(layers=2)
    fast = vmoba_compile.optimize(model, training.CONFIG, inner="eager", regional=True)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(fast(clip()).shape, clip().shape)
        found = [site for site in vmoba_compile.report(fast) if site.path.startswith("blocks.0")]
        assert found and not any(site.rewritten for site in found)


class Turned(training.VideoModel):
    """Patches a video that a flag turns: the same count of tokens on another grid."""

    def forward(self, video, turned=False):
        return super().forward(video.transpose(3, 4) if turned else video)


def test_the_plan_belongs_to_the_arguments():
    model = Turned(layers=2)
    fast = vmoba_compile.optimize(model, training.CONFIG, inner="eager", regional=True, expect=2)
    video = clip(1, (4, 4, 6))
    with torch.no_grad():
        for turned, grid in ((False, (4, 4, 6)), (True, (4, 6, 4)), (False, (4, 4, 6))):
            alone = vmoba_compile.optimize(model, training.CONFIG, inner="eager", expect=2)(video, turned=turned)
            torch.testing.assert_close(fast(video, turned=turned), alone)
            assert {site.grid for site in vmoba_compile.report(fast)} == {grid}


class Beside(training.VideoModel):
    """A block of its own after the list of blocks."""

    def __init__(self, **options):
        super().__init__(**options)
        self.last = training.Block(16, 2, 0.0)

    def forward(self, video):
        grid = self.patch(video)
        x = grid.flatten(2).transpose(1, 2)
        for block in (*self.blocks, self.last):
            x = block(x)
        return self.unpatch(x.transpose(1, 2).unflatten(2, grid.shape[2:]))


class Nest(training.Block):
    """A block of which a part is of the same class."""

    def __init__(self, *args):
        super().__init__(*args)
        self.inner = training.Block(*args)

    def forward(self, x):
        return self.inner(super().forward(x))


class Nested(training.VideoModel):
    _repeated_blocks = ("Block", "Nest")

    def __init__(self, **options):
        super().__init__(**options)
        self.blocks = nn.ModuleList(Nest(16, 2, 0.0) for _ in range(2))


def test_blocks_within_blocks():
    """The outer ones are compiled; each has two attentions of layers in turn."""
    model = Nested()
    fast = vmoba_compile.optimize(model, training.CONFIG, inner="eager", regional=True, expect=4)
    video = clip()
    with torch.no_grad():
        whole = vmoba_compile.optimize(model, training.CONFIG, inner="eager", expect=4)
        torch.testing.assert_close(fast(video), whole(video))
    assert sites(fast) == sites(whole)


def test_what_lies_outside_the_blocks_is_reported():
    fast = vmoba_compile.optimize(Beside(), training.CONFIG, inner="eager", regional=True)
    with torch.no_grad():
        fast(clip())
    outside = vmoba_compile.report(fast).sites[-1]
    assert (outside.path, outside.reason, outside.layer) == ("last", Reason.NOT_COMPILED, None)
    assert "outside the repeated blocks" in outside.detail
    strict = vmoba_compile.optimize(Beside(), training.CONFIG, inner="eager", regional=True, strict=True)
    with torch.no_grad(), pytest.raises(CoverageError, match="last: not_compiled"):
        strict(clip())


def test_a_wrong_grid_is_refused():
    fast = vmoba_compile.optimize(training.build(), training.CONFIG, inner="eager", regional=True, grid=(3, 3, 3))
    with torch.no_grad(), pytest.raises(GridError):
        fast(clip())


def test_the_recompile_limit_is_told():
    """Past Dynamo's limit blocks run eagerly, that is dense: never without a word."""
    model = training.build(layers=1)
    model.blocks.append(training.Block(16, 2, 0.0))
    fast = vmoba_compile.optimize(model, training.CONFIG, inner="eager", regional=True)
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=2), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for frames in range(2, 6):
            fast(clip(1, (frames, 4, 4)))
    assert any("recompile_limit" in str(warning.message) and "left" in str(warning.message) for warning in caught)
    assert {site.reason for site in vmoba_compile.report(fast)} == {Reason.NOT_COMPILED}


def test_under_another_compile():
    model = training.build(layers=2)
    fast = vmoba_compile.optimize(model, training.CONFIG, inner="eager", regional=True, expect=2)
    around = nn.Sequential(fast, nn.Identity())
    video = clip()
    with torch.no_grad():
        expected = vmoba_compile.optimize(model, training.CONFIG, inner="eager", expect=2)(video)
        torch.testing.assert_close(torch.compile(around, backend="eager")(video), expected)


@pytest.mark.parametrize("regional", [False, True], ids=["whole", "regional"])
def test_lora(regional):
    """Adapters added after the first call, switched off and on: the numbers of a model optimized afresh."""
    peft = pytest.importorskip("peft")
    model, inputs = models.build("wan")
    counted = Counted()
    fast = vmoba_compile.optimize(model, models.CONFIG, inner=counted, regional=regional, expect=3)
    with torch.no_grad():
        plain = fast(**inputs)[0]
        fast.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
        adapted = fast(**inputs)[0]
        assert models.relative(adapted, plain) > 1e-2
        alone = vmoba_compile.optimize(model, models.CONFIG, inner="eager", expect=3)(**inputs)[0]
        assert models.relative(adapted, alone) < 1e-6
        fast.disable_adapters()
        assert models.relative(fast(**inputs)[0], plain) < 1e-6
        graphs = counted.graphs
        fast.enable_adapters()
        assert models.relative(fast(**inputs)[0], adapted) < 1e-6
        assert counted.graphs == graphs


def test_a_model_that_needs_values_is_refused():
    class Reads(training.VideoModel):
        def forward(self, video):
            torch._dynamo.graph_break()
            return super().forward(video) * (2 if video.sum().item() > 0 else 1)

    fast = vmoba_compile.optimize(Reads(), training.CONFIG, inner="eager", regional=True)
    with torch.no_grad(), pytest.raises(RewriteError, match="compile it as a whole"):
        fast(clip())


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (lambda: nn.Linear(2, 2), {}, "has no repeated blocks"),
        (lambda: training.build(), {"dynamic": True}, "leave dynamic out"),
    ],
    ids=["no_blocks", "dynamic"],
)
def test_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        vmoba_compile.optimize(model(), inner="eager", regional=True, **options)


def test_blocks_that_are_compiled_already_are_refused():
    model, _ = models.build("wan")
    model.compile_repeated_blocks(backend="eager")
    with pytest.raises(ValueError, match=r"blocks\.0 is compiled already"):
        optimize(model)
