"""Text becomes training examples: one objective a family."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer, DataCollatorForLanguageModeling, PreTrainedTokenizerBase

from hf_sparse_moe.models.configuration_sparse_moe import (
    SparseMoeConfig,
    SparseMoeDecoderConfig,
    SparseMoeEncoderConfig,
)


Example = dict[str, torch.Tensor]


def load_tokenizer(source: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint; a `ValueError` where its files are damaged."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
        tokenizer("text")
        return tokenizer
    except OSError:
        raise
    except Exception as error:  # tokenizers raises nothing narrower
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"The tokenizer of `{source}` cannot be read ({reason}). Fetch it again.") from error


def make_examples(
    documents: list[str],
    tokenizer: PreTrainedTokenizerBase,
    config_class: type[SparseMoeConfig],
    length: int,
    limit: int,
) -> list[Example]:
    """
    Blocks of `length` tokens without pads: next-token prediction for a decoder, 15 % masked tokens for an encoder,
    the second half of a block from its first for an encoder-decoder. Documents follow each other, each closed by the
    end token.

    Args:
        documents (`list[str]`): The text.
        tokenizer (`PreTrainedTokenizerBase`): The model's own.
        config_class (`type[SparseMoeConfig]`): The family.
        length (`int`): Tokens of a block.
        limit (`int`): At most this many blocks.

    Raises:
        ValueError: too little text, or a tokenizer without the mask token that an encoder needs.
    """
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    ends = [] if end is None else [end]
    is_encoder, is_decoder = config_class is SparseMoeEncoderConfig, config_class is SparseMoeDecoderConfig
    step = length if is_decoder else length - (2 if is_encoder else 2 * len(ends))
    tokens: list[int] = []
    for document in documents:
        if len(tokens) >= limit * step:
            break
        tokens += tokenizer(document, add_special_tokens=False)["input_ids"] + ends
    blocks = [tokens[start : start + step] for start in range(0, len(tokens) - step + 1, step)][:limit]
    if not blocks:
        raise ValueError(
            f"The text has {len(tokens)} tokens, fewer than a block of `sequence_length={length}`. Add text, or ask "
            "for shorter blocks."
        )
    if is_encoder:
        return _masked(blocks, tokenizer)
    if is_decoder:
        return [{"input_ids": torch.tensor(block), "labels": torch.tensor(block)} for block in blocks]
    half = step // 2
    return [
        {"input_ids": torch.tensor(block[:half] + ends), "labels": torch.tensor(block[half:] + ends)}
        for block in blocks
    ]


def _masked(blocks: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Masked once, so that every model that is compared sees the same masks."""
    if tokenizer.mask_token_id is None:
        raise ValueError("The tokenizer has no mask token, which an encoder is trained with. Pass another `model`.")
    first, last = tokenizer.cls_token_id, tokenizer.sep_token_id or tokenizer.eos_token_id
    rows = [[token for token in (first, *block, last) if token is not None] for block in blocks]
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=True, mlm_probability=0.15, seed=0)
    batch = collator([{"input_ids": row} for row in rows])
    return [
        {"input_ids": input_ids, "labels": labels}
        for input_ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
    ]


def interleave(examples: dict[str, list[Example]], count: int, seed: int) -> list[Example]:
    """`count` examples in a fixed random order, as many of each domain; a domain that is used up starts over."""
    generator = torch.Generator().manual_seed(seed)
    each = -(-count // len(examples))
    chosen: list[Example] = []
    for _, pool in sorted(examples.items()):
        rounds = [torch.randperm(len(pool), generator=generator) for _ in range(-(-each // len(pool)))]
        chosen += [pool[place] for place in torch.cat(rounds)[:each].tolist()]
    order = torch.randperm(len(chosen), generator=generator)[:count]
    return [chosen[place] for place in order.tolist()]
