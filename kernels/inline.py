"""The operators in a form that a compiler sees through: their Triton kernels become part of the compiled graph.

``vmoba::select`` and ``vmoba::attention`` are opaque, and their bodies Python: a compiled package could not hold them.
``vmoba::select_inline`` and ``vmoba::attention_inline`` run the same host code with an :class:`Inline` work, whose launches
go through ``torch.library.wrap_triton`` and whose memory is the graph's own, so that Inductor compiles the kernels into
what it makes. Kernels are the portable ones (implementation "triton"), with plain pointers in place of tensor
descriptors, which a traced launch cannot make. Nothing is recorded or replayed: a compiled graph has no need of it.

Sizes are fixed, but for the batch, which may be a symbol: all samples are then done at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton

from . import implementations, ops
from .launches import Result, Work, is_dynamic
from .partition import Geometry

_names: ContextVar[list[str] | None] = ContextVar("names of kernels", default=None)


@contextmanager
def watch() -> Iterator[list[str]]:
    """Names of the kernels whose launches are traced in this context; a launch may be traced several times."""
    names: list[str] = []
    token = _names.set(names)
    try:
        yield names
    finally:
        _names.reset(token)


class Inline(Work):
    """Launches that a tracer sees."""

    takes_descriptors = False
    memory_factor = 4  # a third of the launches, each of which is compiled

    def as_bytes(self, mask: Tensor) -> Tensor:
        return mask.to(torch.uint8)  # Inductor of torch 2.11 has no view of bool as another type

    def launch(self, kernel: Any, grid: tuple[Any, ...], *args: Any, **options: Any) -> None:
        if any(isinstance(extent, int) and not extent for extent in grid):
            return
        from triton.runtime.jit import JITFunction

        names = _names.get()
        if names is not None:
            names.append(kernel.__name__)
        options.pop("maxnreg", None)  # Inductor has no way to hand on a limit of registers
        # What Triton does anyhow is left out: a kernel with a configuration is compiled for each value of its integers.
        for name, default in (("num_warps", 4), ("num_stages", 3)):
            if options.get(name) == default:
                del options[name]
        # In Triton's interpreter there is nothing to trace.
        (wrap_triton(kernel) if isinstance(kernel, JITFunction) else kernel)[grid](*args, **options)


def _run(compute: Callable[[Work], Result], options: Hashable, *inputs: Tensor) -> Any:
    device = inputs[0].device
    if device.type != "cuda" or torch.compiler.is_compiling():
        return compute(Inline(device))
    with torch.cuda.device_of(inputs[0]):  # Triton launches on the current device
        return compute(Inline(device))


def _geometry(q: Tensor, *sizes: int) -> Geometry:
    """ValueError where the kernels cannot become part of a graph."""
    reason = _no_sizes(q, sizes) or implementations._no_triton(q)
    if reason:
        raise ValueError(
            f"the VMoBA kernels cannot become part of a graph: {reason}; vmoba::select and vmoba::attention run anywhere"
        )
    return ops._geometry(*sizes)


def _no_sizes(q: Tensor, sizes: Sequence[int]) -> str:
    if any(is_dynamic(size) for size in (*sizes, *q.shape[1:])):
        return (
            "the grid or the number of condition tokens is dynamic, and only the batch may be (compile once for each"
            " resolution and text length)"
        )
    return ""


def why_not(
    operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any], largest: Callable[[torch.SymInt], int | None]
) -> str:
    """Why ``vmoba::select`` or ``vmoba::attention`` has no inline form for these (fake) arguments; empty if it has one.

    ``largest`` tells how large a dynamic batch may become, None if it has no bound.
    """
    selects = operator is torch.ops.vmoba.select.default
    q, sizes, tile = args[0], args[3 if selects else 5 :], kwargs.get("tile", 0)
    reason = _no_sizes(q, sizes)
    if reason:
        return reason
    geometry = ops._geometry(*sizes)
    if selects:
        return implementations._no_selection(q, geometry, kwargs["pool"])
    from . import attend

    share = implementations._share(geometry, kwargs.get("threshold", 1.0), kwargs.get("topk", 0))
    reason = implementations._no_attention(q, geometry, kwargs["scale"], share, tile)
    if reason or not is_dynamic(q.shape[0]):
        return reason
    most, bound = attend.most_samples(geometry, q.shape[1], share), largest(q.shape[0])
    if bound is None or bound > most:
        given = "has no largest size" if bound is None else f"may be {bound}"
        dim = f"torch.export.Dim('batch', max={min(most, 8)})"
        return f"the batch is dynamic and {given}; give it a largest size of at most {most}, as in {dim}"
    return ""


def _select(
    q: Tensor, k: Tensor, key_mask: Tensor, t: int, h: int, w: int, bt: int, bh: int, bw: int, prefix: int, suffix: int, *,
    pool: str, mode: str, threshold: float, topk: int, tile: int = 0,
) -> Tensor:  # fmt: skip
    """As ``vmoba::select`` by "triton"."""
    return implementations.select(
        q, k, key_mask, _geometry(q, t, h, w, bt, bh, bw, prefix, suffix), pool=pool, mode=mode, threshold=threshold,
        topk=topk, implementation="triton", tile=tile, run=_run,
    )  # fmt: skip


def _attention(
    q: Tensor, k: Tensor, v: Tensor, selected: Tensor, key_mask: Tensor, t: int, h: int, w: int, bt: int, bh: int, bw: int,
    prefix: int, suffix: int, *, scale: float, threshold: float = 1.0, topk: int = 0, tile: int = 0, pool: str = "overall",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As ``vmoba::attention`` by "triton"."""
    return implementations.attention(
        q, k, v, selected, key_mask, _geometry(q, t, h, w, bt, bh, bw, prefix, suffix), scale=scale, threshold=threshold,
        topk=topk, implementation="triton", tile=tile, pool=pool, run=_run,
    )  # fmt: skip


select: Any = triton_op("vmoba::select_inline", _select, mutates_args=())
attention: Any = triton_op("vmoba::attention_inline", _attention, mutates_args=())
# The fake kernels of the operators: else every look at a shape would walk through all launches.
select.register_fake(ops._select_fake)
attention.register_fake(ops._attention_fake)
