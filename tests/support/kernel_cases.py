"""Attention problems for the kernel tests: a description, its tensors, how to run it, a hypothesis strategy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import oracle
import torch
from hypothesis import strategies as st
from torch import Tensor
from vmoba_compile.kernels import Selection, attention, select

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYOUTS = ("contiguous", "permuted", "packed")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}  # relative norms
MASKS = ("none", "tokens", "boxes", "video", "sample")


class Tensors(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    key_mask: Tensor | None


@dataclass(frozen=True)
class Case:
    """One attention problem. ``masked`` names what the key mask removes: see :meth:`key_mask`."""

    grid: tuple[int, int, int] = (3, 4, 5)
    block: tuple[int, int, int] = (2, 2, 3)
    prefix: int = 0
    suffix: int = 0
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 8
    pool: str = "head_global"
    mode: str = "threshold"
    threshold: float = 0.25
    topk: int | None = None
    tile: int = 0  # tokens of a tile of queries: partition.TILE_OF has it too
    masked: str = "none"
    layout: str = "permuted"
    scale: float | None = None
    seed: int = 0

    @property
    def num_video(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def num_tokens(self) -> int:
        return self.prefix + self.num_video + self.suffix

    @property
    def num_queries(self) -> int:
        """That select: video tokens, or tiles of them."""
        return len(oracle.tiles(self.grid, self.block, self.tile)) if self.tile else self.num_video

    @property
    def granularity(self) -> str:
        return "tile" if self.tile else "token"

    @property
    def selection(self) -> dict[str, Any]:
        """Keyword arguments of the selection."""
        return {"pool": self.pool, "mode": self.mode, "threshold": self.threshold, "topk": self.topk}

    @property
    def layout_arguments(self) -> dict[str, int]:
        return {"prefix": self.prefix, "suffix": self.suffix}

    @property
    def sizes(self) -> tuple[int, ...]:
        """The operators' geometry arguments."""
        return (*self.grid, *self.block, self.prefix, self.suffix)

    @property
    def op_scale(self) -> float:
        return self.head_dim**-0.5 if self.scale is None else self.scale

    def but(self, **changes: Any) -> Case:
        return replace(self, **changes)

    def tensors(self, dtype: torch.dtype = torch.float64) -> Tensors:
        """Random normal q, k, v in the case's memory layout, and its key mask."""
        generator = torch.Generator().manual_seed(self.seed)
        heads = [self.heads, self.kv_heads, self.kv_heads]
        shape = (self.batch, self.num_tokens, sum(heads), self.head_dim)
        packed = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        parts = [part.transpose(1, 2) for part in packed.split(heads, dim=2)]
        if self.layout == "permuted":
            parts = [part.transpose(1, 2).contiguous().transpose(1, 2) for part in parts]
        elif self.layout == "contiguous":
            parts = [part.contiguous() for part in parts]
        return Tensors(*parts, self.key_mask(generator))

    def leaves(self, dtype: torch.dtype = torch.float64) -> Tensors:
        """The same with gradients required of q, k and v."""
        q, k, v, key_mask = self.tensors(dtype)
        return Tensors(*(x.detach().requires_grad_() for x in (q, k, v)), key_mask)

    def key_mask(self, generator: torch.Generator) -> Tensor | None:
        """Removes nothing (None), a third of the tokens, a third of the boxes, the video, or all of the last sample."""
        if self.masked == "none":
            return None
        mask = torch.ones(self.batch, self.num_tokens, dtype=torch.bool)
        video = mask[:, self.prefix : self.prefix + self.num_video]
        if self.masked == "tokens":
            mask = torch.rand(mask.shape, generator=generator) > 1 / 3
        elif self.masked == "boxes":
            for sample in range(self.batch):
                for box in oracle.boxes(self.grid, self.block):
                    video[sample, box] = torch.rand((), generator=generator).item() > 1 / 3
        elif self.masked == "video":
            video[:] = False
        else:
            mask[-1] = False
        return mask

    def truth(self, tensors: Tensors) -> Truth:
        """The oracle's selection, pairs, out and lse."""
        q, k, v, key_mask = tensors
        layout = self.layout_arguments | {"key_mask": key_mask}
        selected = oracle.select(q, k, self.grid, self.block, tile=self.tile, **layout, **self.selection)
        pairs = oracle.allowed(selected, self.grid, self.block, **layout)
        return Truth(selected, pairs, *oracle.attend(q, k, v, pairs, self.scale))


def mask_or_empty(tensors: Tensors) -> Tensor:
    """The key mask as the operators take it."""
    return torch.empty(0, dtype=torch.bool) if tensors.key_mask is None else tensors.key_mask


def choose(case: Case, tensors: Tensors) -> Selection:
    """The package's selection."""
    return select(
        *tensors[:2], case.grid, block=case.block, key_mask=tensors.key_mask, granularity=case.granularity,
        **case.layout_arguments, **case.selection,
    )  # fmt: skip


def sparse(case: Case, tensors: Tensors) -> Tensor:
    """The package's attention."""
    return attention(
        *tensors[:3], case.grid, block=case.block, key_mask=tensors.key_mask, scale=case.scale,
        granularity=case.granularity, **case.layout_arguments, **case.selection,
    )  # fmt: skip


def operator(case: Case, tensors: Tensors) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """``torch.ops.vmoba.attention``, which returns out and lse, as a function of q, k and v; the selection is fixed."""
    words, mask = choose(case, tensors).words, mask_or_empty(tensors)
    return lambda q, k, v: torch.ops.vmoba.attention(
        q, k, v, words, mask, *case.sizes, scale=case.op_scale, tile=case.tile
    )


class Truth(NamedTuple):
    selected: Tensor
    pairs: Tensor
    out: Tensor
    lse: Tensor


def relative(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of the expected, in float64; NaN where ``actual`` holds one."""
    difference = torch.linalg.vector_norm(actual.double() - expected.double())
    return (difference / torch.linalg.vector_norm(expected.double()).clamp(min=1e-300)).item()


def run_operator(
    case: Case, tensors: Tensors, implementation: str = "triton", words: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """``out`` and ``lse`` of the operator on the device, for the reference's selection or for ``words``."""
    words = choose(case, tensors).words if words is None else words
    moved = [x.to(DEVICE) for x in (*tensors[:3], words, mask_or_empty(tensors))]
    out, lse = torch.ops.vmoba.attention(
        *moved, *case.sizes, scale=case.op_scale, implementation=implementation, tile=case.tile, **options
    )
    assert out.is_contiguous()
    assert out.dtype == tensors.q.dtype
    return out.cpu(), lse.cpu()


def assert_equals_oracle(case: Case, dtype: torch.dtype, implementation: str = "triton", **options: Any) -> None:
    tensors = case.tensors(dtype)
    assert_close(run_operator(case, tensors, implementation, **options), case.truth(tensors), dtype)


def assert_close(actual: tuple[Tensor, Tensor], truth: Truth, dtype: torch.dtype) -> None:
    out, lse = actual
    finite = truth.lse.isfinite()
    assert relative(out, truth.out) < TOLERANCE[dtype]
    assert torch.equal(lse[~finite].double(), truth.lse[~finite])
    assert ((lse.double() - truth.lse)[finite].abs() < 1e-4).all()


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Small problems: ragged grids, blocks larger than the grid, one box, grouped heads, odd head sizes."""
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    pool, mode = draw(
        st.sampled_from(
            [(pool, "threshold") for pool in ("head_global", "query_head", "block", "overall")]
            + [(pool, "topk") for pool in ("head_global", "query_head", "overall")]
        )
    )
    return Case(
        grid=draw(st.tuples(*[st.integers(1, 5)] * 3)),
        block=draw(st.tuples(*[st.integers(1, 7)] * 3)),
        prefix=draw(st.integers(0, 4)),
        suffix=draw(st.integers(0, 4)),
        batch=draw(st.integers(1, 3)),
        heads=kv_heads * draw(st.sampled_from([1, 2, 3])),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([3, 8, 12, 20, 40])),
        pool=pool,
        mode=mode,
        threshold=draw(st.sampled_from([1e-9, 0.01, 0.15, 0.25, 0.5, 0.9, 0.999, 1.0, 1.5])),
        topk=draw(st.sampled_from([1, 2, 3, 7, 1000])) if mode == "topk" else None,
        masked=draw(st.sampled_from(MASKS)),
        layout=draw(st.sampled_from(LAYOUTS)),
        scale=draw(st.sampled_from([None, 0.1, 2.0])),
        seed=draw(st.integers(0, 2**16)),
    )
