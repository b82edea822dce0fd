"""How a recipe trains: which weights, at which rates, and when it stops."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import transformers
from torch import nn
from torch.optim import Optimizer
from transformers import EarlyStoppingCallback, PreTrainedModel, Trainer

from hf_sparse_moe import parameter_groups

from . import metrics


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """Those of transformers, and what the fine-tuning of a mixture asks for."""

    router_learning_rate: float | None = field(
        default=None, metadata={"help": "Of the routers, which never decay; --learning_rate if not given."}
    )
    expert_learning_rate: float | None = field(
        default=None, metadata={"help": "Of the routed experts; --learning_rate if not given."}
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after so many evaluations without a better --metric_for_best_model (the loss)."},
    )
    freeze: list[str] | None = field(
        default=None,
        metadata={"help": "What is not trained: embeddings, layers:0-2 (three), experts, routers or all-but-experts."},
    )

    def __post_init__(self) -> None:
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            self.greater_is_better = not metrics.lower_is_better(self.metric_for_best_model)
        super().__post_init__()
        if self.early_stopping_patience is None:
            return
        if self.early_stopping_patience < 1:
            raise ValueError(f"`--early_stopping_patience={self.early_stopping_patience}` must be at least 1.")
        if not self.load_best_model_at_end:
            raise ValueError(
                "`--early_stopping_patience` ends with the best model: pass `--load_best_model_at_end true "
                "--eval_strategy epoch --save_strategy epoch` with it."
            )


def check_best_metric(args: transformers.TrainingArguments, names: Iterable[str], of_predictions: bool = True) -> None:
    """
    Raise a `ValueError` unless `metric_for_best_model` is the loss or one of the recipe's `names`, which are computed
    `of_predictions` that `prediction_loss_only` leaves out, or by an evaluator.
    """
    known = ["loss", *([] if of_predictions and args.prediction_loss_only else names)]
    if (args.metric_for_best_model or "loss").removeprefix("eval_") not in known:
        raise ValueError(
            f"`--metric_for_best_model={args.metric_for_best_model}` is not computed here. Choose one of {known}."
        )


def prepare_training(trainer: Trainer, is_mixture: bool) -> None:
    """Freeze, stop and set rates as `trainer.args`, a [`TrainingArguments`], says. Call it before `train`."""
    args = trainer.args
    if args.early_stopping_patience is not None:
        trainer.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
    if args.freeze:
        freeze(getattr(trainer.model, "transformers_model", trainer.model), args.freeze)
    rates = (args.router_learning_rate, args.expert_learning_rate)
    if is_mixture and (args.weight_decay > 0 or rates != (None, None)):
        _groups(trainer, trainer.model)  # so that it ends here, in a sentence, where it cannot be done
        trainer.__dict__["create_optimizer"] = partial(_create_optimizer, trainer, trainer.create_optimizer)


def _create_optimizer(trainer: Trainer, create: Callable[..., Optimizer], model: nn.Module | None = None) -> Optimizer:
    """Trainer's own, of the groups of a mixture: it takes them where an optimizer's arguments hold `params`."""
    model = trainer.model if model is None else model
    optimizer_class, arguments = trainer.get_optimizer_cls_and_kwargs(trainer.args, model)
    trainer.optimizer_cls_and_kwargs = (optimizer_class, arguments | {"params": _groups(trainer, model)})
    return create(model)


def _groups(trainer: Trainer, model: nn.Module) -> list[dict[str, Any]]:
    args = trainer.args
    rates = (args.router_learning_rate, args.expert_learning_rate)
    return parameter_groups(model, args.learning_rate, *rates, weight_decay=args.weight_decay)


def freeze(model: PreTrainedModel, parts: list[str]) -> None:
    """
    Take parts of a model out of its training.

    Args:
        model (`PreTrainedModel`): A mixture, or for `embeddings` and `layers` any model.
        parts (`list[str]`):
            `embeddings` (all outside of the layers, and an output layer that is tied to them), `layers:2` or
            `layers:0-2` (three, of an encoder-decoder on both sides), `experts` (shared ones too), `routers`, and
            `all-but-experts`, which leaves the head that the task needs in training.

    Raises:
        ValueError: another name, a part that the model lacks, or nothing is left to train.
    """
    for part in parts:
        frozen = _parameters(model, part)
        if not frozen:
            raise ValueError(f"`--freeze {part}` names nothing in a `{type(model).__name__}`.")
        for parameter in frozen:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"`--freeze {' '.join(parts)}` leaves nothing to train.")


def _parameters(model: PreTrainedModel, part: str) -> list[nn.Parameter]:
    blocks = getattr(model, "sparse_blocks", [])
    experts = [module for block in blocks for module in (block.experts, block.shared_experts) if module is not None]
    if part == "embeddings":
        modules = [
            module
            for name, module in model.named_modules()
            if isinstance(module, nn.Embedding) and not re.search(r"\.\d+\.", name)
        ]
        return [parameter for module in modules for parameter in module.parameters()]
    if part == "experts":
        return [parameter for module in experts for parameter in module.parameters()]
    if part == "routers":
        return [parameter for block in blocks for parameter in block.gate.parameters()]
    if part == "all-but-experts":
        kept = {id(parameter) for module in experts for parameter in module.parameters()}
        return [parameter for parameter in model.base_model.parameters() if kept and id(parameter) not in kept]
    found = re.fullmatch(r"layers:(\d+)(?:-(\d+))?", part)
    if found is None:
        raise ValueError(
            f"`--freeze {part}` is none of embeddings, layers:0-2 (three), experts, routers, all-but-experts."
        )
    wanted = range(int(found[1]), int(found[2] or found[1]) + 1)
    layers = [(re.search(r"\.(\d+)\.", name), parameter) for name, parameter in model.base_model.named_parameters()]
    return [parameter for place, parameter in layers if place is not None and int(place[1]) in wanted]
