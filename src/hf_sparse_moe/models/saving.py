"""Saving and loading: a checkpoint of one head loads into every other, and carries the family's code and a receipt."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

from huggingface_hub import HfApi
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_utils import load_state_dict
from transformers.utils import cached_file, logging
from transformers.utils.hub import create_and_tag_model_card

from .quantization import tell_of_float_experts


logger = logging.get_logger(__name__)

RECEIPT_NAME = "receipt.json"


class SavedMixture(PreTrainedModel):
    """The part of [`SparseMoePreTrainedModel`] that reads and writes checkpoints."""

    # Set by the package: publishes with a model card. Where only this folder travelled, the stock push is used.
    publisher: ClassVar[Callable[..., Any] | None] = None
    config_class: ClassVar[Any]
    receipt: dict[str, Any] | None = None
    dense: Any

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args, push_to_hub: bool = False, repo_id: str | None = None, **kwargs
    ) -> None:
        """
        [`PreTrainedModel.save_pretrained`], and the receipt. The config's `auto_map` names every class of the family,
        and the code they need is copied beside the weights. `push_to_hub=True` then publishes as `repo_id`, or as the
        folder's name.
        """
        is_main = kwargs.get("is_main_process", True)
        self.config.auto_map = self.family_auto_map()
        # Keys are saved as they stand in the module, so that a strict load (a Trainer's resume) finds them.
        kwargs.setdefault("save_original_format", False)
        if is_main and self.receipt is not None:
            os.makedirs(save_directory, exist_ok=True)
            with open(os.path.join(save_directory, RECEIPT_NAME), "w", encoding="utf-8") as file:
                json.dump(self.receipt, file, indent=2)
                file.write("\n")
        hub_arguments = ("commit_message", "commit_description", "create_pr", "private", "revision", "tags")
        hub = {name: kwargs.pop(name) for name in hub_arguments if push_to_hub and name in kwargs}
        before = self._get_files_timestamps(save_directory) if os.path.isdir(save_directory) else {}
        floating = (tensor.dtype for tensor in (kwargs.get("state_dict") or {}).values() if tensor.is_floating_point())
        dtype = next(floating, self.dtype)  # before the dictionary is emptied
        with _called_as_written(type(self)):
            super().save_pretrained(save_directory, *args, **kwargs)
        if is_main and dtype != self.dtype:
            config = copy.deepcopy(self.config)  # it says in which dtype the weights are loaded
            config.dtype = config.dense_config.dtype = dtype
            config.save_pretrained(save_directory)
        if not push_to_hub or not is_main:
            return
        repo_id = repo_id or os.path.basename(os.path.abspath(save_directory))
        if kwargs.get("variant") is None:
            hub |= {name: kwargs[name] for name in ("token", "max_shard_size") if name in kwargs}
            self.push_to_hub(repo_id, **hub)
        else:  # as transformers does it: beside the weights and the card that are published already
            token, private, tags = kwargs.get("token"), hub.pop("private", None), hub.pop("tags", self.model_tags)
            repo_id = HfApi(token=token).create_repo(repo_id, private=private, exist_ok=True).repo_id
            create_and_tag_model_card(repo_id, tags, token=token).save(os.path.join(save_directory, "README.md"))
            self._upload_modified_files(save_directory, repo_id, before, token=token, **hub)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """[`PreTrainedModel.from_pretrained`]; `model.receipt` is the checkpoint's, where it has one."""
        hub_arguments = ("revision", "token", "cache_dir", "subfolder", "local_files_only")
        hub: dict[str, Any] = {name: kwargs[name] for name in hub_arguments if name in kwargs}
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        if pretrained_model_name_or_path is not None:
            missing: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False}
            missing["_raise_exceptions_for_connection_errors"] = False
            path = cached_file(pretrained_model_name_or_path, RECEIPT_NAME, **missing, **hub)
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            model.receipt = None if path is None else _read_receipt(path)
        return loaded

    def push_to_hub(self, repo_id: str, **kwargs):
        """
        Publish the checkpoint with its code and a model card made from the checkpoint itself.

        Args:
            repo_id (`str`): `"user/name"`.
            **kwargs: As [`PreTrainedModel.push_to_hub`] takes them.
        """
        if type(self).publisher is None:
            return super().push_to_hub(repo_id, **kwargs)  # type: ignore[arg-type]
        return type(self).publisher(self, repo_id, **kwargs)

    @classmethod
    def family_auto_map(cls) -> dict[str, str]:
        """The `auto_map` of a checkpoint: the config and every class of the family, by their Auto class."""
        members = {"AutoConfig": cls.config_class, **{str(one._auto_class): one for one in cls.family_classes()}}
        return {auto: f"{one.__module__.rpartition('.')[2]}.{one.__name__}" for auto, one in members.items()}

    @classmethod
    def family_classes(cls) -> list[type[Any]]:
        """The classes of this package that load this class's checkpoints; heads of a user's own are none of them."""
        base: Any = next(parent for parent in cls.__mro__ if "family_side" in vars(parent))
        return [member for member in base.__subclasses__() if member.__module__ == base.__module__]

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs):
        """Let a checkpoint of one head load into another: the body's prefix and the head's shape differ."""
        files = [] if state_dict is not None else checkpoint_files or []
        stored = [load_state_dict(file, "meta", load_config.weights_only) for file in files]
        keys = {*(state_dict or ()), *(key for tensors in stored for key in tensors)}
        if (renaming := model._body_renaming(keys)) is not None:
            load_config = replace(load_config, weight_mapping=[*(load_config.weight_mapping or []), renaming])
        info, disk_offload_index = PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args, **kwargs
        )
        if load_config.hf_quantizer is not None:
            tell_of_float_experts(model, load_config.hf_quantizer.quantization_config)
        name, body = type(model).__name__, model._body_prefix()
        if name not in (model.config.architectures or [name]):
            # Heads may share a name: the classifier of a sequence and that of a choice. The other one's is no error.
            foreign = {entry for entry in info.mismatched_keys if not entry[0].startswith(body)}
            info.mismatched_keys -= foreign
            info.missing_keys |= {entry[0] for entry in foreign}
        return info, disk_offload_index

    def _body_prefix(self) -> str:
        """What the keys of the headless model begin with here; it differs between heads, for some even in name."""
        prefix = self.dense.base_model_prefix
        nested = prefix != "" and isinstance(getattr(self.dense, prefix, None), nn.Module)
        return f"dense.{prefix}." if nested else "dense."

    def _body_renaming(self, checkpoint_keys: set[str]) -> WeightRenaming | None:
        here = self._body_prefix()
        body = [key.removeprefix(here) for key in self.state_dict() if key.startswith(here)]
        landmark = next((key for key in body if key.endswith("experts.down_proj")), body[0])
        there = next((key.removesuffix(landmark) for key in checkpoint_keys if key.endswith(f".{landmark}")), here)
        if there == here:
            return None
        children = "|".join(sorted({re.escape(key.partition(".")[0]) for key in body}))
        return WeightRenaming(rf"^{re.escape(there)}(?=(?:{children})\.)", here)


def _read_receipt(path: str) -> dict[str, Any] | None:
    """The receipt of a checkpoint; None where it is a link to a file of neither its folder nor the Hub's cache."""
    home, real = os.path.realpath(os.path.dirname(path)), os.path.realpath(path)
    cache, is_snapshot, _ = home.partition(f"{os.sep}snapshots{os.sep}")
    homes = [os.path.join(home, ""), *([os.path.join(cache, "blobs", "")] if is_snapshot else [])]
    if not real.startswith(tuple(homes)):
        logger.warning(f"`{path}` is a link that leads out of its folder, and is not read.")
        return None
    try:
        with open(path, encoding="utf-8") as file:
            receipt = json.load(file)
    except (ValueError, RecursionError):
        receipt = None
    if not isinstance(receipt, dict):
        raise ValueError(f"`{path}` does not hold a JSON object. Repair it, or delete it.")
    return receipt


@contextmanager
def _called_as_written(cls: type) -> Iterator[None]:
    """
    For what FSDP2 wrapped: torch makes a class of its own of it, in a module of its own, whose name would stand in
    `auto_map`, and whose code would be copied beside the weights.
    """
    name, module = cls.__name__, cls.__module__
    ours = next(base for base in cls.__mro__ if not base.__module__.startswith("torch."))
    cls.__name__, cls.__module__ = ours.__name__, ours.__module__
    try:
        yield
    finally:
        cls.__name__, cls.__module__ = name, module
