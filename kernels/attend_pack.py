"""Keys and values of a few heads at a time in box order, as the portable kernels read them.

Every box is padded with zeros to whole blocks of keys, so that an inner loop reads whole tiles through tensor descriptors
(TMA where the hardware has it) and never a row of another box. Video boxes start ``stride`` rows apart; the condition
tokens, one more box, follow behind the last. Masked keys are left out: ``attend_lists`` lists the others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .launches import Work
from .partition import Geometry


def packed_rows(geometry: Geometry, block: int) -> tuple[int, int]:
    """Rows from one video box to the next, and rows of a head; both whole blocks."""
    stride = triton.cdiv(geometry.box_size, block) * block
    return stride, geometry.num_boxes * stride + triton.cdiv(geometry.num_condition, block) * block


@triton.jit(do_not_specialize=["first_head", "kv_heads", "tokens", "boxes", "stride", "rows", "masked"])
def pack_keys(
    K, V, KEYS, SPAN, PACKED_K, PACKED_V, k_batch, k_head, k_token, v_batch, v_head, v_token,
    first_head, kv_heads, tokens, boxes, stride, rows, masked,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Some rows of one head; zeros behind the last key of a box. A run-time head size would keep loads from being wide."""
    head = first_head + tl.program_id(1).to(tl.int64)
    sample, of_sample = head // kv_heads, head % kv_heads
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, D)
    box = tl.minimum(row // stride, boxes - 1)
    r = row - box * stride
    span = SPAN + ((sample * masked) * boxes + box) * 2
    inside = row < rows
    first, size = tl.load(span, mask=inside, other=0), tl.load(span + 1, mask=inside, other=0)
    token = tl.load(KEYS + sample * masked * tokens + first + r, mask=r < size, other=0).to(tl.int64)
    read = (r < size)[:, None] & (d < HEAD_DIM)[None, :]
    at = (tl.program_id(1).to(tl.int64) * rows + row)[:, None] * D + d[None, :]
    k = tl.load(K + sample * k_batch + of_sample * k_head + token[:, None] * k_token + d[None, :], mask=read, other=0.0)
    tl.store(PACKED_K + at, k, mask=inside[:, None])
    v = tl.load(V + sample * v_batch + of_sample * v_head + token[:, None] * v_token + d[None, :], mask=read, other=0.0)
    tl.store(PACKED_V + at, v, mask=inside[:, None])


class PackedKeys:
    """Room for the packed keys and values of up to ``together`` heads, and what :meth:`fill` needs to pack them.

    ``k``, ``v`` [B, Hkv, S, D] with last stride 1; ``listed`` and ``span`` as ``attend_lists.list_all_keys`` makes them;
    ``dim`` is the padded head size. ``keys`` and ``values`` are what ``describe`` makes of blocks [block, dim] of rows
    [together * rows, dim], or these rows themselves where launches take plain pointers alone.
    """

    def __init__(
        self, work: Work, k: Tensor, v: Tensor, listed: Tensor, span: Tensor, geometry: Geometry, *, block: int,
        dim: int, together: int, describe: Callable[..., Any] = TensorDescriptor.from_tensor,
    ) -> None:  # fmt: skip
        self.stride, self.rows = packed_rows(geometry, block)
        self._work, self._inputs = work, (k, v, listed, span)
        self._buffers = tuple(work.empty(together * self.rows, dim, dtype=k.dtype) for _ in range(2))
        self.keys, self.values = (describe(x, [block, dim]) if work.takes_descriptors else x for x in self._buffers)

    def fill(self, first: int, count: int) -> None:
        """Pack heads ``first`` to ``first + count`` of all samples' heads."""
        k, v, listed, span = self._inputs
        _, kv_heads, tokens, head_dim = k.shape
        self._work.launch(
            pack_keys, (triton.cdiv(self.rows, 64), count), k, v, listed, span, *self._buffers, *k.stride()[:3],
            *v.stride()[:3], first, kv_heads, tokens, span.shape[1], self.stride, self.rows, int(span.shape[0] > 1),
            BLOCK=64, HEAD_DIM=head_dim, D=self._buffers[0].shape[1], num_warps=4,
        )  # fmt: skip
