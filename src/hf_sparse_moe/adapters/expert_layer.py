"""The PEFT layer around an experts module: what PEFT's own does, by products beside W instead of an update of W."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.utils import logging

from hf_sparse_moe.models.quantized_weight import QuantizedWeight

from .expert_dora import Dora, Magnitude, dora_experts, row_norms
from .expert_factors import ExpertFactor
from .expert_modules import PROJECTIONS, first_projection, shape_of
from .low_rank_experts import LowRank, expert_parallel_low_rank, low_rank_experts


if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.lora.layer import ParamWrapper as _Base
else:  # what `layer_class` makes has both
    _Base = nn.Module

logger = logging.get_logger(__name__)

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_BASE = "__base__"  # PEFT's name, in `adapter_names`, for no adapter
_UNSUPPORTED = (
    "lora_bias", "alora_invocation_tokens", "velora_config", "kasa_config", "fan_in_fan_out", "use_qalora",
    "use_bdlora", "arrow_config", "monteclora_config",
)  # fmt: skip


class ExpertLora(_Base):
    """
    Low-rank adapters of one projection of all experts; PEFT nests two, and the outer one computes for both.

    It stands before PEFT's `ParamWrapper` in [`layer_class`], whose place in the model, keys and files it keeps.
    """

    _before_merge: tuple[QuantizedWeight, ...] = ()
    in_features: int
    out_features: int
    num_experts: int

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        parameter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        target_name: str = "",
        **kwargs,
    ):
        from peft.tuners.lora.layer import LoraLayer

        nn.Module.__init__(self)
        self.parameter_name = parameter_name
        LoraLayer.__init__(cast(LoraLayer, self), base_layer, **kwargs)
        self.fan_in_fan_out = False
        self._merged_gains: dict[str, torch.Tensor] = {}
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config, target_name=target_name)

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        self.num_experts, *matrix = shape_of(getattr(module, self.parameter_name))
        out_features, in_features = reversed(matrix) if module.is_transposed else matrix
        return in_features, out_features

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, target_name: str = "", **kwargs
    ) -> None:
        """Add an adapter, or begin one anew."""
        weight = self.get_param()
        _refuse_unsupported(config, r)
        _refuse_unsupported_weight(self.experts, target_name, weight, config)
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
        self.use_rslora[adapter_name], self.use_dora[adapter_name] = config.use_rslora, config.use_dora
        self.lora_bias[adapter_name] = False
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self.lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        experts, columns = self._chosen_experts(config, target_name), self._chosen_columns(config)
        sizes, shared = (experts, self.num_experts, r), getattr(config, "shared", False)
        self.lora_A[adapter_name] = ExpertFactor(*sizes, self.in_features, slice(None), False, shared, weight)
        self.lora_B[adapter_name] = ExpertFactor(*sizes, self.out_features, columns, True, shared, weight)
        self.reset_lora_parameters(adapter_name, config.init_lora_weights)
        if config.use_dora:
            if isinstance(weight, DTensor) or weight.shape != shape_of(weight):
                raise ValueError("`use_dora=True` needs experts that are whole on each rank. Leave it out.")
            self.lora_magnitude_vector[adapter_name] = Magnitude(self._row_norms(adapter_name).to(weight.dtype))
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str) -> None:
        """As PEFT draws them: A of each expert like a linear layer's weight, or normal of 1 / r; B zero."""
        a, b = (factor.weight for factor in self._factors(adapter_name))
        if init_lora_weights == "gaussian":
            a.normal_(std=1 / self.r[adapter_name])
        else:
            a.uniform_(-(self.in_features**-0.5), self.in_features**-0.5)
        if init_lora_weights:
            b.zero_()
        else:
            b.uniform_(-(self.r[adapter_name] ** -0.5), self.r[adapter_name] ** -0.5)

    def _factors(self, name: str) -> tuple[ExpertFactor, ExpertFactor]:
        return cast(ExpertFactor, self.lora_A[name]), cast(ExpertFactor, self.lora_B[name])

    def _row_norms(self, name: str) -> torch.Tensor:
        """`(N, reached outputs)`: of `W + s B A`, expert by expert."""
        a, b = self._factors(name)
        weight, scale = self.get_param(), self.scaling[name]
        rows = []
        for expert, own_a, own_b in zip(a.experts, a.of_each(), b.of_each(), strict=True):
            matrix = weight[expert].mT if self.experts.is_transposed else weight[expert]
            rows.append(row_norms(matrix[b.columns], own_a, own_b, scale))
        return torch.stack(rows)

    def _gain(self, name: str) -> torch.Tensor:
        magnitude = cast(Magnitude, self.lora_magnitude_vector[name]).weight
        return (magnitude / self._row_norms(name).to(magnitude.dtype)).to(self.get_param().dtype)

    @property
    def experts(self) -> Any:
        """The experts module itself."""
        return self.get_base_layer()

    def _chosen_experts(self, config: LoraConfig, target_name: str) -> tuple[int, ...]:
        chosen = getattr(config, "experts", None)
        numbers = chosen.get(target_name.rpartition(".")[0]) if chosen else range(self.num_experts)
        if not numbers or not all(0 <= number < self.num_experts for number in numbers):
            raise ValueError(f"`experts` gives {numbers} for `{target_name}` of {self.num_experts} experts.")
        return tuple(sorted(set(numbers)))

    def _chosen_columns(self, config: LoraConfig) -> slice:
        projections = set(getattr(config, "projections", None) or PROJECTIONS)
        if self.parameter_name != "gate_up_proj" or {"gate", "up"} <= projections:
            return slice(None)
        half = self.out_features // 2
        if self.experts.is_concatenated:
            return slice(0, half) if "gate" in projections else slice(half, None)
        return slice(0, None, 2) if "gate" in projections else slice(1, None, 2)

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        adapter_names: Sequence[str] | None = None,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(T, H)`): The tokens.
            top_k_index (`torch.LongTensor` of shape `(T, K)`): The experts of each token.
            top_k_weights (`torch.Tensor` of shape `(T, K)`): Their weights.
            adapter_names (`Sequence[str]`, *optional*): The adapter of each sequence of the batch.

        Returns:
            `torch.Tensor` of shape `(T, H)`.
        """
        layers: list[ExpertLora] = [self]  # and the one that it is nested around, if any
        while isinstance(layers[-1].base_layer, ExpertLora):
            layers.append(layers[-1].base_layer)
        experts = self.experts
        tokens = self._tokens_of(adapter_names, len(hidden_states), hidden_states.device)
        adapters: dict[str, list[LowRank]] = {}
        for layer in layers:
            if layer.disable_adapters and layer.merged:
                layer.unmerge()
            if not layer.disable_adapters and not layer.merged:
                adapters[layer.parameter_name] = layer._low_rank(tokens)
        if not any(adapters.values()):
            return experts(hidden_states, top_k_index, top_k_weights)
        if experts._is_expert_parallel and tokens is not None:
            raise ValueError("`adapter_names` does not work with expert parallelism. Use one adapter a batch.")
        compute = expert_parallel_low_rank if experts._is_expert_parallel else low_rank_experts
        if any(isinstance(one, Dora) for side in adapters.values() for one in side):
            compute = dora_experts
        up, down = (adapters.get(name, []) for name in (first_projection(experts), "down_proj"))
        return compute(experts, hidden_states, top_k_index, top_k_weights, up, down)

    def _low_rank(self, tokens: dict[str, torch.Tensor] | None) -> list[LowRank]:
        found = []
        for name in self.active_adapters if tokens is None else tokens:
            if name in self.lora_A:
                a, b = self._factors(name)
                dropout = self.lora_dropout[name]
                rate = dropout.p if self.training and isinstance(dropout, nn.Dropout) else 0.0
                served = None if tokens is None else tokens[name]
                own = (a.of_each(), b.of_each(), self.scaling[name], a.experts, b.columns, rate, served)
                found.append(Dora(*own, self._gain(name)) if self.use_dora[name] else LowRank(*own))
        return found

    def _tokens_of(self, adapter_names: Sequence[str] | None, count: int, device: torch.device):
        """`(T, 1)` an adapter: the tokens of the sequences that ask for it."""
        if adapter_names is None:
            return None
        if self.merged:
            raise ValueError("`adapter_names` needs adapters that are not merged. Call `unmerge_adapter()` first.")
        if getattr(self.experts.config, "router_type", "top_k") == "expert_choice":
            raise ValueError("`adapter_names` does not work where experts choose tokens. Use one adapter a batch.")
        if count % len(adapter_names):
            raise ValueError(
                f"`adapter_names` has {len(adapter_names)} entries, but the experts get {count} tokens. Give one for "
                "each sequence of the batch."
            )
        each = count // len(adapter_names)
        masks = {
            name: torch.tensor([other == name for other in adapter_names], device=device)
            for name in dict.fromkeys(adapter_names)
            if name != _BASE
        }
        return {name: mask.repeat_interleave(each).unsqueeze(1) for name, mask in masks.items()}

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters to the experts' weights, as PEFT does."""
        weight = self.get_param()
        if isinstance(weight, DTensor) or weight.shape != shape_of(weight):
            raise ValueError(
                "Adapters do not merge into experts that are sharded over ranks. Save the adapter, and merge it in "
                "one process."
            )
        if isinstance(weight, QuantizedWeight):
            self._merge_into_codes(weight, adapter_names)
        else:
            super().merge(safe_merge, adapter_names)

    def _merge_into_codes(self, weight: QuantizedWeight, adapter_names: list[str] | None) -> None:
        """The sum is rounded again; how much of the update that takes is measured and said."""
        from peft.tuners.tuners_utils import check_adapters_to_merge

        names = [name for name in check_adapters_to_merge(cast(Any, self), adapter_names) if name in self.lora_A]
        if not names:
            return
        update = torch.stack([self.get_delta_weight(name).float() for name in names]).sum(0)
        exact = weight.dequantize().float() + update
        if not exact.isfinite().all():
            raise ValueError(f"Merging {names} gives NaN or infinite weights. Train the adapter again.")
        merged = QuantizedWeight.quantize(exact.to(weight.dtype), weight.bits)
        lost = (merged.dequantize().float() - exact).norm() / update.norm().clamp_min(1e-30)
        logger.warning(
            f"Merged into {weight.bits}-bit `{self.parameter_name}`: rounding moved the weights by {lost:.0%} of the "
            "adapter's update (norms). To lose nothing, merge into the unquantised model or keep the adapter apart."
        )
        self._before_merge = self._before_merge or (weight,)
        setattr(self.experts, self.parameter_name, nn.Parameter(merged, requires_grad=False))
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """As PEFT does it; quantised experts get back the codes that they had."""
        if self._before_merge:
            setattr(self.experts, self.parameter_name, self._before_merge[0])
            self._before_merge = ()
            self.merged_adapters.clear()
        else:
            super().unmerge()

    def get_delta_weight(self, adapter_name: str, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The update of all experts' weights, which no forward builds."""
        a, b = (factor.all_experts() for factor in self._factors(adapter_name))
        update = b.mT @ a if not self.experts.is_transposed else a.mT @ b
        update, weight = update.mul_(self.scaling[adapter_name]), self.get_param()
        if self.use_dora[adapter_name]:
            # W becomes g (W + s B A), and W = W' / g - s B A again.
            is_merged = adapter_name in self._merged_gains
            gain = self._merged_gains.pop(adapter_name) if is_merged else self._gain_of_all(adapter_name)
            if not is_merged:
                self._merged_gains[adapter_name] = gain
            update = weight - (weight / gain - update) if is_merged else gain * (weight + update) - weight
        return update.to(weight.dtype)

    def _gain_of_all(self, name: str) -> torch.Tensor:
        """Of each row of W, 1 where there is no adapter."""
        _, b = self._factors(name)
        gain = torch.ones(self.num_experts, self.out_features, dtype=self.get_param().dtype)
        gain[list(b.experts), b.columns] = self._gain(name).detach().cpu()
        return gain.to(self.get_param().device).unsqueeze(1 if self.experts.is_transposed else 2)


def _refuse_unsupported(config: LoraConfig, rank: int) -> None:
    found = {name: value for name in _UNSUPPORTED if (value := getattr(config, name, None))}
    if rank <= 0:
        found["r"] = rank
    if config.init_lora_weights not in (True, False, "gaussian"):
        found["init_lora_weights"] = config.init_lora_weights
    for name, value in found.items():
        raise ValueError(
            f"`{name}={value!r}` is not supported by LoRA on experts. Leave it out; `r` is positive, and "
            '`init_lora_weights` may be True, False or "gaussian".'
        )


def _refuse_unsupported_weight(experts: Any, name: str, weight: torch.Tensor, config: LoraConfig) -> None:
    """Gradients are right where a weight is whole, or shared out by transformers along experts or FSDP."""
    if type(weight.data) not in (torch.Tensor, QuantizedWeight, DTensor) or weight.dtype not in _DTYPES:
        raise ValueError(
            f"`{name}` is quantised ({weight.dtype}) in a way that no adapter of experts computes with. Load the "
            "experts unquantised, and call `quantize_experts(model)`."
        )
    if not isinstance(weight, DTensor):
        return
    sizes = getattr(experts.config, "distributed_config", None)
    if sizes is None or sizes.tp_size > 1 or config.modules_to_save:
        raise ValueError(
            f"`{name}` is sharded over ranks. LoRA on experts takes what `from_pretrained(..., distributed_config="
            "DistributedConfig(...))` shards with `fsdp_size` and `ep_size`, without `tp_size`, `modules_to_save` and "
            "`router=True`; otherwise shard the model after `get_peft_model`, as Trainer does."
        )


@cache
def layer_class() -> type[Any]:
    """PEFT's wrapper of parameters with the methods above; made on first use, since PEFT is an extra."""
    from peft.tuners.lora.layer import ParamWrapper

    # PEFT knows its wrappers of parameters by this class name.
    return type("ParamWrapper", (ExpertLora, ParamWrapper), {"__module__": __name__})


def __getattr__(name: str) -> type:
    if name == "ParamWrapper":  # so that a model with such layers can be pickled
        return layer_class()
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
