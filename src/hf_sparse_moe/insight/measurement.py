"""
What every router decided about every token of some text: measured here, interpreted in `definitions.py`.

N tokens of one side, E experts, K experts a token, G groups.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from hf_sparse_moe.models.masks import tokens_by_side
from hf_sparse_moe.models.routing import Routing, RoutingEvent
from hf_sparse_moe.routing.mixture_layers import MixtureLayer, event_of, find_mixture_layers, observe_routing
from hf_sparse_moe.routing.routing_monitor import layer_labels

from .similarity import compare_outputs, compare_weights, keep_inputs
from .texts import Array, Reading, Row


@dataclass
class Choices:
    """What one layer did with N tokens."""

    index: Array  # (N, K): the experts of each token, the largest weight first; -1 for none
    weights: Array  # (N, K)
    entropy: Array  # (N,): of the router's probabilities over log E
    margin: Array  # (N,): probability of the last expert chosen less that of the best one not chosen


@dataclass
class Tokens:
    """The N tokens of one side, in the order of the texts; -1 stands for none."""

    ids: Array
    text: Array  # the number of each token's text
    span: Array  # (N, 2): its characters in that text
    group: Array
    predicted: Array  # the id that the model finds most likely there


@dataclass
class LayerMeasurement:
    """What one sparse layer did with the N tokens of its side."""

    label: str
    name: str
    side: str
    num_experts: int
    top_k: int
    index: Array  # these four as in `Choices`
    weights: Array
    entropy: Array
    margin: Array
    outputs: Array | None = None  # (E, E): likeness of the experts by their outputs, and by their weights
    units: Array | None = None


@dataclass
class Ablation:
    """The loss in nats that each expert's absence adds; of each text and group, sums over its tokens."""

    tokens: Array  # (texts, G): how many were predicted
    added: list[Array]  # a layer: (E, texts, G); NaN where the layer cannot do without the expert


@dataclass
class Moment:
    """The routing of an earlier checkpoint on the same tokens."""

    name: str
    index: list[Array]  # a layer: (N, K)
    entropy: list[Array]  # a layer: (N,)


@dataclass
class Measurement:
    """All that is known; everything on the page follows from it."""

    texts: list[str]
    groups: tuple[str, ...]
    tokens: dict[str, Tokens]
    layers: list[LayerMeasurement]
    ablation: Ablation | None = None
    history: list[Moment] = field(default_factory=list)
    log: list[dict[str, float]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


@torch.no_grad()
def measure(model: PreTrainedModel, reading: Reading) -> Measurement:
    """Run the model once over the texts, and compare its experts on some of their tokens."""
    layers = find_mixture_layers(model)
    inputs: dict[str, torch.Tensor] = {}
    with keep_inputs(layers, inputs):
        choices, predicted = _record(model, layers, reading)
    found, left_out = [], list(reading.left_out)
    for layer, label in zip(layers, layer_labels(layers), strict=True):
        if layer.name not in choices:
            left_out.append(f"{label} (`{layer.name}`): what its router chooses for a token cannot be observed.")
            continue
        side = layer.side if layer.side in reading.sides else next(iter(reading.sides))
        outputs = compare_outputs(layer, inputs.get(layer.name))
        units = compare_weights(layer.experts, layer.num_experts)
        known = (label, layer.name, side, layer.num_experts, layer.top_k)
        found.append(LayerMeasurement(*known, **vars(choices[layer.name]), outputs=outputs, units=units))
    if not found:
        raise ValueError(
            f"`model` is a `{type(model).__name__}` whose sparse layers choose in a way that cannot be observed token "
            "by token. Give a mixture whose router gives logits for each token."
        )
    sides = {layer.side for layer in found}
    tokens = {
        side: _tokens(rows, predicted if side == list(reading.sides)[-1] else None)
        for side, rows in reading.sides.items()
        if side in sides
    }
    left_out += _without_similarity(found)
    return Measurement(reading.texts, reading.groups, tokens, found, left_out=left_out)


@torch.no_grad()
def measure_moment(model: PreTrainedModel, reading: Reading, name: str, layers_wanted: Sequence[str]) -> Moment:
    """The same texts through an earlier checkpoint of the same architecture."""
    choices, _ = _record(model, find_mixture_layers(model), reading)
    if missing := [layer for layer in layers_wanted if layer not in choices]:
        raise ValueError(f"`checkpoints`: {name} has no layer `{missing[0]}`. Give checkpoints of the same training.")
    wanted = [choices[layer] for layer in layers_wanted]
    return Moment(name, [layer.index for layer in wanted], [layer.entropy for layer in wanted])


def _record(
    model: PreTrainedModel, layers: list[MixtureLayer], reading: Reading
) -> tuple[dict[str, Choices], Array | None]:
    """One pass: the choices of each layer whose rows are the tokens, and the ids that a language model predicts."""
    found: dict[str, list[Choices]] = defaultdict(list)
    predicted = []
    for batch in tqdm(reading.batches, desc="route"):
        inputs = {name: value.to(model.device) for name, value in batch.inputs.items()}
        tokens = tokens_by_side(model, inputs)

        def keep(layer: MixtureLayer, routing: Routing, tokens=tokens) -> None:
            event = event_of(layer, routing, tokens)
            if event.token_mask is not None and event.context.ids is not None:  # else its rows are other ones
                found[layer.name].append(_choices(event, event.token_mask))

        with observe_routing(layers, keep):
            logits = getattr(model(**inputs), "logits", None)
        if logits is not None and logits.dim() == 3 and model.get_output_embeddings():
            mask = inputs.get("decoder_attention_mask", inputs["attention_mask"]).bool()
            predicted.append(logits.argmax(dim=-1)[mask].cpu().numpy())
    whole = {name: _joined(parts) for name, parts in found.items() if len(parts) == len(reading.batches)}
    return whole, np.concatenate(predicted) if predicted else None


def _choices(event: RoutingEvent, mask_T: torch.Tensor) -> Choices:
    """Index, weights, entropy and margin of the tokens in the mask."""
    layer, routing = event.layer, event.routing
    token = routing.token_index
    index_TK, weights_TK = routing[2:0:-1] if token is None else _by_token(routing, token)
    weights_TK = weights_TK.float()
    if routing.kept is not None and token is None:
        weights_TK = weights_TK.masked_fill(~routing.kept, 0.0)
    order_TK = weights_TK.argsort(dim=-1, descending=True, stable=True)
    index_TK, weights_TK = index_TK.gather(-1, order_TK), weights_TK.gather(-1, order_TK)
    probabilities_TE = layer.probabilities(routing.router_logits)
    entropy_T = torch.special.entr(probabilities_TE).sum(dim=-1) / np.log(max(layer.num_experts, 2))
    # The column behind the last expert takes what is not there.
    chosen_TE = torch.zeros(len(index_TK), layer.num_experts + 1, dtype=torch.bool, device=index_TK.device)
    chosen_TE = chosen_TE.scatter(-1, index_TK.where(index_TK >= 0, layer.num_experts), True)[:, :-1]
    worst_T = probabilities_TE.masked_fill(~chosen_TE, torch.inf).amin(dim=-1)
    next_T = probabilities_TE.masked_fill(chosen_TE, -torch.inf).amax(dim=-1)
    margin_T = (worst_T - next_T).where(worst_T.isfinite() & next_T.isfinite(), torch.nan)
    return Choices(*(tensor[mask_T].cpu().numpy() for tensor in (index_TK, weights_TK, entropy_T, margin_T)))


def _by_token(routing: Routing, token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where experts choose: the experts that took each token, -1 where fewer did than took the most wanted one."""
    experts, weights = routing.top_k_index.flatten(), routing.top_k_weights.flatten()
    kept = torch.ones_like(token, dtype=torch.bool) if routing.kept is None else routing.kept.flatten()
    experts, weights, token = experts[kept], weights[kept], token[kept]
    order = token.argsort(stable=True)
    experts, weights, token = experts[order], weights[order], token[order]
    count = token.bincount(minlength=len(routing.router_logits))
    slot = torch.arange(len(token), device=token.device) - (count.cumsum(0) - count)[token]
    shape = (len(count), max(1, int(count.max())))
    index_TK, weights_TK = torch.full(shape, -1, device=token.device), torch.zeros(shape, device=token.device)
    index_TK[token, slot], weights_TK[token, slot] = experts, weights.float()
    return index_TK, weights_TK


def _joined(parts: list[Choices]) -> Choices:
    """Of all batches; each may have another K, where experts choose."""
    width = max(part.index.shape[1] for part in parts)

    def joined(arrays: Iterable[Array], fill: int = -1) -> Array:
        return np.concatenate(
            [np.pad(a, ((0, 0), (0, width - a.shape[1])), constant_values=fill) if a.ndim == 2 else a for a in arrays]
        )

    index, weights, entropy, margin = zip(*(vars(part).values() for part in parts), strict=True)
    return Choices(joined(index).astype(np.int32), joined(weights, 0), joined(entropy), joined(margin))


def _tokens(rows: list[Row], predicted: Array | None) -> Tokens:
    ids, span, group = map(np.concatenate, zip(*rows, strict=True))
    text = np.repeat(np.arange(len(rows)), [len(row.ids) for row in rows])
    return Tokens(ids, text, span, group, np.full(len(ids), -1) if predicted is None else predicted)


def _without_similarity(layers: list[LayerMeasurement]) -> Iterator[str]:
    reasons = {"outputs": "called with an index of experts", "units": "one `down_proj` of a moderate size"}
    for name, reason in reasons.items():
        labels = [layer.label for layer in layers if getattr(layer, name) is None]
        if labels:
            more = f" and {len(labels) - 3} more layers" if len(labels) > 3 else ""
            what = "weights" if name == "units" else name
            listed = ", ".join(labels[:3]) + more
            yield f"The similarity by {what} is left out for {listed}, whose experts are not {reason}."
