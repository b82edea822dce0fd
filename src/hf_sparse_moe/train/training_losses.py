"""The parts of a mixture's training loss, weighted so that they add up to means over optimizer steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from hf_sparse_moe.models.pretrained_model import SparseMoePreTrainedModel
from hf_sparse_moe.models.task_losses import batch_weight, shifted_labels


LOSSES = ("task_loss", "aux_loss", "z_loss")


def weighted_losses(model: nn.Module, inputs: dict[str, Any], outputs: Any) -> torch.Tensor:
    """
    The losses of one micro-batch.

    Args:
        model (`nn.Module`): Ours, or a stock mixture, which adds `router_aux_loss_coef * aux_loss` to its loss.
        inputs (`dict`): The arguments of its forward.
        outputs (`ModelOutput`): What it returned.

    Returns:
        `torch.FloatTensor` of shape `(3, 2)`: for each of `LOSSES` what to add to its sum, and to its weight. The mean
        of a step is the sum over the weights of its micro-batches. Zeros where the model has no such loss.
    """
    zero = torch.zeros(2, device=next(model.parameters()).device)
    loss = outputs.get("loss")
    if loss is None:
        return zero.expand(len(LOSSES), 2)
    ours = isinstance(model, SparseMoePreTrainedModel)
    count = inputs.get("num_items_in_batch")
    share = _on(loss, batch_weight(_counted_labels(model, inputs), count))
    config: Any = model.config
    aux_loss, z_loss, task_loss = outputs.get("aux_loss"), outputs.get("z_loss"), outputs.get("task_loss")
    if task_loss is None:
        task_loss = loss if ours or aux_loss is None else loss - config.router_aux_loss_coef * aux_loss
    weight = share if ours else torch.ones_like(share)
    if ours and aux_loss is not None and config.balance_scope == "global_batch" and config.router_aux_loss_coef > 0:
        # Its weight depends on what the other ranks have, so that it is read off the sum.
        extra = _on(loss, loss) - _on(loss, task_loss)
        if z_loss is not None:
            extra = extra - config.router_z_loss_coef * share * _on(loss, z_loss)
        aux = torch.stack([extra / config.router_aux_loss_coef, share])
    else:
        aux = zero if aux_loss is None else torch.stack([weight * _on(loss, aux_loss), weight])
    z = zero if z_loss is None else torch.stack([weight * _on(loss, z_loss), weight])
    parts = (torch.stack([_on(loss, task_loss), share]), aux, z)
    return torch.stack([part.to(zero.device) for part in parts])


def _on(loss: torch.Tensor, value: Any) -> torch.Tensor:
    return torch.as_tensor(value, dtype=torch.float32, device=loss.device)


def _counted_labels(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor | None:
    """The labels as Trainer counts them."""
    labels = inputs.get("labels")
    if labels is None:
        return None
    if isinstance(model, SparseMoePreTrainedModel):
        return model.counted_labels(labels)
    if inputs.get("shift_labels") is not None:
        return inputs["shift_labels"]
    shifts = getattr(model, "loss_function", None) is ForCausalLMLoss
    return shifted_labels(labels) if shifts else labels
