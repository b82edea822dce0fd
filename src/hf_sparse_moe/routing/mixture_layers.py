"""
The sparse layers of any mixture, ours or of transformers, found by their structure.

In transformers a sparse block has a router named `gate` or `router`, beside `experts` that are called with the tokens,
the index and the weights of the experts chosen. What differs from that is written down as rules below, none of which
knows an architecture by name. T tokens, E experts, K experts a token.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers.activations import ACT2FN
from transformers.utils import logging

from hf_sparse_moe.models.masks import SideTokens, tokens_by_side
from hf_sparse_moe.models.routing import Routing, RoutingEvent, finite_rows


logger = logging.get_logger(__name__)

ROUTER_NAMES = ("gate", "router")
# Where modules and configs keep a number, the most telling name first: routers may score more classes than there are
# experts with weights (zero experts, an expert that skips).
NUM_EXPERTS_NAMES = ("num_router_classes", "n_routed_experts", "num_experts", "moe_num_experts", "num_local_experts")
TOP_K_NAMES = ("top_k", "num_experts_per_tok", "top_k_experts", "moe_top_k")
SELECTION_BIAS_NAMES = ("e_score_correction_bias", "expert_bias", "balancing_biases")
PROBED_TOKENS = 256
SCORING_NAMES = ("scoring_func", "score_fn", "scoring_function", "expert_selection_fn")


@dataclass(eq=False)
class MixtureLayer:
    """
    One sparse layer of a model.

    Args:
        name (`str`): The dotted path of `block` in the model that was searched.
        block (`nn.Module`): Holds the router and the experts: a feed-forward, or a whole decoder layer (Gemma 4).
        router (`nn.Module`): Its forward makes the router logits, and mostly the choice too.
        experts (`nn.Module`): Called with the tokens routed; the block itself where it holds the weights (JetMoe).
        num_experts (`int`): E, the columns of the router logits.
        top_k (`int`): K.
        scoring_func (`str`): `"softmax"`, `"sigmoid"`, or another name that transformers' `ACT2FN` knows.
        scoring_is_known (`bool`): Whether the layer or its config names `scoring_func`. Otherwise it is taken for a
            sigmoid where there is a selection bias, until the weights of the first tokens observed tell.
    """

    name: str
    block: nn.Module
    router: nn.Module
    experts: nn.Module
    num_experts: int
    top_k: int
    scoring_func: str
    scoring_is_known: bool = True

    @property
    def side(self) -> str:
        """`"encoder"` or `"decoder"`."""
        own = getattr(self.block, "side", None)
        return own or ("encoder" if "encoder" in self.name.split(".") else "decoder")

    @property
    def selection_bias(self) -> torch.Tensor | None:
        """The buffer or parameter of E entries that is added to the scores (or logits) for the selection alone."""
        return _selection_bias(self.router, self.block)

    def probabilities(self, router_logits_TE: torch.Tensor) -> torch.Tensor:
        """The scores of the experts as probabilities, each row summing to 1, in float32."""
        if self.scoring_func in ("softmax", "cosine"):
            return router_logits_TE.float().softmax(dim=-1)
        scores_TE = ACT2FN[self.scoring_func](router_logits_TE.float())
        return scores_TE / scores_TE.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(scores_TE.dtype).tiny)

    @torch.no_grad()
    def learn_scoring(self, routing: Routing) -> None:
        """Read the scoring function off the weights, which are in proportion to the scores."""
        self.scoring_is_known = True
        logits_TE, weights_TK, index_TK = (tensor[:PROBED_TOKENS] for tensor in routing[:3])
        usable = finite_rows(logits_TE) & (weights_TK > 0).all(dim=-1)
        logits_TE, weights_TK, index_TK = logits_TE[usable].float(), weights_TK[usable].float(), index_TK[usable]
        if len(logits_TE) == 0:
            return
        scores = {"softmax": logits_TE.softmax(dim=-1), "sigmoid": logits_TE.sigmoid()}
        spread = {}
        for name, scores_TE in scores.items():
            ratio = weights_TK / scores_TE.gather(-1, index_TK)
            mean = ratio.mean(dim=None if self.top_k == 1 else -1, keepdim=True)
            spread[name] = (ratio / mean - 1).abs().max().item()
        best = min(spread, key=spread.__getitem__)
        if spread[best] < 0.1 * spread.get(self.scoring_func, float("inf")):
            self.scoring_func = best


RoutingCallback = Callable[[MixtureLayer, Routing], None]


class RoutingObservation:
    """The hooks of [`observe_routing`]. Ends with [`~RoutingObservation.remove`], or as a context manager."""

    def __init__(self, handles: Iterable[RemovableHandle]):
        self._handles = list(handles)

    def remove(self) -> None:
        """Take the hooks away; a second call does nothing."""
        while self._handles:
            self._handles.pop().remove()

    def __enter__(self) -> RoutingObservation:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def find_mixture_layers(model: nn.Module) -> list[MixtureLayer]:
    """
    The sparse layers of `model`, in the order of its modules. Finds none where experts are not chosen by a router
    (VitPose) or are rows of an embedding (Doge).

    Args:
        model (`nn.Module`): A mixture of this package or of transformers, alone or inside PEFT, DDP or so.

    Raises:
        ValueError: there is none, or one whose E or K cannot be told.
    """
    layers = list(_find(model))
    if not layers:
        raise ValueError(
            f"`model` is a `{type(_innermost(model)).__name__}`, in which no sparse layer was found: a module with a "
            "router named `gate` or `router` beside `experts`. Give a mixture of experts."
        )
    return layers


def observe_routing(
    layers_or_model: Iterable[MixtureLayer] | nn.Module, callback: RoutingCallback
) -> RoutingObservation:
    """
    Call `callback(layer, routing)` at each forward pass of each layer, ahead of its experts.

    The hooks are on the modules of this model; nothing is patched. Logits, index and weights are the tensors with
    which the model goes on, with their graph (weights without, where experts are not called with them: Switch,
    NLLB-MoE, Llama 4, JetMoe). The logits are raw, ahead of any softmax. The second forward pass of gradient
    checkpointing, within a backward pass, is not reported again.

    Args:
        layers_or_model (`list[MixtureLayer]` or `nn.Module`): What to watch.
        callback (`Callable[[MixtureLayer, Routing], None]`):
            Runs inside the layer, so under gradient checkpointing it may keep tensors with their graph, but computes
            with them under `torch.no_grad()` alone, or else later.

    Returns:
        [`RoutingObservation`]: call its `remove()`, or use it in a `with`.
    """
    layers = find_mixture_layers(layers_or_model) if isinstance(layers_or_model, nn.Module) else layers_or_model
    return watch_routing(layers, lambda *call: None if in_backward() else callback(*call))


def watch_routing(layers: Iterable[MixtureLayer], callback: RoutingCallback) -> RoutingObservation:
    """[`observe_routing`] with the forward passes within a backward pass."""
    return RoutingObservation(handle for layer in layers for handle in _watch(layer, callback))


def routing_events(model: nn.Module, layers: Iterable[MixtureLayer], inputs: Mapping[str, Any]) -> list[RoutingEvent]:
    """Run `model` on `inputs`, and give what its `layers` routed, in the order of their calls."""
    tokens = tokens_by_side(model, inputs)
    events: list[RoutingEvent] = []
    with observe_routing(layers, lambda layer, routing: events.append(event_of(layer, routing, tokens))):
        model(**inputs)
    return events


def event_of(layer: MixtureLayer, routing: Routing, tokens: Mapping[str, SideTokens]) -> RoutingEvent:
    """The event of one call of `layer` in a forward pass on `tokens`."""
    return RoutingEvent.of(layer, routing, tokens[layer.side].context(len(routing.router_logits)))


@torch.no_grad()
def warn_of_untrained_routers(events: Iterable[RoutingEvent]) -> None:
    """Say which layers give the one expert of every token the same weight, as normalised ones do: 1."""
    names = []
    for event in events:
        weights = event.routing.top_k_weights
        if event.layer.top_k == 1 < event.layer.num_experts and (weights - weights[:1]).abs().max() < 1e-6:
            names.append(event.layer.name)
    if names:
        logger.warning(
            f"{len(names)} layers (`{names[0]}` first) have one expert a token, whose normalised weight is always 1, "
            "so that the task's loss never trains the router; only the balance loss does. Let two experts serve a "
            "token, or take an architecture that leaves the weights as they are, such as Qwen3-MoE."
        )


def without_wrapper(module: nn.Module) -> nn.Module:
    """The module inside PEFT's layers and parametrisations of it."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def in_backward() -> bool:
    """Whether a backward pass is running, so that a forward pass is a recomputation of gradient checkpointing."""
    return torch._C._current_graph_task_id() != -1


def _innermost(model: nn.Module) -> nn.Module:
    while isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner
    return model


def _find(model: nn.Module) -> Iterator[MixtureLayer]:
    for name, block in model.named_modules():
        router = next((child for key, child in block.named_children() if key in ROUTER_NAMES), None)
        experts = _experts_of(block)
        if router is None or experts is None:
            continue
        owners = _owners(model, block, router, experts)
        num_experts = _first(owners, NUM_EXPERTS_NAMES) or _stacked_experts(experts)
        top_k = _first(owners, TOP_K_NAMES) or _fixed_top_k(without_wrapper(router))
        if num_experts is None or top_k is None:
            missing = NUM_EXPERTS_NAMES if num_experts is None else TOP_K_NAMES
            raise ValueError(
                f"`{name}` of the model, a `{type(block).__name__}`, has a router and experts, but neither it nor its "
                f"config has one of {missing}. Set one of these on the router."
            )
        scoring = _scoring_func(owners)
        assumed = "softmax" if _selection_bias(router, block) is None else "sigmoid"
        yield MixtureLayer(
            name, block, router, experts, num_experts, top_k, scoring or assumed, scoring_is_known=scoring is not None
        )


def _experts_of(block: nn.Module) -> nn.Module | None:
    experts = getattr(block, "experts", None)
    if isinstance(experts, nn.Module):
        return experts
    stacked = [getattr(child, "weight", None) for child in block.children()]
    holds_weights = any(isinstance(weight, torch.Tensor) and weight.dim() == 3 for weight in stacked)
    return block if holds_weights else None


def _owners(model: nn.Module, block: nn.Module, router: nn.Module, experts: nn.Module) -> list[Any]:
    """What may know a layer's numbers, the nearest first."""
    modules = [without_wrapper(router), without_wrapper(block), without_wrapper(experts)]
    configs = [config for module in modules if (config := getattr(module, "config", None)) is not None]
    return modules + configs


def _first(owners: list[Any], names: tuple[str, ...]) -> int | None:
    found = (getattr(owner, name, None) for owner in owners for name in names)
    return next((value for value in found if isinstance(value, int) and not isinstance(value, bool)), None)


def _stacked_experts(experts: nn.Module) -> int | None:
    return next((parameter.shape[0] for parameter in experts.parameters() if parameter.dim() == 3), None)


def _fixed_top_k(router: nn.Module) -> int | None:
    """Switch's and NLLB's routers know a capacity but no K: it is 1, and 2 where there is a policy for the second."""
    if not hasattr(router, "expert_capacity"):
        return None
    return 2 if hasattr(router, "second_expert_policy") else 1


def _selection_bias(router: nn.Module, block: nn.Module) -> torch.Tensor | None:
    for owner in (router, *router.children(), block):
        for name in SELECTION_BIAS_NAMES:
            if isinstance(bias := getattr(owner, name, None), torch.Tensor):
                return bias
    return None


def _scoring_func(owners: list[Any]) -> str | None:
    """What a module or a config calls it, if any does."""
    for owner in owners:
        for name in SCORING_NAMES:
            value = getattr(owner, name, None)
            if isinstance(value, str):
                return value
            if isinstance(value, nn.Module):
                return next(key for key in ACT2FN if type(ACT2FN[key]) is type(value))
    return None


def _watch(layer: MixtureLayer, callback: RoutingCallback) -> Iterator[RemovableHandle]:
    """The hooks of one layer. What the router returned waits, a thread by itself, until the experts are called."""
    waiting = threading.local()
    projection = _logits_projection(layer)
    if projection is not None:
        yield projection.register_forward_hook(lambda module, args, output: vars(waiting).update(logits=output))

    def report(routing: Routing) -> None:
        if not layer.scoring_is_known and not torch.compiler.is_compiling():
            layer.learn_scoring(routing)
        callback(layer, routing)

    def on_router(module: nn.Module, args: tuple, output: Any) -> None:
        seen = vars(waiting)
        if isinstance(output, Routing):
            seen["routing"] = output
            return
        logits = seen.pop("logits", None)
        logits = (_logits_of(output) if logits is None else logits).flatten(0, -2)
        seen["masks"] = isinstance(output, tuple) and _starts_with_indices(output)
        seen["routing"] = Routing(logits, *_choice_from_logits(layer, logits, output))
        if not takes_choice:
            report(seen.pop("routing"))

    def on_experts(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen = vars(waiting)
        if "routing" not in seen:
            return
        routing, choice = seen.pop("routing"), _choice_arguments(module, args, kwargs)
        report(_from_masks(routing, *choice) if seen.pop("masks", False) else _chosen(layer, routing, *choice))

    takes_choice = layer.experts is not layer.block and len(_parameters(layer.experts)) >= 3
    yield layer.router.register_forward_hook(on_router)
    if takes_choice:
        yield layer.experts.register_forward_pre_hook(on_experts, with_kwargs=True)


def _logits_projection(layer: MixtureLayer) -> nn.Module | None:
    """The router's own linear over the experts: its output is raw where the router returns probabilities (Gemma 4)."""
    for child in layer.router.children():
        if getattr(child, "out_features", None) == layer.num_experts:
            return child
    return None


def _logits_of(output: Any) -> torch.Tensor:
    """What a router returns is its logits, `(logits, ...)`, `(scores, logits)` or `(mask or index, ..., logits)`."""
    if isinstance(output, torch.Tensor):
        return output
    return output[-1] if len(output) == 2 or _starts_with_indices(output) else output[0]


def _starts_with_indices(output: tuple) -> bool:
    return not output[0].is_floating_point()


@torch.no_grad()
def _choice_from_logits(
    layer: MixtureLayer, logits_TE: torch.Tensor, output: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and index as routers have them that only score, as JetMoe does, or return scores with the logits."""
    top_TK, index_TK = logits_TE.topk(layer.top_k, dim=-1)
    if isinstance(output, tuple) and len(output) == 2 and output[0].shape == logits_TE.shape:
        return output[0].gather(-1, index_TK), index_TK  # Llama 4
    return top_TK.softmax(dim=-1), index_TK


def _parameters(experts: nn.Module) -> list[str]:
    return list(inspect.signature(without_wrapper(experts).forward).parameters)


def _choice_arguments(experts: nn.Module, args: tuple, kwargs: dict) -> tuple[torch.Tensor, torch.Tensor]:
    names = _parameters(experts)
    given = dict(zip(names, args, strict=False)) | kwargs
    return given[names[1]], given[names[2]]


def _chosen(layer: MixtureLayer, routing: Routing, index: torch.Tensor, weights: torch.Tensor) -> Routing:
    """`routing` with the index and the weights that the experts are called with."""
    index, weights = index.flatten(0, -2), weights.flatten(0, -2)
    if hasattr(layer.router, "num_router_classes"):  # the last class skips: its index was set to 0, its weight to 0
        index = index.masked_fill(weights == 0, layer.num_experts - 1)
    return routing._replace(top_k_index=index, top_k_weights=weights)


@torch.no_grad()
def _from_masks(routing: Routing, mask: torch.Tensor, weights: torch.Tensor) -> Routing:
    """Switch and NLLB call their experts with 0-or-1 masks, in which those over an expert's capacity are 0."""
    mask_TE, weights = mask.reshape(-1, mask.shape[-1]), weights.flatten(0, -2)
    weights_TE = weights * mask_TE if weights.shape[-1] == 1 else weights
    weights_TK = weights_TE.gather(-1, routing.top_k_index)
    return routing._replace(top_k_weights=weights_TK, kept=weights_TK > 0)
