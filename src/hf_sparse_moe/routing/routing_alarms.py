"""Warnings for what goes wrong in routers while they train."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from transformers.utils import logging

from .statistics import LayerRouting


logger = logging.get_logger(__name__)

NAMED_EXPERTS = 8  # in one warning
ASSIGNMENTS_PER_EXPERT = 100  # in a window, on average: fewer tell a starved expert from chance too rarely
RECOVERY = 0.05  # an evenness that rises by more from one window to the next is on its way up
CLEARANCE = 0.1  # a trouble is over when the load is this much better than the limit


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
        learns (`bool`): Whether the router has weights. Of a hash, neither probabilities nor logits say anything.
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
    learns: bool = True

    def values(self) -> dict[str, float]:
        """What is logged of the layer."""
        load = self.routing.load
        of_logits = {"confidence": self.confidence, "z_loss": self.z_loss} if self.learns else {}
        return {
            "load_max": load.max().item(),
            "load_min": load.min().item(),
            "max_violation": self.routing.max_violation,
            "entropy": self.routing.entropy,
            "dead_experts": len(self.routing.dead_experts),
            "dropped": self.dropped,
            "non_finite": self.non_finite,
            **of_logits,
        }


@dataclass
class _Window:
    """What is known of a layer since step `begins`, and for how long it has been in trouble."""

    begins: int
    counts: torch.Tensor  # (E,)
    evenness: float = 0.0  # of the window before
    uneven_since: int | None = None
    starved_since: torch.Tensor | None = None  # (E,): the step, -1 for an expert that is not starved


@dataclass
class RoutingAlarms:
    """
    Warns once a layer and kind of trouble, and again only after it has clearly gone.

    The load is judged over windows, not log by log: a router that was just made sends neighbouring tokens to the same
    experts, and evens out within some dozens of steps. A window has at least half of `patience` steps and
    `ASSIGNMENTS_PER_EXPERT` times E assignments, however often is logged.

    Args:
        min_evenness (`float`): Lowest [`evenness`] of a window.
        max_dominance (`float`): Highest [`dominance`] of a window.
        starvation (`float`): Lowest load of an expert, as a share of an even load.
        patience (`int`): For how many optimizer steps an uneven load must last, and not recover; starvation half as
            long again.
        max_z_loss (`float`): Highest mean of logsumexp(logits)^2.
        balance_remedy (`str`): What to do about an uneven load.
    """

    min_evenness: float
    max_dominance: float
    starvation: float
    patience: int
    max_z_loss: float
    balance_remedy: str
    _raised: set[tuple[str, str]] = field(default_factory=set, init=False)
    _windows: dict[str, _Window] = field(default_factory=dict, init=False)  # by layer

    def check(self, layers: list[LayerHealth], step: int, last: int = 0) -> None:
        """
        Call it once a log.

        Args:
            layers (`list[LayerHealth]`): Since the last log.
            step (`int`): The optimizer steps so far.
            last (`int`, defaults to 0): Those at the last log.
        """
        for layer in layers:
            if layer.non_finite > 0:  # the cause of all else, whose remedies would not help
                self._tell(layer, "non-finite", self._non_finite(layer))
                self._windows.pop(layer.label, None)
                continue
            self._tell(layer, "non-finite", None)
            self._tell(layer, "logits", self._exploding_logits(layer) if layer.learns else None)
            counts = layer.routing.counts.sum(dim=0)
            window = self._windows.setdefault(layer.label, _Window(last, torch.zeros_like(counts)))
            window.counts = window.counts + counts
            enough = window.counts.sum() >= ASSIGNMENTS_PER_EXPERT * len(counts)
            if enough and 2 * (step - window.begins) >= self.patience:
                self._judge(layer, window, step)
                window.begins, window.counts = step, torch.zeros_like(counts)

    def _tell(self, layer: LayerHealth, kind: str, trouble: str | None) -> None:
        if trouble is None:
            self._raised.discard((layer.label, kind))
        elif (layer.label, kind) not in self._raised:
            self._raised.add((layer.label, kind))
            logger.warning(f"{layer.label} (`{layer.name}`): {trouble}")

    def _judge(self, layer: LayerHealth, window: _Window, step: int) -> None:
        load = window.counts / window.counts.sum()
        even, dominant = evenness(load, layer.top_k), dominance(load, layer.top_k)
        margin = CLEARANCE if (layer.label, "collapse") in self._raised else 0.0
        if even >= self.min_evenness + margin and dominant <= self.max_dominance - margin:
            window.uneven_since = None
            self._tell(layer, "collapse", None)
        elif window.uneven_since is None or even > window.evenness + RECOVERY:
            window.uneven_since = window.begins
        window.evenness = even
        if window.uneven_since is not None and step - window.uneven_since >= self.patience:
            self._tell(layer, "collapse", self._collapse(load, layer.top_k))
        starved = load < self.starvation / len(load)
        since = torch.full((len(load),), -1) if window.starved_since is None else window.starved_since
        window.starved_since = torch.where(starved, torch.where(since < 0, window.begins, since), -1)
        hungry = (window.starved_since >= 0) & (2 * (step - window.starved_since) >= 3 * self.patience)
        experts = hungry.nonzero().flatten().tolist()
        if (layer.label, "collapse") not in self._raised:  # which starves experts, and has been told
            self._tell(layer, "starvation", self._starvation(experts) if experts else None)

    def _collapse(self, load: torch.Tensor, top_k: int) -> str:
        expert = int(load.argmax())
        return (
            f"the load collapses. Expert {expert} gets {load[expert]:.1%} of the assignments (even would be "
            f"{1 / len(load):.1%}), and for {self.patience} steps it has not become more even (evenness "
            f"{evenness(load, top_k):.2f} of 1). {self.balance_remedy}"
        )

    def _starvation(self, experts: list[int]) -> str:
        return (
            f"{_named(experts)} got less than {self.starvation:.0%} of an even load for {3 * self.patience // 2} "
            f"steps, and hardly learn. {self.balance_remedy}"
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

    def _non_finite(self, layer: LayerHealth) -> str:
        return (
            f"the router computed NaN or infinity for {layer.non_finite} tokens since the last log, which go to "
            "arbitrary experts. Their hidden states are not finite already, or the router's weights are: lower the "
            "learning rate, clip gradients, or train in bfloat16 instead of float16."
        )


def evenness(load_E: torch.Tensor, top_k: int) -> float:
    """The entropy of a load, rescaled so that all tokens on the same K experts is 0, and an even load 1."""
    experts = len(load_E)
    if top_k >= experts:
        return 1.0
    entropy = torch.special.entr(load_E).sum().item()
    return (entropy - math.log(top_k)) / (math.log(experts) - math.log(top_k))


def dominance(load_E: torch.Tensor, top_k: int) -> float:
    """MaxVio over its highest possible value: 1 where one expert serves every token, 0 for an even load."""
    experts = len(load_E)
    return 0.0 if top_k >= experts else (load_E.max().item() * experts - 1) / (experts / top_k - 1)


def _named(experts: list[int]) -> str:
    names = ", ".join(map(str, experts[:NAMED_EXPERTS]))
    more = f" and {len(experts) - NAMED_EXPERTS} more" if len(experts) > NAMED_EXPERTS else ""
    return f"expert{'s' if len(experts) > 1 else ''} {names}{more}"
