"""Schedules that work by themselves: real diffusers pipelines of random weights, and nothing written by the user."""

from __future__ import annotations

import gc
import types
import warnings
import weakref

import models
import pytest
import torch
from torch import nn
from video_zoo import ZOO

import vmoba_compile
from vmoba_compile import VMoBAConfig
from vmoba_compile.pipelines import Clock, calling_pipeline
from vmoba_compile.zoo import PRESETS

pytestmark = pytest.mark.usefixtures("fresh")

STEPS = 8


class Noted:
    """Inner compilers that count the graphs they compile and note which ran: "s" for sparse, "d" for dense."""

    def __init__(self) -> None:
        self.graphs = 0
        self.ran = ""

    def __call__(self, gm, inputs):
        self.graphs += 1
        kind = "s" if any("vmoba" in str(node.target) for node in gm.graph.nodes) else "d"

        def run(*args):
            self.ran += kind
            return gm.forward(*args)

        return run


def optimize(model, noted, **fields):
    config = VMoBAConfig.from_dict(models.CONFIG.to_dict() | fields)
    return vmoba_compile.optimize(model, config, inner=noted)


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def wan(transformer, transformer_2=None, scheduler=None, **options):
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    return quiet(
        WanPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=None,
            transformer=transformer,
            transformer_2=transformer_2,
            scheduler=scheduler or FlowMatchEulerDiscreteScheduler(),
            **options,
        )
    )


def run_wan(pipeline, steps=STEPS, **options):
    text = torch.randn(1, 512, 16)
    call = {"height": 96, "width": 128, "num_frames": 13, "guidance_scale": 5.0} | options
    return pipeline(
        prompt_embeds=text, negative_prompt_embeds=-text, num_inference_steps=steps, output_type="latent", **call
    ).frames


@pytest.fixture
def transformer():
    model, _ = models.build("wan", batch=1)
    return model


def schedulers():
    from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
    from diffusers.schedulers import FlowMatchHeunDiscreteScheduler

    return {
        "euler": FlowMatchEulerDiscreteScheduler(),
        "unipc": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        "heun": FlowMatchHeunDiscreteScheduler(),
    }


@pytest.mark.parametrize("name", ["euler", "unipc"])
def test_wan_two_calls_a_step(transformer, name):
    """The first quarter of the steps is dense in both branches of the guidance; each graph is compiled once."""
    noted = Noted()
    pipeline = wan(optimize(transformer, noted, dense_steps=0.25), scheduler=schedulers()[name])
    for _ in range(2):
        noted.ran = ""
        run_wan(pipeline)
        assert noted.ran == "dd" * 2 + "ss" * 6
    assert noted.graphs == 2


def test_the_result_is_that_of_a_loop_by_hand(transformer):
    torch.manual_seed(1)
    latents = torch.randn(1, 4, 4, 12, 16)
    fast = optimize(transformer, Noted(), dense_steps=2)
    pipeline = wan(fast)
    torch.manual_seed(2)
    by_itself = run_wan(pipeline, latents=latents.clone())

    by_hand = wan(fast)
    fast.set_dense(True)

    def count(_, step, timestep, values):
        fast.set_dense(step + 1 < 2)
        return values

    torch.manual_seed(2)
    torch.testing.assert_close(by_itself, run_wan(by_hand, latents=latents.clone(), callback_on_step_end=count))


@pytest.mark.parametrize(("dense_steps", "dense"), [(0, 0), (0.0, 0), (3, 3), (1.0, 8), (0.5, 4)])
def test_counts_and_fractions(transformer, dense_steps, dense):
    noted = Noted()
    run_wan(wan(optimize(transformer, noted, dense_steps=dense_steps)), guidance_scale=1.0)
    assert noted.ran == "d" * dense + "s" * (STEPS - dense)


def test_two_experts_share_a_schedule(transformer):
    """Wan 2.2: the second transformer goes on where the first one stops."""
    second, _ = models.build("wan", batch=1)
    noted, noted_2 = Noted(), Noted()
    pipeline = wan(
        optimize(transformer, noted, dense_steps=0.5), optimize(second, noted_2, dense_steps=0.5), boundary_ratio=0.9
    )
    run_wan(pipeline, guidance_scale=1.0)
    assert noted.ran and noted_2.ran
    assert noted.ran + noted_2.ran == "dddd" + "ssss"


def test_two_pipelines_in_one_process(transformer):
    """Two runs of one model in turn, step by step, each at a step of its own."""
    noted = Noted()
    fast = optimize(transformer, noted, dense_steps=0.5)
    outer, inner = wan(fast), wan(fast)
    seen = []

    def other(pipeline, step, timestep, values):
        seen.append(noted.ran)
        noted.ran = ""
        if step == 3:
            run_wan(inner, steps=2, guidance_scale=1.0)
            seen.append("inner " + noted.ran)
            noted.ran = ""
        return values

    run_wan(outer, guidance_scale=1.0, callback_on_step_end=other)
    assert seen == ["d", "d", "d", "d", "inner ds", "s", "s", "s", "s"]


def test_what_is_set_by_hand_goes_before(transformer):
    noted = Noted()
    fast = optimize(transformer, noted, dense_steps=0.5)
    pipeline = wan(fast)
    with fast.dense():
        run_wan(pipeline, guidance_scale=1.0)
    fast.set_dense(False)
    run_wan(pipeline, guidance_scale=1.0)
    assert noted.ran == "d" * STEPS + "s" * STEPS
    fast.set_dense(None)
    noted.ran = ""
    run_wan(pipeline, guidance_scale=1.0)
    assert noted.ran == "dddd" + "ssss"


def test_outside_of_a_pipeline_it_is_sparse(transformer):
    noted = Noted()
    fast = optimize(transformer, noted, dense_steps=0.5)
    run_wan(wan(fast), guidance_scale=1.0)
    noted.ran = ""
    _, inputs = models.build("wan", batch=1)
    with torch.no_grad():
        fast(**inputs)
    assert noted.ran == "s" and not fast.is_dense()


def test_regional(transformer):
    noted = Noted()
    config = VMoBAConfig.from_dict(models.CONFIG.to_dict() | {"dense_steps": 0.25})
    fast = vmoba_compile.optimize(transformer, config, inner=noted, regional=True)
    run_wan(wan(fast), guidance_scale=1.0)
    assert noted.ran == "ddd" * 2 + "sss" * 6


def hunyuan(fast):
    from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline

    pipeline = HunyuanVideoPipeline(
        text_encoder=None, tokenizer=None, transformer=fast, vae=None, scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder_2=None, tokenizer_2=None,
    )  # fmt: skip
    inputs = PRESETS["tiny-hunyuanvideo"].build(device="cpu")[1]
    return pipeline, {
        "prompt_embeds": inputs["encoder_hidden_states"], "prompt_attention_mask": inputs["encoder_attention_mask"],
        "pooled_prompt_embeds": inputs["pooled_projections"], "height": 96, "width": 128, "num_frames": 9,
    }  # fmt: skip


def cogvideox(fast):
    from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline

    pipeline = CogVideoXPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=fast, scheduler=CogVideoXDDIMScheduler()
    )
    text = PRESETS["tiny-cogvideox"].build(device="cpu")[1]["encoder_hidden_states"]
    return pipeline, {
        "prompt_embeds": text, "negative_prompt_embeds": -text, "height": 128, "width": 128, "num_frames": 9,
        "guidance_scale": 6.0,
    }  # fmt: skip


def ltx(fast):
    from diffusers import FlowMatchEulerDiscreteScheduler, LTXPipeline

    pipeline = LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=None, text_encoder=None,
        tokenizer=None, transformer=fast,
    )  # fmt: skip
    text, mask = torch.randn(1, 7, 16), torch.ones(1, 7)
    return pipeline, {
        "prompt_embeds": text, "negative_prompt_embeds": -text, "prompt_attention_mask": mask,
        "negative_prompt_attention_mask": mask, "height": 128, "width": 192, "num_frames": 17,
    }  # fmt: skip


def mochi(fast):
    from diffusers import FlowMatchEulerDiscreteScheduler, MochiPipeline

    pipeline = MochiPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True), vae=None, text_encoder=None, tokenizer=None,
        transformer=fast,
    )  # fmt: skip
    text, mask = torch.randn(1, 7, 16), torch.ones(1, 7, dtype=torch.bool)
    return pipeline, {
        "prompt_embeds": text, "negative_prompt_embeds": -text, "prompt_attention_mask": mask,
        "negative_prompt_attention_mask": mask, "height": 64, "width": 96, "num_frames": 13,
    }  # fmt: skip


PIPELINES = {
    # name: (transformer, pipeline)
    "hunyuanvideo": (lambda: models.build("hunyuanvideo", batch=1), hunyuan),
    "cogvideox": (lambda: models.build("cogvideox", batch=1), cogvideox),
    "ltx": (ZOO["ltx"], ltx),
    "mochi": (ZOO["mochi"], mochi),
}


@pytest.mark.parametrize(("transformer", "build"), PIPELINES.values(), ids=PIPELINES)
def test_other_pipelines(transformer, build):
    """One call a step, two, or one with both branches in a batch; schedulers that count, and one that does not."""
    noted = Noted()
    pipeline, call = build(optimize(transformer()[0], noted, dense_steps=0.25))
    quiet(pipeline)(num_inference_steps=STEPS, output_type="latent", **call)
    runs = len(noted.ran) // STEPS
    assert runs and noted.ran == "d" * 2 * runs + "s" * 6 * runs


class Loop:
    """A pipeline of one's own, whose scheduler does not count."""

    def __init__(self, model, timesteps):
        self.transformer = model
        self.scheduler = types.SimpleNamespace(timesteps=timesteps)
        self.seen = []

    @torch.no_grad()
    def run(self, show):
        for t in self.scheduler.timesteps:
            if show:
                self.current_timestep = t
            self.transformer(t)
            self.seen.append(self.transformer.is_dense())


class Step(nn.Linear):
    def forward(self, timestep):
        return super().forward(timestep.expand(1, 2))


@pytest.fixture
def step():
    return vmoba_compile.optimize(Step(2, 2), VMoBAConfig(dense_steps=0.5), inner="eager")


@pytest.mark.filterwarnings("ignore:vmoba_compile left Step dense")
def test_a_pipeline_that_shows_its_timestep(step):
    loop = Loop(step, torch.linspace(1, 0, 4))
    loop.run(show=True)
    assert loop.seen == [True, True, False, False]


@pytest.mark.filterwarnings("ignore:vmoba_compile left Step dense")
def test_a_pipeline_that_does_not_is_told_once(step):
    loop = Loop(step, torch.linspace(1, 0, 4))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loop.run(show=False)
    assert loop.seen == [False] * 4
    assert sum("does not show which denoising step" in str(w.message) for w in caught) == 1


def test_a_trainer_with_a_scheduler_is_sparse(step):
    """It is no denoising loop, whatever its scheduler's count says."""
    loop = Loop(step, torch.linspace(1, 0, 4))
    loop.scheduler.step_index = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Loop.run.__wrapped__(loop, show=True)
    assert loop.seen == [False] * 4


@pytest.mark.filterwarnings("ignore:vmoba_compile")
def test_no_timestep_is_no_first_step(step):
    """A scheduler that is never stepped, and a model whose timestep has another name."""
    loop = Loop(step, torch.linspace(1, 0, 4))
    loop.scheduler.step_index = None
    step._orig_mod.forward = lambda t: torch.zeros(1)
    with torch.no_grad():
        for t in loop.scheduler.timesteps:
            loop.transformer = step
            Caller.call(loop, t=t)
    assert loop.seen == [False] * 4


class Caller:
    def call(self, **kwargs):
        self.transformer(**kwargs)
        self.seen.append(self.transformer.is_dense())


def test_second_order_schedulers_call_twice_a_step(transformer):
    noted = Noted()
    run_wan(wan(optimize(transformer, noted, dense_steps=3), scheduler=schedulers()["heun"]), guidance_scale=1.0)
    assert noted.ran == "d" * 6 + "s" * 9


def test_more_steps_announced_than_scheduled():
    """A count over tiles or training steps does not make every step dense."""
    timesteps = torch.arange(20.0)
    scheduler = types.SimpleNamespace(timesteps=timesteps)
    pipeline = types.SimpleNamespace(scheduler=scheduler, num_timesteps=1000, current_timestep=timesteps[7])
    progress = Clock().read(pipeline, None)
    assert (progress.index, progress.count) == (7, 20)


def test_a_run_that_begins_at_an_index():
    timesteps = torch.arange(20.0)
    scheduler = types.SimpleNamespace(timesteps=timesteps, begin_index=12)
    pipeline = types.SimpleNamespace(scheduler=scheduler, current_timestep=timesteps[13])
    progress = Clock().read(pipeline, None)
    assert (progress.index, progress.count) == (1, 8)


def test_one_step_more_than_runs():
    """Schedulers with an entry behind the last step, from which nothing is skipped."""
    timesteps = torch.arange(9.0)
    scheduler = types.SimpleNamespace(timesteps=timesteps, begin_index=None)
    pipeline = types.SimpleNamespace(scheduler=scheduler, num_timesteps=8, current_timestep=timesteps[2])
    progress = Clock().read(pipeline, None)
    assert (progress.index, progress.count) == (2, 8)


def test_a_timestep_for_every_frame_is_no_step():
    scheduler = types.SimpleNamespace(timesteps=torch.arange(9.0), step_index=None)
    pipeline = types.SimpleNamespace(scheduler=scheduler, current_timestep=torch.zeros(5))
    assert Clock().read(pipeline, torch.zeros(5)) is None


@pytest.mark.parametrize(
    "wrap", [lambda x: nn.Sequential(x), lambda x: {"t": x}, lambda x: [x]], ids=["module", "dict", "list"]
)
def test_held_indirectly(step, wrap):
    class Holder:
        scheduler = None

        def __init__(self):
            self.scheduler = types.SimpleNamespace(timesteps=torch.arange(3.0))
            self.held = wrap(step)

        def call(self):
            return calling_pipeline(step) is self

    assert Holder().call()


def test_locals_of_callers_are_freed(step):
    class Caller:
        def call(self):
            big = nn.Linear(2, 2)
            seen = weakref.ref(big)
            calling_pipeline(step)
            del big
            gc.collect()
            return seen()

    assert Caller().call() is None


def test_a_scheduler_that_never_steps_is_not_believed():
    """Its count stays None while the timesteps go on: copies of it are stepped."""
    pipeline = types.SimpleNamespace(
        scheduler=types.SimpleNamespace(timesteps=torch.tensor([9.0, 5.0]), step_index=None)
    )
    clock = Clock()
    assert clock.read(pipeline, torch.tensor([9.0])).index == 0
    assert clock.read(pipeline, torch.tensor([9.0])).index == 0
    assert clock.read(pipeline, torch.tensor([5.0])) is None


def test_a_run_that_begins_later():
    """Of ten timesteps the last four run: the first of these is step 0 of 4."""
    timesteps = torch.arange(10.0)
    pipeline = types.SimpleNamespace(scheduler=types.SimpleNamespace(timesteps=timesteps), num_timesteps=4)
    pipeline.current_timestep = timesteps[6:][1]
    assert (Clock().read(pipeline, None).index, Clock().read(pipeline, None).count) == (1, 4)


def test_no_pipeline(step):
    holder = types.SimpleNamespace(transformer=step)
    assert calling_pipeline(step) is None and holder is not None
