"""
The losses: of the task, computed here and not by the dense head; of the routers; and those that somebody else computes
and that leave the balance loss out, which are refused.

Dense heads of transformers swallow `num_items_in_batch` in their `**kwargs` while Trainer, which passed it, stops
dividing by the accumulation steps; their loss and gradient then grow with those. Each task loss here equals the dense
head's own without `num_items_in_batch`, and with it sums over the micro-batches of a step to the loss of the whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.loss.loss_utils import (
    ForCausalLMLoss,
    ForMaskedLMLoss,
    ForQuestionAnsweringLoss,
    ForSequenceClassificationLoss,
    fixed_cross_entropy,
)

from .balancing import GlobalLoad, balance, load_balancing_loss, masked_mean, router_z_loss, sequence_balancing_loss
from .moe_block import SparseMoeBlock
from .routing import RoutingEvent, active_record


Count = Any  # a tensor, a number, or None


def batch_weight(counted_labels: torch.Tensor | None, num_items_in_batch: Count) -> torch.Tensor | float:
    """
    The share of one micro-batch in an optimizer step: its labels over those of the step. The shares of a step sum to
    1 however it is split, which is what keeps the balance losses' gradient the same.

    Args:
        counted_labels (`torch.Tensor`, *optional*): The micro-batch's labels as Trainer counts them, -100 ignored.
        num_items_in_batch (`torch.Tensor` or `int`, *optional*): The step's labels; None for a mean loss.
    """
    if counted_labels is None or num_items_in_batch is None:
        return 1.0
    return counted_labels.ne(-100).sum() / num_items_in_batch


def shifted_labels(labels: torch.Tensor) -> torch.Tensor:
    """The labels of a causal LM that are predicted: the first of each row has nothing before it."""
    return labels[..., 1:]


def one_label_a_span(labels: torch.Tensor) -> torch.Tensor:
    """An answer span counts once, not by its two ends."""
    return labels[..., 0]


# Every loss below takes the dense head's outputs, the labels, the config and the step's label count.


def causal_lm_loss(outputs: Any, labels: torch.Tensor, config: PreTrainedConfig, count: Count) -> torch.Tensor:
    """Cross entropy of each token given those before it. Logits (B, S, V), labels (B, S), not yet shifted."""
    return ForCausalLMLoss(outputs.logits.contiguous(), labels.contiguous(), outputs.logits.shape[-1], count)


def language_model_loss(outputs: Any, labels: torch.Tensor, config: PreTrainedConfig, count: Count) -> torch.Tensor:
    """Cross entropy of each labelled token: masked LM, seq2seq, token classes. Logits (B, S, V), labels (B, S)."""
    return ForMaskedLMLoss(outputs.logits.contiguous(), labels.contiguous(), outputs.logits.shape[-1], count)


def sequence_classification_loss(
    outputs: Any, labels: torch.Tensor, config: PreTrainedConfig, count: Count
) -> torch.Tensor:
    """Cross entropy, mean squared error or binary cross entropy, by `config.problem_type`. Logits (B, labels)."""
    loss = ForSequenceClassificationLoss(labels, outputs.logits, config, num_items_in_batch=count)
    if config.problem_type != "single_label_classification":  # the only kind that transformers normalises
        loss = loss * batch_weight(labels, count)
    return loss


def multiple_choice_loss(outputs: Any, labels: torch.Tensor, config: PreTrainedConfig, count: Count) -> torch.Tensor:
    """Cross entropy over the choices. Logits (B, choices), labels (B,)."""
    return fixed_cross_entropy(outputs.logits, labels.to(outputs.logits.device), count)


def question_answering_loss(
    outputs: Any, labels: torch.Tensor, config: PreTrainedConfig, count: Count
) -> torch.Tensor:
    """Mean of the cross entropies of the span's start and end. Logits (B, S), labels (B, 2), see [`span_labels`]."""
    start, end = labels.unbind(dim=-1)
    return ForQuestionAnsweringLoss(outputs.start_logits, outputs.end_logits, start, end, num_items_in_batch=count)


def span_labels(start_positions: torch.Tensor | None, end_positions: torch.Tensor | None) -> torch.Tensor | None:
    """Answer spans as one tensor (B, 2); None unless both ends are given."""
    if start_positions is None or end_positions is None:
        return None
    return torch.stack([start_positions.reshape(-1), end_positions.reshape(-1)], dim=-1)


# ---- of the routers ---------------------------------------------------------------------------------------------


def load_balancing_losses(
    events: list[RoutingEvent],
    probabilities: list[torch.Tensor],
    balance_scope: str,
    weight: torch.Tensor | float,
    labels: torch.Tensor | None = None,
    num_items_in_batch: Count = None,
    global_load: GlobalLoad | None = None,
) -> tuple[torch.Tensor, torch.Tensor | float]:
    """
    The load-balancing loss of each layer; pads do not count.

    Args:
        events (`list[RoutingEvent]`): Of a forward pass, one a layer.
        probabilities (`list[torch.Tensor]` of shape `(T, E)`): Of each layer, each row summing to 1.
        balance_scope (`str`): Over which tokens the load is evened.
        weight (`torch.Tensor` or `float`): That of the task loss.
        labels (`torch.Tensor`, *optional*): Those that count, for the weight of a micro-batch of a global batch.
        num_items_in_batch (`torch.Tensor` or `int`, *optional*): The labels of the whole optimizer step.
        global_load ([`GlobalLoad`], *optional*): Where the load is that of a global batch.

    Returns:
        `tuple`: `torch.Tensor` of shape `(L,)`, and a weight that sums to 1 over a step's micro-batches and ranks.
    """
    device = events[-1].routing.router_logits.device
    layers = list(zip(events, probabilities, strict=True))
    if global_load is None:
        return _stack([_balance_loss(*layer, balance_scope) for layer in layers], device), weight
    return global_load.losses(
        [event.expert_counts(probs_TE.shape[-1]).to(device) for event, probs_TE in layers],
        [masked_mean(probs_TE, event.token_mask).to(device) for event, probs_TE in layers],
        [event.num_tokens for event in events],
        labels,
        num_items_in_batch,
    )


def mean_z_loss(events: list[RoutingEvent]) -> torch.Tensor:
    """The router z-loss, mean over the layers; pads do not count."""
    losses = [router_z_loss(event.routing.router_logits.float(), event.token_mask) for event in events]
    return _stack(losses, events[-1].routing.router_logits.device).mean()


def _balance_loss(event: RoutingEvent, probs_TE: torch.Tensor, balance_scope: str) -> torch.Tensor:
    if event.routing.token_index is not None:
        return balance(event.expert_counts(probs_TE.shape[-1]), masked_mean(probs_TE, event.token_mask))
    if balance_scope == "sequence":
        return sequence_balancing_loss(probs_TE, event.routing.top_k_index, event.num_sequences, event.token_mask)
    return load_balancing_loss(probs_TE, event.routing.top_k_index, event.token_mask)


def _stack(losses: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Of layers that may lie on several devices."""
    return torch.stack([loss.to(device) for loss in losses])


# ---- that leave the balance loss out ----------------------------------------------------------------------------


LEFT_OUT = (
    "The loss of this backward pass leaves out the balance loss, so the experts would collapse unnoticed (a "
    "`compute_loss` of one's own and Trainer's `label_smoothing_factor` compute such a loss). Add "
    "`model.config.router_aux_loss_coef * outputs.aux_loss` to it, or train without balance loss: "
    "`model.config.router_aux_loss_coef = model.config.router_z_loss_coef = 0`."
)


def has_balance_loss(config: PreTrainedConfig) -> bool:
    """Whether a loss of the router is on."""
    return config.router_aux_loss_coef > 0 or config.router_z_loss_coef > 0


def router_trains(blocks: Iterable[SparseMoeBlock]) -> bool:
    """Whether a router has a parameter that is not frozen."""
    return any(parameter.requires_grad for block in blocks for parameter in block.gate.parameters())


def refuse_body_alone(config: PreTrainedConfig, body: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """A forward pre-hook that raises where somebody runs the body in training to put a head of their own on it."""
    if torch.compiler.is_compiling() or active_record() is not None:
        return
    trains = body.training and torch.is_grad_enabled() and has_balance_loss(config)
    if trains:
        trains = router_trains(module for module in body.modules() if isinstance(module, SparseMoeBlock))
    if trains or kwargs.get("output_router_logits"):
        raise ValueError(
            f"The body of this model was run by itself, `{type(body).__name__}`, so its balance loss is missing from "
            "the loss (TRL's trainers put a head of their own on it). Call the whole model, in a subclass of TRL's "
            "`SFTTrainer` by `compute_loss = transformers.Trainer.compute_loss`; or train without balance loss: "
            "`router_aux_loss_coef=0` and `router_z_loss_coef=0`."
        )


@torch.compiler.disable(reason="`labels` are missing, so somebody else computes the loss, and is watched in backward")
def refuse_loss_without(balance_loss: torch.Tensor, router_logits: torch.Tensor, sentence: str = LEFT_OUT) -> None:
    """Raise `sentence` in the backward pass of a loss that the balance loss is no part of."""
    if not (balance_loss.requires_grad and router_logits.requires_grad):
        return
    reached: list[bool] = []

    def note(gradient: torch.Tensor | None) -> None:  # None where another output of one function has a gradient
        if gradient is not None:
            reached.append(True)

    def check(gradient: torch.Tensor | None) -> None:  # runs when all that flows into the logits has been summed
        if not reached:
            raise ValueError(sentence)

    balance_loss.register_hook(note)
    router_logits.register_hook(check)
