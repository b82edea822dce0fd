"""The two parts of the training loss, logged apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import ModelOutput

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
        self._model: SparseMoePreTrainedModel | None = None
        self._sums = torch.zeros(3)  # task loss, aux loss, shares
        self._task_loss: torch.Tensor | None = None

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
        self._model = found[0]
        self._sums = torch.zeros(3, device=args.device)
        self._attach(self._model)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs,
    ) -> None:
        if self._model is None or logs is None or "loss" not in logs:  # an evaluation, or the summary at the end
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

    def _attach(self, model: SparseMoePreTrainedModel) -> None:
        compute_task_loss = model.compute_task_loss
        if compute_task_loss is None:
            raise ValueError(f"`{type(model).__name__}` has no head and so no loss. Train a `For...` class.")

        def remembered(*args) -> torch.Tensor:
            self._task_loss = compute_task_loss(*args)
            return self._task_loss

        # Shadows the class's function: the outputs hold the sum of the losses only.
        model.compute_task_loss = remembered
        self._handle = model.register_forward_hook(self._add, with_kwargs=True)

    def _detach(self) -> None:
        if self._model is not None:
            del self._model.compute_task_loss
            self._handle.remove()
            self._model = self._task_loss = None

    @torch.no_grad()
    def _add(self, model: SparseMoePreTrainedModel, args: tuple, kwargs: dict, outputs: ModelOutput) -> None:
        task_loss, self._task_loss = self._task_loss, None
        if not model.training or task_loss is None or outputs.aux_loss is None:
            return
        labels = kwargs.get("labels")
        share = 1.0
        if labels is not None:
            share = batch_weight(model.counted_labels(labels), kwargs.get("num_items_in_batch"))
        share = torch.as_tensor(share, device=task_loss.device)
        self._sums += torch.stack([task_loss.float(), share * outputs.aux_loss.float(), share]).to(self._sums.device)
