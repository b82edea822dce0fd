"""What the page says in words, by the thresholds at which [`RoutingMonitor`] warns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from hf_sparse_moe.routing.routing_alarms import ASSIGNMENTS_PER_EXPERT, dominance, evenness
from hf_sparse_moe.routing.routing_monitor import RoutingMonitor

from .definitions import LayerFacts, saturation
from .measurement import Measurement


NAMED = 4  # layers or experts in one sentence
GOOD, BAD, NEUTRAL = "good", "bad", "neutral"


@dataclass(frozen=True)
class Claim:
    """One sentence: whether it is good news, its key word, the rest, and the figure that shows it."""

    tone: str
    head: str
    text: str
    figure: str


def verdict(measurement: Measurement, facts: list[LayerFacts]) -> list[Claim]:
    """The claims in the page's order."""
    limits = RoutingMonitor().thresholds
    claims = [_balance(facts, limits), _dead(facts, limits["starvation"]), _specialised(measurement, facts)]
    claims += [_basis(facts)] if len(measurement.groups) > 1 else []
    claims += [_ablated(measurement, facts)] if measurement.ablation is not None else []
    claims += [_alike(facts)] if any(fact.layer.outputs is not None for fact in facts) else []
    return claims + ([_settled(measurement)] if measurement.history else [])


def most_specialised(facts: list[LayerFacts]) -> LayerFacts:
    """The layer whose experts the groups say most about."""
    return max(facts, key=lambda fact: fact.information - fact.chance)


def _balance(facts: list[LayerFacts], limits: dict[str, float]) -> Claim:
    uneven = []
    for fact in facts:
        load, top_k = torch.from_numpy(fact.load), fact.layer.top_k
        if evenness(load, top_k) < limits["min_evenness"] or dominance(load, top_k) > limits["max_dominance"]:
            uneven.append(fact)
    worst = max(uneven or facts, key=lambda fact: fact.load.max() * fact.layer.num_experts)
    expert = int(worst.load.argmax())
    busiest = (
        f"The busiest expert is {name(worst, expert)}, with {worst.load[expert] * worst.layer.num_experts:.1f} times "
        "an even share."
    )
    rule = f"(evenness at least {limits['min_evenness']}, dominance at most {limits['max_dominance']})"
    if uneven:
        return Claim(BAD, "Collapsed", f"in {_layers(uneven)}, by the monitor's limits {rule}. {busiest}", "load")
    return Claim(GOOD, "Balanced", f"in every layer, by the monitor's limits {rule}. {busiest}", "load")


def _dead(facts: list[LayerFacts], starvation: float) -> Claim:
    dead = [name(fact, int(e)) for fact in facts for e in np.flatnonzero(fact.load == 0)]
    hungry = [
        name(fact, int(e))
        for fact in facts
        for e in np.flatnonzero((fact.load > 0) & (fact.load < starvation / fact.layer.num_experts))
    ]
    few = [fact for fact in facts if fact.layer.index.size < ASSIGNMENTS_PER_EXPERT * fact.layer.num_experts]
    doubt = (
        f" There are fewer than {ASSIGNMENTS_PER_EXPERT} choices for each expert: too few to tell it from chance."
        if few and (dead or hungry)
        else ""
    )
    tail = f" Less than {starvation:.0%} of an even load: {_some(hungry)}." if hungry else ""
    if dead:
        return Claim(BAD, f"{len(dead)} dead experts", f"that no token chose: {_some(dead)}.{tail}{doubt}", "load")
    if hungry:
        return Claim(BAD, "No dead expert,", f"but some starve.{tail}{doubt}", "load")
    return Claim(GOOD, "No dead expert:", f"each gets at least {starvation:.0%} of an even load.", "load")


def _specialised(measurement: Measurement, facts: list[LayerFacts]) -> Claim:
    if len(measurement.groups) < 2:
        return Claim(NEUTRAL, "One group of text:", "give groups to see who serves what.", "groups")
    found = [fact for fact in facts if fact.is_specialised]
    best = most_specialised(facts)
    numbers = f"{best.information:.1%} of their information (shuffled groups: up to {best.chance:.1%})"
    if not found:
        text = f"the groups say no more about the experts than shuffled ones. At most they share {numbers}."
        return Claim(NEUTRAL, "Not specialised by group:", text, "groups")
    pairs = [(best.lift_low[g, e], g, e) for e in range(best.layer.num_experts) for g in best.serves(e)]
    example = ""
    if pairs:
        _, group, expert = max(pairs)
        example = (
            f" The clearest: {name(best, expert)} gets {best.share[group, expert]:.0%} of the choices of "
            f"“{measurement.groups[group]}”, {best.lift[group, expert]:.1f} times the average group's share."
        )
    where = f"in {len(found)} of {len(facts)} layers, most in {best.layer.label}"
    text = f"{where}: group and expert share {numbers}.{example}"
    return Claim(GOOD, "Specialised by group", text, "groups")


def _basis(facts: list[LayerFacts]) -> Claim:
    by_token = [fact for fact in facts if fact.token_information > fact.information - fact.chance]
    most = max(facts, key=lambda fact: fact.token_information)
    text = (
        f"the input token itself says more about the expert than the group does in {len(by_token)} of {len(facts)} "
        f"layers; at most in {most.layer.label}, where token and expert share {most.token_information:.1%} more than "
        "shuffled tokens."
    )
    return Claim(NEUTRAL, "On what:", text, "experts")


def _ablated(measurement: Measurement, facts: list[LayerFacts]) -> Claim:
    harms = [
        (fact.added[0][e, g], fact, e, g)
        for fact in facts
        if fact.added is not None
        for e in range(fact.layer.num_experts)
        for g in range(len(measurement.groups))
        if np.isfinite(fact.added[0][e, g])
    ]
    if not harms:
        return Claim(NEUTRAL, "Without an expert:", "no layer can do without one of its experts.", "experts")
    harm, fact, expert, group = max(harms, key=lambda found: found[0])
    _, low, high = (array[expert, group] for array in fact.added or ())
    interval = "" if np.isnan(low) else f" (95 % interval {low:+.3f} to {high:+.3f})"
    text = (
        f"{name(fact, expert)} is missed most: “{measurement.groups[group]}” loses {harm:+.3f} nats a token without "
        f"it{interval}; the median over experts and groups is {np.median([found[0] for found in harms]):+.4f}."
    )
    return Claim(NEUTRAL, "Without an expert:", text, "experts")


def _alike(facts: list[LayerFacts]) -> Claim:
    outputs = _mean_off_diagonal([fact.layer.outputs for fact in facts])
    units = _mean_off_diagonal([fact.layer.units for fact in facts])
    weights = (
        ""
        if np.isnan(units)
        else f" (By weights it is {units:.2f}, which says less: routing and outputs part before weights do.)"
    )
    text = f"on the same tokens, two experts' outputs have a cosine of {outputs:.2f} on average.{weights}"
    return Claim(NEUTRAL, "How alike:" if outputs < 0.9 else "Nearly alike:", text, "pairs")


def _settled(measurement: Measurement) -> Claim:
    first = measurement.history[0]
    shares = [saturation(now, layer.index) for now, layer in zip(first.index, measurement.layers, strict=True)]
    text = f"at {first.name}, {np.mean(shares):.0%} of the final choices were made already."
    return Claim(NEUTRAL, "Over training:", text, "training")


def _mean_off_diagonal(matrices: list[np.ndarray | None]) -> float:
    values = [m[~np.eye(len(m), dtype=bool)] for m in matrices if m is not None and len(m) > 1]
    return float(np.nanmean(np.concatenate(values))) if values else float("nan")


def name(fact: LayerFacts, expert: int) -> str:
    """An expert in a sentence."""
    return f"expert {expert} of {fact.layer.label}"


def _layers(facts: list[LayerFacts]) -> str:
    return _some([fact.layer.label for fact in facts])


def _some(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
