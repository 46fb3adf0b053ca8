"""What a training loop does around the rewritten graph: compared with the same model whose attention is the oracle."""

from __future__ import annotations

import copy
import io

import models
import pytest
import torch
import training
from torch import nn
from torch.autograd import forward_ad
from training import EXACT, Recorder, assert_same, clip, gradients, optimize, parameters, step, train, with_oracle

import vmoba_compile

pytestmark = pytest.mark.usefixtures("fresh")


class TestSteps:
    def test_graphs_hold_the_operators(self):
        """Forward and backward graph are sparse, and the gradients are the oracle's, not dense attention's."""
        model, video, recorder = training.build(layers=3), clip(2), Recorder()
        expected, truth = step(with_oracle(model), video)
        loss, grads = step(optimize(model, recorder), video)
        assert recorder.counts("forward") == {"select": 3, "attention": 3}
        assert recorder.counts("backward") == {"attention_backward": 3}
        torch.testing.assert_close(loss, expected, rtol=EXACT, atol=0)
        assert_same(grads, truth, EXACT)
        dense, dense_grads = step(model, video)
        assert abs(dense - expected) > 1e-3 * expected, "the selection must matter, or this test shows nothing"
        assert training.difference(dense_grads, truth) > 0.1

    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-11)], ids=str)
    def test_adamw(self, dtype, tolerance):
        model, videos = training.build(layers=3).to(dtype), [clip(2).to(dtype) for _ in range(4)]
        twin, dense = with_oracle(model), copy.deepcopy(model)
        losses, expected = train(optimize(model), videos), train(twin, videos)
        torch.testing.assert_close(losses, expected, rtol=tolerance, atol=0)
        assert_same(parameters(model), parameters(twin), tolerance)
        assert abs(train(dense, videos)[-1] - expected[-1]) > 100 * tolerance

    def test_named_compiler(self, ran):
        """``inner="aot_eager"`` by its name runs the sparse operators in both directions."""
        step(optimize(training.build()), clip())
        assert ran == {"select": 2, "attention": 2, "attention_backward": 2}

    @models.needs_compiler
    @pytest.mark.slow
    def test_inductor(self, ran):
        model, videos = training.build(layers=1), [clip() for _ in range(3)]
        twin = with_oracle(model)
        losses, expected = train(optimize(model, "inductor"), videos), train(twin, videos)
        torch.testing.assert_close(losses, expected, rtol=1e-4, atol=0)
        assert_same(parameters(model), parameters(twin), 1e-4)
        assert ran == {"select": 3, "attention": 3, "attention_backward": 3}

    def test_accumulated_micro_batches(self):
        """Sums of the gradients of unequal micro-batches are those of the whole batch."""
        model, video = training.build(), clip(3)
        _, truth = step(with_oracle(model), video)
        fast = optimize(model)
        _, whole = step(fast, video)
        fast.zero_grad()
        for part in video.split([1, 2]):
            (training.loss_of(fast, part) * len(part) / len(video)).backward()
        assert_same(gradients(model), whole, EXACT)
        assert_same(gradients(model), truth, EXACT)


class TestLowPrecision:
    def test_autocast(self):
        """Gradients are float32, and no further from the exact ones than the oracle's under autocast."""
        model, video = training.build(), clip(2)
        twin = with_oracle(model)
        _, exact = step(twin, video)
        fast = optimize(model)
        found = []
        for module in (fast, twin):
            module.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = training.loss_of(module, video)
            loss.backward()
            assert {p.grad.dtype for p in module.parameters()} == {torch.float32}
            found.append(training.difference(gradients(module), exact))
        assert 1e-4 < found[0] <= 1.5 * found[1] < 0.1
        assert training.difference(step(model, video)[1], exact) > 0.1

    def test_grad_scaler(self):
        """Scaled, unscaled, clipped and stepped: the weights of a loop without a scaler."""
        model, videos = training.build(), [clip() for _ in range(2)]
        twin = with_oracle(model)
        fast, scaler = optimize(model), torch.amp.GradScaler("cpu", init_scale=2.0**12)
        optimizers = [torch.optim.AdamW(module.parameters(), lr=3e-3) for module in (fast, twin)]
        for video in videos:
            optimizers[0].zero_grad()
            loss = training.loss_of(fast, video)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizers[0])
            norm = nn.utils.clip_grad_norm_(fast.parameters(), 0.1)
            scaler.step(optimizers[0])
            scaler.update()
            expected, _ = step(twin, video)
            expected_norm = nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
            optimizers[1].step()
            torch.testing.assert_close((loss, norm), (expected, expected_norm), rtol=EXACT, atol=0)
            assert_same(gradients(model), gradients(twin), 1e-4)
        assert_same(parameters(model), parameters(twin), 1e-4)

    def test_infinite_gradients_skip_the_step(self):
        model, video = training.build(), clip()
        fast, scaler = optimize(model), torch.amp.GradScaler("cpu", init_scale=2.0**127)
        optimizer = torch.optim.SGD(fast.parameters(), lr=1e-2)
        before = parameters(model)
        scaler.scale(1e3 * training.loss_of(fast, video)).backward()
        assert not all(p.grad.isfinite().all() for block in model.blocks for p in block.q.parameters())
        scaler.step(optimizer)
        scaler.update()
        assert_same(parameters(model), before, 0)
        assert scaler.get_scale() == 2.0**126
        # And nothing of it is left for the next step.
        assert_same(step(fast, video)[1], step(with_oracle(model), video)[1], EXACT)


class Adapter(nn.Module):
    """A low-rank addition to a frozen projection."""

    def __init__(self, frozen: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.frozen = frozen
        self.down = nn.Linear(frozen.in_features, rank, bias=False)
        self.up = nn.Linear(rank, frozen.out_features, bias=False)

    def forward(self, x):
        return self.frozen(x) + self.up(self.down(x))


class TestFrozen:
    @pytest.mark.parametrize("trained", [("q",), ("k",), ("v",), ("q", "v"), ("k", "v")], ids="".join)
    def test_some_projections(self, trained):
        model, video = training.build(), clip(2)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.split(".")[-2] in trained)
        expected, truth = step(with_oracle(model), video)
        loss, grads = step(optimize(model), video)
        torch.testing.assert_close(loss, expected, rtol=EXACT, atol=0)
        assert_same(grads, truth, EXACT)
        assert {name.split(".")[-2] for name in grads} == set(trained)
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)

    @pytest.mark.parametrize(
        ("trained", "count"), [("unpatch", 0), ("blocks.1.out", 0), ("blocks.1.q", 1), ("blocks.0.mlp", 1)]
    )
    def test_no_backward_below_what_is_trained(self, trained, count):
        """Attention whose inputs need no gradient is not in the backward graph."""
        model, video, recorder = training.build(), clip(), Recorder()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(trained))
        _, truth = step(with_oracle(model), video)
        assert_same(step(optimize(model, recorder), video)[1], truth, EXACT)
        assert recorder.counts("backward").get("attention_backward", 0) == count

    def test_lora(self):
        """Adapters added before ``optimize`` learn what they learn around the oracle; nothing else moves."""
        model, videos = training.build().requires_grad_(False), [clip() for _ in range(3)]
        for block in model.blocks:
            block.q, block.v = Adapter(block.q), Adapter(block.v)
        twin, before = with_oracle(model), parameters(model)
        losses = train(optimize(model), videos)
        torch.testing.assert_close(losses, train(twin, videos), rtol=EXACT, atol=0)
        after = parameters(model)
        assert_same(after, parameters(twin), 1e-4)
        moved = {name for name in after if not torch.equal(after[name], before[name])}
        assert moved == {name for name in after if ".up." in name or ".down." in name}


class TestTransforms:
    """torch.func and higher derivatives: right numbers, or one sentence that says why not."""

    @staticmethod
    def attend(q, k, v):
        return vmoba_compile.attention(q, k, v, training.GRID, block=(2, 3, 2))

    @staticmethod
    def tensors(*batch):
        return [torch.randn(*batch, 1, 2, 64, 8) for _ in range(3)]

    @pytest.mark.parametrize(
        ("inner", "message"),
        [
            ("eager", "vmoba::attention has no second derivative"),
            ("aot_eager", "not currently support double backward"),
        ],
        ids=["eager", "aot_eager"],
    )
    def test_double_backward(self, inner, message):
        video = clip().requires_grad_()
        loss = optimize(training.build(), inner)(video).square().sum()
        (grad,) = torch.autograd.grad(loss, video, create_graph=True)
        with pytest.raises(RuntimeError, match=message):
            grad.square().sum().backward()

    def test_vmap_of_the_operator(self):
        tensors = self.tensors(3)
        each = torch.stack([self.attend(*sample) for sample in zip(*tensors, strict=True)])
        assert torch.equal(torch.vmap(self.attend)(*tensors), each)

    def test_func_grad_of_the_operator(self):
        q, k, v = self.tensors()
        with pytest.raises(RuntimeError, match="vmoba::attention"):
            torch.func.grad(lambda q: self.attend(q, k, v).sum())(q)

    @pytest.mark.parametrize("requires_grad", [False, True], ids=["frozen", "trained"])
    def test_forward_mode(self, requires_grad):
        q, k, v = (x.requires_grad_(requires_grad) for x in self.tensors())
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode AD"):
            self.attend(forward_ad.make_dual(q, torch.ones_like(q)), k, v)
        with pytest.raises(NotImplementedError, match="forward mode AD"):
            torch.func.jvp(lambda q: self.attend(q, k, v), (q.detach(),), (torch.ones_like(q),))

    @pytest.mark.parametrize("transform", ["grad", "vmap"])
    def test_of_the_model(self, transform):
        """torch.compile's own refusal, which names the transform and that it belongs inside."""
        fast, video = optimize(training.build()), clip(4).unflatten(0, (2, 2))
        call = torch.vmap(fast) if transform == "vmap" else torch.func.grad(lambda x: fast(x[0]).sum())
        with pytest.raises(
            torch._dynamo.exc.Unsupported, match=rf"torch\.func\.{transform}\(compiled_fn\).*is not supported"
        ):
            call(video)

    def test_functional_call(self):
        """Gradients of parameters that are handed over."""
        model, video = training.build(), clip()
        _, truth = step(with_oracle(model), video)
        fast = optimize(model)
        given = {name: p.detach().clone().requires_grad_() for name, p in fast.named_parameters()}
        loss = (torch.func.functional_call(fast, given, (video,)) - video).square().mean()
        grads = dict(zip(given, torch.autograd.grad(loss, list(given.values())), strict=True))
        assert_same({training.plain_name(name): x for name, x in grads.items()}, truth, EXACT)


class TestModes:
    def test_train_and_eval(self):
        """Dropout in training only and from the seed; validation in between changes nothing."""
        model, video = training.build(dropout=0.3), clip(2)
        twin, recorder = with_oracle(model), Recorder()
        fast = optimize(model, recorder)
        seen = []
        for seed in (1, 2, 1):
            fast.train(), twin.train()
            torch.manual_seed(seed)
            loss, grads = step(fast, video)
            torch.manual_seed(seed)
            expected, truth = step(twin, video)
            torch.testing.assert_close(loss, expected, rtol=EXACT, atol=0)
            assert_same(grads, truth, EXACT)
            seen.append(loss)
            fast.eval(), twin.eval()
            with torch.no_grad():
                out = fast(video)
                torch.testing.assert_close(out, twin(video), rtol=1e-4, atol=1e-5)
            assert not out.requires_grad
        assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1])
        # One graph to train, one to validate; the second has no backward.
        assert recorder.counts("forward") == {"select": 4, "attention": 4}
        assert recorder.counts("backward") == {"attention_backward": 2}

    def test_gradients_in_eval_mode(self):
        model, video = training.build(dropout=0.3).eval(), clip()
        assert_same(step(optimize(model), video)[1], step(with_oracle(model), video)[1], EXACT)

    def test_dense_in_between(self):
        model, video = training.build(), clip()
        _, sparse = step(with_oracle(model), video)
        _, dense = step(model, video)
        fast = optimize(model)
        for _ in range(2):
            assert_same(step(fast, video)[1], sparse, EXACT)
            with fast.dense():
                assert_same(step(fast, video)[1], dense, EXACT)


def through_state_dict(fast):
    """Into a plain model of the same shape, which is optimized anew."""
    saved = copy.deepcopy(fast.state_dict())
    nn.modules.utils.consume_prefix_in_state_dict_if_present(saved, "_orig_mod.")
    fresh = training.VideoModel()
    fresh.load_state_dict(saved)
    return optimize(fresh)


def through_file(fast):
    buffer = io.BytesIO()
    torch.save(fast, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "carry", [through_state_dict, through_file, copy.deepcopy], ids=["state_dict", "pickle", "copy"]
)
def test_continue_from_a_copy(carry):
    """In the middle of training: the copy goes on with the bits of the original, and apart from it."""
    model, videos = training.build(), [clip() for _ in range(4)]
    twin = with_oracle(model)
    fast = optimize(model)
    optimizer = torch.optim.AdamW(fast.parameters(), lr=3e-3)
    train(fast, videos[:2], optimizer)
    other = carry(fast)
    assert type(other) is type(fast)
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=3e-3)
    other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = parameters(fast)
    losses = train(other, videos[2:], other_optimizer)
    assert_same(parameters(fast), before, 0)
    assert all(map(torch.equal, losses, train(fast, videos[2:], optimizer)))
    assert_same(parameters(other), parameters(fast), 0)
    train(twin, videos)
    assert_same(parameters(other), parameters(twin), 1e-4)
    assert len(vmoba_compile.report(other).rewritten) == 2


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["static", "dynamic"])
def test_two_grids_in_turn(dynamic):
    """Gradients accumulate over clips of two sizes, each with the selection of its own grid."""
    grids = [(4, 4, 4), (3, 5, 6)]
    model = training.build(layers=1)
    twins = [with_oracle(model, grid) for grid in grids]
    fast = optimize(model, dynamic=dynamic)
    for _ in range(2):
        for grid, twin in zip(grids, twins, strict=True):
            video = clip(1, grid)
            loss, grads = step(fast, video)
            expected, truth = step(twin, video)
            torch.testing.assert_close(loss, expected, rtol=EXACT, atol=0)
            assert_same(grads, truth, EXACT)
    assert fast._vmoba.made.rewriter.graphs <= 3 if dynamic else fast._vmoba.made.rewriter.graphs == 2
