"""The two parts of the training loss, logged apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_sparse_moe.models.outputs import RoutingFields
from hf_sparse_moe.models.pretrained_model import SparseMoePreTrainedModel
from hf_sparse_moe.models.task_losses import batch_weight


class BalanceLossCallback(TrainerCallback):
    """
    Logs `task_loss` and `aux_loss` beside Trainer's `loss`, which is their sum (the latter times
    `router_aux_loss_coef`) plus the z-loss where that is on.

    Both are means over the steps since the last log, over micro-batches and ranks, each micro-batch with its share of
    the step's labels. They are summed on the device and read once a log. Add it with [`add_leading_callback`], so that
    the integrations of `report_to` get them too. Evaluation needs none of it: its loss is the task loss.

    Example:
        ```python
        trainer = Trainer(model=model, args=args, train_dataset=dataset)
        add_leading_callback(trainer, BalanceLossCallback())
        trainer.train()
        ```
    """

    def __init__(self) -> None:
        self._handle: RemovableHandle | None = None
        self._sums = torch.zeros(3)  # task loss, aux loss, shares

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs
    ) -> None:
        self._detach()  # from a training that an error ended
        # Under adapters the mixture lies somewhere inside.
        found = [module for module in model.modules() if isinstance(module, SparseMoePreTrainedModel)]
        if not found:
            raise ValueError(
                f"`model` is a `{type(model).__name__}` without a mixture of hf_sparse_moe inside, so there is no "
                "balance loss to log. Leave the callback out."
            )
        if args.label_smoothing_factor and found[0].config.router_aux_loss_coef > 0:
            raise ValueError(
                f"`label_smoothing_factor={args.label_smoothing_factor}` makes Trainer compute the loss itself, "
                "without the balance loss, and the experts would collapse. Set it to 0."
            )
        if found[0].compute_task_loss is None:
            raise ValueError(f"`{type(found[0]).__name__}` has no head and so no loss. Train a `For...` class.")
        self._sums = torch.zeros(3, device=args.device)
        self._handle = found[0].register_forward_hook(self._add, with_kwargs=True)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs,
    ) -> None:
        if self._handle is None or logs is None or "loss" not in logs:  # an evaluation, or the summary at the end
            return
        sums = self._sums.clone()
        self._sums.zero_()
        if distributed.is_initialized():
            distributed.all_reduce(sums)
        task_loss, aux_loss, shares = sums.tolist()
        if shares > 0:
            losses = {"task_loss": task_loss / shares, "aux_loss": aux_loss / shares}
            logs.update(losses)
            state.log_history[-1].update(losses)  # Trainer wrote its copy of `logs` before it called

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._detach()

    def _detach(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    @torch.no_grad()
    def _add(self, model: SparseMoePreTrainedModel, args: tuple, kwargs: dict, outputs: RoutingFields) -> None:
        if outputs.task_loss is None or outputs.aux_loss is None:  # an evaluation, or a forward pass without labels
            return
        labels = kwargs.get("labels")
        counted = None if labels is None else model.counted_labels(labels)
        share = torch.as_tensor(
            batch_weight(counted, kwargs.get("num_items_in_batch")), device=outputs.task_loss.device
        )
        sums = torch.stack([outputs.task_loss.float(), share * outputs.aux_loss.float(), share])
        self._sums += sums.to(self._sums.device)
