"""A checkpoint of any engine as a normal one: sharded safetensors with config, code, tokenizer and card."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn
from transformers import GenerationConfig
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_NAME

from hf_sparse_moe.checkpoints.folder import check_target, copy_companions, new_folder
from hf_sparse_moe.checkpoints.reader import loaded_dtypes
from hf_sparse_moe.checkpoints.source import Source, weight_files
from hf_sparse_moe.checkpoints.writer import DTYPE_NAMES, ShardWriter
from hf_sparse_moe.hub import write_model_card
from hf_sparse_moe.insight.anatomy import model_without_weights, read_config
from hf_sparse_moe.models.pretrained_model import RECEIPT_NAME, SparseMoePreTrainedModel

from .checkpoint import INCOMPLETE_NAME
from .consolidate_expert_parallel import PATTERN, expert_parallel_tensors, plain_tensors
from .consolidate_fsdp import full_tensors, sharded_tensors
from .consolidate_parts import StoredTensor, incomplete
from .consolidate_zero import zero_tensors


_BESIDE = ("README.md", "training_record.json", "routing_statistics.json", "expert_load.png")


@dataclass(frozen=True)
class Consolidated:
    """What was read: the `engine` that wrote it, and how many tensors, parameters and bytes they are now."""

    engine: str
    tensors: int
    parameters: int
    bytes: int


def consolidate(
    checkpoint: str | Path,
    target: str | Path,
    config: str | Path | None = None,
    dtype: str | torch.dtype = "auto",
    max_shard_size: int | str = "4GB",
) -> Consolidated:
    """
    Write the weights that a training's ranks saved apart as a normal checkpoint, which `from_pretrained` loads.

    Takes what FSDP wrote (sharded, or one `.bin` file), DeepSpeed's ZeRO (stages 1 to 3; DeepSpeed need not be
    installed), expert parallelism of transformers, and normal safetensors. Memory holds a part of a tensor, not the
    model. No pickle runs code: one that would is refused. The folder appears when it is complete. Optimizer states
    are left behind, and adapters are not taken: theirs are one file already.

    Args:
        checkpoint (`str` or `Path`): The folder `checkpoint-...` of a training.
        target (`str` or `Path`): A folder that does not exist yet, or is empty.
        config (`str` or `Path`, *optional*): Folder with the model's config.json and tokenizer. Defaults to the
            checkpoint and, where it has none, the folder that it lies in.
        dtype (`str` or `torch.dtype`, defaults to `"auto"`): Of the weights, such as `"bfloat16"`; `"auto"` keeps each
            as it was saved, which for ZeRO is float32.
        max_shard_size (`int` or `str`, defaults to `"4GB"`): Of a file of weights; a larger tensor gets its own.

    Returns:
        [`Consolidated`].

    Raises:
        ValueError: no such checkpoint, an incomplete or corrupt one, or a config that does not describe its weights.
        OSError: the target is taken, or its disk is too small.
    """
    checkpoint = Path(checkpoint)
    check_target(target)
    engine, stored = stored_tensors(checkpoint)
    described = _config_folder(checkpoint, config)
    model = model_without_weights(read_config(str(described)))
    tensors = _matched(checkpoint, model, stored)
    dtypes = _dtypes(model, tensors, dtype)
    outputs = {key: torch.empty(tensor.shape, dtype=dtypes[key], device="meta") for key, tensor in tensors.items()}
    parameters = sum(map(torch.Tensor.numel, outputs.values()))
    size = sum(tensor.numel() * tensor.element_size() for tensor in outputs.values())
    with new_folder(target, needed_bytes=size) as folder:
        writer = ShardWriter(folder, outputs, max_shard_size)
        try:
            for shard in writer.shards.values():
                for key in shard.begins:
                    _write(writer, key, tensors[key], dtypes[key])
            writer.close()
        finally:
            writer.abandon()
        _describe(model, described, folder)
        write_model_card(folder, Path(target).resolve().name)
    return Consolidated(engine, len(tensors), parameters, size)


def stored_tensors(checkpoint: Path) -> tuple[str, dict[str, StoredTensor]]:
    """The engine that wrote a checkpoint, and the model's tensors in it, of which nothing is read yet."""
    if not checkpoint.is_dir():
        raise ValueError(f"`{checkpoint}` is no folder. Pass the folder `checkpoint-...` of a training.")
    if (checkpoint / INCOMPLETE_NAME).exists():
        raise incomplete(checkpoint, "its writing was not finished")
    sharded = (
        [checkpoint] if (checkpoint / ".metadata").exists() else sorted(checkpoint.glob("pytorch_model_fsdp_[0-9]*"))
    )
    if (checkpoint / "latest").is_file():
        return "DeepSpeed ZeRO", zero_tensors(checkpoint)
    if sharded:
        return "FSDP, sharded", sharded_tensors(sharded[0])
    if any(checkpoint.glob(PATTERN)):
        return "expert parallelism", expert_parallel_tensors(checkpoint)
    if files := weight_files(Source(str(checkpoint), checkpoint, None)):
        return "one process, or gathered", plain_tensors(files)
    if (checkpoint / "pytorch_model_fsdp.bin").is_file():
        return "FSDP, gathered", full_tensors(checkpoint / "pytorch_model_fsdp.bin")
    if (checkpoint / "adapter_model.safetensors").is_file():
        raise ValueError(
            f"`{checkpoint}` holds an adapter, which is one file already: load it with `PeftModel.from_pretrained`."
        )
    raise ValueError(
        f"`{checkpoint}` has no weights of FSDP, DeepSpeed, expert parallelism or safetensors. Pass the folder "
        "`checkpoint-...` of a training."
    )


def _config_folder(checkpoint: Path, config: str | Path | None) -> Path:
    candidates = [checkpoint, checkpoint.absolute().parent] if config is None else [Path(config)]
    for folder in candidates:
        if (folder / CONFIG_NAME).is_file():
            return folder
    raise ValueError(
        f"`{config or checkpoint}` has no {CONFIG_NAME}, which says what the weights belong to. Pass `config` "
        "(`--config`): the folder of the model that the training began with."
    )


def _matched(
    checkpoint: Path, model: SparseMoePreTrainedModel, stored: dict[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """The stored tensor of each of the model's keys, tied ones once."""
    state, tied = model.state_dict(), model.all_tied_weights_keys
    for key, tensor in stored.items():
        if key not in state or tuple(state[key].shape) != tensor.shape:
            wanted = f"one of shape {tuple(state[key].shape)}" if key in state else "none of that name"
            raise ValueError(
                f"`{checkpoint}` holds `{key}` of shape {tensor.shape}, and the config describes {wanted}. Pass the "
                "config of the model that was trained."
            )
        if not tensor.is_complete:
            raise incomplete(checkpoint, f"parts of `{key}` are missing")
    found = {}
    for key in state:
        if key in tied:
            continue
        names = [key, *(alias for alias, first in tied.items() if first == key)]
        name = next((name for name in names if name in stored), None)
        if name is None:
            raise incomplete(checkpoint, f"it lacks `{key}`")
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


def _write(writer: ShardWriter, key: str, tensor: StoredTensor, dtype: torch.dtype) -> None:
    begin = 0
    for piece in tensor.read():
        begin += writer.write(key, piece.to(dtype), begin)
    if begin != prod(tensor.shape) * dtype.itemsize:
        raise ValueError(f"`{key}` changed while it was read. Let the training end, and consolidate again.")


def _describe(model: SparseMoePreTrainedModel, source: Path, folder: Path) -> None:
    """Write all but the weights: config, code, receipt, tokenizer, and what the card is made from."""
    if model.can_generate() and (source / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(source)
    if (source / RECEIPT_NAME).is_file():
        model.receipt = json.loads((source / RECEIPT_NAME).read_text(encoding="utf-8"))
    with TemporaryDirectory(dir=folder) as described:
        model.save_pretrained(described, state_dict={})
        for path in Path(described).iterdir():
            if path.name != SAFE_WEIGHTS_NAME:
                path.replace(folder / path.name)
    copy_companions(source, folder)
    for name in _BESIDE:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
