"""Publishing an adapter: held against its base first, so that what arrives can be held against it again."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import CommitInfo
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .adapter_folder import ADAPTER_CONFIG, Adapter, read_adapter
from .adapter_loading import attach, check_base, find_base
from .base_identity import identify_base, is_mixture, read_base, record_base, write_base
from .checkpoint import read_json
from .fingerprint import FINGERPRINT_NAME, take_fingerprint, write_fingerprint
from .loading import load_checkpoint


if TYPE_CHECKING:
    from peft import PeftModel


def push_adapter(
    model: PeftModel,
    repo_id: str,
    *,
    adapter_name: str = "default",
    base: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    license: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    tag: str | None = None,
    token: bool | str | None = None,
) -> CommitInfo:
    """
    Publish an adapter in one commit, with its card, the record of its base and a fingerprint of what both compute.

    `PeftModel.push_to_hub` is PEFT's: it ends with a stock card, and says nothing that tells one base from another.

    Args:
        model (`PeftModel`): With the adapter, not merged.
        repo_id (`str`): `"user/name"`. Created if it does not exist.
        adapter_name (`str`, defaults to `"default"`): Which of the model's adapters.
        base (`str`, *optional*):
            Folder or Hub id of the base; it is loaded once more, for the fingerprint. Defaults to where `model` was
            loaded from.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Published in the same commit.
        license (`str`, *optional*): The adapter's licence, such as `"apache-2.0"`.
        private, revision, create_pr, commit_message, tag, token: See [`push_folder`].

    Returns:
        [`~huggingface_hub.CommitInfo`]

    Raises:
        ValueError: the base that is named is not the one in `model`, or cannot be found.
        PermissionError, HubUnavailableError: see [`push_folder`].
    """
    from .model_card import write_model_card
    from .publish import push_folder

    if adapter_name not in model.peft_config:
        raise ValueError(f"`adapter_name={adapter_name!r}` must be one of {', '.join(model.peft_config)}.")
    with tempfile.TemporaryDirectory() as temporary:
        model.save_pretrained(temporary, selected_adapters=[adapter_name])
        folder = Path(temporary, "" if adapter_name == "default" else adapter_name)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's, and nobody has written in it
        record_base(model, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if license is not None:
            write_model_card(folder, repo_id, license=license)
        return push_folder(
            folder,
            repo_id,
            base=base,
            private=private,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            tag=tag,
            token=token,
        ).commit


def adapter_in_memory(model: PeftModel, record: Mapping[str, Any] | None = None) -> Adapter:
    """The default adapter of a `PeftModel` as [`Adapter`], for its card."""
    with tempfile.TemporaryDirectory() as temporary:
        model.save_pretrained(temporary, selected_adapters=["default"])
        record_base(model, temporary)
        return replace(read_adapter(temporary), record=record or {})


def stage_adapter(files: Mapping[str, Path], staged: Path, base: str | None, token: bool | str | None) -> None:
    """
    Copy an adapter's files into `staged` as they are published: the base by its public name and revision, what tells
    it from others, and the fingerprint of both together.

    Args:
        files (`Mapping[str, Path]`): What of the adapter's folder is published.
        staged (`Path`): An empty folder.
        base (`str`, *optional*): Folder or Hub id; defaults to what the adapter names.
        token (`bool` or `str`, *optional*): Of the Hub.

    Raises:
        ValueError: no base, another one than the adapter was trained on, or an adapter that does not fit it.
    """
    for name, path in files.items():
        (staged / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, staged / name)
    folder = files[ADAPTER_CONFIG].parent
    config, recorded = dict(read_json(staged / ADAPTER_CONFIG)), read_base(staged)
    name, revision = named_base(folder, base)
    source = find_base(name, revision, token)
    model = load_base(source.folder)
    check_base(model, staged, folder.name)
    if is_mixture(model):
        found = identify_base(model, source)
        write_base(found | {key: recorded[key] for key in ("dtype", "layers", "weights") if key in recorded}, staged)
    config |= {"base_model_name_or_path": source.name, "revision": source.revision}
    (staged / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    loaded, attachment = attach(model, staged)
    if told := attachment.fault():
        raise ValueError(f"`{folder}` does not fit its base `{source.name}`: {told}. Save the adapter again.")
    write_fingerprint(take_fingerprint(loaded, staged), staged / FINGERPRINT_NAME, folder)


def named_base(folder: Path, base: str | None, *, from_hub: bool = False) -> tuple[str, str | None]:
    """
    Folder or Hub id, and the revision, of the base of the adapter in `folder`.

    Args:
        folder (`Path`): Of the adapter.
        base (`str`, *optional*): What a person says; wins.
        from_hub (`bool`, defaults to `False`): Whether somebody else may have written the adapter's files.

    Raises:
        ValueError: it names none, or a folder although it came from the Hub.
    """
    config, recorded = read_json(folder / ADAPTER_CONFIG), read_base(folder)
    named = recorded.get("name_or_path") if recorded.get("revision") else config.get("base_model_name_or_path")
    revision = recorded.get("revision") or config.get("revision")
    revision = revision if isinstance(revision, str) else None
    if base is not None:
        return base, revision if base == named else None
    if not isinstance(named, str) or not named:
        raise ValueError(f"`{folder.name}` does not name its base. Give it: `base=` (`--base`), a folder or a Hub id.")
    if from_hub and Path(named).exists():
        raise ValueError(
            f"The adapter names `{named}` as its base, a folder here and no Hub id. Give the base: `base=` (`--base`)."
        )
    return named, revision


def load_base(folder: Path) -> PreTrainedModel:
    """
    The base in float32, whole.

    Raises:
        ValueError: it lacks weights, or runs by code of its own alone.
    """
    model, info = load_checkpoint(folder, torch.float32)
    if missing := sorted({*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])}):
        raise ValueError(f"The base lacks weights that its config asks for, such as `{missing[0]}`. Fetch it again.")
    return model
