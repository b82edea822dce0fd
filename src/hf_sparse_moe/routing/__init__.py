"""The routing of any mixture, ours or stock: find it, watch it, balance it."""

from .fix_balance import BalanceFix, fix_balance
from .mixture_layers import MixtureLayer, RoutingObservation, find_mixture_layers, observe_routing
from .switches import disable_experts, record_routing, replay_routing, use_top_k


__all__ = [
    "BalanceFix",
    "MixtureLayer",
    "RoutingObservation",
    "disable_experts",
    "find_mixture_layers",
    "fix_balance",
    "observe_routing",
    "record_routing",
    "replay_routing",
    "use_top_k",
]
