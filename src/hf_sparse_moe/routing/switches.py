"""
Switches of a mixture's routing, each a context manager that restores what it found, also after an error.

Layers are called by their place among the sparse layers, from 0, as in `model.sparse_blocks` and
[`find_mixture_layers`]. T tokens, E experts, K experts a token.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from hf_sparse_moe.models.moe_block import SparseMoeBlock
from hf_sparse_moe.models.routers import SparseMoeExpertChoiceRouter, SparseMoeHashRouter, SparseMoeTopKRouter
from hf_sparse_moe.models.routing import Routing

from .mixture_layers import (
    TOP_K_NAMES,
    MixtureLayer,
    find_mixture_layers,
    in_backward,
    observe_routing,
    without_wrapper,
)


RecordedPass = dict[int, Routing]


@contextmanager
def use_top_k(model: nn.Module, top_k: int) -> Iterator[None]:
    """
    Let `top_k` experts serve each token, in every sparse layer. The config stays as it is.

    Args:
        model (`nn.Module`): A mixture of this package or of transformers.
        top_k (`int`): From 1 to the number of experts that are not disabled.

    Raises:
        ValueError: another number, a router by which tokens do not choose (expert choice, hash), or one with a fixed K
            (Switch, NLLB-MoE). The forward pass of a stock mixture raises it where its layers do not follow.

    Example:
        ```python
        with use_top_k(model, 1):
            model.generate(**inputs)
        ```
    """
    layers = find_mixture_layers(model)
    if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1:
        raise ValueError(f"`top_k={top_k!r}` is not allowed: it must be a whole number from 1 up.")
    holders = []
    for place, layer in enumerate(layers):
        if any(isinstance(gate, SparseMoeExpertChoiceRouter | SparseMoeHashRouter) for gate in _gates(layer)):
            raise ValueError(
                f"`top_k={top_k}` is not allowed: the tokens of layer {place} do not choose their best experts "
                "(expert choice or hash routing). Change `num_experts_per_tok` in the config."
            )
        found = _integers(layer, TOP_K_NAMES)
        if not found or layer.experts is layer.block:  # where they are one, shapes depend on K (JetMoe's heads)
            raise ValueError(
                f"`top_k={top_k}` is not allowed: layer {place}, a `{type(layer.block).__name__}`, always takes "
                f"{layer.top_k}."
            )
        _require_choice(place, layer, top_k, _disabled(layer), f"`top_k={top_k}` is not allowed")
        holders += found
    # The heads of stock mixtures keep a K of their own, for their balance loss.
    holders += [(module, name) for module in model.modules() for name in TOP_K_NAMES if _counts_loads(module, name)]
    with ExitStack() as stack:
        for module, name in holders:
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, top_k)
        stock = [layer for layer in find_mixture_layers(model) if not isinstance(layer.block, SparseMoeBlock)]

        def check(layer: MixtureLayer, routing: Routing) -> None:
            if routing.top_k_index.shape[-1] != top_k:
                raise ValueError(f"`{layer.name}`, a `{type(layer.block).__name__}`, does not follow `use_top_k`.")

        stack.enter_context(observe_routing(stock, check))
        yield


@contextmanager
def disable_experts(model: nn.Module, experts: Sequence[int] | Mapping[int, Sequence[int]]) -> Iterator[None]:
    """
    Let no token choose these experts: the next best take their place, with the weights that the router would compute
    if these experts did not exist. Adds to what is disabled already.

    The gates of this package read `disabled_experts`. In a stock mixture, the router's product gives these experts the
    lowest number of its dtype, so that their score is 0, and their selection bias is -inf.

    Args:
        model (`nn.Module`): A mixture of this package or of transformers, alone or in a wrapper.
        experts (`Sequence[int]` or `Mapping[int, Sequence[int]]`): Experts of every sparse layer, or of layers.

    Raises:
        ValueError: an unknown expert or layer, too few experts left, or hash routing. The forward pass of a stock
            mixture raises it where the router computes its logits otherwise than by `linear`.

    Example:
        ```python
        with disable_experts(model, {0: [2, 3], 1: [0]}):
            loss = model(**inputs).loss
        ```
    """
    layers = find_mixture_layers(model)
    by_layer = experts if isinstance(experts, Mapping) else dict.fromkeys(range(len(layers)), experts)
    chosen: list[tuple[MixtureLayer, torch.Tensor]] = []
    for place, ids in by_layer.items():
        if place not in range(len(layers)):
            raise ValueError(f"`experts` names layer {place!r}; the sparse layers are 0 to {len(layers) - 1}.")
        layer = layers[place]
        if is_hash(layer):
            raise ValueError(f"`experts` cannot be disabled in layer {place}: the token's id decides its experts.")
        unknown = [e for e in ids if isinstance(e, bool) or e not in range(layer.num_experts)]
        if unknown:
            raise ValueError(
                f"`experts` names expert {unknown[0]!r} of layer {place}, whose experts are 0 to "
                f"{layer.num_experts - 1}."
            )
        disabled = _disabled(layer).clone()
        disabled[list(ids)] = True
        expert_choice = any(isinstance(gate, SparseMoeExpertChoiceRouter) for gate in _gates(layer))
        top_k = 1 if expert_choice else layer.top_k
        _require_choice(place, layer, top_k, disabled, f"`experts={list(ids)}` is not allowed")
        chosen.append((layer, disabled))
    with ExitStack() as stack:
        for layer, disabled in chosen:
            for gate in _gates(layer) or [layer.router]:
                stack.enter_context(_attribute(gate, "disabled_experts", disabled))
            if not _gates(layer):
                stack.enter_context(_masked_router(layer, disabled))
        yield


@contextmanager
def record_routing(model: nn.Module) -> Iterator[list[RecordedPass]]:
    """
    Record what the routers decide, forward pass by forward pass.

    Args:
        model (`nn.Module`): A mixture of this package or of transformers.

    Returns:
        `list[dict[int, Routing]]`: grows with each forward pass; a step of `generate` is one. It holds the `Routing`
        of each sparse layer, by the layer's place. Tensors carry no gradient, and stay on their device.

    Example:
        ```python
        with record_routing(model) as recorded:
            model.generate(**inputs)
        recorded[0][1].top_k_index  # (T, K), of the prompt in the second sparse layer
        ```
    """
    layers = find_mixture_layers(model)
    places = {layer.name: place for place, layer in enumerate(layers)}
    recorded: list[RecordedPass] = []

    def record(layer: MixtureLayer, routing: Routing) -> None:
        place = places[layer.name]
        if not recorded or place in recorded[-1]:  # a layer that runs again: the next pass has begun
            recorded.append({})
        recorded[-1][place] = Routing._make(None if value is None else value.detach() for value in routing)

    with observe_routing(layers, record):
        yield recorded


@contextmanager
def replay_routing(
    model: nn.Module, recorded: Sequence[Mapping[int, Routing]], with_weights: bool = False
) -> Iterator[None]:
    """
    Send the tokens to the experts that [`record_routing`] saw, whatever the routers would choose now: a teacher's, or
    those of the run that wrote the text one trains on (as routing replay, arXiv 2510.11370).

    The n-th run of a layer gets its n-th record. The router logits stay the model's own, and by default so do the
    weights, through which the gradient reaches the router.

    Args:
        model (`nn.Module`): A mixture of this package, alone or in a wrapper; its dtype may be another.
        recorded (`list[dict[int, Routing]]`): Of a mixture with as many sparse layers, on the same tokens.
        with_weights (`bool`, defaults to `False`): Replay the weights too.

    Raises:
        ValueError: other layers, experts or kinds of router, or a stock mixture. A forward pass raises it on another
            number of tokens, on a disabled expert, or when nothing is left to replay.

    Example:
        ```python
        with record_routing(model) as recorded, torch.no_grad():
            model(**inputs)
        with replay_routing(model.to(torch.bfloat16), recorded):
            model(**inputs)
        ```
    """
    layers = _own_layers(model, "replay_routing")
    places = sorted({place for forward_pass in recorded for place in forward_pass})
    if places != list(range(len(layers))):
        raise ValueError(
            f"`recorded` has the sparse layers {places}, but the model has 0 to {len(layers) - 1}. Record a model "
            "with as many."
        )
    with ExitStack() as stack:
        for place, layer in enumerate(layers):
            routings = [forward_pass[place] for forward_pass in recorded if place in forward_pass]
            replay = _Replay(place, layer, routings, with_weights)
            # Ahead of other hooks, so that they see what is replayed.
            handle = layer.router.register_forward_hook(replay, prepend=True)
            stack.callback(handle.remove)
        yield


class _Replay:
    """The forward hook of one router."""

    def __init__(self, place: int, layer: MixtureLayer, routings: list[Routing], with_weights: bool):
        self.place, self.routings, self.with_weights = place, routings, with_weights
        self.used = self.since_backward = 0
        self.gate: Any = _gates(layer)[0]
        for routing in routings:
            experts = routing.router_logits.shape[-1]
            if experts != layer.num_experts:
                raise ValueError(f"`recorded` has {experts} experts in layer {place}, the model {layer.num_experts}.")
            if (routing.token_index is not None) != isinstance(self.gate, SparseMoeExpertChoiceRouter):
                raise ValueError(
                    f"`recorded` comes from another kind of router than layer {place} has: the tokens choose in one, "
                    "the experts in the other."
                )

    def __call__(self, router: nn.Module, args: tuple, routing: Routing) -> Routing:
        choice = self._next()
        tokens, seen = len(routing.router_logits), len(choice.router_logits)
        if tokens != seen:
            raise ValueError(
                f"`recorded` has {seen} tokens where run {self.used} of layer {self.place} has {tokens}. Replay on "
                "the batches, pads included, that were recorded."
            )
        device = routing.router_logits.device
        choice = Routing._make(None if value is None else value.to(device) for value in choice)
        choice = choice._replace(raw_logits=routing.raw_logits)
        disabled = getattr(self.gate, "disabled_experts", None)
        if disabled is not None and disabled[choice.top_k_index].any():
            raise ValueError(f"`recorded` sends tokens to experts of layer {self.place} that are disabled.")
        if self.with_weights:
            return choice._replace(router_logits=routing.router_logits)
        return self.gate.follow(choice, routing.router_logits)

    def _next(self) -> Routing:
        if in_backward():  # gradient checkpointing runs the layer again
            if self.since_backward > 1:
                raise ValueError(
                    f"`replay_routing` cannot tell which of {self.since_backward} forward passes is recomputed. With "
                    "gradient checkpointing, run one forward pass before each backward pass."
                )
            self.since_backward = 0
            return self.routings[self.used - 1]
        if self.used == len(self.routings):
            raise ValueError(
                f"`recorded` has {self.used} runs of layer {self.place}, and this is one more. Record as many forward "
                "passes as are replayed."
            )
        self.used += 1
        self.since_backward += 1
        return self.routings[self.used - 1]


@contextmanager
def _attribute(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """`value` in the place of what the instance has by this name, or of nothing."""
    had, before = name in vars(module), vars(module).get(name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before) if had else delattr(module, name)


@contextmanager
def _masked_router(layer: MixtureLayer, disabled_E: torch.Tensor) -> Iterator[None]:
    """The router of a stock mixture without these experts."""
    forward = layer.router.forward

    def masked(*args: Any, **kwargs: Any) -> Any:
        with _MaskedLogits(layer.router, disabled_E) as mode:
            output = forward(*args, **kwargs)
        if not mode.met:
            raise ValueError(
                f"`experts` cannot be disabled: `{layer.name}`, a `{type(layer.block).__name__}`, does not compute "
                "its router logits by `torch.nn.functional.linear`."
            )
        return output

    with ExitStack() as stack:
        stack.enter_context(_attribute(layer.router, "forward", masked))
        if layer.selection_bias is not None:
            bias = layer.selection_bias.data  # of shape (E,) or (1, E)
            stack.callback(bias.copy_, bias.clone())
            bias[..., disabled_E.to(bias.device)] = -torch.inf
        yield


class _MaskedLogits(TorchFunctionMode):
    """Inside a router's forward, the logits of disabled experts are the lowest number of their dtype."""

    def __init__(self, router: nn.Module, disabled_E: torch.Tensor):
        super().__init__()
        self.router, self.disabled, self.met = router, disabled_E, False

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is not nn.functional.linear or not self._makes_logits(args[1]):
            return output
        self.met = True
        others = output.shape[-1] - len(self.disabled)  # shared experts that the router weighs too (Inkling)
        mask = nn.functional.pad(self.disabled.to(output.device), (0, others))
        return output.masked_fill(mask, torch.finfo(output.dtype).min)

    def _makes_logits(self, weight: torch.Tensor) -> bool:
        """Whether it is the router's weight or computed from that (a cast, an adapter), and no adapter's own."""
        rows = [parameter for parameter in self.router.parameters() if parameter.dim() == 2]
        own = next((p for p in rows if len(p) == len(self.disabled)), None)
        own = next((p for p in rows if len(p) > len(self.disabled)), None) if own is None else own
        return own is not None and (
            weight is own or (weight.shape == own.shape and not isinstance(weight, nn.Parameter))
        )


def _own_layers(model: nn.Module, switch: str) -> list[MixtureLayer]:
    layers = find_mixture_layers(model)
    for layer in layers:
        if not isinstance(without_wrapper(layer.block), SparseMoeBlock):
            raise ValueError(
                f"`{switch}` is for mixtures of this package, and `{layer.name}` is a `{type(layer.block).__name__}`. "
                "`import_stock` makes such a mixture of a stock checkpoint."
            )
    return layers


def is_hash(layer: MixtureLayer) -> bool:
    """Whether the token's id chooses: ours, or a stock router that is called with the ids (DeepSeek-V4)."""
    if gates := _gates(layer):
        return any(isinstance(gate, SparseMoeHashRouter) for gate in gates)
    return "input_ids" in inspect.signature(without_wrapper(layer.router).forward).parameters


def _gates(layer: MixtureLayer) -> list[Any]:
    """The routers of this package in a layer: one, and its copy where PEFT trains it in full."""
    return [gate for gate in layer.router.modules() if isinstance(gate, SparseMoeTopKRouter | SparseMoeHashRouter)]


def _integers(layer: MixtureLayer, names: tuple[str, ...]) -> list[tuple[nn.Module, str]]:
    """Where the modules of a layer keep a whole number of one of these names."""
    modules = dict.fromkeys((*layer.router.modules(), without_wrapper(layer.block), without_wrapper(layer.experts)))
    return [(module, name) for module in modules for name in names if type(vars(module).get(name)) is int]


def _counts_loads(module: nn.Module, name: str) -> bool:
    return isinstance(module, PreTrainedModel) and type(vars(module).get(name)) is int


def _disabled(layer: MixtureLayer) -> torch.Tensor:
    for gate in (*_gates(layer), layer.router):
        if getattr(gate, "disabled_experts", None) is not None:
            return gate.disabled_experts
    device = next((parameter.device for parameter in layer.router.parameters()), None)
    return torch.zeros(layer.num_experts, dtype=torch.bool, device=device)


def _require_choice(place: int, layer: MixtureLayer, top_k: int, disabled_E: torch.Tensor, refusal: str) -> None:
    """Whether `top_k` experts are left to every token, whichever groups of experts it chooses."""
    groups, chosen_groups = (
        next((getattr(module, name) for module, name in _integers(layer, names)), 1)
        for names in (("n_group", "num_group"), ("topk_group",))
    )
    enabled = (~disabled_E).reshape(groups, -1).sum(dim=1).sort().values
    left = int(enabled[:chosen_groups].sum())
    if top_k > left:
        where = "" if groups == 1 else f", whichever {chosen_groups} of its {groups} groups a token takes"
        raise ValueError(f"{refusal}: layer {place} takes {top_k} experts for each token, of {left} enabled{where}.")
