"""What a graph computes, gradients included, before and after the rewrite."""

from __future__ import annotations

from typing import Any

import torch
from graphs import EVERYTHING, Tape, VideoAttention, compiled
from torch import fx, nn
from vmoba_compile.passes import Report, rewrite
from vmoba_compile.passes.sizes import value_of


def judged(tape: Tape, *outputs: fx.Node) -> Report:
    """Rewrite the graph; one that is left dense is left alone."""
    tape.graph.output(outputs)
    gm = fx.GraphModule({}, tape.graph)
    before = _contents(gm.graph)
    report = rewrite(gm, EVERYTHING)
    assert report.rewritten or _contents(gm.graph) == before, f"{report}\n{gm.graph}"
    return report


def _contents(graph: fx.Graph) -> list[Any]:
    return [(node, node.target, node.args, node.kwargs) for node in graph.nodes]


def rewritten_graph(tape: Tape, *outputs: fx.Node, gradients: bool = True) -> Report:
    """Rewrite the graph and compare what it computes, what it leaves in its inputs, and its gradients."""
    report, wanted, found = before_and_after(tape, *outputs, gradients=gradients)
    for ours, theirs in zip(found, wanted, strict=True):
        if ours is None or theirs is None:
            assert ours is theirs, f"{report}\n{tape.graph}"
            continue
        # Gradients are sums of many terms that may cancel.
        torch.testing.assert_close(
            ours, theirs, atol=1e-4 * largest(theirs), rtol=1e-4, equal_nan=True,
            msg=lambda text: f"{text}\n{report}\n{tape.graph}",
        )  # fmt: skip
    return report


def largest(values: torch.Tensor) -> float:
    """The largest absolute value, or one."""
    return max([1.0, *values.abs().nan_to_num(0.0, 0.0).flatten().tolist()])


Results = list[torch.Tensor | None]


def before_and_after(tape: Tape, *outputs: fx.Node, gradients: bool = True) -> tuple[Report, Results, Results]:
    """The rewrite, and the results of the graph without and with it."""
    tape.graph.output(outputs)
    gm = fx.GraphModule({}, tape.graph)
    wanted = _run(gm, tape, gradients)
    report = rewrite(gm, EVERYTHING)
    gm.graph.lint()
    return report, wanted, _run(gm, tape, gradients) if report.rewritten else wanted


def _run(gm: fx.GraphModule, tape: Tape, gradients: bool) -> Results:
    """Outputs, inputs after the run, and gradients of the inputs."""
    random = torch.Generator().manual_seed(1)
    leaves, given = [], []
    for node in tape.graph.nodes:
        if node.op == "placeholder":
            value = value_of(node)
            if not value.any() and value.is_floating_point():  # the video and its patch embedding
                value = torch.randn(value.shape, generator=random).to(value.dtype)
            leaf = value.detach().clone().requires_grad_(gradients and value.is_floating_point())
            leaves.append(leaf)
            given.append(leaf.clone())  # may be written to, a leaf may not
    outputs = gm(*given)
    results = [*outputs, *given]
    live = [x for x in outputs if x.requires_grad]
    if live:
        seeds = [torch.randn(x.shape, generator=random).to(x.dtype) for x in live]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        results += torch.autograd.grad(live, wanted, seeds, allow_unused=True)
    return [None if x is None else x.detach().float() for x in results]


def several(*ways: Any, **kwargs: Any) -> VideoAttention:
    """One model that attends in several ways, and returns all results: compiling takes longer than anything else."""
    return VideoAttention(attend=lambda q, k, v, *more: [way(q, k, v, *more) for way in ways], **kwargs)


def same_gradients(model: nn.Module, *inputs: torch.Tensor) -> Report:
    """Compile the model, which returns a list; the gradients of its parameters must be what they were."""
    wanted = _gradients(model, model(*inputs))
    capture, outputs = compiled(model, *inputs)
    found = _gradients(model, outputs)
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], atol=1e-4 * largest(wanted[name]), rtol=1e-4)
    return capture.report


def _gradients(model: nn.Module, outputs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    sum((x.float() * torch.linspace(-1, 1, x.numel()).view(x.shape)).sum() for x in outputs).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
