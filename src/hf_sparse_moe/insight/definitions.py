"""
The definitions of the page, on arrays alone (OLMoE, arXiv 2409.02060, section 5, with intervals).

N tokens, E experts, K experts a token, G groups, V tokens of the vocabulary. A choice is a (token, expert) pair.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from hf_sparse_moe.routing.statistics import LayerRouting

from .measurement import Ablation, LayerMeasurement, Measurement, Tokens


Array = np.ndarray
RESAMPLES = 200
SHUFFLES = 40
FEWEST_TEXTS = 5  # a group in fewer has no interval
CLEAR_LIFT = 1.25  # of a group that an expert is said to serve
SURE = 3.0  # standard errors: with many experts and layers, some differ by two for no reason
NAMED_TOKENS = 8  # of an expert
SHRINKAGE = 20  # choices of the average kind that are added before tokens are ranked


@dataclass(frozen=True)
class LayerFacts:
    """What is said of one layer. Arrays are numpy's; `added` ends with a column for all groups together."""

    layer: LayerMeasurement
    counts: Array  # (G, E): choices
    load: Array  # (E,): share of all choices
    share: Array  # (G, E): of a group's choices
    lift: Array  # (G, E)
    lift_low: Array
    lift_high: Array
    information: float  # of group and expert
    chance: float  # which shuffled groups reach
    token_information: float
    input_tokens: list[list[tuple[int, float, int]]]
    predicted_tokens: list[list[tuple[int, float, int]]]
    coactivation: Array | None
    added: tuple[Array, Array, Array] | None

    @property
    def is_specialised(self) -> bool:
        """Whether the groups say more about the experts than shuffled groups do."""
        return self.information > self.chance

    @cached_property
    def prefers(self) -> Array:
        """`(G, E)`: whether the group clearly prefers the expert."""
        error = (self.lift - self.lift_low) / 1.96
        return (self.lift >= CLEAR_LIFT) & (self.lift - SURE * error > 1)  # False for NaN

    def serves(self, expert: int) -> list[int]:
        """The groups that clearly prefer the expert, the strongest preference first."""
        return [g for g in np.argsort(-self.lift[:, expert], kind="stable").tolist() if self.prefers[g, expert]]


def preferred_experts(facts: list[LayerFacts]) -> list[tuple[int, int] | None]:
    """Of each group the layer and the expert that it prefers most clearly; None for none."""
    found: list[tuple[int, int] | None] = []
    for group in range(len(facts[0].lift)):
        clear = [
            (fact.lift_low[group, e], place, e)
            for place, fact in enumerate(facts)
            for e in np.flatnonzero(fact.prefers[group]).tolist()
        ]
        found.append(max(clear)[1:] if clear else None)
    return found


def layer_facts(measurement: Measurement, place: int) -> LayerFacts:
    """All of one layer."""
    layer = measurement.layers[place]
    tokens, groups = measurement.tokens[layer.side], len(measurement.groups)
    counts = count_by_text(layer, tokens, len(measurement.texts), groups)
    total, load = counts.sum(axis=0), count_experts(layer.index, layer.num_experts)
    return LayerFacts(
        layer,
        total,
        load / max(load.sum(), 1),
        total / np.maximum(total.sum(axis=1, keepdims=True), 1),
        *lift(counts),
        *(mutual_information(counts) if groups > 1 else (0.0, 0.0)),
        token_information(layer, tokens),
        tokens_by_lift(layer, tokens.ids, NAMED_TOKENS),
        tokens_by_lift(layer, tokens.predicted, NAMED_TOKENS),
        coactivation(layer),
        None if measurement.ablation is None else added_loss(measurement.ablation, place),
    )


def count_by_text(layer: LayerMeasurement, tokens: Tokens, texts: int, groups: int) -> Array:
    """`(texts, G, E)`: the choices of each text and group. Tokens without a group are not counted."""
    rows, experts = _choices(layer.index, tokens.group >= 0)
    return _counts((texts, groups, layer.num_experts), tokens.text[rows], tokens.group[rows], experts)


def count_experts(index_NK: Array, num_experts: int) -> Array:
    """`(E,)`: the choices of each expert."""
    return np.bincount(index_NK[index_NK >= 0].ravel(), minlength=num_experts)


def mean_of_known(values: Array) -> float:
    """The mean of what is not NaN; NaN where all is."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else np.nan


def lift(counts_TGE: Array) -> tuple[Array, Array, Array]:
    """
    How much more often a group's tokens choose an expert than the average group's: the share of the group's choices,
    over the mean of that share over the groups. 1 is no preference, 0 never, G the whole expert.

    Returns:
        three arrays `(G, E)`: the lift, and its 95 % interval by resampling texts, NaN for a group in too few.
    """
    point = _lift(counts_TGE.sum(axis=0))
    if len(counts_TGE) < FEWEST_TEXTS:
        return point, np.full_like(point, np.nan), np.full_like(point, np.nan)
    resampled = np.einsum("bt,tge->bge", _weights(len(counts_TGE)), counts_TGE, optimize=True)
    low, high = np.quantile(_lift(resampled), (0.025, 0.975), axis=0)
    few = (counts_TGE.sum(axis=2) > 0).sum(axis=0) < FEWEST_TEXTS
    low[few], high[few] = np.nan, np.nan
    return point, low, high


def mutual_information(counts_TGE: Array, seed: int = 0) -> tuple[float, float]:
    """
    The normalised mutual information of group and expert, and what chance reaches: the mean over shuffled groups,
    which small samples bias upwards, and [`SURE`] standard deviations. Whole texts are shuffled where each has one
    group, else the groups within a text.
    """
    generator = np.random.default_rng(seed)
    found = _nmi(counts_TGE.sum(axis=0))
    shuffled = []
    groups_of = (counts_TGE.sum(axis=2) > 0).sum(axis=1)
    for _ in range(SHUFFLES):
        if groups_of.max(initial=0) <= 1:
            label = generator.permutation(counts_TGE.sum(axis=2).argmax(axis=1))
            mixed = np.zeros(counts_TGE.shape[1:])
            np.add.at(mixed, label, counts_TGE.sum(axis=1))
        else:
            mixed = sum((_shuffled(text, generator) for text in counts_TGE), np.zeros(counts_TGE.shape[1:]))
        shuffled.append(_nmi(mixed))
    return found, float(np.mean(shuffled) + SURE * np.std(shuffled))


def token_information(layer: LayerMeasurement, tokens: Tokens, seed: int = 0) -> float:
    """The normalised mutual information of input token and expert, less that of shuffled tokens."""
    _, which = np.unique(tokens.ids, return_inverse=True)
    rows, experts = _choices(layer.index)
    shuffled = np.random.default_rng(seed).permutation(which)
    found, chance = (
        _nmi(_counts((which.max() + 1, layer.num_experts), of[rows], experts)) for of in (which, shuffled)
    )
    return found - chance


def tokens_by_lift(layer: LayerMeasurement, ids: Array, wanted: int) -> list[list[tuple[int, float, int]]]:
    """
    For each expert the `wanted` tokens that choose it most disproportionately: id, lift N(i, v) / N(v) over
    N(i) / N, and N(i, v). Ranked after [`SHRINKAGE`], because a token that occurs once has a lift by chance.
    """
    known = ids >= 0
    if not known.any():
        return [[] for _ in range(layer.num_experts)]
    vocabulary, which = np.unique(ids[known], return_inverse=True)
    rows, experts = _choices(layer.index[known])
    joint = _counts((len(vocabulary), layer.num_experts), which[rows], experts)
    load = joint.sum(axis=0) / max(len(which), 1)
    seen = np.bincount(which, minlength=len(vocabulary))
    value = joint / seen[:, None] / np.maximum(load, 1e-12)
    ranked = (joint + SHRINKAGE * load) / (seen[:, None] + SHRINKAGE) / np.maximum(load, 1e-12)
    ranked = np.where((joint >= 2) & (value > 1), ranked, 0)
    best = np.argsort(-ranked, axis=0, kind="stable")[:wanted]
    return [
        [(int(vocabulary[v]), float(value[v, e]), int(joint[v, e])) for v in best[:, e] if ranked[v, e] > 0]
        for e in range(layer.num_experts)
    ]


def coactivation(layer: LayerMeasurement) -> Array | None:
    """`(E, E)`: of the tokens that choose expert i, the share that choose j too; None where a token has one."""
    if layer.index.shape[1] < 2:
        return None
    chosen = np.zeros((len(layer.index), layer.num_experts + 1), dtype=np.float32)
    np.put_along_axis(chosen, np.where(layer.index >= 0, layer.index, layer.num_experts), 1, axis=1)
    together = chosen[:, :-1].T @ chosen[:, :-1]
    share = together / np.maximum(np.diag(together), 1)[:, None]
    np.fill_diagonal(share, np.nan)
    return share


def saturation(index_NK: Array, final_NK: Array) -> float:
    """The mean over the tokens of the share of an earlier choice that is in the final one."""
    known = index_NK >= 0
    same = (index_NK[:, :, None] == final_NK[:, None, :]).any(axis=2) & known
    return float(same.sum() / max(known.sum(), 1))


def added_loss(ablation: Ablation, layer: int) -> tuple[Array, Array, Array]:
    """`(E, G + 1)` each: nats a token that a group, and last all, lose without an expert, and the 95 % interval."""
    added = np.concatenate([ablation.added[layer], ablation.added[layer].sum(axis=2, keepdims=True)], axis=2)
    tokens = np.concatenate([ablation.tokens, ablation.tokens.sum(axis=1, keepdims=True)], axis=1)
    weights = _weights(len(tokens))
    with np.errstate(invalid="ignore", divide="ignore"):
        point = added.sum(axis=1) / tokens.sum(axis=0)
        resampled = np.einsum("bt,etg->beg", weights, added, optimize=True) / (weights @ tokens)[:, None]
    low = high = np.full_like(point, np.nan)
    if len(tokens) >= FEWEST_TEXTS:  # a draw without any text of a small group says nothing of it
        resampled = np.where((weights @ tokens)[:, None] > 0, resampled, point)
        low, high = np.quantile(resampled, (0.025, 0.975), axis=0)
    return point, low, high


def order_by_similarity(similarity: Array) -> Array:
    """The experts in an order that puts similar ones side by side: the Fiedler vector of the similarities."""
    affinity = np.nan_to_num(similarity)
    affinity = (affinity + affinity.T) / 2
    affinity = affinity - affinity.min()
    np.fill_diagonal(affinity, 0)
    _, vectors = np.linalg.eigh(np.diag(affinity.sum(axis=1)) - affinity)
    return np.argsort(vectors[:, min(1, len(vectors) - 1)], kind="stable")


def _choices(index_NK: Array, counted_N: Array | bool = True) -> tuple[Array, Array]:
    """The token and the expert of each choice, of the tokens that count."""
    tokens, slots = np.nonzero((index_NK >= 0) & np.reshape(counted_N, (-1, 1)))
    return tokens, index_NK[tokens, slots]


def _counts(shape: tuple[int, ...], *places: Array) -> Array:
    """How often each combination of places occurs."""
    return np.bincount(np.ravel_multi_index(places, shape), minlength=np.prod(shape)).reshape(shape).astype(float)


def _lift(counts_GE: Array) -> Array:
    share = counts_GE / np.maximum(counts_GE.sum(axis=-1, keepdims=True), 1)
    mean = share.mean(axis=-2, keepdims=True)
    return np.divide(share, mean, out=np.zeros_like(share), where=mean > 0)


def _weights(texts: int) -> Array:
    """`(RESAMPLES, texts)`: how often each text is drawn."""
    return np.random.default_rng(0).multinomial(texts, np.full(texts, 1 / texts), size=RESAMPLES).astype(float)


def _nmi(counts: Array) -> float:
    return LayerRouting("", 0, (), torch.from_numpy(np.ascontiguousarray(counts))).mutual_information


def _shuffled(counts_GE: Array, generator: np.random.Generator) -> Array:
    """Counts with the same sums of rows and columns, drawn as if they had nothing to do with each other."""
    columns = counts_GE.sum(axis=0).astype(int)
    drawn = np.zeros_like(counts_GE)
    for group, size in enumerate(counts_GE.sum(axis=1).astype(int)):
        drawn[group] = generator.multivariate_hypergeometric(columns, size)
        columns = columns - drawn[group].astype(int)
    return drawn
