"""How the experts of one layer start from its dense feed-forward. E experts, I intermediate, H hidden."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass
class DenseWeights:
    """
    One dense feed-forward in the experts' layout, without the experts' dimension.

    Args:
        up (`torch.Tensor`): (2I, H) with the gate's rows first where gated, else (I, H).
        down (`torch.Tensor`): (H, I).
        up_bias, down_bias (`torch.Tensor`, *optional*): (2I,) or (I,), and (H,).
        gated (`bool`): Whether `up` holds gate and up.
    """

    up: torch.Tensor
    down: torch.Tensor
    up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None
    gated: bool

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> DenseWeights:
        """The same function of each tensor."""
        up_bias, down_bias = (None if bias is None else function(bias) for bias in (self.up_bias, self.down_bias))
        return DenseWeights(function(self.up), function(self.down), up_bias, down_bias, self.gated)


def copy_experts(dense: DenseWeights, num_experts: int, generator: torch.Generator) -> DenseWeights:
    """Every expert is the dense feed-forward (sparse upcycling, arXiv 2212.05055)."""

    return dense.map(lambda tensor: tensor.unsqueeze(0).repeat(num_experts, *[1] * tensor.dim()))


# Each takes a layer's dense weights, the number of experts and the layer's own random generator, and gives the same
# tensors with a leading dimension E.
INITIALIZATION_METHODS: dict[str, Callable[[DenseWeights, int, torch.Generator], DenseWeights]] = {
    "copy": copy_experts,
}
