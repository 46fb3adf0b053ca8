"""Graphs as text, for a person who wants to see what the rewrite did: into torch's structured trace, and into a folder."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import fx


def dump(gm: fx.GraphModule, name: str, folder: str | Path | None = None) -> Path | None:
    """Write ``gm``, with the graphs that it calls, as text.

    The text goes into torch's structured trace (the folder that ``TORCH_TRACE`` names, read with ``tlparse``) as the
    artifact ``vmoba_<name>``, and with ``folder`` into ``<folder>/<name>.py`` too, in place of one that is there. With
    several processes of ``torch.distributed`` the file's name begins with ``rank<number>_``. The graph is left as it is.
    Without a trace and a folder nothing is computed.

    Args:
        name: letters, digits, dots, dashes and underlines, such as ``graph_1_before``.
        folder: made where it is missing.

    Returns:
        The file, None without a folder.

    Raises:
        ValueError: the name would not be that of one file. OSError: the folder cannot be written to.
    """
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"a dump's name has letters, digits, dots, dashes and underlines alone, not {name!r}")
    torch._logging.trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": f"vmoba_{name}", "encoding": "string"},
        payload_fn=lambda: text_of(gm),
        expect_trace_id=False,  # graphs of exported programs have none
    )
    if folder is None:
        return None
    path = Path(folder) / f"{_rank()}{name}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text_of(gm), encoding="utf-8")
    return path


def text_of(gm: fx.GraphModule) -> str:
    """The graph as Python, a line a node with dtype, shape, strides and device, and the source lines that made it."""
    return gm.print_readable(print_output=False, include_stride=True, include_device=True)


def _rank() -> str:
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return ""
    return f"rank{distributed.get_rank()}_"
