"""
`measure_experts`: what each expert of a mixture does on some text, in one pass.

T tokens, E experts, K experts a token, H hidden, G groups, S sampled tokens. f_e(x) is what expert e computes of the
token x, X_e are the tokens that it serves, and g_e(x) is the weight that multiplies f_e(x), divided by the sum of the
token's weights where it has several.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_sparse_moe.checkpoints.loading import load_whole
from hf_sparse_moe.models.masks import IGNORED_LABEL, tokens_by_side
from hf_sparse_moe.models.routing import Routing, RoutingEvent
from hf_sparse_moe.routing.mixture_layers import (
    MixtureLayer,
    RoutingObservation,
    event_of,
    find_mixture_layers,
    observe_routing,
)
from hf_sparse_moe.routing.statistics import ALL


logger = logging.get_logger(__name__)

FEWEST_TOKENS = 30  # that an expert should see
SAMPLED_TOKENS = 256  # of a layer, on which all its experts are compared
MOST_PAIRED_EXPERTS = 16  # whose products are kept for each sampled token
_KEY = "expert_measurements"
Evaluation = tuple[Sequence[Any], Sequence[str] | None]  # batches, and the group of each of their sequences


@dataclass(frozen=True)
class LayerMeasurements:
    """
    What was measured of one sparse layer.

    Args:
        name (`str`), num_experts (`int`), top_k (`int`), router_sha256 (`str`): The layer that it was measured on.
        tensors (`dict[str, torch.Tensor]`): Sums over the tokens of each group, `(G, E)`: `"tokens"`, how many an
            expert served, `"weights"` of g_e, `"norms"` of |f_e| and `"weighted_norms"` of g_e |f_e|. On the sampled
            tokens, for all experts: `"mean_outputs"` `(E, H)`, `"similarity"` `(E, E)`, the mean cosine of two
            experts' outputs, `"logits"` `(S, E)` of the router, `"sampled_weights"` `(S, E)`, 0 for experts that were
            not chosen, `"selection_bias"` `(E,)` and, of few experts, `"products"` `(S, E, E)` of their outputs. Where
            experts cannot be called one by one (Switch, JetMoe), there are only `"tokens"` and `"weights"`.
    """

    name: str
    num_experts: int
    top_k: int
    router_sha256: str
    tensors: dict[str, torch.Tensor]

    @property
    def tokens(self) -> torch.Tensor:
        """`(E,)`: the size of X_e."""
        return self.tensors["tokens"].sum(dim=0)

    @property
    def frequency(self) -> torch.Tensor:
        """`(E,)`: the share of all assignments that are the expert's."""
        return self.tokens / self.tokens.sum().clamp(min=1)

    @property
    def soft_frequency(self) -> torch.Tensor:
        """`(E,)`: the sum of g_e."""
        return self.tensors["weights"].sum(dim=0)

    @property
    def ean(self) -> torch.Tensor:
        """`(E,)`: the mean of |f_e| over X_e; 0 where that is empty."""
        return self._mean("norms")

    @property
    def reap(self) -> torch.Tensor:
        """`(E,)`: the mean of g_e |f_e| over X_e (arXiv 2510.13999); 0 where that is empty."""
        return self._mean("weighted_norms")

    def score(self, method: str) -> torch.Tensor:
        """`(E,)`, by the name of a method; raises a `ValueError` where it was not measured."""
        if method == "frequency":
            return self.frequency
        return {"reap": lambda: self.reap, "ean": lambda: self.ean}[method]()

    def _mean(self, name: str) -> torch.Tensor:
        if name not in self.tensors:
            raise ValueError(
                f"The experts of `{self.name}` cannot be called one by one, so their outputs were not measured. Take "
                '`method="frequency"`.'
            )
        return self.tensors[name].sum(dim=0) / self.tokens.clamp(min=1)

    def to_dict(self) -> dict[str, Any]:
        """What a person reads of it, in plain numbers, for JSON."""
        told: dict[str, Any] = {"name": self.name, "num_experts": self.num_experts, "top_k": self.top_k}
        names = ["tokens", "frequency", "soft_frequency", *(["ean", "reap"] if "norms" in self.tensors else [])]
        told |= {name: getattr(self, name).tolist() for name in names}
        if "similarity" in self.tensors:
            told["similarity"] = self.tensors["similarity"].tolist()
        return told


@dataclass(frozen=True)
class ExpertMeasurements:
    """
    What [`measure_experts`] found.

    Args:
        groups (`tuple[str, ...]`): The groups of the text, which are the rows of the layers' sums.
        layers (`list[LayerMeasurements]`): One a sparse layer.
        losses (`dict`, *optional*): By group, and for `"all"`, `{"loss": mean in nats, "labels": how many}` of a
            language model on the text; None where the model has no such head.
    """

    groups: tuple[str, ...]
    layers: list[LayerMeasurements]
    losses: dict[str, dict[str, float]] | None

    def to_dict(self) -> dict[str, Any]:
        """What a person reads of it, in plain numbers, for JSON."""
        return {
            "groups": list(self.groups),
            "losses": self.losses,
            "layers": [layer.to_dict() for layer in self.layers],
        }

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file, which [`ExpertMeasurements.load`] reads; raises an `OSError` where one is."""
        tensors = {
            f"{place}.{name}": tensor.contiguous()
            for place, layer in enumerate(self.layers)
            for name, tensor in layer.tensors.items()
        }
        fields = ("name", "num_experts", "top_k", "router_sha256")
        layers = [{field: getattr(layer, field) for field in fields} for layer in self.layers]
        told = json.dumps({"groups": self.groups, "losses": self.losses, "layers": layers})
        with Path(path).open("xb") as file:
            file.write(save(tensors, metadata={_KEY: told}))
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> ExpertMeasurements:
        """Read what [`ExpertMeasurements.save`] wrote; raises a `ValueError` for another file."""
        try:
            with safe_open(path, framework="pt") as file:
                told = json.loads((file.metadata() or {})[_KEY])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            layers = [
                LayerMeasurements(
                    **fields,
                    tensors={
                        name.partition(".")[2]: tensor
                        for name, tensor in tensors.items()
                        if name.partition(".")[0] == str(place)
                    },
                )
                for place, fields in enumerate(told["layers"])
            ]
            return cls(tuple(told["groups"]), layers, told["losses"])
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"`{path}` does not hold what `measure_experts` measured ({type(error).__name__}). Measure again: "
                "hf-sparse-moe measure."
            ) from error

    @classmethod
    def of(cls, given: ExpertMeasurements | str | Path) -> ExpertMeasurements:
        """Measurements, or those of a file."""
        return given if isinstance(given, cls) else cls.load(given)  # type: ignore[arg-type]

    def salience(self, method: str, layers: Sequence[str]) -> list[list[float]]:
        """The scores of the experts of these layers, by name; a `ValueError` for a layer that was not measured."""
        return [self.layer(name).score(method).tolist() for name in layers]

    def layer(self, name: str) -> LayerMeasurements:
        """The layer of that name; raises a `ValueError` where none was measured."""
        found = next((layer for layer in self.layers if layer.name == name), None)
        if found is None:
            raise ValueError(
                f"`measured` is of another model: it has no layer `{name}`, only "
                f"{[layer.name for layer in self.layers]}."
            )
        return found

    def check(self, layer: MixtureLayer, router: Mapping[str, torch.Tensor]) -> LayerMeasurements:
        """What was measured of a layer with these tensors in its router; a `ValueError` where it is another one."""
        found = self.layer(layer.name)
        sizes, expected = (found.num_experts, found.top_k), (layer.num_experts, layer.top_k)
        if sizes != expected:
            raise ValueError(
                f"`measured` is of another model: `{layer.name}` had {sizes[0]} experts, {sizes[1]} a token, and has "
                f"{expected[0]}, {expected[1]} a token. Measure again."
            )
        if found.router_sha256 != router_sha256(router):
            raise ValueError(
                f"`measured` is of another model: the router of `{layer.name}` has other weights. Measure again."
            )
        return found


def router_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """Of a router's tensors in bfloat16, in any order: the same in whichever dtype the model was loaded."""
    digests = sorted(
        hashlib.sha256(tensor.detach().cpu().bfloat16().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for tensor in tensors.values()
        if tensor.is_floating_point() and tensor.dim() > 1
    )
    return hashlib.sha256("".join(digests).encode()).hexdigest()


@torch.no_grad()
def measure_experts(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Any]], groups: Iterable[str] | None = None
) -> ExpertMeasurements:
    """
    Run a mixture over some text in evaluation mode, and measure what each expert does: how often it is chosen, with
    which weights, and how large and how alike the experts' outputs are. Pads do not count.

    Every expert that a token chooses is computed twice, and all experts of a layer on 256 of its tokens. An expert
    that serves fewer than 30 tokens is named in a warning.

    Args:
        model (`PreTrainedModel`): A mixture of this package or of transformers, of any family and head.
        batches (`Iterable[Mapping[str, torch.Tensor]]`): What the forward takes, such as an unshuffled `DataLoader`.
        groups (`Iterable[str]`, *optional*): One name (a domain, a language) for each sequence, in the order of the
            batches. Without them all sequences are one group.

    Returns:
        [`ExpertMeasurements`], which [`prune_experts`] and its siblings take, also as a file.

    Raises:
        ValueError: no batches, no sparse layer, not one group for each sequence, token ids that the model does not
            have, or experts that compute NaN.

    Example:
        ```python
        measured = measure_experts(model, batches)
        measured.save("measured.safetensors")
        ```
    """
    layers = find_mixture_layers(model)
    names, passes = _passes(model, batches, groups)
    sums = [_Sums(layer, len(names)) for layer in layers]
    by_name = {layer.name: sum_ for layer, sum_ in zip(layers, sums, strict=True)}
    losses = _Losses(names)
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
    return ExpertMeasurements(tuple(names), measured, losses.by_group())


@torch.no_grad()
def losses_by_group(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Any]], groups: Iterable[str] | None = None
) -> dict[str, dict[str, float]] | None:
    """As [`ExpertMeasurements`] has them."""
    names, passes = _passes(model, batches, groups)
    losses = _Losses(names)
    training = model.training
    model.eval()
    try:
        for inputs, group_B in passes:
            losses.add(model, inputs, group_B)
    finally:
        model.train(training)
    return losses.by_group()


def loss_change(
    before: PreTrainedModel | Path, after: PreTrainedModel | Path, evaluation: Evaluation | None
) -> dict[str, dict[str, float]] | None:
    """The loss before and after by group, where there is something to measure it on. Folders are loaded."""
    if evaluation is None:
        return None
    models = (load_whole(model) if isinstance(model, Path) else model for model in (before, after))
    first, second = (losses_by_group(model, *evaluation) for model in models)
    if first is None or second is None:
        return None
    return {
        group: {"before": loss["loss"], "after": second[group]["loss"], "labels": loss["labels"]}
        for group, loss in first.items()
    }


Pass = tuple[dict[str, Any], torch.Tensor]  # inputs, and the number of each sequence's group


def _passes(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Any]], groups: Iterable[str] | None
) -> tuple[list[str], Iterator[Pass]]:
    """The names of the groups, and the batches."""
    labels = None if groups is None else [str(group) for group in groups]
    names = list(dict.fromkeys([ALL] if labels is None else labels))
    vocab_size: Any = model.get_input_embeddings().num_embeddings

    def run() -> Iterator[Pass]:
        seen = 0
        for batch in batches:
            tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
            inputs = dict(batch) | {name: value.to(model.device) for name, value in tensors.items()}
            sequences = len(inputs[model.main_input_name])
            ids = inputs.get("input_ids")
            if ids is not None and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
                raise ValueError(
                    f"The text has the token id {int(ids.max())}, but the model has {vocab_size} tokens: it is of "
                    "another tokenizer. Take the model's own."
                )
            rows = [ALL] * sequences if labels is None else labels[seen : seen + sequences]
            seen += sequences
            if labels is not None and seen > len(labels):
                raise ValueError(
                    f"`groups` has {len(labels)} entries, fewer than `batches` has sequences. Give one a sequence."
                )
            if model.config.is_encoder_decoder and not {"labels", "decoder_input_ids"} & inputs.keys():
                inputs["labels"] = _labels(inputs)  # it writes what it reads
            yield inputs, torch.tensor([names.index(row) for row in rows], device=model.device)
        if not seen:
            raise ValueError("`batches` is empty: there is nothing to measure on.")
        if labels is not None and seen != len(labels):
            raise ValueError(
                f"`groups` has {len(labels)} entries, but `batches` has {seen} sequences. Give one a sequence."
            )

    return names, run()


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
        named = self.sums if self.has_outputs else {name: self.sums[name] for name in ("tokens", "weights")}
        tensors = {name: values.reshape(self.groups, -1) for name, values in named.items()}
        if self.sample:
            tensors |= self._compare()
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise ValueError(
                f"The experts or the router of `{layer.name}` computed NaN or infinity on this text, so that nothing "
                "can be measured. Load the model in float32 or bfloat16, and see `hf-sparse-moe doctor`."
            )
        router = dict(layer.router.state_dict())
        return LayerMeasurements(layer.name, layer.num_experts, layer.top_k, router_sha256(router), tensors)

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


class _Losses:
    """The loss of a language model, summed up by group."""

    def __init__(self, names: list[str]):
        self.names = names
        self.sums = torch.zeros(2, len(names), dtype=torch.float64)  # losses, labels
        self.is_known = True

    def add(self, model: PreTrainedModel, inputs: dict[str, Any], group_B: torch.Tensor) -> None:
        """Run the model."""
        logits = getattr(model(**inputs), "logits", None)
        if logits is None or logits.dim() != 3 or model.get_output_embeddings() is None:
            self.is_known = False
            return
        labels = _labels(inputs)
        if labels.shape[1] > 1 and not ("labels" in inputs and model.config.is_encoder_decoder) and _shifts(model):
            logits, labels = logits[:, :-1], labels[:, 1:]
        losses = nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), reduction="none", ignore_index=IGNORED_LABEL
        )
        by_row = torch.stack([losses.reshape(labels.shape), (labels != IGNORED_LABEL).float()]).sum(dim=-1)
        self.sums.index_add_(1, group_B.cpu(), by_row.double().cpu())

    def by_group(self) -> dict[str, dict[str, float]] | None:
        if not self.is_known:
            return None
        sums = {**dict(zip(self.names, self.sums.T.tolist(), strict=True)), ALL: self.sums.sum(dim=1).tolist()}
        return {name: {"loss": loss / max(count, 1), "labels": int(count)} for name, (loss, count) in sums.items()}


def _shifts(model: PreTrainedModel) -> bool:
    """Whether logits belong to the next token: of decoders, and of a decoder that is given what it reads."""
    return model.config.is_encoder_decoder or model.can_generate()


def _labels(inputs: dict[str, Any]) -> torch.Tensor:
    """Those given, or else the tokens themselves but for pads."""
    if "labels" in inputs:
        return inputs["labels"]
    side = "decoder_" if "decoder_input_ids" in inputs else ""
    ids, mask = inputs[f"{side}input_ids"], inputs.get(f"{side}attention_mask")
    return ids if mask is None else ids.masked_fill(mask == 0, IGNORED_LABEL)
