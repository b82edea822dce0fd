"""Balance without a loss: the selection bias of sigmoid routers follows the load."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import distributed, nn
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from hf_sparse_moe.models.routing import RoutingEvent

from .mixture_layers import MixtureLayer, find_mixture_layers
from .training_events import EventCallback, load_of, outermost_mixture, wide_dtype


logger = logging.get_logger(__name__)

DEFAULT_UPDATE_SPEED = 1e-3  # of arXiv 2408.15664, for configs without a field


class SelectionBiasCallback(EventCallback):
    """
    Loss-free balancing (arXiv 2408.15664): after each optimizer step, every expert's selection bias moves by
    `update_speed * sign(mean load - load)`, so that experts with too many tokens are chosen less.

    The load is that of all micro-batches and ranks of the step, without pads. The bias is a buffer of the model: it is
    saved with it, comes back with it, and stays as it is in evaluation and when the optimizer's step was skipped. It
    is kept in float32, in which small steps do not vanish. Takes our sigmoid routers and any stock mixture with a
    selection bias (DeepSeek-V3, GLM-4 MoE, ...), whose bias nothing in transformers ever moves.

    Args:
        update_speed (`float`, *optional*):
            How far a bias moves a step. Defaults to the config's `router_bias_update_speed`, and to 0.001 where it has
            no such field.

    Raises:
        ValueError: an `update_speed` that is not above 0, or, at the start, a model without selection bias.

    Example:
        ```python
        trainer = Trainer(model=model, args=args, train_dataset=dataset, callbacks=[SelectionBiasCallback()])
        ```
    """

    def __init__(self, update_speed: float | None = None):
        if update_speed is not None and not 0 < update_speed < math.inf:
            raise ValueError(f"`update_speed={update_speed}` is not allowed: it must be above 0 and finite.")
        self.update_speed = update_speed
        self._speed = 0.0
        self._layers: list[MixtureLayer] = []
        self._counts: dict[MixtureLayer, torch.Tensor] = {}  # (E,) a layer

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        _keep_in_float32(_layers_with_bias(model))  # before a checkpoint is loaded, or its bias would be rounded

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        self._layers = _layers_with_bias(model)
        self._speed = self._speed_of(outermost_mixture(model, self._layers))
        _keep_in_float32(self._layers)
        if hasattr(model, "peft_config"):
            logger.warning_once(
                "The selection bias moves, but an adapter's checkpoint does not hold it. Merge the adapter and save "
                "the whole model, or leave `SelectionBiasCallback` out."
            )
        self._counts = {
            layer: torch.zeros(layer.num_experts, dtype=wide_dtype(args.device), device=args.device)
            for layer in self._layers
        }
        self.watch(model, self._layers, self._add)

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        if not getattr(optimizer, "step_was_skipped", False):
            self._update()
        for counts_E in self._counts.values():
            counts_E.zero_()

    @torch.no_grad()
    def _update(self) -> None:
        counts = torch.cat(list(self._counts.values()))
        if distributed.is_initialized():
            distributed.all_reduce(counts)
        loads = counts.split([layer.num_experts for layer in self._layers])
        for layer, load_E in zip(self._layers, loads, strict=True):
            bias = layer.selection_bias
            if bias is not None:
                step_E = self._speed * torch.sign(load_E.mean() - load_E)
                bias.add_(step_E.to(bias.device, bias.dtype).view_as(bias))

    def _add(self, events: list[RoutingEvent]) -> None:
        for event, counts_E in zip(events, load_of(events), strict=True):
            total_E = self._counts[event.layer]
            total_E += counts_E.to(total_E.device, total_E.dtype)

    def _speed_of(self, model: nn.Module) -> float:
        if self.update_speed is not None:
            return self.update_speed
        speed = getattr(getattr(model, "config", None), "router_bias_update_speed", DEFAULT_UPDATE_SPEED)
        if speed == 0:
            raise ValueError(
                "`router_bias_update_speed=0.0` in the model's config never moves the selection bias. Set it, or pass "
                f"`SelectionBiasCallback(update_speed={DEFAULT_UPDATE_SPEED})`."
            )
        return speed


def _layers_with_bias(model: nn.Module) -> list[MixtureLayer]:
    layers = find_mixture_layers(model)
    found = [layer for layer in layers if layer.selection_bias is not None]
    if not found:
        raise ValueError(
            f"The routers of `model` ({type(layers[0].router).__name__}, `scoring_func={layers[0].scoring_func!r}`) "
            'have no selection bias to move. Train a mixture with `scoring_func="sigmoid"`, or leave '
            "`SelectionBiasCallback` out and balance with `router_aux_loss_coef`."
        )
    return found


def _keep_in_float32(layers: list[MixtureLayer]) -> None:
    for layer in layers:
        bias = layer.selection_bias
        if bias is not None and bias.dtype != torch.float32:
            logger.warning_once(
                f"The selection bias is in {bias.dtype}, in which its steps would vanish: it is kept in float32 now. "
                "Load the model in float32 or with its bias in float32, so that a reload does not round it."
            )
            bias.data = bias.data.float()
