"""Checked entry points for one's own model: ``attention`` and ``select``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import ops  # noqa: F401 - registers torch.ops.vmoba
from .implementations import DEVICES, IMPLEMENTATIONS, check_tile
from .partition import TILE_OF, Geometry, Triple, box_order, per_token, queries_per_box, unpack_bits

POOLS = ("head_global", "query_head", "block", "overall")
MODES = ("threshold", "topk")
GRANULARITIES = tuple(TILE_OF)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Selection:
    """Boxes selected per video query: ``words`` int32 [B, H, N, ceil(C / 32)] and the geometry they belong to.

    With ``tile`` tokens a tile (``granularity="tile"``) ``words`` [B, H, M, W] has a row for every tile of queries.
    """

    words: Tensor
    geometry: Geometry
    tile: int = 0

    def mask(self) -> Tensor:
        """Bool [B, H, N, C]: True where the query attends to the box. Of DTensors, gathered."""
        return unpack_bits(per_token(_gathered(self.words), self.geometry, self.tile), self.geometry.num_boxes)

    def density(self) -> Tensor:
        """Kept fraction of the N x N video pairs, float32 [B, H]. Pairs with condition tokens are always kept.

        Of DTensors, gathered.
        """
        words = _gathered(self.words)
        _, starts = box_order(self.geometry.grid, self.geometry.block)
        sizes = torch.diff(torch.tensor(starts, device=words.device)).double()
        heads = words.flatten(0, 1)
        kept = [queries_per_box(rows, self.geometry, self.tile).double() @ sizes for rows in heads]
        return (torch.stack(kept) / self.geometry.num_video**2).float().view(words.shape[:2])


def _gathered(x: Tensor) -> Tensor:
    """The whole of a DTensor, on every rank; other tensors as they are."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def check_selection(
    *,
    pool: str,
    mode: str,
    threshold: float,
    topk: int | None,
    granularity: str = "token",
    implementation: str = "auto",
) -> None:
    """Raise ValueError or TypeError unless the selection's options are known and fit together."""
    for name, value, known in (
        ("pool", pool, POOLS),
        ("mode", mode, MODES),
        ("granularity", granularity, GRANULARITIES),
        ("implementation", implementation, IMPLEMENTATIONS),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, not {value!r}")
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
        raise TypeError(f"threshold must be a number, not {type(threshold).__name__}")
    if not threshold > 0:
        raise ValueError(f"threshold must be greater than 0 (1 or more selects everything), not {threshold}")
    if topk is not None and (isinstance(topk, bool) or not isinstance(topk, int)):
        raise TypeError(f"topk must be an int or None, not {type(topk).__name__}")
    if mode == "topk":
        if topk is None or topk < 1:
            raise ValueError(f"mode='topk' needs topk of at least 1 (the query's own box counts as one), not {topk}")
        if pool == "block":
            raise ValueError("pool='block' has no top-k rule; use mode='threshold' or another pool")
    check_tile(TILE_OF[granularity], implementation)


def triple(name: str, value: object) -> Triple:
    """``value`` as (frames, rows, columns), all at least 1."""
    if not isinstance(value, (tuple, list, torch.Size)) or len(value) != 3:
        raise ValueError(f"{name} must be three integers (frames, rows, columns), not {value!r}")
    for size in value:
        if isinstance(size, bool) or not isinstance(size, (int, torch.SymInt)):
            raise TypeError(f"{name} must hold integers, not {type(size).__name__} in {value!r}")
        if isinstance(size, int) and size < 1:
            raise ValueError(f"{name} must hold integers of at least 1, not {value!r}")
    return (value[0], value[1], value[2])


def _require_tensors(**named: object) -> None:
    for name, x in named.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, not {type(x).__name__}")


def _check_tensors(q: Tensor, k: Tensor, v: Tensor | None, key_mask: Tensor | None, geometry: Geometry) -> None:
    named = {"q": q, "k": k} | ({} if v is None else {"v": v})
    for name, x in named.items():
        if x.dim() != 4:
            raise ValueError(f"{name} must be [batch, heads, tokens, head_dim], not {list(x.shape)}")
        if x.dtype not in DTYPES or x.dtype != q.dtype:
            raise TypeError(
                f"q, k and v must share one dtype of float16, bfloat16, float32 and float64; {name} is {x.dtype}, "
                f"q is {q.dtype}"
            )
        if x.device != q.device:
            raise ValueError(f"q, k and v must be on one device; {name} is on {x.device}, q on {q.device}")
        if x.shape[0] != q.shape[0] or x.shape[2:] != q.shape[2:]:
            raise ValueError(f"{name} {list(x.shape)} does not match q {list(q.shape)} in batch, tokens or head_dim")
    if v is not None and v.shape != k.shape:
        raise ValueError(f"k {list(k.shape)} and v {list(v.shape)} must have one shape")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"the {q.shape[1]} query heads are not a multiple of the {k.shape[1]} key heads")
    for name, count in (("prefix", geometry.prefix), ("suffix", geometry.suffix)):
        if isinstance(count, bool) or not isinstance(count, (int, torch.SymInt)):
            raise TypeError(f"{name} must be an integer, not {type(count).__name__}")
    if geometry.prefix < 0 or geometry.suffix < 0:
        raise ValueError(f"prefix and suffix must not be negative, not {geometry.prefix} and {geometry.suffix}")
    if q.shape[2] != geometry.num_tokens:
        raise ValueError(
            f"grid {geometry.grid} has {geometry.num_video} tokens and prefix + suffix {geometry.num_condition}, "
            f"but q has {q.shape[2]}"
        )
    if key_mask is not None:
        if key_mask.dtype != torch.bool:
            raise TypeError(f"key_mask must be bool (True: may be attended), not {key_mask.dtype}")
        if key_mask.shape != (q.shape[0], q.shape[2]):
            raise ValueError(
                f"key_mask must be [batch, tokens] = {[q.shape[0], q.shape[2]]}, not {list(key_mask.shape)}"
            )
        if key_mask.device != q.device:
            raise ValueError(f"key_mask is on {key_mask.device}, q on {q.device}")


def _refuse_transforms(*tensors: Tensor) -> None:
    """Derivatives that the operator lacks would be an obscure error, or zero where nothing requires a gradient."""
    if torch.compiler.is_compiling():  # traced where neither exists
        return
    functorch = torch._C._functorch
    kinds = {level.level(): level.key() for level in functorch.get_interpreter_stack() or []}
    asked = {kinds.get(functorch.maybe_get_level(x)) for x in tensors if functorch.is_gradtrackingtensor(x)}
    if functorch.TransformType.Grad in asked:
        raise RuntimeError(
            "vmoba::attention cannot be differentiated by torch.func (grad, vjp, jacrev); use torch.autograd.grad or"
            " backward()"
        )
    dual = any(torch.autograd.forward_ad.unpack_dual(x).tangent is not None for x in tensors)
    if dual or functorch.TransformType.Jvp in asked:
        raise NotImplementedError(
            "vmoba::attention has no derivative in forward mode (forward mode AD: torch.func.jvp, make_dual); use"
            " backward mode, or dense attention"
        )


def select(
    q: Tensor,
    k: Tensor,
    grid: Triple,
    *,
    block: Triple,
    prefix: int = 0,
    suffix: int = 0,
    key_mask: Tensor | None = None,
    pool: str = "head_global",
    mode: str = "threshold",
    threshold: float = 0.25,
    topk: int | None = None,
    granularity: str = "token",
    implementation: str = "auto",
) -> Selection:
    """Choose the boxes that each video query attends to (arXiv 2506.23858, sections 3.2 to 3.4).

    Args:
        q: queries [B, H, S, D], float16, bfloat16, float32 or float64, any strides.
        k: keys [B, Hkv, S, D]; Hkv divides H.
        grid: (frames, rows, columns) of the video tokens, in tokens.
        block: (frames, rows, columns) of one box, in tokens.
        prefix, suffix: condition tokens before and after the video tokens; S = prefix + N + suffix.
        key_mask: bool [B, S], True where a key may be attended; masked video keys do not count in the box means.
        pool: entries compete within one head ("head_global"), one query ("query_head"), one box ("block") or one sample
            ("overall").
        mode: "threshold" takes entries until they hold ``threshold`` of the pool's weight; "topk" takes ``topk``
            boxes a query (on average over the pool), the query's own box included.
        granularity: "token", the paper's rule: every query selects for itself. "tile" is not the paper's exact rule: every
            box, ragged ones too, is cut in its own token order (raster order within the box) into P = ceil(tokens of a
            whole box / 128) nearly equal tiles of at most 128 queries, the r-th of n tokens in tile ``r * P // n``. The
            rule is applied to the mean query of each tile (in float32, rounded to q's dtype) as if it were one query,
            every tile counting once, and all queries of a tile attend to the same boxes: attention then has no partial
            results to merge. A tile without tokens, in a box of fewer than P, takes the token before it in its box.
            Ties go in ascending order of (box, tile), tiles as ``partition.tile_of`` numbers them.
        implementation: "reference" (plain torch), "triton" (portable kernels for GPUs), "hopper" (attention for compute
            capability 9.0, granularity "token" alone) or "auto", the fastest that takes the tensors; by name never
            another one.

    Returns:
        The selection, on q's device. No gradient flows through it.

    Raises:
        ValueError, TypeError: an argument is out of range, of the wrong type, or does not fit the others.
    """
    _require_tensors(q=q, k=k)
    check_selection(
        pool=pool, mode=mode, threshold=threshold, topk=topk, granularity=granularity, implementation=implementation
    )
    geometry = Geometry(triple("grid", grid), triple("block", block), prefix, suffix)
    _check_tensors(q, k, None, key_mask, geometry)
    mask, tile = _mask_or_empty(q, key_mask), TILE_OF[granularity]
    words = _select(q, k, mask, geometry, pool, mode, threshold, topk, implementation, tile)
    return Selection(words, geometry, tile)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Triple,
    *,
    block: Triple,
    prefix: int = 0,
    suffix: int = 0,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    pool: str = "head_global",
    mode: str = "threshold",
    threshold: float = 0.25,
    topk: int | None = None,
    granularity: str = "token",
    implementation: str = "auto",
) -> Tensor:
    """VMoBA sparse attention (arXiv 2506.23858): softmax over the selected boxes and the condition tokens.

    Args:
        v: values [B, Hkv, S, D]. q, k, the grid and the selection's options are as in :func:`select`.
        scale: factor on the scores, ``D ** -0.5`` unless given.

    Returns:
        [B, H, S, D] in q's dtype (in the autocast dtype under autocast), contiguous. A video query attends to the
        tokens of its boxes and to every condition token, a condition query to everything. Differentiable once in q,
        k and v.

    Raises:
        ValueError, TypeError: an argument is out of range, of the wrong type, or does not fit the others.
    """
    _require_tensors(q=q, k=k, v=v)
    device = q.device.type
    # Asked of devices with an implementation only: autocast knows no others, such as meta.
    if device in DEVICES and torch.is_autocast_enabled(device) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    geometry = Geometry(triple("grid", grid), triple("block", block), prefix, suffix)
    _check_tensors(q, k, v, key_mask, geometry)
    check_selection(
        pool=pool, mode=mode, threshold=threshold, topk=topk, granularity=granularity, implementation=implementation
    )
    _refuse_transforms(q, k, v)
    mask, tile = _mask_or_empty(q, key_mask), TILE_OF[granularity]
    words = _select(q, k, mask, geometry, pool, mode, threshold, topk, implementation, tile)
    return torch.ops.vmoba.attention(
        q, k, v, words, mask, *geometry.grid, *geometry.block, prefix, suffix,
        scale=float(q.shape[-1] ** -0.5 if scale is None else scale), implementation=implementation,
        threshold=float(threshold) if mode == "threshold" else 1.0, topk=(topk or 0) if mode == "topk" else 0,
        tile=tile, pool=pool,
    )[0]  # fmt: skip


def _select(
    q: Tensor, k: Tensor, mask: Tensor, geometry: Geometry, pool: str, mode: str, threshold: float, topk: int | None,
    implementation: str, tile: int,
) -> Tensor:  # fmt: skip
    # Detached rather than under no_grad, which an exported program shows as a nested graph.
    return torch.ops.vmoba.select(
        q.detach(), k.detach(), mask, *geometry.grid, *geometry.block, geometry.prefix, geometry.suffix,
        pool=pool, mode=mode, threshold=float(threshold), topk=topk or 0, implementation=implementation, tile=tile,
    )  # fmt: skip


def _mask_or_empty(q: Tensor, key_mask: Tensor | None) -> Tensor:
    return q.new_empty(0, dtype=torch.bool) if key_mask is None else key_mask
