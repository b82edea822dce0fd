"""`upcycle_into_shards`: each process makes its own part of a mixture, straight from a dense checkpoint on disk."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from transformers.distributed.configuration_utils import DistributedConfig

from hf_sparse_moe.checkpoints.reader import NotStreamableError
from hf_sparse_moe.checkpoints.source import find_source
from hf_sparse_moe.models.pretrained_model import SparseMoePreTrainedModel
from hf_sparse_moe.upcycling.receipt import make_receipt
from hf_sparse_moe.upcycling.rows import single_threaded_workers
from hf_sparse_moe.upcycling.streaming import needs_a_model, plan_stream
from hf_sparse_moe.upcycling.streaming_slices import mixture_slices
from hf_sparse_moe.upcycling.transfer import WatchedSource
from hf_sparse_moe.upcycling.upcycle import Layers


def upcycle_into_shards(
    source: str | Path,
    distributed_config: DistributedConfig,
    num_experts: int | None = None,
    num_experts_per_tok: int = 2,
    method: str = "copy",
    seed: int = 0,
    *,
    layers: Layers = "all",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    **options_and_fields,
) -> SparseMoePreTrainedModel:
    """
    Make a mixture of experts of a dense checkpoint, shared out over the processes; every one of them calls it.

    A process reads the dense feed-forwards layer by layer, and makes the experts, or parts of experts, that it keeps:
    its memory holds its part of the mixture and a few layers' dense weights. No process ever holds either model, and
    nothing is written. The parts are bit for bit those of what [`upcycle`] returns.

    Args:
        source (`str` or `Path`): Folder or Hub id of a dense checkpoint, in safetensors.
        distributed_config (`DistributedConfig`): How transformers shares the mixture out: FSDP2, expert and tensor
            parallelism.
        num_experts, num_experts_per_tok, method, seed, layers, dtype, revision: As in [`upcycle`].
        **options_and_fields: As in [`upcycle`], except for `data`, `evaluation`, `sources` and `prompts`.

    Returns:
        [`SparseMoePreTrainedModel`]: in evaluation mode, its parameters `DTensor`s. Its receipt holds no measured
        difference to the dense model, which was never loaded.

    Raises:
        ValueError: as [`upcycle`]; sizes that do not make up the processes or do not divide the experts, before any
            file is looked at; a checkpoint or a method that needs the whole dense model.

    Example:
        ```python
        sizes = DistributedConfig(fsdp_size=8, ep_size=8)
        model = upcycle_into_shards("Qwen/Qwen3-0.6B", sizes, num_experts=64)
        ```
    """
    experts = 8 if num_experts is None else num_experts
    rank, processes = _place()
    check_distributed_config(distributed_config, experts, processes)
    fields = {"num_experts": experts, "num_experts_per_tok": num_experts_per_tok, **options_and_fields}
    try:
        needs_a_model(method, options_and_fields)
        found = find_source(str(source), revision)
        watched = WatchedSource(found)
        plan = plan_stream(found, method, seed, layers, dtype, fields)
    except NotStreamableError as reason:
        raise ValueError(
            f"`{source}` cannot be upcycled part by part: {reason}. Make the mixture with `hf-sparse-moe upcycle` "
            "first, and load that with `from_pretrained(..., distributed_config=...)`."
        ) from reason
    with ThreadPoolExecutor(max_workers=1) as hashing:
        # One process hashes the source, while all read it.
        hashes = hashing.submit(watched.sha256) if rank == 0 else None
        with single_threaded_workers() as threads:
            model = type(plan.sparse).from_pretrained(
                None,
                config=plan.config,
                state_dict=mixture_slices(plan, threads),
                dtype=plan.sparse.dtype,
                distributed_config=distributed_config,
            )
        told: list[Any] = [None if hashes is None else hashes.result()]
    watched.check_unchanged()
    if distributed.is_initialized():
        distributed.broadcast_object_list(told)
    if model.can_generate():
        model.generation_config = plan.sparse.generation_config
    model.receipt = make_receipt(plan.dense, plan.sparse, found, plan.recipe, plan.fields, told[0])
    return model


def _place() -> tuple[int, int]:
    """The rank of this process and how many there are, by their group, or, before there is one, by their launcher."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def check_distributed_config(config: DistributedConfig, num_experts: int, processes: int) -> None:
    """
    Raise unless a model can be shared out so, before its weights are read.

    Args:
        config (`DistributedConfig`): The sizes.
        num_experts (`int`): Routed experts of a layer.
        processes (`int`): How many there are.

    Raises:
        ValueError: the sizes do not make up the processes, or do not divide the experts.
    """
    pipeline, replicas, fsdp, tensor, expert = (
        getattr(config, name) or 1 for name in ("pp_size", "dp_replicate_size", "fsdp_size", "tp_size", "ep_size")
    )
    size = pipeline * replicas * fsdp * tensor
    if size != processes:
        raise ValueError(
            f"`distributed_config` is for {size} processes (pp_size x dp_replicate_size x fsdp_size x tp_size), but "
            f"{processes} run. Change the sizes or the number of processes; `ep_size` divides fsdp_size x tp_size."
        )
    if num_experts % expert:
        raise ValueError(
            f"`num_experts={num_experts}` cannot be shared out over `ep_size={expert}`: each rank holds as many "
            f"experts as the others. Choose one of {[n for n in range(1, num_experts + 1) if num_experts % n == 0]}."
        )
