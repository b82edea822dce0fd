"""What a mixture is made of, from its config and receipt alone."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers.utils import cached_file

from hf_sparse_moe.checkpoints.config import read_mixture_config
from hf_sparse_moe.checkpoints.files import read_json
from hf_sparse_moe.checkpoints.loading import model_without_weights
from hf_sparse_moe.models.moe_block import SparseMoeBlock
from hf_sparse_moe.models.pretrained_model import RECEIPT_NAME, SparseMoePreTrainedModel
from hf_sparse_moe.models.size import count_bytes, count_flops_per_token, count_parameters


PARTS = ("embeddings and head", "attention", "experts", "shared experts", "router", "rest")
_ATTENTION = re.compile(r"(?i)(^|\.)(?![^.]*norm)[^.]*(attn|attention)")


@dataclass(frozen=True)
class CheckpointDescription:
    """
    What a mixture is made of.

    Args:
        family (`str`): "encoder", "decoder" or "encoder-decoder".
        architecture (`str`): The class of the model.
        dense_architecture (`str`): The class of the dense model inside.
        num_experts (`int`): Routed experts of a layer.
        num_experts_per_tok (`int`): Experts that a token uses.
        sparse_layers (`int`): Layers with experts.
        flops_per_token (`int`): Of a forward pass.
        stored_bytes (`int`): Of the weights on disk, packed or not.
        parameters (`dict[str, dict[str, int]]`): "total" and "active" for a token, of each part and in all.
        receipt (`dict`, *optional*): How the checkpoint was made, if it says so.
    """

    family: str
    architecture: str
    dense_architecture: str
    num_experts: int
    num_experts_per_tok: int
    sparse_layers: int
    flops_per_token: int
    stored_bytes: int
    parameters: dict[str, dict[str, int]]
    receipt: dict[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        """The description as plain values."""
        return {"class" if name == "architecture" else name: value for name, value in asdict(self).items()}


def describe_checkpoint(
    source: str | Path, revision: str | None = None, token: bool | str | None = None
) -> CheckpointDescription:
    """
    Describe a mixture by its config and receipt. Reads no weights.

    Args:
        source (`str` or `Path`): Folder or Hub id of a mixture.
        revision (`str`, *optional*): Branch, tag or commit of a Hub id.
        token (`bool` or `str`, *optional*): Defaults to that of `hf auth login`.

    Raises:
        ValueError: no checkpoint, or no mixture.
    """
    config = read_mixture_config(source, revision, token)
    model = model_without_weights(config)
    return CheckpointDescription(
        family=config.model_type.removeprefix("sparse_moe_").replace("_", "-"),
        architecture=type(model).__name__,
        dense_architecture=type(model.dense).__name__,
        num_experts=config.num_experts,
        num_experts_per_tok=config.num_experts_per_tok,
        sparse_layers=len(model.sparse_blocks),
        flops_per_token=count_flops_per_token(model),
        stored_bytes=count_bytes(model),
        parameters=parameters_by_part(model),
        receipt=read_receipt(source, revision, token),
    )


def read_receipt(
    source: str | Path, revision: str | None = None, token: bool | str | None = None
) -> dict[str, Any] | None:
    """The receipt of a folder or Hub id, of which nothing else is fetched; None where there is none."""
    folder = Path(source)
    if not folder.is_dir():
        found = cached_file(
            str(source), RECEIPT_NAME, revision=revision, token=token, _raise_exceptions_for_missing_entries=False
        )
        folder = Path(found or "").parent
    return read_json(folder / RECEIPT_NAME, optional=True) or None


def parameters_by_part(model: SparseMoePreTrainedModel) -> dict[str, dict[str, int]]:
    """Parameters of each of `PARTS` and in all, total and active for a token; tied ones once."""
    part_of: dict[int, str] = {}
    for block in model.sparse_blocks:
        _claim(part_of, block.experts, "experts")
        _claim(part_of, block.gate, "router")
        if block.shared_experts is not None:
            _claim(part_of, block.shared_experts, "shared experts")
        if block.shared_expert_gate is not None:
            _claim(part_of, block.shared_expert_gate, "shared experts")
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
