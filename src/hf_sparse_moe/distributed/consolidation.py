"""A checkpoint of any engine as a normal one: sharded safetensors with config, code, tokenizer and card."""

from __future__ import annotations

import re
from collections.abc import Generator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import CONFIG_NAME

from hf_sparse_moe.checkpoints.companions import copy_companions
from hf_sparse_moe.checkpoints.config import read_generation_config, read_mixture_config
from hf_sparse_moe.checkpoints.files import copy_own, read_json
from hf_sparse_moe.checkpoints.folder import check_target, write_description
from hf_sparse_moe.checkpoints.journal import written_shards
from hf_sparse_moe.checkpoints.loading import model_without_weights
from hf_sparse_moe.checkpoints.reader import loaded_dtypes
from hf_sparse_moe.checkpoints.writer import ShardWriter
from hf_sparse_moe.hub import write_model_card
from hf_sparse_moe.models.pretrained_model import RECEIPT_NAME, SparseMoePreTrainedModel
from hf_sparse_moe.upcycling.recipe import check_dtype

from .stored_weights import StoredTensor, matched, stored_tensors


_BESIDE = ("README.md", "training_record.json", "routing_statistics.json", "expert_load.png")


@dataclass(frozen=True)
class ConsolidateReport:
    """
    What [`consolidate`] wrote.

    Args:
        path (`Path`): The folder.
        engine (`str`): What had written the checkpoint, such as "FSDP, sharded".
        tensors (`int`): How many there are now, tied ones once.
        parameters (`int`): Their elements.
        bytes (`int`): Their bytes.
    """

    path: Path
    engine: str
    tensors: int
    parameters: int
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self) | {"path": str(self.path)}


def consolidate(
    source: str | Path,
    output: str | Path,
    config: str | Path | None = None,
    dtype: str | torch.dtype = "auto",
    max_shard_size: int | str = "4GB",
) -> ConsolidateReport:
    """
    Write the weights that a training's ranks saved apart as a normal checkpoint, which `from_pretrained` loads.

    Takes what FSDP wrote (sharded, or one `.bin` file), DeepSpeed's ZeRO (stages 1 to 3; needs DeepSpeed), expert
    parallelism of transformers, and normal safetensors. Memory holds one tensor at a time. A pickle that would run
    code is refused. The folder appears when it is complete. Optimizer states are left behind, and adapters are not
    taken: theirs are one file already.

    Args:
        source (`str` or `Path`): The folder `checkpoint-...` of a training.
        output (`str` or `Path`): A folder that does not exist yet, or is empty.
        config (`str` or `Path`, *optional*): Folder with the model's config.json and tokenizer. Defaults to the
            checkpoint and, where it has none, the folder that it lies in.
        dtype (`str` or `torch.dtype`, defaults to `"auto"`): Of the weights, such as `"bfloat16"`; `"auto"` keeps each
            as it was saved, which for ZeRO is float32.
        max_shard_size (`int` or `str`, defaults to `"4GB"`): Of a file of weights; a larger tensor gets its own.

    Returns:
        [`ConsolidateReport`].

    Raises:
        ValueError: no such checkpoint, an incomplete or corrupt one, or a config that does not describe its weights.
        ImportError: a checkpoint of DeepSpeed, which is not installed.
        OSError: the output is taken or being written, or its disk is too small.
    """
    source = Path(source)
    check_target(output)
    engine, stored = stored_tensors(source)
    described = _config_folder(source, config)
    model = model_without_weights(read_mixture_config(described))
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    tensors = matched(source, stored, shapes, model.all_tied_weights_keys)
    dtypes = _set_dtype(model, tensors, dtype)
    outputs = {key: torch.empty(tensor.shape, dtype=dtypes[key], device="meta") for key, tensor in tensors.items()}
    parameters = sum(tensor.numel() for tensor in outputs.values())
    size = sum(tensor.nbytes for tensor in outputs.values())

    def write(writer: ShardWriter) -> Generator[int]:
        for shard in writer.shards.values():
            for key in shard.begins:
                yield writer.write(key, tensors[key].read().to(dtypes[key]))

    if model.can_generate() and (generation := read_generation_config(described)):
        model.generation_config = generation
    model.receipt = read_json(described / RECEIPT_NAME, optional=True) or None
    with written_shards(output, outputs, write, None, {}, max_shard_size) as (folder, _):
        write_description(model, folder)
        copy_companions(described, folder)
        copy_own(described, folder, _BESIDE)
        # The title of the card: the folder's name in letters that the Hub allows.
        name = re.sub(r"[^0-9A-Za-z]+", "-", Path(output).resolve().name)[:96].strip("-")
        write_model_card(folder, name or "mixture")
    return ConsolidateReport(Path(output), engine, len(tensors), parameters, size)


def _config_folder(source: Path, config: str | Path | None) -> Path:
    for folder in [source, source.absolute().parent] if config is None else [Path(config)]:
        if (folder / CONFIG_NAME).is_file():
            return folder
    raise ValueError(
        f"`{config or source}` has no {CONFIG_NAME}, which says what the weights belong to. Pass `config` "
        "(`--config`): the folder of the model that the training began with."
    )


def _set_dtype(
    model: SparseMoePreTrainedModel, tensors: dict[str, StoredTensor], dtype: str | torch.dtype
) -> dict[str, torch.dtype]:
    """The dtype of each tensor to write; the model's config will name that of most."""
    wanted = check_dtype(dtype)
    if wanted is None:
        dtypes = {key: tensor.dtype for key, tensor in tensors.items()}
        floating = (dtypes[name] for name, _ in model.named_parameters() if name in dtypes)
        wanted = next((found for found in floating if found.is_floating_point), torch.float32)
    else:
        nn.Module.to(model, wanted)
        dtypes = loaded_dtypes(model, wanted)
    model.config.dtype = model.config.dense_config.dtype = wanted
    return dtypes
