"""What every artefact begins with: the model as an exported program whose video attention is rewritten."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from ..backend import check_coverage, check_grid, check_strict, warn
from ..config import VMoBAConfig, as_config
from ..kernels.partition import Triple
from ..optimize import OptimizedModel
from ..passes import ExportError, Report, RewriteError, rewrite


@dataclass(frozen=True)
class Captured:
    """An exported program that holds ``vmoba`` operators, what was rewritten, and the inputs that it was traced with."""

    program: ExportedProgram
    report: Report
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def capture(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    config: VMoBAConfig | Mapping[str, Any] | None = None,
    grid: Triple | None = None,
    dynamic_shapes: Any = None,
    strict: bool = False,
    expect: int | None = None,
) -> Captured:
    """Export ``model`` for inference with ``torch.export`` and rewrite its dense video self-attention.

    A model from ``optimize`` brings its own ``config`` and ``grid``. The model is traced in ``eval`` mode and is afterwards
    as it was. ``dynamic_shapes`` is that of ``torch.export.export``; with None every size is that of the inputs.

    Raises:
        ExportError: ``torch.export`` cannot trace the model. GridError: ``grid`` contradicts the graph.
        CoverageError: ``strict`` or ``expect`` (see :func:`vmoba_compile.optimize`) is not met.
        TypeError: ``args`` is no sequence of inputs, ``kwargs`` no mapping of names to inputs, ``model`` no module.
    """
    args, kwargs = inputs_of(args, kwargs)
    config = configured(model, config)
    if isinstance(model, OptimizedModel) and grid is None:
        grid = model._vmoba.settings["grid"]
    if isinstance(model, torch._dynamo.OptimizedModule):
        model = model._orig_mod
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    name = type(model).__name__
    try:
        with evaluating(model), torch.no_grad():
            program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes)
    except RewriteError:
        raise
    except Exception as error:
        raise ExportError(
            f"torch.export cannot trace {name}: {first_line(error)} (torch.export.export(model.eval(), args, kwargs) shows"
            " the whole trace)"
        ) from error
    own = program.graph.find_nodes(op="call_function", target=torch.ops.vmoba.attention.default)
    report = rewrite(program.graph_module, config, grid=check_grid(grid))
    inner = [name for name, part in program.graph_module.named_modules() if name and _holds_vmoba(part)]
    if inner:
        raise ExportError(
            f"attention of {name} lies in a subgraph of the exported program ({inner[0]}), which artefacts cannot hold; "
            "leave out what makes one, such as torch.autocast or checkpointing inside the model"
        )
    if strict:
        check_strict(report)
    check_coverage(report, strict=strict, expect=expect)
    if not report.rewritten and not own:
        warn(f"vmoba_compile exports {name} dense: {report.summary() if len(report) else 'it has no attention'}")
    return Captured(program, report, args, kwargs)


def inputs_of(args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as a call has them. Raises TypeError where they are something else, such as a tensor."""
    if isinstance(args, str) or not isinstance(args, Sequence):
        raise TypeError(f"args must be a tuple of inputs, such as (x,), not {type(args).__name__}")
    if not isinstance(kwargs, Mapping | None):
        raise TypeError(f"kwargs must be a dict of inputs by name, not {type(kwargs).__name__}")
    return tuple(args), dict(kwargs or {})


def configured(model: nn.Module, config: VMoBAConfig | Mapping[str, Any] | None) -> VMoBAConfig:
    """The configuration given, else that of a model from ``optimize``, else the default."""
    if config is None and isinstance(model, OptimizedModel):
        found: VMoBAConfig = model._vmoba.settings["config"]
        return found
    return as_config(config)


def _holds_vmoba(part: nn.Module) -> bool:
    return isinstance(part, torch.fx.GraphModule) and any(
        str(node.target).startswith("vmoba.") for node in part.graph.nodes if node.op == "call_function"
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in ``eval`` mode; afterwards every part of it is in the mode that it was in."""
    training = [part for part in model.modules() if part.training]
    model.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def tensors_of(tree: Any) -> list[torch.Tensor]:
    """The tensors among arguments or results, in their order."""
    return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]


def options_of(node: fx.Node) -> dict[str, Any]:
    """The options of an operator's call, those included that are left at the defaults of its schema."""
    assert isinstance(node.target, torch._ops.OpOverload)
    arguments = node.target._schema.arguments
    return {x.name: x.default_value for x in arguments if x.has_default_value()} | node.kwargs


def relative_error(actual: Any, expected: Any) -> float:
    """Largest over the floating results of the norm of the difference over the norm; NaN where one is NaN."""
    errors = [
        float((a.double() - e.double()).norm() / e.double().norm().clamp(min=1e-300))
        for a, e in zip(tensors_of(actual), tensors_of(expected), strict=True)
        if e.is_floating_point()
    ]
    return float("nan") if any(math.isnan(x) for x in errors) else max(errors, default=0.0)


def first_line(error: BaseException) -> str:
    """An error in one line: its type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
