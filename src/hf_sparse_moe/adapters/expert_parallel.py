"""Adapters on experts that ranks share out: each computes with those of its own experts."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .low_rank import LowRank
from .low_rank_experts import low_rank_experts


_NAME = "adapted_experts"


class _AdaptedConfig:
    """The config of experts for one call, by which their own forward computes with adapters."""

    _experts_implementation = _NAME

    def __init__(self, config: Any, up: list[LowRank], down: list[LowRank]):
        self._config, self.adapters = config, (up, down)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def _adapted_experts_forward(
    experts: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    return low_rank_experts(experts, hidden_states, top_k_index, top_k_weights, *experts.config.adapters)


ALL_EXPERTS_FUNCTIONS.register(_NAME, _adapted_experts_forward)


def expert_parallel_low_rank(
    experts: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    up: list[LowRank],
    down: list[LowRank],
) -> torch.Tensor:
    """
    [`low_rank_experts`] for experts in transformers' expert parallelism: all ranks call it, and give the adapters of
    all experts. It goes through the experts' own forward, which brings each token to the ranks of its experts.
    """
    start = experts.down_proj.device_mesh.get_local_rank("ep") * experts.num_experts
    mine = [[adapter.of_experts(start, experts.num_experts) for adapter in side] for side in (up, down)]
    config, experts.config = experts.config, _AdaptedConfig(experts.config, *mine)
    try:
        return experts(hidden_states, top_k_index, top_k_weights)
    finally:
        experts.config = config


def check_sharding(experts: Any, name: str, weight: torch.Tensor, modules_to_save: list[str] | None) -> None:
    """
    Raise unless adapters on a weight get right gradients: it is whole, or shared out by transformers along experts or
    FSDP.

    Args:
        experts (`nn.Module`): The experts module.
        name (`str`): The weight's name.
        weight (`torch.Tensor`): The weight.
        modules_to_save (`list[str]`, *optional*): Modules that are to be trained beside the adapters.

    Raises:
        ValueError: it is sharded in another way, or modules that are sharded would have to be copied.
    """
    if not isinstance(weight, DTensor):
        return
    sizes = getattr(experts.config, "distributed_config", None)
    if sizes is None:
        raise ValueError(
            f"`{name}` is sharded over ranks already. Shard the model after `get_peft_model`, as Trainer does, or "
            "load it with `from_pretrained(..., distributed_config=DistributedConfig(...))`."
        )
    if sizes.tp_size > 1:
        raise ValueError(
            f"`tp_size={sizes.tp_size}` shards `{name}` in a way that LoRA on experts does not support. Use "
            "`fsdp_size` and `ep_size` alone."
        )
    if modules_to_save:
        raise ValueError(
            f"`modules_to_save={modules_to_save}` would copy modules, and `distributed_config` has sharded them over "
            "ranks. Leave it and `router=True` out, or use Accelerate's FSDP2 or DeepSpeed."
        )
