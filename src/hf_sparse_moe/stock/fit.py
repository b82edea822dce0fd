"""Whether a mixture is isomorphic to a stock architecture, and what stands in the way."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from hf_sparse_moe.checkpoints.config import read_mixture_config, sensible_config
from hf_sparse_moe.checkpoints.source import Source, named_architecture
from hf_sparse_moe.models.configuration_sparse_moe import SparseMoeConfig
from hf_sparse_moe.models.pretrained_model import SparseMoePreTrainedModel
from hf_sparse_moe.models.quantization import packed_bits
from hf_sparse_moe.models.size import meta_model

from .targets import EXPORT_TARGETS, ExportTarget
from .tensors import layer_of, part_to_target, parts_of, stored_tensors


# Only training reads them; a router with a capacity drops in training alone.
TRAINING_FIELDS = {
    "initializer_range", "embedding_initializer_range", "pretraining_tp", "classifier_dropout", "num_mtp_layers",
    "router_jitter_noise", "router_aux_loss_coef", "router_z_loss_coef", "router_bias_update_speed", "balance_scope",
    "capacity_factor", "expert_dropout", "output_router_logits",
}  # fmt: skip
# A row's needs, or the comparison of tensors, speak for these.
_SAID_OTHERWISE = {
    "layer_types", "sliding_window", "max_window_layers", "use_sliding_window", "head_dim", "mlp_bias",
    "intermediate_size", "d_ff", "feed_forward_proj",
}  # fmt: skip
_OUR_FIELDS = {
    "dense_config", "num_experts", "num_experts_per_tok", "moe_intermediate_size", "num_shared_experts",
    "shared_expert_gate", "scoring_func", "norm_topk_prob", "n_group", "topk_group", "routed_scaling_factor",
    "mlp_layer_types", "encoder_mlp_layer_types", "decoder_mlp_layer_types", "is_encoder_decoder",
}  # fmt: skip
# What `PreTrainedConfig` itself holds and a checkpoint of the target needs.
COMMON_FIELDS = (
    "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "dtype",
)  # fmt: skip
GROUPS = ("n_group", "topk_group")
_LOSS_COEFFICIENTS = ("router_aux_loss_coef", "router_z_loss_coef")
_LANGUAGE_MODELS = (None, "SparseMoeDecoderForCausalLM", "SparseMoeEncoderDecoderForConditionalGeneration")
# Units of a shared expert of zeros where the target names its size: enough for tensor parallelism to divide.
_ZERO_EXPERT_UNITS = 64


@dataclass(frozen=True)
class TargetReport:
    """A stock architecture or a server: what stands in the way, or, where nothing does, the config that it gets."""

    target: str
    obstacles: tuple[str, ...]
    config: PreTrainedConfig | None = None
    notes: tuple[str, ...] = ()

    @property
    def possible(self) -> bool:
        return not self.obstacles


@dataclass(frozen=True)
class ExportExplanation:
    """
    What [`explain_export`] or [`explain_serving`] found.

    Args:
        source (`str`): The dense architecture inside the mixture.
        targets (`tuple[TargetReport, ...]`): The siblings of that architecture first; or the servers.
    """

    source: str
    targets: tuple[TargetReport, ...]

    @property
    def possible(self) -> list[str]:
        """The targets that `export` can write, the preferred one first."""
        return [report.target for report in self.targets if report.possible]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: what is possible, and what stands in the way of the others."""
        obstacles = {report.target: list(report.obstacles) for report in self.targets if not report.possible}
        return {"source": self.source, "possible": self.possible, "obstacles": obstacles}

    def __getitem__(self, target: str) -> TargetReport:
        for report in self.targets:
            if report.target == target:
                return report
        known = [report.target for report in self.targets]
        raise KeyError(f"No mixture is written as `{target}`. Choose one of {known}.")

    def __str__(self) -> str:
        lines = [f"{self.source} mixture: {', '.join(self.possible) or 'none'}"]
        for report in self.targets:
            model_type = getattr(report.config, "model_type", report.target)
            found = ("possible" if model_type == report.target else f"as {model_type}", *report.notes)
            lines.append(f"{report.target}: {'; '.join(report.obstacles or found)}")
        return "\n".join(lines)


def explain_export(
    source: SparseMoePreTrainedModel | SparseMoeConfig | str | Path,
    *,
    revision: str | None = None,
    token: bool | str | None = None,
) -> ExportExplanation:
    """
    For each architecture that `export` writes, whether a mixture can become one, or what stands in the way.

    Args:
        source (`SparseMoePreTrainedModel`, `SparseMoeConfig`, `str` or `Path`): A mixture, its config, or the folder
            or Hub id of one.
        revision (`str`, *optional*): Branch, tag or commit of a Hub id.
        token (`bool` or `str`, *optional*): For the Hub; defaults to that of `hf auth login`.

    Returns:
        [`ExportExplanation`]: prints as a list; `report.possible` names the targets, `report["mixtral"].obstacles`
        says why not. Reads no weights.

    Example:
        ```python
        print(explain_export("qwen3-8x"))
        ```
    """
    config, saved_as = config_of(source, revision, token)
    dense = config.dense_config.model_type
    siblings_first = sorted(EXPORT_TARGETS, key=lambda target: dense not in target.dense)
    return explanation(config, [check_fit(target, config, saved_as) for target in siblings_first])


def explanation(config: SparseMoeConfig, reports: list[TargetReport]) -> ExportExplanation:
    """Of reports on a mixture; nothing is written of packed experts."""
    if packed_bits(config) is not None:
        obstacle = "its experts are packed: export what the loaded model's `dequantize()` returns"
        reports = [TargetReport(report.target, (obstacle, *report.obstacles)) for report in reports]
    return ExportExplanation(config.dense_config.model_type, tuple(reports))


def config_of(
    source: SparseMoePreTrainedModel | SparseMoeConfig | Source | str | Path,
    revision: str | None = None,
    token: bool | str | None = None,
) -> tuple[SparseMoeConfig, str | None]:
    """The config of a mixture, given as model, config, folder or Hub id, and the class that it was saved with."""
    if isinstance(source, SparseMoePreTrainedModel):
        config: Any = source.config
        return config, type(source).__name__
    config = source if isinstance(source, SparseMoeConfig) else read_mixture_config(source, revision, token)
    return config, named_architecture(config)


def check_fit(target: ExportTarget, config: SparseMoeConfig, saved_as: str | None = None) -> TargetReport:
    """Whether the mixture of `config`, saved as the class `saved_as`, is isomorphic to `target`."""
    dense = config.dense_config.model_type
    if dense not in target.dense:
        siblings = " and ".join(target.dense)
        return TargetReport(target.model_type, (f"it is the sparse sibling of {siblings}, not of {dense}",))
    with sensible_config(str(config.name_or_path)):
        model = meta_model(config)
    obstacles, stock_config = _obstacles(target, config, model, saved_as), None
    if not obstacles:
        with sensible_config(str(config.dense_config.name_or_path or config.name_or_path or dense)):
            stock_config = _stock_config(target, config, model)
            stock = empty_model(stock_config)
        stock_config.architectures = [type(stock).__name__]
        obstacles = _unplaced_tensors(target, model, stock)
    return TargetReport(target.model_type, tuple(obstacles), None if obstacles else stock_config)


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The language model of a stock config, without storage."""
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        return auto_class.from_config(config)


def own_fields(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """The fields that a config class adds to `PreTrainedConfig`, with their defaults."""
    fields = config_class.__dataclass_fields__
    return {name: fields[name].default for name in fields if name not in PreTrainedConfig.__dataclass_fields__}


def _obstacles(
    target: ExportTarget, config: SparseMoeConfig, model: SparseMoePreTrainedModel, saved_as: str | None
) -> list[str]:
    """What the configs alone say against a target."""
    name, dense, kinds = target.model_type, config.dense_config, ("plain (up, down)", "gated (gate, up, down)")
    scoring, shared = config.scoring_func, config.num_shared_experts
    normalised = target.router.get(scoring)
    experts = model.sparse_blocks[0].experts if model.sparse_blocks else None
    conditions = [
        (saved_as not in _LANGUAGE_MODELS, f"`{saved_as}` is not a language model: only those are exported"),
        (scoring not in target.router, f"`scoring_func={scoring!r}`: {name} has {' or '.join(target.router)}"),
        (
            normalised is not None and normalised != config.norm_topk_prob,
            f"`norm_topk_prob={config.norm_topk_prob}`: {name} always has {normalised}",
        ),
        (
            target.scaling_field is None and config.routed_scaling_factor != 1,
            f"`routed_scaling_factor={config.routed_scaling_factor}`: {name} has no such factor",
        ),
        (
            target.top_k not in (None, config.num_experts_per_tok),
            f"`num_experts_per_tok={config.num_experts_per_tok}`: {name} always takes {target.top_k}",
        ),
        (
            config.num_experts_per_layer is not None,
            f"`num_experts_per_layer={config.num_experts_per_layer}`: {name} has as many in each layer",
        ),
        (
            config.num_experts < target.min_experts * config.n_group,
            f"`num_experts={config.num_experts}`: {name} needs at least {target.min_experts * config.n_group}",
        ),
        (config.n_group > 1 and not target.grouped, f"`n_group={config.n_group}`: {name} has no groups of experts"),
        (shared > 0 and target.shared is None, f"`num_shared_experts={shared}`: {name} has no shared experts"),
        (
            config.shared_expert_gate and not (target.shared and target.shared.gate),
            f"`shared_expert_gate=True`: {name} does not weigh its shared experts",
        ),
        (
            shared > 1 and target.shared is not None and target.shared.only_one,
            f"`num_shared_experts={shared}`: {name} has exactly one, of a routed expert's size",
        ),
        (experts is None, "`mlp_layer_types`: no layer is sparse"),
        (experts is not None and experts.biased, f"biased experts: those of {name} have no biases"),
        (
            experts is not None and experts.gated != target.gated,
            f"{kinds[not target.gated]} experts: those of {name} are {kinds[target.gated]}",
        ),
    ]
    for need in target.needs:
        if hasattr(dense, need.field) and dense.model_type in (need.siblings or target.dense):
            value = getattr(dense, need.field)
            conditions.append((not need.holds(value), f"`{need.field}={value!r}`: {name} has {need.why}"))
    return [obstacle for stands, obstacle in conditions if stands] + _unknown_fields(target, config)


def _unknown_fields(target: ExportTarget, config: SparseMoeConfig) -> list[str]:
    """Fields that the target lacks, with a value other than their default."""
    dense = config.dense_config
    known = TRAINING_FIELDS | _SAID_OTHERWISE | {need.field for need in target.needs}
    known |= {*CONFIG_MAPPING[target.model_type].__dataclass_fields__, *target.derived(dense)}
    return [
        f"`{field}={getattr(part, field)!r}`: {target.model_type} has no such field"
        for part, without in ((config, TRAINING_FIELDS | _OUR_FIELDS), (dense, known))
        for field, default in own_fields(type(part)).items()
        if field not in without and getattr(part, field) != default
    ]


def _stock_config(target: ExportTarget, config: SparseMoeConfig, model: SparseMoePreTrainedModel) -> PreTrainedConfig:
    dense, config_class, shared = config.dense_config, CONFIG_MAPPING[target.model_type], target.shared
    theirs = own_fields(config_class)
    # None may mean something else than the target's default does.
    fields: dict[Any, Any] = {name: getattr(dense, name) for name in own_fields(type(dense)) if name in theirs}
    for name in (*COMMON_FIELDS, "head_dim"):
        if getattr(dense, name, None) is not None:
            fields[name] = getattr(dense, name)
    if "head_dim" in theirs:
        fields.setdefault("head_dim", dense.hidden_size // dense.num_attention_heads)
    fields |= {**target.fixed, **target.dense[dense.model_type], **target.derived(dense)}
    size, count = model.sparse_blocks[0].experts.intermediate_dim, config.num_shared_experts
    fields |= dict(zip(target.fields, (config.num_experts, config.num_experts_per_tok, size), strict=True))
    if target.router[config.scoring_func] is None:
        fields["norm_topk_prob"] = config.norm_topk_prob
    if target.grouped:
        fields |= {name: getattr(config, name) for name in GROUPS}
    if target.topk_methods:
        fields["topk_method"] = target.topk_methods[config.n_group > 1]
    fields[target.scoring_field] = config.scoring_func
    fields[target.scaling_field] = float(config.routed_scaling_factor)
    if shared:
        fields[shared.count_field] = count or int(shared.required)
        fields[shared.size_field] = count * size or _ZERO_EXPERT_UNITS * shared.required
    fields |= target.layers(_layer_types(config, model)) | {"dtype": config.dtype}
    fields |= {name: getattr(config, name) for name in _LOSS_COEFFICIENTS if name in theirs}
    fields |= {"num_mtp_layers": 0} if "num_mtp_layers" in theirs else {}  # the export holds none
    fields.pop(None, None)  # what the target has no name for
    return config_class(**fields)


def _layer_types(config: SparseMoeConfig, model: SparseMoePreTrainedModel) -> dict[str, list[str]]:
    counts = {side: sum(block.side == side for block in model.sparse_blocks) for side in ("encoder", "decoder")}
    return {
        side: getattr(config, field) or ["sparse"] * counts[side] for field, side in config._layer_type_fields.items()
    }


def _unplaced_tensors(target: ExportTarget, ours: SparseMoePreTrainedModel, theirs: PreTrainedModel) -> list[str]:
    """Tensors without a place on the other side, or of another shape there."""
    name = target.model_type
    wanted = {key: tensor.shape for key, tensor in stored_tensors(theirs).items()}
    parts = parts_of(ours)
    sparse = {f"{layer_of(path)}.{target.router_name}" for path, _ in parts if path}
    if sparse != {key for key in wanted if key.endswith(f".{target.router_name}")}:
        return [f"the choice of sparse layers: {name} cannot leave exactly these layers dense"]
    state = ours.state_dict()
    found: dict[str, torch.Size] = {}
    for path, keys in parts:
        converted = part_to_target(target, path, {key: state[key] for key in keys}, wanted)
        found |= {key: tensor.shape for key, tensor in converted.items()}
    obstacles = [f"`{key}` has no place in {name}" for key in sorted(found.keys() - wanted.keys())]
    obstacles += [f"{name} needs `{key}`" for key in sorted(wanted.keys() - found.keys())]
    obstacles += [
        f"`{key}` is {tuple(found[key])}, in {name} {tuple(wanted[key])}"
        for key in sorted(found.keys() & wanted.keys())
        if found[key] != wanted[key]
    ]
    return obstacles[:3]
