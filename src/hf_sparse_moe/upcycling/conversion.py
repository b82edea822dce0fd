"""The tensors of a mixture, from those of a dense model."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_sparse_moe.models.configuration_sparse_moe import SparseMoeConfig
from hf_sparse_moe.models.feed_forward import FeedForward
from hf_sparse_moe.models.moe_block import sparse_feed_forwards
from hf_sparse_moe.models.routers import ROUTER_INIT_STD

from .initialization import INITIALIZATION_METHODS, DenseWeights


def sparse_state_dict(
    dense: PreTrainedModel, config: SparseMoeConfig, family_side: str, method: str, seed: int
) -> dict[str, torch.Tensor]:
    """
    The state of the mixture that `dense` becomes. Tensors other than the experts' are the dense model's own, not
    copies.

    Args:
        dense (`PreTrainedModel`): The dense model.
        config (`SparseMoeConfig`): The mixture's config.
        family_side (`str`): The side of an encoder-only or decoder-only family.
        method (`str`): A key of `INITIALIZATION_METHODS`.
        seed (`int`): Each layer draws from a generator of its own, seeded with this and the layer's position.
    """
    state = {key: tensor for key, tensor in dense.state_dict().items() if key not in dense.all_tied_weights_keys}
    experts: dict[str, torch.Tensor] = {}
    for position, (feed_forward, _) in enumerate(sparse_feed_forwards(dense, config, family_side)):
        generator = torch.Generator().manual_seed((seed << 16) + position)
        weights = _take_weights(state, feed_forward)
        converted = INITIALIZATION_METHODS[method](weights, config.num_experts, generator)
        prefix = f"dense.{feed_forward.block_path}"
        router = torch.empty(config.num_experts, feed_forward.hidden_size)
        router.normal_(mean=0.0, std=ROUTER_INIT_STD, generator=generator)
        experts[f"{prefix}.gate.weight"] = router.to(weights.down.dtype)
        up_name = "gate_up_proj" if weights.gated else "up_proj"
        experts[f"{prefix}.experts.{up_name}"] = converted.up
        experts[f"{prefix}.experts.down_proj"] = converted.down
        if converted.up_bias is not None and converted.down_bias is not None:
            experts[f"{prefix}.experts.{up_name}_bias"] = converted.up_bias
            experts[f"{prefix}.experts.down_proj_bias"] = converted.down_bias
        for name, tensor in _take_activation(state, feed_forward).items():
            experts[f"{prefix}.experts.act_fn.{name}"] = tensor
    return {f"dense.{key}": tensor for key, tensor in state.items()} | experts


def _take_weights(state: dict[str, torch.Tensor], feed_forward: FeedForward) -> DenseWeights:
    def take(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
        ups, down = feed_forward.parameter_names(kind)
        first = [state.pop(f"{feed_forward.path}.{name}") for name in ups]
        second = state.pop(f"{feed_forward.path}.{down}")
        if feed_forward.transposed and kind == "weight":
            first, second = [tensor.T for tensor in first], second.T
        return torch.cat(first), second.contiguous()

    up, down = take("weight")
    up_bias, down_bias = take("bias") if feed_forward.biased else (None, None)
    return DenseWeights(up, down, up_bias, down_bias, feed_forward.layout.gated)


def _take_activation(state: dict[str, torch.Tensor], feed_forward: FeedForward) -> dict[str, torch.Tensor]:
    """The activation's own parameters, where it has some (xIELU)."""
    if not isinstance(feed_forward.activation, nn.Module):
        return {}
    prefix = f"{feed_forward.path}.{feed_forward.activation_name}."
    return {key.removeprefix(prefix): state.pop(key) for key in list(state) if key.startswith(prefix)}
