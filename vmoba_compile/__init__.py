"""VMoBA sparse attention for any video diffusion transformer, by rewriting its graph (arXiv 2506.23858)."""

from . import balance
from ._version import __version__
from .config import VMoBAConfig
from .deploy.engine import Engine, build_engine
from .deploy.onnx import OnnxExport, export_onnx
from .deploy.package import Package, export_package
from .deploy.torch_tensorrt import TorchTensorRT, export_torch_tensorrt, load_torch_tensorrt
from .explain import explain
from .kernels import Selection, attention, select
from .measure import measure
from .optimize import OptimizedModel, optimize, report
from .passes import CoverageError, ExportError, GridError, InputError, Report, RewriteError, Site
from .schedule import Schedule
from .verify import Verification, verify

__all__ = [
    "CoverageError", "Engine", "ExportError", "GridError", "InputError", "OnnxExport", "OptimizedModel", "Package", "Report",
    "RewriteError", "Schedule", "Selection", "Site", "TorchTensorRT", "VMoBAConfig", "Verification", "__version__",
    "attention", "balance", "build_engine", "explain", "export_onnx", "export_package", "export_torch_tensorrt",
    "load_torch_tensorrt", "measure", "optimize", "report", "select", "verify",
]  # fmt: skip
