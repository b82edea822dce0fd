"""Mixtures become checkpoints of stock architectures, and stock mixtures become ours."""

from . import dense_olmoe  # noqa: F401  registers OLMoE's dense sibling
from .fit import ExportReport, TargetReport, explain_export
from .from_stock import import_native
from .targets import EXPORT_TARGETS, ExportTarget
from .to_stock import export
from .without_sibling import WITHOUT_SIBLING


__all__ = [
    "EXPORT_TARGETS",
    "WITHOUT_SIBLING",
    "ExportReport",
    "ExportTarget",
    "TargetReport",
    "explain_export",
    "export",
    "import_native",
]
