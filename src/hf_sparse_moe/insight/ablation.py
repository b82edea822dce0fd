"""What the loss loses without each expert."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import tqdm

from hf_sparse_moe.models.masks import IGNORED_LABEL
from hf_sparse_moe.routing.mixture_layers import find_mixture_layers
from hf_sparse_moe.routing.switches import disable_experts

from .losses import sum_losses
from .measurement import Ablation
from .texts import Array, Batch, Reading


MASKED_SHARE = 0.15  # of an encoder's tokens


@torch.no_grad()
def measure_ablation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, reading: Reading, layers: Sequence[str]
) -> Ablation:
    """Disable each expert by itself, and measure the loss: one pass over the texts for each, and one with all."""
    if model.get_output_embeddings() is None:
        raise ValueError(
            f"`ablate=True` needs a language model's loss, and `{type(model).__name__}` has no such head."
        )
    batches = reading.batches if "decoder" in reading.sides else _masked(reading.batches, tokenizer)
    shape = (len(reading.texts), len(reading.groups))
    base, tokens = _sums_by_text(model, batches, shape)
    every = {place: layer for place, layer in enumerate(find_mixture_layers(model)) if layer.name in layers}
    added = {place: np.full((layer.num_experts, *shape), np.nan) for place, layer in every.items()}
    turns = [
        (place, expert)
        for place, layer in every.items()
        for expert in range(layer.num_experts)
        if layer.num_experts > layer.top_k  # else nobody can take its place
    ]
    for place, expert in tqdm(turns, desc="disable experts"):
        with disable_experts(model, {place: [expert]}):
            added[place][expert] = _sums_by_text(model, batches, shape)[0] - base
    return Ablation(tokens, list(added.values()))


def _masked(batches: list[Batch], tokenizer: PreTrainedTokenizerBase) -> list[Batch]:
    """An encoder is asked for tokens that were masked, the same for every measurement."""
    if tokenizer.mask_token_id is None:
        raise ValueError("`ablate=True` measures an encoder's loss on masked tokens, and the tokenizer has no mask.")
    generator, special = torch.Generator().manual_seed(0), torch.tensor(tokenizer.all_special_ids)
    made = []
    for batch in batches:
        ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"].bool()
        hidden = (torch.rand(ids.shape, generator=generator) < MASKED_SHARE) & mask & ~torch.isin(ids, special)
        inputs = batch.inputs | {"input_ids": ids.masked_fill(hidden, tokenizer.mask_token_id)}
        targets = batch.targets.masked_fill(~hidden, IGNORED_LABEL)
        made.append(Batch(inputs, targets, batch.target_groups, batch.texts))
    return made


def _sums_by_text(model: PreTrainedModel, batches: list[Batch], shape: tuple[int, int]) -> Array:
    """(2, texts, G): the losses of all targets in nats, and their number."""
    texts, groups = shape
    sums = torch.zeros(2, texts * groups, dtype=torch.float64)
    for batch in batches:
        logits = model(**{name: value.to(model.device) for name, value in batch.inputs.items()}).logits
        slots = torch.from_numpy(batch.texts)[:, None] * groups + batch.target_groups
        slots = slots.masked_fill(batch.target_groups < 0, -1)
        sums += sum_losses(logits, batch.targets, slots, texts * groups)
    return sums.view(2, *shape).numpy()
