"""``python -m vmoba_compile export``: an artefact of a named model or of one's own."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..config import VMoBAConfig
from ..passes import Report
from .engine import build_engine
from .onnx import OPSETS, export_onnx
from .package import export_package

KINDS = {"onnx": ".onnx", "tensorrt": ".engine", "package": ".pt2"}


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Arguments of ``export`` beside those of every command."""
    command.add_argument("--to", choices=KINDS, required=True, help="what to make")
    command.add_argument("--out", type=Path, metavar="FILE", help="where to; by default <model>.onnx, .engine or .pt2")
    command.add_argument("--batch", type=int, default=1, metavar="N", help="batch of a named model's example inputs")
    command.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of a named model's weights"
    )
    command.add_argument("--device", metavar="DEVICE", help="where a named model is made; cuda for a package, else cpu")
    command.add_argument("--opset", type=int, choices=OPSETS, default=OPSETS[0], help="of the ONNX file")
    command.add_argument(
        "--dynamic-batch", action="store_true", help="an ONNX file for any batch; wants --batch 2 or more"
    )
    command.add_argument("--no-verify", action="store_true", help="do not run the artefact on the example inputs")
    command.add_argument("--runtime", choices=("auto", "tensorrt", "tensorrt_rtx"), default="auto", help="that builds")
    command.add_argument("--plugins", choices=("none", "aot", "jit"), default="none", help="for TensorRT engines")


def export(
    args: argparse.Namespace, load: Callable[[], tuple[nn.Module, dict[str, Any]]], config: VMoBAConfig
) -> Report:
    """Make the artefact, say what it is, and return what was rewritten."""
    suffix = KINDS[args.to]
    out = args.out or Path(args.model.rpartition(":")[2] + suffix)
    if out.suffix != suffix:
        raise ValueError(f"--out for --to {args.to} must end in {suffix}, not {out}")
    model, inputs = load()
    options: Mapping[str, Any] = {"config": config, "grid": args.grid}
    if args.to == "package":
        made = export_package(model, (), inputs, out, verify=not args.no_verify, **options)
        print(made.report)
        print(made)
        return made.report
    onnx_path = out if args.to == "onnx" else out.with_suffix(".onnx")
    written = export_onnx(
        model,
        (),
        inputs,
        onnx_path,
        opset=args.opset,
        dynamic_batch=args.dynamic_batch,
        verify=not args.no_verify,
        **options,
    )
    print(written.report)
    print(written)
    if args.to == "tensorrt":
        dynamic = written.ranges(1, args.batch, 2 * args.batch)  # a size that is dynamic is the batch
        print(build_engine(onnx_path, out, runtime=args.runtime, plugins=args.plugins, dynamic=dynamic))
    return written.report
