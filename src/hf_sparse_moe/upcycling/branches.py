"""Several dense checkpoints as the experts of one mixture (Branch-Train-MiX, arXiv 2403.07816)."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_sparse_moe.checkpoints.files import read_json
from hf_sparse_moe.checkpoints.hashes import sha256_of
from hf_sparse_moe.checkpoints.source import Source


logger = logging.get_logger(__name__)

# Fields of a config that a forward pass in evaluation mode does not read.
_NOT_READ = re.compile(
    r"_name_or_path|architectures|auto_map|transformers_version|(torch_)?dtype|use_cache|return_dict|output_\w+|.*drop.*|"
    r"chunk_size_feed_forward|initializer_\w+|init_std|problem_type|task_specific_params|finetuning_task|pretraining_tp|tokenizer_class|_.*"
)
_MAY_DIFFER = re.compile(r"(eos|bos|decoder_start|forced_\w+)_token_id")
_VOCABULARY_FILES = ("vocab.json", "vocab.txt", "merges.txt", "*.model", "*.spm", "*.tiktoken")


def check_branches(models: Sequence[PreTrainedModel], sources: Sequence[Source | None], names: Sequence[Any]) -> None:
    """
    Raise a `ValueError` unless the models compute the same, but for their weights: one class, tensors of the same
    shapes, one config as far as a forward pass reads it, and, where they come from folders, one vocabulary.
    """
    first, first_words = _facts(models[0]), _vocabulary(sources[0])
    for model, source, name in zip(models[1:], sources[1:], names[1:], strict=True):
        if type(model) is not type(models[0]):
            raise ValueError(f"`{name}` is a {type(model).__name__}, `{names[0]}` a {type(models[0]).__name__}.")
        facts, words = _facts(model), _vocabulary(source)
        pairs = {key: (facts.get(key), first.get(key)) for key in first | facts}
        pairs |= {key: (words[key], first_words[key]) for key in words if key in first_words}
        for key, (here, there) in pairs.items():
            if here == there:
                continue
            told = f"`{key}`: {_difference(here, there, name, names[0])}"
            if not _MAY_DIFFER.fullmatch(key):
                raise ValueError(
                    f"{told}. Branches must be fine-tuned from one checkpoint, with one config and one vocabulary."
                )
            logger.warning(f"{told}; the mixture keeps the latter.")


def _facts(model: PreTrainedModel) -> dict[str, Any]:
    shapes = {key: f"the shape {list(tensor.shape)}" for key, tensor in model.state_dict().items()}
    return shapes | {name: value for name, value in model.config.to_dict().items() if not _NOT_READ.fullmatch(name)}


def _vocabulary(source: Source | None) -> dict[str, Any]:
    """What a token id means: of a fast tokenizer its words and merges, else the hashes of its files."""
    if source is None:
        return {}
    if tokenizer := read_json(source.folder / "tokenizer.json", optional=True):
        model = tokenizer.get("model") or {}
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges") or []]
        added = {each["content"]: each["id"] for each in tokenizer.get("added_tokens") or []}
        return {"vocabulary": model.get("vocab"), "merges": merges, "added tokens": added}
    paths = [path for pattern in _VOCABULARY_FILES for path in source.folder.glob(pattern)]
    return {path.name: f"a file with the sha256 {sha256_of(path)}" for path in paths}


def _difference(here: Any, there: Any, name: str, other: str) -> str:
    if isinstance(here, dict) and isinstance(there, dict):
        key = next(key for key in there | here if here.get(key) != there.get(key))
        return f"`{key}`: " + _difference(here.get(key), there.get(key), name, other)
    return f"{str(here)[:80]} in `{name}`, {str(there)[:80]} in `{other}`"


def make_trunk(branches: Sequence[PreTrainedModel], base: PreTrainedModel | None, trunk: str) -> PreTrainedModel:
    """The dense model that gives all but the experts: the `"average"` of the branches, or the `"base"`."""
    if trunk == "base":
        if base is None:
            raise ValueError('`trunk="base"` needs the base model as the first argument of `upcycle`.')
        return base
    average, states = copy.deepcopy(branches[0]), [branch.state_dict() for branch in branches]
    with torch.no_grad():
        for key, tensor in average.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.stack([state[key].float() for state in states]).mean(dim=0))
    return average


def router_rows(states: Sequence[torch.Tensor]) -> torch.Tensor:
    """
    Router rows (E, H) that point to each branch's own text, given the hidden states (tokens, H) of each one's: the
    mean less that of all, with unit length, divided by the deviation of the logits it gives, which then vary by about
    1.
    """
    means = torch.stack([state.mean(dim=0) for state in states])
    directions = torch.nn.functional.normalize(means - means.mean(dim=0), dim=-1)
    deviation = (torch.cat(list(states)) @ directions.T).std(dim=0, keepdim=True).T
    return directions / deviation.clamp(min=torch.finfo(torch.float32).eps)
