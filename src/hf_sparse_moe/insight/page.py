"""The page: which facts it shows, in which order and up to which size. How they look is in `routing_page.html`."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from .definitions import LayerFacts, mean_of_known, order_by_similarity, preferred_experts, saturation
from .measurement import LayerMeasurement, Measurement, Tokens
from .packing import pack_integers, pack_shares
from .pictures import spread
from .token_labels import shown_text
from .verdict import Claim, most_specialised


TEMPLATE = Path(__file__).with_name("routing_page.html")
# What keeps the page below 5 MB; whatever is over is said on it.
SHOWN_TOKENS = 2000  # of a side
TOKENS_OF_A_TEXT = 160
SHOWN_GROUPS = 16
SHOWN_CARDS = 512  # experts
SHOWN_ROWS = 960  # experts in tables of groups
MATRIX_EXPERTS = 32
MATRIX_LAYERS = 6
CONTEXTS, CONTEXT_CHARACTERS = 2, 36
PAIRS = (
    ("Alike by output", "cosine of what both make of the same tokens"),
    ("Chosen together", "of the tokens that choose the row's expert, the share that choose the column's too"),
    (
        "Alike by weights",
        "cosine of each hidden unit's output vector to its best match. Experts that started as copies stay close to 1 "
        "long after their routing has parted",
    ),
)
LOGGED = ("task_loss", "router/entropy", "router/max_violation", "router/confidence")


def render_page(
    measured: Measurement, facts: list[LayerFacts], claims: list[Claim], labels: dict[int, str], about: dict[str, str]
) -> str:
    """The whole page as one string of HTML."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    filters = (_percent, _number, _signed, _warm, _blue, _breaks)
    environment.filters |= {function.__name__.removeprefix("_"): function for function in filters}
    shown = _chosen_experts(facts, SHOWN_CARDS)
    rows = _chosen_experts(facts, SHOWN_ROWS)
    left_out = [*measured.left_out, *_left_out(measured, facts, shown, rows)]
    best = most_specialised(facts)
    texts = [_text(measured, side, facts, labels, best) for side in measured.tokens]
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        measured=measured,
        groups=measured.groups,
        shown_groups=_shown_groups(measured, facts),
        facts=facts,
        claims=claims,
        best=facts.index(best),
        own=preferred_experts(facts),
        labels=labels,
        about=about,
        cards=shown,
        rows=rows,
        texts=texts,
        contexts={(place, e): _contexts(measured, facts[place].layer, e) for place in shown for e in shown[place]},
        nearest=_nearest,
        matrices=[(place, *_matrices(facts[place])) for place in spread(len(facts), MATRIX_LAYERS)],
        charts=_charts(measured),
        left_out=left_out,
    )


def _chosen_experts(facts: list[LayerFacts], most: int) -> dict[int, list[int]]:
    """Of each layer the experts that are shown: all, or those with the clearest preference or no load."""
    each = max(1, most // len(facts))
    clearest = [np.nan_to_num(fact.lift_low).max(axis=0) + 10 * (fact.load == 0) for fact in facts]
    return {
        place: sorted(np.argsort(-of_layer, kind="stable")[:each].tolist()) for place, of_layer in enumerate(clearest)
    }


def _shown_groups(measured: Measurement, facts: list[LayerFacts]) -> list[int]:
    sizes = np.sum([fact.counts.sum(axis=1) for fact in facts], axis=0)
    return sorted(np.argsort(-sizes, kind="stable")[:SHOWN_GROUPS].tolist())


def _left_out(measured: Measurement, facts: list[LayerFacts], cards: dict, rows: dict) -> list[str]:
    every = sum(fact.layer.num_experts for fact in facts)
    counts = {name: sum(map(len, chosen.values())) for name, chosen in (("cards", cards), ("tables of groups", rows))}
    said = [
        f"The {name} show {count} of {every} experts: in each layer those with the clearest preference."
        for name, count in counts.items()
        if count < every
    ]
    if len(measured.groups) > SHOWN_GROUPS:
        said.append(f"Tables show the {SHOWN_GROUPS} largest of {len(measured.groups)} groups.")
    if len(facts) > MATRIX_LAYERS:
        said.append(f"Pairs of experts are shown for {MATRIX_LAYERS} of {len(facts)} layers.")
    if (most := max(fact.layer.num_experts for fact in facts)) > MATRIX_EXPERTS:
        said.append(f"Pairs of experts are shown for the {MATRIX_EXPERTS} busiest of {most} experts of a layer.")
    for side, tokens in measured.tokens.items():
        if len(tokens.ids) > SHOWN_TOKENS:
            said.append(f"The {side}'s text shows up to {SHOWN_TOKENS} of {len(tokens.ids)} tokens; all were counted.")
    return [*said, "to_dict() has all of it."] if said else []


def _text(measured: Measurement, side: str, facts: list[LayerFacts], labels: dict[int, str], best: LayerFacts) -> dict:
    """One side's tokens, and what its layers did with them, packed."""
    tokens, layers = measured.tokens[side], [fact.layer for fact in facts if fact.layer.side == side]
    blocks = _blocks(measured, tokens)
    rows = np.concatenate([np.arange(block.start, block.stop) for block in blocks])
    start = next((place for place, layer in enumerate(layers) if layer is best.layer), 0)
    width = max(layer.index.shape[1] for layer in layers)

    def stacked(name: str, fill: int = 0) -> np.ndarray:
        arrays = [getattr(layer, name)[rows] for layer in layers]
        return np.stack(
            [np.pad(a, ((0, 0), (0, width - a.shape[1])), constant_values=fill) if a.ndim == 2 else a for a in arrays]
        )

    paragraphs = []
    for block in blocks:
        words = shown_text(tokens, measured.texts, labels, block)
        groups = set(tokens.group[block].tolist()) - {-1}
        title = measured.groups[groups.pop()] if len(groups) == 1 else ""
        paragraphs.append((title, list(zip(words, layers[start].index[block, 0].tolist(), strict=True))))
    return {
        "side": side,
        "start": start,
        "layers": [layer.label for layer in layers],
        "places": [next(p for p, fact in enumerate(facts) if fact.layer is layer) for layer in layers],
        "paragraphs": paragraphs,
        "packed": {
            "index": pack_integers(stacked("index", -1)),
            "weights": pack_shares(stacked("weights")),
            "entropy": pack_shares(stacked("entropy")),
            "margin": pack_shares(stacked("margin")),
        },
    }


def _blocks(measured: Measurement, tokens: Tokens) -> list[range]:
    """The beginnings of texts, one group after the other, so that each is seen."""
    starts = np.searchsorted(tokens.text, np.arange(len(measured.texts) + 1))
    queues: dict[int, list[range]] = {}
    for start, stop in pairwise(starts.tolist()):
        if stop > start:
            block = range(start, min(stop, start + TOKENS_OF_A_TEXT))
            queues.setdefault(int(tokens.group[start:stop].max()), []).append(block)
    blocks: list[range] = []
    room = SHOWN_TOKENS
    while any(queues.values()) and room > 0:
        for queue in queues.values():
            if queue and room > 0:
                block = queue.pop(0)
                blocks.append(block[:room])
                room -= len(blocks[-1])
    return sorted(blocks, key=lambda block: int(tokens.group[block].max()))


def _contexts(measured: Measurement, layer: LayerMeasurement, expert: int) -> list[tuple[str, str, str]]:
    """Where the expert has its largest weights: what stands before, the token, what stands behind; a text once."""
    tokens = measured.tokens[layer.side]
    weight = np.where(layer.index == expert, layer.weights, 0).max(axis=1)
    weight = np.where(tokens.span[:, 0] >= 0, weight, 0)
    found: list[tuple[str, str, str]] = []
    seen: set[int] = set()
    for row in np.argsort(-weight, kind="stable")[:50].tolist():
        number = int(tokens.text[row])
        if weight[row] <= 0 or len(found) == CONTEXTS:
            break
        if number not in seen:
            seen.add(number)
            text, (start, stop) = measured.texts[number], tokens.span[row].tolist()
            before, behind = text[max(0, start - CONTEXT_CHARACTERS) : start], text[stop : stop + CONTEXT_CHARACTERS]
            found.append((" ".join(before.split("\n")), text[start:stop], " ".join(behind.split("\n"))))
    return found


def _nearest(fact: LayerFacts, expert: int) -> list[tuple[int, float]]:
    """The three experts whose outputs are most like this one's."""
    if fact.layer.outputs is None or fact.layer.num_experts < 2:
        return []
    row = fact.layer.outputs[expert].copy()
    row[expert] = -np.inf
    order = np.argsort(-np.nan_to_num(row, nan=-np.inf), kind="stable")[:3]
    return [(int(other), float(row[other])) for other in order if np.isfinite(row[other])]


def _matrices(fact: LayerFacts) -> tuple[list[int], list[tuple[str, str, np.ndarray, float, float]]]:
    """The order of the experts shown, and the matrices: title, explanation, values, the lowest and the highest."""
    busiest = np.sort(np.argsort(-fact.load, kind="stable")[:MATRIX_EXPERTS])
    given = []
    for (title, text), matrix in zip(PAIRS, (fact.layer.outputs, fact.coactivation, fact.layer.units), strict=True):
        if matrix is not None and len(busiest) > 1:
            shown = matrix[np.ix_(busiest, busiest)]
            given.append((title, text, shown, shown[~np.eye(len(shown), dtype=bool)]))
    if not given:
        return [], []
    order = order_by_similarity(given[0][2])
    return busiest[order].tolist(), [
        (title, text, shown[np.ix_(order, order)], np.nanmin(values, initial=1), np.nanmax(values, initial=0))
        for title, text, shown, values in given
    ]


def _charts(measured: Measurement) -> list[dict[str, Any]]:
    """Lines over checkpoints, a layer each, and over a monitor's log."""
    charts = []
    if measured.history:
        names = [moment.name for moment in measured.history] + ["now"]
        layers = measured.layers
        choices = [moment.index for moment in measured.history] + [[layer.index for layer in layers]]
        entropies = [moment.entropy for moment in measured.history] + [[layer.entropy for layer in layers]]
        some = spread(len(layers), 6)

        def lines(value: Any) -> dict[str, list[float]]:
            return {layers[place].label: [value(time, place) for time in range(len(names))] for place in some}

        def busiest(time: int, place: int) -> float:
            counts = np.bincount(choices[time][place][choices[time][place] >= 0].ravel())
            return float(counts.max() / counts.sum() * layers[place].num_experts)

        charts = [
            _chart("Saturation: share of the choices that are the final ones", names, lines(
                lambda time, place: saturation(choices[time][place], layers[place].index))),
            _chart("Load of the busiest expert, in even shares", names, lines(busiest)),
            _chart("Entropy of the router's probabilities (1 is undecided)", names, lines(
                lambda time, place: mean_of_known(entropies[time][place]))),
        ]  # fmt: skip
    if len(measured.log) > 1:
        some = spread(len(measured.log), 60)
        steps = [f"step {measured.log[place].get('step', place)}" for place in some]
        for name in LOGGED:
            values = [float(measured.log[place].get(name, np.nan)) for place in some]
            if np.isfinite(values).all():
                charts.append(_chart(f"{name}, from the monitor's log", steps, {name: values}))
    return charts


def _chart(title: str, names: list[str], lines: dict[str, list[float]]) -> dict[str, Any]:
    """Points in a box of 560 by 180, and the numbers."""
    values = np.array(list(lines.values()))
    low, high = float(values.min()), float(values.max())
    low, high = (low - 0.5, high + 0.5) if low == high else (low, high)
    xs = np.linspace(0, 560, len(names)) if len(names) > 1 else np.array([280.0])
    points = [
        " ".join(f"{x:.0f},{180 - 180 * (y - low) / (high - low):.1f}" for x, y in zip(xs, line, strict=True))
        for line in values
    ]
    return {"title": title, "names": names, "lines": lines, "points": points, "low": low, "high": high}


def _percent(value: float) -> str:
    return f"{_number(100 * value, 0 if value >= 0.1 or value == 0 else 1)} %" if np.isfinite(value) else "–"


def _breaks(name: str) -> Markup:
    """A name that may be broken behind its punctuation."""
    return Markup("").join(escape(part) + Markup("<wbr>") for part in re.split(r"(?<=[_/.-])", name))


def _number(value: float, digits: int = 1) -> str:
    return "–" if not np.isfinite(value) else f"{value:.{digits}f}"


def _signed(value: float, digits: int = 3) -> str:
    shown = f"{value:+.{digits}f}"
    return "–" if not np.isfinite(value) else shown if float(shown) else shown[1:]


def _warm(ratio: float) -> str:
    """The class of a ratio to an even or average share: blue below 1, orange above, in steps of a factor of 1.6."""
    if not np.isfinite(ratio):
        return "n"
    step = int(np.clip(np.round(1.5 * np.log2(max(ratio, 1e-3))), -4, 4))
    return f"w{step}" if step > 0 else f"c{-step}" if step < 0 else "z"


def _blue(value: float, low: float, high: float) -> str:
    """The class of a value between two others, in ten steps."""
    return "n" if not np.isfinite(value) else f"b{int(np.clip((value - low) / max(high - low, 1e-9), 0, 1) * 9)}"
