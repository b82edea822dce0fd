"""What the template of a card is rendered from. Text that others wrote is passed as it is: the template escapes it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from markupsafe import Markup

from hf_sparse_moe.models.pretrained_model import SparseMoePreTrainedModel
from hf_sparse_moe.models.quantization import packed_bits
from hf_sparse_moe.models.size import count_flops_per_token, count_parameters
from hf_sparse_moe.stock import explain_export

from .adapter_files import Adapter, public_name
from .checkpoint import Checkpoint, mapping
from .escaping import as_code


BARS = "▁▂▃▄▅▆▇█"
# By the end of the name of a model's class: the Auto class that loads it, and the Hub's name of its task, which has
# none for a sequence-to-sequence model or for multiple choice.
_CLASSES = {
    "ForMaskedLM": ("AutoModelForMaskedLM", "fill-mask"),
    "ForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "LMHeadModel": ("AutoModelForCausalLM", "text-generation"),
    "ForConditionalGeneration": ("AutoModelForSeq2SeqLM", None),
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "ForTokenClassification": ("AutoModelForTokenClassification", "token-classification"),
    "ForQuestionAnswering": ("AutoModelForQuestionAnswering", "question-answering"),
    "ForMultipleChoice": ("AutoModelForMultipleChoice", None),
}
_PEFT_TASKS = {"CAUSAL_LM": "ForCausalLM", "SEQ_2_SEQ_LM": "ForConditionalGeneration"}


def card_facts(published: Checkpoint | Adapter) -> dict[str, Any]:
    """The names that the template knows, but for what a call of [`render_model_card`] gives."""
    record, architecture = published.record, architecture_of(published)
    facts: dict[str, Any] = {
        "record": record,
        "architecture": architecture,
        "auto_class": Markup(auto_class_of(architecture)[0]),
        "health": dict(_router_health(record)),
        "is_adapter": isinstance(published, Adapter),
    }
    facts |= _adapter_facts(published) if isinstance(published, Adapter) else _model_facts(published)
    versions = {**facts["versions"], **mapping(record.get("versions"))}
    return facts | {"made_with": ", ".join(f"{name} {version}" for name, version in versions.items() if version)}


def architecture_of(published: Checkpoint | Adapter) -> str:
    """The name of a mixture's class, or of the class of an adapter's base; empty where nothing says it."""
    if isinstance(published, Checkpoint):
        return type(published.model).__name__
    config = published.config
    recorded = published.base.get("architecture") or mapping(config.get("auto_mapping")).get("base_model_class")
    return str(recorded or _PEFT_TASKS.get(str(config.get("task_type")), ""))


def auto_class_of(architecture: str) -> tuple[str, str | None]:
    """The Auto class that loads an architecture, and the Hub's name of its task."""
    known = (known for end, known in _CLASSES.items() if architecture.endswith(end))
    return next(known, ("AutoModel", "feature-extraction"))


def variant_of(architecture: str) -> str | None:
    """`"encoder"`, `"decoder"` or `"encoder-decoder"` for a class of this package."""
    found = re.match(r"SparseMoe(EncoderDecoder|Encoder|Decoder)", architecture)
    return None if found is None else {"EncoderDecoder": "encoder-decoder"}.get(found[1], found[1].lower())


def base_id(published: Checkpoint | Adapter) -> str | None:
    """The Hub id of the dense source or the adapter's base; None for a folder, or where nobody named it."""
    if isinstance(published, Adapter):
        name = published.base_name
        return name if is_repo_id(name) and "/" in str(name) and not Path(str(name)).exists() else None
    source = mapping(published.receipt.get("source"))
    name = source.get("name_or_path") if source.get("revision") else None  # else it was a folder
    return name if is_repo_id(name) else None


def is_repo_id(name: object) -> bool:
    """Whether something may be an id on the Hub."""
    try:
        validate_repo_id(name)  # type: ignore[arg-type]
    except HFValidationError:
        return False
    return True


def coded(rows: object) -> dict[Markup, Any]:
    """Rows whose names are those of arguments; what is switched off says nothing."""
    return {as_code(name): value for name, value in mapping(rows).items() if value is not False}


def by_part(results: object) -> list[dict[str, Any]]:
    """A row for each part of the evaluation data, of which the empty name is the whole."""
    return [{"part of the evaluation data": part or "all", **values} for part, values in mapping(results).items()]


def load_bars(load: list[float]) -> str:
    """A bar for each expert."""
    highest = max(load) or 1
    return "".join(BARS[round(share / highest * (len(BARS) - 1))] for share in load)


def code_of(value: object) -> Markup | None:
    """Text as inline code; None where there is none."""
    return as_code(value) if isinstance(value, str) and value else None


FILTERS = {"coded": coded, "by_part": by_part, "bars": load_bars, "code": code_of}


def _model_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    model, receipt = checkpoint.model, checkpoint.receipt
    config, source = model.config, mapping(receipt.get("source"))
    bits = packed_bits(config)
    return {
        "config": config,
        "receipt": receipt,
        "source": source,
        "base_name": code_of(source.get("name_or_path")),
        "variant": variant_of(type(model).__name__),
        "dtype": checkpoint.dtype + (f"; experts in {bits} bits (bitsandbytes)" if bits else ""),
        "sparse_layers": dict(_sparse_layers(model)),
        "total": count_parameters(model),
        "active": count_parameters(model, only_active=True),
        "flops": count_flops_per_token(model),
        "routing": checkpoint.routing.get("layers") or [],
        "picture": checkpoint.has_picture,
        "report": checkpoint.has_report,
        "embeds": checkpoint.embeds,
        "exports": Markup(", ".join(map(as_code, explain_export(model).possible))),
        "versions": mapping(receipt.get("versions")) or {"transformers": config.transformers_version},
    }


def _sparse_layers(model: SparseMoePreTrainedModel) -> Iterator[tuple[str, str]]:
    for field, side in model.config._layer_type_fields.items():
        layer_types = getattr(model.config, field)
        if layer_types is None:
            yield f"Sparse layers ({side})", f"all {sum(block.side == side for block in model.sparse_blocks)}"
        else:
            indices = [str(layer) for layer, kind in enumerate(layer_types) if kind == "sparse"]
            listed = f"{', '.join(indices) or 'none'} (counted from 0)"
            yield f"Sparse layers ({side})", f"{len(indices)} of {len(layer_types)}: {listed}"


def _adapter_facts(adapter: Adapter) -> dict[str, Any]:
    config, recorded, base = adapter.config, adapter.base, base_id(adapter)
    revision, configured = recorded.get("revision"), config.get("base_model_name_or_path")
    name = base or recorded.get("name_or_path") or public_name(configured if isinstance(configured, str) else None)
    pinned = base is not None and isinstance(revision, str) and revision.isalnum()
    chosen = mapping(adapter.settings.get("experts"))
    return {
        "adapter": adapter,
        "config": config,
        "base_name": code_of(name),
        "base_id": Markup(base) if base else None,
        "base_revision": Markup(f', revision="{revision}"' if pinned else ""),
        "ours": variant_of(architecture_of(adapter)) is not None,
        "experts": [f"{name}: {numbers}" for name, numbers in chosen.items()],
        "versions": {"peft": config.get("peft_version")},
    }


def _router_health(record: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The losses and the routers' state in the last log of a training, without those of single layers."""
    for name, value in mapping(mapping(record.get("training")).get("last_log")).items():
        if re.fullmatch(r"loss|task_loss|aux_loss|z_loss|router/[^/]+", name):
            yield name, value
