"""
The losses: of the task, computed here and not by the dense head; and of the routers, which reach them also where
somebody else computes the loss.

Dense heads of transformers swallow `num_items_in_batch` in their `**kwargs` while Trainer, which passed it, stops
dividing by the accumulation steps; their loss and gradient then grow with those. Each task loss here equals the dense
head's own without `num_items_in_batch`, and with it sums over the micro-batches of a step to the loss of the whole.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.loss.loss_utils import ForSequenceClassificationLoss, fixed_cross_entropy
from transformers.utils import ModelOutput, logging

from .balancing import (
    BalanceSettings,
    OptimizerStep,
    balance,
    load_balancing_loss,
    masked_mean,
    packed_balancing_loss,
    router_z_loss,
    sequence_balancing_loss,
)
from .masks import tokens_by_side
from .routers import router_probabilities
from .routing import RoutingEvent, RoutingRecord, active_record


logger = logging.get_logger(__name__)

UNKNOWN_SCALE = (
    "The loss is computed outside of the mixture and in float16, so it is probably scaled, by a factor that the "
    "balance loss needs too. Call `model.start_optimizer_step(micro_batches, scaler.get_scale())` before each step."
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
    return counted_labels.ne(-100).sum() / at_least_one(num_items_in_batch)


def at_least_one(num_items_in_batch: Count) -> Count:
    """A step may have no label at all: its losses are then 0, not NaN."""
    if isinstance(num_items_in_batch, torch.Tensor):
        return num_items_in_batch.clamp(min=1)
    return None if num_items_in_batch is None else max(num_items_in_batch, 1)


def loss_of_step(loss: torch.Tensor, counted_labels: torch.Tensor | None) -> torch.Tensor:
    """`loss`, or 0 for a micro-batch without any label, the mean of which is NaN."""
    return loss if counted_labels is None else loss.masked_fill(counted_labels.eq(-100).all().to(loss.device), 0.0)


def shifted_labels(labels: torch.Tensor) -> torch.Tensor:
    """The labels of a causal LM that are predicted: the first of each row has nothing before it."""
    return labels[..., 1:]


def one_label_a_span(labels: torch.Tensor) -> torch.Tensor:
    """An answer span counts once, not by its two ends."""
    return labels[..., 0]


# Every loss below takes the model, its outputs, the labels, the step's label count, and what else the loss takes, such
# as `ignore_index`. It calls `model.loss_function` with what transformers' models give it, since users may set that.


def language_model_loss(model: Any, outputs: Any, labels: torch.Tensor, count: Count, **kwargs) -> torch.Tensor:
    """Cross entropy of each labelled token; the function of a causal LM shifts. Logits (B, S, V), labels (B, S)."""
    logits, labels = outputs.logits.contiguous(), labels.contiguous()
    sizes = {"vocab_size": logits.shape[-1], "config": model.config}
    return model.loss_function(logits=logits, labels=labels, num_items_in_batch=count, **sizes, **kwargs)


def sequence_classification_loss(
    model: Any, outputs: Any, labels: torch.Tensor, count: Count, **kwargs
) -> torch.Tensor:
    """Cross entropy, mean squared error or binary cross entropy, by `config.problem_type`. Logits (B, labels)."""
    logits, config = outputs.logits, model.config
    given = {"labels": labels, "pooled_logits": logits, "config": config, "num_items_in_batch": count}
    loss = model.loss_function(logits=logits, **given, **kwargs)
    normalised = config.problem_type == "single_label_classification"  # the only kind that transformers normalises
    if model.loss_function is ForSequenceClassificationLoss and not normalised:
        loss = loss * batch_weight(labels, count)
    return loss


def multiple_choice_loss(model: Any, outputs: Any, labels: torch.Tensor, count: Count, **kwargs) -> torch.Tensor:
    """Cross entropy over the choices. Logits (B, choices), labels (B,)."""
    return fixed_cross_entropy(outputs.logits, labels.to(outputs.logits.device), count, **kwargs)


def question_answering_loss(model: Any, outputs: Any, labels: torch.Tensor, count: Count, **kwargs) -> torch.Tensor:
    """Mean of the cross entropies of the span's start and end. Logits (B, S), labels (B, 2), see [`span_labels`]."""
    ends = labels.unbind(dim=-1)
    return model.loss_function(outputs.start_logits, outputs.end_logits, *ends, num_items_in_batch=count, **kwargs)


def span_labels(start_positions: torch.Tensor | None, end_positions: torch.Tensor | None) -> torch.Tensor | None:
    """Answer spans as one tensor (B, 2); None unless both ends are given."""
    if start_positions is None or end_positions is None:
        return None
    return torch.stack([start_positions.reshape(-1), end_positions.reshape(-1)], dim=-1)


# ---- of the routers ---------------------------------------------------------------------------------------------


NO_GRADIENT = (
    "The balance loss has no gradient, for layers are computed again in the backward pass by something that does not "
    "know of it: a reversible architecture (Reformer), or a reentrant activation checkpoint around them. Nothing "
    "balances this mixture. Use `gradient_checkpointing=True` of Trainer in place of such a checkpoint; Reformer can "
    'have `scoring_func="sigmoid"` with `SelectionBiasCallback`.'
)


def _learns(events: list[RoutingEvent]) -> bool:
    """Whether a router is trained."""
    routers = [getattr(event.layer, "gate", None) or event.layer.router for event in events]
    return any(parameter.requires_grad for router in routers for parameter in router.parameters())


def has_balance_loss(settings: BalanceSettings) -> bool:
    """Whether a loss of the router is on. A hash has no logits to train."""
    learns = getattr(settings, "router_type", None) != "hash"
    return learns and (settings.router_aux_loss_coef > 0 or settings.router_z_loss_coef > 0)


class BalanceLosses:
    """
    The losses of the routers in one forward pass, per layer and then averaged; pads do not count.

    Args:
        events (`list[RoutingEvent]`): One a layer.
        probabilities (`list[torch.Tensor]` of shape `(T, E)`): Of each layer, each row summing to 1.
        step ([`OptimizerStep`]): Coefficients, scope, and what is known of the optimizer step.
        trains (`bool`): Whether a backward pass follows. A rank may evaluate alone: there the load is its own.
        labels (`torch.Tensor`, *optional*): Those that Trainer counts, -100 ignored.
        num_items_in_batch (`torch.Tensor` or `int`, *optional*): The labels of the whole optimizer step.
    """

    def __init__(
        self,
        events: list[RoutingEvent],
        probabilities: list[torch.Tensor],
        step: OptimizerStep,
        trains: bool,
        labels: torch.Tensor | None = None,
        num_items_in_batch: Count = None,
    ):
        settings, device = step.settings, events[-1].routing.router_logits.device
        layers = list(zip(events, probabilities, strict=True))
        weight = batch_weight(labels, num_items_in_batch)
        aux_weight = weight
        if settings.balance_scope == "global_batch" and trains:
            self.losses_L, aux_weight = step.global_losses(
                [event.expert_counts(probs_TE.shape[-1]).to(device) for event, probs_TE in layers],
                [masked_mean(probs_TE, event.token_mask).to(device) for event, probs_TE in layers],
                [event.num_tokens for event in events],
                labels,
                num_items_in_batch,
            )
        else:
            losses = [_balance_loss(*layer, settings.balance_scope) for layer in layers]
            self.losses_L = torch.stack([loss.to(device) for loss in losses])
        self.aux_loss = self.losses_L.mean()
        if trains and torch.is_grad_enabled() and not self.aux_loss.requires_grad and _learns(events):
            logger.warning_once(NO_GRADIENT)
        self.z_loss: torch.Tensor | None = None
        self._step, self._num_sequences = step, events[-1].num_sequences
        self._share: Callable[[], float] | None = None
        self._carrying: list[torch.Tensor] = []
        self._coefficients = [settings.router_aux_loss_coef, settings.router_z_loss_coef]
        self._weights = [settings.router_aux_loss_coef * aux_weight]
        if settings.router_z_loss_coef > 0:
            losses = [router_z_loss(event.routing.router_logits.float(), event.token_mask) for event in events]
            self.z_loss = torch.stack([loss.to(device) for loss in losses]).mean()
            self._weights.append(settings.router_z_loss_coef * weight)
        if labels is not None and num_items_in_batch is None:
            self._weights = [loss_of_step(torch.as_tensor(weight), labels) for weight in self._weights]

    @property
    def _losses(self) -> list[torch.Tensor]:
        return [self.aux_loss] if self.z_loss is None else [self.aux_loss, self.z_loss]

    def add_to(self, loss: torch.Tensor) -> torch.Tensor:
        """A task loss with the balance losses."""
        extra = sum(weight * part for weight, part in zip(self._weights, self._losses, strict=True))
        return loss + extra.to(loss.device)  # type: ignore[union-attr]

    @torch.compiler.disable(reason="only a backward pass tells whether somebody else computed the loss")
    def attach_to(self, outputs: Any) -> Any:
        """
        Have every output that a loss can be computed from carry the balance losses: in backward, each of them that no
        other gradient reaches gets the one of its coefficient and of the pass's share of the optimizer step. Values
        do not change. Outputs of the body, then of its head: what carries them already is left alone.

        Args:
            outputs (`ModelOutput` or `tuple`): Changed in place, if it is no tuple.

        Returns:
            The outputs.
        """
        step, parts = self._step, self._losses
        known = {id(tensor) for tensor in self._carrying}
        tensors = {id(tensor): tensor for tensor in _trained_tensors(outputs) if id(tensor) not in known}
        if self._share is None:
            self._share = step.join(self._num_sequences)
        if not tensors or not any(part.requires_grad for part in parts):
            return outputs
        weights = self._weights if step.weight is None else self._coefficients[: len(parts)]
        asks = step.weight is None and _computes_in_half(parts[0].device.type)
        carried = _Carried.apply(self._share, weights, asks, *parts, *tensors.values())
        self.aux_loss, self.z_loss = carried[0], (None if self.z_loss is None else carried[1])
        self._carrying += carried[len(parts) :]
        return _replaced(outputs, dict(zip(tensors, carried[len(parts) :], strict=True)))


class _Carried(torch.autograd.Function):
    """Balance losses and outputs of a model, passed through."""

    @staticmethod
    def forward(share: Callable[[], float], weights: list[Any], asks: bool, *tensors: torch.Tensor) -> Any:
        return tuple(tensor.detach() for tensor in tensors)  # no views, so that they may be changed in place

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.share, ctx.weights, ctx.asks, *tensors = inputs
        ctx.devices = [tensor.device for tensor in tensors]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        given, share = list(gradients), ctx.share()
        for place, weight in enumerate(ctx.weights):
            if given[place] is None:
                given[place] = torch.as_tensor(share * weight, device=ctx.devices[place])
                if ctx.asks:
                    logger.warning_once(UNKNOWN_SCALE)
        return None, None, None, *given


def balance_when_alone(part: nn.Module, step: OptimizerStep) -> None:
    """
    Have the body or the encoder of a mixture open a record of its own where somebody runs it by itself: its routers
    must know which tokens count there too (`generate`), and its outputs carry the balance loss (a head of one's own).
    Asked for `router_logits`, it returns them without gradient.
    """
    parameters = tuple(inspect.signature(part.forward).parameters)
    part.register_forward_pre_hook(partial(_before_part, step, parameters), with_kwargs=True)
    part.register_forward_hook(partial(_after_part, step), always_call=True)


def carry_from(body: nn.Module, step: OptimizerStep) -> None:
    """
    Have the outputs of a model's body carry what the model gives its record to attach. The head computes from them,
    so that a last hidden state which is asked for lies on the way of every loss.
    """
    body.register_forward_hook(partial(_after_body, step))


def _after_body(step: OptimizerStep, body: nn.Module, args: tuple, outputs: Any) -> Any:
    record = active_record()
    if record is None or record.owner is not step or record.attach is None:
        return outputs
    attach, record.attach = record.attach, None
    return attach(outputs)


def _before_part(
    step: OptimizerStep, parameters: tuple[str, ...], part: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]] | None:
    record = active_record()
    if record is not None and record.owner is step:
        return None
    wants_logits = bool(kwargs.get("output_router_logits"))
    keep = wants_logits or (part.training and has_balance_loss(step.settings))
    given = dict(zip(parameters, args, strict=False)) | kwargs
    RoutingRecord(tokens_by_side(part, given), keep=keep, owner=step, part=part, gives_logits=wants_logits).open()
    return args, {name: value for name, value in kwargs.items() if name != "output_router_logits"}


def _after_part(step: OptimizerStep, part: nn.Module, args: tuple, outputs: Any) -> Any:
    record = active_record()
    if record is None or record.part is not part:
        return outputs
    record.close()
    if outputs is None or not record.events:  # an error ended it
        return outputs
    if part.training and has_balance_loss(step.settings):
        logits = [event.routing.router_logits for event in record.events]
        scoring_func = record.events[0].layer.config.scoring_func
        probabilities = [router_probabilities(logits_TE, scoring_func) for logits_TE in logits]
        trains = torch.is_grad_enabled()
        outputs = BalanceLosses(record.events, probabilities, step, trains).attach_to(outputs)
    if record.gives_logits and isinstance(outputs, ModelOutput):
        outputs["router_logits"] = tuple(event.routing.router_logits.detach() for event in record.events)
    return outputs


def _balance_loss(event: RoutingEvent, probs_TE: torch.Tensor, balance_scope: str) -> torch.Tensor:
    if event.routing.token_index is not None:
        return balance(event.expert_counts(probs_TE.shape[-1]), masked_mean(probs_TE, event.token_mask))
    if balance_scope == "sequence":
        index_TK, sequence_T = event.routing.top_k_index, event.sequence_ids
        if sequence_T is not None:
            return packed_balancing_loss(probs_TE, index_TK, sequence_T, event.token_mask)
        return sequence_balancing_loss(probs_TE, index_TK, event.num_sequences, event.token_mask)
    return load_balancing_loss(probs_TE, event.routing.top_k_index, event.token_mask)


def _computes_in_half(device_type: str) -> bool:
    return torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type) is torch.float16


def _trained_tensors(outputs: Any) -> Iterator[torch.Tensor]:
    """
    Those of a model's outputs that a loss is computed from: of hidden states and the like, the last layer's. The
    others lie on its way, and stay as they are for those who ask for their gradients.
    """
    values = outputs.values() if isinstance(outputs, ModelOutput) else outputs
    for value in values if isinstance(values, Iterable) and not isinstance(values, torch.Tensor) else (values,):
        value = value[-1] if isinstance(value, (tuple, list)) and value else value
        if isinstance(value, torch.Tensor) and value.requires_grad:
            yield value


def _replaced(outputs: Any, tensors: dict[int, torch.Tensor]) -> Any:
    if isinstance(outputs, ModelOutput):
        for name, value in outputs.items():
            outputs[name] = _replaced(value, tensors)
        return outputs
    if type(outputs) in (tuple, list):
        return type(outputs)(_replaced(value, tensors) for value in outputs)
    return tensors.get(id(outputs), outputs)
