"""The routing of any mixture, ours or stock: find it, watch it, balance it."""

from .fix_balance import BalanceFix, fix_balance
from .mixture_layers import MixtureLayer, RoutingObservation, find_mixture_layers, observe_routing


__all__ = [
    "BalanceFix",
    "MixtureLayer",
    "RoutingObservation",
    "find_mixture_layers",
    "fix_balance",
    "observe_routing",
]
