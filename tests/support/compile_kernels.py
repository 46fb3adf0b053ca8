"""Compile every kernel of the package for one NVIDIA architecture, without a GPU.

    python -P tests/support/compile_kernels.py sm_90

The host functions run on meta tensors, with a ``Work.launch`` that writes down what it is asked for. Triton's own binder
turns those arguments into the signature that a launch would compile. One JSON line per compiled kernel: its name, types,
constexprs and options, and what ptxas says of it; ``error`` where it does not compile.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.cache import triton_key
from triton.runtime.jit import create_function_from_signature
from vmoba_compile.kernels import attend, select_triton
from vmoba_compile.kernels.launches import Work
from vmoba_compile.kernels.partition import Geometry

WORK = Work(torch.device("meta"))
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
WORKERS = 2

GRID = (21, 30, 52)  # Wan 2.1, 480p, 81 frames
PLAIN = Geometry(GRID, (7, 5, 13))  # 72 boxes
WITH_TEXT = Geometry(GRID, (7, 5, 13), prefix=77, suffix=3)
MANY_BOXES = Geometry((32, 32, 64), (2, 4, 4))  # 2,048, the most that pool "query_head" takes
HALF_AS_MANY = Geometry((32, 32, 64), (4, 4, 4))  # where shared memory is small
FEW_BOXES = Geometry(GRID, (3, 30, 52))  # 7
SMALLEST = (12, 0)  # has the least shared memory: here all variants are compiled, the largest tiles too


class Launch(NamedTuple):
    """One kernel as it would be compiled for a launch."""

    kernel: Any
    signature: dict[str, str]
    constexprs: dict[tuple[int, ...], Any]
    attrs: dict[tuple[int, ...], Any]
    options: dict[str, Any]


def meta(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def tensors(geometry: Geometry, dtype: torch.dtype, head_dim: int, *, batch=1, heads=12, kv_heads=12, masked=False):
    """q, k, v, key mask; heads lie next to each other within a token, as projections leave them."""
    q = meta((batch, geometry.num_tokens, heads, head_dim), dtype).transpose(1, 2)
    k = meta((batch, geometry.num_tokens, kv_heads, head_dim), dtype).transpose(1, 2)
    return q, k, k.clone(), meta((batch, geometry.num_tokens) if masked else (0,), torch.bool)


def select(geometry: Geometry, dtype: torch.dtype, head_dim: int, pool: str, mode: str, **rest: Any) -> None:
    rule = {"threshold": rest.pop("threshold", 0.25), "topk": rest.pop("topk", 3), "tile": rest.pop("tile", 0)}
    q, k, _, mask = tensors(geometry, dtype, head_dim, **rest)
    select_triton.select(WORK, q, k, mask, geometry, pool=pool, mode=mode, **rule)


def attention(
    implementation: str, geometry: Geometry, dtype: torch.dtype, head_dim: int, *, tile: int = 0, **rest: Any
) -> None:
    q, k, v, mask = tensors(geometry, dtype, head_dim, **rest)
    words = meta((*q.shape[:2], geometry.by_tile(tile).num_video, geometry.num_words), torch.int32)
    options: dict[str, Any] = {"implementation": implementation, "share": 0.25, "by_head": True, "tile": tile}
    attend.attention(WORK, q, k, v, words, mask, geometry, head_dim**-0.5, **options)


def backward(implementation: str, geometry: Geometry, dtype: torch.dtype, head_dim: int, **rest: Any) -> None:
    q, k, v, mask = tensors(geometry, dtype, head_dim, **rest)
    words = meta((*q.shape[:2], geometry.num_video, geometry.num_words), torch.int32)
    results = meta(tuple(q.shape), dtype), meta(tuple(q.shape[:3]), torch.float32), meta((0,), torch.float32)
    options: dict[str, Any] = {"implementation": implementation, "share": 0.25, "by_head": True}
    attend.attention_backward(WORK, q.clone(), q, k, v, words, mask, *results, geometry, head_dim**-0.5, **options)


def run_everything(capability: tuple[int, int]) -> None:
    """Call the host functions so that each kernel is launched, in the variants that differ most.

    On ``SMALLEST`` in all of them, elsewhere in those that are nearest to a limit.
    """
    other = {"batch": 2, "kv_heads": 4, "masked": True}
    if capability == (9, 0):
        attention("hopper", PLAIN, BF16, 128)
        attention("hopper", PLAIN, FP16, 64)
        backward("hopper", PLAIN, BF16, 128)
        backward("hopper", WITH_TEXT, FP16, 64, **other)
    for dtype, head_dim in [(BF16, 128), (BF16, 256), (FP32, 64)]:
        attention("triton", PLAIN, dtype, head_dim)
    # head_dim 40 and 80 are padded, and 40 strides by what is no multiple of 16.
    attention("triton", WITH_TEXT, BF16, 40, **other)
    attention("triton", PLAIN, BF16, 128, tile=128)
    backward("triton", PLAIN, BF16, 128)
    backward("triton", WITH_TEXT, BF16, 40, **other)
    select(HALF_AS_MANY if capability == SMALLEST else MANY_BOXES, BF16, 128, "query_head", "threshold")
    select(PLAIN, BF16, 128, "head_global", "threshold")
    select(PLAIN, BF16, 128, "block", "threshold")
    select(PLAIN, BF16, 128, "head_global", "threshold", tile=128)
    select(PLAIN, BF16, 128, "query_head", "topk", topk=1)  # own box
    if capability == SMALLEST:
        run_the_rest(other)


def run_the_rest(other: dict[str, Any]) -> None:
    attention("triton", PLAIN, BF16, 64)
    for dtype, head_dim in [(BF16, 64), (BF16, 256), (FP32, 64)]:
        attention("triton", PLAIN, dtype, head_dim, tile=128)
    attention("triton", WITH_TEXT, FP16, 128, tile=64, **other)
    backward("triton", PLAIN, BF16, 256)
    for tile in (0, 128):
        attention("triton", PLAIN, FP32, 128, tile=tile)
    backward("triton", PLAIN, FP32, 64)
    backward("triton", PLAIN, FP32, 128)
    for dtype, head_dim in [(BF16, 128), (BF16, 256), (FP32, 64)]:
        select(PLAIN, dtype, head_dim, "query_head", "threshold")
    select(FEW_BOXES, FP16, 128, "query_head", "topk")
    for dtype, head_dim in [(BF16, 256), (FP32, 64), (FP16, 128)]:
        select(PLAIN, dtype, head_dim, "head_global", "threshold")
    select(PLAIN, BF16, 128, "head_global", "topk")
    select(PLAIN, BF16, 128, "overall", "threshold")
    select(PLAIN, FP32, 64, "block", "threshold")
    select(WITH_TEXT, BF16, 80, "head_global", "threshold", **other)
    select(PLAIN, FP32, 64, "query_head", "threshold", tile=128)
    select(PLAIN, BF16, 128, "query_head", "threshold", threshold=1.0)  # everything


def record(capability: tuple[int, int]) -> list[Launch]:
    """Every distinct kernel that :func:`run_everything` launches, as Triton's ``JITFunction.run`` would compile it."""
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    backend = make_backend(target)
    found: dict[str, Launch] = {}
    binders: dict[Any, Any] = {}

    def launch(work: Work, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        if kernel not in binders:
            binders[kernel] = create_function_from_signature(kernel.signature, kernel.params, backend)
        options |= {"debug": False, "instrumentation_mode": ""}
        bound, specialization, rest = binders[kernel](*args, **options)
        parsed, signature, constexprs, attrs = kernel._pack_args(backend, options, bound, specialization, rest)
        item = Launch(kernel, signature, constexprs, attrs, dict(parsed.__dict__))
        found.setdefault(repr((kernel.__module__, kernel.__name__, *item[1:])), item)

    properties = SimpleNamespace(multi_processor_count=132, major=capability[0], minor=capability[1])
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: capability))
        patches.enter_context(mock.patch.object(torch.cuda, "get_device_properties", lambda device=None: properties))
        patches.enter_context(mock.patch.object(attend, "why_not_hopper", lambda q, k, v: ""))
        patches.enter_context(mock.patch.object(Work, "launch", launch))
        run_everything(capability)
    return list(found.values())


def describe(item: Launch, arch: str) -> dict[str, Any]:
    names = item.kernel.arg_names
    return {
        "name": item.kernel.__name__,
        "arch": arch,
        "dtype": next(t for t in item.signature.values() if t.startswith("*"))[1:],
        "constexprs": {names[at[0]]: value for at, value in item.constexprs.items() if names[at[0]].isupper()},
        "options": {name: item.options[name] for name in ("num_warps", "num_stages", "maxnreg")},
    }


def compile_one(item: Launch, arch: str) -> dict[str, Any]:
    """What ptxas says of one kernel."""
    result = describe(item, arch)
    source = (GluonASTSource if item.kernel.is_gluon() else ASTSource)(
        item.kernel, item.signature, item.constexprs, item.attrs
    )
    log = io.StringIO()
    try:
        with contextlib.redirect_stdout(log):
            compiled = triton.compile(
                source, target=GPUTarget("cuda", int(arch.removeprefix("sm_")), 32), options=item.options
            )
    except Exception:
        return result | {"error": f"{log.getvalue()[:2000]}\n{traceback.format_exc()[-3000:]}"}
    said = log.getvalue()

    def total(pattern: str) -> int:
        """Sum over the functions of the kernel; the log has a line for each."""
        numbers = re.findall(pattern, said)
        assert numbers, said
        return sum(map(int, numbers))

    return result | {
        "threads": 32 * compiled.metadata.num_warps,
        "registers": max(map(int, re.findall(r"Used (\d+) registers", said))),
        "spills": total(r"(\d+) bytes spill stores") + total(r"(\d+) bytes spill loads"),
        "stack": total(r"(\d+) bytes stack frame"),
        "shared": compiled.metadata.shared,
        "tensor_columns": getattr(compiled.metadata, "tmem_size", None) or 0,
        "serialized": "wgmma.mma_async instructions are serialized" in said,
    }


def compile_all(items: list[Launch], arch: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Each in a process of its own, which inherits it: kernels cannot be pickled, and the compiler may abort."""

    def compile_in_child(index: int) -> None:
        with open(folder / f"{index}.log", "w") as log:
            os.dup2(log.fileno(), 2)
            (folder / f"{index}.json").write_text(json.dumps(compile_one(items[index], arch)))

    triton_key()  # a hash of all of Triton, kept by the process: else each would take it anew
    fork = multiprocessing.get_context("fork")
    waiting = list(range(len(items)))
    running: dict[int, Any] = {}  # by sentinel
    while waiting or running:
        while waiting and len(running) < WORKERS:
            process = fork.Process(target=compile_in_child, args=(waiting[0],), name=str(waiting.pop(0)))
            process.start()
            running[process.sentinel] = process
        for sentinel in multiprocessing.connection.wait(list(running)):
            process = running.pop(sentinel)
            process.join()
            if process.exitcode == 0:
                yield json.loads((folder / f"{process.name}.json").read_text())
            else:
                said = (folder / f"{process.name}.log").read_text()
                error = f"the compiler ended with {process.exitcode}: {said[:1500]}"
                yield describe(items[int(process.name)], arch) | {"error": error}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("arch", help="as in sm_90")
    arch = parser.parse_args().arch
    assert not triton.knobs.runtime.interpret, "kernels of the interpreter cannot be compiled"
    items = record(divmod(int(arch.removeprefix("sm_")), 10))
    triton.knobs.nvidia.dump_ptxas_log = True
    # Nothing from an earlier run: a kernel from the cache has no log.
    with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, TRITON_CACHE_DIR=cache):
        for result in compile_all(items, arch, Path(cache)):
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
