"""The metadata at the head of a card, as the Hub understands it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .checkpoint import Checkpoint, mapping
from .evaluation_results import hub_data


# The Hub's task names by the Auto class that loads the model. A sequence-to-sequence model has no task of its own
# there (translation or summarization is the training's matter), nor has multiple choice.
PIPELINE_TAGS = {
    "AutoModel": "feature-extraction",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
}
_OUR_TAGS = {"moe", "sparse-moe", "encoder", "decoder", "encoder-decoder", "upcycled", "lora"}
# What the checkpoint alone can say; all else in a present card stays.
_OURS = {"library_name", "base_model", "base_model_relation", "tags"}


def variant_of(checkpoint: Checkpoint) -> str:
    """`"encoder"`, `"decoder"` or `"encoder-decoder"`."""
    return checkpoint.model.config.model_type.removeprefix("sparse_moe_").replace("_", "-")


def card_metadata(
    checkpoint: Checkpoint,
    *,
    license: str | None = None,
    language: str | Iterable[str] | None = None,
    tags: Iterable[str] | None = None,
    previous: Iterable[Mapping[str, Any]] = (),
) -> ModelCardData:
    """
    What is given wins over what the training record says, and that over present cards.

    Args:
        checkpoint ([`Checkpoint`]): The mixture.
        license (`str`, *optional*): Such as `"apache-2.0"`.
        language (`str` or `Iterable[str]`, *optional*): Such as `"en"`.
        tags (`Iterable[str]`, *optional*): Further tags.
        previous (`Iterable[Mapping]`, *optional*): The metadata of present cards; the first that has a name wins.
    """
    base_model = _base_model(mapping(checkpoint.receipt.get("source")))
    upcycled = ["upcycled"] if checkpoint.receipt else []
    return merged_metadata(
        {
            "library_name": "transformers",
            "base_model": base_model,
            # the Hub knows four relations; an upcycled model is nearest to a fine-tuned one
            "base_model_relation": None if base_model is None else "finetune",
            "pipeline_tag": PIPELINE_TAGS.get(str(checkpoint.model._auto_class)),
        },
        ["moe", "sparse-moe", variant_of(checkpoint), *upcycled],
        checkpoint.record,
        license=license,
        language=language,
        tags=tags,
        previous=previous,
    )


def merged_metadata(
    own: Mapping[str, Any],
    own_tags: list[str],
    record: Mapping[str, Any],
    *,
    license: str | None,
    language: str | Iterable[str] | None,
    tags: Iterable[str] | None,
    previous: Iterable[Mapping[str, Any]],
) -> ModelCardData:
    """
    What the files tell, joined with what people tell, see [`card_metadata`].

    Args:
        own (`Mapping`): What the files alone can say.
        own_tags (`list[str]`): The same; they come first.
        record (`Mapping`): The training record.
        license, language, tags, previous: See [`card_metadata`].
    """
    told = mapping(record.get("card"))
    old: dict[str, Any] = {}
    for metadata in previous:
        old = dict(metadata) | old | {"tags": [*_words(old.get("tags")), *_words(metadata.get("tags"))]}
    train_data = mapping(record.get("training")).get("data")
    datasets = [found[0] for name in _words(train_data) if (found := hub_data(name))]
    # PEFT names the base in a tag too, by the folder that it was loaded from; the Hub makes such tags by itself.
    kept_tags = [tag for tag in old.get("tags", ()) if tag not in _OUR_TAGS and not tag.startswith("base_model:")]
    data = ModelCardData(
        license=license or _word(told.get("license")) or _word(old.get("license")),
        language=_words(language) or _words(told.get("language")) or _words(old.get("language")) or None,
        datasets=list(dict.fromkeys([*datasets, *_words(old.get("datasets"))])) or None,
        tags=list(dict.fromkeys([*own_tags, *_words(told.get("tags")), *(tags or ()), *kept_tags])),
        **{**own, "pipeline_tag": own["pipeline_tag"] or _word(old.get("pipeline_tag"))},
    )
    for name, value in old.items():
        if name not in _OURS and data.get(name) is None:
            data[name] = value
    return data


def _base_model(source: Mapping[str, Any]) -> str | None:
    """The Hub id of the dense source: one without a revision was a folder, or is not known to be on the Hub."""
    name = source.get("name_or_path")
    if not isinstance(name, str) or not source.get("revision"):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _word(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _words(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [word for word in value if isinstance(word, str)] if isinstance(value, Iterable) else []
