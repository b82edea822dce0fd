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
from hf_sparse_moe.checkpoints.files import read_json
from hf_sparse_moe.checkpoints.source import Source, find_source

from .adapter_base import base_difference, read_base
from .adapter_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_adapter
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
    [`load_expert_lora`] for an adapter of the Hub or a folder, refused where `model` is not the base that it was
    trained on, or where not all of it found its place.

    The base is compared where the adapter carries `adapter_base.json`, which a push and [`ModelCardCallback`] write:
    number and shapes of the experts of each layer, and the hashes of the weight files that `model` was loaded from. A
    base that was changed in memory, or saved in files of other names, is compared by its shapes alone.

    Args:
        model (`PreTrainedModel`): The mixture.
        adapter (`str` or `Path`): A folder, or an id on the Hub.
        revision (`str`, *optional*): Branch, tag or commit of a Hub id, for all of the adapter's files.
        check_base (`bool`, defaults to `True`):
            Refuse another base. Pass False for the same weights in another form, such as another dtype on disk.
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
        folder = _fetched(name, revision, token, ["*.json", ADAPTER_WEIGHTS]).folder
    check_adapter(folder, name)
    if check_base:
        recorded = read_base(folder)
        refuse_other_base(recorded, base_difference(recorded, model), name, f"this `{type(model).__name__}`")
    loaded, attachment = attach(model, folder, **kwargs)
    if fault := attachment.fault():
        raise ValueError(f"`{name}` does not fit `{type(model).__name__}`: {fault}. Load its own base.")
    return loaded


def refuse_other_base(recorded: Mapping[str, Any], difference: str | None, adapter: str, base: str) -> None:
    """Raise a `ValueError` where there is a difference between the base that an adapter records and another."""
    if difference is not None:
        revision = f", revision {recorded['revision']}" if recorded.get("revision") else ""
        raise ValueError(
            f"`{adapter}` was trained on another base than {base}: {difference}. Load "
            f"`{recorded.get('name_or_path') or 'its own base'}`{revision}, or train the adapter again. If only the "
            "form of the weights differs, `load_adapter(..., check_base=False)` loads it."
        )


@dataclass(frozen=True)
class Attachment:
    """What became of an adapter's tensors."""

    attached: list[str]  # stand in the model as in the file
    missing: list[str]  # needed by the model, and drawn at random, for the file lacks them
    unused: list[str]  # in the file, without a place in the model
    different: list[str]  # other numbers in the model than in the file

    def fault(self) -> str | None:
        """What is wrong, in words."""
        if not self.attached:
            return "none of its tensors matches a parameter"
        for names, what in (
            (self.missing, "it lacks tensors, which were drawn at random"),
            (self.unused, "some of its tensors have no place"),
            (self.different, "some of its tensors were changed while loading"),
        ):
            if names:
                return f"{what} ({len(names)}, such as `{names[0]}`)"
        return None


def attach(
    model: PreTrainedModel, folder: Path, *, plain: bool = False, **kwargs: Any
) -> tuple[PeftModel, Attachment]:
    """
    Put the adapter in a folder on a model, which is changed in place, and compare what stands there with the file.
    With `plain`, PEFT's own layers are used instead of this package's. Raises a `ValueError` where it does not fit.
    """
    if find_spec("peft") is None:
        raise ValueError('An adapter needs PEFT. Run: pip install "hf-sparse-moe[peft]"')
    from peft import PeftModel, get_peft_model_state_dict

    is_lora = read_json(folder / ADAPTER_CONFIG).get("peft_type") == "LORA"
    load = load_expert_lora if is_lora and not plain else PeftModel.from_pretrained
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # see `Attachment.missing`
            warnings.filterwarnings("ignore", "target_parameters=.* were set but no parameter was matched")
            loaded = load(model, str(folder), **kwargs)
    except (ValueError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:500].rstrip(".")
        raise ValueError(
            f"`{folder.name}` does not load onto `{type(model).__name__}` ({reason}). Load its own base."
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
    """The base of an adapter: a folder, or what `huggingface_hub` fetches into its cache."""
    is_here = Path(name).is_dir()
    return find_source(name) if is_here else _fetched(name, revision, token, ["*.json", "*.safetensors"])


def _fetched(name: str, revision: str | None, token: bool | str | None, patterns: list[str]) -> Source:
    check_repo_id(name)
    with raise_hub_error(name, revision):
        snapshot = Path(snapshot_download(name, revision=revision, allow_patterns=patterns, token=token))
    return Source(name, snapshot, snapshot.name)
