"""The routing of any mixture, ours or stock: find it, watch it, balance it, and its health while training."""

from .balance_fix import BalanceFix, fix_balance
from .mixture_layers import MixtureLayer, RoutingObservation, find_mixture_layers, observe_routing
from .optimizer_groups import parameter_groups
from .routing_monitor import RoutingMonitor, add_leading_callback
from .selection_bias import SelectionBiasCallback
from .skipping import skip_experts
from .statistics import LayerRouting, RoutingStatistics, routing_statistics
from .switches import disable_experts, record_routing, replay_routing, use_top_k


__all__ = [
    "BalanceFix",
    "LayerRouting",
    "MixtureLayer",
    "RoutingMonitor",
    "RoutingObservation",
    "RoutingStatistics",
    "SelectionBiasCallback",
    "add_leading_callback",
    "disable_experts",
    "find_mixture_layers",
    "fix_balance",
    "observe_routing",
    "parameter_groups",
    "record_routing",
    "replay_routing",
    "routing_statistics",
    "skip_experts",
    "use_top_k",
]
