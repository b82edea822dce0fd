"""
The task losses, computed here and not by the dense head.

Dense heads of transformers swallow `num_items_in_batch` in their `**kwargs` while Trainer, which passed it, stops
dividing by the accumulation steps; their loss and gradient then grow with those. Each loss here equals the dense
head's own without `num_items_in_batch`, and with it sums over the micro-batches of a step to the loss of the whole.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.loss.loss_utils import (
    ForCausalLMLoss,
    ForMaskedLMLoss,
    ForQuestionAnsweringLoss,
    ForSequenceClassificationLoss,
    fixed_cross_entropy,
)


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
