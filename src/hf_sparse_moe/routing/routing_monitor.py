"""The routers' health, in the logs of a training. L sparse layers, T tokens, E experts, K experts a token."""

from __future__ import annotations

import math
import re
import warnings
from typing import Any

import torch
from torch import distributed, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import ModelOutput, logging

from hf_sparse_moe.models.configuration_sparse_moe import SparseMoeConfig
from hf_sparse_moe.models.routing import RoutingEvent

from .mixture_layers import MixtureLayer, find_mixture_layers
from .routing_alarms import LayerHealth, RoutingAlarms
from .statistics import ALL, LayerRouting
from .training_events import EventCallback, load_of, wide_dtype
from .training_losses import LOSSES, weighted_losses


logger = logging.get_logger(__name__)

# What is summed for each layer, before E counts and E squared logits.
TOKENS, Z_LOSS, CONFIDENCE, NON_FINITE, DROPPED, OFFERED = range(6)


class RoutingMonitor(EventCallback):
    """
    Logs the health of a mixture's routers beside Trainer's `loss`, and warns when it is poor. Takes our models and
    any stock mixture of transformers.

    Over the micro-batches and ranks since the last log, without pads, each log gets

    - `router/load_max` and `router/load_min`: the highest and lowest share of a layer's assignments that one expert
      got (1 / E is even), over all layers;
    - `router/max_violation` (MaxVio, arXiv 2408.15664: highest load over mean load, minus 1) and `router/entropy` (of
      the load, over log E: 1 is even), means over the layers;
    - `router/dead_experts`: those that no token chose, in all layers together;
    - `router/confidence` (mean of a token's largest probability), `router/dropped` (share of the assignments for which
      an expert had no room or, where experts choose, of the tokens that none chose) and `router/z_loss` (mean of
      logsumexp(logits)^2), means over the layers;
    - `router/non_finite`: the tokens for which a router computed NaN or infinity, in all layers together; our routers
      go on with 0 in their place;
    - `task_loss`, `aux_loss` and `z_loss`, the parts of `loss` as the model gives them: means over the optimizer
      steps, each micro-batch with its share of the step's labels;
    - of routers without weights, such as a hash, neither `router/confidence` nor `router/z_loss`;
    - the values of `router/` for every layer, as `router/layer_3/entropy` (`router/encoder_layer_3/entropy`).

    Everything is summed on the device; once a log it is added up over the ranks in one all-reduce, and read. Add it
    with [`add_leading_callback`], so that the integrations of `report_to` get the numbers too. Evaluations are not
    watched.

    Args:
        log_layers (`bool`, *optional*):
            Whether to log every layer apart. By default where `report_to` names an integration to draw it.
        min_evenness (`float`, defaults to 0.5):
            Warn of collapse when a layer's entropy, rescaled so that all tokens on the same K experts is 0 and an even
            load 1, stays below this.
        max_dominance (`float`, defaults to 0.95):
            Warn of collapse when a layer's MaxVio stays above this share of its highest possible value, E / K - 1, at
            which one expert serves every token.
        starvation (`float`, defaults to 0.1): Warn when an expert gets less than this share of an even load.
        patience (`int`, defaults to 40):
            For how many optimizer steps a collapse must last without getting better, and starvation half as long
            again, whatever `logging_steps` is. Routers that were just made are uneven for some dozens of steps.
        max_z_loss (`float`, defaults to 1000.0):
            Warn when a layer's mean of logsumexp(logits)^2 is above this, or not finite. bfloat16 rounds a logit of
            that size (32) to an eighth.

    Example:
        ```python
        trainer = Trainer(model=model, args=args, train_dataset=dataset)
        add_leading_callback(trainer, RoutingMonitor())
        trainer.train()
        ```
    """

    def __init__(
        self,
        log_layers: bool | None = None,
        min_evenness: float = 0.5,
        max_dominance: float = 0.95,
        starvation: float = 0.1,
        patience: int = 40,
        max_z_loss: float = 1000.0,
        starvation_logs: int | None = None,
    ):
        if starvation_logs is not None:
            warnings.warn(
                "`starvation_logs` has no effect any more: give `patience`, in optimizer steps.",
                FutureWarning,
                stacklevel=2,
            )
        for name, value, least, most in (
            ("min_evenness", min_evenness, 0, 1),
            ("max_dominance", max_dominance, 0, 1),
            ("starvation", starvation, 0, 1),
            ("patience", patience, 1, math.inf),
            ("max_z_loss", max_z_loss, 0, math.inf),
        ):
            if not least <= value <= most:
                raise ValueError(f"`{name}={value}` is not allowed: it must be between {least} and {most}.")
        self.log_layers = log_layers
        self.thresholds: dict[str, Any] = {
            "min_evenness": min_evenness,
            "max_dominance": max_dominance,
            "starvation": starvation,
            "patience": patience,
            "max_z_loss": max_z_loss,
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        self._layers = find_mixture_layers(model)
        self._labels = layer_labels(self._layers)
        self._experts = max(layer.num_experts for layer in self._layers)
        width = OFFERED + 1 + 2 * self._experts
        # One tensor, so that one all-reduce and one read do; `_sums` and `_losses` are views of it.
        size = len(self._layers) * width + 2 * len(LOSSES)
        self._totals = torch.zeros(size, dtype=wide_dtype(args.device), device=args.device)
        self._sums = self._totals[: len(self._layers) * width].view(len(self._layers), width)
        self._losses = self._totals[len(self._layers) * width :].view(len(LOSSES), 2)
        self._places = {layer: place for place, layer in enumerate(self._layers)}
        self._rows: dict[tuple[int, ...], torch.Tensor] = {}
        routing = self.watch(model, self._layers, self._add_events, self._add_losses)
        self._config: Any = getattr(routing.model, "config", None)
        self._alarms = RoutingAlarms(**self.thresholds, balance_remedy=_balance_remedy(self._layers, self._config))
        self._steps = self._steps_at_log = 0
        self._biases_at_start = self._biases() if getattr(self._config, "router_bias_update_speed", 0) > 0 else None

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        self._steps += not getattr(optimizer, "step_was_skipped", False)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._routing is None or logs is None or "loss" not in logs:  # an evaluation, or the summary at the end
            return
        totals = self._totals.clone()
        self._totals.zero_()
        if distributed.is_initialized():
            distributed.all_reduce(totals)
        totals = totals.cpu().double()
        layers = self._health(totals[: self._sums.numel()].view_as(self._sums))
        losses = totals[self._sums.numel() :].view_as(self._losses)
        values = {
            name: (total / weight).item() for name, (total, weight) in zip(LOSSES, losses, strict=True) if weight > 0
        }
        if layers:
            values |= {f"router/{name}": value for name, value in _over_layers(layers).items()}
        if bool(args.report_to) if self.log_layers is None else self.log_layers:
            values |= {f"router/{layer.label}/{name}": v for layer in layers for name, v in layer.values().items()}
        logs.update(values)
        state.log_history[-1].update(values)  # Trainer wrote its copy of `logs` before it called
        self._warn_of_still_bias(layers)
        if state.is_world_process_zero:
            self._alarms.check(layers, self._steps, self._steps_at_log)
        self._steps_at_log = self._steps

    def _add_events(self, events: list[RoutingEvent]) -> None:
        key = tuple(self._places[event.layer] for event in events)
        if key not in self._rows:
            self._rows[key] = torch.tensor(key, device=self._totals.device)
        sums = routing_sums(events, self._experts)
        self._sums.index_add_(0, self._rows[key], sums.to(self._sums.device, self._sums.dtype))

    def _add_losses(self, inputs: dict[str, Any], outputs: Any) -> None:
        if self._routing is not None and isinstance(outputs, ModelOutput):
            losses = weighted_losses(self._routing.model, inputs, outputs)
            self._losses += losses.to(self._losses.device, self._losses.dtype)

    def _health(self, sums: torch.Tensor) -> list[LayerHealth]:
        """Of the layers that saw a token."""
        found = []
        for layer, label, row in zip(self._layers, self._labels, sums, strict=True):
            tokens = row[TOKENS]
            if tokens == 0:
                continue
            counts, squares = row[OFFERED + 1 :].view(2, -1)[:, : layer.num_experts]
            found.append(
                LayerHealth(
                    label,
                    layer.name,
                    layer.top_k,
                    LayerRouting(layer.side, 0, (ALL,), counts[None]),
                    confidence=(row[CONFIDENCE] / tokens).item(),
                    dropped=(row[DROPPED] / row[OFFERED].clamp(min=1)).item(),
                    z_loss=(row[Z_LOSS] / tokens).item(),
                    non_finite=int(row[NON_FINITE]),
                    logit_size=(squares / tokens).sqrt(),
                    learns=any(True for _ in layer.router.parameters()),
                )
            )
        return found

    def _biases(self) -> list[torch.Tensor]:
        found = [layer.selection_bias for layer in self._layers]
        return [bias.detach().clone() for bias in found if bias is not None]

    def _warn_of_still_bias(self, layers: list[LayerHealth]) -> None:
        uneven = any(layer.routing.max_violation > 0 for layer in layers)
        if self._biases_at_start is None or self._steps == 0 or not uneven:
            return
        if all(torch.equal(then, now) for then, now in zip(self._biases_at_start, self._biases(), strict=True)):
            logger.warning(
                f"`router_bias_update_speed={self._config.router_bias_update_speed}`, but nothing moves the selection "
                "bias. Give the trainer `callbacks=[SelectionBiasCallback()]`."
            )
        self._biases_at_start = None


def add_leading_callback(trainer: Trainer, callback: TrainerCallback) -> None:
    """
    Add `callback` ahead of all others.

    `Trainer(callbacks=[...])` and `trainer.add_callback` put a callback behind the progress bar and the integrations
    of `report_to` (TensorBoard, W&B, ...), which then have sent the logs before it can add to them.

    Args:
        trainer (`Trainer`): A trainer, of any subclass.
        callback (`TrainerCallback`): Adds numbers to `logs` in its `on_log`.
    """
    trainer.add_callback(callback)
    callbacks = trainer.callback_handler.callbacks
    callbacks.insert(0, callbacks.pop())


@torch.no_grad()
def routing_sums(events: list[RoutingEvent], num_experts: int) -> torch.Tensor:
    """
    What is summed of events whose tensors have the same shapes, on their device and without reading it.

    Returns:
        `torch.FloatTensor` of shape `(events, 6 + 2 * num_experts)`: tokens, logsumexp^2, confidence, tokens with
        logits that are not finite, dropped and offered assignments, and for each expert assignments and squared
        logits.
    """
    first, layer, mask = events[0].routing, events[0].layer, events[0].token_mask
    logits = torch.stack([event.routing.router_logits for event in events]).float()  # (events, T, E)
    non_finite = torch.stack([event.routing.non_finite for event in events]).float()
    if mask is not None:
        pads = ~mask
        logits = logits.masked_fill(pads[:, None], 0.0)  # whatever a pad's are, even NaN
    z_loss = logits.logsumexp(dim=-1).square()
    confidence = layer.probabilities(logits).amax(dim=-1)
    by_token = torch.stack([torch.ones_like(z_loss), z_loss, confidence, non_finite])  # (4, events, T)
    if mask is not None:
        by_token = by_token.masked_fill(pads, 0.0)
    tokens, z_loss, confidence, non_finite = by_token.sum(dim=-1)
    counts = load_of(events)
    offered, dropped = counts.sum(dim=-1), torch.zeros_like(tokens)
    if first.token_index is not None:
        index = torch.stack([event.routing.token_index for event in events])
        taken = torch.stack([event.counted_rows for event in events]).float()
        reached = torch.zeros(logits.shape[:2], device=logits.device)
        reached.scatter_reduce_(1, index, taken, reduce="amax")
        offered, dropped = tokens, tokens - reached.sum(dim=-1)
    elif first.kept is not None:
        lost = ~torch.stack([event.routing.kept for event in events])
        lost = lost if mask is None else lost & ~pads[:, None]
        dropped = lost.float().sum(dim=(1, 2))
    squares = logits.square().sum(dim=1)
    missing = num_experts - logits.shape[-1]
    by_expert = nn.functional.pad(torch.stack([counts, squares], dim=1), (0, missing)).flatten(1)
    by_layer = torch.stack([tokens, z_loss, confidence, non_finite, dropped, offered], dim=1)
    return torch.cat([by_layer, by_expert], dim=1)


def layer_labels(layers: list[MixtureLayer]) -> list[str]:
    """`layer_3` or, in an encoder-decoder, `decoder_layer_3`: as the model numbers them, dense layers counted."""
    sides = [layer.side for layer in layers]
    prefixes = [f"{side}_" if len(set(sides)) > 1 else "" for side in sides]
    numbers = [re.search(r"(?<=\.)\d+(?=\.|$)", f".{layer.name}") for layer in layers]
    labels = [f"{prefix}layer_{number and number[0]}" for prefix, number in zip(prefixes, numbers, strict=True)]
    if None in numbers or len(set(labels)) < len(labels):
        return [f"layer_{place}" for place in range(len(layers))]
    return labels


def _over_layers(layers: list[LayerHealth]) -> dict[str, float]:
    values = [layer.values() for layer in layers]
    together = {name: math.fsum(value[name] for value in values) / len(values) for name in values[0]}
    together["load_max"] = max(value["load_max"] for value in values)
    together["load_min"] = min(value["load_min"] for value in values)
    for name in ("dead_experts", "non_finite"):
        together[name] = sum(value[name] for value in values)
    return together


def _balance_remedy(layers: list[MixtureLayer], config: Any) -> str:
    if any(layer.selection_bias is not None for layer in layers):
        return "Add `SelectionBiasCallback`, or raise its `update_speed`."
    if getattr(config, "router_type", None) == "hash":
        return "The ids of the text decide: take fewer experts, or a router that learns."
    coefficient = getattr(config, "router_aux_loss_coef", None)
    if isinstance(config, SparseMoeConfig):
        return f"Raise `router_aux_loss_coef` ({coefficient} now)."
    return (
        f"Train with a balance loss (`router_aux_loss_coef` is {coefficient}, which stock models apply as they please "
        "or not at all): `fix_balance(model, router_aux_loss_coef=0.01)`, or `import_stock`."
    )
