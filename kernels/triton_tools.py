"""What every Triton kernel here shares: box arithmetic on the device, the way to base 2 and back.

Sizes are run-time integers that Triton does not specialise on, so one compiled kernel serves every grid.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = 1.4426950408889634  # on the host: into the scale of the scores
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def box_of_token(n, rows, columns, bt, bh, bw, box_rows, box_columns):
    """Box number of video token ``n`` (raster index)."""
    frame = n // (rows * columns)
    rest = n - frame * (rows * columns)
    row = rest // columns
    column = rest - row * columns
    return ((frame // bt) * box_rows + row // bh) * box_columns + column // bw


@triton.jit
def box_shape(c, frames, rows, columns, bt, bh, bw, box_rows, box_columns):
    """First (frame, row, column) of box ``c`` and its extent on each axis; edge boxes are shorter."""
    a = c // (box_rows * box_columns)
    rest = c - a * (box_rows * box_columns)
    b = rest // box_columns
    t0, h0, w0 = a * bt, b * bh, (rest - b * box_columns) * bw
    return t0, h0, w0, tl.minimum(bt, frames - t0), tl.minimum(bh, rows - h0), tl.minimum(bw, columns - w0)


@triton.jit
def token_in_box(r, t0, h0, w0, eh, ew, rows, columns):
    """Raster index of the ``r``-th token (raster order within the box) of a box."""
    a = r // (eh * ew)
    rest = r - a * (eh * ew)
    b = rest // ew
    return ((t0 + a) * rows + h0 + b) * columns + w0 + rest - b * ew


@triton.jit
def box_start(t0, h0, w0, et, eh, rows, columns):
    """Number of video tokens in the boxes before a box, boxes in raster order."""
    return t0 * rows * columns + et * (h0 * columns) + et * eh * w0


@triton.jit
def tile_in_box(tile, parts, frames, rows, columns, bt, bh, bw, box_rows, box_columns):
    """Where the tokens of a tile of queries are: first (frame, row, column) of its box, the box's rows and columns, and
    the tile's first and last place among the box's tokens (``partition.tile_of``; equal in a tile without tokens)."""
    plane = box_rows * box_columns
    a = tile // plane  # frames of boxes * parts + part
    part = a % parts
    t0, h0, w0, et, eh, ew = box_shape(
        (a // parts) * plane + tile % plane, frames, rows, columns, bt, bh, bw, box_rows, box_columns
    )
    size = (et * eh * ew).to(tl.int64)  # times the parts it may pass 32 bits
    first = (part * size + parts - 1) // parts
    last = ((part + 1) * size + parts - 1) // parts
    return t0, h0, w0, eh, ew, first.to(tl.int32), last.to(tl.int32)


@triton.jit
def float_of(low, high):
    """The float64 whose bits come as two int32, which may be compile-time values."""
    bits = (tl.full([], high, tl.int64) << 32) | (tl.full([], low, tl.int64) & 0xFFFFFFFF)
    return bits.to(tl.float64, bitcast=True)


def power_of_two(n: int) -> int:
    return triton.next_power_of_2(max(1, n))
