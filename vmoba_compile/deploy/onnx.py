"""``export_onnx``: the rewritten model as an ONNX file that any runtime runs and plugins speed up."""

from __future__ import annotations

import inspect
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from ..backend import warn
from ..config import VMoBAConfig
from ..files import check_target, replacing
from ..kernels.partition import Geometry, Triple
from ..passes import ExportError, Report
from ..passes.builder import Builder
from ..passes.sizes import size_of, value_of
from .onnx_body import Rule, body_bytes, functions
from .program import Captured, capture, configured, first_line, inputs_of, options_of, relative_error, tensors_of
from .progress import Steps

OPSETS = (20, 23)
Extents = tuple[int, ...]
WRONG = 0.05  # an error that no rounding of 16 bits explains
HOPELESS = 16 * 2**30  # bytes of one attention's portable body
INSTALL = "pip install 'vmoba_compile[onnx]'"


@dataclass(frozen=True)
class OnnxExport:
    """What was written.

    ``errors`` holds ‖a - b‖ / ‖b‖ (a from ONNX Runtime, b from PyTorch) of every output on the example inputs, None where
    it was not measured; ``unverified`` then says why. ``body_bytes`` is what the portable body of the largest attention
    needs at the example's sizes; ``nodes`` counts the nodes of domain ``vmoba``; ``inputs`` has the shape of each input,
    dynamic sizes by name; ``files`` are the file and that of its weights, if they lie apart.
    """

    path: Path
    report: Report
    opset: int
    nodes: int
    body_bytes: int
    bytes: int
    inputs: Mapping[str, tuple[int | str, ...]]
    errors: Mapping[str, float] | None = None
    unverified: str = ""
    files: tuple[Path, ...] = field(default=())

    @property
    def dynamic(self) -> tuple[str, ...]:
        """Names of the sizes that may change."""
        return tuple(sorted({x for shape in self.inputs.values() for x in shape if isinstance(x, str)}))

    def ranges(self, least: int, best: int, greatest: int) -> dict[str, tuple[Extents, Extents, Extents]]:
        """``dynamic`` of ``build_engine`` where every size that may change is one of these three: a file's batch, say."""

        def filled(shape: tuple[int | str, ...], size: int) -> Extents:
            return tuple(size if isinstance(x, str) else x for x in shape)

        return {
            name: (filled(shape, least), filled(shape, best), filled(shape, greatest))
            for name, shape in self.inputs.items()
            if any(isinstance(x, str) for x in shape)
        }

    def summary(self) -> str:
        """What is in the file, in one line without its path."""
        checked = self.unverified or ", ".join(f"{name}: error {e:.1e}" for name, e in (self.errors or {}).items())
        return (
            f"opset {self.opset}, {self.nodes} vmoba nodes, {self.bytes / 2**20:,.1f} MiB, portable body up to "
            f"{self.body_bytes / 2**20:,.1f} MiB for an attention; ONNX Runtime: {checked}"
        )

    def __str__(self) -> str:
        return f"{self.path}: {self.summary()}"


def weights_path(path: Path) -> Path:
    """Where the weights of an ONNX file lie if they lie apart."""
    return path.with_name(path.name + ".data")


def export_onnx(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    path: str | os.PathLike[str] = "model.onnx",
    *,
    config: VMoBAConfig | Mapping[str, Any] | None = None,
    grid: Triple | None = None,
    dynamic_shapes: Any = None,
    dynamic_batch: bool = False,
    opset: int = 20,
    verify: bool = True,
    strict: bool = False,
    expect: int | None = None,
    external_data: bool | None = None,
    progress: bool | None = None,
) -> OnnxExport:
    """Export ``model`` to ONNX with its dense video self-attention rewritten to VMoBA attention (arXiv 2506.23858).

    Each rewritten attention is two nodes, ``vmoba.VMoBASelect`` and ``vmoba.VMoBAAttention``. Both carry a body of standard
    operators, so ONNX Runtime and TensorRT run the file as it is, with the cost and the memory of dense attention, and
    attributes by which TensorRT takes a plugin instead where one is registered.

    Args:
        model: any module, or one from :func:`vmoba_compile.optimize`, which brings its config and grid.
        args, kwargs: example inputs; float32, float16 or bfloat16 as the model takes them.
        path: of the file. Weights go to ``<path>.data`` beside it where ``external_data`` says so (None: where the file
            would pass 1.5 GB). Files that are there stay as they are until the new ones are complete and have been run,
            and where anything fails. Then the weights are moved to their place, and the file in one step after them, so
            that it never stands without its weights; see :func:`~vmoba_compile.files.replacing` for what a process
            that is killed between the two leaves. Older weights are not removed where the new file needs none.
        config, grid, strict, expect: as for :func:`vmoba_compile.optimize`.
        dynamic_shapes: of ``torch.export.export``: which sizes of the inputs may change.
        dynamic_batch: the short form for a dynamic first dimension of all inputs that share it; wants an example of batch
            2 or more.
        opset: 20, or 23, which has attention as one operator for what stays dense.
        verify: run the file in ONNX Runtime on the example inputs and report the error.
        progress: show a progress bar; None: on a terminal.

    Raises:
        ExportError: the model cannot be traced or translated, a library is missing, or the file cannot be written.
        CoverageError, GridError: as for ``optimize``. ValueError, TypeError: an argument is unknown or of the wrong type,
        or ``path`` is a folder.
    """
    _check(opset, dynamic_batch, dynamic_shapes, verify)
    args, kwargs = inputs_of(args, kwargs)
    path, config = check_target(path), configured(model, config)
    if dynamic_batch:
        dynamic_shapes = batch_shapes(model, args, kwargs)
    with Steps("export to ONNX", 5, progress) as step:
        step("tracing the model")
        captured = capture(
            model, args, kwargs, config=config, grid=grid, dynamic_shapes=dynamic_shapes, strict=strict, expect=expect
        )
        program = captured.program
        if dynamic_batch:
            _check_dynamic(program, tensors_of((captured.args, captured.kwargs))[0].shape[0])
        rule, needed = _rule(program), _largest_body(program)
        step("translating the graph")
        _spell_bool_fills(program)
        converted = _convert(captured, rule, opset)
        converted.model.metadata_props.update(
            {"vmoba_compile.config": config.to_json(), "vmoba_compile.report": captured.report.to_json()}
        )
        step("writing and checking the file")
        with replacing(path) as made:
            converted.save(made, external_data=external_data)
            _check_file(made)
            step("running it in ONNX Runtime" if verify else "not running it")
            errors, unverified = None, "not run (verify=False)"
            if verify and needed <= HOPELESS:
                errors, unverified = _measure(made, captured)
            elif verify:
                unverified = f"not run: the portable body needs {needed / 2**30:.1f} GiB for one attention"
            files = [path.parent / x.name for x in sorted(made.parent.iterdir())]
        step("done")
    if needed > HOPELESS:
        warn(
            f"vmoba_compile: the portable body of {path.name} needs {needed / 2**30:.1f} GiB for one attention at these "
            "sizes, so ONNX Runtime and engines without plugins cannot run the file; export_package and "
            "export_torch_tensorrt run the kernels themselves"
        )
    elif errors is not None and not all(error < WRONG for error in errors.values()):
        worst = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))
        warn(
            f"vmoba_compile: {path.name} differs from the model in ONNX Runtime: {worst} has error {errors[worst]:.1e}"
        )
    elif errors is None and verify:
        warn(f"vmoba_compile: {path.name} was written but is {unverified}")
    domains = [node.domain for node in converted.model.graph]
    inputs = {str(x.name): tuple(_extent(dim) for dim in x.shape or ()) for x in converted.model.graph.inputs}
    return OnnxExport(
        path, captured.report, opset, domains.count("vmoba"), needed, sum(x.stat().st_size for x in files),
        inputs, errors, unverified, tuple(files),
    )  # fmt: skip


def _extent(dim: Any) -> int | str:
    """A size that the model fixed is a number, whatever torch.onnx calls it."""
    return int(str(dim)) if str(dim).isdigit() else str(dim)


def _check(opset: int, dynamic_batch: bool, dynamic_shapes: Any, verify: bool) -> None:
    if opset not in OPSETS:
        raise ValueError(f"opset must be one of {', '.join(map(str, OPSETS))}, not {opset!r}")
    if dynamic_batch and dynamic_shapes is not None:
        raise ValueError("give either dynamic_batch or dynamic_shapes, which can mark the batch as well")
    wanted = ["onnx", "onnxscript", *(["onnxruntime"] if verify else [])]
    missing = [name for name in wanted if find_spec(name) is None]
    if missing:
        raise ExportError(f"export_onnx needs {', '.join(missing)}: {INSTALL}")


def batch_shapes(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """``dynamic_shapes`` that mark the first dimension of all tensors that have as many rows as the first tensor."""
    tensors = tensors_of((args, kwargs))
    batch = tensors[0].shape[0] if tensors and tensors[0].dim() else 0
    if batch < 2:
        raise ValueError(f"dynamic_batch wants example inputs of batch 2 or more, not {batch}: 0 and 1 stay constants")

    def mark(x: Any) -> Any:
        is_batched = isinstance(x, torch.Tensor) and x.dim() and x.shape[0] == batch
        return {0: Dim.AUTO} if is_batched else None

    inner = getattr(model, "_orig_mod", model)
    named = inspect.signature(inner.forward).bind(*args, **kwargs).arguments
    return {name: pytree.tree_map(mark, value) for name, value in named.items()}


def _check_dynamic(program: ExportedProgram, batch: int) -> None:
    """ExportError where the model fixes the batch: torch.export then takes the example's without a word."""
    found = program.graph.find_nodes(op="placeholder")
    names = set(program.graph_signature.user_inputs)
    values = [value_of(node) for node in found if node.name in names]
    if not any(isinstance(x, torch.Tensor) and x.dim() and not size_of(x.shape[0]).static for x in values):
        raise ExportError(
            f"the model fixes the batch at {batch}, the example's (a reshape to a constant, say); export it without "
            "dynamic_batch"
        )


def _rule(program: ExportedProgram) -> Rule | None:
    """How the attentions select; one body serves all of a file."""
    nodes = program.graph.find_nodes(op="call_function", target=torch.ops.vmoba.select.default)
    rules = {Rule(**{name: options_of(node)[name] for name in Rule.__dataclass_fields__}) for node in nodes}
    if len(rules) > 1:
        raise ExportError(
            "attentions of this model select in different ways (pool, mode, threshold, topk or granularity), of which one "
            "ONNX file holds one; give them all the same"
        )
    return rules.pop() if rules else None


def _largest_body(program: ExportedProgram) -> int:
    return max((body_bytes(*_sizes(node)) for node in _attentions(program)), default=0)


def _attentions(program: ExportedProgram) -> Sequence[fx.Node]:
    return program.graph.find_nodes(op="call_function", target=torch.ops.vmoba.attention.default)


def _sizes(node: fx.Node) -> tuple[Geometry, int, int]:
    """Geometry, batch and heads at the example's sizes."""
    query, *sizes = [value_of(x) if isinstance(x, fx.Node) else x for x in (node.args[0], *node.args[5:13])]
    assert isinstance(query, torch.Tensor)
    t, h, w, bt, bh, bw, prefix, suffix = (size_of(x).hint for x in sizes if isinstance(x, (int, torch.SymInt)))
    batch, heads = (size_of(x).hint for x in query.shape[:2])
    return Geometry((t, h, w), (bt, bh, bw), prefix, suffix), batch, heads


def _spell_bool_fills(program: ExportedProgram) -> None:
    """``masked_fill`` of bool tensors as logic: ONNX Runtime has no ``Where`` for them."""
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten.masked_fill.Scalar):
        value, mask, fill = node.args
        filled = value_of(node)
        if isinstance(filled, torch.Tensor) and filled.dtype == torch.bool:
            builder = Builder(program.graph, node, [])
            if fill:
                logic = builder.call(torch.ops.aten.logical_or.default, value, mask)
            else:
                rest = builder.call(torch.ops.aten.logical_not.default, mask)
                logic = builder.call(torch.ops.aten.logical_and.default, value, rest)
            node.replace_all_uses_with(logic)
            program.graph.erase_node(node)
    program.graph_module.recompile()


def _convert(captured: Captured, rule: Rule | None, opset: int) -> torch.onnx.ONNXProgram:
    from . import onnx_ops

    onnx_ops.register_schemas()
    try:
        with _quiet():
            converted = torch.onnx.export(
                captured.program, captured.args, None, kwargs=captured.kwargs, dynamo=True, opset_version=opset,
                custom_translation_table=onnx_ops.translations(), verbose=False,
            )  # fmt: skip
    except Exception as error:
        cause = _innermost(error)
        raise ExportError(f"torch.onnx cannot translate the model to opset {opset}: {cause}") from error
    assert converted is not None
    if rule is not None:
        for function in functions(rule, opset):
            converted.model.functions[function.identifier()] = function
    return converted


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter and its optimizer tell of themselves."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _check_file(path: Path) -> None:
    import onnx

    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise ExportError(f"onnx.checker refuses the file that torch.onnx made: {_innermost(error)}") from error


def _measure(path: Path, captured: Captured) -> tuple[dict[str, float] | None, str]:
    """Errors of the file in ONNX Runtime on the example inputs, or why it cannot run them."""
    import onnxruntime

    names = captured.program.graph_signature.user_inputs
    leaves = pytree.tree_leaves((captured.args, captured.kwargs))
    inputs = {n: x for n, x in zip(names, leaves, strict=True) if isinstance(n, str) and isinstance(x, torch.Tensor)}
    if any(x.dtype == torch.bfloat16 for x in (*inputs.values(), *captured.program.state_dict.values())):
        return None, "not run: ONNX Runtime's CPU provider has no bfloat16 (export in float32 or float16 to verify)"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        feeds = {x.name: inputs[x.name].detach().cpu().numpy() for x in session.get_inputs()}
        got = session.run(None, feeds)
    except Exception as error:  # its errors have no class of their own
        return None, f"not run: ONNX Runtime cannot run it: {first_line(error)}"
    with torch.no_grad():
        wanted = captured.program.module()(*captured.args, **captured.kwargs)
    outputs = zip(session.get_outputs(), got, tensors_of(wanted), strict=True)
    return {x.name: relative_error(torch.from_numpy(value), want.detach().cpu()) for x, value, want in outputs}, ""
