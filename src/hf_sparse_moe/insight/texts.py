"""Texts as a model reads them: tokens with their characters and groups, in batches. B texts of S tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_sparse_moe.checkpoints.config import usable_positions
from hf_sparse_moe.models.configuration_sparse_moe import SparseMoeConfig
from hf_sparse_moe.models.masks import IGNORED_LABEL
from hf_sparse_moe.routing.statistics import ALL


Array = np.ndarray
Groups = Sequence[str] | Sequence[Sequence[str]] | None


class Row(NamedTuple):
    """The tokens of one text; -1 stands for none."""

    ids: Array
    span: Array  # (S, 2): the characters of each
    group: Array


@dataclass
class Batch:
    """Some texts as the model takes them; `targets` and their groups are (B, S), -100 and -1 for none."""

    inputs: dict[str, torch.Tensor]
    targets: torch.Tensor
    target_groups: torch.Tensor
    texts: Array


@dataclass
class Reading:
    """Texts as tokens, and what had to be left out."""

    texts: list[str]
    groups: tuple[str, ...]
    sides: dict[str, list[Row]]
    batches: list[Batch]
    left_out: list[str]


def read_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str] | Sequence[Sequence[str]],
    groups: Groups,
    targets: Sequence[str] | None,
    max_length: int,
    batch_size: int,
) -> Reading:
    """Tokenize, cut and batch the texts. Raises a `ValueError` where nothing is left, or arguments do not fit."""
    if tokenizer is None:
        raise ValueError(
            "`tokenizer=None`: the page shows tokens. Pass `AutoTokenizer.from_pretrained(...)` of the model."
        )
    for name, given in (("groups", groups), ("targets", targets)):
        if given is not None and len(given) != len(texts):
            raise ValueError(f"`{name}` has {len(given)} entries, `texts` has {len(texts)}. Give one for each text.")
    labels = [ALL] * len(texts) if groups is None else list(groups)
    names = tuple(dict.fromkeys(str(name) for label in labels for name in _listed(label)))
    limit = longest(model.config, tokenizer, max_length)
    kept: list[str] = []
    source: list[Row] = []
    target: list[Row] = []
    cut = 0
    for text, label, wanted in zip(texts, labels, targets or texts, strict=True):
        row = _encode(tokenizer, text, label, names)
        if row is None:
            continue
        answer = _encode(tokenizer, wanted, label, names) if model.config.is_encoder_decoder else None
        kept.append(" ".join(_listed(text)))
        cut += len(row.ids) > limit
        source.append(_cut(row, limit))
        target.append(_cut(answer or row, limit))
    if not kept:
        raise ValueError(f"`texts` has {len(texts)} entries, none of which has a token. Give some text.")
    left_out = [f"{len(texts) - len(kept)} of {len(texts)} texts are empty."] if len(kept) < len(texts) else []
    if cut:
        left_out.append(f"{cut} of {len(kept)} texts are longer than {limit} tokens and were cut there.")
    if model.config.is_encoder_decoder:
        sides = {"encoder": source, "decoder": [_shifted(row, model) for row in target]}
    else:
        sides = {"decoder" if _predicts_the_next(model) else "encoder": source}
    ids = (tokenizer.pad_token_id, model.config.pad_token_id, tokenizer.eos_token_id, 0)
    pad = next(i for i in ids if i is not None)
    every = np.arange(len(kept))
    batches = [_batch(every[start : start + batch_size], sides, target, pad) for start in every[::batch_size]]
    return Reading(kept, names, sides, batches, left_out)


def _listed(words: str | Sequence[str]) -> list[str]:
    return [words] if isinstance(words, str) else list(words)


def longest(config: Any, tokenizer: PreTrainedTokenizerBase, max_length: int) -> int:
    """How many tokens of a text a model takes, at most `max_length`."""
    dense: Any = config.dense_config if isinstance(config, SparseMoeConfig) else config
    known = [usable_positions(dense), getattr(dense, "n_positions", None)]
    bounds = [bound for bound in known if isinstance(bound, int) and bound > 0]
    return max(1, min([*bounds, int(tokenizer.model_max_length), max_length]))


def _predicts_the_next(model: PreTrainedModel) -> bool:
    """Whether a model of one side reads from left to right."""
    if model.can_generate():
        return True
    model_type = model.config.model_type
    return (
        "encoder" not in model_type if model_type.startswith("sparse_moe") else "MaskedLM" not in type(model).__name__
    )


def _encode(tokenizer: Any, text: str | Sequence[str], label: Any, names: tuple[str, ...]) -> Row | None:
    """The tokens of a text, or of its words with a group each; None without any."""
    is_words = not isinstance(text, str)
    words = _listed(text)
    if not " ".join(words).strip():
        return None
    if is_words and not tokenizer.is_fast:
        raise ValueError("`texts` of words need a fast tokenizer, which knows the word of each token. Give strings.")
    labels = [label] * len(words) if isinstance(label, str) else label
    if len(labels) != len(words) or not (is_words or isinstance(label, str)):
        raise ValueError("`groups` has a list for a text. Give that text as a list of as many words.")
    encoded = tokenizer(
        words if is_words else text,
        is_split_into_words=is_words,
        return_offsets_mapping=tokenizer.is_fast,
        truncation=False,
        verbose=False,
    )
    ids = np.array(encoded["input_ids"], dtype=np.int64)
    if len(ids) == 0:
        return None
    span = np.array(encoded["offset_mapping"] if tokenizer.is_fast else [(-1, -1)] * len(ids), dtype=np.int64)
    span[span[:, 0] == span[:, 1]] = -1  # special tokens have no characters
    if not is_words:
        return Row(ids, span, np.full(len(ids), names.index(label)))
    group = np.full(len(ids), -1)
    starts = np.cumsum([0, *(len(word) + 1 for word in words)])
    for place, word in enumerate(encoded.word_ids()):
        if word is not None:
            span[place] += starts[word]
            group[place] = names.index(labels[word])
    return Row(ids, span, group)


def _cut(row: Row, limit: int) -> Row:
    return Row(*(part[:limit] for part in row))


def _shifted(row: Row, model: PreTrainedModel) -> Row:
    """What the decoder reads: the start token, then the target but for its last token."""
    start = model.config.decoder_start_token_id
    start = model.config.pad_token_id if start is None else start
    return Row(np.r_[start, row.ids[:-1]], np.r_[[[-1, -1]], row.span[:-1]], np.r_[row.group[:1], row.group[:-1]])


def _batch(places: Array, sides: dict[str, list[Row]], target: list[Row], pad: int) -> Batch:
    def padded(rows: list[Array], value: int) -> torch.Tensor:
        return pad_sequence([torch.from_numpy(row) for row in rows], batch_first=True, padding_value=value)

    inputs = {}
    for side, rows in sides.items():
        prefix = "decoder_" if side == "decoder" and len(sides) == 2 else ""
        ids = [rows[place].ids for place in places]
        inputs[f"{prefix}input_ids"] = padded(ids, pad)
        inputs[f"{prefix}attention_mask"] = padded([np.ones_like(row) for row in ids], 0)
    answers, groups = [target[place].ids for place in places], [target[place].group for place in places]
    if list(sides) == ["decoder"]:
        answers = [np.r_[row[1:], IGNORED_LABEL] for row in answers]
        groups = [np.r_[row[1:], -1] for row in groups]
    return Batch(inputs, padded(answers, IGNORED_LABEL), padded(groups, -1), places)
