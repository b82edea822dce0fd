"""A mixture grows: `expand` gives it a multiple of its experts, `upcycle` of a mixture more sparse layers."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch

from hf_sparse_moe.models.moe_block import sparse_feed_forwards
from hf_sparse_moe.models.pretrained_model import SparseMoePreTrainedModel

from .conversion import Conversion, LoadedTensors, Read, SparseLayer, load_mixture
from .receipt import check_equality, output_difference
from .recipe import Layers, Recipe, check_argument, layer_types


@torch.no_grad()
def expand(
    model: SparseMoePreTrainedModel, factor: int, seed: int = 0, router_noise: float = 0.01, by: Any = None
) -> SparseMoePreTrainedModel:
    """
    Repeat every expert and router row `factor` times, and let a token use `factor` times as many.

    With normalised weights and `router_noise=0` the mixture computes what it computed. Without noise the copies of an
    expert would be chosen together and learn the same forever.

    With `by` the experts that carry more are copied more often, and a token uses as many as before. The copies sleep:
    their selection bias is so low that none is chosen, so that the mixture computes what it computed, until
    [`SelectionBiasCallback`] or [`fix_balance`] raises it. That needs sigmoid scores: without a selection bias the
    copies of a token's best expert would take the place of its second.

    Args:
        model ([`SparseMoePreTrainedModel`]): The mixture; it is left as it is.
        factor (`int`): At least 2.
        seed (`int`, defaults to 0): Of the noise.
        router_noise (`float`, defaults to 0.01): Deviation of the noise on the copies' router rows, relative to the
            root mean square of the rows.
        by ([`ExpertMeasurements`], *optional*): Of [`measure_experts`]. An expert carries the sum over its tokens of
            weight times norm of its output.

    Raises:
        ValueError: not a mixture, one with adapters, a factor below 2, or `by` with a router that has no selection
            bias or limits groups, or of another model.
    """
    if not isinstance(model, SparseMoePreTrainedModel):
        raise ValueError(f"`{type(model).__name__}` is not a mixture of this package. Upcycle it first.")
    check_argument("factor", factor, 2, 2)
    check_argument("seed", seed, 0, -(2**63), 2**64 - 1)
    check_argument("router_noise", router_noise, 0.0, 0)
    config = copy.deepcopy(model.config)
    if config.router_type == "hash":
        raise ValueError('`router_type="hash"` gives the ids to other experts when their number changes.')
    if by is not None and (config.scoring_func != "sigmoid" or config.n_group > 1):
        raise ValueError('`by` needs `scoring_func="sigmoid"` and one group of experts: leave it out.')
    if config.num_experts_per_layer is not None:
        raise ValueError("`num_experts_per_layer` differs between layers, which `expand` does not multiply.")
    blocks = [(name, module) for name, module in model.named_modules() if module in model.sparse_blocks]
    copied = [list(range(config.num_experts)) * (factor - 1)] * len(blocks)
    if by is not None:
        carried = [(layer.reap * layer.tokens).tolist() for layer in by.layers]
        if [len(each) for each in carried] != [config.num_experts] * len(blocks):
            raise ValueError("`by` is of another model: it has other layers, or other numbers of experts.")
        copied = [_by_need(each, (factor - 1) * config.num_experts) for each in carried]
    grow = ["num_experts", "num_experts_per_tok"] + (["n_group", "topk_group"] if config.n_group > 1 else [])
    if by is not None:
        grow = ["num_experts"]
    if config.router_type == "expert_choice" and config.capacity_factor is not None:
        grow.append("capacity_factor")
    for name in grow:
        setattr(config, name, getattr(config, name) * factor)
    generator = torch.Generator().manual_seed(seed)
    tied = model.all_tied_weights_keys
    state = {key: tensor.clone() for key, tensor in model.state_dict().items() if key not in tied}
    for (name, _), copies in zip(blocks, copied, strict=True):
        rows = state[f"{name}.gate.weight"].cpu()
        std = router_noise * rows.float().square().mean().sqrt()
        noise = (std * torch.randn(len(copies), *rows.shape[1:], generator=generator)).to(rows.dtype)
        state[f"{name}.gate.weight"] = torch.cat([rows, rows[copies] + noise])
        repeated = [key for key in state if key.startswith((f"{name}.experts.", f"{name}.gate.e_score"))]
        for key in (key for key in repeated if ".act_fn." not in key):
            state[key] = torch.cat([state[key], state[key][copies]])
        if by is not None:
            bias = state[f"{name}.gate.e_score_correction_bias"]
            bias[config.num_experts // factor :] = bias.min() - 1  # scores are below 1
    generation_config = getattr(model, "generation_config", None)
    expanded: Any = load_mixture(type(model), config, state, model.dtype, generation_config)
    expanded = expanded.to(model.device)
    asked_for: dict[str, Any] = {"factor": factor, "seed": seed, "router_noise": router_noise}
    if by is not None:
        asked_for["copied"] = {name: copies for (name, _), copies in zip(blocks, copied, strict=True)}
    expanded.receipt = {"expanded": {**asked_for, "from": model.receipt}}
    return expanded


def _by_need(carried: list[float], count: int) -> list[int]:
    """`count` copies, one after the other of the expert whose copies carry the most each."""
    held = [1] * len(carried)
    for _ in range(count):
        most = max(range(len(carried)), key=lambda expert: carried[expert] / held[expert])
        held[most] += 1
    return [expert for expert, copies in enumerate(held) for _ in range(copies - 1)]


@torch.no_grad()
def upcycle_more_layers(model: SparseMoePreTrainedModel, layers: Layers, seed: int) -> SparseMoePreTrainedModel:
    """
    Copy the feed-forwards that are still dense in `layers` into experts, as many as the mixture's other layers have.
    Raises a `ValueError` where there is none, and where experts are no whole feed-forwards.
    """
    recipe = Recipe("copy", seed, {})
    config: Any = copy.deepcopy(model.config)
    with torch.device("meta"):
        dense = model.dense_auto_class.from_config(config.dense_config, dtype=model.dtype)
    before = [layer.block_path for layer, _ in sparse_feed_forwards(dense, config, model.family_side)]
    every = copy.deepcopy(config)
    for field in config._layer_type_fields:
        setattr(every, field, None)
    sides = [side for _, side in sparse_feed_forwards(dense, every, model.family_side)]
    for field, side in config._layer_type_fields.items():
        chosen = layers.get(side, "none") if isinstance(layers, dict) else layers
        wanted, now = layer_types(chosen, sides.count(side)), getattr(config, field) or ["sparse"] * sides.count(side)
        setattr(config, field, ["sparse" if "sparse" in pair else "dense" for pair in zip(wanted, now, strict=True)])
    found = sparse_feed_forwards(dense, config, model.family_side)
    new = [SparseLayer(place, *each) for place, each in enumerate(found) if each[0].block_path not in before]
    if not new:
        raise ValueError(f"`layers={layers!r}` names no dense layer: all of them are those of a mixture already.")
    fields = {name: getattr(config, name) for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size")}
    recipe.initialization.sizes(fields, new[0].feed_forward.intermediate_size, {})
    if config.num_shared_experts:
        raise ValueError("A mixture with shared experts gets no more sparse layers: copies have none.")
    with torch.device("meta"):
        sparse = type(model)._from_config(config, dtype=model.dtype)
    conversion = Conversion(dense, sparse, recipe, {}, new, _Inside(LoadedTensors(model).reader()))
    tied = model.all_tied_weights_keys
    made = {key: tensor.clone() for key, tensor in model.state_dict().items() if key not in tied}
    for layer in new:
        for name in layer.sources:
            del made[f"dense.{name}"]
        for key, matrices in conversion.make(layer).items():
            parts = [each[0 : each.shape[0]] for each in matrices] if isinstance(matrices, list) else matrices
            made[key] = torch.stack(parts) if isinstance(parts, list) else parts
    generation_config = getattr(model, "generation_config", None)
    grown: Any = load_mixture(type(model), config, made, model.dtype, generation_config)
    grown = grown.to(model.device)
    equality = output_difference(model, grown)
    check_equality(equality, recipe.initialization.is_exact(config), model.dtype)
    named = [layer.block for layer in new]
    grown.receipt = {"more_layers": {"layers": named, "seed": seed, "equality": equality, "from": model.receipt}}
    return grown


@dataclass(frozen=True)
class _Inside:
    """The tensors of the dense model inside a mixture."""

    read: Read

    def reader(self, reuse: bool = False) -> Read:
        return lambda *names: self.read(*(f"dense.{name}" for name in names))
