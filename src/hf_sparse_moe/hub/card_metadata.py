"""The metadata at the head of a card, as the Hub understands it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .adapter_folder import Adapter
from .card_facts import architecture_of, auto_class_of, base_id, is_repo_id, variant_of
from .checkpoint import Checkpoint, mapping
from .evaluation_results import hub_data


# The Hub's task names. A sequence-to-sequence model has no task of its own there, nor has multiple choice.
_PIPELINE_TAGS = {
    "AutoModel": "feature-extraction",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
}
LISTS = ("language", "datasets", "tags")


def derived_metadata(published: Checkpoint | Adapter) -> dict[str, Any]:
    """What the files of a checkpoint or an adapter say by themselves."""
    architecture, base = architecture_of(published), base_id(published)
    auto_class, _ = auto_class_of(architecture)
    variant = variant_of(architecture)
    if isinstance(published, Adapter):
        library, relation = "peft", "adapter"
        tags = ["moe", "sparse-moe"] if published.experts or variant else []
        tags += ["lora"] if published.config.get("peft_type") == "LORA" else []
        tags += [variant] if variant else []
    else:
        # the Hub knows four relations; an upcycled model is nearest to a fine-tuned one
        library, relation = "transformers", "finetune"
        tags = ["moe", "sparse-moe", str(variant), *(["upcycled"] if published.receipt else [])]
    trained_on = words(mapping(published.record.get("training")).get("data"))
    derived = {
        "library_name": library,
        "base_model": base,
        "base_model_relation": relation if base else None,
        "pipeline_tag": _PIPELINE_TAGS.get(auto_class),
        "datasets": [found[0] for name in trained_on if (found := hub_data(name))],
        "tags": tags,
    }
    return {name: value for name, value in derived.items() if value}


def merged_metadata(
    derived: Mapping[str, Any], kept: Iterable[Mapping[str, Any]], record: Mapping[str, Any], told: Mapping[str, Any]
) -> dict[str, Any]:
    """
    What is told now wins over the training record, that over what a person wrote in present cards, and that over what
    the files say by themselves; tags and data sets add up.

    Args:
        derived (`Mapping`): See [`derived_metadata`].
        kept (`Iterable[Mapping]`): What a person wrote in present cards; the first that has a name wins.
        record (`Mapping`): The training record.
        told (`Mapping`): The arguments of [`render_model_card`].
    """
    data = dict(derived)
    recorded = mapping(record.get("card"))
    recorded = {name: recorded.get(name) for name in ("license", "language", "tags")}
    recorded["license"] = recorded["license"] if isinstance(recorded["license"], str) else None
    for metadata in [*reversed([_public(metadata) for metadata in kept]), recorded, told]:
        for name, value in metadata.items():
            value = words(value) if name in LISTS else value
            if value is not None and value != []:
                added = [*data.get(name, []), *value] if name in ("tags", "datasets") else value
                data[name] = list(dict.fromkeys(added)) if name in LISTS else added
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
    bases = [name for name in words(metadata.get("base_model")) if is_repo_id(name)]
    public = {name: value for name, value in metadata.items() if name != "base_model"}
    public["tags"] = [tag for tag in words(metadata.get("tags")) if not tag.startswith("base_model:")]
    return public | ({"base_model": bases if len(bases) > 1 else bases[0]} if bases else {})
