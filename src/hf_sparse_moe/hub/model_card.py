"""The model card, rendered from the checkpoint itself: a fact that is not recorded there says so."""

from __future__ import annotations

import html
import json
import platform
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from numbers import Number
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from jinja2 import StrictUndefined, Template
from jinja2.sandbox import SandboxedEnvironment
from transformers import TrainerState

import hf_sparse_moe
from hf_sparse_moe.models.pretrained_model import SparseMoePreTrainedModel
from hf_sparse_moe.models.size import count_flops_per_token, count_parameters


TEMPLATE = Path(__file__).with_name("template.md")
NOT_RECORDED = "not recorded"
LONGEST_VALUE = 300

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


class Markdown(str):
    """Text of ours, which the template prints as it stands; all other values are escaped."""


def escape_markdown(value: object) -> Markdown:
    """The value on one line that Markdown, a table cell and HTML show as it is, whoever wrote it."""
    if isinstance(value, Markdown):
        return value
    return Markdown(re.sub(r"([\\`*_\[\]|~$])", r"\\\1", html.escape(_one_line(value), quote=False)))


def as_code(value: object) -> Markdown:
    """A name, path or hash as inline code; whatever else it is, as escaped text: code knows no escapes."""
    text = _one_line(value)
    return Markdown(f"`{text}`") if re.fullmatch(r"[\w./:@+ -]+", text) else escape_markdown(value)


def render_model_card(
    model: SparseMoePreTrainedModel,
    repo_id: str,
    *,
    evaluation: Mapping[str, Any] | TrainerState | None = None,
    license: str | None = None,
    tags: Iterable[str] | None = None,
) -> str:
    """
    The card of a mixture: every number is counted on the model, or read from its config, receipt and evaluation.

    Args:
        model (`SparseMoePreTrainedModel`): The model that is published.
        repo_id (`str`): Where it is published, for the lines of code that load it.
        evaluation (`dict` or `TrainerState`, *optional*):
            Measured results by name; of a `TrainerState` the last evaluation is taken.
        license (`str`, *optional*): The model's licence, such as `"apache-2.0"`. Left out if unknown.
        tags (`Iterable[str]`, *optional*): Further tags.

    Returns:
        `str`: YAML metadata and Markdown. Nothing is asked of the Hub.

    Raises:
        ValueError: a model of another package, or a `repo_id` that the Hub does not allow.
    """
    if not isinstance(model, SparseMoePreTrainedModel):
        raise ValueError(
            f"`model` is a {type(model).__name__}; a card can be made for the classes of hf_sparse_moe. Load it with "
            "`from_pretrained` after `import hf_sparse_moe` and without `trust_remote_code`."
        )
    validate_repo_id(repo_id)
    config, auto_class = model.config, str(model._auto_class)
    # a receipt may come from someone else's repository, and be anything
    receipt = _mapping(model.receipt)
    source = _mapping(receipt.get("source"))
    base_model = _base_model(source)
    variant = config.model_type.removeprefix("sparse_moe_").replace("_", "-")
    data = ModelCardData(
        library_name="transformers",
        license=license,
        base_model=base_model,
        # the Hub knows four relations; an upcycled model is nearest to a fine-tuned one
        base_model_relation=None if base_model is None else "finetune",
        pipeline_tag=PIPELINE_TAGS.get(auto_class),
        tags=["moe", "sparse-moe", variant, *(["upcycled"] if receipt else []), *(tags or ())],
    )
    total, active = count_parameters(model), count_parameters(model, only_active=True)
    body = _template().render(
        repo_id=Markdown(repo_id),
        title=repo_id,
        variant=Markdown(variant),
        class_name=type(model).__name__,
        auto_class=Markdown(auto_class),
        config=config,
        layers=dict(_sparse_layers(model)),
        router=_router(config),
        total=f"{total:,}",
        active=f"{active:,} ({active / total:.1%})",
        flops=f"{count_flops_per_token(model):,}",
        dtype=str(model.dtype).removeprefix("torch."),
        license=license or NOT_RECORDED,
        source_name=source.get("name_or_path"),
        source_revision=source.get("revision"),
        source_files=_mapping(source.get("sha256")),
        upcycled=bool(receipt),
        receipt=dict(_flat({name: value for name, value in receipt.items() if name != "source"})),
        evaluation=dict(_results(evaluation)),
        versions={
            "hf_sparse_moe": hf_sparse_moe.__version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}"))


def _template() -> Template:
    environment = SandboxedEnvironment(
        undefined=StrictUndefined, finalize=escape_markdown, trim_blocks=True, keep_trailing_newline=True
    )
    environment.filters["code"] = as_code
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def _one_line(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    if Path(text).is_absolute():
        text = Path(text).name  # where it lay on someone's disk is nobody else's business
    text = " ".join(text.split())
    # control and direction characters could hide or reorder what a reader sees
    text = "".join(letter for letter in text if not unicodedata.category(letter).startswith("C"))
    return text if len(text) <= LONGEST_VALUE else text[:LONGEST_VALUE] + "…"


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


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


def _sparse_layers(model: SparseMoePreTrainedModel) -> Iterator[tuple[str, str]]:
    for field, side in model.config._layer_type_fields.items():
        sparse = sum(block.side == side for block in model.sparse_blocks)
        layer_types = getattr(model.config, field)
        if layer_types is None:
            yield side, f"all {sparse}"
        else:
            indices = [str(layer) for layer, kind in enumerate(layer_types) if kind == "sparse"]
            yield side, f"{sparse} of {len(layer_types)}: {', '.join(indices) or 'none'} (counted from 0)"


def _router(config: Any) -> str:
    normalised = "normalised to sum 1" if config.norm_topk_prob else "not normalised"
    scale = "" if config.routed_scaling_factor == 1 else f", times {config.routed_scaling_factor:g}"
    return f"{config.scoring_func}, weights {normalised}{scale}"


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from _flat(item, f"{prefix}{key}.")
        elif item is not None:
            yield f"{prefix}{key}", json.dumps(item) if isinstance(item, list | bool) else item


def _results(evaluation: Mapping[str, Any] | TrainerState | None) -> Iterator[tuple[str, Any]]:
    if isinstance(evaluation, TrainerState):
        logs = [log for log in evaluation.log_history if any(name.startswith("eval_") for name in log)]
        evaluation = logs[-1] if logs else None
    elif not isinstance(evaluation, Mapping | None):
        raise ValueError(
            f"`evaluation` is a {type(evaluation).__name__}; pass results by name, such as `trainer.evaluate()` "
            "returns them, or `trainer.state`."
        )
    for name, value in (evaluation or {}).items():
        if isinstance(value, Number | str) and not name.endswith(("runtime", "per_second")):  # the machine's, not ours
            yield name, value
