"""From a dense checkpoint on disk to a mixture on disk, or to shards of one, with neither model ever in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from transformers.distributed.configuration_utils import DistributedConfig

import hf_sparse_moe
from hf_sparse_moe.checkpoints.companions import copy_companions
from hf_sparse_moe.checkpoints.config import read_config, read_generation_config, sensible_config
from hf_sparse_moe.checkpoints.families import sparse_class
from hf_sparse_moe.checkpoints.folder import write_description
from hf_sparse_moe.checkpoints.journal import WatchedSource, written_shards
from hf_sparse_moe.checkpoints.reader import DenseTensors, NotStreamableError, loaded_dtypes, stored_dtype
from hf_sparse_moe.checkpoints.source import Source, named_architecture, weight_files
from hf_sparse_moe.checkpoints.writer import ShardWriter
from hf_sparse_moe.models.pretrained_model import SparseMoePreTrainedModel
from hf_sparse_moe.models.quantization import SCALES, ExpertsQuantizationConfig, is_expert_weight, packed_form
from hf_sparse_moe.models.quantized_weight import QuantizedWeight

from .conversion import Conversion, check_numbers, plan_conversion, set_dtype
from .receipt import make_receipt
from .recipe import Layers, Recipe
from .rows import Matrix, blocks, single_threaded_workers


def plan_from_disk(
    source: Source, recipe: Recipe, fields: dict[str, Any], layers: Layers, dtype: torch.dtype | None
) -> Conversion:
    """
    The conversion of a checkpoint, of which no weight is read, except to tell whether tied ones are equal. Without
    `dtype` that of the checkpoint is kept. Raises a [`NotStreamableError`] where it must be loaded as a model.
    """
    if recipe.method == "branches":
        raise NotStreamableError("`sources` needs the model itself")
    if not weight_files(source):
        raise NotStreamableError("its weights are no safetensors")
    dense_config = read_config(source)
    auto_class = sparse_class(dense_config, named_architecture(dense_config)).dense_auto_class
    with sensible_config(source):
        chosen = dtype or dense_config.dtype or stored_dtype(source)
        chosen = getattr(torch, chosen) if isinstance(chosen, str) else chosen
        set_dtype(dense_config, chosen)
        with torch.device("meta"):
            dense = auto_class.from_config(dense_config, dtype=chosen, trust_remote_code=False)
        tensors, loaded = DenseTensors(source, dense, chosen), loaded_dtypes(dense, chosen)
        kept = next(loaded[name] for name, parameter in dense.named_parameters() if parameter.is_floating_point())
    conversion = plan_conversion(dense, tensors, dtype or kept, recipe, fields, layers)
    if conversion.sparse.can_generate():
        conversion.sparse.generation_config = read_generation_config(source.folder) or dense.generation_config
    return conversion


def write_mixture(
    conversion: Conversion,
    source: Source,
    watched: WatchedSource,
    tell: Callable[[dict[str, str]], dict[str, Any]],
    output: str | Path,
    max_shard_size: int | str,
    resume: bool,
    show_progress: bool,
    packing: ExpertsQuantizationConfig | None = None,
) -> None:
    """
    Write the mixture to a folder, tensor by tensor: memory holds two layers' dense weights, whatever their number.
    `tell` makes its receipt, given the hashes of the source's files. With `packing` the experts are packed.
    """
    recipe, fields, sparse = conversion.recipe, conversion.fields, conversion.sparse
    outputs, bits = conversion.outputs, None
    if packing is not None:
        sparse.config.quantization_config, bits = packing, packing.bits
        fields = {**fields, "quantize": bits}
        forms = (
            packed_form(key, tensor, bits) if is_expert_weight(sparse, key) else {key: tensor}
            for key, tensor in outputs.items()
        )
        outputs = {key: tensor for form in forms for key, tensor in form.items()}
    asked_for = {
        "method": recipe.method,
        "seed": recipe.seed,
        **recipe.options,
        **fields,
        "dtype": str(conversion.dtype),
        "torch": torch.__version__,
        "hf_sparse_moe": hf_sparse_moe.__version__,
        "max_shard_size": max_shard_size,
    }
    with written_shards(
        output,
        outputs,
        lambda writer: _write_tensors(conversion, writer, bits),
        watched,
        {"recipe": asked_for},
        max_shard_size,
        resume,
        show_progress,
    ) as (folder, sha256):
        sparse.receipt = tell(sha256)
        write_description(sparse, folder)
        copy_companions(source.folder, folder)


def _write_tensors(conversion: Conversion, writer: ShardWriter, bits: int | None) -> Generator[int]:
    """Write every tensor that is wanted, in the order of the shards; yields the bytes of each piece."""
    outputs = conversion.outputs
    packed = {key for key in outputs if bits is not None and is_expert_weight(conversion.sparse, key)}
    before: list[Future[int]] = []

    def write(key: str, matrix: Matrix, rows: slice, begin: int) -> int:
        return writer.write(key, matrix[rows].to(outputs[key].dtype), begin)

    def wants(key: str) -> bool:
        return writer.wants(key) or (key in packed and writer.wants(key + SCALES))

    def pack(key: str, number: int, matrix: Matrix, bits: int) -> int:
        whole = matrix[slice(0, matrix.shape[0])].to(outputs[key].dtype)
        weight = QuantizedWeight.quantize(whole[None], bits)
        parts = {key: weight.codes, key + SCALES: weight.scales}
        wanted = [name for name in parts if writer.wants(name)]
        return sum(writer.write(name, parts[name], number * parts[name].nbytes) for name in wanted)

    def write_in_blocks(key: str, matrices: list[Matrix], threads: ThreadPoolExecutor) -> list[Future[int]]:
        if bits is not None and key in packed:
            return [threads.submit(pack, key, number, matrix, bits) for number, matrix in enumerate(matrices)]
        row_bytes = prod(matrices[0].shape[1:]) * outputs[key].element_size()
        return [
            threads.submit(write, key, matrix, rows, (number * matrix.shape[0] + rows.start) * row_bytes)
            for number, matrix in enumerate(matrices)
            for rows in blocks(matrix)
        ]

    with single_threaded_workers() as threads, single_threaded_workers(1) as planner:
        for position, keys in groupby(outputs, conversion.layer_of):
            wanted = [key for key in keys if wants(key)]
            if position is None:
                for key in wanted:
                    begin = 0
                    for piece in conversion.tensors.pieces(key.removeprefix("dense.")):
                        check_numbers(key, piece)
                        begin += (written := writer.write(key, piece.to(outputs[key].dtype), begin))
                        yield written
            elif wanted:
                made = planner.submit(conversion.make, conversion.layers[position], reuse=True).result()
                for block in before:  # the threads write one layer while the next is read
                    yield block.result()
                before = []
                for key in wanted:
                    found = made[key]
                    matrices = found if isinstance(found, list) else [_not_scalar(found)]
                    before += write_in_blocks(key, matrices, threads)
        for block in before:
            yield block.result()


def _not_scalar(matrix: Matrix) -> Matrix:
    return torch.atleast_1d(matrix) if isinstance(matrix, torch.Tensor) else matrix


def load_shards(
    conversion: Conversion, source: Source, watched: WatchedSource, distributed_config: DistributedConfig
) -> SparseMoePreTrainedModel:
    """
    This process's part of the mixture; every process calls it. Memory holds that part and a few layers' dense weights.
    """
    dense, sparse = conversion.dense, conversion.sparse
    with ThreadPoolExecutor(max_workers=1) as hashing:
        # One process hashes the source, while all read it.
        hashes = hashing.submit(watched.sha256) if _rank_and_processes()[0] == 0 else None
        generation_config = sparse.generation_config if sparse.can_generate() else None
        model = conversion.load(generation_config=generation_config, distributed_config=distributed_config)
        known: list[Any] = [None if hashes is None else hashes.result()]
    watched.check_unchanged()
    if distributed.is_initialized():
        distributed.broadcast_object_list(known)
    model.receipt = make_receipt(dense, sparse, source, conversion.recipe, conversion.fields, known[0])
    return model


def _rank_and_processes() -> tuple[int, int]:
    """Of the process group, or, before there is one, as the launcher says."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def check_distributed_config(config: DistributedConfig, num_experts: int, processes: int | None = None) -> None:
    """
    Raise a `ValueError` unless the sizes multiply to the number of processes, those of this run by default, and divide
    the routed experts of a layer.
    """
    pipeline, replicas, fsdp, tensor, expert = (
        getattr(config, name) or 1 for name in ("pp_size", "dp_replicate_size", "fsdp_size", "tp_size", "ep_size")
    )
    size = pipeline * replicas * fsdp * tensor
    processes = _rank_and_processes()[1] if processes is None else processes
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
