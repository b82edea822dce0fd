"""A and B of many experts as one parameter each, in memory as products want them, in files as PEFT packs them."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .adapter_match import WRAPPERS, check_match


class ExpertFactor(nn.Module):
    """
    One factor of N adapted experts out of E: `weight` (N, r, features), of the projection's inputs (A) or outputs (B).

    PEFT's files hold it as its `target_parameters` do, for all E experts, with zeros for those without adapter: A as
    `(E r, in)`, and B, the experts running fastest, as `(out, r E)`. A state dict holds the parameter itself, since
    FSDP, ZeRO and their checkpoints take each entry for a parameter.

    Args:
        experts (`tuple[int, ...]`): The N adapted experts.
        num_experts (`int`): E.
        rank (`int`): r.
        features (`int`): All inputs or outputs of the projection.
        columns (`slice`): Which of the features it reaches.
        is_b (`bool`): Whether it is B.
        shared (`bool`): Whether the N experts have one: `weight` is (1, r, features) then.
        like (`torch.Tensor`): Gives device and dtype.
    """

    def __init__(
        self,
        experts: tuple[int, ...],
        num_experts: int,
        rank: int,
        features: int,
        columns: slice,
        is_b: bool,
        shared: bool,
        like: torch.Tensor,
    ):
        super().__init__()
        self.experts, self.num_experts, self.rank = experts, num_experts, rank
        self.features, self.columns, self.is_b, self.shared = features, columns, is_b, shared
        reached = len(range(*columns.indices(features)))
        self.weight = nn.Parameter(
            torch.empty(1 if shared else len(experts), rank, reached, device=like.device, dtype=like.dtype)
        )

    def of_each(self, weight: torch.Tensor | None = None) -> torch.Tensor:
        """`(N, r, reached features)`, the same for each expert where they share one."""
        weight = self.weight if weight is None else weight
        return weight.expand(len(self.experts), -1, -1).contiguous() if self.shared else weight

    def all_experts(self, weight: torch.Tensor | None = None) -> torch.Tensor:
        """`(E, r, features)`, zero where there is no adapter."""
        weight = self.of_each(weight)
        if len(self.experts) == self.num_experts and weight.shape[-1] == self.features:
            return weight
        full = weight.new_zeros(self.num_experts, self.rank, self.features)
        full[list(self.experts), :, self.columns] = weight
        return full

    def chosen(self, full: torch.Tensor, name: str) -> torch.Tensor:
        """
        The parameter's form of `full` (E, r, features). Raises a `ValueError` where that, whose name is `name`, has
        more than was chosen.
        """
        weight = full[list(self.experts)][..., self.columns].contiguous()
        if self.is_b and weight.count_nonzero() != full.count_nonzero():
            raise ValueError(
                f"`{name}` of the adapter is not zero outside of experts {list(self.experts)} and of the chosen "
                "projections. Choose, in `experts` and `projections`, at least what it was trained for."
            )
        if self.shared and not (weight == weight[:1]).all():
            raise ValueError(
                f"`{name}` of the adapter is not the same for all experts, which `shared=True` says. Load it with "
                "`shared=False`."
            )
        return weight[:1] if self.shared else weight

    def to_file(self, weight: torch.Tensor) -> torch.Tensor:
        """The file's form of `weight` (N, r, features), which is gathered where ranks share it out."""
        whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
        full = self.all_experts(whole.detach())
        return full.permute(2, 1, 0).flatten(1) if self.is_b else full.flatten(0, 1)

    def from_file(self, packed: torch.Tensor, name: str) -> torch.Tensor:
        """
        The parameter's form of `packed`. Raises a `ValueError` where that, whose name is `name`, is for other experts,
        another width or another rank.
        """
        rows = self.num_experts * self.rank
        needed = (self.features, rows) if self.is_b else (rows, self.features)
        if tuple(packed.shape) != needed:
            raise ValueError(
                f"`{name}` of the adapter is {tuple(packed.shape)}, but {self.num_experts} experts of "
                f"{self.features} {'outputs' if self.is_b else 'inputs'} at rank {self.rank} need "
                f"{needed}. Load it into the model, and with the rank, that it was trained for."
            )
        full = (
            packed.unflatten(1, (self.rank, -1)).permute(2, 1, 0)
            if self.is_b
            else packed.unflatten(0, (-1, self.rank))
        )
        return self.chosen(full, name)

    def extra_repr(self) -> str:
        return f"{len(self.experts)} of {self.num_experts} experts, {tuple(self.weight.shape)}"


@cache
def pack_in_peft_files() -> None:
    """
    Have PEFT write and read factors in its own form. It has no hook of a layer for that: its `LoraModel` chooses the
    tensors of a file from a state dict, whoever gathered that, and names those of a file as a state dict does; a hot
    swap names them itself.
    """
    from peft.tuners import lora
    from peft.utils import hotswap

    lora_model: Any = lora.LoraModel
    choose = lora_model._get_adapter_state_dict.__func__
    rename = lora_model._remap_adapter_state_dict_for_load.__func__
    swap = hotswap.hotswap_adapter_from_state_dict

    def choose_packed(cls: type, model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        tensors = choose(cls, model, *args, **kwargs)
        return tensors | {name: factor.to_file(tensors[name]) for name, factor in _factors(model, tensors)}

    def rename_unpacked(
        cls: type, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        tensors = rename(cls, model, config, adapter_name, state_dict)
        if hasattr(config, "projections") or any(isinstance(module, ExpertFactor) for module in model.modules()):
            check_match(model, adapter_name, tensors)
        return _unpacked(model, tensors)

    def swap_unpacked(model: nn.Module, state_dict: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> None:
        swap(model, _unpacked(model, state_dict), *args, **kwargs)

    lora_model._get_adapter_state_dict = classmethod(choose_packed)
    lora_model._remap_adapter_state_dict_for_load = classmethod(rename_unpacked)
    hotswap.hotswap_adapter_from_state_dict = swap_unpacked


def _factors(model: nn.Module, tensors: dict[str, torch.Tensor]) -> list[tuple[str, ExpertFactor]]:
    named = ((WRAPPERS.sub("", f"{name}.weight"), module) for name, module in model.named_modules())
    return [(name, module) for name, module in named if isinstance(module, ExpertFactor) and name in tensors]


def _unpacked(model: nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors | {name: factor.from_file(tensors[name], name) for name, factor in _factors(model, tensors)}
