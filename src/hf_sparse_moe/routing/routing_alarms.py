"""Warnings for what goes wrong in routers while they train."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from transformers.utils import logging

from .statistics import LayerRouting


logger = logging.get_logger(__name__)

NAMED_EXPERTS = 8  # in one warning


@dataclass(frozen=True)
class LayerHealth:
    """
    One sparse layer since the last log.

    Args:
        label (`str`): Short, such as `"layer_3"`.
        name (`str`): The path of the block in the model.
        top_k (`int`): K.
        routing (`LayerRouting`): How many tokens each expert was chosen for.
        confidence (`float`): Mean over the tokens of the largest probability.
        dropped (`float`): Share of the assignments that found no room or, where experts choose, of the tokens that
            none chose.
        z_loss (`float`): Mean over the tokens of logsumexp(logits)^2.
        non_finite (`int`): The tokens for which the router computed NaN or infinity.
        logit_size (`torch.Tensor` of shape `(E,)`): Root mean square of each expert's logits.
    """

    label: str
    name: str
    top_k: int
    routing: LayerRouting
    confidence: float
    dropped: float
    z_loss: float
    logit_size: torch.Tensor
    non_finite: int = 0

    def values(self) -> dict[str, float]:
        """What is logged of the layer."""
        load = self.routing.load
        return {
            "load_max": load.max().item(),
            "load_min": load.min().item(),
            "max_violation": self.routing.max_violation,
            "entropy": self.routing.entropy,
            "dead_experts": len(self.routing.dead_experts),
            "confidence": self.confidence,
            "dropped": self.dropped,
            "z_loss": self.z_loss,
            "non_finite": self.non_finite,
        }

    @property
    def evenness(self) -> float:
        """The entropy, rescaled so that all tokens on the same K experts is 0, and an even load 1."""
        experts = len(self.routing.load)
        if self.top_k >= experts:
            return 1.0
        least = math.log(self.top_k) / math.log(experts)
        return (self.routing.entropy - least) / (1 - least)

    @property
    def dominance(self) -> float:
        """MaxVio over its highest possible value: 1 where one expert serves every token, 0 for an even load."""
        experts = len(self.routing.load)
        return 0.0 if self.top_k >= experts else self.routing.max_violation / (experts / self.top_k - 1)


@dataclass
class RoutingAlarms:
    """
    Warns once a layer and kind of trouble, and again only after it has cleared.

    Args:
        min_evenness (`float`): Lowest [`LayerHealth.evenness`].
        max_dominance (`float`): Highest [`LayerHealth.dominance`].
        starvation (`float`): Lowest load of an expert, as a share of an even load.
        starvation_logs (`int`): After how many logs in a row below it.
        max_z_loss (`float`): Highest mean of logsumexp(logits)^2.
        balance_remedy (`str`): What to do about an uneven load.
    """

    min_evenness: float
    max_dominance: float
    starvation: float
    starvation_logs: int
    max_z_loss: float
    balance_remedy: str
    _raised: set[tuple[str, str]] = field(default_factory=set, init=False)
    _starved_logs: dict[str, torch.Tensor] = field(default_factory=dict, init=False)  # by layer, (E,)

    def check(self, layers: list[LayerHealth]) -> None:
        """Call it once a log."""
        for layer in layers:
            troubles = {
                "collapse": self._collapse(layer),
                "starvation": self._starvation(layer),
                "logits": self._exploding_logits(layer),
                "non-finite": self._non_finite(layer),
            }
            if troubles["non-finite"] is not None:  # the cause of the others, whose remedies would not help
                troubles |= dict.fromkeys(("collapse", "starvation", "logits"))
            for kind, trouble in troubles.items():
                if trouble is None:
                    self._raised.discard((layer.label, kind))
                elif (layer.label, kind) not in self._raised:
                    self._raised.add((layer.label, kind))
                    logger.warning(f"{layer.label} (`{layer.name}`): {trouble}")

    def _collapse(self, layer: LayerHealth) -> str | None:
        if layer.evenness >= self.min_evenness and layer.dominance <= self.max_dominance:
            return None
        load = layer.routing.load
        expert = int(load.argmax())
        return (
            f"the load collapses. Expert {expert} gets {load[expert]:.1%} of the assignments (even would be "
            f"{1 / len(load):.1%}); entropy {layer.routing.entropy:.2f}, MaxVio {layer.routing.max_violation:.2f}. "
            f"{self.balance_remedy}"
        )

    def _starvation(self, layer: LayerHealth) -> str | None:
        load = layer.routing.load
        starved = load < self.starvation / len(load)
        logs = self._starved_logs.get(layer.label, torch.zeros(len(load), dtype=torch.long))
        logs = self._starved_logs[layer.label] = torch.where(starved, logs + 1, 0)
        experts = (logs >= self.starvation_logs).nonzero().flatten().tolist()
        if not experts:
            return None
        return (
            f"{_named(experts)} got less than {self.starvation:.0%} of an even load for {int(logs.max())} logs in a "
            f"row, and hardly learn. {self.balance_remedy}"
        )

    def _exploding_logits(self, layer: LayerHealth) -> str | None:
        if layer.z_loss <= self.max_z_loss:  # false for NaN
            return None
        finite = layer.logit_size.isfinite()
        if finite.all():
            expert = int(layer.logit_size.argmax())
            size = f"largest are those of expert {expert}, {layer.logit_size[expert]:.3g} in the root mean square"
        else:
            size = f"those of {_named((~finite).nonzero().flatten().tolist())} are not finite"
        return (
            f"the router's logits explode: mean logsumexp^2 is {layer.z_loss:.3g} (limit {self.max_z_loss:.3g}); "
            f"{size}. Lower the learning rate, clip gradients, or raise `router_z_loss_coef` (0.001 is common)."
        )

    def _non_finite(self, layer: LayerHealth) -> str | None:
        if layer.non_finite == 0:
            return None
        return (
            f"the router computed NaN or infinity for {layer.non_finite} tokens since the last log, which go to "
            "arbitrary experts. Their hidden states are not finite already, or the router's weights are: lower the "
            "learning rate, clip gradients, or train in bfloat16 instead of float16."
        )


def _named(experts: list[int]) -> str:
    names = ", ".join(map(str, experts[:NAMED_EXPERTS]))
    more = f" and {len(experts) - NAMED_EXPERTS} more" if len(experts) > NAMED_EXPERTS else ""
    return f"expert{'s' if len(experts) > 1 else ''} {names}{more}"
