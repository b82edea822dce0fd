"""`expand`: a mixture with E experts becomes one with a multiple of E."""

from __future__ import annotations

import copy
from typing import Any

import torch

from hf_sparse_moe.models.pretrained_model import SparseMoePreTrainedModel

from .conversion import load_mixture


@torch.no_grad()
def expand(
    model: SparseMoePreTrainedModel, factor: int, seed: int = 0, router_noise: float = 0.01
) -> SparseMoePreTrainedModel:
    """
    Repeat every expert and router row `factor` times, and let a token use `factor` times as many.

    With normalised weights and `router_noise=0` the mixture computes what it computed. Without noise the copies of an
    expert would be chosen together and learn the same forever.

    Args:
        model ([`SparseMoePreTrainedModel`]): The mixture; it is left as it is.
        factor (`int`): At least 2.
        seed (`int`, defaults to 0): Of the noise.
        router_noise (`float`, defaults to 0.01): Deviation of the noise on the copies' router rows, relative to the
            root mean square of the rows.

    Raises:
        ValueError: not a mixture, one with adapters, or a factor below 2.
    """
    if not isinstance(model, SparseMoePreTrainedModel):
        raise ValueError(f"`{type(model).__name__}` is not a mixture of this package. Upcycle it first.")
    if factor < 2:
        raise ValueError(f"`factor={factor}` is not allowed: it must be at least 2.")
    if model.config.router_type == "hash":
        raise ValueError('`router_type="hash"` gives the ids to other experts when their number changes.')
    config = copy.deepcopy(model.config)
    config.num_experts = model.config.num_experts * factor
    config.num_experts_per_tok = model.config.num_experts_per_tok * factor
    if config.n_group > 1:
        config.n_group, config.topk_group = config.n_group * factor, config.topk_group * factor
    if config.router_type == "expert_choice" and config.capacity_factor is not None:
        config.capacity_factor *= factor
    generator = torch.Generator().manual_seed(seed)
    state = {
        key: tensor.clone() for key, tensor in model.state_dict().items() if key not in model.all_tied_weights_keys
    }
    for name, block in model.named_modules():
        if block not in model.sparse_blocks:
            continue
        for parameter, _ in block.experts.named_parameters(recurse=False):
            key = f"{name}.experts.{parameter}"
            state[key] = torch.cat([state[key]] * factor)
        rows = block.gate.weight.cpu()
        noise = router_noise * rows.float().square().mean().sqrt()
        copies = [
            rows + (noise * torch.randn(rows.shape, generator=generator)).to(rows.dtype) for _ in range(factor - 1)
        ]
        state[f"{name}.gate.weight"] = torch.cat([rows, *copies])
        if block.gate.e_score_correction_bias is not None:
            state[f"{name}.gate.e_score_correction_bias"] = block.gate.e_score_correction_bias.cpu().repeat(factor)
    generation_config = getattr(model, "generation_config", None)
    expanded: Any = load_mixture(type(model), config, state, model.dtype, generation_config)
    expanded = expanded.to(model.device)
    expanded.receipt = {
        "expanded": {"factor": factor, "seed": seed, "router_noise": router_noise, "from": model.receipt}
    }
    return expanded
