"""Smaller mixtures, and the way back to a dense model."""

from .densifying import DenseReport, to_dense
from .pruning import prune_experts
from .rewriting import SurgeryReport


__all__ = ["DenseReport", "SurgeryReport", "prune_experts", "to_dense"]
