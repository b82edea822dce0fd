"""A checkpoint of any engine as a normal one: sharded safetensors with config, code, tokenizer and card."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME

from hf_sparse_moe.checkpoints.config import read_generation_config, read_mixture_config
from hf_sparse_moe.checkpoints.files import copy_companions, copy_own, read_json
from hf_sparse_moe.checkpoints.folder import check_target, new_folder
from hf_sparse_moe.checkpoints.reader import loaded_dtypes
from hf_sparse_moe.checkpoints.writer import DTYPE_NAMES, ShardWriter
from hf_sparse_moe.hub import write_model_card
from hf_sparse_moe.insight.anatomy import model_without_weights
from hf_sparse_moe.models.pretrained_model import RECEIPT_NAME, SparseMoePreTrainedModel

from .stored_weights import StoredTensor, incomplete, stored_tensors


_BESIDE = ("README.md", "training_record.json", "routing_statistics.json", "expert_load.png")


@dataclass(frozen=True)
class ConsolidateReport:
    """
    What [`consolidate`] wrote.

    Args:
        engine (`str`): What had written the checkpoint, such as "FSDP, sharded".
        tensors (`int`): How many there are now, tied ones once.
        parameters (`int`): Their elements.
        bytes (`int`): Their bytes.
    """

    engine: str
    tensors: int
    parameters: int
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


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
    tensors = _matched(source, model, stored)
    dtypes = _dtypes(model, tensors, dtype)
    outputs = {key: torch.empty(tensor.shape, dtype=dtypes[key], device="meta") for key, tensor in tensors.items()}
    parameters = sum(tensor.numel() for tensor in outputs.values())
    size = sum(tensor.nbytes for tensor in outputs.values())
    with new_folder(output, needed_bytes=size) as folder:
        writer = ShardWriter(folder, outputs, max_shard_size)
        try:
            for shard in writer.shards.values():
                for key in shard.begins:
                    writer.write(key, tensors[key].read().to(dtypes[key]))
            writer.close()
        finally:
            writer.abandon()
        _describe(model, described, folder)
        write_model_card(folder, _card_name(output))
    return ConsolidateReport(engine, len(tensors), parameters, size)


def _config_folder(source: Path, config: str | Path | None) -> Path:
    candidates = [source, source.absolute().parent] if config is None else [Path(config)]
    for folder in candidates:
        if (folder / CONFIG_NAME).is_file():
            return folder
    raise ValueError(
        f"`{config or source}` has no {CONFIG_NAME}, which says what the weights belong to. Pass `config` "
        "(`--config`): the folder of the model that the training began with."
    )


def _matched(
    source: Path, model: SparseMoePreTrainedModel, stored: dict[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """The stored tensor of each of the model's keys, tied ones once."""
    state, tied = model.state_dict(), model.all_tied_weights_keys
    for key, tensor in stored.items():
        if key not in state or tuple(state[key].shape) != tensor.shape:
            wanted = f"one of shape {tuple(state[key].shape)}" if key in state else "none of that name"
            raise ValueError(
                f"`{source}` holds `{key}` of shape {tensor.shape}, and the config describes {wanted}. Pass the "
                "config of the model that was trained."
            )
    found = {}
    for key in state:
        if key in tied:
            continue
        names = [key, *(alias for alias, first in tied.items() if first == key)]
        name = next((name for name in names if name in stored), None)
        if name is None:
            raise incomplete(source, f"it lacks `{key}`")
        found[key] = stored[name]
    return found


def _dtypes(
    model: SparseMoePreTrainedModel, tensors: dict[str, StoredTensor], dtype: str | torch.dtype
) -> dict[str, torch.dtype]:
    wanted = getattr(torch, dtype, None) if isinstance(dtype, str) and dtype != "auto" else dtype
    if wanted == "auto":
        dtypes = {key: tensor.dtype for key, tensor in tensors.items()}
        floating = (dtypes[name] for name, _ in model.named_parameters() if name in dtypes)
        wanted = next((found for found in floating if found.is_floating_point), torch.float32)
    elif not isinstance(wanted, torch.dtype) or wanted not in DTYPE_NAMES or not wanted.is_floating_point:
        raise ValueError(f"`dtype={dtype!r}` is not allowed: it must be 'auto', 'float32', 'bfloat16' or 'float16'.")
    else:
        nn.Module.to(model, wanted)
        dtypes = loaded_dtypes(model, wanted)
    model.config.dtype = model.config.dense_config.dtype = wanted
    return dtypes


def _describe(model: SparseMoePreTrainedModel, described: Path, folder: Path) -> None:
    """Write all but the weights: config, code, receipt, tokenizer, and what the card is made from."""
    if model.can_generate() and (generation := read_generation_config(described)):
        model.generation_config = generation
    model.receipt = read_json(described / RECEIPT_NAME, optional=True) or None
    with TemporaryDirectory(dir=folder) as saved:
        model.save_pretrained(saved, state_dict={})
        for path in Path(saved).iterdir():
            if path.name != SAFE_WEIGHTS_NAME:
                path.replace(folder / path.name)
    copy_companions(described, folder)
    copy_own(described, folder, _BESIDE)


def _card_name(output: str | Path) -> str:
    """The folder's name where the Hub allows it, else the nearest that it does."""
    name = Path(output).resolve().name
    try:
        validate_repo_id(name)
    except HFValidationError:
        return re.sub(r"[^0-9A-Za-z]+", "-", name).strip("-")[:96].strip("-") or "mixture"
    return name
