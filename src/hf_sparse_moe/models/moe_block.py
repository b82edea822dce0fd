"""The sparse layer that takes a dense feed-forward's place: router, routed experts, shared experts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import logging

from .experts import make_experts
from .feed_forward import FeedForward, feed_forward_side, find_feed_forwards
from .masks import NO_CONTEXT
from .routers import make_router
from .routing import RoutingEvent, active_record


logger = logging.get_logger(__name__)

# Dense architectures whose layers see (S, B, H); tests/conformance/measuring.py looks at every architecture.
SEQUENCE_FIRST = {"fsmt", "xlnet"}


class SparseMoeBlock(nn.Module):
    """
    `gate` (the router), `experts` (fused 3-D parameters) and, where the config asks, `shared_experts` and their gate.

    Tools key on these names and on the call `experts(hidden_states, top_k_index, top_k_weights)`: transformers'
    experts backends and expert-parallel plans, PEFT's `target_parameters`, vLLM's Transformers backend, FSDP2.

    Args:
        config (`SparseMoeConfig`): The mixture's config.
        feed_forward (`FeedForward`): The dense feed-forward whose place and shape it takes.
        side (`str`): `"encoder"` or `"decoder"`, for the routing record.
        num_experts (`int`, *optional*): The routed experts of this layer, where layers differ in them.
    """

    def __init__(self, config: PreTrainedConfig, feed_forward: FeedForward, side: str, num_experts: int | None = None):
        super().__init__()
        self.side = side
        self.config = config
        self.sequence_first = config.dense_config.model_type in SEQUENCE_FIRST
        self.is_initialized = False
        hidden, act_fn = feed_forward.hidden_size, feed_forward.activation
        gated, biased = feed_forward.layout.gated, feed_forward.biased
        intermediate = config.moe_intermediate_size or feed_forward.intermediate_size
        dropout = feed_forward.inner_dropout if config.expert_dropout is None else config.expert_dropout
        self.gate = make_router(config, hidden, side, num_experts)
        self.experts = make_experts(
            config, hidden, intermediate, act_fn, dropout, gated=gated, biased=biased, num_experts=num_experts
        )
        self.shared_experts = self.shared_expert_gate = None
        if config.num_shared_experts:
            shared = intermediate * config.num_shared_experts
            self.shared_experts = SharedExperts(hidden, shared, act_fn, dropout, gated=gated, biased=biased)
        if config.shared_expert_gate:
            self.shared_expert_gate = nn.Linear(hidden, 1, bias=False)
        self.dropout = nn.Dropout(feed_forward.outer_dropout)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise what no checkpoint has filled, with the deviation of the dense architecture's own linears."""
        self.gate.reset_parameters()
        std_up = _initial_std(self.config, self.experts.hidden_dim)
        std_down = _initial_std(self.config, self.experts.intermediate_dim)
        self.experts.reset_parameters(std_up, std_down)
        if self.shared_experts is not None:
            self.shared_experts.reset_parameters(std_up, std_down)
        if self.shared_expert_gate is not None:
            init.normal_(self.shared_expert_gate.weight, mean=0.0, std=std_up)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(B, S, H)`): The tokens, pads included; `(S, B, H)` of an
                architecture that is `sequence_first`, and any other where nothing needs to know which token is which.

        Returns:
            `torch.Tensor` of the same shape.
        """
        if self.sequence_first:
            return self._serve(hidden_states.transpose(0, 1)).transpose(0, 1)
        return self._serve(hidden_states)

    def _serve(self, hidden_states: torch.Tensor) -> torch.Tensor:
        tokens_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        record = active_record()
        if record is None and self._asks_for_tokens and _computes_again():
            raise RuntimeError(
                "A sparse layer whose router must know the tokens of a call "
                f"(`router_type={self.config.router_type!r}`, `capacity_factor={self.config.capacity_factor}`) is "
                "computed again in the backward pass by something that does not. In place of an activation checkpoint "
                "around layers use `model.gradient_checkpointing_enable()`, or `gradient_checkpointing=True` of "
                "Trainer; in a reversible architecture (Reformer) take another router."
            )
        context = NO_CONTEXT if record is None else record.context(self.side, tokens_TH.shape[0])
        routing = self.gate(tokens_TH, context)
        if record is not None and record.keep:
            record.events.append(RoutingEvent.of(self, routing, context))
        if routing.token_index is None:
            output_TH = self.experts(tokens_TH, routing.top_k_index, routing.top_k_weights)
        else:  # the experts chose: each assignment is a row of its own
            rows = self.experts(tokens_TH[routing.token_index], routing.top_k_index, routing.top_k_weights)
            output_TH = torch.zeros_like(tokens_TH).index_add(0, routing.token_index, rows.to(tokens_TH.dtype))
        if self.shared_experts is not None:
            shared_TH = self.shared_experts(tokens_TH)
            if self.shared_expert_gate is not None:
                shared_TH = shared_TH * self.shared_expert_gate(tokens_TH).sigmoid()
            output_TH = output_TH + shared_TH
        if self.training:  # a call of `nn.Dropout` costs a decoding step as much as an operation
            output_TH = self.dropout(output_TH)
        return output_TH.reshape(hidden_states.shape)

    @property
    def _asks_for_tokens(self) -> bool:
        """Whether the choice depends on more than the hidden states: on ids, pads, or where sequences end."""
        config = self.config
        chooses = config.router_type == "expert_choice" and self.side == "encoder"
        return config.router_type == "hash" or chooses or (self.training and config.capacity_factor is not None)


class SharedExperts(nn.Module):
    """One dense feed-forward that serves every token, in the layout of the routed experts."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, act_fn: Callable, dropout: float, *, gated: bool, biased: bool
    ):
        super().__init__()
        self.gated = gated
        rows = 2 * intermediate_size if gated else intermediate_size
        self.up_proj = nn.Linear(hidden_size, rows, bias=biased)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=biased)
        self.act_fn = act_fn
        self.dropout = nn.Dropout(dropout)

    def reset_parameters(self, std_up: float, std_down: float) -> None:
        for projection, std in ((self.up_proj, std_up), (self.down_proj, std_down)):
            init.normal_(projection.weight, mean=0.0, std=std)
            if projection.bias is not None:
                init.zeros_(projection.bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        up = self.up_proj(hidden_states)
        if self.gated:
            gate, up = up.chunk(2, dim=-1)
            return self.down_proj(self.dropout(self.act_fn(gate) * up))
        return self.down_proj(self.dropout(self.act_fn(up)))


def _computes_again() -> bool:
    """Whether this runs in a backward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def sparse_feed_forwards(
    dense: PreTrainedModel, config: PreTrainedConfig, family_side: str
) -> list[tuple[FeedForward, str]]:
    """
    The feed-forwards of a dense model that the config calls sparse, each with its side.

    Args:
        dense (`PreTrainedModel`): The dense model.
        config (`SparseMoeConfig`): The mixture's config.
        family_side (`str`): The side of an encoder-only or decoder-only family.

    Raises:
        ValueError: no known feed-forward, a mixture already, or a layer list of the wrong length.
    """
    sides: dict[str, list[FeedForward]] = {}
    for feed_forward in find_feed_forwards(dense):
        sides.setdefault(feed_forward_side(dense, feed_forward, family_side), []).append(feed_forward)
    chosen = []
    for field, side in config._layer_type_fields.items():
        found = sides.get(side, [])
        layer_types = getattr(config, field) or ["sparse"] * len(found)
        if len(layer_types) != len(found):
            raise ValueError(
                f"`{field}` has {len(layer_types)} entries, but the {side} of `{type(dense).__name__}` has "
                f"{len(found)} feed-forwards. Give one entry each."
            )
        chosen += [(site, side) for site, kind in zip(found, layer_types, strict=True) if kind == "sparse"]
    return chosen


def install_sparse_blocks(dense: PreTrainedModel, config: PreTrainedConfig, family_side: str) -> None:
    """Put a [`SparseMoeBlock`] in the place of each of [`sparse_feed_forwards`]; changes `dense` in place."""
    chosen = sparse_feed_forwards(dense, config, family_side)
    counts = config.num_experts_per_layer or [config.num_experts] * len(chosen)
    if len(counts) != len(chosen):
        raise ValueError(f"`num_experts_per_layer` has {len(counts)} entries for {len(chosen)} sparse layers.")
    for (feed_forward, side), num_experts in zip(chosen, counts, strict=True):
        _replace(dense, feed_forward, SparseMoeBlock(config, feed_forward, side, num_experts))
    layers = [module for module in dense.modules() if getattr(module, "chunk_size_feed_forward", 0)]
    for layer in layers:
        if any(isinstance(module, SparseMoeBlock) for module in layer.modules()):
            vars(layer)["chunk_size_feed_forward"] = 0
            logger.warning_once(
                f"`chunk_size_feed_forward={config.chunk_size_feed_forward}` has no effect in sparse layers: their "
                "capacity, expert choice and balance need all tokens of a call at once."
            )


def _replace(dense: PreTrainedModel, feed_forward: FeedForward, block: SparseMoeBlock) -> None:
    layout, owner = feed_forward.layout, feed_forward.owner
    if layout.inline:
        for name in (layout.down, feed_forward.activation_name):
            _set_part(owner, name, nn.Identity())
        for name in layout.inner_dropout:  # the experts drop inside; a second time, after them, would be wrong
            holder, _, attribute = name.rpartition(".")
            dropout = getattr(owner.get_submodule(holder), attribute, None)
            if dropout is not None:
                _set_part(owner, name, nn.Identity() if isinstance(dropout, nn.Module) else 0.0)
    _set_part(dense, feed_forward.block_path, block)


def _set_part(module: nn.Module, path: str, value: nn.Module | float) -> None:
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, value)


def _initial_std(config: PreTrainedConfig, in_features: int) -> float:
    for name in ("initializer_range", "init_std"):
        if (std := getattr(config, name, None)) is not None:
            return std
    return (getattr(config, "initializer_factor", None) or 1.0) * in_features**-0.5
