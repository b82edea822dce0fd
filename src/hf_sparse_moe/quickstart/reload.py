"""What another person does: load a mixture and its adapter in a process of their own, and write on."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    set_seed,
)

import hf_sparse_moe  # noqa: F401 (registers the classes)


AUTO_CLASSES = {
    "sparse_moe_encoder": AutoModelForMaskedLM,
    "sparse_moe_decoder": AutoModelForCausalLM,
    "sparse_moe_encoder_decoder": AutoModelForSeq2SeqLM,
}


@torch.no_grad()
def write_on(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, tokens: int) -> str:
    """A sampled continuation of `prompt`; of an encoder its first choice for a mask behind the prompt."""
    set_seed(0)
    if model.config.model_type == "sparse_moe_encoder":
        inputs = tokenizer(f"{prompt} {tokenizer.mask_token}", return_tensors="pt")
        place = (inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero()[-1].item()
        return str(tokenizer.decode(model(**inputs).logits[0, place].argmax()))
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=model.config.is_encoder_decoder)
    start = 0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    written = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=tokens,
        do_sample=True,
        temperature=0.7,
    )
    return str(tokenizer.decode(written[0, start:], skip_special_tokens=True))


def main() -> None:
    """Print one JSON object: what the mixture wrote, and what it wrote with the adapter."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder or Hub id of a mixture")
    parser.add_argument("adapter", help="folder or Hub id of an adapter")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--tokens", type=int, default=48)
    arguments = parser.parse_args()
    from peft import PeftModel

    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # PEFT 0.21 still asks for it
    auto_class = AUTO_CLASSES[AutoConfig.from_pretrained(arguments.model, trust_remote_code=False).model_type]
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, trust_remote_code=False)
    model = auto_class.from_pretrained(arguments.model).eval()
    written = {
        "class": type(model).__name__,
        "mixture": write_on(model, tokenizer, arguments.prompt, arguments.tokens),
    }
    adapted = PeftModel.from_pretrained(model, arguments.adapter).eval()
    written["adapted"] = write_on(adapted, tokenizer, arguments.prompt, arguments.tokens)
    json.dump(written, sys.stdout)


if __name__ == "__main__":
    main()
