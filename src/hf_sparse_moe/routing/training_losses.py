"""The parts of a mixture's training loss, weighted so that they add up to means over optimizer steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hf_sparse_moe.models.losses import batch_weight
from hf_sparse_moe.models.pretrained_model import SparseMoePreTrainedModel

from .balance_fix import BalanceFix, counted_labels


LOSSES = ("task_loss", "aux_loss", "z_loss")


def weighted_losses(model: nn.Module, inputs: dict[str, Any], outputs: Any) -> torch.Tensor:
    """
    The losses of one micro-batch.

    Args:
        model (`nn.Module`): Ours, or a stock mixture, with or without `fix_balance`.
        inputs (`dict`): The arguments of its forward.
        outputs (`ModelOutput`): What it returned.

    Returns:
        `torch.FloatTensor` of shape `(3, 2)`: for each of `LOSSES` what to add to its sum, and to its weight. The mean
        of a step is the sum over the weights of its micro-batches. Zeros where the model has no such loss, or does not
        tell it from the others.
    """
    nothing = torch.zeros(2, device=next(model.parameters()).device)
    loss = outputs.get("loss")

    def number(value: Any) -> torch.Tensor:
        return torch.as_tensor(value, dtype=torch.float32, device=nothing.device)

    config: Any = model.config
    fix = _fix_of(model)
    ours = isinstance(model, SparseMoePreTrainedModel)
    share = number(batch_weight(counted_labels(model, inputs), inputs.get("num_items_in_batch")))
    weight = share if ours or fix is not None else torch.ones_like(share)  # stock ones weigh every micro-batch alike
    task, aux, z = (None if outputs.get(name) is None else number(outputs.get(name)) for name in LOSSES)
    aux, z = (None if part is None else weight * part for part in (aux, z))
    coefficient = getattr(config if fix is None else fix, "router_aux_loss_coef", 0.0)
    if fix is not None and (fix.balance_scope == "global_batch" or fix.router_z_loss_coef > 0):
        aux = None  # the sum does not tell
    elif ours and config.balance_scope == "global_batch" and task is not None and loss is not None and coefficient > 0:
        # The balance loss weighs what the other ranks have too, so that it is read off the sum.
        z_part = 0.0 if z is None else config.router_z_loss_coef * z
        aux = (number(loss) - task - z_part) / coefficient
    elif task is None and loss is not None:
        task = number(loss) if ours or aux is None else number(loss) - coefficient * aux
    parts = ((task, share), (aux, weight), (z, weight))
    return torch.stack([nothing if part is None else torch.stack([part, of]) for part, of in parts])


def _fix_of(model: nn.Module) -> BalanceFix | None:
    owners = (getattr(hook, "__self__", None) for hook in model._forward_hooks.values())
    return next((owner for owner in owners if isinstance(owner, BalanceFix)), None)
