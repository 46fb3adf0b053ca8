"""Graphs for the tests of the passes: captured from models, or built op by op on tensors that carry coordinates."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F
from vmoba_compile.passes import Report, rewrite
from vmoba_compile.passes.sizes import value_of
from vmoba_compile.passes.tokens import ROLES, Axes, raster_of, segment_size
from vmoba_compile.passes.track import Tracking, track

from vmoba_compile import VMoBAConfig

EVERYTHING = VMoBAConfig(threshold=1.0, min_tokens=0)
SPARSE = VMoBAConfig(threshold=0.25, min_tokens=0)


class Capture:
    """A Dynamo backend that rewrites and keeps every graph, and runs what it kept."""

    def __init__(self, config: VMoBAConfig = EVERYTHING, grid: tuple[int, int, int] | None = None) -> None:
        self.config, self.grid = config, grid
        self.graphs: list[fx.GraphModule] = []
        self.report = Report()

    def __call__(self, gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.report.merge(rewrite(gm, self.config, grid=self.grid, layers=self.report.layers))
        self.graphs.append(gm)
        return gm.forward


def compiled(
    model: nn.Module,
    *inputs: Any,
    config: VMoBAConfig = EVERYTHING,
    grid: tuple[int, int, int] | None = None,
    dynamic: bool = False,
    fullgraph: bool = True,
    **kwargs: Any,
) -> tuple[Capture, Any]:
    """What the rewrite did to the model's graphs, and the rewritten model's output."""
    torch._dynamo.reset()
    capture = Capture(config, grid)
    output = torch.compile(model, backend=capture, dynamic=dynamic, fullgraph=fullgraph)(*inputs, **kwargs)
    return capture, output


def verdicts(report: Report) -> list[str]:
    return [site.reason.value for site in report]


def exported(model: nn.Module, *inputs: Any, config: VMoBAConfig = EVERYTHING, **kwargs: Any) -> tuple[Report, Any]:
    """The rewrite of an exported program: its report and the program."""
    grid = kwargs.pop("grid", None)
    program = torch.export.export(model, inputs, strict=False, **kwargs)
    return rewrite(program.graph_module, config, grid=grid), program


class Tape:
    """An fx graph that grows with every call, run on real tensors.

    Elements of a grid hold their raster number, so that data show whether a claimed order is the real one. All else
    holds ``OTHER``.
    """

    OTHER = -1

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.grid: tuple[int, int, int] | None = None

    def give(self, name: str, value: torch.Tensor) -> fx.Node:
        """A graph input."""
        places = [n for n in self.graph.nodes if n.op == "placeholder"]
        with self.graph.inserting_after(places[-1]) if places else self.graph.inserting_before():
            node = self.graph.placeholder(name)
        node.meta["example_value"] = value
        return node

    def call(self, target: Any, *args: Any, holds: torch.Tensor | None = None, **kwargs: Any) -> fx.Node:
        """A call, by name for a tensor method. ``holds`` stands for the result, otherwise it is computed."""
        make = self.graph.call_method if isinstance(target, str) else self.graph.call_function
        node = make(target, args, kwargs)
        value = holds
        if value is None:
            real_args, real_kwargs = fx.map_arg((args, kwargs), value_of)
            value = (
                getattr(real_args[0], target)(*real_args[1:], **real_kwargs)
                if isinstance(target, str)
                else target(*real_args, **real_kwargs)
            )
        node.meta["example_value"] = value
        return node

    def patches(self, grid: tuple[int, int, int], batch: int = 2, channels: int = 2) -> fx.Node:
        """A patch embedding conv3d of that grid: [batch, channels, frames, rows, columns]."""
        self.grid = grid
        video = self.give("l_video_", torch.zeros(batch, 1, *grid))
        weight = self.give("l_self_parameters_weight_", torch.zeros(channels, 1, 1, 1, 1))
        numbers = torch.arange(grid[0] * grid[1] * grid[2]).view(1, 1, *grid)
        return self.call(F.conv3d, video, weight, holds=numbers.expand(batch, channels, *grid).clone())

    def folded_patches(self, grid: tuple[int, int, int], batch: int = 1, channels: int = 2) -> fx.Node:
        """A patch embedding conv2d with the frames in the batch: [batch * frames, channels, rows, columns]."""
        self.grid = frames, rows, columns = grid
        video = self.give("l_video_", torch.zeros(batch, frames, 1, rows, columns))
        weight = self.give("l_self_parameters_weight_", torch.zeros(channels, 1, 1, 1))
        images = self.call("reshape", video, batch * frames, 1, rows, columns)
        numbers = torch.arange(frames * rows * columns).view(1, frames, 1, rows, columns)
        numbers = numbers.expand(batch, frames, channels, rows, columns).reshape(-1, channels, rows, columns)
        return self.call(F.conv2d, images, weight, holds=numbers.clone())

    def tokens(self, video: fx.Node) -> fx.Node:
        """The grid as a sequence: [batch, tokens, channels]."""
        value = value_of(video)
        assert isinstance(value, torch.Tensor) and self.grid is not None
        if value.dim() == 5:
            return self.call("transpose", self.call("flatten", video, 2), 1, 2)
        batch, channels = value.shape[0] // self.grid[0], value.shape[1]
        split = self.call("reshape", self.call("permute", video, 0, 2, 3, 1), batch, -1, channels)
        return self.call("clone", split)

    def tracked(self) -> list[tuple[fx.Node, Axes]]:
        """Every call with the token types of its result."""
        return [(node, scope.axes_of(node) or ()) for scope, node in self.tracking().order]

    def tracking(self) -> Tracking:
        return track(fx.GraphModule({}, self.graph), lambda node: True)

    def axes(self, node: fx.Node) -> Axes:
        return dict(self.tracked())[node]

    def check(self) -> int:
        """Every claim of every node against its data; the number of whole grids claimed."""
        rasters = 0
        for node, axes in self.tracked():
            value = value_of(node)
            if not isinstance(value, torch.Tensor):
                continue
            for dim, axis in enumerate(axes):
                start = 0
                for segment in axis:
                    size = segment_size(segment).hint
                    data = value.narrow(dim, start, size).movedim(dim, -1)
                    start += size
                    if raster_of(segment):
                        rasters += 1
                        self._check_raster(node, data, segment)
                    elif segment and all(f.role in ROLES and f.part is None for f in segment):
                        self._check_roles(node, data, segment)
        return rasters

    def _check_raster(self, node: fx.Node, data: torch.Tensor, segment: Any) -> None:
        """Frames folded into the batch may come out again in part: every second one, or half of them."""
        if segment[0].role == "frame":
            return self._agree(node, data, data, torch.arange(data.shape[-1]))
        self._check_roles(node, data, segment[1:])
        assert self.grid is not None
        frames = (data // (self.grid[1] * self.grid[2])).unflatten(-1, (segment[0].size.hint, -1))
        steps = frames.diff(dim=-2)
        real = (data >= 0).unflatten(-1, frames.shape[-2:])
        good = (steps > 0) | ~(real[..., 1:, :] & real[..., :-1, :])
        assert good.all(), f"{node.format_node()} is claimed to hold frames in order, but holds {data}\n{self.graph}"

    def _check_roles(self, node: fx.Node, data: torch.Tensor, segment: Any) -> None:
        assert self.grid is not None
        _, rows, columns = self.grid
        real = {"frame": data // (rows * columns), "row": data // columns % rows, "column": data % columns}
        inner = 1
        for factor in reversed(segment):
            claimed = torch.arange(data.shape[-1]) // inner % factor.size.hint
            inner *= factor.size.hint
            self._agree(node, data, real[factor.role], claimed)

    def _agree(self, node: fx.Node, data: torch.Tensor, real: torch.Tensor, claimed: torch.Tensor) -> None:
        wrong = (real != claimed) & (data != self.OTHER)
        assert not wrong.any(), f"{node.format_node()} is claimed to be in order, but holds {data}\n{self.graph}"


def getitem(tape: Tape, node: fx.Node, index: Any) -> fx.Node:
    return tape.call(operator.getitem, node, index)


class VideoAttention(nn.Module):
    """A patch embedding and one self-attention; ``order`` and ``attend`` are what a test is about.

    ``order(x)`` makes the sequence out of the grid [batch, channels, frames, rows, columns]; ``attend(q, k, v, *more)``
    takes [batch, heads, tokens, head_dim] and the model's other inputs.
    """

    def __init__(self, order: Any = None, attend: Any = None, heads: int = 2, width: int = 16) -> None:
        super().__init__()
        self.patch = nn.Conv3d(3, width, (1, 2, 2), stride=(1, 2, 2))
        self.qkv = nn.Linear(width, 3 * width)
        self.heads = heads
        self.order = order or raster_tokens
        self.attend = attend or dense

    def split(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1)]

    def forward(self, video: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
        return self.attend(*self.split(self.order(self.patch(video))), *more)


def raster_tokens(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(2).transpose(1, 2)


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def video(frames: int = 2, rows: int = 3, columns: int = 4, batch: int = 2) -> torch.Tensor:
    """The input whose patches are that grid."""
    return torch.randn(batch, 3, frames, 2 * rows, 2 * columns)


def rewritten(model: nn.Module, *inputs: Any, **kwargs: Any) -> Report:
    """The report of both graph forms. With everything selected, the rewritten model must give what the model gives."""
    both_forms = kwargs.pop("both_forms", True)
    with torch.no_grad():
        wanted = model(*inputs)
        capture, found = compiled(model, *inputs, **kwargs)
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-5)
        for graph in capture.graphs:
            graph.graph.lint()
        if both_forms:
            report, program = exported(model, *inputs, grid=kwargs.get("grid"))
            assert verdicts(report) == verdicts(capture.report), (str(report), str(capture.report))
            assert [s.grid for s in report] == [s.grid for s in capture.report]
            torch.testing.assert_close(program.module()(*inputs), wanted, atol=2e-5, rtol=2e-5)
    return capture.report
