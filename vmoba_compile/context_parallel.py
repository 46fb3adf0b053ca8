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

from .backend import warn

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
    with _without_metrics(), config.patch(ignore_logging_functions=config.ignore_logging_functions | quiet):
        if original is None or not torch.is_grad_enabled():
            yield
            return
        setattr(dispatch, _REPLACED, Ulysses)
        try:
            yield
        finally:
            setattr(dispatch, _REPLACED, original)


def check_degrees(model: nn.Module) -> None:
    """ValueError where diffusers cannot share the heads out; a warning where it shares the keys out."""
    parallel: Any = getattr(getattr(model, "_parallel_config", None), "context_parallel_config", None)
    ranks, ring = getattr(parallel, "ulysses_degree", None) or 1, getattr(parallel, "ring_degree", None) or 1
    heads = getattr(getattr(model, "config", None), "num_attention_heads", None)
    if isinstance(heads, int) and heads % ranks and not getattr(parallel, "ulysses_anything", False):
        raise ValueError(
            f"{heads} attention heads cannot be shared out by ulysses_degree={ranks}; take a number of processes that"
            " divides them"
        )
    if ring > 1:
        warn(
            f"vmoba_compile: ring_degree={ring} leaves all attention dense (ring_attention), since boxes are selected over"
            " whole sequences; share heads out instead, with ulysses_degree"
        )


@contextmanager
def _without_metrics() -> Iterator[None]:
    """PyTorch's record of a compilation sorts that set of functions (before 2.13), and logs at length that it cannot."""
    logger = logging.getLogger("torch._dynamo.metrics_context")
    logger.addFilter(_worth_logging)
    try:
        yield
    finally:
        logger.removeFilter(_worth_logging)


def _worth_logging(record: logging.LogRecord) -> bool:
    """Not so: the failure to sort functions."""
    return not (
        record.exc_info and isinstance(record.exc_info[1], TypeError) and "'function'" in str(record.exc_info[1])
    )


def _look_up_arguments(model: nn.Module) -> None:
    for registry in _registries(model):
        for hook in registry.hooks.values():
            metadata: Any = getattr(hook, "module_forward_metadata", None)
            if getattr(metadata, "cached_parameter_indices", ()) is None:
                names = list(inspect.signature(metadata._cls.forward).parameters)[1:]
                metadata._get_parameter_from_args_kwargs(names[0], [None] * len(names), {})


def _registries(model: nn.Module) -> Iterator[Any]:
    """diffusers' hooks on the modules of a model."""
    for module in model.modules():
        registry = vars(module).get("_diffusers_hook")
        if getattr(registry, "hooks", None):
            yield registry


def not_copied(model: nn.Module) -> Iterator[Any]:
    """What a copy of the model has in common with it: groups of processes cannot be copied."""
    for module in model.modules():
        for holder in (module, getattr(module, "processor", None)):
            yield getattr(holder, "_parallel_config", None)
    for registry in _registries(model):
        for hook in registry.hooks.values():
            yield getattr(hook, "parallel_config", None)


def hook_again(twin: nn.Module) -> None:
    """Hooks of a copied model as its own: copied functions still call the modules of the model that was copied.

    Those of context parallelism alone: what other hooks do when they are registered is not for a copy.
    """
    for registry in _registries(twin):
        if not all(hasattr(hook, "parallel_config") for hook in registry.hooks.values()):
            continue
        hooks = [(name, registry.hooks[name]) for name in registry._hook_order]
        first = registry._fn_refs[0]
        module = registry._module_ref
        module.forward = first.original_forward or first.forward
        for known in (registry.hooks, registry._hook_order, registry._fn_refs):
            known.clear()
        for name, hook in hooks:
            registry.register_hook(hook, name)
    _look_up_arguments(twin)
