"""Looking inside a mixture: which expert serves what."""

from .explanation import RoutingExplanation, explain_routing
from .pictures import expert_load_table, plot_expert_load


__all__ = ["RoutingExplanation", "expert_load_table", "explain_routing", "plot_expert_load"]
