"""``explain``: what ``optimize`` would do, without computing anything."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils import _pytree as pytree

from .backend import Rewriter, check_grid
from .compiling import compile_with, plainly
from .config import VMoBAConfig, as_config
from .context_parallel import hook_again, not_copied
from .handover import Handover
from .kernels.partition import Triple
from .passes import Report, RewriteError
from .passes.landmarks import Landmarks


def explain(
    model: nn.Module,
    *args: Any,
    config: VMoBAConfig | Mapping[str, Any] | None = None,
    grid: Triple | None = None,
    **kwargs: Any,
) -> Report:
    """Report what ``optimize(model, config, grid=grid)`` would rewrite when called with these inputs.

    Traces the model on fake tensors: no weights are read and nothing is computed, so a model and inputs built under
    ``torch.device("meta")`` will do, whatever their size. ``args`` and ``kwargs`` are the model's own.

    Raises:
        GridError: ``grid`` contradicts the graph. InputError: the model rejects the inputs.
    """
    if isinstance(model, torch._dynamo.OptimizedModule):
        model = model._orig_mod
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    return dry_run(model, args, kwargs, as_config(config), check_grid(grid))


def dry_run(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    config: VMoBAConfig,
    grid: Triple | None,
    landmarks: Landmarks | None = None,
    mark: Callable[[nn.Module], None] | None = None,
    remedy: str = "use optimize() and report()",
) -> Report:
    """Trace and rewrite the whole model on fake tensors.

    It is a copy of the model that runs, so that nothing that the model keeps of a run stays in it. ``mark`` prepares that
    copy, and ``landmarks`` takes what is known at the marks in its graphs; ``remedy`` is for a model that cannot be copied
    or cannot run without values.
    """
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    rewriter = Rewriter(config, grid, _WithoutRunning(fake_mode), handover=Handover(), landmarks=landmarks)

    def fake(value: Any) -> Any:
        return fake_mode.from_tensor(value) if isinstance(value, torch.Tensor) else value

    try:
        shared = {id(x): x for x in not_copied(model) if x is not None}
        twin = copy.deepcopy(model, shared | {id(t): fake(t) for t in (*model.parameters(), *model.buffers())})
        hook_again(twin)
    except Exception as error:
        cause = str(error).strip().partition("\n")[0] or type(error).__name__
        raise RewriteError(f"{type(model).__name__} cannot be copied for a dry run ({cause}); {remedy}") from error
    if mark is not None:
        mark(twin)
    fake_args, fake_kwargs = pytree.tree_map(fake, (args, dict(kwargs)))
    compiled = compile_with(twin, rewriter, {"dynamic": False})
    try:
        # Past the limit the copy would run eagerly, and nothing would be seen.
        unlimited = torch._dynamo.config.patch(recompile_limit=2**30, accumulated_recompile_limit=2**30)
        with plainly(model, (args, kwargs)), torch.no_grad(), unlimited:
            compiled(*fake_args, **fake_kwargs)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise _needs_value(model, str(error.func), rewriter.report, remedy) from error
    except GuardOnDataDependentSymNode as error:
        raise _needs_value(model, str(error.cond), rewriter.report, remedy) from error
    except TypeError as error:
        if "SymInt" not in str(error):
            raise
        raise _needs_value(model, str(error), rewriter.report, remedy) from error
    return rewriter.report


def _needs_value(model: nn.Module, what: str, report: Report, remedy: str) -> RewriteError:
    return RewriteError(
        f"{type(model).__name__} needs a tensor's value ({what}) between two graphs, which a dry run has not; "
        f"{remedy}. Until there: {report.summary()}"
    )


class _WithoutRunning:
    """An inner compiler whose result returns fake tensors like the traced ones, for what follows a graph break."""

    def __init__(self, fake_mode: FakeTensorMode) -> None:
        self.fake_mode = fake_mode

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[torch.Tensor]) -> Any:
        outputs = gm.graph.output_node().args[0]

        def like(node: fx.Node) -> Any:
            value = node.meta.get("example_value")
            if not isinstance(value, torch.Tensor):
                return value
            with self.fake_mode:
                return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)

        return lambda *inputs: fx.map_arg(outputs, like)
