"""What of a mixture its plan depends on, read from the model without storage and from its own parallel plans."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig
from transformers.distributed import DistributedConfig

from hf_sparse_moe.models.configuration_sparse_moe import SparseMoeConfig
from hf_sparse_moe.models.pretrained_model import SparseMoePreTrainedModel
from hf_sparse_moe.models.size import count_flops_per_token, meta_model


# Which dimension a style of transformers' tensor-parallel plans cuts; negative ones count from the end.
_CUT = {
    "colwise": -2,
    "colwise_gather_output": -2,
    "packed_colwise": -2,
    "embedding_rowwise": 0,
    "embedding_colwise": 1,
    "rowwise": -1,
    "packed_rowwise": -1,
}


@dataclass(frozen=True)
class Weight:
    """
    One parameter.

    Args:
        shape (`tuple[int, ...]`): Whole.
        unit (`str`): The module that FSDP gathers it with; `""` is the model itself.
        experts (`str`): The module of routed experts that it belongs to, and that gathers it under expert parallelism.
        cut (`int`, *optional*): The dimension that tensor parallelism cuts.
        tied (`bool`): Whether it is another weight too. FSDP gathers it for each module that has it.
    """

    shape: tuple[int, ...]
    unit: str
    experts: str
    cut: int | None
    tied: bool

    def local_shape(self, tp: int, ep: int) -> tuple[int, ...]:
        """What one rank of the expert- and tensor-parallel groups works with."""
        shape = list(self.shape)
        if self.experts and ep > 1:  # expert-parallel experts are never cut by tensor parallelism
            shape[0] //= ep
        elif self.cut is not None:
            shape[self.cut] = math.ceil(shape[self.cut] / tp)
        return tuple(shape)


@dataclass(frozen=True)
class TensorParallelTraffic:
    """
    Numbers that a tensor-parallel group moves for each token (`per_token`) or once (not). Those of the forward pass of
    a layer (`in_layer`) move again where layers are computed again.
    """

    kind: str
    numbers: int
    backward: bool
    per_token: bool = True
    of_experts: bool = False
    in_layer: bool = True


@dataclass(frozen=True)
class ModelShape:
    """
    Args:
        weights (`tuple[Weight, ...]`): Each parameter, once for each module that has it.
        stays (`frozenset[str]`): The units that stay gathered between forward and backward; `""` is what is left.
        num_layers, num_sparse_layers (`int`): Layers in all, and those with experts.
        num_experts, num_experts_per_tok (`int`): E and K.
        hidden, intermediate, query, key_value, vocabulary (`int`): Widths.
        gated (`bool`): Whether the experts are.
        heads (`tuple[int, ...]`): The numbers of heads, which tensor parallelism must divide.
        flops_per_token (`int`): Of the forward pass, attention scores left out.
        causal (`bool`): Whether a token sees only what is before it.
        tensor_parallel (`tuple[TensorParallelTraffic, ...]`): Empty where the model has no plan.
        global_balance (`bool`): Whether the balance loss sums the experts' loads over the ranks.
    """

    weights: tuple[Weight, ...]
    stays: frozenset[str]
    num_layers: int
    num_sparse_layers: int
    num_experts: int
    num_experts_per_tok: int
    hidden: int
    intermediate: int
    query: int
    key_value: int
    vocabulary: int
    gated: bool
    heads: tuple[int, ...]
    flops_per_token: int
    causal: bool
    tensor_parallel: tuple[TensorParallelTraffic, ...]
    global_balance: bool
    num_parameters: int


def read_shape(mixture: SparseMoeConfig | str | Path, *, revision: str | None = None) -> ModelShape:
    """
    The shape of a mixture. Reads its config alone.

    Args:
        mixture (`SparseMoeConfig`, `str` or `Path`): The config, or folder or Hub id of a mixture of this package.
        revision (`str`, *optional*): Of a Hub id.

    Raises:
        ValueError: no mixture of this package.
    """
    config = mixture
    if not isinstance(config, SparseMoeConfig):
        config = AutoConfig.from_pretrained(str(mixture), revision=revision)
    if not isinstance(config, SparseMoeConfig):
        raise ValueError(
            f"`{mixture}` is a `{config.model_type}`, no mixture of this package. `upcycle` a dense checkpoint first, "
            "or import a stock mixture."
        )
    model = meta_model(config)
    experts = model.sparse_blocks[0].experts
    dense = config.dense_config.get_text_config()
    heads = dense.num_attention_heads
    key_value_heads = getattr(dense, "num_key_value_heads", None) or heads
    head_dim = getattr(dense, "head_dim", None) or getattr(dense, "d_kv", None) or experts.hidden_dim // heads
    weights, stays = _units(model)
    output_head = model.get_output_embeddings()
    dense_layers = sum((getattr(config, field) or []).count("dense") for field in config._layer_type_fields)
    return ModelShape(
        weights=weights,
        stays=stays,
        num_layers=len(model.sparse_blocks) + dense_layers,
        num_sparse_layers=len(model.sparse_blocks),
        num_experts=config.num_experts,
        num_experts_per_tok=config.num_experts_per_tok,
        hidden=experts.hidden_dim,
        intermediate=experts.intermediate_dim,
        query=heads * head_dim,
        key_value=key_value_heads * head_dim,
        vocabulary=config.vocab_size if output_head is not None else 0,
        gated=experts.gated,
        heads=(heads, key_value_heads),
        flops_per_token=count_flops_per_token(model),
        causal=model.family_side == "decoder" and not config.is_encoder_decoder,
        tensor_parallel=tuple(_tensor_parallel(model)),
        global_balance=config.balance_scope == "global_batch" and config.router_aux_loss_coef > 0,
        num_parameters=model.num_parameters(),
    )


def _units(model: SparseMoePreTrainedModel) -> tuple[tuple[Weight, ...], frozenset[str]]:
    """Each parameter with the unit that gathers it: the innermost module of the FSDP plan around it."""
    styles = model._resolve_parallel_plans(DistributedConfig(fsdp_size=2))[2]
    cuts = _tensor_parallel_plan(model)
    experts = {f"{name}.experts" for name, module in model.named_modules() if module in model.sparse_blocks}
    weights, seen = [], set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        module = name.rpartition(".")[0]
        cut = _CUT.get(cuts.get(name, ""))
        if cut is not None and parameter.dim() == 1:  # a bias lies along the rows
            cut = 0 if cut == -2 else None
        unit = next((path for path in _upwards(name) if path in styles), "")
        of_experts = module if module in experts else ""
        weights.append(Weight(tuple(parameter.shape), unit, of_experts, cut, tied=parameter in seen))
        seen.add(parameter)
    return tuple(weights), frozenset({"", *(name for name, style in styles.items() if style == "keep_full_weight")})


def _upwards(path: str) -> Iterable[str]:
    while path:
        yield path
        path = path.rpartition(".")[0]


def _tensor_parallel_plan(model: SparseMoePreTrainedModel) -> dict[str, str]:
    """Name of module or parameter to style; empty where the model has no plan."""
    return model._resolve_parallel_plans(DistributedConfig(tp_size=2))[0] if model.tp_plan else {}


def _tensor_parallel(model: SparseMoePreTrainedModel) -> Iterable[TensorParallelTraffic]:
    """
    What transformers' styles move (Megatron-LM, arXiv 1909.08053, section 3): a product cut by columns sums the
    gradient of its input over the ranks, one cut by rows its output. transformers sums for each product, so three
    times where query, key and value share an input.
    """
    modules = dict(model.named_modules())
    for name, style in _tensor_parallel_plan(model).items():
        module = modules.get(name)
        if module is None:
            continue
        in_layer = any(part.isdigit() for part in name.split("."))
        if style in ("colwise", "packed_colwise", "colwise_gather_output"):
            yield TensorParallelTraffic("all_reduce", module.in_features, backward=True)
        if style == "colwise_gather_output":
            yield TensorParallelTraffic("all_gather", module.out_features, backward=False, in_layer=in_layer)
        if style == "rowwise":
            yield TensorParallelTraffic("all_reduce", module.out_features, backward=False, in_layer=in_layer)
        if style == "embedding_rowwise":
            yield TensorParallelTraffic("all_reduce", module.embedding_dim, backward=False, in_layer=in_layer)
        if style == "replicated_with_grad_allreduce":
            numbers = sum(parameter.numel() for parameter in module.parameters())
            yield TensorParallelTraffic("all_reduce", numbers, backward=True, per_token=False)
        if style == "moe_tp_experts":
            for numbers, backward in (
                (module.hidden_dim, False),
                (module.hidden_dim + model.config.num_experts_per_tok, True),
            ):
                yield TensorParallelTraffic("all_reduce", numbers, backward, of_experts=True)
