"""How the tokens of some text spread over the experts. G groups, E experts, T tokens, K experts a token."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_sparse_moe.models.balancing import sequence_counts

from .mixture_layers import find_mixture_layers, routing_events


ALL = "all"


@dataclass(frozen=True)
class LayerRouting:
    """
    The assignments of one sparse layer; everything else follows from them.

    Args:
        side (`str`): `"encoder"` or `"decoder"`.
        position (`int`): The place among the sparse layers of its side, from 0.
        groups (`tuple[str, ...]`): The names of the rows of `counts`.
        counts (`torch.Tensor` of shape `(G, E)`): How many (token, expert) assignments of each group each expert got.
    """

    side: str
    position: int
    groups: tuple[str, ...]
    counts: torch.Tensor

    @property
    def load(self) -> torch.Tensor:
        """`(E,)`: each expert's share of all assignments; the shares sum to 1."""
        return _shares(self.counts.sum(dim=0))

    @property
    def group_load(self) -> torch.Tensor:
        """`(G, E)`: each expert's share of a group's assignments; every row sums to 1."""
        return _shares(self.counts)

    @property
    def entropy(self) -> float:
        """Entropy of `load` divided by log E: 1 is an even load, 0 is one expert for all."""
        experts = self.counts.shape[1]
        return 1.0 if experts == 1 else _entropy(self.load) / torch.log(torch.tensor(float(experts))).item()

    @property
    def max_violation(self) -> float:
        """MaxVio (arXiv 2408.15664): the highest load over the mean load, minus 1; 0 is an even load."""
        return (self.load.max() * self.counts.shape[1]).item() - 1

    @property
    def dead_experts(self) -> list[int]:
        """The experts that no token reached."""
        return (self.counts.sum(dim=0) == 0).nonzero().flatten().tolist()

    @property
    def mutual_information(self) -> float:
        """
        Mutual information of group and expert over the mean of their entropies: 0 when knowing the expert says nothing
        about the group, 1 when each tells the other.
        """
        joint = self.counts / self.counts.sum().clamp(min=1)
        by_group, by_expert = _entropy(joint.sum(dim=1)), _entropy(joint.sum(dim=0))
        if by_group == 0 or by_expert == 0:
            return 0.0
        return max(0.0, 2 * (by_group + by_expert - _entropy(joint.flatten())) / (by_group + by_expert))

    def to_dict(self) -> dict[str, Any]:
        """All of it in plain numbers, for JSON."""
        return {
            "side": self.side,
            "position": self.position,
            "load": self.load.tolist(),
            "group_load": dict(zip(self.groups, self.group_load.tolist(), strict=True)),
            "entropy": self.entropy,
            "max_violation": self.max_violation,
            "dead_experts": self.dead_experts,
            "mutual_information": self.mutual_information,
        }


@dataclass(frozen=True)
class RoutingStatistics:
    """
    What [`routing_statistics`] found.

    Args:
        layers (`list[LayerRouting]`): One a sparse layer, in the order of their call: encoder before decoder.
        num_experts (`int`): E.
        num_experts_per_tok (`int`): K.
    """

    layers: list[LayerRouting]
    num_experts: int
    num_experts_per_tok: int

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups, in the order in which they first appeared."""
        return self.layers[0].groups

    def to_dict(self) -> dict[str, Any]:
        """All of it in plain numbers, for JSON."""
        return {
            "num_experts": self.num_experts,
            "num_experts_per_tok": self.num_experts_per_tok,
            "layers": [layer.to_dict() for layer in self.layers],
        }


@torch.no_grad()
def routing_statistics(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Any]], groups: Iterable[str] | None = None
) -> RoutingStatistics:
    """
    Run `model` in evaluation mode on `batches`, and count which expert serves which token. Pads do not count.

    Args:
        model (`PreTrainedModel`): A mixture of this package or of transformers, of any family and head.
        batches (`Iterable[Mapping[str, torch.Tensor]]`): What the forward takes, such as an unshuffled `DataLoader`.
        groups (`Iterable[str]`, *optional*):
            One name (a domain, a language, a label) for each sequence, in the order of the batches. Without them all
            sequences are one group.

    Returns:
        [`RoutingStatistics`]

    Raises:
        ValueError: no batches, no sparse layer, or not one group for each sequence.
    """
    mixture_layers = find_mixture_layers(model)
    labels = None if groups is None else [str(group) for group in groups]
    names = tuple(dict.fromkeys([ALL] if labels is None else labels))
    layers: list[LayerRouting] = []
    seen = 0
    training = model.training
    model.eval()
    try:
        for batch in batches:
            inputs = {
                name: value.to(model.device) if isinstance(value, torch.Tensor) else value
                for name, value in batch.items()
            }
            sequences = len(inputs[model.main_input_name])
            if labels is not None and seen + sequences > len(labels):
                raise ValueError(
                    f"`groups` has {len(labels)} entries, fewer than `batches` has sequences. Give one a sequence."
                )
            events = routing_events(model, mixture_layers, inputs)
            if not layers:
                sides = [event.layer.side for event in events]
                for place, event in enumerate(events):
                    counts = torch.zeros(len(names), event.layer.num_experts, dtype=torch.float64)
                    layers.append(LayerRouting(sides[place], sides[:place].count(sides[place]), names, counts))
            rows = [ALL] * sequences if labels is None else labels[seen : seen + sequences]
            rows_of = torch.tensor([names.index(group) for group in rows])
            for layer, event in zip(layers, events, strict=True):
                index = event.routing.top_k_index
                by_sequence = sequence_counts(index, layer.counts.shape[1], sequences, event.counted_rows)
                layer.counts.index_add_(0, rows_of, by_sequence.double().cpu())
            seen += sequences
    finally:
        model.train(training)
    if not layers:
        raise ValueError("`batches` is empty: there is nothing to count.")
    if labels is not None and seen != len(labels):
        raise ValueError(
            f"`groups` has {len(labels)} entries, but `batches` has {seen} sequences. Give one a sequence."
        )
    return RoutingStatistics(
        layers, max(layer.num_experts for layer in mixture_layers), max(layer.top_k for layer in mixture_layers)
    )


def _shares(counts: torch.Tensor) -> torch.Tensor:
    return counts / counts.sum(dim=-1, keepdim=True).clamp(min=1)


def _entropy(probabilities: torch.Tensor) -> float:
    positive = probabilities[probabilities > 0]
    return -(positive * positive.log()).sum().item()
