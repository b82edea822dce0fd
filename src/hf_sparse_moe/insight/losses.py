"""The loss of a language model in nats, by group of the text. B sequences of S tokens, V vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_sparse_moe.checkpoints.loading import load_whole
from hf_sparse_moe.models.masks import IGNORED_LABEL
from hf_sparse_moe.routing.statistics import ALL


Evaluation = tuple[Sequence[Any], Sequence[str] | None]  # batches, and the group of each of their sequences
Pass = tuple[dict[str, Any], torch.Tensor]  # inputs, and the number of each sequence's group


def sum_losses(logits_BSV: torch.Tensor, targets_BS: torch.Tensor, slots_BS: torch.Tensor, size: int) -> torch.Tensor:
    """`(2, size)`: of the targets of each slot the losses and the number; -100 is no target, and -1 no slot."""
    targets = targets_BS.to(logits_BSV.device).flatten()
    losses = nn.functional.cross_entropy(logits_BSV.flatten(0, 1).float(), targets, reduction="none").double().cpu()
    slots = slots_BS.expand_as(targets_BS).flatten().cpu()
    counted = (targets != IGNORED_LABEL).cpu() & (slots >= 0)
    values = torch.stack([losses[counted], torch.ones_like(losses[counted])])
    return torch.zeros(2, size, dtype=torch.float64).index_add_(1, slots[counted], values)


@torch.no_grad()
def losses_by_group(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Any]], groups: Iterable[str] | None = None
) -> dict[str, dict[str, float]] | None:
    """For each group, and `"all"`, the mean and the number of labels; None without a language model's head."""
    names, passes = grouped_batches(model, batches, groups)
    losses = GroupLosses(names)
    training = model.training
    model.eval()
    try:
        for inputs, group_B in passes:
            losses.add(model, inputs, group_B)
    finally:
        model.train(training)
    return losses.by_group()


def loss_change(
    before: PreTrainedModel | Path, after: PreTrainedModel | Path, evaluation: Evaluation | None
) -> dict[str, dict[str, float]] | None:
    """The loss before and after by group, where there is something to measure it on. Folders are loaded."""
    if evaluation is None:
        return None
    models = (load_whole(model) if isinstance(model, Path) else model for model in (before, after))
    first, second = (losses_by_group(model, *evaluation) for model in models)
    if first is None or second is None:
        return None
    return {
        group: {"before": loss["loss"], "after": second[group]["loss"], "labels": loss["labels"]}
        for group, loss in first.items()
    }


def grouped_batches(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Any]], groups: Iterable[str] | None
) -> tuple[list[str], Iterator[Pass]]:
    """The names of the groups, and the batches."""
    labels = None if groups is None else [str(group) for group in groups]
    names = list(dict.fromkeys([ALL] if labels is None else labels))
    if ALL in names and len(names) > 1:
        raise ValueError(f"`groups` has a group `{ALL}`, which is the name of all groups together. Call it otherwise.")
    vocab_size: Any = model.get_input_embeddings().num_embeddings

    def run() -> Iterator[Pass]:
        seen = 0
        for batch in batches:
            tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
            inputs = dict(batch) | {name: value.to(model.device) for name, value in tensors.items()}
            if model.main_input_name not in inputs:
                raise ValueError(f"A batch has {sorted(inputs)}, but no `{model.main_input_name}`. Give it.")
            sequences = len(inputs[model.main_input_name])
            ids = inputs.get("input_ids")
            if ids is not None and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
                raise ValueError(
                    f"The text has the token id {int(ids.max())}, but the model has {vocab_size} tokens: it is of "
                    "another tokenizer. Take the model's own."
                )
            rows = [ALL] * sequences if labels is None else labels[seen : seen + sequences]
            seen += sequences
            if labels is not None and seen > len(labels):
                raise ValueError(
                    f"`groups` has {len(labels)} entries, fewer than `batches` has sequences. Give one a sequence."
                )
            if model.config.is_encoder_decoder and not {"labels", "decoder_input_ids"} & inputs.keys():
                inputs["labels"] = _labels(inputs)  # it writes what it reads
            yield inputs, torch.tensor([names.index(row) for row in rows], device=model.device)
        if not seen:
            raise ValueError("`batches` is empty: there is nothing to measure on.")
        if labels is not None and seen != len(labels):
            raise ValueError(
                f"`groups` has {len(labels)} entries, but `batches` has {seen} sequences. Give one a sequence."
            )

    return names, run()


class GroupLosses:
    """The loss of a language model, summed up by group."""

    def __init__(self, names: list[str]):
        self.names = names
        self.sums = torch.zeros(2, len(names), dtype=torch.float64)  # losses, labels
        self.is_known = True

    def add(self, model: PreTrainedModel, inputs: dict[str, Any], group_B: torch.Tensor) -> None:
        """Run the model."""
        logits = getattr(model(**inputs), "logits", None)
        if logits is None or logits.dim() != 3 or model.get_output_embeddings() is None:
            self.is_known = False
            return
        targets = _labels(inputs)
        if not ("labels" in inputs and model.config.is_encoder_decoder) and _shifts(model):
            targets = nn.functional.pad(targets[:, 1:], (0, 1), value=IGNORED_LABEL)
        self.sums += sum_losses(logits, targets, group_B[:, None], len(self.names))

    def by_group(self) -> dict[str, dict[str, float]] | None:
        if not self.is_known:
            return None
        if not self.sums.isfinite().all():
            raise ValueError(
                "The loss on this text is NaN or infinite: the model is broken, or float16 too narrow for it. See "
                "`hf-sparse-moe doctor`."
            )
        sums = {**dict(zip(self.names, self.sums.T.tolist(), strict=True)), ALL: self.sums.sum(dim=1).tolist()}
        return {name: {"loss": loss / max(count, 1), "labels": int(count)} for name, (loss, count) in sums.items()}


def _shifts(model: PreTrainedModel) -> bool:
    """Whether logits belong to the next token: of decoders, and of a decoder that is given what it reads."""
    return model.config.is_encoder_decoder or model.can_generate()


def _labels(inputs: dict[str, Any]) -> torch.Tensor:
    """Those given, or else the tokens themselves but for pads."""
    if "labels" in inputs:
        return inputs["labels"]
    side = "decoder_" if "decoder_input_ids" in inputs else ""
    ids, mask = inputs[f"{side}input_ids"], inputs.get(f"{side}attention_mask")
    return ids if mask is None else ids.masked_fill(mask == 0, IGNORED_LABEL)
