"""Errors of the compiler. Each message names the place and the remedy."""

from __future__ import annotations


class RewriteError(RuntimeError):
    """The rewrite cannot do what was asked for; the model is unchanged."""


class GridError(RewriteError, ValueError):
    """The grid given by the caller contradicts the graph."""


class CoverageError(RewriteError):
    """Fewer attentions were rewritten than ``strict=True`` or ``expect=N`` asks for."""


class InputError(RewriteError, ValueError):
    """The model itself rejects these inputs, with or without the rewrite."""


class ExportError(RewriteError):
    """An artefact cannot be made of the model, or by the libraries that are installed."""
