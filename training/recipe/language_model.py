"""What the language-model recipes share: text as blocks, and perplexity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import DatasetDict
from transformers import EvalPrediction, PreTrainedTokenizerBase

from . import metrics
from .data import DataArguments, column, require_columns


@dataclass
class TextArguments(DataArguments):
    text_column: str = field(default="text", metadata={"help": "The column with the text."})
    group_by: str | None = field(
        default=None, metadata={"help": "Perplexity for each value of this column too; `file` is the file's name."}
    )


def pack(
    data: DatasetDict, args: TextArguments, tokenizer: PreTrainedTokenizerBase, length: int, lines: bool
) -> tuple[DatasetDict, list[str] | None]:
    """
    The texts as blocks of `length` tokens without padding; of every thousand rows, and of each group among them, the
    rest is left out. And with `--group_by` the group of each validation block.

    Args:
        lines (`bool`): Whether a row is a line of a running text. Otherwise it is a document, and gets the tokenizer's
            special tokens and an end token, where there is one.
    """
    require_columns(data, text_column=args.text_column, group_by=args.group_by)
    end = tokenizer.eos_token_id

    def to_blocks(rows: dict[str, list]) -> dict[str, list]:
        texts = [text or "" for text in column(rows, args.text_column)]
        if lines:
            texts = [text + "\n" for text in texts]
        groups = column(rows, args.group_by) if args.group_by else [""] * len(texts)
        streams: dict[str, list[int]] = {str(group): [] for group in groups}
        all_ids = tokenizer(texts, add_special_tokens=not lines, verbose=False)["input_ids"]
        for ids, group in zip(all_ids, groups, strict=True):
            stream = streams[str(group)]
            stream += ids
            if not lines and end is not None and ids and ids[-1] != end:
                stream.append(end)
        starts = [
            (group, start) for group, stream in streams.items() for start in range(0, len(stream) - length + 1, length)
        ]
        blocks = {"input_ids": [streams[group][start : start + length] for group, start in starts]}
        return blocks | ({"group": [group for group, _ in starts]} if args.group_by else {})

    blocks = DatasetDict()
    for split, dataset in data.items():
        blocks[split] = dataset.map(
            to_blocks,
            batched=True,
            num_proc=args.num_workers,
            remove_columns=dataset.column_names,
            desc=f"Packing {split}",
        )
        if len(blocks[split]) == 0:
            raise ValueError(f"The {split} data fill no block of {length} tokens. Lower `--max_length`, or add text.")
    if not args.group_by:
        return blocks, None
    groups = list(blocks["validation"]["group"]) if "validation" in blocks else None
    return blocks.remove_columns("group"), groups


def token_losses(outputs: Any, labels: torch.Tensor, shift: bool) -> torch.Tensor:
    """
    For `perplexity`: per row the summed loss and the count of its labelled tokens. Shape (B, 2), instead of logits
    (B, S, V), which nobody could keep.
    """
    logits = outputs[0] if isinstance(outputs, tuple) else outputs
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    losses = torch.nn.functional.cross_entropy(
        logits.float().transpose(1, 2), labels, ignore_index=-100, reduction="none"
    )
    return torch.stack([losses.double().sum(dim=1), labels.ne(-100).sum(dim=1)], dim=1)


def perplexity(prediction: EvalPrediction, groups: Sequence[str] | None = None) -> dict[str, float]:
    """The metric of what [`token_losses`] left, of all rows and of each group of them."""
    losses, counts = prediction.predictions.T
    found = metrics.perplexity(losses, counts.astype(int))
    for group in sorted(set(groups or ())):
        rows = [place for place, each in enumerate(groups or ()) if each == group]
        found[f"perplexity_{group}"] = metrics.perplexity(losses[rows], counts[rows].astype(int))["perplexity"]
    return found


def perplexity_names(groups: Sequence[str] | None) -> list[str]:
    """What [`perplexity`] calls its numbers."""
    return ["perplexity", *(f"perplexity_{group}" for group in sorted(set(groups or ())))]
