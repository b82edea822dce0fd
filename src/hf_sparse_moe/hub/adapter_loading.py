"""Loading an adapter onto the base it was trained on, and onto no other."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from transformers import PreTrainedModel

from hf_sparse_moe.adapters import load_expert_lora

from .adapter_files import ADAPTER_WEIGHTS, Adapter, base_difference, check_weights, identify_base, read_adapter
from .errors import check_repo_id, raise_hub_error


if TYPE_CHECKING:
    from peft import PeftModel


def load_adapter(
    model: PreTrainedModel,
    adapter: str | Path,
    *,
    revision: str | None = None,
    check_base: bool = True,
    token: bool | str | None = None,
    **kwargs: Any,
) -> PeftModel:
    """
    `PeftModel.from_pretrained` with this package's layers on experts, for an adapter saved here or by plain PEFT.

    It is refused where `model` is not the base that it was trained on, or where not all of it finds its place. The
    base is compared where the adapter carries `adapter_base.json`, which a push and [`ModelCardCallback`] write, by
    the hashes of the weight files that `model` was loaded from. A base that was changed in memory, or saved in files
    of other names, is told only where the adapter's tensors do not fit it.

    Args:
        model (`PreTrainedModel`): The mixture.
        adapter (`str` or `Path`): A folder, or an id on the Hub.
        revision (`str`, *optional*): Branch, tag or commit of a Hub id, for all of the adapter's files.
        check_base (`bool`, defaults to `True`):
            Refuse another base. Pass False for the same weights in another form, such as another dtype on disk.
        token (`bool` or `str`, *optional*): Defaults to that of `hf auth login`.
        **kwargs: As `PeftModel.from_pretrained` takes them: `adapter_name`, `is_trainable`, `low_cpu_mem_usage`, ...

    Raises:
        ValueError: another base, an adapter that reaches no parameter of it or not all that it should, or no adapter.
        PermissionError, HubUnavailableError: it cannot be fetched, see [`pull`].

    Example:
        ```python
        model = load_adapter(model, "me/qwen3-4x-law")
        ```
    """
    found, name = fetch_adapter(adapter, revision, token), str(adapter)
    if check_base:
        refuse_other_base(found.base, identify_base(model)["sha256"], name, f"this `{type(model).__name__}`")
    return attach(model, found, **kwargs)


def fetch_adapter(adapter: str | Path, revision: str | None = None, token: bool | str | None = None) -> Adapter:
    """The adapter in a folder or on the Hub."""
    folder, name = Path(adapter), str(adapter)
    if not folder.is_dir():
        check_repo_id(name)
        with raise_hub_error(name, revision):
            wanted = ["*.json", ADAPTER_WEIGHTS]
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted, token=token))
    return read_adapter(folder, name)


def refuse_other_base(recorded: Mapping[str, Any], sha256: Mapping[str, str], adapter: str, base: str) -> None:
    """Raise a `ValueError` where an adapter records another base than one whose weight files have these hashes."""
    if difference := base_difference(recorded, sha256):
        revision = f", revision {recorded['revision']}" if recorded.get("revision") else ""
        raise ValueError(
            f"`{adapter}` was trained on another base than {base}: {difference}. Load "
            f"`{recorded.get('name_or_path') or 'its own base'}`{revision}, or train the adapter again. If only the "
            "form of the weights differs, `load_adapter(..., check_base=False)` loads it."
        )


def attach(model: PreTrainedModel, adapter: Adapter, *, plain: bool = False, **kwargs: Any) -> PeftModel:
    """
    Put an adapter on a model, which is changed in place. With `plain`, PEFT's own layers are used instead
    of this package's. Raises a `ValueError` where it does not fit, or lacks a tensor.
    """
    if find_spec("peft") is None:
        raise ValueError('An adapter needs PEFT. Run: pip install "hf-sparse-moe[peft]"')
    from peft import LoraConfig, PeftModel

    check_weights(adapter)
    is_lora = adapter.config.get("peft_type") == "LORA"
    if is_lora and plain and adapter.config.get("use_dora"):
        raise ValueError("PEFT's own layers on experts have no DoRA.")
    if is_lora and plain:
        kwargs["config"] = LoraConfig.from_pretrained(str(adapter.folder))
        kwargs["config"].lora_dropout = 0.0  # which PEFT refuses on experts, and which acts in training only
    load = load_expert_lora if is_lora and not plain else PeftModel.from_pretrained
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`")  # PEFT 0.21 still asks for it
            return load(model, str(adapter.folder), **kwargs)
    except (ValueError, RuntimeError, TypeError, KeyError, AttributeError, UserWarning) as error:
        reason = " ".join(str(error).split())[:500].rstrip(".")
        raise ValueError(
            f"`{adapter.folder.name}` does not load onto `{type(model).__name__}` ({reason}). Load its own base."
        ) from error


def count_moved(model: PeftModel) -> tuple[int, int]:
    """Of the base's tensors, how many an adapter adapts or replaces, and how many of these it changes."""
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    moved = []
    layer: Any  # PEFT's types say less than the classes do
    for layer in model.modules():
        kind = type(layer)
        if issubclass(kind, LoraLayer):
            moved += [bool(b.any()) for b in (*layer.lora_B.parameters(), *layer.lora_embedding_B.parameters())]
        elif issubclass(kind, ModulesToSaveWrapper):
            original = layer.original_module.state_dict()
            for copy in layer.modules_to_save.values():
                moved += [not torch.equal(tensor, original[name]) for name, tensor in copy.state_dict().items()]
    return len(moved), sum(moved)
