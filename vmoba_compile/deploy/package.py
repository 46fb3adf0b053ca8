"""Ahead-of-time compiled packages: a rewritten model with its Triton kernels inside, run without Python or vmoba_compile."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from .._version import __version__
from ..backend import _sound
from ..config import VMoBAConfig
from ..files import check_target, replacing
from ..kernels.partition import Triple
from ..passes import ExportError, Report
from ..passes.recognise import module_path
from .program import Captured, capture, configured, first_line, relative_error, tensors_of
from .replay import DYNAMIC, Replays

METADATA = "vmoba_compile"  # the key of what a package tells of itself
LOADER = "import sys, torch; torch._inductor.aoti_load_package(sys.argv[1])"

_METADATA, _SHIMS = "aot_inductor.metadata", "aot_inductor.custom_ops_to_c_shims"
_ELSEWHERE = (
    "aot_inductor.package_cpp_only", "aot_inductor.emit_multi_arch_kernel", "aot_inductor.cross_target_platform",
    "aot_inductor_mode.compile_standalone",
)  # fmt: skip
_OPERATORS = (torch.ops.vmoba.select.default, torch.ops.vmoba.attention.default)


@dataclass(frozen=True)
class Package:
    """A package that was written, see :func:`export_package`."""

    path: Path
    report: Report
    kernels: tuple[str, ...]  # VMoBA's Triton kernels inside
    bytes: int
    seconds: float  # that compiling it took
    error: float | None  # relative to the rewritten program; None if it was not compared

    def __str__(self) -> str:
        compared = "not run (verify=False)" if self.error is None else f"error {self.error:.1e}"
        return (
            f"{self.path}: {self.bytes / 2**20:,.1f} MiB, {len(self.kernels)} VMoBA kernels, {self.seconds:.1f} s to"
            f" compile; run on the example inputs: {compared}"
        )

    def load(self) -> Any:
        """The package as a callable that takes what the model took."""
        return torch._inductor.aoti_load_package(str(self.path))


def export_package(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    path: str | Path = "model.pt2",
    *,
    config: VMoBAConfig | Mapping[str, Any] | None = None,
    grid: Triple | None = None,
    dynamic_shapes: Any = None,
    strict: bool = False,
    expect: int | None = None,
    inductor_options: Mapping[str, Any] | None = None,
    verify: bool = False,
) -> Package:
    """Compile ``model`` for inference with AOTInductor, its video attention rewritten, into the file ``path`` (.pt2).

    The package is for the GPU that the model is on, and others of its compute capability with at least as many
    multiprocessors. It is loaded by ``torch._inductor.aoti_load_package(path)`` in Python, where vmoba_compile is not
    needed, or by ``torch::inductor::AOTIModelPackageLoader`` in C++, see examples/package_cpp. Attention of fixed sizes runs
    the kernels that ``optimize`` runs on this GPU, recorded here, and any other the portable ones. A model that returns a
    class of its library's needs that library where it is loaded in Python (diffusers' ``return_dict=False`` does without).

    The other arguments are those of ``capture``: with ``dynamic_shapes`` the batch may be dynamic, with a largest size, but
    not the grid. ``inductor_options`` are Inductor's. ``verify`` loads the package, first in a process of its own, runs it
    on the given inputs and compares it with the rewritten program. A file that is there is replaced in one step once the
    package is complete and, with ``verify``, has run; until then, and where anything fails, it stays as it was.

    Raises:
        ExportError: the model is not on a GPU, torch.export or AOTInductor cannot do it, or the package cannot be loaded,
        run or written. ValueError: a bad ``path``. TypeError: inputs of the wrong type.
        GridError, CoverageError: see ``capture``.
    """
    path = _checked(path)
    config = configured(model, config)
    from ..kernels import inline  # imports triton

    captured = capture(
        model, args, kwargs, config=config, grid=grid, dynamic_shapes=dynamic_shapes, strict=strict, expect=expect
    )
    program = captured.program
    device = _device(program, captured)
    expected = _run(program.module(), captured) if verify else None
    given = dict(inductor_options or {})
    replays = Replays(device) if device.type == "cuda" and not _built_elsewhere(given) else None
    replace_operators(program, replays)
    about = json.dumps(_about(model, captured, device, config))
    # Kernels that are tried on invented inputs would follow invented lists to any address; the model's own inputs are used.
    options = {**_sound(), "triton.autotune_at_compile_time": False, **given}
    options[_METADATA] = {**given.get(_METADATA, {}), METADATA: about}
    start = time.perf_counter()
    with replacing(path) as made, tempfile.TemporaryDirectory() as folder:
        kernels = set(replays.kernels() if replays else ())
        shims = replays.declarations(Path(folder)) if replays else {}
        if shims:
            options[_SHIMS] = shims | given.get(_SHIMS, torch._inductor.config.aot_inductor.custom_ops_to_c_shims)
        running = replays.compiling() if replays else nullcontext()
        with running, inline.watch() as launches, torch.no_grad():
            try:
                torch._inductor.aoti_compile_and_package(program, package_path=str(made), inductor_configs=options)
            except Exception as error:
                cause = first_line(error)
                raise ExportError(f"AOTInductor cannot compile {type(model).__name__}: {cause}") from error
        seconds = time.perf_counter() - start
        package = Package(
            made, captured.report, tuple(sorted(kernels | set(launches))), made.stat().st_size, seconds, None
        )
        if expected is not None:
            package = replace(package, error=_compare(package, captured, expected))
    return replace(package, path=path)


def _compare(package: Package, captured: Captured, expected: Any) -> float:
    # First in a process of its own: a package that crashes would take this one along. Other errors come again below.
    loading = subprocess.run([sys.executable, "-P", "-c", LOADER, str(package.path)], capture_output=True, check=False)
    if loading.returncode < 0:
        compiler = os.environ.get("CXX", "the default C++ compiler")
        raise ExportError(
            "the package was compiled but ends the process that loads it"
            f" ({signal.Signals(-loading.returncode).name}), as do those of compilers that link libstdc++ statically:"
            f" {compiler} may be one; name another in CXX (verify=True)"
        )
    try:
        return relative_error(_run(package.load(), captured), expected)
    except Exception as error:
        cause = first_line(error)
        raise ExportError(f"the package was compiled but cannot be loaded and run: {cause} (verify=True)") from error


def read_about(path: str | Path) -> dict[str, Any]:
    """What a package tells of itself: ``config``, ``report``, ``inputs`` in the order in which C++ hands them over, where
    it was made. Nothing of the package is loaded.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it is no package of :func:`export_package`.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no package {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith("_metadata.json"):
                    told = json.loads(archive.read(name)).get(METADATA)
                    if told is not None:
                        return json.loads(told)
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a package: {error}") from error
    raise ValueError(f"{path} was not made by vmoba_compile.export_package")


def replace_operators(program: ExportedProgram, replays: Replays | None = None) -> int:
    """Put recorded launches in place of the opaque operators, or else the inline operators; how many attentions there were.

    Raises:
        ExportError: an operator has neither form, or cannot run.
    """
    from triton.errors import TritonError

    from ..kernels import inline

    operators = torch.ops.vmoba
    forms = {
        operators.select.default: operators.select_inline.default,
        operators.attention.default: operators.attention_inline.default,
    }
    done, portable = 0, dict[str, list[str]]()
    for node in list(program.graph.nodes):
        if node.op != "call_function" or node.target not in forms:
            continue
        kwargs = dict(node.kwargs)
        implementation = kwargs.pop("implementation", "auto")
        if implementation == "reference":
            raise ExportError(
                "a package holds Triton kernels, but the model asks for implementation='reference'; leave it at 'auto'"
            )
        args, given = _values((node.args, kwargs))
        reason = inline.why_not(node.target, args, given, lambda n: _largest(program, n))
        if reason:
            raise ExportError(f"a package cannot hold the attention at {module_path(node) or node.name}: {reason}")
        done += node.target is operators.attention.default
        path = module_path(node) or node.name
        try:
            reason = replays.exchange(node) if replays else "launches are not recorded in such a package"
        except ValueError as error:
            raise ExportError(f"a package cannot hold the attention at {path}: {error}") from error
        except (RuntimeError, TritonError) as error:
            raise ExportError(f"the attention at {path} cannot run on this GPU: {first_line(error)}") from error
        if not reason:
            continue
        if implementation == "hopper":
            raise ExportError(
                f"the attention at {path} asks for implementation='hopper', which packages have as recorded launches alone:"
                f" {reason}; leave it at 'auto'"
            )
        if replays and reason != DYNAMIC:
            portable.setdefault(reason, []).append(path)
        node.target, node.kwargs = forms[node.target], kwargs
    for reason, paths in portable.items():
        places = ", ".join(dict.fromkeys(paths))
        warnings.warn(f"the package has the portable kernels for the attention at {places}: {reason}", stacklevel=3)
    program.graph_module.recompile()
    return done


def _built_elsewhere(options: Mapping[str, Any]) -> bool:
    """Whether what is generated is to be built elsewhere or for other GPUs: launches are recorded for this one."""
    chosen = torch._inductor.config.get_config_copy() | dict(options)
    return any(chosen.get(name) for name in _ELSEWHERE)


def _checked(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix != ".pt2":
        raise ValueError(f"path must end in .pt2, as packages of PyTorch do, not {str(path)!r}")
    return check_target(path)


def _device(program: ExportedProgram, captured: Captured) -> torch.device:
    """The one that the model is on. Raises ExportError where its package could not hold the kernels."""
    tensors = [*program.state_dict.values(), *tensors_of((captured.args, captured.kwargs))]
    device = tensors[0].device if tensors else torch.device("cpu")
    has_attention = any(node.target in _OPERATORS for node in program.graph.nodes)
    if has_attention and device.type != "cuda":
        raise ExportError(
            "a package holds VMoBA attention as kernels for NVIDIA GPUs, but the model is on the device"
            f" {str(device)!r}; move it and its inputs to a GPU with .to('cuda') before the export"
        )
    return device


def _about(model: nn.Module, captured: Captured, device: torch.device, config: VMoBAConfig) -> dict[str, Any]:
    inputs = [
        {"name": name, "dtype": str(x.dtype).removeprefix("torch."), "shape": list(x.shape)}
        for name, x in _named((captured.args, captured.kwargs))
    ]
    facts: dict[str, Any] = {
        "version": __version__, "torch": torch.__version__, "platform": platform.platform(),
        "model": type(model).__name__, "device": str(device), "config": config.to_dict(),
        "report": json.loads(captured.report.to_json()), "inputs": inputs,
    }  # fmt: skip
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["compute_capability"] = list(torch.cuda.get_device_capability(device))
        facts["multiprocessors"] = torch.cuda.get_device_properties(device).multi_processor_count
    return facts


def _named(tree: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors of (args, kwargs) in the order in which a package in C++ takes them."""
    for keys, leaf in torch.utils._pytree.tree_flatten_with_path(tree)[0]:
        if isinstance(leaf, Tensor):
            yield torch.utils._pytree.keystr(keys[1:]), leaf


def _values(tree: Any) -> Any:
    """The fake values in place of the nodes."""
    return fx.map_arg(tree, lambda node: node.meta["val"])


def _largest(program: ExportedProgram, size: torch.SymInt) -> int | None:
    """The largest value that a dynamic size may take, None if it has no bound."""
    from torch.utils._sympy.value_ranges import bound_sympy

    upper = bound_sympy(size.node.expr, dict(program.range_constraints)).upper
    return int(upper) if upper.is_Integer else None


def _run(call: Any, captured: Captured) -> Any:
    with torch.no_grad():
        return call(*captured.args, **captured.kwargs)
