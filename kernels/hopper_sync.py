"""Hand-overs between the warps and the programs of the kernel for Hopper, in Gluon."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

thread_barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # triton 3.6, 3.7


@gluon.jit
def maximum(a, b):
    return gl.maximum(a, b)


@gluon.jit
def add(a, b):
    return a + b


@gluon.jit
def release(barrier):
    thread_barrier()
    mbarrier.arrive(barrier, count=1)


@gluon.jit
def fence_async_global():
    """Between ordinary accesses to global memory and the copy engine's, on both sides of a hand-over."""
    lane = gl.arange(0, 32, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    gl.inline_asm_elementwise(
        "fence.proxy.async.global; mov.b32 $0, $1;", "=r,r", [lane], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def sleep():
    """A fifth of a microsecond: who polls without a pause takes the time of those who compute."""
    lane = gl.arange(0, 32, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    gl.inline_asm_elementwise(
        "nanosleep.u32 200; mov.b32 $0, $1;", "=r,r", [lane], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def wait_until(counter, target):
    """Wait for a counter in global memory; what was written before it was raised can be read afterwards."""
    while gl.load(counter, volatile=True) < target:
        sleep()
    while gl.atomic_add(counter, 0, sem="acquire", scope="gpu") < target:
        sleep()
    thread_barrier()


@gluon.jit
def pin(x):
    """Have ``x`` (never negative) computed before whatever waits next.

    The assembler moves arithmetic behind a wait for tensor cores, but no store: one that never happens holds it back.
    """
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 a; mov.b32 a, 0; setp.lt.f32 p, $1, 0f00000000; @p st.volatile.shared.f32 [a], $1;"
        " mov.b32 $0, $1; }",
        "=r,r", [x], dtype=gl.float32, is_pure=False, pack=1,
    )  # fmt: skip
