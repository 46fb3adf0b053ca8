"""Which implementation runs: by name, or the fastest one that takes the tensors.

``reference`` is plain torch on any device. ``triton`` runs on GPUs (and on a CPU under ``TRITON_INTERPRET=1``).
``hopper`` attends with a kernel for compute capability 9.0; its selection is the same as ``triton``'s. A name never
gives another implementation than it says; ``auto`` takes ``hopper``, else ``triton``, else ``reference``.

On a GPU the launches of a call are recorded and replayed, see ``launches``: everything here is decided on the first call
with the same shapes, strides and options, and the later ones reach their launches by one look-up.

Triton is imported where it is first needed: machines without it have the reference.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from . import partition, reference_attention, reference_select
from .launches import Plans, Result, Work
from .partition import Geometry, per_token

IMPLEMENTATIONS = ("auto", "reference", "triton", "hopper")
DEVICES = ("cpu", "cuda")

MAX_HEAD_DIM = 256
MAX_ROW_BOXES = 2048  # pool "query_head" keeps a row of the gate in registers, and its means in shared memory
LARGE_SHARED = 160 * 1024  # bytes; with less, rows are half as long and float32 heads at most 128

PLANS = Plans()  # of both operators on all GPUs


def select(
    q: Tensor, k: Tensor, key_mask: Tensor, geometry: Geometry, *,
    pool: str, mode: str, threshold: float, topk: int, implementation: str, tile: int,
    run: Callable[..., Any] | None = None,
) -> Tensor:  # fmt: skip
    """Bit sets int32 [B, H, N, ceil(C / 32)], of tiles [B, H, M, W]; see the operator ``vmoba::select``.

    ``run`` computes, as :func:`_run` does, where another kind of work is wanted than on the operators' own way.
    """
    check_tile(tile, implementation)
    rule: dict[str, Any] = {"pool": pool, "mode": mode, "threshold": threshold, "topk": topk, "tile": tile}
    check_mask(key_mask, q)
    q, k = _with_rows(q), _with_rows(k)

    def compute(work: Work) -> Tensor:
        if _resolve(implementation, lambda: _no_selection(q, geometry, pool)) == "reference":
            with torch.autocast(q.device.type, enabled=False):
                return reference_select.select(q, k, key_mask, geometry, **rule)
        from . import select_triton

        return select_triton.select(work, q, k, key_mask, geometry, **rule)

    return (run or _run)(compute, ("select", implementation, geometry, *rule.values()), q, k, key_mask)


def attention(
    q: Tensor, k: Tensor, v: Tensor, selected: Tensor, key_mask: Tensor, geometry: Geometry, *,
    scale: float, threshold: float, topk: int, implementation: str, tile: int, pool: str,
    run: Callable[..., Any] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``out`` [B, H, S, D] and ``lse`` [B, H, S]; see the operator ``vmoba::attention``. ``run`` is that of select."""
    check_tile(tile, implementation)
    check_selected(selected, q, geometry, tile)
    check_mask(key_mask, q)
    q, k, v = _with_rows(q), _with_rows(k), _with_rows(v)
    selected, key_mask = selected.contiguous(), key_mask.contiguous()

    def compute(work: Work) -> tuple[Tensor, Tensor]:
        share = _share(geometry, threshold, topk)
        name = _resolve(implementation, lambda: _no_attention(q, geometry, scale, share, tile))
        if name == "reference":
            with torch.autocast(q.device.type, enabled=False):
                return reference_attention.attention(q, k, v, selected, key_mask, geometry, scale, tile)
        from . import attend

        if implementation == "auto":
            name = "hopper" if not (tile or attend.why_not_hopper(q, k, v)) else "triton"
        return attend.attention(
            work,
            q,
            k,
            v,
            selected,
            key_mask,
            geometry,
            scale,
            implementation=name,
            share=share,
            tile=tile,
            by_head=pool in ("head_global", "query_head"),
        )

    options = ("attention", implementation, geometry, scale, threshold, topk, tile, pool)
    return (run or _run)(compute, options, q, k, v, selected, key_mask)


def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, selected: Tensor, key_mask: Tensor, out: Tensor, lse: Tensor,
    dlse: Tensor, geometry: Geometry, *,
    scale: float, threshold: float, topk: int, implementation: str, tile: int, pool: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``dq``, ``dk`` and ``dv``; see the operator ``vmoba::attention_backward``."""
    check_tile(tile, "auto")
    check_selected(selected, q, geometry, tile)
    check_mask(key_mask, q)
    share = 1.0 if tile else _share(geometry, threshold, topk)  # what tiles select has no such bound
    by_head = share >= 1 or pool in ("head_global", "query_head")  # where all may be selected the bound is each head's
    together = q.shape[1] // k.shape[1] if by_head else q.shape[1]
    name = _resolve(implementation, lambda: _no_attention(q, geometry, scale, share, heads=together))
    if name != "reference":
        dout = dout.to(q.dtype)
        dout, q, k, v = _with_wide_rows(dout), _with_rows(q), _with_rows(k), _with_rows(v)
        selected, key_mask = per_token(selected, geometry, tile).contiguous(), key_mask.contiguous()
        out, lse, dlse = out.contiguous(), lse.contiguous(), dlse.contiguous()

    def compute(work: Work) -> tuple[Tensor, Tensor, Tensor]:
        if name == "reference":
            # Autocast reaches into an operator's body, where it would turn the float32 products into 16-bit ones.
            with torch.autocast(q.device.type, enabled=False):
                return reference_attention.attention_backward(
                    dout, q, k, v, selected, key_mask, out, lse, dlse, geometry, scale, tile
                )
        from . import attend

        here = name
        if implementation == "auto":
            here = "triton" if attend.why_not_hopper(q, k, v) else "hopper"
        return attend.attention_backward(
            work, dout, q, k, v, selected, key_mask, out, lse, dlse, geometry, scale,
            implementation=here, share=share, by_head=by_head,
        )  # fmt: skip

    options = ("attention_backward", implementation, geometry, scale, threshold, topk, tile, pool)
    return _run(compute, options, dout, q, k, v, selected, key_mask, out, lse, dlse)


def _with_rows(x: Tensor) -> Tensor:
    """The kernels read whole rows: their last stride is 1."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _with_wide_rows(x: Tensor) -> Tensor:
    """As :func:`_with_rows`, for what the user cannot lay out: a gradient. Copied where it does not suit all kernels."""
    aligned = x.data_ptr() % 16 == 0 and all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:3])
    suits = x.stride(-1) == 1 and aligned and x.shape[2] * x.stride(2) < 2**31
    return x if suits else x.clone(memory_format=torch.contiguous_format)


def _run(compute: Callable[[Work], Result], options: Hashable, *inputs: Tensor) -> Any:
    if not inputs[0].is_cuda:
        return compute(Work(inputs[0].device))
    with torch.cuda.device_of(inputs[0]):  # Triton launches on the current device
        return PLANS.run(options, inputs, compute)


def _share(geometry: Geometry, threshold: float, topk: int) -> float:
    """What the selection kept at most of the other boxes' entries: it bounds its pairs, and with them the buffers."""
    if topk:
        return (min(topk, geometry.num_boxes) - 1) / max(1, geometry.num_boxes - 1)
    return 1.0 if threshold > 0.99 else threshold


def check_tile(tile: int, implementation: str) -> None:
    """ValueError unless tiles of queries may have this size, and the implementation, if named, takes them."""
    if tile and tile not in partition.TILE_SIZES:
        sizes = " or ".join(map(str, partition.TILE_SIZES))
        raise ValueError(f"tile must be 0 (every query selects for itself) or {sizes} tokens, not {tile}")
    if tile and implementation == "hopper":
        raise ValueError(
            "implementation='hopper' takes granularity='token' alone for now; for granularity='tile' use 'auto' or"
            " 'triton'"
        )


def check_selected(selected: Tensor, q: Tensor, geometry: Geometry, tile: int) -> None:
    """ValueError unless the bit sets have the shape that the kernels read."""
    shape = (*q.shape[:2], geometry.by_tile(tile).num_video, geometry.num_words)
    if selected.shape != shape:
        rows = f"tiles of {tile} tokens" if tile else "video queries"
        raise ValueError(
            f"selected must be [batch, heads, {rows}, words] = {list(shape)}, not {list(selected.shape)};"
            " give select and attention the same sizes and the same tile"
        )


def check_mask(key_mask: Tensor, q: Tensor) -> None:
    """ValueError unless the mask has the shape that the kernels read: [batch, tokens], or no elements."""
    if key_mask.numel() and key_mask.shape != (q.shape[0], q.shape[2]):
        raise ValueError(
            f"key_mask must be [batch, tokens] = [{q.shape[0]}, {q.shape[2]}], or without elements, not"
            f" {list(key_mask.shape)}"
        )


def _resolve(implementation: str, why_not_triton: Callable[[], str]) -> str:
    """The named implementation, or for ``auto`` "triton" where it can run; ValueError where a named one cannot."""
    if implementation not in IMPLEMENTATIONS:
        known = ", ".join(map(repr, IMPLEMENTATIONS))
        raise ValueError(f"implementation must be one of {known}, not {implementation!r}")
    if implementation == "reference":
        return implementation
    reason = why_not_triton()
    if implementation == "auto":  # the interpreter is for tests that ask for it
        return "reference" if reason or os.environ.get("TRITON_INTERPRET") == "1" else "triton"
    if reason:
        raise ValueError(f"implementation={implementation!r} cannot run: {reason}; use 'auto' or 'reference'")
    return implementation


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _no_triton(q: Tensor) -> str:
    if q.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "the tensors are on the CPU"
    if not _has_triton():
        return "triton is not installed"
    if q.dtype == torch.float64:
        return "it takes float16, bfloat16 and float32, not float64"
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"it takes head sizes up to {MAX_HEAD_DIM}, not {q.shape[-1]}"
    return ""


def _has_large_shared(q: Tensor) -> bool:
    # Of what is recorded for another machine, ``aot`` knows how much each kernel needs.
    return q.device.type in ("cpu", "meta") or _shared_memory(q.device.index) >= LARGE_SHARED


@cache
def _shared_memory(index: int) -> int:
    """Bytes of shared memory that one program may have on a GPU."""
    from triton.runtime import driver

    return driver.active.utils.get_device_properties(index)["max_shared_mem"]


def _no_selection(q: Tensor, geometry: Geometry, pool: str) -> str:
    reason = _no_triton(q)
    if not reason and q.numel() == 0:
        return "there is nothing to select for"
    if not reason and pool == "query_head":
        most = MAX_ROW_BOXES if _has_large_shared(q) else MAX_ROW_BOXES // 2
        if geometry.num_boxes > most:
            return f"pool 'query_head' takes up to {most} boxes, not {geometry.num_boxes} (larger blocks have fewer)"
    return reason


def _no_attention(
    q: Tensor, geometry: Geometry, scale: float, share: float, tile: int = 0, heads: int | None = None
) -> str:
    """Why the Triton kernels cannot attend; at least ``heads`` are done at a time, all of a sample's if None."""
    reason = _no_triton(q)
    if reason:
        return reason
    from . import attend, attend_lists

    if q.numel() == 0:
        return "there is nothing to attend"
    if not scale > 0:
        return f"it takes a scale greater than 0, not {scale}"
    if geometry.num_tokens >= attend_lists.MAX_TOKENS or geometry.num_boxes >= attend_lists.MAX_BOXES:
        return (
            f"it takes fewer than {attend_lists.MAX_TOKENS} tokens and {attend_lists.MAX_BOXES} boxes, not "
            f"{geometry.num_tokens} and {geometry.num_boxes} (larger blocks have fewer)"
        )
    pairs = 0 if tile else attend.pair_capacity(geometry, heads or q.shape[1], share)
    if pairs >= 2**31:
        return f"it takes fewer than 2**31 pairs of a query and a box at a time, not {pairs} (larger blocks have fewer)"
    if q.dtype == torch.float32 and q.shape[-1] > 128 and not _has_large_shared(q):
        return f"on this GPU it takes float32 head sizes up to 128, not {q.shape[-1]}: its shared memory is small"
    return ""
