"""``explain``: what ``optimize`` would do, without computing anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.exc import BackendCompilerFailed, TorchRuntimeError
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils import _pytree as pytree

from .backend import Rewriter, check_grid
from .config import VMoBAConfig
from .kernels.partition import Triple
from .optimize import _as_config, _input_error, compile_with
from .passes import Report, RewriteError


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
    rewriter = Rewriter(_as_config(config), check_grid(grid), _without_running)
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(value: Any) -> Any:
        return fake_mode.from_tensor(value) if isinstance(value, torch.Tensor) else value

    tensors = {name: fake(t) for name, t in (*model.named_parameters(), *model.named_buffers())}
    fake_args, fake_kwargs = pytree.tree_map(fake, (args, kwargs))
    compiled = compile_with(model, rewriter, {"dynamic": False})
    try:
        with _reparametrize_module(model, tensors), torch.no_grad():
            compiled(*fake_args, **fake_kwargs)
    except BackendCompilerFailed as error:
        if isinstance(error.inner_exception, RewriteError):
            raise error.inner_exception from None
        raise
    except TorchRuntimeError as error:
        raise _input_error(model, (args, kwargs), error) from error
    return rewriter.report


def _without_running(gm: fx.GraphModule, example_inputs: Sequence[torch.Tensor]) -> Any:
    """An inner compiler whose result returns the traced example values."""
    outputs = gm.graph.output_node().args[0]

    def run(*inputs: Any) -> Any:
        return fx.map_arg(outputs, lambda node: node.meta.get("example_value"))  # type: ignore[arg-type]

    return run
