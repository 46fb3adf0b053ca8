"""Attention to the selected boxes on Hopper (compute capability 9.0), in Gluon: one persistent kernel does everything.

Each multiprocessor runs one program of specialised warps: two warpgroups attend (``hopper_attend``), one warp feeds them,
one counts what is finished, two pack keys and values and merge partial results (``hopper_serve``). Keys and values of two
heads at a time lie in box order; the buffer of partials holds two chunks and is merged while the tensor cores work on the
next one. The last chunk is merged by a kernel of its own.

Counters in global memory say when a head is packed, a chunk done, a chunk merged. They need every program to be resident:
the grid is one program per multiprocessor, launched cooperatively. Two tiles of queries, four blocks of 128 keys or values
and the merging warps' rows fill shared memory (226 of 227 KiB). arXiv 2506.23858, section 3.1.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from . import attend_lists
from .attend_merge import QUERIES, merge_last, refuse
from .hopper_attend import RING, attend
from .hopper_serve import DEPTH, ROWS, WARPS, feed, serve, tell
from .launches import Work
from .partition import Geometry
from .triton_tools import power_of_two

BLOCK = 128  # keys
SLOTS = {64: 8, 128: 4}  # padded head size: blocks of keys or values in shared memory
# Registers a thread, of 504 for the three warpgroups: the least with hardly a spill in the warps that merge.
ATTEND_REGISTERS, OTHER_REGISTERS = 216, 72
LOG2E = 1.4426950408889634

_HALF = gl.constexpr(attend_lists.TILE // 2)
_WARPS = gl.constexpr(WARPS)
_ROWS = gl.constexpr(ROWS)
_DEPTH = gl.constexpr(DEPTH)


_SIZES = [
    "q_batch", "q_head", "q_token", "k_batch", "k_head", "k_token", "v_batch", "v_head", "v_token", "head_dim", "heads",
    "group", "tokens", "max_chunks", "masked", "all_kv_heads", "packed_rows",
]  # fmt: skip


@gluon.jit(do_not_specialize=_SIZES)
def attend_everything(
    Q, K, V, packed_k, packed_v, PACKED_K, PACKED_V, KEYS, ENTRIES, PLACE, TILES, CHUNKS, TOTALS, DONE, PART, PART_LSE,
    OUT, LSE, q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, head_dim, heads, group,
    tokens, masked, all_kv_heads, packed_rows, max_chunks, scale,
    BLOCK: gl.constexpr, SLOTS: gl.constexpr, D: gl.constexpr, ATTEND_REGISTERS: gl.constexpr,
    OTHER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Strides and ``head_dim`` come in units of 8 elements, so that copies are known to be 16 bytes wide."""
    dtype: gl.constexpr = Q.dtype.element_ty
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 1, [1, 0])
    FLAT_LSE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    queries = gl.allocate_shared_memory(dtype, [4, _HALF, D], packed_k.layout)
    ring = gl.allocate_shared_memory(dtype, [SLOTS, BLOCK, D], packed_k.layout)
    places = gl.allocate_shared_memory(gl.int32, [4, _HALF], FLAT_LSE)
    ranks = gl.allocate_shared_memory(gl.int16, [4, _HALF], FLAT_LSE)
    rows = gl.allocate_shared_memory(dtype, [_WARPS * _DEPTH, _ROWS, D], FLAT)
    lses = gl.allocate_shared_memory(gl.float32, [_WARPS * _DEPTH, _ROWS], FLAT_LSE)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    told = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(done.index(i), count=2)
        mbarrier.init(told.index(i), count=1)
    for i in gl.static_range(SLOTS):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    num_tiles, num_chunks = gl.load(TOTALS), gl.load(TOTALS + 1)
    MERGED = DONE + max_chunks
    PACKED = MERGED + max_chunks
    servers = gl.num_programs(0) * _WARPS
    kv_heads = heads // group
    # The arguments are spelled out twice: in a tuple with a name, compile-time constants would become tensors.
    gl.warp_specialize(
        [
            (attend, (
                0, Q, ENTRIES, PLACE, TILES, PART, PART_LSE, MERGED, queries, places, ranks, ring, full,
                empty, done, told, q_batch, q_head, q_token, head_dim, heads, group, tokens, scale, num_tiles, servers,
                BLOCK, SLOTS, D,
            )),
            (attend, (
                1, Q, ENTRIES, PLACE, TILES, PART, PART_LSE, MERGED, queries, places, ranks, ring, full,
                empty, done, told, q_batch, q_head, q_token, head_dim, heads, group, tokens, scale, num_tiles, servers,
                BLOCK, SLOTS, D,
            )),
            (feed, (
                packed_k, packed_v, TILES, PACKED, ring, full, empty, group, packed_rows, num_tiles, servers,
                BLOCK, SLOTS, D,
            )),
            (tell, (TILES, DONE, done, told, num_tiles)),
            (serve, (
                0, K, V, KEYS, PACKED_K, PACKED_V, PACKED, k_batch, k_head, k_token, v_batch, v_head, v_token,
                PART, PART_LSE, PLACE, CHUNKS, OUT, LSE, DONE, MERGED, rows, lses, head_dim, tokens, masked, group,
                kv_heads, all_kv_heads, packed_rows, num_chunks, D,
            )),
            (serve, (
                1, K, V, KEYS, PACKED_K, PACKED_V, PACKED, k_batch, k_head, k_token, v_batch, v_head, v_token,
                PART, PART_LSE, PLACE, CHUNKS, OUT, LSE, DONE, MERGED, rows, lses, head_dim, tokens, masked, group,
                kv_heads, all_kv_heads, packed_rows, num_chunks, D,
            )),
        ],
        [4, 1, 1, 1, 1],
        [ATTEND_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS],
    )  # fmt: skip


def why_not(q: Tensor, k: Tensor, v: Tensor) -> str:
    """Why this implementation cannot take the tensors; empty if it can."""
    if torch.cuda.get_device_capability(q.device) != (9, 0):
        return "it needs a GPU of compute capability 9.0 (H100, H200)"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, not {q.dtype}"
    if q.shape[-1] > 128 or q.shape[-1] % 8:
        return f"it takes head sizes up to 128 that are multiples of 8, not {q.shape[-1]}"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.data_ptr() % 16 or any(stride % 8 for stride in x.stride()[:3]):
            return f"{name} must start and stride by multiples of 16 bytes"
    return ""


def attention(
    work: Work, q: Tensor, k: Tensor, v: Tensor, words: Tensor, key_mask: Tensor, out: Tensor, lse: Tensor,
    geometry: Geometry, scale: float, capacity: int, scratch: int,
) -> None:  # fmt: skip
    """Fill ``out`` and ``lse`` of one group of samples; ``capacity`` pairs in all, about ``scratch`` bytes of buffers."""
    batch, heads, tokens, head_dim = q.shape
    dim = max(64, power_of_two(head_dim))
    boxes = geometry.num_boxes + (geometry.num_condition > 0)
    slack = attend_lists.GROUP * boxes
    slots = (scratch - 4 * capacity) // (RING * (dim * 2 + 4))
    chunk_pairs = min(max(slots - slack, slack), tokens * boxes)
    lists = attend_lists.build(work, words, key_mask, geometry, capacity=capacity, chunk_pairs=chunk_pairs, ring=RING)
    new = partial(work.empty, dtype=q.dtype)
    part, part_lse = new(RING * lists.slots, dim), new(RING * lists.slots, dtype=torch.float32)
    strides = [stride // 8 for x in (q, k, v) for stride in x.stride()[:3]]
    programs = torch.cuda.get_device_properties(q.device).multi_processor_count
    packed_rows, kv_heads = tokens + BLOCK, k.shape[1]
    packed = [new(min(2, batch * kv_heads) * packed_rows, dim) for _ in range(2)]
    layout = gl.NVMMASharedLayout(128, 16, 2)
    descriptors = [TensorDescriptor.from_tensor(x, [BLOCK, dim], layout) for x in packed]
    work.launch(
        attend_everything, (programs,), q, k, v, *descriptors, *packed, lists.keys, lists.entries, lists.place,
        lists.tiles, lists.chunks, lists.totals, lists.done, part, part_lse, out, lse, *strides, head_dim // 8, heads,
        heads // kv_heads, tokens, int(key_mask.numel() > 0), batch * kv_heads, packed_rows, lists.max_chunks,
        scale * LOG2E, BLOCK=BLOCK, SLOTS=SLOTS[dim], D=dim, ATTEND_REGISTERS=ATTEND_REGISTERS,
        OTHER_REGISTERS=OTHER_REGISTERS, num_warps=4,
        launch_cooperative_grid=True,
    )  # fmt: skip
    work.launch(
        merge_last, (triton.cdiv(tokens, QUERIES),), part, part_lse, lists.place, lists.chunks, lists.totals, out, lse,
        tokens, head_dim, QUERIES=QUERIES, D=dim, num_warps=1,
    )  # fmt: skip
    rows = batch * heads * tokens
    work.launch(refuse, (triton.cdiv(rows, 64),), lists.totals, out, lse, rows, head_dim, BLOCK=64, D=dim, num_warps=4)
