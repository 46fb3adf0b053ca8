"""PTX of recorded calls, for any compute capability and without a GPU, in the form that other runtimes launch.

A runtime passes the inputs of a call, then integers of 32 bits, then its outputs, and nothing else. Triton's own kernels
have their parameters in the order of the source, and two more for scratch memory that a launcher would allocate.
PTX names its parameters, so declaring them in another order is all that it takes; those two are taken out, after it is
certain that nothing uses them. An output that is an input changed in place has a parameter that the kernel does not read.

Floats and integers of 64 bits are compile-time values. Integers are specialised as Triton's just-in-time compiler does
it: equal to 1, or divisible by 16, where the kernel allows it; every pointer is a multiple of 16.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .aot import Call, Capability, Chain

# Lowest PTX version that knows the target, and what Triton makes for it: drivers of CUDA 12.5, 12.7 and 12.8 read it.
PTX_VERSIONS = {8: 85, 9: 85, 10: 86, 12: 87}
# Bytes of shared memory that one program may have.
SHARED_MEMORY = {(8, 0): 163, (8, 6): 99, (8, 7): 163, (8, 9): 99, (9, 0): 227, (10, 0): 227, (10, 3): 227, (12, 0): 99,
                 (12, 1): 99}  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    """One function: ``arguments`` are "input", "number:<parameter>" and "output", in the order in which they are passed."""

    key: str
    name: str
    ptx: str
    threads: int  # of a block, along its first axis
    shared: int  # bytes, dynamic
    arguments: tuple[str, ...]
    capability: Capability

    @property
    def numbers(self) -> tuple[str, ...]:
        """Parameters that are integers of 32 bits."""
        return tuple(x.partition(":")[2] for x in self.arguments if x.startswith("number:"))


@dataclass(frozen=True)
class Program:
    """A chain with its compiled kernels: ``keys`` has the one of every call. Several programs may share ``kernels``."""

    chain: Chain
    keys: tuple[str, ...]
    kernels: dict[str, Kernel]

    def to_json(self) -> str:
        kernels = {key: asdict(self.kernels[key]) for key in dict.fromkeys(self.keys)}
        return json.dumps({"chain": json.loads(self.chain.to_json()), "keys": self.keys, "kernels": kernels})

    @classmethod
    def from_json(cls, text: str) -> Program:
        data = json.loads(text)
        kernels = {
            key: Kernel(**kernel | {name: tuple(kernel[name]) for name in ("arguments", "capability")})
            for key, kernel in data["kernels"].items()
        }
        return cls(Chain.from_json(json.dumps(data["chain"])), tuple(data["keys"]), kernels)


_COMPILED: dict[str, Kernel] = {}


def compile_chain(chain: Chain, ptx_version: int | None = None) -> Program:
    """PTX of every call, equal ones once; kept by the process, so that equal layers cost nothing.

    ``ptx_version`` 85 makes PTX 8.5, for drivers that read no newer one; None: the lowest that the target allows.

    Raises:
        RuntimeError: under ``TRITON_INTERPRET=1``; a kernel needs more shared memory than the target has, or Triton's
        ``ptxas`` knows no such PTX version.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("kernels cannot be compiled under TRITON_INTERPRET=1: unset it and start Python again")
    version = ptx_version or PTX_VERSIONS.get(chain.capability[0])
    if version is None:
        known = ", ".join(f"{major}.x" for major in PTX_VERSIONS)
        raise ValueError(f"compute capability must be one of {known}, not {chain.capability[0]}.{chain.capability[1]}")
    keys = []
    for call in chain.calls:
        key = _key(call, chain.capability, version)
        if key not in _COMPILED:
            _COMPILED[key] = _compile(call, key, chain.capability, version)
        keys.append(key)
    return Program(chain, tuple(keys), {key: _COMPILED[key] for key in keys})


def assemble(kernel: Kernel) -> bytes:
    """The cubin of a kernel, by the ``ptxas`` that comes with Triton; RuntimeError with its message where it refuses."""
    major, minor = kernel.capability
    knobs = triton.knobs.nvidia
    tool = knobs.ptxas_blackwell if major >= 10 and hasattr(knobs, "ptxas_blackwell") else knobs.ptxas
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(kernel.ptx)
        suffix = "a" if major >= 9 else ""
        command = [tool.path, f"--gpu-name=sm_{10 * major + minor}{suffix}", str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"ptxas refuses {kernel.name}: {done.stderr.strip()}")
        return target.read_bytes()


def find(kernel: str) -> Any:
    """The Triton function "module:name"."""
    module, _, name = kernel.rpartition(":")
    return getattr(importlib.import_module(module), name)


def specialise(call: Call, function: Any) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], Any]]:
    """Signature, compile-time values and attributes of a call, as the just-in-time compiler would have them."""
    signature, constants, attributes = {}, dict(call.constants), {}
    for number, parameter in enumerate(function.params):
        name = parameter.name
        value = call.numbers.get(name)
        if name not in call.types or (value == 1 and not parameter.do_not_specialize):
            signature[name] = "constexpr"
            constants.setdefault(name, value)
            continue
        signature[name] = call.types[name]
        by_16 = value is None or (value % 16 == 0 and not parameter.do_not_specialize)
        if by_16 and not parameter.do_not_specialize_on_alignment:
            attributes[(number,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _key(call: Call, capability: Capability, version: int) -> str:
    function = find(call.kernel)
    signature, constants, attributes = specialise(call, function)
    ports = [[port.parameter for port in ports] for ports in (call.inputs, call.outputs)]
    known = [
        call.kernel,
        function.cache_key,
        signature,
        constants,
        str(attributes),
        ports,
        call.options,
        capability,
        version,
    ]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]


def _compile(call: Call, key: str, capability: Capability, version: int) -> Kernel:
    function = find(call.kernel)
    signature, constants, attributes = specialise(call, function)
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    source = ASTSource(
        function, signature, {(function.arg_names.index(k),): v for k, v in constants.items()}, attributes
    )
    try:
        compiled = triton.compile(source, target=target, options=dict(call.options) | {"ptx_version": version})
    except triton.runtime.errors.PTXASError as error:
        told = re.findall(r"fatal\s*: (.*)", str(error)) or [str(error).strip().splitlines()[0]]
        raise RuntimeError(
            f"the ptxas of this Triton refuses {call.name} as PTX {version / 10:.1f}: {told[0]}"
        ) from error
    metadata = compiled.metadata
    hidden = {x: getattr(metadata, x, 0) for x in ("global_scratch_size", "profile_scratch_size")}
    if any(hidden.values()):
        raise RuntimeError(
            f"{call.name} needs scratch memory of Triton's launcher, which no other runtime has: {hidden}"
        )
    limit = 1024 * SHARED_MEMORY.get(capability, 99)
    if metadata.shared > limit:
        raise RuntimeError(
            f"{call.name} needs {metadata.shared} bytes of shared memory, and compute capability"
            f" {capability[0]}.{capability[1]} has {limit}: use larger blocks, a smaller head size or 16-bit tensors"
        )
    passed = [name for name, kind in signature.items() if kind != "constexpr"]
    ptx, arguments = arrange(without_lines(compiled.asm["ptx"]), metadata.name, passed, call)
    check_roles(call, ptx)
    threads = re.search(r"\.reqntid (\d+)", ptx)
    if threads is None or int(threads[1]) != 32 * metadata.num_warps:
        raise RuntimeError(f"{call.name} is compiled for another number of threads than {32 * metadata.num_warps}")
    return Kernel(key, metadata.name, ptx, int(threads[1]), metadata.shared, arguments, capability)


def arrange(ptx: str, name: str, passed: list[str], call: Call) -> tuple[str, tuple[str, ...]]:
    """``ptx`` with the parameters of its entry ``name`` as inputs, integers, outputs, and what these are.

    ``passed`` are the parameters in the order of the source; what Triton adds behind them must be unused.
    """
    entry = re.search(rf"\.entry {re.escape(name)}\(([^)]*)\)", ptx)
    if entry is None or len(re.findall(r"\.entry\b", ptx)) != 1 or re.search(r"^\s*(\.visible\s+)?\.func\b", ptx, re.M):
        raise RuntimeError(f"{name}: the PTX is not one kernel alone")
    body = ptx[entry.end() :]
    declared = [line.strip() for line in entry[1].split(",")]
    for declaration in declared[len(passed) :]:
        if re.search(rf"\b{declaration.split()[-1]}\b", body):
            raise RuntimeError(f"{name} uses the hidden parameter {declaration.split()[-1]}")
    if len(declared) < len(passed):
        raise RuntimeError(f"{name} has {len(declared)} parameters, and {len(passed)} are passed")
    known = dict(zip(passed, declared, strict=False))
    lines: list[str] = []
    arguments: list[str] = []

    def pointer(parameter: str) -> str:
        # A pointer that nothing reads: an input changed in place comes back as an output.
        return known.pop(parameter) if parameter else f".param .u64 {name}_unused_{len(lines)}"

    written = [port.parameter for port in call.outputs]
    for port in call.inputs:
        lines.append(pointer(port.parameter))
        arguments.append("input")
    for parameter in [x for x in known if x not in written]:
        lines.append(known.pop(parameter))
        arguments.append(f"number:{parameter}")
    for parameter in written:
        lines.append(pointer(parameter))
        arguments.append("output")
    assert not known, known
    start, end = entry.span(1)
    return ptx[:start] + "\n\t" + ",\n\t".join(lines) + "\n" + ptx[end:], tuple(arguments)


def without_lines(ptx: str) -> str:
    """Without comments and what a debugger would read: source lines, and the paths of this machine."""
    ptx = re.sub(r"^\s*\.section\s+\.debug_\w+\s*\{.*?^\s*\}", "", ptx, flags=re.M | re.S)
    kept = (re.sub(r"\s*//.*", "", line) for line in ptx.splitlines())
    return "\n".join(line for line in kept if line.strip() and not re.match(r"\s*\.(loc|file)\b", line)) + "\n"


_REGISTER = re.compile(r"%\w+")


def accesses(ptx: str) -> dict[str, set[str]]:
    """Which of "load", "store" and "atomic" reach the memory behind each parameter of a kernel, by the parameter's name.

    Registers are followed from the parameters through whatever is computed from them, in any order: at least what happens.
    """
    steps: list[tuple[list[str], set[str]]] = []  # registers set, registers and parameters used
    memory: list[tuple[str, set[str]]] = []
    for line in re.split(r"[;\n]", ptx[ptx.index("{") :]):
        line = re.sub(r"^\s*(\$\w+:)?\s*(@!?%\w+\s+)?", "", line.split("//")[0])
        code, _, rest = line.partition(" " if "\t" not in line else "\t")
        code, rest = code.strip(), rest.strip()
        if not code or code.startswith((".", "$", "{", "}")) or not rest:
            continue
        brackets = [set(re.findall(r"[%\w]+", part)) for part in re.findall(r"\[([^\]]*)\]", rest)]
        target = re.match(r"\{([^}]*)\}|([^,]+)", rest)
        sets = _REGISTER.findall(target[0]) if target else []
        if code.startswith("ld.param"):
            steps.append((sets, brackets[0]))
        elif brackets:
            kind = "store" if code.startswith("st.") else "atomic" if code.startswith(("atom", "red")) else "load"
            memory += [(kind, used) for used in brackets]
        else:
            steps.append((sets, set(_REGISTER.findall(rest)) - set(sets)))
    names = set(re.findall(r"\.param\s[^,)]*?(\w+)\s*[,\n)]", ptx))
    origin: dict[str, set[str]] = {name: {name} for name in names}
    changed = True
    while changed:
        changed = False
        for sets, used in steps:
            found = set().union(*(origin.get(x, set()) for x in used))
            for register in sets:
                have = origin.setdefault(register, set())
                if not found <= have:
                    have |= found
                    changed = True
    result: dict[str, set[str]] = {name: set() for name in names}
    for kind, used in memory:
        for x in used:
            for name in origin.get(x, ()):
                result[name].add(kind)
    return result


def check_roles(call: Call, ptx: str) -> None:
    """RuntimeError where the code does with a pointer what ``aot.ROLES`` denies."""
    entry = re.search(r"\.entry \w+\(([^)]*)\)", ptx)
    assert entry is not None
    lines = [line.split()[-1] for line in entry[1].split(",")]
    reached = accesses(ptx)
    changed = {port.alias for port in call.outputs}
    for number, port in enumerate(call.inputs):
        wrong = reached[lines[number]] - {"load"}
        if wrong and number not in changed:
            raise RuntimeError(f"{call.name} writes to {port.parameter}, which aot.ROLES has as read")
    for port, line in zip(reversed(call.outputs), reversed(lines), strict=False):
        if reached[line] - {"store"}:
            raise RuntimeError(f"{call.name} reads {port.parameter}, which aot.ROLES has as written alone")
