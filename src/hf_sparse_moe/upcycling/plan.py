"""`plan`: what a mixture would cost to store, train and serve, before anything is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_sparse_moe.checkpoints.config import read_config, sensible_config
from hf_sparse_moe.checkpoints.families import sparse_class
from hf_sparse_moe.checkpoints.source import named_architecture
from hf_sparse_moe.models.configuration_sparse_moe import SparseMoeConfig
from hf_sparse_moe.models.pretrained_model import SparseMoePreTrainedModel
from hf_sparse_moe.models.size import count_flops_per_token, count_parameters

from .initialization import INITIALIZATION_METHODS
from .upcycle import Layers, make_recipe, mixture_config


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes for each parameter, by what they hold. Activations, which grow with the batch, are not in it."""

    weights: int
    gradients: int
    states: int
    master: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.states + self.master


# By optimizer and precision. 8-bit Adam also keeps one scale for every few hundred states, which is not counted.
TRAINING_MEMORY = {
    ("AdamW", "float32"): TrainingMemory(4, 4, 8),
    ("AdamW", "bfloat16, float32 master"): TrainingMemory(2, 2, 8, 4),
    ("AdamW", "bfloat16"): TrainingMemory(2, 2, 4),
    ("8-bit Adam", "float32"): TrainingMemory(4, 4, 2),
    ("8-bit Adam", "bfloat16"): TrainingMemory(2, 2, 2),
    ("SGD", "float32"): TrainingMemory(4, 4, 0),
    ("SGD", "bfloat16"): TrainingMemory(2, 2, 0),
}
DECODE_BATCHES = (1, 8, 32, 128)
RULE_OF_THUMB = (
    "Skywork-MoE (arXiv 2406.06563) gives a rule of thumb, from its own experiments: where the budget for training "
    "the mixture is far below what the dense model cost to train, upcycle; where it is at least twice that cost, "
    "training the mixture from scratch came out ahead; in between it depends. No measurement of yours went into this."
)


def plan(
    source: str | Path,
    num_experts: int = 8,
    num_experts_per_tok: int = 2,
    method: str = "copy",
    *,
    layers: Layers = "all",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    **options_and_fields,
) -> dict[str, Any]:
    """
    The size and cost of the mixture that [`upcycle`] would make with these arguments. Reads the config alone.

    Args:
        source (`str` or `Path`): Folder or Hub id of a dense checkpoint.
        num_experts, num_experts_per_tok, method, layers, dtype, revision, **options_and_fields: As in [`upcycle`].

    Returns:
        `dict`: `config`, the mixture's; `class`; `exact`, when the method keeps the function; `parameters` (`dense`,
        `total`, `active`); `checkpoint_bytes`; `training_bytes`, by optimizer and precision; `flops_per_token`
        (`dense`, `mixture`); `decode_slowdown`, by batch size; `rule_of_thumb`.

    Raises:
        ValueError: as [`upcycle`].

    Example:
        ```python
        report = plan("Qwen/Qwen3-0.6B", num_experts=8)
        print(report["parameters"], report["decode_slowdown"])
        ```
    """
    recipe, fields = make_recipe(method, 0, options_and_fields)
    fields = {"num_experts": num_experts, "num_experts_per_tok": num_experts_per_tok, **fields}
    dense_config = read_config(source, revision)
    target = sparse_class(dense_config, named_architecture(dense_config))
    chosen = (dense_config.dtype or torch.float32) if dtype == "auto" else dtype
    chosen = getattr(torch, chosen) if isinstance(chosen, str) else chosen
    with sensible_config(source), torch.device("meta"):
        dense = target.dense_auto_class.from_config(dense_config, dtype=chosen, trust_remote_code=False)
    config = mixture_config(dense, target, recipe, dict(fields), layers)
    mixture = _build(target, config)
    # The dense model counted as a mixture without a sparse layer, so that both are counted alike.
    trunk = _build(target, mixture_config(dense, target, make_recipe("copy", 0, {})[0], {}, "none"))
    total = count_parameters(mixture)
    return {
        "config": config,
        "class": target.__name__,
        "exact": INITIALIZATION_METHODS[method].exact,
        "parameters": {
            "dense": dense.num_parameters(),
            "total": total,
            "active": count_parameters(mixture, only_active=True),
        },
        "checkpoint_bytes": total * chosen.itemsize,
        "training_bytes": {f"{name}, {kind}": each.total * total for (name, kind), each in TRAINING_MEMORY.items()},
        "flops_per_token": {"dense": count_flops_per_token(trunk), "mixture": count_flops_per_token(mixture)},
        "decode_slowdown": {batch: _slowdown(mixture, trunk, batch) for batch in DECODE_BATCHES},
        "rule_of_thumb": RULE_OF_THUMB,
    }


def _build(target: type[SparseMoePreTrainedModel], config: SparseMoeConfig) -> SparseMoePreTrainedModel:
    with torch.device("meta"):
        return target(config)


def _slowdown(mixture: SparseMoePreTrainedModel, trunk: SparseMoePreTrainedModel, batch: int) -> float:
    """
    How much longer a decoding step takes where reading the weights is all that takes time: weights read by the mixture
    over weights read by the dense model. With even routing a batch of B tokens meets E (1 - (1 - k/E)^B) experts.
    """
    config = mixture.config
    experts_met = config.num_experts * (1 - (1 - config.num_experts_per_tok / config.num_experts) ** batch)
    one_expert = sum(
        parameter.numel() // config.num_experts
        for block in mixture.sparse_blocks
        for parameter in block.experts.parameters(recurse=False)
        if parameter.dim() == 3
    )
    read = count_flops_per_token(mixture) // 2 + one_expert * (experts_met - config.num_experts_per_tok)
    return read / (count_flops_per_token(trunk) // 2)
