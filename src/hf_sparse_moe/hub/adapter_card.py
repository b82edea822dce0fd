"""The card of an adapter: what it changes, and of which base."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .adapter_base import base_experts, public_name
from .adapter_folder import AdaptedExperts, Adapter
from .card_facts import NOT_RECORDED, USES, evaluation_facts, health_facts, training_facts
from .card_metadata import PIPELINE_TAGS, merged_metadata
from .checkpoint import mapping
from .escaping import Markdown, as_code, escape_markdown


ADAPTER_TEMPLATE = Path(__file__).with_name("adapter_template.md")
# The Auto class that loads a base, by the end of the name of its own class.
_AUTO_CLASSES = {
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForMultipleChoice": "AutoModelForMultipleChoice",
}


def adapter_metadata(
    adapter: Adapter,
    *,
    license: str | None = None,
    language: str | Iterable[str] | None = None,
    tags: Iterable[str] | None = None,
    previous: Iterable[Mapping[str, Any]] = (),
) -> ModelCardData:
    """As [`card_metadata`] for a mixture."""
    base = base_id(adapter)
    auto_class = auto_class_of(adapter)
    variant = _variant(adapter)
    lora = ["lora"] if adapter.config.get("peft_type") == "LORA" else []
    moe = ["moe", "sparse-moe"] if adapter.experts or variant else []
    return merged_metadata(
        {
            "library_name": "peft",
            "base_model": base,
            "base_model_relation": None if base is None else "adapter",
            "pipeline_tag": PIPELINE_TAGS.get(auto_class),
        },
        [*moe, *lora, *([variant] if variant else [])],
        adapter.record,
        license=license,
        language=language,
        tags=tags,
        previous=previous,
    )


def adapter_facts(
    adapter: Adapter, evaluation: Mapping[str, Any], *, license: str | None, language: Iterable[str] | None
) -> dict[str, Any]:
    """All that the template prints but the name of the repository; it escapes what others wrote."""
    auto_class, base, revision = auto_class_of(adapter), base_id(adapter), adapter.base.get("revision")
    name = base or adapter.base.get("name_or_path") or public_name(_named(adapter))
    measured = mapping(adapter.record.get("evaluation"))
    pinned = base is not None and isinstance(revision, str) and revision.isalnum()
    kind = "LoRA on experts" if adapter.experts else f"An adapter ({adapter.config.get('peft_type')})"
    return {
        "kind": kind,
        "base_name": as_code(name) if name else NOT_RECORDED,
        "base_id": Markdown(base or "path/to/its/base"),
        "base_revision": Markdown(f', revision="{revision}"' if pinned else ""),
        "ours": _architecture(adapter).startswith("SparseMoe"),
        "auto_class": Markdown(auto_class),
        "facts": dict(_facts(adapter, name, license, language)),
        "intended_use": Markdown(USES.get(auto_class, "")),
        "layers": adapter.experts and (_LAYER_HEADER, [_layer_row(layer) for layer in adapter.experts]),
        "others": adapter.others and (["module", "numbers"], list(_other_rows(adapter.others))),
        "training": training_facts(adapter.record),
        "evaluation": evaluation,
        **evaluation_facts(measured),
        "health": health_facts(adapter.record),
        "limits": list(_limits(adapter, base, name, bool(measured.get("results") or evaluation))),
        "versions": {"peft": adapter.config.get("peft_version")} | dict(mapping(adapter.record.get("versions"))),
    }


def base_id(adapter: Adapter) -> str | None:
    """The Hub id of the base; None of a folder, or of a base that nobody named."""
    named = adapter.base.get("name_or_path") if adapter.base.get("revision") else _named(adapter)
    if not isinstance(named, str) or "/" not in named or Path(named).exists():
        return None
    try:
        validate_repo_id(named)
    except HFValidationError:
        return None
    return named


def auto_class_of(adapter: Adapter) -> str:
    """The Auto class that loads the base."""
    architecture = _architecture(adapter)
    return next((known for end, known in _AUTO_CLASSES.items() if architecture.endswith(end)), "AutoModel")


def _named(adapter: Adapter) -> str | None:
    name = adapter.config.get("base_model_name_or_path")
    return name if isinstance(name, str) else None


def _architecture(adapter: Adapter) -> str:
    recorded = adapter.base.get("architecture") or mapping(adapter.config.get("auto_mapping")).get("base_model_class")
    tasks = {"CAUSAL_LM": "ForCausalLM", "SEQ_2_SEQ_LM": "ForConditionalGeneration"}
    return str(recorded or tasks.get(str(adapter.config.get("task_type")), ""))


def _variant(adapter: Adapter) -> str | None:
    for name in ("EncoderDecoder", "Encoder", "Decoder"):
        if _architecture(adapter).startswith(f"SparseMoe{name}"):
            return {"EncoderDecoder": "encoder-decoder"}.get(name, name.lower())
    return None


def _facts(
    adapter: Adapter, base: str | None, license: str | None, language: Iterable[str] | None
) -> Iterator[tuple[Any, Any]]:
    config, recorded = adapter.config, adapter.base
    yield "Base model", as_code(base) if base else NOT_RECORDED
    yield "Revision of the base", as_code(recorded["revision"]) if recorded.get("revision") else NOT_RECORDED
    yield "Class of the base", as_code(recorded["architecture"]) if recorded.get("architecture") else NOT_RECORDED
    digests = mapping(recorded.get("sha256"))
    for file, digest in digests.items():
        yield Markdown(f"SHA-256 of the base's {as_code(file)}"), as_code(digest)
    if not digests:
        yield "SHA-256 of the base", NOT_RECORDED
    experts = base_experts(recorded)
    numbers = ", ".join(map(str, sorted(set(experts.values()))))
    yield "Experts of the base", f"{numbers} in each of {len(experts)} sparse layers" if experts else NOT_RECORDED
    adapted = f"{len(adapter.experts)}" + (f" of {len(experts)}" if experts else "")
    yield "Sparse layers that it adapts", adapted
    ranks = sorted({layer.rank for layer in adapter.experts})
    yield "Rank", ", ".join(map(str, ranks or [config.get("r", NOT_RECORDED)]))
    yield "Alpha", config.get("lora_alpha", NOT_RECORDED)
    yield "Scale of the update", "alpha / sqrt(rank)" if config.get("use_rslora") else "alpha / rank"
    dropout = adapter.settings.get("lora_dropout", config.get("lora_dropout"))
    yield "Dropout in training", NOT_RECORDED if dropout is None else f"{dropout:g}"
    yield "Parameters that were trained", f"{adapter.trainable:,}"
    yield "Precision", adapter.dtype or NOT_RECORDED
    yield "Language", ", ".join(language or ()) or NOT_RECORDED
    yield "Licence", license or NOT_RECORDED


_LAYER_HEADER = [
    "experts of",
    "experts that are adapted",
    "projections",
    "rank",
    "parameters",
    "experts that it changes",
]


def _layer_row(layer: AdaptedExperts) -> list[Any]:
    numbers = layer.experts or []
    chosen = ", ".join(map(str, numbers)) if 0 < len(numbers) < layer.num_experts else f"all {layer.num_experts}"
    moved = f"{len(layer.moved)} of {layer.num_experts}"
    projections = ", ".join(layer.projections)
    return [as_code(layer.name), chosen, projections, layer.rank, f"{layer.trainable:,}", moved]


def _other_rows(others: Mapping[str, int]) -> Iterator[list[Any]]:
    for name, numbers in others.items():
        yield [as_code(name), f"{numbers:,}"]


def _limits(adapter: Adapter, base: str | None, name: str | None, measured: bool) -> Iterator[Markdown]:
    yield Markdown("It is of use on its base alone, with all that the base has learnt, wanted or not.")
    if base is None:
        named = f", a folder named {escape_markdown(name)}," if name else ""
        yield Markdown(f"Its base{named} is not known to be on the Hub.")
    if not adapter.base:
        yield Markdown("What tells its base from others is not recorded: another one would be adapted in silence.")
    if adapter.experts and not any(layer.moved for layer in adapter.experts):
        yield Markdown("It changes no expert: all its updates are zero, as before the first step of a training.")
    if not mapping(adapter.record.get("training")):
        yield Markdown("How it was trained is not recorded.")
    if not measured:
        yield Markdown("No result is recorded: how good it is, in any language or domain, is not known.")
    else:
        yield Markdown("It was measured on the data above alone; other languages, domains and tasks were not.")
