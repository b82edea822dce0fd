"""
A stock mixture's balance loss made right: per layer, without pads, the same for every split of a batch.

transformers 5 adds a mean over the micro-batch to a cross entropy that is divided by the whole step's label count, so
that the pressure on the router grows with the accumulation steps and the ranks; and it pools the layers, so that
layers which collapse onto different experts look even. T tokens, E experts, K experts a token.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.utils import is_accelerate_available

from hf_sparse_moe.models.balancing import OptimizerStep, listen_to_trainers
from hf_sparse_moe.models.configuration_sparse_moe import BALANCE_SCOPES
from hf_sparse_moe.models.losses import BalanceLosses, batch_weight, has_balance_loss, loss_of_step, shifted_labels
from hf_sparse_moe.models.masks import tokens_by_side
from hf_sparse_moe.models.pretrained_model import SparseMoePreTrainedModel
from hf_sparse_moe.models.routing import (
    Routing,
    RoutingEvent,
    RoutingRecord,
    active_record,
    checkpoint_with_routing,
)

from .mixture_layers import (
    MixtureLayer,
    RoutingObservation,
    event_of,
    find_mixture_layers,
    warn_of_untrained_routers,
    watch_routing,
)


COEFFICIENT_NAMES = ("router_aux_loss_coef", "aux_loss_coef")
LABEL_NAMES = ("labels", "start_positions")
STOCK_SWITCH = "output_router_logits"  # with the logits comes the stock loss


def fix_balance(
    model: nn.Module,
    router_aux_loss_coef: float | None = None,
    router_z_loss_coef: float = 0.0,
    balance_scope: str = "micro_batch",
) -> BalanceFix:
    """
    Replace the auxiliary loss of a stock mixture, until restored, by one that means the same on every split.

    In training `loss` is then the task loss plus `router_aux_loss_coef` times the mean over the layers of the load
    balancing loss (and the z-loss with its coefficient), weighted with the micro-batch's share of the step's labels;
    `outputs.aux_loss` is the unscaled mean: 1 where the load is even, E where all goes to one expert. transformers'
    own reads K where this reads 1, so the same coefficient presses 1/K as hard. In evaluation `loss` is the task loss
    alone; `output_router_logits` only decides what else is returned.

    The task loss of every head gets the same weight: those of Switch, NLLB-MoE and classification ignore
    `num_items_in_batch`, and so grow with the accumulation steps. Of the model, only the hooks of this instance are
    touched.

    Args:
        model (`nn.Module`): A mixture of transformers with a head, alone or inside PEFT or another wrapper.
        router_aux_loss_coef (`float`, *optional*): Defaults to the config's.
        router_z_loss_coef (`float`, defaults to 0.0): Keeps the router logits small (ST-MoE).
        balance_scope (`str`, defaults to `"micro_batch"`):
            Over what the load should be even: `"micro_batch"`, `"sequence"` (DeepSeek-V3), or `"global_batch"`: all
            ranks, and the micro-batches of the step so far (arXiv 2501.11873).

    Returns:
        [`BalanceFix`]: call its `restore()`, or use it in a `with`.

    Raises:
        ValueError: no sparse layer, no head, a mixture of this package, one fixed already, or a bad argument. A
            forward pass raises it where pads cannot be told.

    Example:
        ```python
        with fix_balance(model, router_aux_loss_coef=0.01):
            Trainer(model=model, args=args, train_dataset=dataset).train()
        ```
    """
    layers = find_mixture_layers(model)
    owner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if owner is None or not set(LABEL_NAMES) & set(inspect.signature(owner.forward).parameters):
        raise ValueError(f"`model` is a `{type(owner or model).__name__}` without a head, so it has no loss to fix.")
    if isinstance(owner, SparseMoePreTrainedModel):
        raise ValueError(
            f"`{type(owner).__name__}` balances itself as it should. Set `model.config.router_aux_loss_coef`, "
            "`router_z_loss_coef` and `balance_scope` in place of `fix_balance`."
        )
    if any(isinstance(getattr(hook, "__self__", None), BalanceFix) for hook in owner._forward_hooks.values()):
        raise ValueError(
            "`fix_balance` is on this model already. Call `restore()` on what it returned, then fix anew."
        )
    if balance_scope not in BALANCE_SCOPES:
        raise ValueError(f"`balance_scope` is {balance_scope!r}; it is one of {BALANCE_SCOPES}.")
    if router_aux_loss_coef is None:
        router_aux_loss_coef = _configured_coefficient(owner)
    for name, value in (("router_aux_loss_coef", router_aux_loss_coef), ("router_z_loss_coef", router_z_loss_coef)):
        if not 0 <= value < float("inf"):
            raise ValueError(f"`{name}` is {value}; it is a number from 0 up, and 0 switches the loss off.")
    return BalanceFix(owner, layers, router_aux_loss_coef, router_z_loss_coef, balance_scope)


class BalanceFix:
    """What [`fix_balance`] put on a model. [`~BalanceFix.restore`], or the end of a `with`, takes it away."""

    def __init__(
        self, model: PreTrainedModel, layers: list[MixtureLayer], aux_coef: float, z_coef: float, balance_scope: str
    ):
        self.model = model
        self.router_aux_loss_coef = aux_coef
        self.router_z_loss_coef = z_coef
        self.balance_scope = balance_scope
        # Somebody may run the body by itself, with a head of their own.
        parts = {model: None, model.base_model: None}
        self._parameters = {part: list(inspect.signature(part.forward).parameters) for part in parts}
        self._looked_at_weights = False
        self._handles: list[RemovableHandle | RoutingObservation] = [
            watch_routing(layers, self._collect),
            *(part.register_forward_pre_hook(self._before, with_kwargs=True) for part in parts),
            *(part.register_forward_hook(self._after, with_kwargs=True, always_call=True) for part in parts),
        ]
        self.optimizer_step: Any = OptimizerStep(self)
        vars(model)["optimizer_step"] = self.optimizer_step  # where Trainer's callback looks for it
        if is_accelerate_available():  # else there is no Trainer
            import_module("transformers.trainer")
            listen_to_trainers()

    def restore(self) -> None:
        """Take the hooks away, and with them everything; a second call does nothing."""
        while self._handles:
            self._handles.pop().remove()
        vars(self.model).pop("optimizer_step", None)

    def start_optimizer_step(self, micro_batches: int = 1, loss_scale: float = 1.0) -> None:
        """
        Call it before the first micro-batch of each optimizer step in a training loop of your own that accumulates
        gradients, where the loss is not `outputs.loss` or `balance_scope="global_batch"`. Trainer calls it by itself.

        Args:
            micro_batches (`int`, defaults to 1): Those of the step, by which the loss is divided.
            loss_scale (`float`, defaults to 1.0): By what a gradient scaler multiplies it: `scaler.get_scale()`.
        """
        self.optimizer_step.start(micro_batches, loss_scale)

    def __enter__(self) -> BalanceFix:
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()

    def _before(self, part: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if self._record() is not None:
            return None
        given = dict(zip(self._parameters[part], args, strict=False)) | kwargs
        asked, config = given.get(STOCK_SWITCH), self.model.config.get_text_config()
        asks = bool(getattr(config, STOCK_SWITCH, False) if asked is None else asked)
        keep = asks or (has_balance_loss(self) and part.training)
        owner = self.optimizer_step
        RoutingRecord(tokens_by_side(self.model, given), keep, owner, part, asks, inputs=given).open()
        for module in part.modules():
            if checkpoint := vars(module).get("_gradient_checkpointing_func"):
                vars(module)["_gradient_checkpointing_func"] = checkpoint_with_routing(checkpoint)
        # Heads differ in what they do with it: they take the mean, and it is weighed afterwards.
        kwargs = {name: value for name, value in kwargs.items() if name != "num_items_in_batch"}
        if part is not self.model or STOCK_SWITCH not in self._parameters[part]:
            return args, kwargs
        place = self._parameters[part].index(STOCK_SWITCH)
        if place < len(args):
            return (*args[:place], False, *args[place + 1 :]), kwargs
        return args, {**kwargs, STOCK_SWITCH: False}

    def _record(self) -> RoutingRecord | None:
        record = active_record()
        return record if record is not None and record.owner is self.optimizer_step else None

    def _collect(self, layer: MixtureLayer, routing: Routing) -> None:
        if (record := self._record()) is not None and record.keep:
            record.events.append(event_of(layer, routing, record.tokens))

    def _after(self, part: nn.Module, args: tuple, kwargs: dict[str, Any], outputs: Any) -> Any:
        record = self._record()
        if record is None or record.part is not part:
            return outputs
        record.close()
        if outputs is None:  # an error ended the forward pass
            return None
        model, events, given = self.model, record.events, record.inputs
        trains = part.training and has_balance_loss(self)
        if trains and not self._looked_at_weights:
            self._looked_at_weights = True
            warn_of_untrained_routers(events)
        if trains and not events:
            raise ValueError(
                f"No layer of this `{type(model).__name__}` reported its routing to `fix_balance`, as in a copy of a "
                "model that was fixed. Copy first, then fix the copy."
            )
        labels, num_items = counted_labels(model, given), given.get("num_items_in_batch")
        fields: dict[str, Any] = {}
        if events:
            for event in events:
                _require_mask(event, given, model.config.is_encoder_decoder)
            probabilities = [event.layer.probabilities(event.routing.router_logits) for event in events]
            step, has_gradient = self.optimizer_step, trains and torch.is_grad_enabled()
            balance = BalanceLosses(events, probabilities, step, has_gradient, labels, num_items)
            outputs = balance.attach_to(outputs) if trains else outputs
            fields["aux_loss"] = balance.aux_loss.detach()
            for side in ("encoder", "decoder"):
                fields[f"{side}_aux_loss"] = _mean_of_side(events, balance.losses_L.detach(), side)
            if record.gives_logits:
                fields["router_logits"] = tuple(event.routing.router_logits for event in events)
        if part is model and any(given.get(name) is not None for name in LABEL_NAMES):
            loss = outputs[0] if isinstance(outputs, tuple) else outputs.loss
            loss = loss_of_step(loss * batch_weight(labels, num_items), labels)
            fields["loss"] = balance.add_to(loss) if trains and has_gradient else loss
        if isinstance(outputs, tuple):
            return (fields["loss"], *outputs[1:]) if "loss" in fields else outputs
        for name, value in fields.items():
            if value is not None and name in type(outputs).__dataclass_fields__:
                outputs[name] = value
        return outputs


def _configured_coefficient(model: PreTrainedModel) -> float:
    for owner in (model, model.config.get_text_config()):
        for name in COEFFICIENT_NAMES:
            if isinstance(value := getattr(owner, name, None), int | float):
                return value
    raise ValueError(f"The config of `{type(model).__name__}` has no coefficient. Give `router_aux_loss_coef`.")


def counted_labels(model: nn.Module, given: dict[str, Any]) -> torch.Tensor | None:
    """The labels as Trainer counts them for `num_items_in_batch`; `given` are the arguments of the forward."""
    if (shifted := given.get("shift_labels")) is not None:
        return shifted
    labels = given.get("labels")
    if labels is None:
        return None
    if isinstance(model, SparseMoePreTrainedModel):
        return model.counted_labels(labels)
    shifts = LOSS_MAPPING.get(getattr(model, "loss_type", None) or "") is ForCausalLMLoss
    return shifted_labels(labels) if shifts and not getattr(model.config, "is_encoder_decoder", False) else labels


def _require_mask(event: RoutingEvent, given: dict[str, Any], has_two_sides: bool) -> None:
    name = "decoder_attention_mask" if has_two_sides and event.layer.side == "decoder" else "attention_mask"
    mask, tokens = given.get(name), len(event.routing.router_logits)
    if mask is not None and event.token_mask is None:
        shape = tuple(mask.shape) if isinstance(mask, torch.Tensor) else f"a {type(mask).__name__}"
        raise ValueError(
            f"`{name}` ({shape}) does not tell the pads among the {tokens} tokens of `{event.layer.name}`. Give one "
            "of shape (batch, length), 1 for a token and 0 for a pad, or none where there are no pads."
        )


def _mean_of_side(events: list[RoutingEvent], losses_L: torch.Tensor, side: str) -> torch.Tensor | None:
    on_side = [loss for event, loss in zip(events, losses_L, strict=True) if event.layer.side == side]
    return torch.stack(on_side).mean() if on_side else None
