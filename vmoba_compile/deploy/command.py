"""``python -m vmoba_compile export``: an artefact of a named model or of one's own."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..config import VMoBAConfig
from ..files import check_target, folder_beside
from ..passes import Report
from .engine import build_engine
from .onnx import OPSETS, export_onnx, weights_path
from .package import export_package
from .program import tensors_of
from .tensorrt_library import find_library

KINDS = {"onnx": ".onnx", "tensorrt": ".engine", "package": ".pt2"}
OF_ONNX = ("onnx", "tensorrt")  # engines are built from an ONNX file


@dataclass(frozen=True)
class Option:
    """An option: for which ``--to`` it is, for named models alone or not, and what it is where it is not given."""

    flag: str
    help: str
    kinds: tuple[str, ...] = tuple(KINDS)
    default: Any = None
    named: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)  # of argparse

    @property
    def name(self) -> str:
        return self.flag.removeprefix("--").replace("-", "_")

    @property
    def targets(self) -> str:
        return " and ".join(f"--to {kind}" for kind in self.kinds)


OPTIONS = (
    Option("--batch", "of a named model's example inputs (1)", default=1, named=True,
           settings={"type": int, "metavar": "N"}),
    Option("--dtype", "of a named model's weights (float32)", default="float32", named=True,
           settings={"choices": ("float32", "float16", "bfloat16")}),
    Option("--device", "where a named model is made (cuda for a package, else cpu)", named=True,
           settings={"metavar": "DEVICE"}),
    Option("--opset", f"of the ONNX file ({OPSETS[0]})", OF_ONNX, OPSETS[0],
           settings={"type": int, "choices": OPSETS}),
    Option("--dynamic-batch", "for any batch, an engine for 1 to twice the example's; wants an example of 2 or more",
           OF_ONNX, False, settings={"action": "store_true"}),
    Option("--no-verify", "do not run the ONNX file or the package on the example inputs", default=False,
           settings={"action": "store_true"}),
    Option("--runtime", "the library that builds (auto: the first that is installed)", ("tensorrt",), "auto",
           settings={"choices": ("auto", "tensorrt", "tensorrt_rtx")}),
    Option("--plugins", "how VMoBA runs in an engine (none: by its portable body)", ("tensorrt",), "none",
           settings={"choices": ("none", "aot", "jit")}),
    Option("--keep-onnx", "keep the ONNX file that the engine is built from, under this new name", ("tensorrt",),
           settings={"type": Path, "metavar": "FILE"}),
)  # fmt: skip


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Arguments of ``export`` beside those of every command."""
    command.add_argument("--to", choices=KINDS, required=True, help="what to make")
    command.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="where to, an older file is replaced; by default the model's or function's name and .onnx, .engine or .pt2",
    )
    for option in OPTIONS:  # None: not given; check() puts the defaults in
        only = "" if option.kinds == tuple(KINDS) else f"; for {option.targets}"
        command.add_argument(option.flag, default=None, help=option.help + only, **option.settings)


def check(args: argparse.Namespace) -> None:
    """Put the defaults of options in that were not given.

    Raises:
        ValueError: an option was given that the target, or a model of one's own, would not heed.
    """
    for option in OPTIONS:
        if getattr(args, option.name) is None:
            setattr(args, option.name, option.default)
        elif args.to not in option.kinds:
            raise ValueError(f"{option.flag} is for {option.targets}, not for --to {args.to}; leave it out")
        elif option.named and ":" in args.model:
            raise ValueError(f"{option.flag} is for named models; {args.model} makes its own model and inputs")


def export(
    args: argparse.Namespace, load: Callable[[], tuple[nn.Module, dict[str, Any]]], config: VMoBAConfig
) -> Report:
    """Make the artefact, say what it is, and return what was rewritten.

    Raises:
        ValueError: an option is wrong, or does not go with another; nothing was loaded. Otherwise as the functions do that
        make the artefacts.
    """
    check(args)
    suffix = KINDS[args.to]
    out = args.out or Path(args.model.rpartition(":")[2] + suffix)
    if out.suffix != suffix:
        raise ValueError(f"--out for --to {args.to} must end in {suffix}, not {out}")
    check_target(out)
    if args.to == "tensorrt":
        _check_engine(args)
    model, inputs = load()
    options = {"config": config, "grid": args.grid, "verify": not args.no_verify}
    return _MAKERS[args.to](model, inputs, out, args, options)


def _check_engine(args: argparse.Namespace) -> None:
    """What would fail only after the ONNX file was made."""
    find_library(args.runtime, args.plugins)
    if args.plugins != "none" and args.dynamic_batch:
        raise ValueError(f"--plugins {args.plugins} makes engines of fixed sizes; leave out --dynamic-batch")
    kept = args.keep_onnx
    if kept is None:
        return
    if kept.suffix != ".onnx":
        raise ValueError(f"--keep-onnx must end in .onnx, not {kept}")
    for file in (kept, weights_path(kept)):
        if os.path.lexists(file):
            raise ValueError(f"--keep-onnx replaces no file, and {file} exists; give another name or remove that file")
    check_target(kept)


def _onnx(model: nn.Module, inputs: dict[str, Any], out: Path, args: argparse.Namespace, options: Any) -> Report:
    written = export_onnx(model, (), inputs, out, opset=args.opset, dynamic_batch=args.dynamic_batch, **options)
    print(written.report)
    print(written)
    return written.report


def _engine(model: nn.Module, inputs: dict[str, Any], out: Path, args: argparse.Namespace, options: Any) -> Report:
    # Beside the engine and not in /tmp: it is as large as the weights, for which there is room here.
    with folder_beside(out) as folder:
        path = args.keep_onnx or folder / out.with_suffix(".onnx").name
        written = export_onnx(model, (), inputs, path, opset=args.opset, dynamic_batch=args.dynamic_batch, **options)
        print(written.report)
        print(written if args.keep_onnx else f"ONNX file for the engine, not kept: {written.summary()}")
        # A size that is dynamic is the batch.
        batch = tensors_of(inputs)[0].shape[0] if args.dynamic_batch else 1
        dynamic = written.ranges(1, batch, 2 * batch)
        print(build_engine(path, out, runtime=args.runtime, plugins=args.plugins, dynamic=dynamic))
    return written.report


def _package(model: nn.Module, inputs: dict[str, Any], out: Path, args: argparse.Namespace, options: Any) -> Report:
    made = export_package(model, (), inputs, out, **options)
    print(made.report)
    print(made)
    return made.report


_MAKERS = {"onnx": _onnx, "tensorrt": _engine, "package": _package}
