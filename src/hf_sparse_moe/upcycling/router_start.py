"""The tensors of a new router, whatever its kind, from one row for each expert. E experts, H hidden."""

from __future__ import annotations

import torch

from hf_sparse_moe.models.configuration_sparse_moe import SparseMoeConfig
from hf_sparse_moe.models.routers import COSINE_INIT_TEMPERATURE, SparseMoeCosineRouter


def router_tensors(
    config: SparseMoeConfig, rows_EH: torch.Tensor, dtype: torch.dtype, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """
    A router's tensors by their names.

    Args:
        config ([`SparseMoeConfig`]): The mixture's config.
        rows_EH (`torch.Tensor` of shape `(E, H)`): What each expert looks for: random, or measured. Equal rows stay
            equal, whatever the router.
        dtype (`torch.dtype`): The checkpoint's.
        generator (`torch.Generator`): For what is drawn.
    """
    if config.router_type == "hash":
        return {}
    if config.scoring_func == "cosine":
        hidden = rows_EH.shape[1]
        size = SparseMoeCosineRouter.row_size(hidden)
        projection = torch.empty(size, hidden).normal_(std=hidden**-0.5, generator=generator)
        return {
            "weight": (rows_EH.float() @ projection.T).to(dtype),
            "projection": projection.to(dtype),
            "temperature": torch.full((1,), COSINE_INIT_TEMPERATURE, dtype=dtype),
        }
    tensors = {"weight": rows_EH.to(dtype)}
    if config.scoring_func == "sigmoid":
        tensors["e_score_correction_bias"] = torch.zeros(len(rows_EH), dtype=torch.float32)
    return tensors
