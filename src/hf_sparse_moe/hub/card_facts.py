"""The facts of a card, by the names that its template has for them. What nobody recorded is left out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_sparse_moe.models.pretrained_model import SparseMoePreTrainedModel
from hf_sparse_moe.models.size import count_flops_per_token, count_parameters
from hf_sparse_moe.stock import explain_export

from .adapter_base import base_experts, public_name
from .adapter_folder import AdaptedExperts, Adapter
from .checkpoint import Checkpoint, mapping
from .escaping import Markdown, as_code


LOG_LINES = 12  # evaluations during training; the record holds all of them
WEIGHT_FILES = 4  # whose hashes a card lists; the receipt holds all of them
LARGEST = 1e100  # number that may be one; JSON as Python reads it has infinity too
BARS = "▁▂▃▄▅▆▇█"
# By the end of the name of a model's class: the Auto class that loads it, and what it is for.
_AUTO_CLASSES = {
    "ForMaskedLM": ("AutoModelForMaskedLM", "Filling masked tokens, and fine-tuning for other tasks."),
    "ForCausalLM": ("AutoModelForCausalLM", "Continuing text, and fine-tuning for other tasks."),
    "LMHeadModel": ("AutoModelForCausalLM", "Continuing text, and fine-tuning for other tasks."),
    "ForConditionalGeneration": ("AutoModelForSeq2SeqLM", "Text-to-text generation, and fine-tuning for other tasks."),
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "Classifying texts."),
    "ForTokenClassification": ("AutoModelForTokenClassification", "Labelling the words of a text."),
    "ForQuestionAnswering": ("AutoModelForQuestionAnswering", "Finding the answer to a question in a text."),
    "ForMultipleChoice": ("AutoModelForMultipleChoice", "Choosing among answers."),
}
_FEATURES = ("AutoModel", "Turning text into vectors, and fine-tuning for other tasks.")
_PEFT_TASKS = {"CAUSAL_LM": "ForCausalLM", "SEQ_2_SEQ_LM": "ForConditionalGeneration"}
_ROUTERS = {
    "top_k": "each token takes its best experts",
    "expert_choice": "each expert takes its best tokens",
    "hash": "the token's id decides",
}
_NO_CARD_MATTER = {"source", "versions", "parameters", "flops_per_token", "exact", "equality", "from"}


def card_facts(published: Checkpoint | Adapter, evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """
    Everything that the template prints but the name of the repository. Text that others wrote is passed as it is: the
    template escapes it.

    Args:
        published ([`Checkpoint`] or [`Adapter`]): What the card is for.
        evaluation (`Mapping`): Results that the publisher gave.
    """
    record, is_adapter = published.record, isinstance(published, Adapter)
    own = _adapter_facts(published) if isinstance(published, Adapter) else _model_facts(published)
    training, results = _present(_training(record)), _results(record)
    if not training:
        own["limits"].append("No training is recorded." if is_adapter else "No training after upcycling is recorded.")
    own["limits"].append(
        "Evaluated only on the data below; other languages, domains and tasks were not measured."
        if results or evaluation
        else "No evaluation is recorded."
    )
    auto_class, use = auto_class_of(architecture_of(published))
    return {
        "adapter": is_adapter,
        "auto_class": Markdown(auto_class),
        "intended_use": Markdown(use),
        "training": training,
        "evaluation": evaluation,
        **_evaluation(mapping(record.get("evaluation"))),
        "health": dict(_health(record)),
        **dict.fromkeys(("receipt", "layers", "others", "routing")),
        **own,
        "versions": _versions(own["versions"] | dict(mapping(record.get("versions")))),
    }


def architecture_of(published: Checkpoint | Adapter) -> str:
    """The name of a mixture's class, or of the class of an adapter's base; empty where nothing says it."""
    if isinstance(published, Checkpoint):
        return type(published.model).__name__
    config = published.config
    recorded = published.base.get("architecture") or mapping(config.get("auto_mapping")).get("base_model_class")
    return str(recorded or _PEFT_TASKS.get(str(config.get("task_type")), ""))


def auto_class_of(architecture: str) -> tuple[str, str]:
    """The Auto class that loads an architecture, and what that is for."""
    return next((known for end, known in _AUTO_CLASSES.items() if architecture.endswith(end)), _FEATURES)


def variant_of(architecture: str) -> str | None:
    """`"encoder"`, `"decoder"` or `"encoder-decoder"` for a class of this package."""
    found = re.match(r"SparseMoe(EncoderDecoder|Encoder|Decoder)", architecture)
    return None if found is None else {"EncoderDecoder": "encoder-decoder"}.get(found[1], found[1].lower())


def base_id(published: Checkpoint | Adapter) -> str | None:
    """The Hub id of the dense source or the adapter's base; None for a folder, or where nobody named it."""
    if isinstance(published, Checkpoint):
        # A source without a revision was a folder, or is not known to be on the Hub.
        source = mapping(published.receipt.get("source"))
        name = source.get("name_or_path") if source.get("revision") else None
    else:
        recorded = published.base
        configured = published.config.get("base_model_name_or_path")
        name = recorded.get("name_or_path") if recorded.get("revision") else configured
    if not isinstance(name, str) or not is_repo_id(name):
        return None
    is_folder = isinstance(published, Adapter) and ("/" not in name or Path(name).exists())
    return None if is_folder else name


def is_repo_id(name: object) -> bool:
    """Whether something may be an id on the Hub."""
    try:
        validate_repo_id(name)  # type: ignore[arg-type]
    except HFValidationError:
        return False
    return True


def _model_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    model, receipt = checkpoint.model, checkpoint.receipt
    config = model.config
    routing, groups = _routing(checkpoint.routing)
    return {
        "config": config,
        "variant": Markdown(variant_of(architecture_of(checkpoint))),
        "served": _served(config),
        "facts": _present(_anatomy(checkpoint)),
        "base_name": _name(mapping(receipt.get("source")).get("name_or_path")),
        "receipt": _present(_receipt(receipt)),
        "routing": routing,
        "routing_groups": groups,
        "picture": checkpoint.has_picture,
        "limits": list(_model_limits(checkpoint)),
        "exports": Markdown(", ".join(map(as_code, explain_export(model).possible))),
        "versions": dict(mapping(receipt.get("versions"))) or {"transformers": config.transformers_version},
    }


def _anatomy(checkpoint: Checkpoint) -> Iterator[tuple[Any, Any]]:
    model, config = checkpoint.model, checkpoint.model.config
    source = mapping(checkpoint.receipt.get("source"))
    yield "Class", as_code(type(model).__name__)
    yield "Dense architecture", as_code(config.dense_config.model_type)
    yield "Dense source", _name(source.get("name_or_path"))
    yield "Revision of the source", _name(source.get("revision"))
    yield from _hashes("source", source.get("sha256"))
    for side, sparse in _sparse_layers(model):
        yield f"Sparse layers ({side})", sparse
    shared = f", {config.num_shared_experts} shared" if config.num_shared_experts else ""
    yield "Experts per sparse layer", f"{config.num_experts} routed{shared}"
    yield "Routed experts per token (top-k)", _served(config)
    yield from _router(config)
    total, active = count_parameters(model), count_parameters(model, only_active=True)
    yield "Parameters, total", f"{total:,}"
    yield "Parameters, active per token", f"{active:,} ({active / total:.1%})"
    yield "FLOPs per token", f"{count_flops_per_token(model):,} (one forward pass, without attention scores)"
    yield "Precision of the weights", checkpoint.dtype
    labels = [str(label) for label in (getattr(config, "id2label", None) or {}).values()]
    if "Classification" in type(model).__name__ and not all(label.startswith("LABEL_") for label in labels):
        yield "Labels", labels


def _hashes(of: str, digests: object) -> Iterator[tuple[Any, Any]]:
    files = [(name, digest) for name, digest in mapping(digests).items() if str(name).endswith(".safetensors")]
    for name, digest in files[:WEIGHT_FILES]:
        yield Markdown(f"SHA-256 of the {of}'s {as_code(name)}"), as_code(digest)


def _served(config: Any) -> str:
    mean = f"{config.mean_experts_per_token:g}"
    return f"{mean} on average" if config.router_type == "expert_choice" else mean


def _router(config: Any) -> Iterator[tuple[str, str]]:
    weights = "weights normalised to sum 1" if config.norm_topk_prob else "weights not normalised"
    scale = "" if config.routed_scaling_factor == 1 else f", times {config.routed_scaling_factor:g}"
    yield "Router", f"{config.router_type} ({_ROUTERS[config.router_type]}), {config.scoring_func}, {weights}{scale}"
    if config.router_type == "top_k" and config.capacity_factor is not None:
        yield "Expert capacity in training", f"{config.capacity_factor:g} times an even load; the rest is dropped"
    if config.router_type == "top_k" and config.n_group > 1:
        yield "Groups of experts", f"at most {config.topk_group} of {config.n_group} per token"
    if config.scoring_func == "sigmoid" and config.router_bias_update_speed:
        yield "Selection bias", f"moves by {config.router_bias_update_speed:g} a step towards an even load"
    if config.router_aux_loss_coef:
        scope = config.balance_scope.replace("_", " ")
        yield "Load-balancing loss", f"coefficient {config.router_aux_loss_coef:g}, over the {scope}"


def _sparse_layers(model: SparseMoePreTrainedModel) -> Iterator[tuple[str, str]]:
    for field, side in model.config._layer_type_fields.items():
        layer_types = getattr(model.config, field)
        if layer_types is None:
            yield side, f"all {sum(block.side == side for block in model.sparse_blocks)}"
        else:
            indices = [str(layer) for layer, kind in enumerate(layer_types) if kind == "sparse"]
            yield side, f"{len(indices)} of {len(layer_types)}: {', '.join(indices) or 'none'} (counted from 0)"


def _receipt(receipt: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[Any, Any]]:
    """How the mixture was made. Its equality with the dense source held before any training, and is told as that."""
    for name, value in receipt.items():
        if name in _NO_CARD_MATTER:
            continue
        if isinstance(value, Mapping):
            yield from _receipt(value, "" if name == "arguments" else f"{prefix}{name}.")
        else:
            yield as_code(f"{prefix}{name}"), json.dumps(value) if isinstance(value, list | bool) else value
    difference = mapping(receipt.get("equality")).get("max_abs_difference")
    yield "Largest difference to the dense outputs, when upcycled and before any training", difference


def _model_limits(checkpoint: Checkpoint) -> Iterator[Markdown]:
    model, config = checkpoint.model, checkpoint.model.config
    total, active = count_parameters(model), count_parameters(model, only_active=True)
    yield Markdown(f"All {total:,} parameters must fit in memory, although a token uses {active:,}.")
    if checkpoint.receipt:
        name = _name(mapping(checkpoint.receipt.get("source")).get("name_or_path"))
        yield Markdown(f"Inherits the biases of its dense source{f', {name}' if name else ''}.")
    if dead := sum(_dead(layer) or 0 for layer in _layers(checkpoint.routing)):
        yield Markdown(f"{dead} experts received no token of the text below: they take memory and serve nothing.")
    if config.router_type == "top_k" and config.capacity_factor is not None:
        yield Markdown("In training, tokens beyond an expert's capacity are dropped; at inference none is.")
    if config.router_type == "expert_choice":
        yield Markdown("Experts choose among all tokens of a sequence, so a token's output depends on all others.")


def _adapter_facts(adapter: Adapter) -> dict[str, Any]:
    base, revision = base_id(adapter), adapter.base.get("revision")
    configured = adapter.config.get("base_model_name_or_path")
    name = base or adapter.base.get("name_or_path") or public_name(configured if isinstance(configured, str) else None)
    pinned = base is not None and isinstance(revision, str) and revision.isalnum()
    return {
        "kind": "LoRA on experts" if adapter.experts else f"An adapter ({adapter.config.get('peft_type')})",
        "base_name": _name(name),
        "base_id": Markdown(base or "path/to/its/base"),
        "base_revision": Markdown(f', revision="{revision}"' if pinned else ""),
        "ours": variant_of(architecture_of(adapter)) is not None,
        "facts": _present(_adapter_anatomy(adapter, name)),
        "layers": adapter.experts and (_LAYER_HEADER, [_layer_row(layer) for layer in adapter.experts]),
        "others": adapter.others
        and (["module", "numbers"], [[as_code(name), f"{numbers:,}"] for name, numbers in adapter.others.items()]),
        "limits": list(_adapter_limits(adapter, base, name)),
        "versions": {"peft": adapter.config.get("peft_version")},
    }


def _adapter_anatomy(adapter: Adapter, base: str | None) -> Iterator[tuple[Any, Any]]:
    config, recorded = adapter.config, adapter.base
    yield "Base model", _name(base)
    yield "Revision of the base", _name(recorded.get("revision"))
    yield "Class of the base", _name(recorded.get("architecture"))
    yield from _hashes("base", recorded.get("sha256"))
    experts = base_experts(recorded)
    numbers = ", ".join(map(str, sorted(set(experts.values()))))
    yield "Experts of the base", f"{numbers} in each of {len(experts)} sparse layers" if experts else None
    yield "Sparse layers that it adapts", f"{len(adapter.experts)}" + (f" of {len(experts)}" if experts else "")
    yield "Rank", sorted({layer.rank for layer in adapter.experts}) or config.get("r")
    yield "Alpha", config.get("lora_alpha")
    if config.get("peft_type") == "LORA":
        yield "Scale of the update", "alpha / sqrt(rank)" if config.get("use_rslora") else "alpha / rank"
    yield "Dropout in training", adapter.settings.get("lora_dropout", config.get("lora_dropout"))
    yield "Parameters that were trained", f"{adapter.trainable:,}"
    yield "Precision", adapter.dtype


_LAYER_HEADER = ["experts of", "adapted", "projections", "rank", "parameters", "experts that it changes"]


def _layer_row(layer: AdaptedExperts) -> list[Any]:
    numbers = layer.experts or []
    chosen = ", ".join(map(str, numbers)) if 0 < len(numbers) < layer.num_experts else f"all {layer.num_experts}"
    changed = f"{len(layer.moved)} of {layer.num_experts}"
    return [as_code(layer.name), chosen, ", ".join(layer.projections), layer.rank, f"{layer.trainable:,}", changed]


def _adapter_limits(adapter: Adapter, base: str | None, name: str | None) -> Iterator[Markdown]:
    yield Markdown("Use it only with its base model, whose biases it inherits.")
    if base is None:
        yield Markdown(f"Its base{f' (a folder named {_name(name)})' if name else ''} is not known to be on the Hub.")
    if not adapter.base:
        yield Markdown("Nothing that identifies its base is recorded, so that another base goes unnoticed.")
    if adapter.experts and not any(layer.moved for layer in adapter.experts):
        yield Markdown("It changes no expert: all its updates are zero, as before the first step of a training.")


def _training(record: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    training = mapping(record.get("training"))
    if not training:
        return
    steps, seconds = training.get("steps"), training.get("seconds")
    yield "Training data", training.get("data")
    yield "Rows of the training data", training.get("rows")
    yield "Optimizer steps", steps
    if training.get("weights_of_step") != steps:
        yield "Weights of step", training.get("weights_of_step")
    yield "Epochs", training.get("epochs")
    yield "Tokens seen", training.get("tokens")
    yield "Duration in seconds", round(seconds) if _is_number(seconds) else None
    yield "Resumed at step", training.get("resumed_at_steps")
    for name, value in mapping(record.get("hyperparameters")).items():
        yield as_code(name), None if value is False else value
    hardware = mapping(record.get("hardware")).items()
    yield "Hardware", [f"{str(name).replace('_', ' ')} {value}" for name, value in hardware if value is not None]


def _results(record: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    results = mapping(mapping(record.get("evaluation")).get("results"))
    return {part or "all": values for part, values in results.items() if isinstance(values, Mapping) and values}


def _evaluation(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    results, log = _results({"evaluation": evaluation}), evaluation.get("log")
    lines = [line for line in log if isinstance(line, Mapping)] if isinstance(log, list) else []
    shown = [{"part": "all", **{name: value for name, value in line.items() if value}} for line in lines[-LOG_LINES:]]
    names = dict.fromkeys(["step", "epoch", "part", *(name for line in shown for name in line)])
    metrics = dict.fromkeys(metric for values in results.values() for metric in values)
    data = dict.fromkeys(_shown(mapping(of).get("data")) for of in mapping(evaluation.get("data")).values())
    about = {
        "Evaluation data": "; ".join(name for name in data if name),
        "Metrics": evaluation.get("metrics"),
        "Measured on": evaluation.get("date"),
    }
    return {
        "results": results
        and (
            ["part of the evaluation data", *metrics],
            [[part, *(values.get(metric, "–") for metric in metrics)] for part, values in results.items()],
        ),
        "about_evaluation": _present(about.items()) if results else {},
        "evaluation_log": shown and ([*names], [[line.get(name, "–") for name in names] for line in shown]),
        "evaluation_log_length": f" (the last {len(shown)} of {len(lines)})" if len(lines) > len(shown) else "",
    }


def _routing(statistics: Mapping[str, Any]) -> tuple[Any, list[str]]:
    layers = _layers(statistics)
    numbers = ("entropy", "max_violation", "mutual_information")
    rows = [
        [
            f"{layer.get('side')} {layer.get('position')}",
            *(f"{layer[name]:.3f}" if _is_number(layer.get(name)) else "–" for name in numbers),
            "–" if _dead(layer) is None else _dead(layer),
            _bars(layer.get("load")),
        ]
        for layer in layers
    ]
    header = ["layer", "entropy", "MaxVio", "mutual information of part and expert", "dead", "load"]
    return rows and (header, rows), list(mapping(layers[0].get("group_load"))) if layers else []


def _layers(statistics: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    layers = statistics.get("layers")
    return [layer for layer in layers if isinstance(layer, Mapping)] if isinstance(layers, list) else []


def _dead(layer: Mapping[str, Any]) -> int | None:
    return len(dead) if isinstance(dead := layer.get("dead_experts"), list) else None


def _bars(load: object) -> str:
    """The loads of a layer's experts, one bar each, the highest full."""
    loads = [share for share in load if _is_number(share)] if isinstance(load, list) else []
    highest = max(loads, default=0)
    return "".join(BARS[round(share / highest * (len(BARS) - 1))] for share in loads if 0 <= share <= highest > 0)


def _health(record: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """The losses and the routers' state in the last log of a training, without those of single layers."""
    for name, value in mapping(mapping(record.get("training")).get("last_log")).items():
        if re.fullmatch(r"loss|task_loss|aux_loss|z_loss|router/[^/]+", str(name)):
            yield as_code(name), value


def _present(rows: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    """The rows that say something, each value on one line."""
    return {name: _shown(value) for name, value in rows if value is not None and value != [] and value != ""}


def _shown(value: object) -> object:
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def _versions(versions: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version)


def _name(value: object) -> Markdown | None:
    return as_code(value) if isinstance(value, str) and value else None


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST
