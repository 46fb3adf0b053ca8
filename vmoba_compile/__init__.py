"""VMoBA sparse attention for any video diffusion transformer, by rewriting its graph (arXiv 2506.23858)."""

from ._version import __version__
from .config import VMoBAConfig
from .explain import explain
from .kernels import Selection, attention, select
from .optimize import OptimizedModel, optimize, report
from .passes import CoverageError, GridError, InputError, Report, RewriteError, Site
from .schedule import Schedule
from .verify import Verification, verify

__all__ = [
    "CoverageError", "GridError", "InputError", "OptimizedModel", "Report", "RewriteError", "Schedule", "Selection",
    "Site", "VMoBAConfig", "Verification", "__version__", "attention", "explain", "optimize", "report", "select", "verify",
]  # fmt: skip
