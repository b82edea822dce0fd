"""
What every router decided about every token of some text: measured here, interpreted in `definitions.py`.

N tokens of one side, E experts, K experts a token, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import tqdm

from hf_sparse_moe.models.masks import IGNORED_LABEL, tokens_by_side
from hf_sparse_moe.models.routing import Routing, RoutingEvent
from hf_sparse_moe.routing.mixture_layers import (
    MixtureLayer,
    RoutingObservation,
    event_of,
    find_mixture_layers,
    observe_routing,
)
from hf_sparse_moe.routing.routing_monitor import layer_labels
from hf_sparse_moe.routing.statistics import ALL
from hf_sparse_moe.routing.switches import disable_experts


Array = np.ndarray
Groups = Sequence[str] | Sequence[Sequence[str]] | None
COMPARED_TOKENS = 64  # on which the outputs of experts are compared
COMPARED_UNITS = 64  # of each expert, whose best match in another expert is looked for
MOST_PRODUCTS = 2e11  # for one layer's comparison of weights; beyond, it is left out
MASKED_SHARE = 0.15  # of an encoder's tokens, when its loss is measured


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
    index: Array  # (N, K): the experts of each token, the largest weight first; -1 for none
    weights: Array  # (N, K)
    entropy: Array  # (N,): of the router's probabilities over log E
    margin: Array  # (N,): probability of the last expert chosen less that of the best one not chosen
    outputs: Array | None = None  # (E, E): mean cosine of the experts' outputs on the same tokens
    units: Array | None = None  # (E, E): mean cosine of each hidden unit's output vector to its best match


@dataclass
class Ablation:
    """The loss in nats a token that each expert's absence adds; of each text and group, sums over its tokens."""

    tokens: Array  # (texts, G): how many were predicted
    base: Array  # (texts, G)
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


@dataclass
class Batch:
    """Some texts as the model takes them; `targets` and their groups are (B, S), -100 and -1 for none."""

    inputs: dict[str, torch.Tensor]
    targets: torch.Tensor
    target_groups: torch.Tensor
    texts: Array


@dataclass
class Reading:
    """Texts as tokens, and what had to be left out."""

    texts: list[str]
    groups: tuple[str, ...]
    sides: dict[str, list[tuple[Array, Array, Array]]]  # of each text: ids, spans, groups
    batches: list[Batch]
    left_out: list[str]


def read_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str] | Sequence[Sequence[str]],
    groups: Groups,
    targets: Sequence[str] | None,
    max_length: int,
    batch_size: int,
) -> Reading:
    """Tokenize, cut and batch the texts. Raises a `ValueError` where nothing is left, or arguments do not fit."""
    if tokenizer is None:
        raise ValueError(
            "`tokenizer=None`: the page shows tokens. Pass `AutoTokenizer.from_pretrained(...)` of the model."
        )
    for name, given in (("groups", groups), ("targets", targets)):
        if given is not None and len(given) != len(texts):
            raise ValueError(f"`{name}` has {len(given)} entries, `texts` has {len(texts)}. Give one for each text.")
    labels = [ALL] * len(texts) if groups is None else list(groups)
    names = tuple(
        dict.fromkeys(str(name) for label in labels for name in ([label] if isinstance(label, str) else label))
    )
    limit = _longest(model, tokenizer, max_length)
    kept: list[str] = []
    source, target, cut, empty = [], [], 0, 0
    for text, label, wanted in zip(texts, labels, targets or texts, strict=True):
        encoded = _encode(tokenizer, text, label, names, limit)
        if encoded is None:
            empty += 1
            continue
        whole, was_cut, *row = encoded
        kept.append(whole)
        cut += was_cut
        source.append(tuple(row))
        answer = _encode(tokenizer, wanted, label, names, limit) if model.config.is_encoder_decoder else None
        target.append(tuple(answer[2:]) if answer else tuple(row))
    if not kept:
        raise ValueError(f"`texts` has {len(texts)} entries, none of which has a token. Give some text.")
    left_out = [f"{empty} of {len(texts)} texts are empty."] if empty else []
    if cut:
        left_out.append(f"{cut} of {len(kept)} texts are longer than {limit} tokens and were cut there.")
    sides = {"decoder": source}
    if model.config.is_encoder_decoder:
        sides = {"encoder": source, "decoder": [_shifted(row, model) for row in target]}
    elif not _predicts_the_next(model):
        sides = {"encoder": source}
    pad = next(
        (i for i in (tokenizer.pad_token_id, model.config.pad_token_id, tokenizer.eos_token_id) if i is not None), 0
    )
    batches = [
        _batch(np.arange(start, min(start + batch_size, len(kept))), sides, target, pad)
        for start in range(0, len(kept), batch_size)
    ]
    return Reading(kept, names, sides, batches, left_out)


@torch.no_grad()
def measure(model: PreTrainedModel, reading: Reading) -> Measurement:
    """Run the model once over the texts, and compare its experts on some of their tokens."""
    layers = find_mixture_layers(model)
    labels = layer_labels(layers)
    rows: dict[str, list[tuple[Array, ...]]] = {layer.name: [] for layer in layers}
    compared: dict[str, Array | None] = {}
    predicted: list[Array] = []
    left_out = list(reading.left_out)
    for number, batch in enumerate(tqdm(reading.batches, desc="route")):
        hidden: dict[str, torch.Tensor] = {}
        with _catch_hidden_states(layers if number == 0 else [], hidden):
            events, logits = _run(model, layers, batch)
        for event in events:
            mask = _mask_of(event, batch)
            if mask is not None:
                rows[event.layer.name].append(_choices(event, mask))
        if logits is not None:
            mask = batch.inputs.get("decoder_attention_mask", batch.inputs["attention_mask"]).bool()
            predicted.append(logits.argmax(dim=-1).cpu()[mask].numpy())
        for layer in layers if number == 0 else []:
            compared[layer.name] = _compare_outputs(layer, hidden.get(layer.name))
    found, sides = [], set()
    for layer, label in zip(layers, labels, strict=True):
        side = layer.side if layer.side in reading.sides else next(iter(reading.sides))
        if len(rows[layer.name]) != len(reading.batches):
            left_out.append(f"{label} (`{layer.name}`): what its router chooses for a token cannot be observed.")
            continue
        index, weights, entropy, margin = _stack(rows[layer.name])
        units = compare_weights(layer.experts, layer.num_experts)
        seen = (label, layer.name, side, layer.num_experts, layer.top_k)
        found.append(LayerMeasurement(*seen, index, weights, entropy, margin, compared[layer.name], units))
        sides.add(side)
    if not found:
        raise ValueError(
            f"`model` is a `{type(model).__name__}` whose sparse layers choose in a way that cannot be observed token "
            "by token. Give a mixture whose router gives logits for each token."
        )
    left_out += _missing(found)
    tokens = {side: _tokens(rows_of, predicted if side != "encoder" or len(reading.sides) == 1 else [])
              for side, rows_of in reading.sides.items() if side in sides}  # fmt: skip
    return Measurement(reading.texts, reading.groups, tokens, found, left_out=left_out)


@torch.no_grad()
def measure_moment(model: PreTrainedModel, reading: Reading, name: str, layers_wanted: Sequence[str]) -> Moment:
    """The same texts through an earlier checkpoint of the same architecture."""
    layers = find_mixture_layers(model)
    rows: dict[str, list[tuple[Array, ...]]] = {layer.name: [] for layer in layers}
    for batch in reading.batches:
        for event in _run(model, layers, batch)[0]:
            if (mask := _mask_of(event, batch)) is not None:
                rows[event.layer.name].append(_choices(event, mask))
    if missing := [layer for layer in layers_wanted if not rows.get(layer)]:
        raise ValueError(f"`checkpoints`: {name} has no layer `{missing[0]}`. Give checkpoints of the same training.")
    stacked = [_stack(rows[layer]) for layer in layers_wanted]
    return Moment(name, [layer[0] for layer in stacked], [layer[2] for layer in stacked])


@torch.no_grad()
def measure_ablation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, reading: Reading, layers: Sequence[str]
) -> Ablation:
    """Switch off each expert by itself, and measure the loss: one pass over the texts for each."""
    if model.get_output_embeddings() is None:
        raise ValueError(
            f"`ablate=True` needs a language model's loss, and `{type(model).__name__}` has no such head."
        )
    batches = reading.batches if _predicts_the_next(model) else _masked(reading.batches, tokenizer)
    shape = (len(reading.texts), len(reading.groups))
    tokens = _sum_by_text(batches, shape, lambda batch: torch.ones(batch.targets.shape))
    base = _sum_by_text(batches, shape, lambda batch: _losses(model, batch))
    every = find_mixture_layers(model)
    added = [np.full((layer.num_experts, *shape), np.nan) for layer in every if layer.name in layers]
    places = [place for place, layer in enumerate(every) if layer.name in layers]
    turns = [(row, place, e) for row, place in enumerate(places) for e in range(every[place].num_experts)]
    for row, place, expert in tqdm(turns, desc="switch off"):
        if every[place].num_experts <= every[place].top_k:
            continue  # nobody can take its place
        with disable_experts(model, {place: [expert]}):
            added[row][expert] = _sum_by_text(batches, shape, lambda batch: _losses(model, batch)) - base
    return Ablation(tokens, base, added)


def compare_weights(experts: nn.Module, num_experts: int) -> Array | None:
    """`(E, E)`, or None where the weights are not fused, or too many to compare."""
    down = getattr(experts, "down_proj", None)
    if (
        not isinstance(down, torch.Tensor)
        or down.dim() != 3
        or len(down) != num_experts
        or not down.is_floating_point()
    ):
        return None
    units = down.detach() if getattr(experts, "is_transposed", False) else down.detach().transpose(1, 2)  # (E, I, H)
    experts_count, width, size = units.shape
    if experts_count**2 * min(width, COMPARED_UNITS) * width * size > MOST_PRODUCTS:
        return None
    units = nn.functional.normalize(units.float(), dim=-1)
    some = units[:, torch.linspace(0, width - 1, min(width, COMPARED_UNITS)).long()]
    best = torch.stack([(some @ other.T).amax(dim=-1).mean(dim=-1) for other in units], dim=1)
    return ((best + best.T) / 2).cpu().numpy()


def _longest(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int) -> int:
    dense: Any = getattr(model.config, "dense_config", model.config)
    known = [getattr(dense, name, None) for name in ("max_position_embeddings", "n_positions")]
    bounds = [bound for bound in known if isinstance(bound, int) and bound > 0]
    start = 2 if "roberta" in str(dense.model_type) else 0  # its positions begin behind the pad's
    return max(1, min([bound - start for bound in bounds] + [int(tokenizer.model_max_length), max_length]))


def _predicts_the_next(model: PreTrainedModel) -> bool:
    """Whether it reads from left to right: decoders and encoder-decoders."""
    if model.config.is_encoder_decoder or model.can_generate():
        return True
    model_type = model.config.model_type
    return (
        "encoder" not in model_type if model_type.startswith("sparse_moe") else "MaskedLM" not in type(model).__name__
    )


def _encode(tokenizer: Any, text: Any, label: Any, names: tuple[str, ...], limit: int) -> tuple | None:
    """The text, whether it was cut, ids, spans and groups; None without a token."""
    words = None if isinstance(text, str) else list(text)
    whole = text if words is None else " ".join(words)
    if not whole.strip():
        return None
    if words is not None and not tokenizer.is_fast:
        raise ValueError("`texts` of words need a fast tokenizer, which knows the word of each token. Give strings.")
    if isinstance(label, str) == (words is not None) and words is not None:
        label = [label] * len(words)
    if not isinstance(label, str) and (words is None or len(label) != len(words)):
        raise ValueError("`groups` has a list for a text. Give that text as a list of as many words.")
    encoded = tokenizer(
        whole if words is None else words,
        is_split_into_words=words is not None,
        return_offsets_mapping=tokenizer.is_fast,
        truncation=False,
        verbose=False,
    )
    ids = np.array(encoded["input_ids"], dtype=np.int64)
    if len(ids) == 0:
        return None
    spans = np.array(encoded["offset_mapping"] if tokenizer.is_fast else [(-1, -1)] * len(ids), dtype=np.int64)
    spans[spans[:, 0] == spans[:, 1]] = -1  # special tokens have no characters
    group = np.full(len(ids), -1 if words is not None else names.index(label))
    if words is not None:
        starts = np.cumsum([0, *(len(word) + 1 for word in words)])
        for place, word in enumerate(encoded.word_ids()):
            if word is not None:
                spans[place] += starts[word]
                group[place] = names.index(label[word])
    return whole, len(ids) > limit, ids[:limit], spans[:limit], group[:limit]


def _shifted(row: tuple[Array, ...], model: PreTrainedModel) -> tuple[Array, Array, Array]:
    """What the decoder reads: the start token, then the target but for its last token."""
    ids, spans, group = row
    start = model.config.decoder_start_token_id
    start = model.config.pad_token_id if start is None else start
    return np.r_[start, ids[:-1]], np.r_[[[-1, -1]], spans[:-1]], np.r_[group[:1], group[:-1]]


def _batch(places: Array, sides: dict, target: list, pad: int) -> Batch:
    def padded(rows: list[Array], value: int) -> torch.Tensor:
        return pad_sequence([torch.from_numpy(row) for row in rows], batch_first=True, padding_value=value)

    first = next(iter(sides))
    ids = [sides[first][place][0] for place in places]
    inputs = {"input_ids": padded(ids, pad), "attention_mask": padded([np.ones_like(row) for row in ids], 0)}
    answers, groups = ([target[place][part] for place in places] for part in (0, 2))
    if len(sides) == 2:
        read = [sides["decoder"][place][0] for place in places]
        inputs["decoder_input_ids"] = padded(read, pad)
        inputs["decoder_attention_mask"] = padded([np.ones_like(row) for row in read], 0)
    elif first == "decoder":
        answers = [np.r_[row[1:], IGNORED_LABEL] for row in answers]
        groups = [np.r_[row[1:], -1] for row in groups]
    return Batch(inputs, padded(answers, IGNORED_LABEL), padded(groups, -1), places)


def _masked(batches: list[Batch], tokenizer: PreTrainedTokenizerBase) -> list[Batch]:
    """An encoder is asked for tokens that were masked, the same for every measurement."""
    if tokenizer.mask_token_id is None:
        raise ValueError("`ablate=True` measures an encoder's loss on masked tokens, and the tokenizer has no mask.")
    special, generator = set(tokenizer.all_special_ids), torch.Generator().manual_seed(0)
    made = []
    for batch in batches:
        ids = batch.inputs["input_ids"]
        usual = torch.tensor([[token not in special for token in row] for row in ids.tolist()])
        hidden = (
            (torch.rand(ids.shape, generator=generator) < MASKED_SHARE) & usual & batch.inputs["attention_mask"].bool()
        )
        inputs = batch.inputs | {"input_ids": ids.masked_fill(hidden, tokenizer.mask_token_id)}
        targets = batch.targets.masked_fill(~hidden, IGNORED_LABEL)
        made.append(Batch(inputs, targets, batch.target_groups, batch.texts))
    return made


def _run(
    model: PreTrainedModel, layers: list[MixtureLayer], batch: Batch
) -> tuple[list[RoutingEvent], torch.Tensor | None]:
    inputs = {name: value.to(model.device) for name, value in batch.inputs.items()}
    tokens = tokens_by_side(model, inputs)
    events: list[RoutingEvent] = []
    with observe_routing(layers, lambda layer, routing: events.append(event_of(layer, routing, tokens))):
        output = model(**inputs)
    logits = getattr(output, "logits", None)
    return events, logits if logits is not None and logits.dim() == 3 and model.get_output_embeddings() else None


def _mask_of(event: RoutingEvent, batch: Batch) -> torch.Tensor | None:
    """Which of the rows that the layer saw are tokens; None where they are not those of its side."""
    name = "decoder_attention_mask" if event.layer.side == "decoder" else "attention_mask"
    mask = batch.inputs.get(name, batch.inputs["attention_mask"]).bool().flatten()
    return mask if len(event.routing.router_logits) == len(mask) else None


def _choices(event: RoutingEvent, mask_T: torch.Tensor) -> tuple[Array, ...]:
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
    return tuple(tensor.cpu()[mask_T].numpy() for tensor in (index_TK, weights_TK, entropy_T, margin_T))


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


def _stack(rows: list[tuple[Array, ...]]) -> tuple[Array, ...]:
    width = max(index.shape[1] for index, *_ in rows)

    def wide(array: Array, fill: int) -> Array:
        return np.pad(array, ((0, 0), (0, width - array.shape[1])), constant_values=fill)

    index = np.concatenate([wide(row[0], -1) for row in rows]).astype(np.int32)
    weights = np.concatenate([wide(row[1], 0) for row in rows])
    return index, weights, np.concatenate([row[2] for row in rows]), np.concatenate([row[3] for row in rows])


def _tokens(rows: list[tuple[Array, Array, Array]], predicted: list[Array]) -> Tokens:
    ids, span, group = (np.concatenate([row[part] for row in rows]) for part in range(3))
    text = np.repeat(np.arange(len(rows)), [len(row[0]) for row in rows])
    return Tokens(ids, text, span, group, np.concatenate(predicted) if predicted else np.full(len(ids), -1))


def _catch_hidden_states(layers: list[MixtureLayer], hidden: dict[str, torch.Tensor]) -> RoutingObservation:
    """Keep some of the tokens with which each layer's experts are called, where they are called with an index."""

    def keep(layer: MixtureLayer, module: nn.Module, args: tuple, kwargs: dict) -> None:
        states, choice = [*args, *kwargs.values()][:2]
        if choice.dim() == 2 and not choice.is_floating_point() and choice.dtype != torch.bool:
            flat = states.detach().flatten(0, -2)
            rows = torch.linspace(0, len(flat) - 1, min(COMPARED_TOKENS, len(flat))).long()
            hidden[layer.name] = flat[rows.to(flat.device)]

    watched = [layer for layer in layers if layer.experts is not layer.block]
    return RoutingObservation(
        layer.experts.register_forward_pre_hook(partial(keep, layer), with_kwargs=True) for layer in watched
    )


def _compare_outputs(layer: MixtureLayer, hidden_SH: torch.Tensor | None) -> Array | None:
    if hidden_SH is None:
        return None
    stacked = [parameter.shape[0] for parameter in layer.experts.parameters() if parameter.dim() == 3]
    ones = torch.ones(len(hidden_SH), 1, dtype=hidden_SH.dtype, device=hidden_SH.device)
    outputs = [
        layer.experts(hidden_SH, torch.full_like(ones, expert, dtype=torch.long), ones)
        for expert in range(min([layer.num_experts, *stacked]))
    ]
    outputs_ESH = nn.functional.normalize(torch.stack(outputs).float(), dim=-1)
    cosine = torch.einsum("ish,jsh->ij", outputs_ESH, outputs_ESH) / len(hidden_SH)
    full = np.full((layer.num_experts, layer.num_experts), np.nan)
    full[: len(outputs), : len(outputs)] = cosine.cpu().numpy()
    return full


def _missing(layers: list[LayerMeasurement]) -> Iterator[str]:
    for what, name in (("outputs", "outputs"), ("weights", "units")):
        without = [layer.label for layer in layers if getattr(layer, name) is None]
        if without:
            reason = "called with an index of experts" if name == "outputs" else "one `down_proj` of a moderate size"
            yield f"The similarity by {what} is left out for {_listed(without)}, whose experts are not {reason}."


def _listed(labels: list[str]) -> str:
    return ", ".join(labels[:3]) + (f" and {len(labels) - 3} more layers" if len(labels) > 3 else "")


def _losses(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """(B, S): the loss of each target in nats, 0 where there is none."""
    logits = model(**{name: value.to(model.device) for name, value in batch.inputs.items()}).logits
    targets = batch.targets.to(model.device)
    losses = nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    return losses.reshape(targets.shape).cpu()


def _sum_by_text(batches: list[Batch], shape: tuple[int, int], values: Callable[[Batch], torch.Tensor]) -> Array:
    sums = np.zeros(shape)
    for batch in batches:
        counted = (batch.targets != IGNORED_LABEL) & (batch.target_groups >= 0)
        text = np.broadcast_to(batch.texts[:, None], counted.shape)[counted.numpy()]
        np.add.at(sums, (text, batch.target_groups[counted].numpy()), values(batch)[counted].double().numpy())
    return sums
