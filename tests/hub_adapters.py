"""Adapters of tiny mixtures in folders, for the tests that send, fetch and load them."""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from adapted_models import adapted
from hf_sparse_moe.hub.adapter_files import record_base
from tiny_models import tiny_sparse


def save_base(folder: Path, name: str = "llama") -> Path:
    """A tiny mixture."""
    tiny_sparse(name).save_pretrained(folder)
    return folder


def load(folder: Path, **arguments) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **arguments).eval()


def save_adapter(folder: Path, base: Path, **arguments) -> PeftModel:
    """An adapter that matters, as PEFT saves it, with the record of its base; returns the model that has it."""
    model = adapted(load(base), **arguments)
    model.save_pretrained(folder)
    record_base(model, folder)
    return model
