"""What a mixture is made of, from its config and receipt alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn
from transformers import AutoConfig
from transformers.utils import cached_file

from hf_sparse_moe.models.configuration_sparse_moe import SparseMoeConfig
from hf_sparse_moe.models.modeling_sparse_moe import AUTO_CLASSES
from hf_sparse_moe.models.moe_block import SparseMoeBlock
from hf_sparse_moe.models.pretrained_model import RECEIPT_NAME, SparseMoePreTrainedModel
from hf_sparse_moe.models.size import count_flops_per_token, count_parameters, meta_model


PARTS = ("embeddings and head", "attention", "experts", "shared experts", "router", "rest")
_ATTENTION = re.compile(r"(?i)(^|\.)(?![^.]*norm)[^.]*(attn|attention)")


def describe_checkpoint(name_or_path: str, revision: str | None = None) -> dict[str, Any]:
    """
    Family, architecture, experts, parameters by part and receipt of a mixture, as plain values. Reads no weights.

    Args:
        name_or_path (`str`): Folder or Hub id of a mixture.
        revision (`str`, *optional*): Branch, tag or commit of a Hub id.

    Raises:
        ValueError: no checkpoint, or no mixture.
    """
    config = read_config(name_or_path, revision)
    model = model_without_weights(config)
    path = cached_file(name_or_path, RECEIPT_NAME, revision=revision, _raise_exceptions_for_missing_entries=False)
    receipt = None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
    return {
        "family": config.model_type.removeprefix("sparse_moe_").replace("_", "-"),
        "class": type(model).__name__,
        "dense_architecture": type(model.dense).__name__,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "sparse_layers": len(model.sparse_blocks),
        "flops_per_token": count_flops_per_token(model),
        "parameters": parameters_by_part(model),
        "receipt": receipt,
    }


def parameters_by_part(model: SparseMoePreTrainedModel) -> dict[str, dict[str, int]]:
    """Parameters of each of `PARTS` and in all, total and active for a token; tied ones once."""
    part_of: dict[int, str] = {}
    for block in model.sparse_blocks:
        _claim(part_of, block.experts, "experts")
        _claim(part_of, block.gate, "router")
        if block.shared_experts is not None:
            _claim(part_of, block.shared_experts, "shared experts")
    for name, module in model.named_modules():
        if _ATTENTION.search(name) and not isinstance(module, SparseMoeBlock):
            _claim(part_of, module, "attention")
        elif isinstance(module, nn.Embedding):
            _claim(part_of, module, "embeddings and head")
    if (head := model.get_output_embeddings()) is not None:
        _claim(part_of, head, "embeddings and head")
    totals = dict.fromkeys(PARTS, 0)
    for parameter in model.parameters():
        totals[part_of.get(id(parameter), "rest")] += parameter.numel()
    idle = count_parameters(model) - count_parameters(model, only_active=True)
    counts = {part: {"total": total, "active": total} for part, total in totals.items()}
    counts["experts"]["active"] -= idle
    counts["total"] = {kind: sum(count[kind] for count in counts.values()) for kind in ("total", "active")}
    return counts


def _claim(part_of: dict[int, str], module: nn.Module, part: str) -> None:
    for parameter in module.parameters():
        part_of.setdefault(id(parameter), part)


def read_config(name_or_path: str, revision: str | None = None) -> SparseMoeConfig:
    """The config of a mixture; raises a `ValueError` for what is no checkpoint, or a dense one."""
    folder = Path(name_or_path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"`{name_or_path}` has no config.json. Pass the folder of a saved model.")
    try:
        if not folder.is_dir():
            validate_repo_id(name_or_path)
        config = AutoConfig.from_pretrained(name_or_path, revision=revision)
    except HFValidationError:
        raise ValueError(f"`{name_or_path}` is no folder, and no Hub id (`user/name`). Check the path.") from None
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"`{name_or_path}` is no folder, and cannot be fetched from the Hub: {reason}") from error
    if not isinstance(config, SparseMoeConfig):
        raise ValueError(
            f"`{name_or_path}` is a dense checkpoint (`model_type={config.model_type!r}`). Make a mixture of it: "
            f"hf-sparse-moe upcycle {name_or_path} <new folder>."
        )
    return config


def model_without_weights(config: SparseMoeConfig) -> SparseMoePreTrainedModel:
    """With the checkpoint's own head, where its config names one of the family's classes."""
    named = {model_class.__name__: model_class for model_class in AUTO_CLASSES[type(config)].values()}
    for architecture in config.architectures or []:
        if architecture in named:
            with torch.device("meta"):
                return named[architecture](config)
    return meta_model(config)
