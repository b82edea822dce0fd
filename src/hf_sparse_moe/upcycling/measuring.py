"""What dense models see and lose on real tokens: for methods that measure, and for receipts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


MAX_TOKENS = 4096  # a layer; enough for means and clusters


@torch.no_grad()
def task_losses(models: dict[str, PreTrainedModel], data: Iterable[Any]) -> dict[str, float]:
    """
    The mean task loss of each model on the same text, in evaluation mode, each batch weighted by its labels; under
    `"labels"` how many these are. A batch is a dict of inputs with `labels`, or `input_ids` of shape (B, S), which are
    then the labels too.
    """
    sums, count = dict.fromkeys(models, 0.0), 0
    for batch in data:
        inputs = dict(batch) if isinstance(batch, dict) else {"input_ids": batch, "labels": batch}
        labels = int((inputs["labels"] != -100).sum())
        count += labels
        for name, model in models.items():
            training = model.training
            outputs = model.eval()(**{key: tensor.to(model.device) for key, tensor in inputs.items()})
            model.train(training)
            sums[name] += outputs.loss.item() * labels
    if count == 0:
        raise ValueError("The text to measure the loss on has no batch with a label. Give at least one.")
    return {name: total / count for name, total in sums.items()} | {"labels": count}


@torch.no_grad()
def inputs_of(dense: PreTrainedModel, modules: list[nn.Module], data: Iterable[Any]) -> list[torch.Tensor]:
    """
    The inputs of some modules on real tokens, (tokens, features), in evaluation mode, float32, at most `MAX_TOKENS`. A
    batch of `data` is a dict of the model's inputs, or `input_ids` of shape (B, S).
    """
    seen: dict[nn.Module, list[torch.Tensor]] = {module: [] for module in modules}

    def watch(module: nn.Module, args: tuple) -> None:
        seen[module].append(args[0].reshape(-1, args[0].shape[-1]).float().cpu())

    hooks = [module.register_forward_pre_hook(watch) for module in modules]
    training = dense.training
    try:
        dense.eval()
        for batch in data:
            inputs = dict(batch) if isinstance(batch, dict) else {"input_ids": batch}
            if dense.config.is_encoder_decoder:
                inputs.setdefault("decoder_input_ids", inputs["input_ids"])
            dense(**{name: tensor.to(dense.device) for name, tensor in inputs.items() if name != "labels"})
            if all(sum(map(len, parts)) >= MAX_TOKENS for parts in seen.values()):
                break
    finally:
        dense.train(training)
        for hook in hooks:
            hook.remove()
    if not all(seen.values()):
        raise ValueError("`data` has no batches to measure on. Give at least one batch of token ids.")
    return [torch.cat(parts)[:MAX_TOKENS] for parts in seen.values()]
