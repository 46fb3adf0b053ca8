"""A small video transformer to train, its twin with the oracle as attention, and backends that keep what they compile."""

from __future__ import annotations

import collections
import copy
import functools
from collections.abc import Callable, Iterable
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from vmoba_compile.kernels import implementations, reference_attention

import vmoba_compile
from vmoba_compile import VMoBAConfig

EXACT = 1e-5  # float32 against the oracle, which computes in float64
GRID = (4, 4, 4)
# Per layer of the twin; the configuration says the same. Ragged boxes, and several to choose from.
BLOCKS = ((1, 99, 99), (99, 2, 3), (2, 3, 2))
CONFIG = VMoBAConfig(min_tokens=0, threshold=0.3, blocks={"1d": (1, None, None), "2d": (None, 2, 3), "3d": (2, 3, 2)})


class Block(nn.Module):
    """Attention and a feed-forward net, each beside a residual."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.q, self.v, self.out = (nn.Linear(width, width) for _ in range(3))
        # A bias would have no gradient but rounding errors, which AdamW turns into whole steps.
        self.k = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, width)
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (f(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class VideoModel(nn.Module):
    """Patches by conv3d, blocks, and the way back. ``around`` calls a block, for checkpointing."""

    def __init__(
        self, width: int = 16, heads: int = 2, layers: int = 2, dropout: float = 0.0,
        around: Callable[[nn.Module, Tensor], Tensor] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.patch = nn.Conv3d(3, width, (1, 2, 2), (1, 2, 2))
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.unpatch = nn.ConvTranspose3d(width, 3, (1, 2, 2), (1, 2, 2))
        self.around = around

    def forward(self, video: Tensor) -> Tensor:
        grid = self.patch(video)
        x = grid.flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x) if self.around is None else self.around(block, x)
        return self.unpatch(x.transpose(1, 2).unflatten(2, grid.shape[2:]))


def build(**options: Any) -> VideoModel:
    """A model whose weights are large enough for the selection to matter."""
    model = VideoModel(**options)
    with torch.no_grad():
        for block in model.blocks:
            for project in (block.q, block.k):
                project.weight.mul_(4)
    return model


def clip(batch: int = 1, grid: tuple[int, int, int] = GRID) -> Tensor:
    return torch.randn(batch, 3, grid[0], 2 * grid[1], 2 * grid[2])


def with_oracle(model: VideoModel, grid: tuple[int, int, int] = GRID) -> VideoModel:
    """A copy of the model that computes its attention with the oracle."""
    twin = copy.deepcopy(model)
    for block, size in zip(twin.blocks, BLOCKS, strict=False):
        block.attend = functools.partial(oracle.attention, grid=grid, block=size, threshold=CONFIG.threshold)
    return twin


def optimize(model: nn.Module, inner: Any = "aot_eager", **options: Any) -> Any:
    """Rewritten, and certainly so: every attention or an error."""
    options = {"fullgraph": True, "expect": len(model.blocks)} | options
    return vmoba_compile.optimize(model, CONFIG, inner=inner, **options)


def loss_of(model: nn.Module, video: Tensor) -> Tensor:
    return (model(video) - video).square().mean()


def plain_name(name: str) -> str:
    """A parameter's name as the plain model has it."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {plain_name(name): p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {plain_name(name): p.detach().clone() for name, p in model.named_parameters()}


def step(model: nn.Module, video: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one forward and backward pass."""
    model.zero_grad()
    loss = loss_of(model, video)
    loss.backward()
    return loss.detach(), gradients(model)


def train(model: nn.Module, videos: Iterable[Tensor], optimizer: torch.optim.Optimizer | None = None) -> list[Tensor]:
    """Losses of steps of AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3) if optimizer is None else optimizer
    losses = []
    for video in videos:
        optimizer.zero_grad()
        loss = loss_of(model, video)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def difference(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Relative error of all tensors as one vector."""
    assert actual.keys() == expected.keys() and expected
    ours, truth = (torch.cat([tensors[name].flatten().double() for name in expected]) for tensors in (actual, expected))
    return float((ours - truth).norm() / truth.norm())


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Each tensor by its own norm; a tolerance of 0 asks for the same bits."""
    assert actual.keys() == expected.keys() and expected
    for name, x in expected.items():
        assert actual[name].dtype == x.dtype, name
        if tolerance == 0:
            assert torch.equal(actual[name], x), name
        else:
            error, size = float((actual[name] - x).norm()), float(x.norm())
            assert error <= tolerance * size, f"{name}: {error} of {size}"


def count_runs(monkeypatch: pytest.MonkeyPatch) -> collections.Counter[str]:
    """How often the body of each operator runs from now on, whoever calls it."""
    counts: collections.Counter[str] = collections.Counter()

    def count(module: Any, name: str) -> None:
        body = getattr(module, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return body(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)

    count(implementations, "select")
    count(implementations, "attention")
    count(reference_attention, "attention_backward")
    return counts


class Recorder:
    """A compiler of training graphs that keeps them, and what ``vmoba::select`` chose in each."""

    def __init__(self) -> None:
        self.graphs: dict[str, list[fx.GraphModule]] = {"forward": [], "backward": []}
        self.selections: dict[str, list[Tensor]] = {"forward": [], "backward": []}
        self.compiler = aot_autograd(fw_compiler=self._keep("forward"), bw_compiler=self._keep("backward"))

    def __call__(self, gm: fx.GraphModule, inputs: Any) -> Any:
        return self.compiler(gm, inputs)

    def _keep(self, which: str) -> Callable[..., Any]:
        def compile(gm: fx.GraphModule, inputs: Any) -> Any:
            self.graphs[which].append(gm)
            return make_boxed_func(lambda *args: _Selections(gm, self.selections[which]).run(*args))

        return compile

    def counts(self, which: str) -> dict[str, int]:
        return operators(self.graphs[which])


class _Selections(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, kept: list[Tensor]) -> None:
        super().__init__(gm)
        self.kept = kept

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        result = super().call_function(target, args, kwargs)
        if target is torch.ops.vmoba.select.default:
            self.kept.append(result.clone())
        return result


def operators(graphs: Iterable[fx.GraphModule]) -> dict[str, int]:
    """How often each vmoba operator stands in the graphs."""
    found: dict[str, int] = {}
    for graph in graphs:
        for node in graph.graph.nodes:
            if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "vmoba":
                name = node.target._opname
                found[name] = found.get(name, 0) + 1
    return found
