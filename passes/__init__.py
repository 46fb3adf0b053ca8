"""Passes: fx.Graph in, fx.Graph out. Recognise attention, track tokens, decide, replace."""

from .. import kernels  # noqa: F401  the operators that the passes name must be registered
from .errors import CoverageError, ExportError, GridError, InputError, RewriteError
from .report import Layers, Reason, Report, Site
from .rewrite import rewrite

__all__ = [
    "CoverageError", "ExportError", "GridError", "InputError", "Layers", "Reason", "Report", "RewriteError", "Site",
    "rewrite",
]  # fmt: skip
