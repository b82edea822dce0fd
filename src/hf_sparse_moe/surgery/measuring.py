"""
`measure_experts`: what each expert of a mixture does on some text, in one pass.

T tokens, E experts, K experts a token, H hidden, G groups, S sampled tokens. f_e(x) is what expert e computes of the
token x, X_e are the tokens that it serves, and g_e(x) is the weight that multiplies f_e(x), divided by the sum of the
token's weights where it has several.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import log
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME, logging

from hf_sparse_moe.insight.losses import GroupLosses, grouped_batches
from hf_sparse_moe.models.masks import tokens_by_side
from hf_sparse_moe.models.routing import Routing, RoutingEvent
from hf_sparse_moe.routing.mixture_layers import (
    MixtureLayer,
    RoutingObservation,
    event_of,
    find_mixture_layers,
    observe_routing,
    without_wrapper,
)
from hf_sparse_moe.routing.statistics import ALL

from .measurements import ExpertMeasurements, LayerMeasurements, router_sha256, vocabulary_sha256


logger = logging.get_logger(__name__)

FEWEST_TOKENS = 30  # that an expert should see
SAMPLED_TOKENS = 256  # of a layer, on which all its experts are compared
MOST_PAIRED_EXPERTS = 16  # whose products are kept for each sampled token


@torch.no_grad()
def measure_experts(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    groups: Iterable[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> ExpertMeasurements:
    """
    Run a mixture over some text in evaluation mode, and measure what each expert does: how often it is chosen, with
    which weights, and how large and how alike the experts' outputs are. Pads do not count.

    Every expert that a token chooses is computed twice, and all experts of a layer on 256 of its tokens. An expert
    that serves fewer than 30 tokens is named in a warning; so is a loss above that of guessing, which text of another
    tokenizer has.

    Args:
        model (`PreTrainedModel`): A mixture of this package or of transformers, of any family and head.
        batches (`Iterable[Mapping[str, torch.Tensor]]`): What the forward takes, such as an unshuffled `DataLoader`.
        groups (`Iterable[str]`, *optional*): One name (a domain, a language) for each sequence, in the order of the
            batches. Without them all sequences are one group.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): That of the text. Its vocabulary is compared with that of
            the folder that `model` was loaded from, and of each that the measurements are used on.

    Returns:
        [`ExpertMeasurements`], which [`prune_experts`] and its siblings take, also as a file.

    Raises:
        ValueError: no batches, no sparse layer, not one group for each sequence, another tokenizer than the
            model's, token ids that it does not have, or experts that compute NaN.

    Example:
        ```python
        measured = measure_experts(model, batches)
        measured.save("measured.safetensors")
        ```
    """
    layers = find_mixture_layers(model)
    vocabulary, folder = None if tokenizer is None else vocabulary_sha256(tokenizer), Path(model.name_or_path or "")
    ExpertMeasurements((), [], None, vocabulary).check_text(folder if (folder / CONFIG_NAME).is_file() else None)
    names, passes = grouped_batches(model, batches, groups)
    sums = [_Sums(layer, len(names)) for layer in layers]
    by_name = {layer.name: sum_ for layer, sum_ in zip(layers, sums, strict=True)}
    losses = GroupLosses(names)
    training = model.training
    model.eval()
    try:
        for inputs, group_B in passes:
            tokens = tokens_by_side(model, inputs)
            for each in sums:
                each.groups_B = group_B

            def see(layer: MixtureLayer, routing: Routing, tokens: Any = tokens) -> None:
                by_name[layer.name].route(event_of(layer, routing, tokens))

            apart = [each for each in sums if each.layer.experts is not each.layer.block]
            with (
                observe_routing(layers, see),
                RoutingObservation(
                    each.layer.experts.register_forward_pre_hook(each.call, with_kwargs=True) for each in apart
                ),
            ):
                losses.add(model, inputs, group_B)
        measured = [each.finish() for each in sums]
    finally:
        model.train(training)
    rare = [
        f"{expert} of `{layer.name}` ({int(count)})"
        for layer in measured
        for expert, count in enumerate(layer.tokens.tolist())
        if count < FEWEST_TOKENS
    ]
    if rare:
        more = f" and {len(rare) - 20} more" if len(rare) > 20 else ""
        logger.warning(
            f"Fewer than {FEWEST_TOKENS} tokens reached the experts {', '.join(rare[:20])}{more}. What is measured of "
            "them says little: measure on more text."
        )
    num_embeddings: Any = model.get_input_embeddings().num_embeddings
    told, guessing = losses.by_group(), log(num_embeddings)
    if told is not None and told[ALL]["loss"] > 1.01 * guessing:
        logger.warning(
            f"The loss on this text is {told[ALL]['loss']:.1f} nats a token, above the {guessing:.1f} of guessing: "
            "the text is of another tokenizer, or of a kind that the model never learnt."
        )
    return ExpertMeasurements(tuple(names), measured, told, vocabulary)


class _Sums:
    """What is summed up of one layer."""

    def __init__(self, layer: MixtureLayer, groups: int):
        self.layer, self.groups = layer, groups
        self.groups_B = torch.empty(0)
        self.event: RoutingEvent | None = None
        self.sums = {
            name: torch.zeros(groups * layer.num_experts, dtype=torch.float64)
            for name in ("tokens", "weights", "norms", "weighted_norms")
        }
        self.has_outputs = False
        self.generator = torch.Generator().manual_seed(0)
        self.keys_S = torch.empty(0)
        self.sample: list[torch.Tensor] = []  # states, logits and weights of the sampled tokens

    def route(self, event: RoutingEvent) -> None:
        """The choice of one call."""
        self.event = event
        routing = event.routing
        rows, index, weights = self._counted(event)
        token = rows if routing.token_index is None else routing.token_index[rows]
        group = self.groups_B[token // (len(routing.router_logits) // event.num_sequences)]
        self.slots = (group[:, None] * self.layer.num_experts + index).flatten()
        self.g = weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-20) if index.shape[-1] > 1 else weights
        self._add("tokens", torch.ones_like(self.g))
        self._add("weights", self.g)

    def call(self, experts: nn.Module, args: tuple, kwargs: dict) -> None:
        """The experts are about to be called with what was chosen."""
        if (event := self.event) is None:
            return
        self.event = None
        states, choice, *_ = [*args, *kwargs.values(), torch.empty(0)]
        if choice.dtype == torch.bool or choice.is_floating_point() or choice.dim() != 2:
            return
        rows, index, _ = self._counted(event)
        states_TH = states.flatten(0, -2)
        states_RH = states_TH[rows].repeat_interleave(index.shape[-1], dim=0)
        ones = torch.ones(len(states_RH), 1, dtype=states.dtype, device=states.device)
        outputs = experts.forward(states_RH, index.reshape(-1, 1), ones)  # past the hooks
        norms = outputs.float().flatten(1).norm(dim=-1).reshape(self.g.shape)
        self._add("norms", norms)
        self._add("weighted_norms", self.g * norms)
        self.has_outputs = True
        self._take_sample(states_TH[rows], event.routing, rows)

    def _counted(self, event: RoutingEvent) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The rows that count, and their experts and weights, which are 0 for what was dropped."""
        routing, rows = event.routing, event.counted_rows
        index, weights = routing.top_k_index, routing.top_k_weights.float()
        rows = torch.arange(len(index), device=index.device) if rows is None else rows.nonzero().flatten()
        return rows, index[rows], weights[rows]

    def _add(self, name: str, values: torch.Tensor) -> None:
        self.sums[name].index_add_(0, self.slots.cpu(), values.flatten().double().cpu())

    def _take_sample(self, states_RH: torch.Tensor, routing: Routing, rows: torch.Tensor) -> None:
        """Any tokens of the text, each with the same chance."""
        weights_RE = torch.zeros(len(rows), self.layer.num_experts, device=rows.device)
        weights_RE.scatter_(1, routing.top_k_index[rows], routing.top_k_weights[rows].float())
        token = rows if routing.token_index is None else routing.token_index[rows]
        new = [states_RH, routing.router_logits[token].float(), weights_RE]
        keys = torch.cat([self.keys_S, torch.rand(len(rows), generator=self.generator)])
        best = keys.topk(min(SAMPLED_TOKENS, len(keys))).indices.sort().values
        joined = [torch.cat(pair) for pair in zip(self.sample, new, strict=True)] if self.sample else new
        self.keys_S, self.sample = keys[best], [tensor[best.to(tensor.device)] for tensor in joined]

    def finish(self) -> LayerMeasurements:
        layer = self.layer
        if not self.sums["tokens"].any():
            raise ValueError(f"No token reached `{layer.name}`: all of `batches` are pads. Measure on some text.")
        named = self.sums if self.has_outputs else {name: self.sums[name] for name in ("tokens", "weights")}
        tensors = {name: values.reshape(self.groups, -1) for name, values in named.items()}
        if self.sample:
            tensors |= self._compare()
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise ValueError(
                f"The experts or the router of `{layer.name}` computed NaN or infinity on this text, so that nothing "
                "can be measured. Load the model in float32 or bfloat16, and see `hf-sparse-moe doctor`."
            )
        known = dict(layer.router.state_dict())
        if not known:  # a hash has no weights
            experts: Any = without_wrapper(layer.experts)
            known = {"first expert": experts.down_proj[0]}
        return LayerMeasurements(layer.name, layer.num_experts, layer.top_k, router_sha256(known), tensors)

    def _compare(self) -> dict[str, torch.Tensor]:
        states_SH, logits_SE, weights_SE = self.sample
        ones = torch.ones(len(states_SH), 1, dtype=states_SH.dtype, device=states_SH.device)
        outputs_ESH = torch.stack(
            [
                self.layer.experts.forward(states_SH, torch.full_like(ones, expert, dtype=torch.long), ones)
                for expert in range(self.layer.num_experts)
            ]
        ).float()
        outputs_ESH = outputs_ESH.flatten(2)
        unit = nn.functional.normalize(outputs_ESH, dim=-1)
        bias = self.layer.selection_bias
        found = {
            "mean_outputs": outputs_ESH.mean(dim=1),
            "similarity": torch.einsum("ish,jsh->ij", unit, unit) / len(states_SH),
            "logits": logits_SE,
            "sampled_weights": weights_SE,
            "selection_bias": torch.zeros(len(outputs_ESH)) if bias is None else bias.flatten().float(),
        }
        if self.layer.num_experts <= MOST_PAIRED_EXPERTS:
            found["products"] = torch.einsum("ish,jsh->sij", outputs_ESH, outputs_ESH)
        return {name: tensor.detach().cpu() for name, tensor in found.items()}
