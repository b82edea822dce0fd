"""What the language-model recipes share: text as blocks, and perplexity."""

from __future__ import annotations

from typing import Any

import torch
from datasets import DatasetDict
from transformers import EvalPrediction, PreTrainedTokenizerBase

from . import metrics
from .data import DataArguments, column, require_columns


def pack(
    data: DatasetDict,
    args: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    text_column: str,
    length: int,
    lines: bool,
) -> DatasetDict:
    """
    The texts as blocks of `length` tokens without padding; the rest of every thousand rows is left out.

    Args:
        lines (`bool`): Whether a row is a line of a running text. Otherwise it is a document, and gets the tokenizer's
            special tokens and an end token, where there is one.
    """
    require_columns(data, text_column=text_column)
    end = tokenizer.eos_token_id

    def to_blocks(rows: dict[str, list]) -> dict[str, list]:
        texts = [text or "" for text in column(rows, text_column)]
        if lines:
            texts = [text + "\n" for text in texts]
        stream: list[int] = []
        for ids in tokenizer(texts, add_special_tokens=not lines, verbose=False)["input_ids"]:
            stream += ids
            if not lines and end is not None and ids and ids[-1] != end:
                stream.append(end)
        return {"input_ids": [stream[start : start + length] for start in range(0, len(stream) - length + 1, length)]}

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
    return blocks


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


def perplexity(prediction: EvalPrediction) -> dict[str, float]:
    """The metric of what [`token_losses`] left."""
    losses, counts = prediction.predictions.T
    return metrics.perplexity(losses, counts.astype(int))
