"""`prune_adapter`: an expert-LoRA adapter is cut along with the mixture that it was trained on. r rank, E experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from hf_sparse_moe.adapters.expert_lora import FILE as SETTINGS_NAME
from hf_sparse_moe.checkpoints.files import read_json, tensor_names
from hf_sparse_moe.checkpoints.folder import new_folder
from hf_sparse_moe.checkpoints.hashes import source_files
from hf_sparse_moe.models.pretrained_model import RECEIPT_NAME


CONFIG_NAME, WEIGHTS_NAME, BASE_NAME = "adapter_config.json", "adapter_model.safetensors", "adapter_base.json"


def prune_adapter(adapter: str | Path, base: str | Path, output: str | Path) -> Path:
    """
    Cut a LoRA on experts as its mixture was cut, so that it can be loaded on what [`prune_experts`] wrote.

    On the cut mixture it computes what it computed on the whole one with those experts disabled. Does not cut adapters
    of other kinds, nor LoRA on routers.

    Args:
        adapter (`str` or `Path`): The folder of the adapter, which was trained on the mixture before the cut.
        base (`str` or `Path`): The folder of the mixture after it, whose receipt says which experts stayed.
        output (`str` or `Path`): A folder that does not exist yet, or is empty.

    Returns:
        `Path`: the folder.

    Raises:
        ValueError: no receipt of a cut, an adapter of another mixture, or one that is not LoRA on experts alone.
        OSError: `output` is taken, or its disk is too small.

    Example:
        ```python
        prune_adapter("law-adapter", "qwen3-6x", "law-adapter-6x")
        ```
    """
    adapter, base = Path(adapter), Path(base)
    pruned = read_json(base / RECEIPT_NAME, optional=True).get("pruned")
    if not isinstance(pruned, dict) or not isinstance(pruned.get("kept"), dict):
        raise ValueError(f"`{base}` has no receipt of a cut. Pass the folder that `prune_experts` wrote.")
    recorded = read_json(adapter / BASE_NAME, optional=True).get("sha256") or {}
    cut_from = (pruned.get("source") or {}).get("sha256") or {}
    if other := [name for name in recorded.keys() & cut_from.keys() if recorded[name] != cut_from[name]]:
        raise ValueError(
            f"The adapter `{adapter}` was trained on another mixture than the one that was cut: its `{min(other)}` "
            "was another file."
        )
    config, settings = read_json(adapter / CONFIG_NAME), read_json(adapter / SETTINGS_NAME, optional=True)
    kept, rank = pruned["kept"], config.get("r")
    if not isinstance(rank, int) or config.get("rank_pattern") or config.get("modules_to_save"):
        raise ValueError(f"`{adapter}` is not LoRA on experts alone, with one rank: only such an adapter can be cut.")
    tensor_names(adapter / WEIGHTS_NAME)
    tensors = {
        name: _cut(name, tensor, kept, rank, pruned["num_experts"])
        for name, tensor in load_file(adapter / WEIGHTS_NAME).items()
    }
    if isinstance(chosen := settings.get("experts"), dict):
        settings["experts"] = {name: _renumbered(name, ids, kept) for name, ids in chosen.items()}
    config["base_model_name_or_path"] = str(base)
    weights = {name: digest for name, digest in source_files(base).items() if name != "config.json"}
    about = {"name_or_path": base.name, "revision": None, "sha256": weights}
    with new_folder(output) as folder:
        save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
        written = {CONFIG_NAME: config, BASE_NAME: about, **({SETTINGS_NAME: settings} if settings else {})}
        for name, content in written.items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return Path(output)


def _kept_in(name: str, kept: dict[str, list[int]]) -> tuple[str, list[int]] | None:
    """The cut layer that a tensor or module belongs to."""
    return next(((layer, ids) for layer, ids in kept.items() if f".{layer}.experts" in f".{name}"), None)


def _cut(name: str, tensor: torch.Tensor, kept: dict[str, Any], rank: int, before: dict[str, int]) -> torch.Tensor:
    """PEFT's files hold A as `(E r, in)` and B as `(out, r E)`, the experts running fastest."""
    if any(f".{layer}.gate." in name for layer in kept):
        raise ValueError(f"`{name}` of the adapter is of a router, which is not cut. Train the adapter again.")
    if (found := _kept_in(name, kept)) is None:
        return tensor
    layer, ids = found
    is_b, rows = ".lora_B." in name, rank * before[layer]
    if tensor.dim() != 2 or tensor.shape[int(is_b)] != rows:
        raise ValueError(
            f"`{name}` of the adapter is {tuple(tensor.shape)}, not of {before[layer]} experts at rank {rank}."
        )
    if is_b:
        return tensor.unflatten(1, (rank, -1))[:, :, ids].flatten(1).contiguous()
    return tensor.unflatten(0, (-1, rank))[ids].flatten(0, 1).contiguous()


def _renumbered(name: str, adapted: list[int], kept: dict[str, Any]) -> list[int]:
    found = _kept_in(name, kept)
    left = adapted if found is None else [found[1].index(expert) for expert in adapted if expert in found[1]]
    if not left:
        raise ValueError(f"All experts of `{name}` that the adapter is for were cut: nothing is left of it there.")
    return left
