"""``python -m vmoba_compile``: the command line."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import bench
from .config import VMoBAConfig
from .deploy.command import add_arguments, export
from .explain import explain
from .files import check_target, replacing
from .kernels.partition import Triple
from .passes import Report, RewriteError
from .zoo import PRESETS, preset


def parse_grid(text: str) -> Triple:
    """``21x30x52`` as (21, 30, 52)."""
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"a grid is FRAMESxROWSxCOLUMNS in tokens, such as 21x30x52, not {text!r}")
    return (int(parts[0]), int(parts[1]), int(parts[2]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m vmoba_compile", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    models = "models: " + ", ".join(PRESETS)
    explained = commands.add_parser(
        "explain",
        help="what optimize would rewrite in a model, and why not the rest",
        description="Trace a model without computing anything and list its attentions.",
        epilog=models,
    )
    exported = commands.add_parser(
        "export",
        help="an ONNX file, a TensorRT engine or a compiled package of a rewritten model",
        description="Rewrite a model and make an artefact of it. Named models have random weights.",
        epilog=models,
    )
    for command in (explained, exported):
        command.add_argument("model", help="a model's name, or module:function returning (model, keyword arguments)")
        command.add_argument("--tokens", type=parse_grid, metavar="TxHxW", help="token grid of a named model's input")
        command.add_argument(
            "--layers", type=int, metavar="N", help="layers of a named model, fewer are faster to trace"
        )
        command.add_argument("--grid", type=parse_grid, metavar="TxHxW", help="the grid= of optimize")
        command.add_argument("--config", type=Path, metavar="FILE", help="a VMoBAConfig as JSON")
        command.add_argument("--min-tokens", type=int, metavar="N", help="the min_tokens of the configuration")
        command.add_argument("--save", type=Path, metavar="FILE", help="write the report as .json or .html")
    add_arguments(exported)
    benched = commands.add_parser(
        "bench",
        help="dense against sparse attention on this device, and from how many tokens sparse is faster",
        description="Time one attention on this device, dense and sparse.",
    )
    bench.add_arguments(benched, parse_grid)
    return parser


def _load(args: argparse.Namespace) -> tuple[nn.Module, dict[str, Any]]:
    if ":" not in args.model:
        sizes: dict[str, Any] = {} if args.layers is None else {"num_layers": args.layers}
        if args.command == "export":
            sizes["device"] = args.device or ("cuda" if args.to == "package" and torch.cuda.is_available() else "cpu")
            sizes |= {"batch": args.batch, "dtype": getattr(torch, args.dtype)}
        return preset(args.model).build(grid=args.tokens, **sizes)
    module, _, function = args.model.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot load {args.model!r}: {error}") from error
    loaded = found()
    pair = loaded if isinstance(loaded, tuple) and len(loaded) == 2 else (None, None)
    if not isinstance(pair[0], nn.Module) or not isinstance(pair[1], dict):
        kinds = [type(x).__name__ for x in (loaded if isinstance(loaded, tuple) else (loaded,))]
        given = f"({', '.join(kinds)})" if isinstance(loaded, tuple) else kinds[0]
        raise ValueError(f"{args.model} must return (model, dict of keyword arguments), not {given}")
    if args.tokens or args.layers:
        raise ValueError("--tokens and --layers are for named models; module:function makes its own inputs")
    return loaded


def _explain(args: argparse.Namespace, config: VMoBAConfig) -> Report:
    model, inputs = _load(args)
    start = time.perf_counter()
    found = explain(model, config=config, grid=args.grid, **inputs)
    print(found)
    print(f"traced in {time.perf_counter() - start:.1f} s; nothing was computed")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 where nothing is rewritten or decided, 2 on wrong use."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        if args.command == "bench":
            return bench.run(args)
        if args.save:
            if args.save.suffix not in (".json", ".html"):
                raise ValueError(f"--save takes a .json or .html file, not {args.save}")
            check_target(args.save)
        options = json.loads(args.config.read_text()) if args.config else {}
        if not isinstance(options, dict):
            raise ValueError(f"{args.config} must hold a JSON object of VMoBAConfig's fields")
        if args.min_tokens is not None:
            options["min_tokens"] = args.min_tokens
        config = VMoBAConfig.from_dict(options)
        found = _explain(args, config) if args.command == "explain" else export(args, lambda: _load(args), config)
        if args.save:
            with replacing(args.save) as made:
                found.save(made)
    except (RewriteError, ValueError, TypeError, ImportError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0 if found.rewritten else 1


if __name__ == "__main__":
    sys.exit(main())
