"""Smaller mixtures, and the way back to a dense model."""

from .densifying import DenseReport, to_dense


__all__ = ["DenseReport", "to_dense"]
