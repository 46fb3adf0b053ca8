"""Attention to the selected boxes on Hopper (compute capability 9.0), in Gluon: one persistent kernel does everything.

Each multiprocessor runs one program of specialised warps: two warpgroups attend (``hopper_attend``), one warp feeds them,
one counts what is finished, two pack keys and values and merge partial results (``hopper_serve``). Keys and values of two
heads at a time lie in box order; the buffer of partials holds two or three chunks, of which one is merged while the tensor
cores work on the next. The last chunk is merged by a kernel of its own.

Counters in global memory say when a head is packed, a chunk done, a chunk merged. They need every program to be resident:
the grid is one program per multiprocessor, launched cooperatively. Each head has a tile for every program, so that no
program waits for keys of a head that is packed only once its own tile is done. Two tiles of queries, two blocks of 128
keys and of values and the merging warps' rows fill shared memory (218 of 227 KiB). arXiv 2506.23858, section 3.1.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from . import attend_lists
from .attend_merge import QUERIES, merge_last, refuse_results
from .hopper_attend import INFOS, PART_QUERIES, PARTS, attend
from .hopper_serve import DEPTH, ROWS, WARPS, feed, serve, tell
from .launches import Work
from .partition import Geometry
from .triton_tools import LOG2E, power_of_two


class Shape(NamedTuple):
    """How a program is made up, by padded head size."""

    block: int  # keys
    slots: int  # blocks of keys in shared memory, and as many of values; a power of two
    attend_registers: int  # of a thread
    other_registers: int


# The registers of the three warpgroups add up to 504. With three that attend (152 registers, blocks of 64 keys) both
# head sizes were 6 to 23 % slower, and so were eight warps that attend in step, though they share their instructions.
SHAPES = {64: Shape(128, 4, 216, 72), 128: Shape(128, 2, 216, 72)}

FULL_TILES = 6  # of a box in a chunk, beside one that is not

_PART = gl.constexpr(PART_QUERIES)
_PARTS = gl.constexpr(PARTS)
_INFOS = gl.constexpr(INFOS)
_TILE_FIELDS = gl.constexpr(attend_lists.TILE_FIELDS)
_WARPS = gl.constexpr(WARPS)
_ROWS = gl.constexpr(ROWS)
_DEPTH = gl.constexpr(DEPTH)

_SIZES = [
    "q_batch", "q_head", "q_token", "k_batch", "k_head", "k_token", "v_batch", "v_head", "v_token", "head_dim", "heads",
    "group", "tokens", "max_chunks", "buffers", "masked", "all_kv_heads", "packed_rows", "again",
]  # fmt: skip


@gluon.jit(do_not_specialize=_SIZES)
def attend_everything(
    Q, K, V, packed_k, packed_v, PACKED_K, PACKED_V, KEYS, ENTRIES, PLACE, TILES, CHUNKS, TOTALS, DONE, PART, PART_LSE,
    OUT, LSE, q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, head_dim, heads, group,
    tokens, masked, all_kv_heads, packed_rows, max_chunks, buffers, again, scale,
    BLOCK: gl.constexpr, SLOTS: gl.constexpr, D: gl.constexpr,
    ATTEND_REGISTERS: gl.constexpr, OTHER_REGISTERS: gl.constexpr, STEADY: gl.constexpr,
):  # fmt: skip
    """Strides and ``head_dim`` come in units of 8 elements, so that copies are known to be 16 bytes wide."""
    dtype: gl.constexpr = Q.dtype.element_ty
    ROWS_IN: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 1, [1, 0])
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    queries = gl.allocate_shared_memory(dtype, [2 * _PARTS, _PART, D], packed_k.layout)
    keys = gl.allocate_shared_memory(dtype, [SLOTS, BLOCK, D], packed_k.layout)
    values = gl.allocate_shared_memory(dtype, [SLOTS, BLOCK, D], packed_v.layout)
    places = gl.allocate_shared_memory(gl.int32, [2 * _PARTS, _PART], FLAT)
    ranks = gl.allocate_shared_memory(gl.int16, [2 * _PARTS, _PART], FLAT)
    infos = gl.allocate_shared_memory(gl.int32, [_PARTS * _INFOS, _TILE_FIELDS], FLAT)
    rows = gl.allocate_shared_memory(dtype, [_WARPS * _DEPTH, _ROWS, D], ROWS_IN)
    weights = gl.allocate_shared_memory(gl.float32, [_WARPS, 32], FLAT)
    full_k = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    full_v = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    told = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(done.index(i), count=_PARTS)
        mbarrier.init(told.index(i), count=1)
    for i in gl.static_range(SLOTS):
        mbarrier.init(full_k.index(i), count=1)
        mbarrier.init(full_v.index(i), count=1)
        mbarrier.init(empty.index(i), count=_PARTS)
    num_tiles, num_chunks = gl.load(TOTALS), gl.load(TOTALS + 1)
    if again > 0:  # offset of a second set of counters
        unsteady = gl.load(TOTALS + 3)
        num_tiles, num_chunks = num_tiles * unsteady, num_chunks * unsteady
    DONE += again
    MERGED = DONE + max_chunks
    PACKED = MERGED + max_chunks
    servers = gl.num_programs(0) * _WARPS
    kv_heads = heads // group
    # Compile-time constants stay out of the tuples, in which they would become tensors.
    gather_from = (Q, PLACE, q_batch, q_head, q_token, head_dim, heads, tokens)
    memory = (ENTRIES, TILES, PART, PART_LSE, MERGED, TOTALS + 3)
    shared = (queries, places, ranks, infos, keys, values, full_k, full_v, empty, done, told)
    numbers = (num_tiles, servers, buffers)
    pack_from = (K, V, KEYS, k_batch, k_head, k_token, v_batch, v_head, v_token)
    pack_to = (PACKED_K, PACKED_V, PACKED, packed_rows)
    merge_from = (PART, PART_LSE, PLACE, CHUNKS, DONE, MERGED, rows, weights)
    counts = (head_dim, tokens, masked, group, kv_heads, all_kv_heads, num_chunks)
    feed_from = (packed_k, packed_v, TILES, PACKED)
    feed_to = (keys, values, full_k, full_v, empty)
    feed_counts = (group, packed_rows, num_tiles, servers)
    gl.warp_specialize(
        [
            (attend, (0, gather_from, memory, shared, numbers, scale, BLOCK, SLOTS, D, STEADY)),
            (attend, (1, gather_from, memory, shared, numbers, scale, BLOCK, SLOTS, D, STEADY)),
            (feed, (feed_from, feed_to, feed_counts, BLOCK, SLOTS, D)),
            (tell, (TILES, DONE, done, told, num_tiles)),
            (serve, (0, pack_from, pack_to, merge_from, OUT, LSE, counts, D)),
            (serve, (1, pack_from, pack_to, merge_from, OUT, LSE, counts, D)),
        ],
        [4, 1, 1, 1, 1],
        [ATTEND_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS],
    )


def why_not(q: Tensor, k: Tensor, v: Tensor) -> str:
    """Why this implementation cannot take the tensors; empty if it can."""
    if torch.cuda.get_device_capability(q.device) != (9, 0):
        return "it needs a GPU of compute capability 9.0 (H100, H200)"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, not {q.dtype}"
    if q.shape[-1] > 128 or q.shape[-1] % 8:
        return f"it takes head sizes up to 128 that are multiples of 8, not {q.shape[-1]}"
    if q.shape[2] * q.stride(2) >= 2**31:
        return f"a head of q must span fewer than 2**31 elements, not {q.shape[2] * q.stride(2)}"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.data_ptr() % 16 or any(stride % 8 for stride in x.stride()[:3]):
            return f"{name} must start and stride by multiples of 16 bytes"
    return ""


def padded(head_dim: int) -> int:
    """The head size of the kernels."""
    return max(64, power_of_two(head_dim))


def describe(x: Tensor, shape: list[int]) -> TensorDescriptor:
    """Blocks of ``x`` as the copy engine brings them to the tensor cores."""
    return TensorDescriptor.from_tensor(x, shape, gl.NVMMASharedLayout(128, 16, 2))


def attention(
    work: Work, q: Tensor, k: Tensor, v: Tensor, words: Tensor, key_mask: Tensor, out: Tensor, lse: Tensor,
    geometry: Geometry, scale: float, *, capacity: int, head_capacity: int, scratch: int,
) -> None:  # fmt: skip
    """Fill ``out`` and ``lse`` of one group of samples; ``capacity`` pairs in all, ``head_capacity`` of a head.

    About ``scratch`` bytes of buffers.
    """
    batch, heads, tokens, head_dim = q.shape
    dim = padded(head_dim)
    boxes = geometry.num_key_boxes
    shape = SHAPES[dim]
    packed_rows, kv_heads = tokens + shape.block, k.shape[1]
    packed_shape = min(2, batch * kv_heads) * packed_rows, dim
    row_bytes, slack = dim * 2 + 4, attend_lists.GROUP * boxes
    slots = min((scratch - 4 * packed_shape[0] * dim) // row_bytes, (2**31 - 1) // dim - 64)
    # Chunks of partials; a third gives those who merge more time, as long as most tiles of a chunk are full.
    ring = 3 if slots // 3 - slack >= FULL_TILES * attend_lists.TILE * boxes else 2
    chunk_pairs = min(max(slots // ring - slack, slack), head_capacity)
    programs = torch.cuda.get_device_properties(q.device).multi_processor_count
    lists = attend_lists.build(
        work, words, key_mask, geometry,
        capacity=capacity, head_capacity=head_capacity, chunk_pairs=chunk_pairs, ring=ring, least_tiles=programs,
    )  # fmt: skip
    new = partial(work.empty, dtype=q.dtype)
    part, part_lse = new(ring * lists.slots, dim), new(ring * lists.slots, dtype=torch.float32)
    strides = [stride // 8 for x in (q, k, v) for stride in x.stride()[:3]]
    packed = [new(*packed_shape) for _ in range(2)]
    descriptors = [describe(x, [shape.block, dim]) for x in packed]
    steady = q.dtype == torch.bfloat16  # see hopper_attend; the second launch ends at once unless the first was in vain
    for again in range(1 + steady):
        work.launch(
            attend_everything, (programs,), q, k, v, *descriptors, *packed, lists.keys, lists.entries, lists.place,
            lists.tiles, lists.chunks, lists.totals, lists.done, part, part_lse, out, lse, *strides, head_dim // 8, heads,
            heads // kv_heads, tokens, int(key_mask.numel() > 0), batch * kv_heads, packed_rows, lists.max_chunks,
            ring, again * lists.done.shape[0] // 2, scale * LOG2E, BLOCK=shape.block, SLOTS=shape.slots, D=dim,
            ATTEND_REGISTERS=shape.attend_registers, OTHER_REGISTERS=shape.other_registers, STEADY=steady and not again,
            num_warps=4, launch_cooperative_grid=True,
        )  # fmt: skip
    work.launch(
        merge_last, (triton.cdiv(tokens, QUERIES),), part, part_lse, lists.place, lists.chunks, lists.totals, out, lse,
        tokens, QUERIES=QUERIES, HEAD_DIM=head_dim, D=dim, num_warps=1,
    )  # fmt: skip
    refuse_results(work, lists.totals, out, lse)
