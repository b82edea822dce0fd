"""The facts of a card, by the names that its template has for them. What nobody recorded is left out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from markupsafe import Markup

from hf_sparse_moe.models.pretrained_model import SparseMoePreTrainedModel
from hf_sparse_moe.models.size import count_flops_per_token, count_parameters
from hf_sparse_moe.stock import explain_export

from .adapter_base import base_experts, public_name
from .adapter_folder import Adapter
from .checkpoint import Checkpoint, mapping
from .escaping import as_code


LOG_LINES = 12  # evaluations during training; the record holds all of them
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
_ROUTERS = {
    "top_k": "each token takes its best experts",
    "expert_choice": "each expert takes its best tokens",
    "hash": "the token's id decides",
}


def card_facts(published: Checkpoint | Adapter, given: Mapping[str, Any]) -> dict[str, Any]:
    """
    Everything that the template prints but the name of the repository. Text that others wrote is passed as it is: the
    template escapes it.

    Args:
        published ([`Checkpoint`] or [`Adapter`]): What the card is for.
        given (`Mapping`): Results that the publisher gave.

    Raises:
        ValueError: a file beside the weights that is not what this package writes.
    """
    record = published.record
    try:
        evaluation = record.get("evaluation") or {}
        own = _adapter_facts(published) if isinstance(published, Adapter) else _model_facts(published)
        facts = {
            "auto_class": Markup(auto_class_of(architecture_of(published))[0]),
            "training": _present(_training(record)),
            "given": given,
            **_evaluation(evaluation),
            "health": _health(record),
            **dict.fromkeys(("kind", "upcycling", "routing")),
            **own,
            "versions": ", ".join(
                f"{name} {version}"
                for name, version in {**own["versions"], **(record.get("versions") or {})}.items()
                if version
            ),
        }
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(
            "A file beside the weights (receipt.json, training_record.json, routing_statistics.json) is not what this "
            f"package writes ({type(error).__name__}). Delete it, or write it again."
        ) from error
    if not facts["training"]:
        facts["limits"].append("No training is recorded.")
    if not facts["results"] and not given:
        facts["limits"].append("No evaluation is recorded.")
    return facts


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
    is_adapter = isinstance(published, Adapter)
    recorded = published.base if isinstance(published, Adapter) else mapping(published.receipt.get("source"))
    # A base without a revision was a folder, or is not known to be on the Hub.
    name = recorded.get("name_or_path") if recorded.get("revision") else None
    if isinstance(published, Adapter) and name is None:
        name = published.config.get("base_model_name_or_path")
    is_folder = is_adapter and isinstance(name, str) and ("/" not in name or Path(name).exists())
    return name if isinstance(name, str) and is_repo_id(name) and not is_folder else None


def is_repo_id(name: object) -> bool:
    """Whether something may be an id on the Hub."""
    try:
        validate_repo_id(name)  # type: ignore[arg-type]
    except HFValidationError:
        return False
    return True


def _model_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    model, receipt = checkpoint.model, checkpoint.receipt
    config, source = model.config, receipt.get("source") or {}
    total, active = count_parameters(model), count_parameters(model, only_active=True)
    served = f"{config.mean_experts_per_token:g}" + (" on average" if config.router_type == "expert_choice" else "")
    shared = f", {config.num_shared_experts} shared" if config.num_shared_experts else ""
    balance = f"coefficient {config.router_aux_loss_coef:g}, over the {config.balance_scope.replace('_', ' ')}"
    details = {
        "Class": as_code(type(model).__name__),
        "Dense source": _code(source.get("name_or_path")),
        "Revision of the source": _code(source.get("revision")),
        **dict(_sparse_layers(model)),
        "Experts per sparse layer": f"{config.num_experts} routed{shared}",
        "Routed experts per token (top-k)": served,
        "Router": f"{config.router_type} ({_ROUTERS[config.router_type]}), {config.scoring_func}",
        "Load-balancing loss": balance if config.router_aux_loss_coef else None,
        "Parameters, total": f"{total:,}",
        "Parameters, active per token": f"{active:,} ({active / total:.1%})",
        "FLOPs per token": f"{count_flops_per_token(model):,} (one forward pass, without attention scores)",
        "Precision of the weights": checkpoint.dtype,
    }
    layers = checkpoint.routing.get("layers") or []
    upcycling = {as_code(name): value for name, value in (receipt.get("arguments") or {}).items()}
    difference = (receipt.get("equality") or {}).get("max_abs_difference")
    upcycling[Markup("Largest difference to the dense outputs, before any training")] = difference
    return {
        "model_type": as_code(config.dense_config.model_type),
        "num_experts": config.num_experts,
        "variant": variant_of(architecture_of(checkpoint)),
        "served": served,
        "details": _present(details),
        "base_name": _code(source.get("name_or_path")),
        "upcycling": _present(
            upcycling | {"Largest difference to the dense outputs, before any training": difference}
        ),
        "routing": [_routing_row(layer) for layer in layers],
        "parts": list(layers[0]["group_load"]) if layers else [],
        "picture": checkpoint.has_picture,
        "limits": list(_model_limits(checkpoint, total, active)),
        "exports": Markup(", ".join(map(as_code, explain_export(model).possible))),
        "versions": receipt.get("versions") or {"transformers": config.transformers_version},
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


def _model_limits(checkpoint: Checkpoint, total: int, active: int) -> Iterator[Markup]:
    config, source = checkpoint.model.config, checkpoint.receipt.get("source") or {}
    yield Markup(f"All {total:,} parameters must fit in memory, although a token uses {active:,}.")
    if name := _code(source.get("name_or_path")):
        yield Markup(f"Inherits the biases of its dense source, {name}.")
    if dead := sum(len(layer["dead_experts"]) for layer in checkpoint.routing.get("layers") or []):
        yield Markup(f"{dead} experts received no token of the text below: they take memory and serve nothing.")
    if config.router_type == "top_k" and config.capacity_factor is not None:
        yield Markup("In training, tokens beyond an expert's capacity are dropped; at inference none is.")
    if config.router_type == "expert_choice":
        yield Markup("Experts choose among all tokens of a sequence, so a token's output depends on all others.")


def _adapter_facts(adapter: Adapter) -> dict[str, Any]:
    config, recorded, base = adapter.config, adapter.base, base_id(adapter)
    revision, configured = recorded.get("revision"), config.get("base_model_name_or_path")
    name = base or recorded.get("name_or_path") or public_name(configured if isinstance(configured, str) else None)
    pinned = base is not None and isinstance(revision, str) and revision.isalnum()
    experts, chosen = base_experts(recorded), mapping(adapter.settings.get("experts"))
    of_base = ", ".join(map(str, sorted(set(experts.values()))))
    details = {
        "Base model": _code(name),
        "Revision of the base": _code(revision),
        "Class of the base": _code(recorded.get("architecture")),
        "Experts of the base": f"{of_base} in each of {len(experts)} sparse layers" if experts else None,
        "Parameters that it adapts": config.get("target_parameters"),
        "Modules that it adapts": config.get("target_modules"),
        "Modules that were trained in full": config.get("modules_to_save"),
        "Experts that it adapts": [f"{name}: {numbers}" for name, numbers in chosen.items()],
        "Projections that it adapts": adapter.settings.get("projections"),
        "Rank": config.get("r"),
        "Alpha": config.get("lora_alpha"),
        "Dropout in training": adapter.settings.get("lora_dropout", config.get("lora_dropout")),
        "Numbers in its file": f"{adapter.numbers:,}",
        "Precision": adapter.dtype,
    }
    return {
        "kind": "LoRA on experts" if config.get("target_parameters") else f"An adapter ({config.get('peft_type')})",
        "base_name": _code(name),
        "base_id": Markup(base or "path/to/its/base"),
        "base_revision": Markup(f', revision="{revision}"' if pinned else ""),
        "ours": variant_of(architecture_of(adapter)) is not None,
        "details": _present(details),
        "limits": list(_adapter_limits(adapter, base, _code(name))),
        "versions": {"peft": config.get("peft_version")},
    }


def _adapter_limits(adapter: Adapter, base: str | None, name: Markup | None) -> Iterator[Markup]:
    yield Markup("Use it only with its base model, whose biases it inherits.")
    if base is None:
        yield Markup(f"Its base{f' (a folder named {name})' if name else ''} is not known to be on the Hub.")
    if not adapter.base:
        yield Markup("Nothing that identifies its base is recorded, so that another base goes unnoticed.")
    if adapter.is_fresh:
        yield Markup("It changes nothing: all its updates are zero, as before the first step of a training.")


def _training(record: Mapping[str, Any]) -> dict[str, Any]:
    training, hardware = record.get("training") or {}, record.get("hardware") or {}
    hyperparameters = record.get("hyperparameters") or {}
    if not training:
        return {}
    of_step = training.get("weights_of_step")
    return {
        "Training data": training.get("data"),
        "Rows of the training data": training.get("rows"),
        "Optimizer steps": training.get("steps"),
        "Weights of step": None if of_step == training.get("steps") else of_step,
        "Epochs": training.get("epochs"),
        "Tokens seen": training.get("tokens"),
        **{as_code(name): value for name, value in hyperparameters.items() if value is not False},
        "Device": hardware.get("device"),
        "Processes": hardware.get("processes"),
    }


def _evaluation(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    results = evaluation.get("results") or {}
    log = evaluation.get("log") or []
    data = [name for described in (evaluation.get("data") or {}).values() for name in described.get("data") or []]
    about = {
        "Evaluation data": list(dict.fromkeys(data)),
        "Metrics": evaluation.get("metrics"),
        "Measured on": evaluation.get("date"),
    }
    return {
        "results": [{"part of the evaluation data": part or "all", **values} for part, values in results.items()],
        "about_results": _present(about),
        "log": [_present({**line, "part": line.get("part") or "all"}) for line in log[-LOG_LINES:]],
        "log_length": len(log),
    }


def _health(record: Mapping[str, Any]) -> dict[Any, Any]:
    """The losses and the routers' state in the last log of a training, without those of single layers."""
    last = (record.get("training") or {}).get("last_log") or {}
    wanted = re.compile(r"loss|task_loss|aux_loss|z_loss|router/[^/]+")
    return {as_code(name): value for name, value in last.items() if wanted.fullmatch(name)}


def _routing_row(layer: Mapping[str, Any]) -> dict[str, Any]:
    highest = max(layer["load"]) or 1
    return {
        "layer": f"{layer['side']} {layer['position']}",
        "entropy": f"{layer['entropy']:.3f}",
        "MaxVio": f"{layer['max_violation']:.3f}",
        "mutual information of part and expert": f"{layer['mutual_information']:.3f}",
        "dead": len(layer["dead_experts"]),
        "load": "".join(BARS[round(share / highest * (len(BARS) - 1))] for share in layer["load"]),
    }


def _present(rows: Mapping[Any, Any]) -> dict[Any, Any]:
    return {name: value for name, value in rows.items() if value not in (None, "", [])}


def _code(value: object) -> Markup | None:
    return as_code(value) if isinstance(value, str) and value else None
