"""Callbacks for `transformers.Trainer`."""

from .leading_callback import add_leading_callback
from .routing_monitor import RoutingMonitor
from .selection_bias import SelectionBiasCallback


__all__ = ["RoutingMonitor", "SelectionBiasCallback", "add_leading_callback"]
