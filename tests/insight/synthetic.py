"""Measurements that no model made, of any size."""

import numpy as np

from hf_sparse_moe.insight import RoutingExplanation
from hf_sparse_moe.insight.measurement import LayerMeasurement, Measurement, Tokens


def synthetic(layers=2, experts=4, tokens=200, top_k=2, texts=20, groups=2, choose=None, seed=0):
    """`choose(generator, group_N)` gives the first expert of each token; the others follow at random."""
    generator = np.random.default_rng(seed)
    text = np.sort(np.arange(tokens) % texts)
    group = text % groups
    words = ["".join(f"w{i % 97} " for i in np.flatnonzero(text == number)) for number in range(texts)]
    span = np.concatenate([_spans(written) for written in words])
    ids = np.arange(tokens) % 97
    made = []
    for place in range(layers):
        index = np.argsort(generator.random((tokens, experts)), axis=1)[:, :top_k]
        if choose is not None:
            first = choose(generator, group)
            index = np.stack([first, *((first + step) % experts for step in range(1, top_k))], axis=1)
        weights = np.sort(generator.dirichlet(np.ones(top_k), tokens), axis=1)[:, ::-1]
        likeness = np.full((experts, experts), 0.5) + 0.5 * np.eye(experts)
        shares = generator.random((2, tokens))
        made.append(
            LayerMeasurement(f"layer_{place}", f"layers.{place}", "decoder", experts, top_k, index, weights, *shares,
                             likeness, likeness)
        )  # fmt: skip
    names = tuple(f"group_{g}" for g in range(groups))
    measured = Measurement(words, names, {"decoder": Tokens(ids, text, span, group, ids[::-1].copy())}, made)
    return RoutingExplanation(measured, {v: f"w{v}" for v in range(97)}, {"Model": "made up", "Data": "made up"})


def _spans(written):
    ends = np.cumsum([len(word) + 1 for word in written.split()])
    return np.stack([np.r_[0, ends[:-1]], ends], axis=1)
