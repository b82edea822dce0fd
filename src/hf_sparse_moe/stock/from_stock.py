"""`import_stock`: a stock mixture becomes one of ours, by the rows of `targets` read backwards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
from transformers.utils import logging

from hf_sparse_moe.checkpoints.config import read_config, sensible_config
from hf_sparse_moe.checkpoints.families import check_not_quantised
from hf_sparse_moe.checkpoints.folder import check_target, write_checkpoint
from hf_sparse_moe.checkpoints.source import Source, find_source
from hf_sparse_moe.models.configuration_sparse_moe import SparseMoeConfig
from hf_sparse_moe.models.modeling_sparse_moe import (
    SparseMoeDecoderForCausalLM,
    SparseMoeEncoderDecoderForConditionalGeneration,
)
from hf_sparse_moe.models.pretrained_model import SparseMoePreTrainedModel
from hf_sparse_moe.models.size import count_flops_per_token, count_parameters
from hf_sparse_moe.upcycling.conversion import check_same_tensors, load_mixture
from hf_sparse_moe.upcycling.in_memory import check_unwrapped
from hf_sparse_moe.upcycling.mixtures import UpcycleReport
from hf_sparse_moe.upcycling.receipt import describe_source, output_difference, versions

from .fit import COMMON_FIELDS, GROUPS, TRAINING_FIELDS, check_fit, empty_model, own_fields
from .targets import EXPORT_TARGETS, LARGEST_CAPACITY, ExportTarget
from .tensors import SCORE_BIAS, Tensors, block_from_target, in_layer, our_name, stored_tensors


logger = logging.get_logger(__name__)

# Fields of a stock config that change nothing that the tensors' shapes, or a warning, do not say.
_NO_MATTER = TRAINING_FIELDS | {
    "add_router_probs", "router_ignore_padding_tokens", "prefix_dense_intermediate_size", "expert_capacity",
}  # fmt: skip


class ImportReport(UpcycleReport):
    """What [`import_stock`] wrote."""


def import_stock(
    source: PreTrainedModel | str | Path,
    output: str | Path | None = None,
    *,
    revision: str | None = None,
    token: bool | str | None = None,
    dtype: str | torch.dtype = "auto",
    max_shard_size: int | str = "4GB",
    **config_fields,
) -> Any:
    """
    Read a stock mixture (Mixtral, Qwen3-MoE, OLMoE, Switch Transformers, ...) into this package's classes, so that its
    tools serve it. Outputs are the stock model's; the receipt, `model.receipt`, holds the measured difference.

    The stock model is loaded by transformers and stays in memory until the receipt is measured. Does not take over how
    the stock model computes its balance loss, nor the capacity above which Switch Transformers drops tokens.

    Args:
        source (`PreTrainedModel`, `str` or `Path`): A stock mixture, which is left as it is, or the folder or Hub id
            of one.
        output (`str` or `Path`, *optional*): A folder that does not exist yet, or is empty, to save the mixture to,
            with the tokenizer and licence of the source.
        revision (`str`, *optional*): Branch, tag or commit of a Hub id.
        token (`bool` or `str`, *optional*): For the Hub; defaults to that of `hf auth login`.
        dtype (`str` or `torch.dtype`, defaults to `"auto"`): Of the result; `"auto"` keeps the stock one.
        max_shard_size (`int` or `str`, defaults to `"4GB"`): Of a file of weights, with `output`.
        **config_fields: Fields of the family's config that concern training, such as `router_aux_loss_coef=0.01`.

    Returns:
        [`SparseMoePreTrainedModel`] in evaluation mode; with `output`, an [`ImportReport`].

    Raises:
        ValueError: an architecture without a row, a feature that our blocks lack, by its name, or a model that is
            quantised or has adapters.
        OSError: `output` is taken, or its disk is too small.

    Example:
        ```python
        model = import_stock("allenai/OLMoE-1B-7B-0924")
        ```
    """
    if output is not None:
        check_target(output)
    found, stock = None, source
    if not isinstance(stock, PreTrainedModel):
        found = find_source(source, revision, token=token)  # type: ignore[arg-type]
        stock_config = read_config(found)
        row_of(stock_config)  # refuses before anything large is read
        check_not_quantised(stock_config, found.name)
        auto_class = AutoModelForSeq2SeqLM if stock_config.is_encoder_decoder else AutoModelForCausalLM
        with sensible_config(found):
            stock = auto_class.from_pretrained(
                found.folder, dtype=dtype, use_safetensors=True, trust_remote_code=False
            )
    else:
        check_unwrapped(stock)
        check_not_quantised(stock.config, type(stock).__name__)
    sparse = _import_model(stock, found, dtype, config_fields)
    if output is None:
        return sparse
    write_checkpoint(sparse, output, found.folder if found else None, max_shard_size=max_shard_size)
    return ImportReport(Path(output), type(sparse).__name__, sparse.receipt or {})


def _import_model(
    stock: PreTrainedModel, source: Source | None, dtype: str | torch.dtype, config_fields: dict[str, Any]
) -> SparseMoePreTrainedModel:
    row = row_of(stock.config)
    expected = empty_model(stock.config)
    if type(stock).__name__ != type(expected).__name__:
        raise ValueError(f"`{type(stock).__name__}` cannot be read. Pass a `{type(expected).__name__}`.")
    state = stored_tensors(stock)
    missing, unknown = stored_tensors(expected).keys() - state.keys(), state.keys() - expected.state_dict().keys()
    check_same_tensors(type(stock).__name__, missing, unknown)
    layers = layers_of(row, state)
    config = sparse_config(row, stock.config, state, layers, config_fields)
    converted = _convert(row, config, state, layers)
    if source is None:  # the caller keeps the stock model, and must not share memory with ours
        converted = {name: tensor.clone() for name, tensor in converted.items()}
    chosen: Any = stock.dtype if dtype == "auto" else dtype
    sparse: Any = load_mixture(class_of(stock.config), config, converted, chosen, stock.generation_config)
    sparse = sparse.to(stock.device)
    sparse.receipt = {
        "source": describe_source(stock, source),
        **import_facts(sparse, config_fields),
        "equality": output_difference(stock, sparse),
    }
    return sparse


def import_facts(sparse: SparseMoePreTrainedModel, config_fields: dict[str, Any]) -> dict[str, Any]:
    """What the receipt says of a stock mixture in our class, which may be without storage."""
    return {
        "arguments": {"method": "import_native", **config_fields},  # its name in version 0.1
        "versions": versions(),
        "parameters": {"total": count_parameters(sparse), "active": count_parameters(sparse, only_active=True)},
        "flops_per_token": count_flops_per_token(sparse),
    }


def layers_of(row: ExportTarget, names: Iterable[str]) -> list[str]:
    """The paths of the layers that have a router."""
    return [name.removesuffix(f".{row.router_name}") for name in names if name.endswith(f".{row.router_name}")]


def class_of(stock: PreTrainedConfig) -> type[SparseMoePreTrainedModel]:
    """Our class of a stock config."""
    return SparseMoeEncoderDecoderForConditionalGeneration if stock.is_encoder_decoder else SparseMoeDecoderForCausalLM


def row_of(config: PreTrainedConfig) -> ExportTarget:
    """Of a stock config; raises a `ValueError` where there is none."""
    rows = {row.model_type: row for row in EXPORT_TARGETS}
    if config.model_type in rows:
        return rows[config.model_type]
    raise ValueError(
        f"`{config.model_type}` cannot be read. Pass one of {sorted(rows)}; `fix_balance`, `routing_statistics` and "
        "LoRA on experts take other mixtures as they are."
    )


def sparse_config(
    row: ExportTarget, stock: Any, state: Mapping[str, torch.Tensor], layers: list[str], config_fields: dict[str, Any]
) -> SparseMoeConfig:
    """Our config of a stock one; of the tensors it looks at the shared experts, as far as they are zeros."""
    if (capacity := getattr(stock, "expert_capacity", LARGEST_CAPACITY)) < LARGEST_CAPACITY:
        logger.warning(
            f"`{row.model_type}` drops the tokens of a sequence above the first {capacity} (`expert_capacity`) of an "
            "expert; here none is dropped, so that longer sequences may give other outputs."
        )
    num_experts, top_k, size = (row.top_k if name is None else getattr(stock, name) for name in row.fields)
    scoring = getattr(stock, row.scoring_field) if row.scoring_field else next(iter(row.router))
    normalised = row.router[scoring]
    shared = _num_shared_experts(row, state, layers, size)
    gates = [f"{layer}.{row.shared.gate}" for layer in layers] if row.shared and row.shared.gate else []
    in_groups = row.grouped and (row.topk_methods is None or stock.topk_method == row.topk_methods[1])
    fields = {
        "num_experts": num_experts,
        "num_experts_per_tok": top_k,
        "moe_intermediate_size": size,
        "num_shared_experts": shared,
        "shared_expert_gate": shared > 0 and any(state[gate].any().item() for gate in gates),
        "scoring_func": scoring,
        "norm_topk_prob": stock.norm_topk_prob if normalised is None else normalised,
        "routed_scaling_factor": getattr(stock, row.scaling_field) if row.scaling_field else 1.0,
        **({name: getattr(stock, name) for name in GROUPS} if in_groups else {}),
        **_layer_types(stock, layers),
        **config_fields,
    }
    config = class_of(stock).config_class.around(_dense_config(row, stock), **fields)
    # What holds on the way there holds on the way back: the same fields and the same tensors.
    report = check_fit(row, config)
    if report.config is None:
        raise ValueError(f"This `{row.model_type}` cannot be read: {'; '.join(report.obstacles)}.")
    # `_num_shared_experts` saw to these.
    sizes = {row.shared.count_field, row.shared.size_field} if row.shared else set()
    derived = {"head_dim"} if getattr(stock, "head_dim", 0) is None else set()  # Mixtral's: hidden size / heads
    for field in (
        own_fields(type(stock)).keys() - _NO_MATTER - sizes - derived - (set(GROUPS) if row.grouped else set())
    ):
        _require(row, stock, field, getattr(report.config, field))
    return config


def _dense_config(row: ExportTarget, stock: Any) -> PreTrainedConfig:
    for field, value in row.fixed.items():
        _require(row, stock, field, value)
    siblings = [name for name, implied in row.dense.items() if all(getattr(stock, f) == v for f, v in implied.items())]
    if not siblings:
        raise ValueError(f"This `{row.model_type}` cannot be read: it is the sibling of none of {list(row.dense)}.")
    dense_class = CONFIG_MAPPING[siblings[0]]
    names = {*own_fields(dense_class), *COMMON_FIELDS, "head_dim"} - {"num_experts", "num_experts_per_tok"}
    fields = {name: getattr(stock, name) for name in names if hasattr(stock, name)}
    if "head_dim" in dense_class.__dataclass_fields__:
        fields.setdefault("head_dim", stock.hidden_size // stock.num_attention_heads)
    return dense_class(**fields | row.dense_fields(stock))


def _require(row: ExportTarget, stock: Any, field: str, value: Any) -> None:
    if getattr(stock, field, value) != value:
        raise ValueError(
            f"`{field}={getattr(stock, field)!r}` of this `{row.model_type}` cannot be read: only {value!r} has a "
            "place here."
        )


def _num_shared_experts(row: ExportTarget, state: Mapping[str, torch.Tensor], layers: list[str], size: Any) -> int:
    """How many routed experts the shared ones are as large as; 0 where they are zeros."""
    names = [f"{layer}.{row.shared.weights[-1]}" for layer in layers] if row.shared else []
    downs = [name for name in names if name in state]
    if not any(state[down].any() for down in downs):
        return 0
    units = state[downs[0]].shape[1]
    if units % size:
        raise ValueError(
            f"The shared experts have {units} units, which is not a multiple of a routed expert's {size}: only that "
            "can be read."
        )
    return units // size


def _layer_types(stock: Any, layers: list[str]) -> dict[str, list[str]]:
    def kinds(names: list[str], count: int) -> list[str]:
        sparse = {next(int(part) for part in name.split(".") if part.isdigit()) for name in names}
        return ["sparse" if number in sparse else "dense" for number in range(count)]

    if not stock.is_encoder_decoder:
        return {"mlp_layer_types": kinds(layers, stock.num_hidden_layers)}
    counts = {"encoder": stock.num_layers, "decoder": stock.num_decoder_layers}
    return {
        f"{side}_mlp_layer_types": kinds([name for name in layers if name.startswith(side)], count)
        for side, count in counts.items()
    }


def _convert(row: ExportTarget, config: SparseMoeConfig, state: Tensors, layers: list[str]) -> Tensors:
    """The stock model's tensors in our names; tensors other than shared experts and experts in modules are its own."""
    inside = tuple(f"{layer}." for layer in layers)
    result = {our_name(row, name): tensor for name, tensor in state.items() if not name.startswith(inside)}
    for layer in layers:
        block, left = our_block(row, config, in_layer(state, layer))
        result |= {f"dense.{layer}.{row.feed_forward}.{name}": tensor for name, tensor in block.items()}
        result |= {our_name(row, f"{layer}.{name}"): tensor for name, tensor in left.items()}
    return result


def our_block(
    row: ExportTarget, config: SparseMoeConfig, layer: Mapping[str, torch.Tensor]
) -> tuple[Tensors, Tensors]:
    """As [`block_from_target`]; raises a `ValueError` for a selection bias that has no place here."""
    block, left = block_from_target(row, layer, config.num_shared_experts, config.shared_expert_gate)
    if config.scoring_func == "sigmoid":
        block.setdefault(SCORE_BIAS, torch.zeros(config.num_experts))
    elif (bias := block.pop(SCORE_BIAS, None)) is not None and bias.any():
        raise ValueError(
            f"The selection bias (`{row.score_bias_name}`) of this `{row.model_type}` is trained: here only a "
            "sigmoid router has one. `fix_balance`, `routing_statistics` and LoRA on experts take it as it is."
        )
    return block, left
