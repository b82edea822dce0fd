"""Mixtures become checkpoints of stock architectures, and stock mixtures become ours."""

from hf_sparse_moe.models import dense_olmoe  # noqa: F401  registers OLMoE's dense sibling

from .fit import ExportExplanation, TargetReport, explain_export
from .from_stock import ImportReport, import_stock
from .servers import explain_serving
from .targets import EXPORT_TARGETS, ExportTarget
from .to_stock import ExportReport, export


__all__ = [
    "EXPORT_TARGETS",
    "ExportExplanation",
    "ExportReport",
    "ExportTarget",
    "ImportReport",
    "TargetReport",
    "explain_export",
    "explain_serving",
    "export",
    "import_stock",
]
