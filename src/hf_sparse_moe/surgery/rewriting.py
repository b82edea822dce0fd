"""Other experts in the place of those of a mixture: in memory and from disk to disk, with the receipt."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from hf_sparse_moe.checkpoints.companions import copy_companions
from hf_sparse_moe.checkpoints.config import sensible_config
from hf_sparse_moe.checkpoints.folder import check_target, new_folder, write_description
from hf_sparse_moe.checkpoints.journal import WatchedSource, written_shards
from hf_sparse_moe.checkpoints.reader import NotStreamableError, TensorFiles
from hf_sparse_moe.checkpoints.source import Source, weight_files
from hf_sparse_moe.checkpoints.writer import ShardWriter
from hf_sparse_moe.insight.losses import Evaluation, loss_change
from hf_sparse_moe.models.configuration_sparse_moe import SparseMoeConfig
from hf_sparse_moe.models.pretrained_model import SparseMoePreTrainedModel
from hf_sparse_moe.routing.mixture_layers import NUM_EXPERTS_NAMES, MixtureLayer, find_mixture_layers
from hf_sparse_moe.stock.tensors import Tensors, stored_tensors
from hf_sparse_moe.upcycling.conversion import check_same_tensors
from hf_sparse_moe.upcycling.mixtures import UpcycleReport
from hf_sparse_moe.upcycling.receipt import describe_source, versions

from .expert_axes import ExpertRows, Rewriting
from .mixture import Mixture, open_mixture
from .receipts import write_card, write_receipt


logger = logging.get_logger(__name__)


class Plan(NamedTuple):
    """The experts by the place of their layer, what the receipt says of it, and other fields of our config."""

    rows: dict[int, ExpertRows]
    told: dict[str, Any]
    fields: Mapping[str, Any] = MappingProxyType({})


class SurgeryReport(UpcycleReport):
    """What an operation on a mixture's experts wrote."""


def rewrite(
    verb: str,
    plan: Callable[[Mixture], Plan],
    source: PreTrainedModel | str | Path,
    output: str | Path | None,
    evaluation: Evaluation | None,
    revision: str | None,
    token: bool | str | None,
    *settings: Any,
) -> Any:
    """
    The model whose experts are those of `plan`, or with `output` the report of its folder: streamed from a folder or
    Hub id where its files allow that.

    Args:
        verb (`str`): What is done to the experts, under which the receipt tells it, such as `"pruned"`.
        settings: `max_shard_size`, `resume` and `show_progress`.
    """
    if output is not None:
        check_target(output)
    if output is not None and isinstance(source, str | Path):
        try:
            mixture = open_mixture(source, into_memory=False, revision=revision, token=token)
            return _on_disk(verb, mixture, plan(mixture), output, evaluation, *settings)
        except NotStreamableError as reason:
            logger.warning(f"The mixture is {verb} in memory, not streamed: {reason}.")
    mixture = open_mixture(source, into_memory=True, revision=revision, token=token)
    planned = plan(mixture)
    model: Any = _in_memory(mixture, planned)
    model.receipt = _receipt(verb, mixture, model, planned.told, None, loss_change(mixture.model, model, evaluation))
    return model if output is None else _save(model, mixture.source, output, settings[0])


@torch.no_grad()
def _in_memory(mixture: Mixture, plan: Plan) -> PreTrainedModel:
    """A new model in evaluation mode, that shares no memory with `mixture`."""
    old = mixture.model
    new = _resized(mixture, plan)
    state = stored_tensors(old)
    rewriting = Rewriting(mixture, new, plan.rows, state)
    made: Tensors = {}
    for _, make in rewriting.parts:
        for name, tensor in make(state.__getitem__).items():
            made[name] = require_numbers(name, tensor.clone() if tensor is state.get(name) else tensor)
    loaded = new.load_state_dict(made, strict=False, assign=True)
    check_same_tensors(type(new).__name__, set(), set(loaded.unexpected_keys))
    trained = {name: parameter.requires_grad for name, parameter in old.named_parameters()}
    buffers = dict(old.named_buffers())
    for name, buffer in [*new.named_buffers()]:
        if buffer.is_meta:  # what no checkpoint holds
            owner, _, attribute = name.rpartition(".")
            setattr(new.get_submodule(owner), attribute, buffers[name].clone())
    new.tie_weights()
    for name, parameter in new.named_parameters():
        parameter.requires_grad_(trained[name])
    if (quantizer := getattr(old, "hf_quantizer", None)) is not None:
        new.hf_quantizer = quantizer  # saves packed experts
    if hasattr(old, "generation_config"):
        new.generation_config = copy.deepcopy(old.generation_config)
    new.name_or_path = new.config.name_or_path = ""
    return new.eval()


def _on_disk(
    verb: str,
    mixture: Mixture,
    plan: Plan,
    output: str | Path,
    evaluation: Evaluation | None,
    max_shard_size: int | str,
    resume: bool,
    show_progress: bool,
) -> SurgeryReport:
    """Memory holds one tensor at a time, or where `rows` combine experts those of a layer."""
    told, source = plan.told, mixture.source
    assert source is not None
    watched, files = WatchedSource(source), TensorFiles(weight_files(source))
    stored = {name: torch.empty(files.shape(name), dtype=files.dtype(name), device="meta") for name in files.names}
    with sensible_config(source):
        new = _resized(mixture, plan)
        rewriting = Rewriting(mixture, new, plan.rows, stored)

    def write(writer: ShardWriter) -> Generator[int]:
        for names, make in rewriting.parts:
            if any(map(writer.wants, names)):
                for name, tensor in make(files.read).items():
                    if writer.wants(name):
                        yield writer.write(name, require_numbers(name, tensor))

    made_from = {"surgery": {**told, "max_shard_size": max_shard_size}}
    settings = (max_shard_size, resume, show_progress)
    with written_shards(output, rewriting.outputs, write, watched, made_from, *settings) as (folder, sha256):
        if isinstance(new, SparseMoePreTrainedModel):
            new.receipt = None
        elif new.can_generate():
            new.generation_config = mixture.model.generation_config
        write_description(new, folder)
        copy_companions(source.folder, folder)
        receipt = _receipt(verb, mixture, new, told, sha256, loss_change(mixture.before, folder, evaluation))
        held = {"before": stored, "after": rewriting.outputs}  # codes of quantised weights are what is in the files
        receipt[verb]["bytes"] = {when: sum(each.nbytes for each in held[when].values()) for when in held}
        return _report(new, receipt, folder, output)


def require_numbers(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor; raises a `ValueError` where it is broken. Codes of quantised experts are not looked at."""
    if tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1 and tensor.isnan().any():
        raise ValueError(f"`{name}` would hold NaN, as the checkpoint does: it is broken. Take an earlier one.")
    return tensor


def _save(model: Any, source: Source | None, output: str | Path, max_shard_size: int | str) -> SurgeryReport:
    """Write a model with its `receipt` and what belongs to its source."""
    with new_folder(output, needed_bytes=sum(parameter.nbytes for parameter in model.parameters())) as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        if source is not None:
            copy_companions(source.folder, folder)
        return _report(model, model.receipt, folder, output)


def _report(model: PreTrainedModel, receipt: dict[str, Any], folder: Path, output: str | Path) -> SurgeryReport:
    """Write receipt and card; the card of a mixture of this package is another, which `hub` writes."""
    architecture = type(model).__name__
    write_receipt(receipt, folder)
    if not isinstance(model, SparseMoePreTrainedModel):
        write_card(receipt, folder, Path(output).name, architecture)
    return SurgeryReport(Path(output), architecture, receipt)


def _receipt(
    verb: str,
    mixture: Mixture,
    new: PreTrainedModel,
    told: dict[str, Any],
    sha256: dict[str, str] | None,
    loss: dict[str, Any] | None,
) -> dict[str, Any]:
    """The receipt of `mixture`, and what was done (`"pruned"`, `"merged"`) to its experts, of which `new` came."""
    old = mixture.model
    before = mixture.receipt or {}
    return {
        **{name: value for name, value in before.items() if name != verb},  # the last operation is the last
        verb: {
            "num_experts_per_tok": mixture.layers[0].top_k,
            **told,
            "loss": loss,
            **sizes(old, new),
            "source": describe_source(old, mixture.source, sha256),
            "versions": versions(),
            **({"before": before[verb]} if verb in before else {}),
        },
    }


def sizes(before: PreTrainedModel, after: PreTrainedModel) -> dict[str, dict[str, int]]:
    """Parameters and bytes before and after an operation, for its receipt."""
    models = {"before": before, "after": after}
    return {
        "parameters": {when: model.num_parameters() for when, model in models.items()},
        "bytes": {when: sum(each.nbytes for each in model.parameters()) for when, model in models.items()},
    }


def _resized(mixture: Mixture, plan: Plan) -> PreTrainedModel:
    """The model with other numbers of experts, without storage."""
    old, layers, rows = mixture.model, mixture.layers, plan.rows
    counts = [len(rows[place].sources) if place in rows else layer.num_experts for place, layer in enumerate(layers)]
    config = copy.deepcopy(old.config)
    if isinstance(config, SparseMoeConfig):
        _resize_ours(config, counts)
        for name, value in plan.fields.items():
            setattr(config, name, value)
    else:
        _resize_stock(config, layers, counts)
    with torch.device("meta"):
        new = type(old)._from_config(config, dtype=old.dtype)
    if [layer.num_experts for layer in find_mixture_layers(new)] != counts:
        raise ValueError(
            f"The config of `{mixture.name}` (`model_type={config.model_type!r}`) has no field that this package "
            "knows for the number of its experts. `import_stock` may read it into a mixture of this package."
        )
    return new


def _resize_ours(config: SparseMoeConfig, counts: list[int]) -> None:
    before, after = config.num_experts, max(counts)
    if len(set(counts)) > 1 and config.router_type != "top_k":
        raise ValueError(f'`router_type="{config.router_type}"` needs as many experts in each layer, not {counts}.')
    config.num_experts = after
    config.num_experts_per_layer = counts if len(set(counts)) > 1 else None
    if config.router_type == "expert_choice":  # each expert goes on taking as many tokens
        factor = config.capacity_factor or config.num_experts_per_tok
        config.capacity_factor = factor * after / before


def _resize_stock(config: PreTrainedConfig, layers: list[MixtureLayer], counts: list[int]) -> None:
    if len(set(counts)) > 1:
        raise ValueError(
            f"`model_type={config.model_type!r}` has one number of experts for all layers, not {counts}. Keep as many "
            "in each layer, or `import_stock` it first: mixtures of this package may have other numbers in each."
        )
    before = layers[0].num_experts
    text = config.get_text_config()
    for holder in (text, *(part for part in vars(text).values() if isinstance(part, PreTrainedConfig))):
        for name in NUM_EXPERTS_NAMES:
            if getattr(holder, name, None) == before:
                setattr(holder, name, counts[0])
