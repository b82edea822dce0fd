"""What the page says in words, by the thresholds at which [`RoutingMonitor`] warns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from hf_sparse_moe.routing.routing_alarms import ASSIGNMENTS_PER_EXPERT, dominance, evenness
from hf_sparse_moe.routing.routing_monitor import RoutingMonitor

from .definitions import LayerFacts, preferred_experts, saturation
from .measurement import Measurement


NAMED = 4  # layers or experts in one sentence
EXAMPLES = 3  # of a group and its expert
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
    where = _some([fact.layer.label for fact in uneven]) if uneven else "every layer"
    text = (
        f"in {where}: the busiest, {_name(worst, expert)}, gets {worst.load[expert] * worst.layer.num_experts:.1f} "
        f"times an even share. (The monitor's limits: evenness at least {limits['min_evenness']}, dominance at most "
        f"{limits['max_dominance']}.)"
    )
    return Claim(BAD, "Collapsed", text, "load") if uneven else Claim(GOOD, "Balanced", text, "load")


def _dead(facts: list[LayerFacts], starvation: float) -> Claim:
    dead = [_name(fact, e) for fact in facts for e in np.flatnonzero(fact.load == 0).tolist()]
    hungry = [
        _name(fact, e)
        for fact in facts
        for e in np.flatnonzero((fact.load > 0) & (fact.load < starvation / fact.layer.num_experts)).tolist()
    ]
    least = f"{100 * starvation:.0f} % of an even share"
    if not dead and not hungry:
        return Claim(GOOD, "No dead expert:", f"each gets at least {least}.", "load")
    tail = f" Less than {least}: {_some(hungry)}." if hungry else ""
    if any(fact.layer.index.size < ASSIGNMENTS_PER_EXPERT * fact.layer.num_experts for fact in facts):
        tail += (
            f" There are fewer than {ASSIGNMENTS_PER_EXPERT} choices for each expert: too few to tell it from chance."
        )
    if dead:
        return Claim(BAD, f"{len(dead)} dead experts", f"that no token chose: {_some(dead)}.{tail}", "load")
    return Claim(BAD, "No dead expert,", f"but some starve.{tail}", "load")


def _specialised(measurement: Measurement, facts: list[LayerFacts]) -> Claim:
    if len(measurement.groups) < 2:
        return Claim(NEUTRAL, "One group of text:", "give groups to see who serves what.", "groups")
    best = most_specialised(facts)
    numbers = (
        f"{best.layer.label}, where group and expert share {_percent(best.information)} of their information; "
        f"shuffled groups reach {_percent(best.chance)}.)"
    )
    found = [fact for fact in facts if fact.is_specialised]
    if not found:
        text = f"the groups say no more about the experts than shuffled ones. (At most in {numbers}"
        return Claim(NEUTRAL, "Not specialised by group:", text, "groups")
    own = [(facts[at[0]], at[1], g) for g, at in enumerate(preferred_experts(facts)) if at is not None]
    own.sort(key=lambda pair: -pair[0].lift_low[pair[2], pair[1]])
    examples = ", ".join(
        f"{_name(fact, e)} for “{measurement.groups[g]}” ({100 * fact.share[g, e]:.0f} %, {fact.lift[g, e]:.1f}×)"
        for fact, e, g in own[:EXAMPLES]
    )
    clearest = f" Clearest, by share of the group's choices and times the average group's: {examples}." if own else ""
    text = f"in {len(found)} of {len(facts)} layers.{clearest} (Most in {numbers}"
    return Claim(GOOD, "Specialised by group", text, "groups")


def _basis(facts: list[LayerFacts]) -> Claim:
    by_token = [fact for fact in facts if fact.token_information > fact.information - fact.chance]
    most = max(facts, key=lambda fact: fact.token_information)
    text = (
        f"In {len(by_token)} of {len(facts)} layers the token itself says more about its experts than its group does, "
        f"most in {most.layer.label}. (Token and expert share {_percent(most.token_information)} of their information "
        "there, above shuffled tokens.)"
    )
    return Claim(NEUTRAL, "By token or by group?", text, "experts")


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
        return Claim(
            NEUTRAL, "Most needed:", "not measured, as no layer can do without one of its experts.", "experts"
        )
    harm, fact, expert, group = max(harms, key=lambda found: found[0])
    _, low, high = (array[expert, group] for array in fact.added or ())
    interval = "" if np.isnan(low) else f" (95 % interval {low:.3f} to {high:.3f})"
    text = (
        f"{_name(fact, expert)}. With it disabled, the loss on “{measurement.groups[group]}” grows by {harm:.3f} nats "
        f"a token{interval}. The median over experts and groups is {np.median([found[0] for found in harms]):.3f}."
    )
    return Claim(NEUTRAL, "Most needed:", text, "experts")


def _alike(facts: list[LayerFacts]) -> Claim:
    outputs = _mean_off_diagonal([fact.layer.outputs for fact in facts])
    units = _mean_off_diagonal([fact.layer.units for fact in facts])
    weights = "" if np.isnan(units) else f" (Their weights: {units:.2f}, which says less, as weights part last.)"
    text = f"on the same tokens, two experts' outputs have a cosine of {outputs:.2f} on average; 1 is a copy.{weights}"
    return Claim(NEUTRAL, "Experts differ:" if outputs < 0.9 else "Nearly alike:", text, "pairs")


def _settled(measurement: Measurement) -> Claim:
    first = measurement.history[0]
    shares = [saturation(now, layer.index) for now, layer in zip(first.index, measurement.layers, strict=True)]
    text = f"{100 * np.mean(shares):.0f} % of the final choices were already made at {first.name}."
    return Claim(NEUTRAL, "Over training:", text, "training")


def _mean_off_diagonal(matrices: list[np.ndarray | None]) -> float:
    values = [m[~np.eye(len(m), dtype=bool)] for m in matrices if m is not None and len(m) > 1]
    return float(np.nanmean(np.concatenate(values))) if values else float("nan")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _name(fact: LayerFacts, expert: int) -> str:
    return f"expert {expert} of {fact.layer.label}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
