"""diffusers' context parallelism (Ulysses), such that Dynamo captures all of it in one graph, and with gradients.

Three things of diffusers cut the graph, and none of them computes anything: hooks look their arguments up in a signature
at the first call, they log, and the autograd function around an attention keeps options for its backward on ``ctx``,
which Dynamo does not trace where gradients are needed. The first is done before, the second is ignored, and in the
place of the third stand the exchanges and the attention themselves, which autograd differentiates.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

_DISPATCH = "diffusers.models.attention_dispatch"
_REPLACED = "TemplatedUlyssesAttention"


@contextmanager
def traceable(model: nn.Module) -> Iterator[None]:
    """Around a call of compiled code; changes nothing where no group of processes or no diffusers is there."""
    dispatch: Any = sys.modules.get(_DISPATCH)
    if dispatch is None or not (dist.is_available() and dist.is_initialized()):
        yield
        return
    from .ulysses import Ulysses

    _look_up_arguments(model)
    quiet = {getattr(logging.Logger, name, None) for name in ("warning_once", "warning", "info", "debug")} - {None}
    config = torch._dynamo.config
    original = getattr(dispatch, _REPLACED, None)
    with config.patch(ignore_logging_functions=config.ignore_logging_functions | quiet):
        if original is None or not torch.is_grad_enabled():
            yield
            return
        setattr(dispatch, _REPLACED, Ulysses)
        try:
            yield
        finally:
            setattr(dispatch, _REPLACED, original)


def _look_up_arguments(model: nn.Module) -> None:
    for module in model.modules():
        hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
        for hook in hooks.values():
            metadata = getattr(hook, "module_forward_metadata", None)
            if getattr(metadata, "cached_parameter_indices", ()) is None:
                names = list(inspect.signature(metadata._cls.forward).parameters)[1:]
                metadata._get_parameter_from_args_kwargs(names[0], [None] * len(names), {})
