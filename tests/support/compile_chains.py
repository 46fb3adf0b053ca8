"""Compile the chains of recorded operators for one compute capability, without a GPU, and say what came of it.

    python -P tests/support/compile_chains.py 9.0

One JSON object: every kernel with what its PTX declares, and how the specialisation differs from that of Triton's own
just-in-time compiler (it must not).
"""

from __future__ import annotations

import json
import multiprocessing
import re
import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from vmoba_compile.kernels import aot, aot_ptx
from vmoba_compile.kernels.partition import Geometry

GRID = (21, 30, 52)
BF16 = torch.bfloat16
TORCH = {kind: dtype for dtype, kind in aot._POINTERS.items()}


def record(capability: aot.Capability) -> list[aot.Chain]:
    """Every kernel at least once; the first two are layers of equal shapes and other blocks."""
    plain, text = Geometry(GRID, (7, 5, 13)), Geometry(GRID, (7, 5, 13), prefix=77, suffix=3)
    other = Geometry(GRID, (7, 6, 13))
    where: dict[str, Any] = {"capability": capability}
    rule: dict[str, Any] = where | {"threshold": 0.25, "topk": 0}

    def size(geometry: Geometry, batch: int = 1) -> tuple[int, int, int, int]:
        return batch, 12, geometry.num_tokens, 128

    return [
        aot.record_attention(size(plain), 12, BF16, plain, pool="head_global", scale=0.1, **rule),
        aot.record_attention(size(other), 12, BF16, other, pool="head_global", scale=0.1, **rule),
        aot.record_select(size(text, 2), 4, BF16, text, masked=True, pool="head_global", mode="threshold", **rule),
        aot.record_attention(size(text, 2), 4, BF16, text, masked=True, pool="block", scale=0.1, **rule),
        aot.record_select(size(plain), 12, BF16, plain, pool="query_head", mode="threshold", tile=128, **rule),
        aot.record_attention(size(text), 12, BF16, text, pool="query_head", scale=0.1, tile=128, **rule),
        aot.record_select(size(plain), 12, BF16, plain, pool="query_head", mode="topk", threshold=0.0, topk=1, **where),
    ]


class Pointer:
    """What the just-in-time compiler asks of a tensor."""

    def __init__(self, kind: str) -> None:
        self.dtype = TORCH[kind]

    def data_ptr(self) -> int:
        return 1 << 20


def differences(calls: list[aot.Call], capability: aot.Capability) -> list[str]:
    """Calls whose signature, constants or attributes are not those of Triton's own launch.

    Floats and integers of 64 bits are left out: they are arguments there, and compile-time values here.
    """
    backend = make_backend(GPUTarget("cuda", 10 * capability[0] + capability[1], 32))
    wrong = []
    for call in calls:
        kernel = aot_ptx.find(call.kernel)
        names = kernel.arg_names
        baked = [name for name, x in call.constants.items() if not kernel.params[names.index(name)].is_constexpr]
        arguments: dict[str, Any] = dict(call.constants) | call.numbers
        arguments |= {name: Pointer(kind) for name, kind in call.types.items() if kind.startswith("*")}
        options = dict(call.options) | {"debug": False, "instrumentation_mode": ""}
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, rest = bind(*[arguments[name] for name in names], **options)
        _, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, rest)
        ours = aot_ptx.specialise(call, kernel)
        kept = [number for number, name in enumerate(names) if name not in baked]
        theirs = [(names[i], signature[names[i]], constants.get((i,)), attributes.get((i,)) or None) for i in kept]
        mine = [(names[i], ours[0][names[i]], ours[1].get(names[i]), ours[2].get((i,))) for i in kept]
        if mine != theirs:
            wrong.append(f"{call.name}: {[pair for pair in zip(mine, theirs, strict=True) if pair[0] != pair[1]]}")
    return wrong


def compile_one(item: tuple[str, aot.Call, aot.Capability, int]) -> tuple[aot_ptx.Kernel, int]:
    key, call, capability, version = item
    kernel = aot_ptx._compile(call, key, capability, version)
    return kernel, len(aot_ptx.assemble(kernel))


def describe(kernel: aot_ptx.Kernel, call: aot.Call, cubin: int) -> dict[str, Any]:
    entry = re.search(r"\.entry \w+\(([^)]*)\)", kernel.ptx)
    version, target = re.search(r"\.version (\S+)", kernel.ptx), re.search(r"\.target (\w+)", kernel.ptx)
    assert entry and version and target
    return {
        "function": call.name, "declared": entry[1].count(".param"), "numbers": kernel.numbers,
        "inputs": len(call.inputs), "outputs": len(call.outputs), "version": version[1], "target": target[1],
        "paths": re.findall(r"\.(?:loc|file)\b|\.py\b", kernel.ptx), "cubin": cubin, "shared": kernel.shared,
    }  # fmt: skip


def main() -> None:
    major, minor = map(int, sys.argv[1].split("."))
    capability = (major, minor)
    version = aot_ptx.PTX_VERSIONS[major]
    recorded = record(capability)
    calls = [call for chain in recorded for call in chain.calls]
    by_key = {aot_ptx._key(call, capability, version): call for call in calls}
    with multiprocessing.get_context("fork").Pool(2) as pool:
        found = pool.map(compile_one, [(key, call, capability, version) for key, call in by_key.items()], chunksize=1)
    aot_ptx._COMPILED.update({kernel.key: kernel for kernel, _ in found})
    programs = [aot_ptx.compile_chain(chain) for chain in recorded]
    result = {
        "version": f"{version // 10}.{version % 10}",
        "calls": len(calls),
        "kernels": [describe(kernel, by_key[kernel.key], cubin) for kernel, cubin in found],
        "round_trip": all(aot_ptx.Program.from_json(program.to_json()) == program for program in programs),
        "kernels_of_one_layer": len(set(programs[0].keys)),
        "kernels_of_two_layers": len({*programs[0].keys, *programs[1].keys}),
        "differ_from_jit": differences(calls, capability),
        "bytes": sum(len(kernel.ptx) for kernel, _ in found),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
