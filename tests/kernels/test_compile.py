"""Every Triton kernel compiles for every architecture and stays within its limits; no GPU is needed.

``compile_kernels.py`` compiles in a process of its own: under ``TRITON_INTERPRET=1``, which the other tests set on
machines without a GPU, a kernel is not a thing that can be compiled.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import vmoba_compile.kernels

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("compile")]  # what is compiled is kept for all tests here
pytest.importorskip("triton")

KERNELS = Path(vmoba_compile.kernels.__file__).parent
SCRIPT = Path(__file__).parents[1] / "support" / "compile_kernels.py"

SHARED = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99}  # KiB that one program may have
REGISTER_FILE = 65536  # of a multiprocessor, 32 bits each
TENSOR_COLUMNS = 512  # of the tensor memory of sm_100
ONLY_HOPPER = ["attend_hopper.py", "backward_hopper.py"]  # modules whose kernels run on sm_90 alone

every_arch = pytest.mark.parametrize("arch", SHARED)

Result = dict[str, Any]


class Which(NamedTuple):
    """Kernels of one name, all or some of them."""

    name: str
    arch: str = ""
    dtype: str = ""  # of the first pointer
    constexprs: tuple[tuple[str, int], ...] = ()

    def matches(self, result: Result) -> bool:
        return (
            result["name"] == self.name
            and self.arch in ("", result["arch"])
            and self.dtype in ("", result["dtype"])
            and all(result["constexprs"][name] == value for name, value in self.constexprs)
        )

    def __str__(self) -> str:
        values = (f"{name}{value}" for name, value in self.constexprs)
        return "-".join(filter(None, (self.arch, self.name, self.dtype, *values)))


def which(name: str, arch: str = "", dtype: str = "", **constexprs: int) -> Which:
    return Which(name, arch, dtype, tuple(constexprs.items()))


# Bytes spilled, stores and loads: measured with triton 3.7.1 and 3.6.0, a little rounded up. The first that matches counts.
ALLOWED_SPILLS = [
    # A program of 8 or 16 warps holds keys and weights of whole rows of the gate.
    (which("_select_rows", BOXES=2048), 5120),
    (which("_select_rows", BOXES=1024), 1024),
    (which("_select_rows", DIM=256), 320),
    (which("_select_rows"), 32),
    # Stores before the roles part and in the warps that pack and merge; those that attend reload a few values.
    (which("attend_everything"), 448),
    # Without a tensor core that reads shared memory, queries and keys lie in registers as well.
    (which("attend_tiles", "sm_80", "bf16", D=64), 384),
    (which("attend_tiles", "sm_120", "bf16", D=64), 256),
    (which("attend_tiles", "sm_120", "bf16", D=128), 2400),
    # Not looked into.
    (which("attend_tiles", "sm_100", "bf16", D=256), 384),
    (which("attend_tiles", "sm_90", "bf16", D=128), 128),
    # Hardly any of it in the loops over keys.
    (which("attend_queries", "sm_90", "bf16", D=128), 448),
    (which("attend_queries", "sm_100", "bf16", D=128), 160),
    (which("attend_queries", "sm_80", "bf16"), 160),
    # Float32 products without tensor cores; more with triton 3.6.0.
    (which("attend_queries", "sm_80", "fp32", D=64), 704),
    (which("attend_queries", "sm_120", "fp32", D=128), 1600),
    # Statistics in float64, once a pool.
    (which("find_bracket"), 128),
    (which("find_cut"), 32),
    # Held at 168 registers, so that three programs share a multiprocessor; gate_bits where it lists the last entries.
    (which("gate_bits", "sm_100"), 768),
    (which("gate_bits"), 64),
    (which("gate_histogram"), 64),
    (which("gate_range"), 96),
    # A row of 256 float32 keys and one of values at once; bound by memory.
    (which("pack_keys", dtype="fp32", D=256), 448),
    (which("pack_keys"), 32),
    (which("scatter_entries"), 32),
    # Float32 products without tensor cores; tiles of queries and of gradients that lie in registers.
    (which("gradients_of_queries", dtype="fp32"), 1700),
    (which("gradients_of_queries", "sm_80", "bf16"), 1800),
    (which("gradients_of_queries", "sm_120", "bf16"), 1300),
    # Two sums of a block of keys at once.
    (which("gradients_of_keys", "sm_100", "bf16", D=128), 900),
    (which("gradients_of_keys"), 512),
    (which("hopper_gradients_of_keys"), 16),
]

# Kernels that do not fit yet. They are left out of test_limits, and fail as "xpass" when they do fit.
KNOWN = {
    which("_select_rows", "sm_80", "bf16", BOXES=2048): "51,472 bytes of spills, 40 registers: ptxas gives up",
    which("attend_tiles", "sm_80", "bf16", D=256): "5,784 bytes of spills",
    which("attend_tiles", "sm_120", "bf16", D=256): "4,784 bytes of spills",
    which("attend_tiles", "sm_80", "fp32", D=64): "4,096 bytes of spills",
    which("attend_tiles", "sm_90", "fp32", D=64): "9,532 bytes of spills",
    which("attend_tiles", "sm_100", "fp32", D=64): "86,452 bytes of spills, 32 registers: ptxas gives up",
    which("attend_tiles", "sm_120", "fp32", D=64): "3,832 bytes of spills",
    which("attend_tiles", "sm_120", "fp32", D=128): "35,620 bytes of spills, 40 registers: ptxas gives up",
}


def launched() -> dict[str, set[str]]:
    """Names that each module of the package passes to ``Work.launch``."""
    names = {}
    for path in sorted(KERNELS.glob("*.py")):
        if path.name in ("launches.py", "inline.py", "aot_driver.py"):  # they make the launches
            continue
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        around = [call.lineno for call in calls if isinstance(call.func, ast.Subscript)]
        assert not around, f"{path}: a kernel launched without Work.launch(), lines {around}"
        kernels = [
            call.args[0] for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "launch"
        ]
        assert all(isinstance(kernel, ast.Name) for kernel in kernels), f"{path}: launch() of something without a name"
        names[path.name] = {kernel.id for kernel in kernels if isinstance(kernel, ast.Name)}
    return names


@cache
def compiled(arch: str) -> list[Result]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-P", str(SCRIPT), arch], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def problems(result: Result) -> list[str]:
    """What keeps a compiled kernel from running, or from running well."""
    if "error" in result:
        return [result["error"]]
    found = []
    if result["shared"] > 1024 * SHARED[result["arch"]]:
        found.append(f"{result['shared']} bytes of shared memory, limit {1024 * SHARED[result['arch']]}")
    if result["registers"] * result["threads"] > REGISTER_FILE:
        found.append(f"{result['registers']} registers for {result['threads']} threads")
    if result["tensor_columns"] > TENSOR_COLUMNS:
        found.append(f"{result['tensor_columns']} columns of tensor memory")
    allowed = next((size for kernel, size in ALLOWED_SPILLS if kernel.matches(result)), 0)
    if result["spills"] > allowed:
        found.append(f"{result['spills']} bytes of spills, allowed {allowed}")
    if result["serialized"]:
        found.append("ptxas made wgmma wait after each instruction")
    return found


@every_arch
def test_every_kernel_is_compiled(arch):
    wanted = [names for module, names in launched().items() if arch == "sm_90" or module not in ONLY_HOPPER]
    assert {result["name"] for result in compiled(arch)} == set().union(*wanted)


@every_arch
def test_limits(arch):
    wrong = [
        f"{result}: {'; '.join(problems(result))}"
        for result in compiled(arch)
        if problems(result) and not any(kernel.matches(result) for kernel in KNOWN)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "kernel",
    [
        pytest.param(kernel, id=str(kernel), marks=pytest.mark.xfail(strict=True, reason=reason, raises=AssertionError))
        for kernel, reason in KNOWN.items()
    ],
)
def test_known_not_to_fit(kernel):
    """Remove the entry when this passes."""
    found = [result for result in compiled(kernel.arch) if kernel.matches(result)]
    if not found:
        raise LookupError(f"{kernel} is not compiled any more: remove it from KNOWN")
    assert not any(problems(result) for result in found)
