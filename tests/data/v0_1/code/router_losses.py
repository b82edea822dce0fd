"""The balance loss and the z-loss of one forward pass, out of what its routers recorded."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .balancing import (
    balance,
    expert_counts,
    load_balancing_loss,
    masked_mean,
    router_z_loss,
    sequence_balancing_loss,
)
from .routers import router_probabilities
from .routing_record import RoutingEntry, RoutingRecord


class RouterLosses(NamedTuple):
    """Means over the layers; `aux_weight` sums to 1 over a step's micro-batches and ranks."""

    aux_loss: torch.Tensor
    z_loss: torch.Tensor | None
    aux_weight: torch.Tensor | float


class _Layer(NamedTuple):
    entry: RoutingEntry
    mask_T: torch.Tensor | None  # 0 for pads
    probs_TE: torch.Tensor
    num_sequences: int

    def assignments(self, num_experts: int) -> torch.Tensor:
        """How many tokens each expert was chosen for, or, where the experts choose, took."""
        return expert_counts(self.entry.top_k_index, num_experts, self.entry.counting_mask(self.mask_T))


def router_losses(
    model: Any,
    record: RoutingRecord,
    labels: torch.Tensor | None,
    num_items_in_batch: torch.Tensor | int | None,
    weight: torch.Tensor | float,
) -> RouterLosses:
    """
    Load-balancing loss and z-loss, each computed layer by layer and then averaged; pads do not count.

    Args:
        model (`SparseMoePreTrainedModel`): Its config chooses the losses; it keeps the load of a global batch.
        record (`RoutingRecord`): Of its forward pass, with an entry a layer.
        labels (`torch.Tensor`, *optional*): Those that count, for the weight of a micro-batch.
        num_items_in_batch (`torch.Tensor` or `int`, *optional*): The labels of the whole optimizer step.
        weight (`torch.Tensor` or `float`): That of the task loss.
    """
    config, device = model.config, record.entries[-1].router_logits.device
    layers = [_layer(entry, record, config.scoring_func) for entry in record.entries]
    z_loss = None
    if config.router_z_loss_coef > 0:
        z_losses = [router_z_loss(layer.entry.router_logits, layer.mask_T) for layer in layers]
        z_loss = _mean(z_losses, device)
    # A rank may evaluate alone: there the load is its own.
    if config.balance_scope == "global_batch" and model.training and torch.is_grad_enabled():
        parameters = [parameter for block in model.sparse_blocks for parameter in block.gate.parameters()]
        losses_L, weight = model._global_load.losses(
            [layer.assignments(config.num_experts).to(device) for layer in layers],
            [masked_mean(layer.probs_TE, layer.mask_T).to(device) for layer in layers],
            [len(layer.probs_TE) if layer.mask_T is None else layer.mask_T.sum() for layer in layers],
            labels,
            num_items_in_batch,
            new_step=model._global_load.is_new_step(parameters, num_items_in_batch),
        )
        return RouterLosses(losses_L.mean(), z_loss, weight)
    losses = [_balance_loss(layer, config) for layer in layers]
    return RouterLosses(_mean(losses, device), z_loss, weight)


def _layer(entry: RoutingEntry, record: RoutingRecord, scoring_func: str) -> _Layer:
    logits = entry.router_logits
    context = record.context(entry.side, len(logits))
    mask_T = None if context.mask is None else context.mask.to(logits.device)
    return _Layer(entry, mask_T, router_probabilities(logits, scoring_func), context.num_sequences)


def _balance_loss(layer: _Layer, config: Any) -> torch.Tensor:
    if config.balance_scope == "global_batch" or layer.entry.token_index is not None:
        return balance(layer.assignments(config.num_experts), masked_mean(layer.probs_TE, layer.mask_T))
    if config.balance_scope == "sequence":
        index = layer.entry.top_k_index
        return sequence_balancing_loss(layer.probs_TE, index, layer.num_sequences, layer.mask_T)
    return load_balancing_loss(layer.probs_TE, layer.entry.top_k_index, layer.mask_T)


def _mean(losses: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    return torch.stack([loss.to(device) for loss in losses]).mean()
