"""`expand`: a mixture with E experts becomes one with a multiple of E."""

from __future__ import annotations

import copy
from typing import Any

import torch

from hf_sparse_moe.models.pretrained_model import SparseMoePreTrainedModel

from .conversion import load_mixture
from .recipe import check_argument


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
    check_argument("factor", factor, 2, 2)
    check_argument("seed", seed, 0, -(2**63), 2**64 - 1)
    check_argument("router_noise", router_noise, 0.0, 0)
    config = copy.deepcopy(model.config)
    if config.router_type == "hash":
        raise ValueError('`router_type="hash"` gives the ids to other experts when their number changes.')
    grow = ["num_experts", "num_experts_per_tok"] + (["n_group", "topk_group"] if config.n_group > 1 else [])
    if config.router_type == "expert_choice" and config.capacity_factor is not None:
        grow.append("capacity_factor")
    for name in grow:
        setattr(config, name, getattr(config, name) * factor)
    generator = torch.Generator().manual_seed(seed)
    tied = model.all_tied_weights_keys
    state = {key: tensor.clone() for key, tensor in model.state_dict().items() if key not in tied}
    for name in (name for name, module in model.named_modules() if module in model.sparse_blocks):
        rows = state[f"{name}.gate.weight"].cpu()
        std = router_noise * rows.float().square().mean().sqrt()
        noise = [(std * torch.randn(rows.shape, generator=generator)).to(rows.dtype) for _ in range(factor - 1)]
        state[f"{name}.gate.weight"] = torch.cat([rows, *(rows + each for each in noise)])
        repeated = [key for key in state if key.startswith((f"{name}.experts.", f"{name}.gate.e_score"))]
        for key in (key for key in repeated if ".act_fn." not in key):
            state[key] = torch.cat([state[key]] * factor)
    generation_config = getattr(model, "generation_config", None)
    expanded: Any = load_mixture(type(model), config, state, model.dtype, generation_config)
    expanded = expanded.to(model.device)
    asked_for = {"factor": factor, "seed": seed, "router_noise": router_noise}
    expanded.receipt = {"expanded": {**asked_for, "from": model.receipt}}
    return expanded
