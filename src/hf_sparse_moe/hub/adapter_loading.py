"""Loading an adapter onto the base it was trained on, and onto no other."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from transformers import PreTrainedModel

from hf_sparse_moe.adapters import load_expert_lora
from hf_sparse_moe.checkpoints.source import Source

from .adapter_folder import ADAPTER_WEIGHTS, check_adapter
from .base_identity import base_difference, read_base
from .checkpoint import read_json
from .errors import check_repo_id, told_by_the_hub


if TYPE_CHECKING:
    from peft import PeftModel

_ADAPTER_FILES = ["*.json", ADAPTER_WEIGHTS]
_BASE_FILES = ["*.json", "*.safetensors"]


def load_adapter(
    model: PreTrainedModel,
    adapter: str | Path,
    *,
    revision: str | None = None,
    token: bool | str | None = None,
    **kwargs: Any,
) -> PeftModel:
    """
    [`load_expert_lora`] for an adapter of the Hub or a folder, refused where `model` is not the base that it was
    trained on, or where not all of it found its place.

    The base is compared where the adapter carries `adapter_base.json`, which a push and [`ModelCardCallback`] write:
    number, shapes and order of the experts, and a sample of their weights and of the routers', in any float dtype.

    Args:
        model (`PreTrainedModel`): The mixture.
        adapter (`str` or `Path`): A folder, or an id on the Hub.
        revision (`str`, *optional*): Branch, tag or commit of a Hub id, for all of the adapter's files.
        token (`bool` or `str`, *optional*): Defaults to that of `hf auth login`.
        **kwargs: As [`load_expert_lora`] takes them: `adapter_name`, `is_trainable`, `low_cpu_mem_usage`, ...

    Raises:
        ValueError: another base, an adapter that reaches no parameter of it or not all that it should, or no adapter.
        PermissionError, HubUnavailableError: it cannot be fetched, see [`pull`].

    Example:
        ```python
        model = load_adapter(model, "me/qwen3-4x-law")
        ```
    """
    folder, name = Path(adapter), str(adapter)
    if not folder.is_dir():
        folder = _fetched(name, revision, token, _ADAPTER_FILES).folder
    check_adapter(folder, name)
    check_base(model, folder, name)
    loaded, attachment = attach(model, folder, **kwargs)
    if told := attachment.fault():
        raise ValueError(f"`{name}` does not fit `{type(model).__name__}`: {told}. Load the base that it is for.")
    return loaded


def check_base(model: PreTrainedModel, folder: Path, name: str) -> None:
    """Raise a `ValueError` where the adapter in `folder` records another base than `model`."""
    recorded = read_base(folder)
    if not recorded:
        return
    if difference := base_difference(recorded, model):
        revision = f", revision {recorded['revision']}" if recorded.get("revision") else ""
        raise ValueError(
            f"`{name}` was trained on another base than this `{type(model).__name__}`: {difference}. Load "
            f"`{recorded.get('name_or_path') or 'its own base'}`{revision}, or train the adapter again."
        )


@dataclass(frozen=True)
class Attachment:
    """
    What became of an adapter's tensors.

    Args:
        attached (`list[str]`): Those that stand in the model as in the file.
        missing (`list[str]`): Those that the model needs and the file lacks: they were drawn at random.
        unused (`list[str]`): Those of the file that have no place in the model.
        different (`list[str]`): Those that hold other numbers in the model than in the file.
    """

    attached: list[str]
    missing: list[str]
    unused: list[str]
    different: list[str]

    def fault(self) -> str | None:
        """What is wrong, in words."""
        if not self.attached:
            return "none of its tensors matches a parameter"
        for names, told in (
            (self.missing, "it lacks tensors, which were drawn at random"),
            (self.unused, "some of its tensors have no place"),
            (self.different, "some of its tensors were changed while loading"),
        ):
            if names:
                return f"{told} ({len(names)}, such as `{names[0]}`)"
        return None


def attach(
    model: PreTrainedModel, folder: Path, *, plain: bool = False, **kwargs: Any
) -> tuple[PeftModel, Attachment]:
    """
    Put the adapter in a folder on a model, and compare what stands there with the file.

    Args:
        model (`PreTrainedModel`): The base, which is changed in place.
        folder (`Path`): Of the adapter.
        plain (`bool`, defaults to `False`): With PEFT's own layers instead of this package's.
        **kwargs: Of `PeftModel.from_pretrained`.

    Raises:
        ValueError: it does not fit the model, or PEFT is not installed.
    """
    if find_spec("peft") is None:
        raise ValueError('An adapter needs PEFT. Run: pip install "hf-sparse-moe[peft]"')
    from peft import PeftModel, get_peft_model_state_dict

    is_lora = read_json(folder / "adapter_config.json").get("peft_type") == "LORA"
    load = load_expert_lora if is_lora and not plain else PeftModel.from_pretrained
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # told below
            warnings.filterwarnings("ignore", "target_parameters=.* were set but no parameter was matched")
            loaded = load(model, str(folder), **kwargs)
    except (ValueError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise ValueError(
            f"`{folder.name}` does not load onto `{type(model).__name__}` ({reason}). Load the base that it is for."
        ) from error
    name = kwargs.get("adapter_name", "default")
    stored = load_file(folder / ADAPTER_WEIGHTS)
    standing = get_peft_model_state_dict(loaded, adapter_name=name, save_embedding_layers=False)
    everything: Mapping[str, torch.Tensor] = loaded.state_dict()  # an embedding that was resized is saved in full
    unused = sorted(key for key in stored if key not in standing and key not in everything)
    both = sorted(stored.keys() & standing.keys())
    different = [key for key in both if not torch.equal(standing[key].cpu(), stored[key].to(standing[key].dtype))]
    attached = [key for key in both if key not in set(different)]
    return loaded, Attachment(attached, sorted(standing.keys() - stored.keys()), unused, different)


def find_base(name: str, revision: str | None, token: bool | str | None = None) -> Source:
    """
    The base of an adapter: a folder, or what `huggingface_hub` fetches into its cache.

    Raises:
        ValueError, PermissionError, HubUnavailableError: there is none of that name, or it cannot be fetched.
    """
    folder = Path(name)
    if not folder.is_dir():
        return _fetched(name, revision, token, _BASE_FILES)
    if not (folder / "config.json").is_file():
        raise ValueError(f"`{folder}` has no config.json. Pass the folder of the adapter's base.")
    return Source(folder.resolve().name, folder, None)


def _fetched(name: str, revision: str | None, token: bool | str | None, patterns: list[str]) -> Source:
    check_repo_id(name)
    with told_by_the_hub(name, revision):
        snapshot = Path(snapshot_download(name, revision=revision, allow_patterns=patterns, token=token))
    return Source(name, snapshot, snapshot.name)
