"""``torch.compile`` as every part of the package uses it, and what it raises, in a sentence."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed, TorchRuntimeError

from .backend import Inner
from .context_parallel import traceable
from .passes import InputError, RewriteError


def compile_with(model: Callable[..., Any], backend: Inner, compile_kwargs: Mapping[str, Any]) -> Any:
    """``torch.compile`` with its own room for recompilations, where this torch offers that."""
    kwargs = {name: value for name, value in compile_kwargs.items() if name not in ("mode", "options")}
    # Blocks and min_tokens belong to a size: each gets a graph of its own unless told otherwise.
    kwargs.setdefault("dynamic", False)
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        kwargs.setdefault("isolate_recompiles", True)
    return torch.compile(model, backend=backend, **kwargs)


def whole_graphs() -> Any:
    """Dynamo set to go on over a number or a length read from a tensor, where it would cut the graph: masks of text."""
    return torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True)


@contextmanager
def plainly(model: nn.Module, inputs: Any) -> Iterator[None]:
    """Around a call of compiled code: what fails in the rewrite, or in the model itself, is raised as that."""
    try:
        with whole_graphs(), traceable(model):
            yield
    except BackendCompilerFailed as error:
        if isinstance(error.inner_exception, RewriteError):
            raise error.inner_exception from None
        raise
    except TorchRuntimeError as error:
        raise input_error(model, inputs, error) from error


def input_error(model: nn.Module, inputs: Any, error: TorchRuntimeError) -> InputError:
    """One sentence for a failure of the model's own code on these inputs."""
    devices: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters():
        devices.setdefault(str(parameter.device), []).append(f"parameter {name}")
    for path, leaf in torch.utils._pytree.tree_flatten_with_path(inputs)[0]:
        if isinstance(leaf, torch.Tensor):
            name = torch.utils._pytree.keystr(path[1:]).strip("[]'")
            devices.setdefault(str(leaf.device), []).append(f"input {name}")
    if len(devices) > 1 and "device" in str(error):
        places = "; ".join(f"{names[0]} on {device}" for device, names in devices.items())
        return InputError(f"model and inputs are on several devices: {places}. Move them to one device.")
    told = re.findall(r"got \w+\(([\"'])(.*?)\1\)", str(error), re.DOTALL)
    cause = told[-1][1] if told else str(error).split("from user code:")[0].strip().splitlines()[0]
    frames = re.findall(r'File "([^"]+)", line (\d+)', str(error))
    own = [frame for frame in frames if "/torch/" not in frame[0]] or frames
    where = f" at {Path(own[-1][0]).name}:{own[-1][1]}" if own else ""
    return InputError(
        f"{type(model).__name__} itself rejects these inputs{where}: {cause}. The plain model fails alike; check the "
        "inputs' dtype, channels, and frames, height and width against the model's position table and patch size."
    )
