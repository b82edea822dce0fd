"""Looking inside a mixture: which expert serves what."""

from hf_sparse_moe.analysis.pictures import expert_load_table, plot_expert_load
from hf_sparse_moe.analysis.routing import LayerRouting, RoutingStatistics, routing_statistics


__all__ = ["LayerRouting", "RoutingStatistics", "expert_load_table", "plot_expert_load", "routing_statistics"]
