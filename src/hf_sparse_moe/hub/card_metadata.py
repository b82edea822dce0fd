"""The metadata at the head of a card, as the Hub understands it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from hf_sparse_moe.surgery.receipts import card_metadata

from .adapter_files import Adapter
from .card_facts import architecture_of, auto_class_of, base_id, is_repo_id, variant_of
from .checkpoint import Checkpoint, SurgeryResult, mapping
from .evaluation_results import hub_data


LISTS = ("language", "datasets", "tags")


def derived_metadata(published: Checkpoint | SurgeryResult | Adapter) -> dict[str, Any]:
    """What the files of a checkpoint or an adapter say by themselves."""
    if isinstance(published, SurgeryResult):
        return card_metadata(published.embeds)
    architecture, base = architecture_of(published), base_id(published)
    variant = variant_of(architecture)
    if isinstance(published, Adapter):
        library, relation = "peft", "adapter"
        tags = ["moe", "sparse-moe"] if published.config.get("target_parameters") or variant else []
        tags += ["lora"] if published.config.get("peft_type") == "LORA" else []
        tags += [variant] if variant else []
    else:
        # the Hub knows four relations; an upcycled model is nearest to a fine-tuned one
        library, relation = "sentence-transformers" if published.embeds else "transformers", "finetune"
        tags = ["moe", "sparse-moe", str(variant), *(["upcycled"] if published.receipt else [])]
        tags += ["sentence-transformers"] if published.embeds else []
    task = auto_class_of(architecture)[1]
    if isinstance(published, Checkpoint) and published.embeds:
        task = "sentence-similarity"
    trained_on = words(mapping(published.record.get("training")).get("data"))
    derived = {
        "library_name": library,
        "base_model": base,
        "base_model_relation": relation if base else None,
        "pipeline_tag": task,
        "datasets": [found[0] for name in trained_on if (found := hub_data(name))],
        "tags": tags,
    }
    return {name: value for name, value in derived.items() if value}


def merged_metadata(derived: Mapping[str, Any], *layers: Mapping[str, Any]) -> dict[str, Any]:
    """What the files say, and over it each of the layers; tags and data sets add up."""
    data = dict(derived)
    for layer in map(_public, layers):
        for name, value in layer.items():
            if name in ("tags", "datasets"):
                value = [*data.get(name, []), *value]
            if value is not None and value != []:
                data[name] = list(dict.fromkeys(value)) if name in LISTS else value
    if data.get("base_model"):
        data.setdefault("base_model_relation", "adapter" if derived["library_name"] == "peft" else "finetune")
    return data


def words(value: object) -> list[str]:
    """The strings in a list, or the one string."""
    if isinstance(value, str):
        return [value]
    return [word for word in value if isinstance(word, str)] if isinstance(value, Iterable) else []


def _public(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """PEFT names the base by the folder that it was loaded from, also in a tag; the Hub makes such tags by itself."""
    public = {name: words(value) if name in LISTS else value for name, value in metadata.items()}
    public["tags"] = [tag for tag in public.get("tags", []) if not tag.startswith("base_model:")]
    bases = [name for name in words(public.pop("base_model", None)) if is_repo_id(name)]
    return public | ({"base_model": bases if len(bases) > 1 else bases[0]} if bases else {})
