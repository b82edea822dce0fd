"""The facts of a card, by the names that its template has for them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from numbers import Number
from typing import Any

from hf_sparse_moe.models.pretrained_model import SparseMoePreTrainedModel
from hf_sparse_moe.models.size import count_flops_per_token, count_parameters
from hf_sparse_moe.stock import explain_export

from .card_metadata import variant_of
from .checkpoint import Checkpoint, mapping
from .escaping import Markdown, as_code, escape_markdown


NOT_RECORDED = "not recorded"
LOG_LINES = 12  # of evaluations in training; the record holds them all
BARS = "▁▂▃▄▅▆▇█"
USES = {
    "AutoModel": "Turning text into vectors, and fine-tuning for other tasks.",
    "AutoModelForMaskedLM": "Filling masked tokens, and fine-tuning for other tasks.",
    "AutoModelForCausalLM": "Continuing text, and fine-tuning for other tasks.",
    "AutoModelForSeq2SeqLM": "Writing one text from another, as it was trained to, and fine-tuning for other pairs.",
    "AutoModelForSequenceClassification": "Labelling texts with the labels of its training.",
    "AutoModelForTokenClassification": "Labelling the words of a text with the labels of its training.",
    "AutoModelForQuestionAnswering": "Finding the answer to a question in a text.",
    "AutoModelForMultipleChoice": "Choosing among answers.",
}


def card_facts(
    checkpoint: Checkpoint, evaluation: Mapping[str, Any], *, license: str | None, language: Iterable[str] | None
) -> dict[str, Any]:
    """
    All that the template prints but the name of the repository. What others wrote is left as it is: the template
    escapes it.

    Args:
        checkpoint ([`Checkpoint`]): The mixture.
        evaluation (`Mapping`): Results that the publisher gave.
        license (`str`, *optional*): As the metadata has it.
        language (`Iterable[str]`, *optional*): As the metadata has it.
    """
    model, receipt, record = checkpoint.model, checkpoint.receipt, checkpoint.record
    source = mapping(receipt.get("source"))
    routing, groups = _routing(checkpoint.routing)
    versions = mapping(record.get("versions")) or mapping(receipt.get("versions"))
    if not versions and model.config.transformers_version:
        versions = {"transformers": model.config.transformers_version}
    training = training_facts(record)
    return {
        "config": model.config,
        "variant": Markdown(variant_of(checkpoint)),
        "served": _served(model.config),
        "facts": dict(_anatomy(checkpoint, source, license, language)),
        "auto_class": Markdown(model._auto_class),
        "intended_use": Markdown(USES.get(str(model._auto_class), "")),
        "source_name": source.get("name_or_path"),
        "upcycled": bool(receipt),
        "receipt": dict(_flat({name: value for name, value in receipt.items() if name != "source"})),
        "training": training,
        "evaluation": evaluation,
        **evaluation_facts(mapping(record.get("evaluation"))),
        "routing": routing,
        "routing_groups": groups,
        "picture": checkpoint.has_picture,
        "health": health_facts(record),
        "limits": list(_limits(checkpoint, bool(training), bool(_results(record) or evaluation))),
        "exports": Markdown(", ".join(map(as_code, explain_export(model).possible))),
        "versions": versions,
    }


def _anatomy(
    checkpoint: Checkpoint, source: Mapping[str, Any], license: str | None, language: Iterable[str] | None
) -> Iterator[tuple[Any, Any]]:
    model, config = checkpoint.model, checkpoint.model.config
    total, active = count_parameters(model), count_parameters(model, only_active=True)
    yield "Variant", variant_of(checkpoint)
    yield "Class", as_code(type(model).__name__)
    yield "Dense architecture", as_code(config.dense_config.model_type)
    name, revision = source.get("name_or_path"), source.get("revision")
    yield "Dense source", as_code(name) if name else NOT_RECORDED
    yield "Revision of the source", as_code(revision) if revision else NOT_RECORDED
    digests = mapping(source.get("sha256"))
    for file, digest in digests.items():
        yield Markdown(f"SHA-256 of the source's {as_code(file)}"), as_code(digest)
    if not digests:
        yield "SHA-256 of the source", NOT_RECORDED
    for side, sparse in _sparse_layers(model):
        yield f"Sparse layers ({side})", sparse
    yield "Experts of a sparse layer", f"{config.num_experts} routed, {config.num_shared_experts} shared"
    yield "Routed experts for a token (top-k)", _served(config)
    yield from _router(config)
    yield "Parameters, total", f"{total:,}"
    yield "Parameters, active for a token", f"{active:,} ({active / total:.1%})"
    flops = "matrix products of one forward pass; attention scores not counted"
    yield "FLOPs for a token", f"{count_flops_per_token(model):,} ({flops})"
    yield "Precision of the weights", checkpoint.dtype or NOT_RECORDED
    yield "Language", ", ".join(language or ()) or NOT_RECORDED
    yield "Licence", license or NOT_RECORDED


def _served(config: Any) -> str:
    mean = config.mean_experts_per_token
    return f"{mean:g}" if config.router_type != "expert_choice" else f"{mean:g} on average"


def _router(config: Any) -> Iterator[tuple[str, str]]:
    weights = "weights normalised to sum 1" if config.norm_topk_prob else "weights not normalised"
    scale = "" if config.routed_scaling_factor == 1 else f", times {config.routed_scaling_factor:g}"
    kind = {
        "top_k": "each token takes its best experts",
        "expert_choice": "each expert takes its best tokens",
        "hash": "the token's id decides",
    }[config.router_type]
    yield "Router", f"{config.router_type} ({kind}), {config.scoring_func}, {weights}{scale}"
    if config.router_type == "top_k":
        capacity = config.capacity_factor
        yield (
            "Capacity of an expert in training",
            (
                "no limit, nothing is dropped"
                if capacity is None
                else f"{capacity:g} times an even load; the rest is dropped"
            ),
        )
        groups = f"at most {config.topk_group} of {config.n_group} for a token" if config.n_group > 1 else "none"
        yield "Groups of experts", groups
    if config.scoring_func == "sigmoid":
        speed = config.router_bias_update_speed
        moved = f"moved by {speed:g} a step towards an even load" if speed else "not moved in training"
        yield "Selection bias of an expert", moved
    scope = config.balance_scope.replace("_", " ")
    balance = (
        f"coefficient {config.router_aux_loss_coef:g}, over the {scope}" if config.router_aux_loss_coef else "off"
    )
    yield "Load-balancing loss", balance


def _sparse_layers(model: SparseMoePreTrainedModel) -> Iterator[tuple[str, str]]:
    for field, side in model.config._layer_type_fields.items():
        sparse = sum(block.side == side for block in model.sparse_blocks)
        layer_types = getattr(model.config, field)
        if layer_types is None:
            yield side, f"all {sparse}"
        else:
            indices = [str(layer) for layer, kind in enumerate(layer_types) if kind == "sparse"]
            yield side, f"{sparse} of {len(layer_types)}: {', '.join(indices) or 'none'} (counted from 0)"


def training_facts(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a training record says of the training."""
    training = mapping(record.get("training"))
    if not training:
        return {}
    seconds, resumed = training.get("seconds"), training.get("resumed_at_steps")
    rows = {
        "Training data": _shown(training.get("data")),
        "Rows of the training data": _shown(training.get("rows")),
        "Optimizer steps": _shown(training.get("steps")),
        "Weights of step": _shown(training.get("weights_of_step")),
        "Epochs": _shown(training.get("epochs")),
        "Tokens seen": _shown(training.get("tokens")),
        "Duration": NOT_RECORDED if seconds is None else f"{_shown(seconds)} s",
    }
    if resumed:
        rows["Interrupted, and resumed at step"] = _shown(resumed)
    settings: dict[str, Any] = {as_code(name): value for name, value in mapping(record.get("hyperparameters")).items()}
    hardware = {
        f"hardware: {name.replace('_', ' ')}": value for name, value in mapping(record.get("hardware")).items()
    }
    return rows | {name: _shown(value) for name, value in (settings | hardware).items() if value is not None}


def _results(record: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    results = mapping(mapping(record.get("evaluation")).get("results"))
    return {part or "all": values for part, values in results.items() if isinstance(values, Mapping) and values}


def evaluation_facts(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """What a training record says of the results, as the templates print it."""
    results = _results({"evaluation": evaluation})
    log = evaluation.get("log")
    lines = [line for line in log if isinstance(line, Mapping)] if isinstance(log, list) else []
    names = list(dict.fromkeys(name for line in lines for name in line if name not in ("step", "epoch", "part")))
    metrics = list(dict.fromkeys(metric for values in results.values() for metric in values))
    data = dict.fromkeys(_shown(mapping(entry).get("data")) for entry in mapping(evaluation.get("data")).values())
    shown = lines[-LOG_LINES:]
    rows = [[*map(_shown, (line.get("step"), line.get("epoch"), line.get("part") or "all"))] for line in shown]
    return {
        "results": results
        and (
            ["part of the evaluation data", *metrics],
            [[part, *(values.get(metric, "–") for metric in metrics)] for part, values in results.items()],
        ),
        "evaluation_data": "; ".join(data) or NOT_RECORDED,
        "evaluation_date": evaluation.get("date") or NOT_RECORDED,
        "evaluation_log": lines
        and (
            ["step", "epoch", "part", *names],
            [[*row, *(line.get(name, "–") for name in names)] for row, line in zip(rows, shown, strict=True)],
        ),
        "evaluation_log_length": f" (the last {len(shown)} of {len(lines)} evaluations)" if lines != shown else "",
    }


def _routing(statistics: Mapping[str, Any]) -> tuple[Any, list[str]]:
    layers = _layers(statistics)
    numbers = ("entropy", "max_violation", "mutual_information")
    rows = [
        [
            f"{layer.get('side')} {layer.get('position')}",
            *(_rounded(layer.get(name)) for name in numbers),
            _shown(_dead(layer)),
            _bars(layer.get("load")),
        ]
        for layer in layers
    ]
    header = ["layer", "entropy", "MaxVio", "information that part and expert share", "dead", "load"]
    return rows and (header, rows), list(mapping(layers[0].get("group_load"))) if layers else []


def _layers(statistics: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    layers = statistics.get("layers")
    return [layer for layer in layers if isinstance(layer, Mapping)] if isinstance(layers, list) else []


def _dead(layer: Mapping[str, Any]) -> int | None:
    return len(dead) if isinstance(dead := layer.get("dead_experts"), list) else None


def _bars(load: object) -> str:
    """The loads of a layer's experts, one bar each, the highest full."""
    loads = [share for share in load if isinstance(share, int | float)] if isinstance(load, list) else []
    highest = max(loads, default=0)
    return "".join(BARS[round(share / highest * (len(BARS) - 1))] for share in loads if 0 <= share <= highest > 0)


def health_facts(record: Mapping[str, Any]) -> dict[str, Any]:
    """The losses and the routers' state in the last log of a training record."""
    log = mapping(mapping(record.get("training")).get("last_log"))
    wanted = re.compile(r"loss|task_loss|aux_loss|z_loss|router/[^/]+")  # no single layers
    return {
        as_code(name): value
        for name, value in log.items()
        if isinstance(value, Number | str) and wanted.fullmatch(name)
    }


def _limits(checkpoint: Checkpoint, trained: bool, measured: bool) -> Iterator[Markdown]:
    model, config = checkpoint.model, checkpoint.model.config
    yield Markdown(
        f"All {count_parameters(model):,} parameters must be in memory, though "
        f"{count_parameters(model, only_active=True):,} serve a token."
    )
    if name := mapping(checkpoint.receipt.get("source")).get("name_or_path"):
        yield Markdown(f"It began as {escape_markdown(name)}, with all that this had learnt, wanted or not.")
    if not trained:
        yield Markdown("Whether it was trained since it became a mixture is not recorded.")
    if not measured:
        yield Markdown("No result is recorded: how good it is, in any language or domain, is not known.")
    else:
        yield Markdown("It was measured on the data above alone; other languages, domains and tasks were not.")
    if dead := sum(_dead(layer) or 0 for layer in _layers(checkpoint.routing)):
        yield Markdown(f"No token of the text that was counted reached {dead} of the experts: they cost memory alone.")
    if config.router_type == "top_k" and config.capacity_factor is not None:
        yield Markdown("In training, tokens beyond an expert's capacity were dropped; at inference none is.")
    if config.router_type == "expert_choice":
        yield Markdown("An expert chooses among all tokens of a sequence, so what a token gets depends on the others.")


def _shown(value: object) -> str:
    if value is None or value == []:
        return NOT_RECORDED
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _rounded(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else NOT_RECORDED


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from _flat(item, f"{prefix}{key}.")
        elif item is not None:
            yield f"{prefix}{key}", json.dumps(item) if isinstance(item, list | bool) else item
