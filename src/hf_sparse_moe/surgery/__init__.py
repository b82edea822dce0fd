"""Mixtures with other experts: measured, pruned, merged; and the way back to a dense model."""

from .adapter_pruning import prune_adapter
from .densifying import to_dense
from .expanding import expand
from .measurements import ExpertMeasurements
from .measuring import measure_experts
from .merging import merge_experts
from .pruning import prune_experts
from .rewriting import SurgeryReport


__all__ = [
    "ExpertMeasurements",
    "SurgeryReport",
    "expand",
    "measure_experts",
    "merge_experts",
    "prune_adapter",
    "prune_experts",
    "to_dense",
]
