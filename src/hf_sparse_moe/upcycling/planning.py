"""`plan`: what a mixture would cost to store, train and serve, before anything is written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import ceil, gcd, prod
from pathlib import Path
from typing import Any

import torch

from hf_sparse_moe.checkpoints.config import read_config, sensible_config
from hf_sparse_moe.checkpoints.families import sparse_class
from hf_sparse_moe.checkpoints.source import named_architecture
from hf_sparse_moe.models.configuration_sparse_moe import SparseMoeConfig
from hf_sparse_moe.models.pretrained_model import SparseMoePreTrainedModel
from hf_sparse_moe.models.size import count_flops_per_token, count_parameters

from .recipe import Layers, check_dtype, make_recipe, mixture_config


# Bytes for each parameter, of weights, gradients, states and a master copy, by optimizer and precision. Activations,
# which grow with the batch, and 8-bit Adam's scales are not counted.
TRAINING_BYTES = {
    "AdamW, float32": 4 + 4 + 8,
    "AdamW, bfloat16, float32 master": 2 + 2 + 8 + 4,
    "AdamW, bfloat16": 2 + 2 + 4,
    "8-bit Adam, float32": 4 + 4 + 2,
    "8-bit Adam, bfloat16": 2 + 2 + 2,
    "SGD, float32": 4 + 4,
    "SGD, bfloat16": 2 + 2,
}
DECODE_BATCHES = (1, 8, 32, 128)
RULE_OF_THUMB = (
    "Skywork-MoE (arXiv 2406.06563) gives a rule of thumb, from its own experiments: where the budget for training "
    "the mixture is far below what the dense model cost to train, upcycle; where it is at least twice that cost, "
    "training the mixture from scratch came out ahead; in between it depends. Nothing of yours was measured for it."
)


@dataclass(frozen=True)
class GpuLayout:
    """
    How a training shares a mixture out over GPUs, and the bytes that this costs each of them.

    Args:
        name (`str`): Such as `"FSDP2 over 8, experts over 4"`.
        fsdp_size, ep_size (`int`): As `DistributedConfig` takes them; 1 each for DDP.
        weights, gradients, states (`int`): Kept by a GPU: the weights, their gradients and AdamW's two states, all in
            the plan's dtype. Activations, and the layers that FSDP gathers for a while, are not counted.
        moved (`int`): Sent by a GPU in an optimizer step without accumulation: weights that are gathered, gradients
            that are reduced, and tokens on their way to experts and back.
    """

    name: str
    fsdp_size: int
    ep_size: int
    weights: int
    gradients: int
    states: int
    moved: int


@dataclass(frozen=True)
class UpcyclePlan:
    """
    What [`plan`] calculated.

    Args:
        config ([`SparseMoeConfig`]): The mixture's config.
        architecture (`str`): The mixture's class.
        exact (`str`): When the method keeps the function.
        parameters (`dict`): Of the `dense` model, and `total` and `active` of the mixture.
        checkpoint_bytes (`int`): Of the weights on disk.
        training_bytes (`dict`): By optimizer and precision, in all; activations are not counted.
        flops_per_token (`dict`): Of the `dense` model and the `mixture`.
        decode_slowdown (`dict`): By batch size, where reading the weights is all that takes time.
        rule_of_thumb (`str`): When upcycling pays, from the literature.
        layouts (`tuple[GpuLayout, ...]`): Where `gpus` was given, the layouts of that many GPUs.
    """

    config: SparseMoeConfig
    architecture: str
    exact: str
    parameters: dict[str, int]
    checkpoint_bytes: int
    training_bytes: dict[str, int]
    flops_per_token: dict[str, int]
    decode_slowdown: dict[int, float]
    rule_of_thumb: str
    layouts: tuple[GpuLayout, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For JSON, without the config."""
        fields = {name: value for name, value in vars(self).items() if name not in ("config", "architecture")}
        return {"class": self.architecture, **fields, "layouts": [asdict(layout) for layout in self.layouts]}


def plan(
    source: str | Path,
    num_experts: int = 8,
    num_experts_per_tok: int = 2,
    method: str = "copy",
    *,
    layers: Layers = "all",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    token: bool | str | None = None,
    gpus: int | None = None,
    tokens_per_gpu: int = 4096,
    **options_and_fields,
) -> UpcyclePlan:
    """
    The size and cost of the mixture that [`upcycle`] would make with these arguments. Reads the config alone.

    Args:
        source (`str` or `Path`): Folder or Hub id of a dense checkpoint.
        num_experts, num_experts_per_tok, method, layers, dtype, revision, token, **options_and_fields: As in
            [`upcycle`].
        gpus (`int`, *optional*): Also compare the layouts of that many GPUs: DDP, FSDP2, and FSDP2 with the experts
            over each possible number of them.
        tokens_per_gpu (`int`, defaults to 4096): Tokens that a GPU sees in an optimizer step, for what it sends.

    Returns:
        [`UpcyclePlan`]: predicts no seconds.

    Raises:
        ValueError: as [`upcycle`].

    Example:
        ```python
        report = plan("Qwen/Qwen3-0.6B", num_experts=8)
        print(report.parameters, report.decode_slowdown)
        ```
    """
    for name, value in {"gpus": gpus, "tokens_per_gpu": tokens_per_gpu}.items():
        if value is not None and value < 1:
            raise ValueError(f"`{name}={value}` is not allowed: it must be at least 1.")
    recipe, fields = make_recipe(method, 0, options_and_fields)
    fields = {"num_experts": num_experts, "num_experts_per_tok": num_experts_per_tok, **fields}
    asked_dtype, dense_config = check_dtype(dtype), read_config(source, revision, token)
    target = sparse_class(dense_config, named_architecture(dense_config))
    chosen = asked_dtype or dense_config.dtype or torch.float32
    with sensible_config(source), torch.device("meta"):
        dense = target.dense_auto_class.from_config(dense_config, dtype=chosen, trust_remote_code=False)
    config = mixture_config(dense, target, recipe, fields, layers)
    # The dense model counted as a mixture without a sparse layer, so that both are counted alike.
    trunk_config = mixture_config(dense, target, make_recipe("copy", 0, {})[0], {}, "none")
    with torch.device("meta"):
        mixture, trunk = target(config), target(trunk_config)
    total, flops = count_parameters(mixture), count_flops_per_token(mixture)
    return UpcyclePlan(
        config=config,
        architecture=target.__name__,
        exact=recipe.initialization.exact,
        parameters={
            "dense": dense.num_parameters(),
            "total": total,
            "active": count_parameters(mixture, only_active=True),
        },
        checkpoint_bytes=total * chosen.itemsize,
        training_bytes={name: each * total for name, each in TRAINING_BYTES.items()},
        flops_per_token={"dense": count_flops_per_token(trunk), "mixture": flops},
        decode_slowdown={batch: _slowdown(mixture, trunk, batch) for batch in DECODE_BATCHES},
        rule_of_thumb=RULE_OF_THUMB,
        layouts=() if gpus is None else tuple(_gpu_layouts(mixture, gpus, tokens_per_gpu, chosen.itemsize)),
    )


def _slowdown(mixture: SparseMoePreTrainedModel, trunk: SparseMoePreTrainedModel, batch: int) -> float:
    """
    How much longer a decoding step takes where reading the weights is all that takes time: weights read by the mixture
    over weights read by the dense model. With even routing a batch of B tokens meets E (1 - (1 - k/E)^B) experts.
    """
    experts, top_k = mixture.config.num_experts, mixture.config.num_experts_per_tok
    experts_met = experts * (1 - (1 - top_k / experts) ** batch)
    matrices = [each for block in mixture.sparse_blocks for each in block.experts.parameters(recurse=False)]
    one_expert = sum(matrix.numel() // experts for matrix in matrices if matrix.dim() == 3)
    read = count_flops_per_token(mixture) // 2 + one_expert * (experts_met - top_k)
    return read / (count_flops_per_token(trunk) // 2)


def _gpu_layouts(mixture: SparseMoePreTrainedModel, gpus: int, tokens: int, itemsize: int) -> Iterator[GpuLayout]:
    """
    DDP reduces each gradient. FSDP gathers each weight before its forward and its backward pass, and scatters its
    gradient (arXiv 2304.11277). With expert parallelism a GPU owns whole experts, sharded over the GPUs that own the
    same ones, and sends a token's rows to them and back, forward and backward (arXiv 2006.16668), routing taken as
    even. A ring gathers or scatters in n - 1 parts of n, and reduces in twice as many.
    """

    def layout(name: str, fsdp: int, size: int, kept: int, moved: float) -> GpuLayout:
        weights = kept * itemsize
        return GpuLayout(name, fsdp, size, weights, weights, 2 * weights, round(moved * itemsize))

    config, numbers = mixture.config, count_parameters(mixture)
    yield layout("DDP", 1, 1, numbers, 2 * numbers * (gpus - 1) / gpus)
    experts = {id(each) for block in mixture.sparse_blocks for each in block.experts.parameters(recurse=False)}
    shared = gcd(gpus, config.num_experts)
    for size in [size for size in range(1, shared + 1) if shared % size == 0] if gpus > 1 else []:
        rows_sent = tokens * config.mean_experts_per_token * (size - 1) / size
        kept, moved = 0, sum(4 * rows_sent * block.experts.hidden_dim for block in mixture.sparse_blocks)
        for parameter in mixture.parameters():
            owners = size if id(parameter) in experts else 1
            rows, *rest = parameter.shape or (1,)
            shards = gpus // owners
            shard = ceil(rows // owners / shards) * prod(rest)  # the first dimension is cut, and padded to a whole cut
            kept += shard
            moved += 3 * shard * (shards - 1)
        yield layout(f"FSDP2 over {gpus}" + (f", experts over {size}" if size > 1 else ""), gpus, size, kept, moved)
