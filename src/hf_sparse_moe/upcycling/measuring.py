"""What models see and lose on real tokens: for methods that measure, and for receipts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_sparse_moe.models.moe_block import SEQUENCE_FIRST


MAX_TOKENS = 4096  # a layer; enough for means and clusters
Batch = dict[str, torch.Tensor]


def as_batches(name: str, given: Any, tokenizer: Callable[[], Any]) -> Iterator[Batch]:
    """
    The batches of the argument `name` as models take them: of texts, for which `tokenizer` is asked, of a tokenizer's
    output, or of token ids of shape (B, S). One batch may stand alone.
    """
    is_one = isinstance(given, str | Mapping) or (isinstance(given, torch.Tensor) and given.dim() == 2)
    if not is_one and not isinstance(given, Iterable):
        raise ValueError(f"`{name}={given!r}` is not allowed: it must be batches of texts or of token ids.")
    for batch in [given] if is_one else given:
        texts = [batch] if isinstance(batch, str) else batch
        if isinstance(texts, list | tuple) and texts and all(isinstance(text, str) for text in texts):
            batch = tokenizer()(list(texts), return_tensors="pt", padding=len(texts) > 1, truncation=True)
        given_inputs = batch if isinstance(batch, Mapping) else {"input_ids": batch}
        try:
            inputs = {key: torch.as_tensor(each) for key, each in given_inputs.items()}
            if inputs["input_ids"].dim() == 1:
                inputs = {key: each[None] for key, each in inputs.items()}
            fits = inputs["input_ids"].dim() > 1 and not inputs["input_ids"].is_floating_point()
        except (ValueError, TypeError, RuntimeError, KeyError):
            fits = False
        if not fits:
            raise ValueError(
                f"`{name}` has a batch, a {type(batch).__name__}, that is neither texts, nor a tokenizer's output, "
                "nor token ids of shape (batch, sequence)."
            )
        yield inputs


def labelled(model_name: str, batches: Iterable[Batch]) -> list[tuple[Batch, int]]:
    """
    Batches with how many labels each has, for the mixture's class of that name. A language model's labels are its
    token ids where there are none; raises a `ValueError` where another head has none.
    """
    found = []
    for batch in batches:
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        if "start_positions" in batch:
            found.append((batch, len(ids)))
            continue
        if "labels" not in batch:
            if not model_name.endswith(("ForCausalLM", "ForMaskedLM", "ForConditionalGeneration")):
                raise ValueError(
                    f"The text to measure the loss on has a batch without labels, which `{model_name}` cannot do "
                    "without. Give `labels`, or leave `evaluation` out."
                )
            batch = {**batch, "labels": ids if mask is None else ids.masked_fill(mask == 0, -100)}
        found.append((batch, int((batch["labels"] != -100).sum())))
    if not sum(count for _, count in found):
        raise ValueError("The text to measure the loss on has no batch with a label. Give at least one.")
    return found


@torch.no_grad()
def task_losses(models: dict[str, PreTrainedModel], batches: list[tuple[Batch, int]]) -> dict[str, float]:
    """The mean task loss of each model on batches of [`labelled`], and under `"labels"` how many labels these have."""
    total = sum(count for _, count in batches)
    losses: dict[str, float] = {}
    for name, model in models.items():
        training = model.training
        model.eval()
        weighted = [_run(model, batch).loss.item() * count for batch, count in batches if count]
        model.train(training)
        losses[name] = sum(weighted) / total
    return losses | {"labels": total}


@torch.no_grad()
def inputs_of(dense: PreTrainedModel, modules: list[nn.Module], batches: Iterable[Batch]) -> list[torch.Tensor]:
    """
    The inputs of some modules on real tokens, (tokens, features), in evaluation mode, float32, at most 4096. Pads are
    left out, where a module sees the tokens of the batch; a decoder without ids of its own reads the encoder's.
    """
    seen: dict[nn.Module, list[torch.Tensor]] = {module: [] for module in modules}
    counted: torch.Tensor | None = None  # (B, S)
    sequence_first = dense.config.model_type in SEQUENCE_FIRST

    def watch(module: nn.Module, args: tuple) -> None:
        rows_TH = args[0].reshape(-1, args[0].shape[-1])
        if counted is not None and len(rows_TH) == counted.numel():
            mask_BS = counted.T if sequence_first else counted
            rows_TH = rows_TH[mask_BS.reshape(-1).to(rows_TH.device)]
        seen[module].append(rows_TH.float().cpu())

    hooks = [module.register_forward_pre_hook(watch) for module in modules]
    training = dense.training
    try:
        dense.eval()
        for batch in batches:
            mask = batch.get("attention_mask")
            if mask is not None:
                mask = mask.ne(0) if mask.dim() == 2 and "decoder_input_ids" not in batch else None
            counted = mask
            decoder = {"decoder_input_ids": batch["input_ids"]} if dense.config.is_encoder_decoder else {}
            _run(dense, decoder | {name: tensor for name, tensor in batch.items() if name != "labels"})
            if all(sum(map(len, parts)) >= MAX_TOKENS for parts in seen.values()):
                break
    finally:
        dense.train(training)
        for hook in hooks:
            hook.remove()
    if not all(sum(map(len, parts)) for parts in seen.values()):
        raise ValueError("`data` or `prompts` have no token to measure on. Give at least one batch of token ids.")
    return [torch.cat(parts)[:MAX_TOKENS] for parts in seen.values()]


def _run(model: PreTrainedModel, inputs: Batch) -> Any:
    return model(**{name: tensor.to(model.device) for name, tensor in inputs.items()})
