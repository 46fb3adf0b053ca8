"""``export_torch_tensorrt``: everything but VMoBA attention in TensorRT engines, VMoBA's own kernels between them.

``torch_tensorrt`` is imported within the functions only; torch-tensorrt and torch-tensorrt-rtx both bear that name.
"""

from __future__ import annotations

import logging
import math
import operator
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from ..config import VMoBAConfig
from ..files import check_target, replacing
from ..kernels.partition import Triple
from ..passes import ExportError, Report
from ..passes.recognise import module_path
from .program import capture, first_line, inputs_of, relative_error, tensors_of
from .progress import Steps
from .tensorrt_library import plain

DISTRIBUTIONS = ("torch-tensorrt", "torch-tensorrt-rtx")
_ENGINE = "_run_on_acc"  # in the names of what Torch-TensorRT makes engines of


@dataclass(frozen=True)
class InPyTorch:
    """An operator that runs in PyTorch between the engines, where it is in the model, and why."""

    operator: str
    module: str
    reason: str

    def __str__(self) -> str:
        return f"{self.operator}{f' of {self.module}' if self.module else ''}: {self.reason}"


@dataclass(frozen=True)
class TorchTensorRT:
    """A model in TensorRT engines. Call it as the model itself; it gives what the model gives.

    ``engines`` counts the engines, ``in_pytorch`` holds every operator outside of them, ``seconds`` is the time that
    Torch-TensorRT took and ``library`` which one it was. ``error`` is ‖a - b‖ / ‖b‖ of the results on the example inputs, a
    from the engines and b from the rewritten model in PyTorch; None if they were not compared.
    """

    module: fx.GraphModule
    report: Report
    engines: int
    in_pytorch: tuple[InPyTorch, ...]
    seconds: float
    library: str
    path: Path | None = None
    error: float | None = None
    args: tuple[Any, ...] = field(default=(), repr=False)
    kwargs: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return self.module(*args, **kwargs)

    def __str__(self) -> str:
        own = sum(x.operator.startswith("vmoba.") for x in self.in_pytorch)
        rest = [str(x) for x in self.in_pytorch if not x.operator.startswith("vmoba.")]
        return (
            f"{self.engines} engines of {self.library} in {self.seconds:.1f} s, {own} vmoba operators between them"
            + (f"; also in PyTorch: {'; '.join(rest)}" if rest else "")
            + ("" if self.error is None else f"; error {self.error:.1e}")
            + f" ({self.report.summary()})"
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write an exported program that holds the engines; :func:`load_torch_tensorrt` reads it.

        The file is for the GPU architecture and the versions of the libraries that made it, and for inputs of the sizes
        of the example. One that is there is replaced in one step once the new one is complete; until then, and where
        anything fails, it stays as it was.

        Raises:
            ExportError: the module cannot be exported, or the file not be written. ValueError: ``path`` is a folder.
        """
        path = check_target(path)
        try:
            with torch.no_grad(), _quiet():
                program = torch.export.export(self.module, self.args, dict(self.kwargs), strict=False)
                with replacing(path) as made:
                    torch.export.save(program, str(made))
        except ExportError:
            raise
        except Exception as error:
            raise ExportError(
                f"the engines of {self.library} cannot be written to {path}: {first_line(error)}"
            ) from error
        return path


def export_torch_tensorrt(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    path: str | os.PathLike[str] | None = None,
    *,
    config: VMoBAConfig | Mapping[str, Any] | None = None,
    grid: Triple | None = None,
    dynamic_shapes: Any = None,
    strict: bool = False,
    expect: int | None = None,
    min_block_size: int = 5,
    verify: bool = True,
    progress: bool | None = None,
    **options: Any,
) -> TorchTensorRT:
    """Compile ``model`` with Torch-TensorRT, its dense video self-attention rewritten to VMoBA attention (arXiv 2506.23858).

    VMoBA runs its Triton kernels between the engines. Needs the GPU that is to run the model, and no plugin.

    Args:
        model: any module on a GPU, or one from :func:`vmoba_compile.optimize`, which brings its config and grid. Layers
            compute in the types that the model has.
        args, kwargs: example inputs on the same GPU; float32, float16 or bfloat16 as the model takes them.
        path: where to save the result too (see :meth:`TorchTensorRT.save`); None: not at all.
        config, grid, strict, expect: as for :func:`vmoba_compile.optimize`.
        dynamic_shapes: of ``torch.export.export``: which sizes of the inputs may change.
        min_block_size: fewer operators than this between two that stay in PyTorch stay there as well.
        verify: run the result on the example inputs and compare it with the rewritten model in PyTorch.
        progress: show a progress bar; None: on a terminal.
        **options: more for ``torch_tensorrt.dynamo.compile``: ``workspace_size``, ``optimization_level``, say.

    Raises:
        ExportError: there is no GPU, Torch-TensorRT is missing or cannot compile the model, or it cannot be traced; or, with
        ``verify``, the engines fail, or give NaN where PyTorch does not.
        ValueError, TypeError: inputs are of the wrong type or not on a GPU, or ``path`` is a folder. CoverageError,
        GridError: as for ``optimize``.
    """
    args, kwargs = inputs_of(args, kwargs)
    torch_tensorrt, library = find_torch_tensorrt()
    device = _device(model, args, kwargs)
    if path is not None:
        path = check_target(path)
    with Steps("compiling with Torch-TensorRT", 3, progress) as step:
        step("tracing the model")
        captured = capture(
            model, args, kwargs, config=config, grid=grid, dynamic_shapes=dynamic_shapes, strict=strict, expect=expect
        )
        with torch.no_grad():
            expected = captured.program.module()(*captured.args, **captured.kwargs) if verify else None
        step("building engines")
        start = time.perf_counter()
        settings = {
            "device": device,
            "min_block_size": min_block_size,
            "disable_tf32": torch.get_float32_matmul_precision() == "highest",
            # By default, Torch-TensorRT takes every mask of attention for a causal one.
            "attn_bias_is_causal": False,
            **options,
        }
        errors: list[str] = []
        try:
            with torch.no_grad(), _quiet(), _logged(errors):
                module = torch_tensorrt.dynamo.compile(
                    captured.program, arg_inputs=list(captured.args), kwarg_inputs=captured.kwargs, **settings
                )
        except Exception as error:
            cause = plain(errors[-1]) if errors else first_line(error)  # a builder's failure surfaces as a TypeError
            raise ExportError(f"Torch-TensorRT cannot compile {type(model).__name__}: {cause}") from error
        seconds = time.perf_counter() - start
        engines, outside = partition(module)
        left = tuple(_left(node, torch_tensorrt, min_block_size) for node in outside)
        made = TorchTensorRT(
            module, captured.report, engines, left, seconds, library,
            path, None, captured.args, captured.kwargs,
        )  # fmt: skip
        if verify:
            made = replace(made, error=_compare(made, expected))
        step("saving" if path is not None else "not saving")
        if path is not None:
            made.save(path)
    return made


def _compare(made: TorchTensorRT, expected: Any) -> float:
    remedy = "another dtype of the model, float16 for example, may avoid it"
    try:
        error = relative_error(made(*made.args, **made.kwargs), expected)
    except RuntimeError as failure:
        raise ExportError(f"the engines of {made.library} fail: {first_line(failure)} ({remedy})") from failure
    if math.isnan(error) and all(x.isfinite().all() for x in tensors_of(expected) if x.is_floating_point()):
        raise ExportError(f"the engines of {made.library} give NaN where PyTorch gives numbers ({remedy})")
    return error


def load_torch_tensorrt(path: str | os.PathLike[str]) -> Callable[..., Any]:
    """What :meth:`TorchTensorRT.save` wrote, as a module that is called like the model.

    Import what defines the classes of the model's inputs and results first: nothing in the file says how to.

    Raises:
        FileNotFoundError: there is no such file. ExportError: no GPU, no Torch-TensorRT, or another version of it; a
        class that the program holds is unknown.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    _, library = find_torch_tensorrt()
    from ..kernels import ops  # noqa: F401  registers the operators that the program holds

    try:
        with _quiet():
            return torch.export.load(str(path)).module()
    except Exception as error:
        raise ExportError(f"{library} cannot load {path}: {_unknown_class(error) or first_line(error)}") from error


def _unknown_class(error: BaseException | None) -> str:
    """Where the program holds a class, such as that of the model's result, which nobody has imported: so in a sentence."""
    while error is not None:
        found = re.search(r"Deserializing (\S+) in pytree is not registered", str(error))
        if found:
            module = found[1].rpartition(".")[0]
            return f"its inputs or results are of {found[1]}; import {module} before"
        error = error.__cause__ or error.__context__
    return ""


def find_torch_tensorrt() -> tuple[ModuleType, str]:
    """The module and its distribution with its version. ExportError says what is missing."""
    if not torch.cuda.is_available():
        raise ExportError("Torch-TensorRT builds engines on the GPU that runs them, and torch sees no GPU")
    installed = [(name, number) for name in DISTRIBUTIONS if (number := _version(name))]
    wanted = ".".join(torch.__version__.split(".")[:2])
    name, number = installed[0] if installed else (DISTRIBUTIONS[0], None)
    install = f"pip install '{name}=={wanted}.*'"
    if number is None:
        raise ExportError(f"this needs Torch-TensorRT for torch {wanted}: {install}")
    try:
        with _quiet():
            import torch_tensorrt
    except Exception as error:  # it raises plain Exceptions where a library does not load
        raise ExportError(
            f"{name} {number} cannot be imported with torch {torch.__version__}: {first_line(error)} ({install})"
        ) from error
    return torch_tensorrt, f"{name} {number}"


def partition(module: fx.GraphModule) -> tuple[int, list[fx.Node]]:
    """How many engines Torch-TensorRT made, and the nodes outside of them."""
    parts = {name: part for name, part in module.named_children() if "_run_on_" in name}
    rest = [part for name, part in parts.items() if _ENGINE not in name and isinstance(part, fx.GraphModule)]
    nodes = [node for graph in (module, *rest) for node in graph.graph.nodes]
    outside = [node for node in nodes if node.op == "call_function" and node.target is not operator.getitem]
    return sum(_ENGINE in name for name in parts), outside


def _left(node: fx.Node, torch_tensorrt: ModuleType, min_block_size: int) -> InPyTorch:
    converters = torch_tensorrt.dynamo.conversion.DYNAMO_CONVERTERS
    name = str(node.target).removesuffix(".default")
    if name.startswith("vmoba."):
        reason = "runs its own kernels"
    elif node not in converters:
        reason = "no converter of Torch-TensorRT takes it"
        if "scaled_dot_product" in name:
            reason += " (decompose_attention=True makes plain operators of it)"
    else:
        reason = f"it stands among fewer than {min_block_size} operators that an engine could hold"
    return InPyTorch(name, module_path(node), reason)


def _device(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.device:
    """The one GPU of the inputs and of the weights."""
    tensors = [x for x in pytree.tree_leaves((tuple(args), dict(kwargs))) if isinstance(x, torch.Tensor)]
    devices = {x.device for x in (*tensors, *model.parameters())}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        names = ", ".join(sorted(map(str, devices))) or "no device"
        raise ValueError(f"the model and its inputs must be on one GPU, not on {names}")
    return devices.pop()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of a library about its own deprecations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _logged(errors: list[str]) -> Iterator[None]:
    """Collect what the library logs as errors."""
    handler = logging.Handler(logging.ERROR)
    handler.addFilter(lambda record: record.name.startswith("torch_tensorrt"))
    handler.emit = lambda record: errors.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
