"""Mean key of every box on the GPU, as terms that tensor cores multiply without losing float32 accuracy.

A box may hold one token or fifteen thousand (a temporal slab), so each is cut into pieces of at most ``PIECE`` tokens:
some thousand programs add one piece each, and a second kernel joins the pieces in a fixed order. ``PIECE`` of 256 keeps
every SM busy from 24 boxes of a video upwards; ``ROWS`` x head_dim keys are in flight at a time, 64 values a thread.

The mean of 16-bit keys needs the 24 bits of a float32: it is stored as three 16-bit terms. With bfloat16 they are plain
remainders; float16 has too small an exponent for that, so each remainder is scaled up by ``2 ** 11`` and the products
are scaled down again (see ``select_gate.gate_tile``). float32 keys have one term. Source: arXiv 2506.23858, section 3.3.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launches import Work
from .partition import WORD_BITS, Geometry
from .triton_tools import box_shape, power_of_two, token_in_box

PIECE = 256  # tokens of a box that one program adds
ROWS = 64  # tokens that it loads at a time
HALF_STEP = 2048.0  # what a float16 remainder is scaled by

_SIZES = [
    "kv_heads", "prefix", "frames", "rows", "columns", "bt", "bh", "bw", "box_rows", "box_columns", "splits",
    "boxes", "parts",
]  # fmt: skip


class Means(NamedTuple):
    """Box means and what the kernels need to know about them."""

    terms: torch.Tensor  # [B, Hkv, TERMS, 32 * W, DIM], zero beyond the C boxes and the head_dim components
    sizes: torch.Tensor  # int32 [B, 32 * W]: queries (tokens or tiles) of the box, 0 if none of its keys is valid
    own: torch.Tensor  # int32 [N]: box of each query (token or tile)
    rescale: float  # factor between one term and the next

    @property
    def num_terms(self) -> int:
        return self.terms.shape[2]

    @property
    def dim(self) -> int:
        """head_dim, padded."""
        return self.terms.shape[4]


@triton.jit(do_not_specialize=_SIZES)
def _add_pieces(
    k, mask, sums, counts, own,
    stride_kb, stride_kh, stride_ks, stride_mb, stride_ms,
    kv_heads, prefix, frames, rows, columns, bt, bh, bw, box_rows, box_columns, splits,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, PIECE: tl.constexpr, ROWS: tl.constexpr,
    MASKED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Sum and number of the valid keys in one piece of one box; the first head also notes whose box it is."""
    piece = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    sample = tl.program_id(2).to(tl.int64)
    box = piece // splits
    t0, h0, w0, et, eh, ew = box_shape(box, frames, rows, columns, bt, bh, bw, box_rows, box_columns)
    first = (piece - box * splits) * PIECE
    last = tl.minimum(et * eh * ew, first + PIECE)
    dims = tl.arange(0, DIM)
    keys = k + sample * stride_kb + head * stride_kh
    # Float32 keys are added in float64, so that equal keys have equal means whatever the size of their box.
    if WIDE:  # noqa: SIM108
        total = tl.zeros([DIM], tl.float64)
    else:
        total = tl.zeros([DIM], tl.float32)
    count = tl.zeros([ROWS], tl.int32)
    for start in range(first, last, ROWS):
        r = start + tl.arange(0, ROWS)
        valid = r < last
        n = token_in_box(r, t0, h0, w0, eh, ew, rows, columns)
        if (head == 0) & (sample == 0):
            tl.store(own + n, tl.full([ROWS], 0, tl.int32) + box, mask=valid)
        token = (prefix + n).to(tl.int64)
        if MASKED:
            valid = valid & (tl.load(mask + sample * stride_mb + token * stride_ms, mask=valid, other=0) != 0)
        read = valid[:, None]
        if HEAD_DIM != DIM:
            read = read & (dims < HEAD_DIM)[None, :]
        key = tl.load(keys + token[:, None] * stride_ks + dims[None, :], mask=read, other=0.0)  # [ROWS, DIM]
        total += tl.sum(key.to(total.dtype), 0)
        count += valid.to(tl.int32)
    out = (sample * kv_heads + head) * tl.num_programs(0) + piece
    tl.store(sums + out * DIM + dims, total.to(tl.float64))
    tl.store(counts + out, tl.sum(count))


@triton.jit(do_not_specialize=_SIZES)
def _join_pieces(
    sums, counts, terms, sizes,
    kv_heads, frames, rows, columns, bt, bh, bw, box_rows, box_columns, splits, boxes, parts,
    DIM: tl.constexpr, TERMS: tl.constexpr, RESCALE: tl.constexpr,
):  # fmt: skip
    """Mean of one box (or padding) split into its terms."""
    box = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    sample = tl.program_id(2).to(tl.int64)
    padded = tl.num_programs(0)
    dims = tl.arange(0, DIM)
    row = sample * kv_heads + head
    total = tl.zeros([DIM], tl.float64)
    count = 0
    if box < boxes:
        first = (row * boxes + box) * splits
        for part in range(0, splits):
            total += tl.load(sums + (first + part) * DIM + dims)
            count += tl.load(counts + first + part)
    mean = (total / tl.maximum(count, 1).to(tl.float64)).to(tl.float32)
    for term in tl.static_range(TERMS):
        part = mean.to(terms.dtype.element_ty)
        tl.store(terms + ((row * TERMS + term) * padded + box) * DIM + dims, part)
        mean = (mean - part.to(tl.float32)) * RESCALE
    if head == 0:
        _t0, _h0, _w0, et, eh, ew = box_shape(box, frames, rows, columns, bt, bh, bw, box_rows, box_columns)
        tl.store(sizes + sample * padded + box, tl.where(count > 0, tl.where(parts > 0, parts, et * eh * ew), 0))


def box_means(work: Work, k: torch.Tensor, key_mask: torch.Tensor, geometry: Geometry, tile: int = 0) -> Means:
    """Means of the keys ``k`` [B, Hkv, S, D] (last stride 1) over the boxes of the video tokens."""
    batch, kv_heads, _, head_dim = k.shape
    dim = max(16, power_of_two(head_dim))
    boxes, padded = geometry.num_boxes, geometry.num_words * WORD_BITS
    num_terms = 1 if k.dtype == torch.float32 else 3
    rescale = HALF_STEP if k.dtype == torch.float16 else 1.0
    extent = [min(size, step) for size, step in zip(geometry.grid, geometry.block, strict=True)]
    splits = -(-extent[0] * extent[1] * extent[2] // PIECE)
    masked = key_mask.numel() > 0
    mask = work.as_bytes(key_mask) if masked else k

    pieces = batch * kv_heads * boxes * splits
    sums = work.empty(pieces * dim, dtype=torch.float64)
    counts = work.empty(pieces, dtype=torch.int32)
    terms = work.empty(batch, kv_heads, num_terms, padded, dim, dtype=k.dtype)
    sizes = work.empty(batch, padded, dtype=torch.int32)
    own = work.empty(geometry.num_video, dtype=torch.int32)
    shape = (*geometry.grid, *geometry.block, *geometry.counts[1:])
    work.launch(
        _add_pieces, (boxes * splits, kv_heads, batch),
        k, mask, sums, counts, own, *k.stride()[:3], *(mask.stride() if masked else (0, 0)),
        kv_heads, geometry.prefix, *shape, splits,
        HEAD_DIM=head_dim, DIM=dim, PIECE=PIECE, ROWS=ROWS, MASKED=masked, WIDE=num_terms == 1, num_warps=4,
    )  # fmt: skip
    work.launch(
        _join_pieces, (padded, kv_heads, batch),
        sums, counts, terms, sizes, kv_heads, *shape, splits, boxes, geometry.by_tile(tile).block[0] if tile else 0,
        DIM=dim, TERMS=num_terms, RESCALE=rescale, num_warps=1,
    )  # fmt: skip
    return Means(terms, sizes, own, rescale)
