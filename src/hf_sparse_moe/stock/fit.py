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

from hf_sparse_moe.checkpoints.config import read_config, sensible_config
from hf_sparse_moe.models.configuration_sparse_moe import SparseMoeConfig
from hf_sparse_moe.models.moe_block import SparseMoeBlock
from hf_sparse_moe.models.pretrained_model import SparseMoePreTrainedModel
from hf_sparse_moe.models.size import meta_model

from .targets import EXPORT_TARGETS, ExportTarget
from .tensors import ZERO_EXPERT_UNITS, target_name, to_target
from .without_sibling import WITHOUT_SIBLING


# Only training reads them.
TRAINING_FIELDS = {
    "initializer_range",
    "embedding_initializer_range",
    "pretraining_tp",
    "classifier_dropout",
    "num_mtp_layers",
    "router_jitter_noise",
    "router_aux_loss_coef",
    "router_z_loss_coef",
    "router_bias_update_speed",
    "balance_scope",
    "capacity_factor",  # of a router that drops, which it does in training alone
    "expert_dropout",
    "output_router_logits",
}
# A row's needs, or the comparison of tensors, speak for these.
_SAID_OTHERWISE = {
    "layer_types",
    "sliding_window",
    "max_window_layers",
    "use_sliding_window",
    "head_dim",
    "mlp_bias",
    "intermediate_size",
    "d_ff",
    "feed_forward_proj",
}
_OUR_FIELDS = {
    "dense_config",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "num_shared_experts",
    "scoring_func",
    "norm_topk_prob",
    "routed_scaling_factor",
    "mlp_layer_types",
    "encoder_mlp_layer_types",
    "decoder_mlp_layer_types",
    "is_encoder_decoder",
}
# What `PreTrainedConfig` itself holds and a checkpoint of the target needs.
COMMON_FIELDS = (
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "decoder_start_token_id",
    "dtype",
)
_LANGUAGE_MODELS = ("SparseMoeDecoderForCausalLM", "SparseMoeEncoderDecoderForConditionalGeneration")


@dataclass(frozen=True)
class TargetReport:
    """One stock architecture: what stands in the way, or, where nothing does, the config that it gets."""

    target: str
    obstacles: tuple[str, ...]
    config: PreTrainedConfig | None = None

    @property
    def possible(self) -> bool:
        return not self.obstacles


@dataclass(frozen=True)
class ExportExplanation:
    """
    What [`explain_export`] found.

    Args:
        source (`str`): The dense architecture inside the mixture.
        targets (`tuple[TargetReport, ...]`): The siblings of that architecture first.
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
        return next(report for report in self.targets if report.target == target)

    def __str__(self) -> str:
        lines = [f"{self.source} mixture: {', '.join(self.possible) or 'no stock architecture'}"]
        for report in self.targets:
            lines.append(f"{report.target}: {'possible' if report.possible else '; '.join(report.obstacles)}")
        return "\n".join(lines)


def explain_export(
    source: SparseMoePreTrainedModel | SparseMoeConfig | str | Path,
    *,
    revision: str | None = None,
    token: bool | str | None = None,
) -> ExportExplanation:
    """
    For each mixture architecture of transformers, whether a mixture can be written as one, and what stands in the way.

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
    config, architecture = config_of(source, revision, token)
    reports = [check_target(target, config, architecture) for target in EXPORT_TARGETS]
    dense = config.dense_config.model_type
    siblings = {target.model_type for target in EXPORT_TARGETS if dense in target.dense}
    reports.sort(key=lambda report: report.target not in siblings)
    others = [TargetReport(name, (reason,)) for name, reason in WITHOUT_SIBLING.items()]
    return ExportExplanation(dense, (*reports, *others))


def check_target(target: ExportTarget, config: SparseMoeConfig, architecture: str | None = None) -> TargetReport:
    """Whether the mixture of `config`, saved as class `architecture`, is isomorphic to `target`."""
    dense = config.dense_config
    if dense.model_type not in target.dense:
        return _report(
            target, [f"it is the sparse sibling of {' and '.join(target.dense)}, not of {dense.model_type}"]
        )
    obstacles = []
    if architecture is not None and architecture not in _LANGUAGE_MODELS:
        obstacles.append(f"`{architecture}` is not a language model: only those are exported")
    with sensible_config(str(config.name_or_path)):
        model = meta_model(config)
    obstacles += [*_router_obstacles(target, config), *_expert_obstacles(target, model)]
    for need in target.needs:
        if hasattr(dense, need.field) and not need.holds(getattr(dense, need.field)):
            obstacles.append(f"`{need.field}={getattr(dense, need.field)!r}`: {target.model_type} has {need.why}")
    obstacles += _unknown_fields(target, dense)
    if obstacles:
        return _report(target, obstacles)
    target_config = _target_config(target, config, model)
    obstacles = _structure_obstacles(target, model, empty_model(target_config))
    return _report(target, obstacles, None if obstacles else target_config)


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The language model of a stock config, without storage."""
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        return auto_class.from_config(config)


def stored_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What a checkpoint of `model` holds: its state without tied copies."""
    return {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}


def block_paths(model: SparseMoePreTrainedModel) -> list[str]:
    """Where the sparse blocks are."""
    return [path for path, module in model.named_modules() if isinstance(module, SparseMoeBlock)]


def layer_path(block_path: str) -> str:
    """Where the layer of a block is, in the target."""
    return block_path.removeprefix("dense.").rpartition(".")[0]


def in_layer(names: dict[str, Any], layer: str) -> dict[str, Any]:
    """The entries below `layer`, by their names from there."""
    return {name.removeprefix(f"{layer}."): value for name, value in names.items() if name.startswith(f"{layer}.")}


def config_of(
    source: Any, revision: str | None = None, token: bool | str | None = None
) -> tuple[SparseMoeConfig, str | None]:
    """The config of a mixture, given as model, config, folder or Hub id, and the class that it was saved with."""
    if isinstance(source, SparseMoePreTrainedModel):
        config: Any = source.config
        return config, type(source).__name__
    config = source if isinstance(source, PreTrainedConfig) else read_config(source, revision, token)
    if not isinstance(config, SparseMoeConfig):
        raise ValueError(
            f"`{config.model_type}` is not a mixture of this package. Pass one, such as `upcycle` makes; to read a "
            "stock mixture use `import_stock`."
        )
    return config, next(iter(config.architectures or ()), None)


def _report(target: ExportTarget, obstacles: list[str], config: PreTrainedConfig | None = None) -> TargetReport:
    return TargetReport(target.model_type, tuple(obstacles), config)


def _router_obstacles(target: ExportTarget, config: SparseMoeConfig) -> list[str]:
    name, obstacles = target.model_type, []
    if config.scoring_func not in target.router:
        obstacles.append(f"`scoring_func={config.scoring_func!r}`: {name} has {' or '.join(target.router)}")
    normalised = target.router.get(config.scoring_func)
    if normalised is not None and normalised != config.norm_topk_prob:
        obstacles.append(f"`norm_topk_prob={config.norm_topk_prob}`: {name} always has {normalised}")
    if target.scaling_field is None and config.routed_scaling_factor != 1:
        obstacles.append(f"`routed_scaling_factor={config.routed_scaling_factor}`: {name} has no such factor")
    if target.top_k is not None and config.num_experts_per_tok != target.top_k:
        obstacles.append(f"`num_experts_per_tok={config.num_experts_per_tok}`: {name} always takes {target.top_k}")
    if config.num_experts < target.min_experts:
        obstacles.append(f"`num_experts={config.num_experts}`: {name} needs at least {target.min_experts}")
    shared = config.num_shared_experts
    if shared and target.shared is None:
        obstacles.append(f"`num_shared_experts={shared}`: {name} has no shared experts")
    elif shared > 1 and target.shared is not None and target.shared.only_one:
        obstacles.append(f"`num_shared_experts={shared}`: {name} has exactly one, of a routed expert's size")
    known = _OUR_FIELDS | TRAINING_FIELDS
    return obstacles + [
        f"`{field}={getattr(config, field)!r}`: {name} has no such field"
        for field, default in own_fields(type(config)).items()
        if field not in known and getattr(config, field) != default
    ]


def _expert_obstacles(target: ExportTarget, model: SparseMoePreTrainedModel) -> list[str]:
    blocks = model.sparse_blocks
    if not blocks:
        return ["`mlp_layer_types`: no layer is sparse"]
    obstacles = []
    if blocks[0].experts.biased:
        obstacles.append(f"biased experts: those of {target.model_type} have no biases")
    if blocks[0].experts.gated != target.gated:
        kinds = ("plain (up, down)", "gated (gate, up, down)")
        obstacles.append(f"{kinds[not target.gated]} experts: those of {target.model_type} are {kinds[target.gated]}")
    return obstacles


def _unknown_fields(target: ExportTarget, dense: PreTrainedConfig) -> list[str]:
    """Fields of the dense config that the target lacks, with a value other than their default."""
    known = TRAINING_FIELDS | _SAID_OTHERWISE | {need.field for need in target.needs}
    known |= set(CONFIG_MAPPING[target.model_type].__dataclass_fields__)
    known |= set(target.derived(dense)) if target.derived else set()
    return [
        f"`{field}={getattr(dense, field)!r}`: {target.model_type} has no such field"
        for field, default in own_fields(type(dense)).items()
        if field not in known and getattr(dense, field) != default
    ]


def own_fields(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """The fields that a config class adds to `PreTrainedConfig`, with their defaults."""
    fields = config_class.__dataclass_fields__
    return {name: fields[name].default for name in fields if name not in PreTrainedConfig.__dataclass_fields__}


def _target_config(target: ExportTarget, config: SparseMoeConfig, model: SparseMoePreTrainedModel) -> PreTrainedConfig:
    dense, config_class = config.dense_config, CONFIG_MAPPING[target.model_type]
    copied = [*(set(own_fields(type(dense))) & set(config_class.__dataclass_fields__)), *COMMON_FIELDS, "head_dim"]
    fields = {name: getattr(dense, name) for name in copied if getattr(dense, name, None) is not None}
    # None may mean something else than the target's default does.
    fields |= {
        name: None for name in own_fields(config_class) if name in own_fields(type(dense)) and name not in fields
    }
    if "head_dim" in config_class.__dataclass_fields__:
        fields.setdefault("head_dim", dense.hidden_size // dense.num_attention_heads)
    fields |= {**target.fixed, **target.dense[dense.model_type]}
    if target.derived:
        fields |= target.derived(dense)
    size = model.sparse_blocks[0].experts.intermediate_dim
    sizes = (config.num_experts, config.num_experts_per_tok, size)
    fields |= {name: value for name, value in zip(target.fields, sizes, strict=True) if name is not None}
    if target.router[config.scoring_func] is None:
        fields["norm_topk_prob"] = config.norm_topk_prob
    if target.scoring_field:
        fields[target.scoring_field] = config.scoring_func
    if target.scaling_field:
        fields[target.scaling_field] = float(config.routed_scaling_factor)
    if target.shared:
        count = config.num_shared_experts
        if target.shared.count_field:
            fields[target.shared.count_field] = count or int(target.shared.required)
        if target.shared.size_field:
            fields[target.shared.size_field] = count * size or ZERO_EXPERT_UNITS * target.shared.required
    fields |= target.layers(_layers(config, model))
    fields["dtype"] = config.dtype
    result = config_class(**fields)
    result.architectures = [type(empty_model(result)).__name__]
    return result


def _layers(config: SparseMoeConfig, model: SparseMoePreTrainedModel) -> dict[str, list[str]]:
    counts = {side: sum(block.side == side for block in model.sparse_blocks) for side in ("encoder", "decoder")}
    return {
        side: getattr(config, field) or ["sparse"] * counts[side] for field, side in config._layer_type_fields.items()
    }


def _structure_obstacles(target: ExportTarget, ours: SparseMoePreTrainedModel, theirs: PreTrainedModel) -> list[str]:
    """Tensors without a place on the other side, or of another shape there."""
    wanted = {name: tensor.shape for name, tensor in stored_tensors(theirs).items()}
    state = stored_tensors(ours)
    paths = block_paths(ours)
    dense_layers = [f"{layer_path(path)}.{target.router_name}" not in wanted for path in paths]
    routers = sum(name.endswith(f".{target.router_name}") for name in wanted)
    if any(dense_layers) or routers != len(paths):
        return [f"the choice of sparse layers: {target.model_type} cannot leave exactly these layers dense"]
    found: dict[str, torch.Size] = {}
    for path in paths:
        layer = layer_path(path)
        block = to_target(target, in_layer(state, path), in_layer(wanted, layer))
        found |= {f"{layer}.{name}": tensor.shape for name, tensor in block.items()}
    inside = tuple(f"{path}." for path in paths)
    found |= {target_name(target, name): tensor.shape for name, tensor in state.items() if not name.startswith(inside)}
    obstacles = [f"`{name}` has no place in {target.model_type}" for name in sorted(found.keys() - wanted.keys())]
    obstacles += [f"{target.model_type} needs `{name}`" for name in sorted(wanted.keys() - found.keys())]
    obstacles += [
        f"`{name}` is {tuple(found[name])}, in {target.model_type} {tuple(wanted[name])}"
        for name in sorted(found.keys() & wanted.keys())
        if found[name] != wanted[name]
    ]
    return obstacles[:3]
