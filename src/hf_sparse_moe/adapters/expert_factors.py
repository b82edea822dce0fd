"""A and B of many experts as one parameter each, in memory as products want them, in files as PEFT packs them."""

from __future__ import annotations

import torch
from torch import nn


class ExpertFactor(nn.Module):
    """
    One factor of N adapted experts out of E: `weight` (N, r, features).

    A state dict holds it as PEFT's `target_parameters` do, for all E experts, with zeros for those without adapter:
    A as `(E r, in)`, and B, the experts running fastest, as `(out, r E)`.

    Args:
        experts (`tuple[int, ...]`): The N adapted experts.
        num_experts (`int`): E.
        rank (`int`): r.
        features (`int`): The projection's inputs (A) or outputs (B), all of them.
        columns (`slice`): Which of the features it reaches.
        is_b (`bool`): Whether it is B.
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
        like: torch.Tensor,
    ):
        super().__init__()
        self.experts, self.num_experts, self.rank = experts, num_experts, rank
        self.features, self.columns, self.is_b = features, columns, is_b
        reached = len(range(*columns.indices(features)))
        self.weight = nn.Parameter(torch.empty(len(experts), rank, reached, device=like.device, dtype=like.dtype))

    def all_experts(self) -> torch.Tensor:
        """`(E, r, features)`, zero where there is no adapter."""
        if len(self.experts) == self.num_experts and self.weight.shape[-1] == self.features:
            return self.weight
        full = self.weight.new_zeros(self.num_experts, self.rank, self.features)
        full[list(self.experts), :, self.columns] = self.weight
        return full

    def packed(self) -> torch.Tensor:
        """The file's form."""
        full = self.all_experts()
        return full.permute(2, 1, 0).flatten(1) if self.is_b else full.flatten(0, 1)

    def _packed_shape(self) -> tuple[int, int]:
        rows = self.num_experts * self.rank
        return (self.features, rows) if self.is_b else (rows, self.features)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        packed = self.packed()
        destination[prefix + "weight"] = packed if keep_vars else packed.detach()

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        key = prefix + "weight"
        if (packed := state_dict.get(key)) is not None:
            if tuple(packed.shape) != self._packed_shape():
                errors.append(
                    f"`{key}` of the adapter is {tuple(packed.shape)}, but {self.num_experts} experts of "
                    f"{self.features} {'outputs' if self.is_b else 'inputs'} at rank {self.rank} need "
                    f"{self._packed_shape()}. Load it into the model, and with the rank, that it was trained for."
                )
                return
            full = (
                packed.unflatten(1, (self.rank, -1)).permute(2, 1, 0)
                if self.is_b
                else packed.unflatten(0, (-1, self.rank))
            )
            state_dict[key] = full[list(self.experts)][..., self.columns].contiguous()
            if self.is_b and state_dict[key].count_nonzero() != full.count_nonzero():
                errors.append(
                    f"`{key}` of the adapter is not zero outside of experts {list(self.experts)} and of the chosen "
                    "projections. Choose, in `experts` and `projections`, at least what it was trained for."
                )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def extra_repr(self) -> str:
        return f"{len(self.experts)} of {self.num_experts} experts, {tuple(self.weight.shape)}"
