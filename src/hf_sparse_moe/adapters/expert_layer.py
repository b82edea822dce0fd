"""The PEFT layer around an experts module: what PEFT's own does, by products beside W instead of an update of W."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .expert_factors import ExpertFactor, pack_in_peft_files
from .expert_parallel import check_sharding, expert_parallel_low_rank
from .low_rank import LowRank
from .low_rank_experts import low_rank_experts
from .quantized_weight import QuantizedWeight


if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.lora.layer import ParamWrapper as _Base
else:  # what `layer_class` makes has both
    _Base = nn.Module

UP_NAMES = ("gate_up_proj", "up_proj")
PROJECTIONS = ("gate", "up", "down")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_BASE = "__base__"  # PEFT's name, in `adapter_names`, for no adapter


def shape_of(parameter: torch.Tensor) -> torch.Size:
    """Of all of it, which ZeRO-3 hides; what torch shares out (`DTensor`) tells it itself."""
    return getattr(parameter, "ds_shape", parameter.shape)


def follows_interface(module: nn.Module) -> bool:
    """Whether a module has the shape that transformers' experts backends know."""
    names = {name for name, parameter in module.named_parameters(recurse=False) if len(shape_of(parameter)) == 3}
    return hasattr(module, "has_gate") and {"down_proj"} < names <= {"down_proj", *UP_NAMES} and len(names) == 2


class ExpertLora(_Base):
    """
    Low-rank adapters of one projection of all experts; PEFT nests two, and the outer one computes for both.

    It stands before PEFT's `ParamWrapper` in [`layer_class`], whose place in the model, keys and files it keeps.
    """

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
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config, target_name=target_name)

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        shape = shape_of(getattr(module, self.parameter_name))
        self.num_experts = shape[0]
        self._did_swap_in_out_features = not module.is_transposed  # PEFT's name for (E, out, in)
        return (shape[1], shape[2]) if module.is_transposed else (shape[2], shape[1])

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, target_name: str = "", **kwargs
    ) -> None:
        """Add an adapter, or begin one anew."""
        if r <= 0:
            raise ValueError(f"`r={r}` is no rank: give a positive number.")
        _refuse_unsupported(config)
        experts = self._chosen_experts(config, target_name)
        columns = self._chosen_columns(config)
        weight = self.get_param()
        check_sharding(self.experts, target_name, weight, config.modules_to_save)
        _refuse_unsupported_weight(weight, target_name)
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
        self.use_rslora[adapter_name], self.use_dora[adapter_name] = config.use_rslora, False
        self.lora_bias[adapter_name] = False
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self.lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.lora_A[adapter_name] = ExpertFactor(
            experts, self.num_experts, r, self.in_features, slice(None), False, weight
        )
        self.lora_B[adapter_name] = ExpertFactor(
            experts, self.num_experts, r, self.out_features, columns, True, weight
        )
        self.reset_lora_parameters(adapter_name, config.init_lora_weights)
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

    @property
    def experts(self) -> Any:
        """The experts module itself."""
        return self.get_base_layer()

    def _chosen_experts(self, config: LoraConfig, target_name: str) -> tuple[int, ...]:
        chosen = getattr(config, "experts", None)
        layer = target_name.rpartition(".")[0]
        if not chosen:
            return tuple(range(self.num_experts))
        if layer not in chosen:
            raise ValueError(f"`experts` names no experts of `{layer}`, which `target_parameters` names.")
        wrong = [expert for expert in chosen[layer] if not 0 <= expert < self.num_experts]
        if wrong or not chosen[layer]:
            raise ValueError(
                f"`experts` gives {chosen[layer]} for `{layer}`, which has experts 0 to {self.num_experts - 1}."
            )
        return tuple(sorted(set(chosen[layer])))

    def _chosen_columns(self, config: LoraConfig) -> slice:
        projections = set(getattr(config, "projections", None) or PROJECTIONS)
        if self.parameter_name != "gate_up_proj" or {"gate", "up"} <= projections:
            return slice(None)
        half = self.out_features // 2
        if self.experts.is_concatenated:
            return slice(0, half) if "gate" in projections else slice(half, None)
        return slice(0, None, 2) if "gate" in projections else slice(1, None, 2)

    def _projections(self) -> list[ExpertLora]:
        """This layer and the one that it is nested around, if any."""
        found: list[ExpertLora] = [self]
        while isinstance(found[-1].base_layer, ExpertLora):
            found.append(found[-1].base_layer)
        return found

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
        layers = self._projections()
        experts = self.experts
        if self.disable_adapters:
            for layer in layers:
                if layer.merged:
                    layer.unmerge()
        tokens = self._tokens_of(adapter_names, len(hidden_states), hidden_states.device)
        adapters: dict[str, list[LowRank]] = {}
        for layer in layers:
            if not layer.disable_adapters and not layer.merged:
                adapters[layer.parameter_name] = layer._low_rank(tokens)
        if not any(adapters.values()):
            return experts(hidden_states, top_k_index, top_k_weights)
        compute = low_rank_experts
        if experts._is_expert_parallel:
            if tokens is not None:
                raise ValueError("`adapter_names` does not work with expert parallelism. Use one adapter a batch.")
            compute = expert_parallel_low_rank
        up_name = "gate_up_proj" if experts.has_gate else "up_proj"
        return compute(
            experts,
            hidden_states,
            top_k_index,
            top_k_weights,
            adapters.get(up_name, []),
            adapters.get("down_proj", []),
        )

    def _low_rank(self, tokens: dict[str, torch.Tensor] | None) -> list[LowRank]:
        found = []
        for name in self.active_adapters if tokens is None else tokens:
            if name in self.lora_A:
                a, b = self._factors(name)
                dropout = self.lora_dropout[name]
                rate = dropout.p if self.training and isinstance(dropout, nn.Dropout) else 0.0
                served = None if tokens is None else tokens[name]
                found.append(LowRank(a.weight, b.weight, self.scaling[name], a.experts, b.columns, rate, served))
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
        return {
            name: torch.tensor([other == name for other in adapter_names], device=device)
            .repeat_interleave(count // len(adapter_names))
            .unsqueeze(1)
            for name in dict.fromkeys(adapter_names)
            if name != _BASE
        }

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters to the experts' weights, expert after expert."""
        from peft.tuners.tuners_utils import check_adapters_to_merge

        weight = self.get_param()
        if isinstance(weight, DTensor) or weight.shape != shape_of(weight):
            raise ValueError(
                "Adapters do not merge into experts that are sharded over ranks. Save the adapter, and merge it in "
                "one process."
            )
        if isinstance(weight, QuantizedWeight):
            raise ValueError(
                "Adapters do not merge into quantised experts, which would round their update away. Call "
                "`dequantize_experts(model)` first, or load the adapter into the unquantised model."
            )
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.lora_A:
                self._add_to_weight(name, 1.0, safe_merge)
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Take merged adapters out of the experts' weights again."""
        while self.merged_adapters:
            self._add_to_weight(self.merged_adapters.pop(), -1.0, False)

    @torch.no_grad()
    def _add_to_weight(self, name: str, sign: float, safe: bool) -> None:
        weight = self.get_param()
        a, b = self._factors(name)
        if safe and not all(factor.weight.isfinite().all() for factor in (a, b)):
            raise ValueError(f"Adapter `{name}` holds numbers that are not finite. Load or train it again.")
        for slot, expert in enumerate(a.experts):
            update = (b.weight[slot].t() @ a.weight[slot]).mul_(sign * self.scaling[name]).to(weight.dtype)
            if self.experts.is_transposed:
                weight[expert, :, b.columns] += update.t()
            else:
                weight[expert, b.columns] += update

    def get_delta_factors(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        """`(lhs, rhs, scale)`, so that the update of the weight is `scale * lhs @ rhs`."""
        a, b = (factor.all_experts() for factor in self._factors(adapter_name))
        lhs, rhs = b.transpose(1, 2), a
        if self.experts.is_transposed:
            lhs, rhs = a.transpose(1, 2), b
        return lhs, rhs, self.scaling[adapter_name]

    def get_delta_weight(self, adapter_name: str, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The update of all experts' weights, which no forward builds."""
        lhs, rhs, scale = self.get_delta_factors(adapter_name)
        return (lhs @ rhs * scale).to(self.get_param().dtype)


_UNSUPPORTED = ("use_dora", "lora_bias", "alora_invocation_tokens", "velora_config", "kasa_config", "fan_in_fan_out")


def _refuse_unsupported(config: LoraConfig) -> None:
    for name in _UNSUPPORTED:
        if value := getattr(config, name, None):
            raise ValueError(f"`{name}={value!r}` is not supported by LoRA on experts. Leave it out.")
    if config.init_lora_weights not in (True, False, "gaussian"):
        raise ValueError(
            f"`init_lora_weights={config.init_lora_weights!r}` is not supported by LoRA on experts, only True, False "
            'and "gaussian" are.'
        )


def _refuse_unsupported_weight(weight: torch.Tensor, name: str) -> None:
    if type(weight.data) not in (torch.Tensor, QuantizedWeight, DTensor) or weight.dtype not in _DTYPES:
        raise ValueError(
            f"`{name}` is quantised ({weight.dtype}) in a way that no adapter of experts computes with. Load the "
            "experts unquantised, and call `quantize_experts(model)`."
        )


@cache
def layer_class() -> type[Any]:
    """PEFT's wrapper of parameters with the methods above; made on first use, since PEFT is an extra."""
    from peft.tuners.lora.layer import ParamWrapper

    pack_in_peft_files()
    # PEFT knows its wrappers of parameters by this class name.
    return type("ParamWrapper", (ExpertLora, ParamWrapper), {"__module__": __name__})


def make_layer(target: Any, adapter_name: str, config: LoraConfig, **kwargs) -> nn.Module | None:
    """The layer for `target`, or None for what is left to PEFT; PEFT calls it for every target of a config."""
    experts = target.get_base_layer() if hasattr(target, "get_base_layer") else target
    if kwargs.get("parameter_name") is None or not follows_interface(experts):
        return None
    return layer_class()(target, adapter_name, config=config, **kwargs)


def __getattr__(name: str) -> type:
    if name == "ParamWrapper":  # so that a model with such layers can be pickled
        return layer_class()
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
