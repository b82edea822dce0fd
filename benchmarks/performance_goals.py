"""What the library wants to reach in speed and memory, how a results file tells, and what stands in the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


Row = dict[str, Any]
STOCK = ("grouped_mm", "eager", "batched_mm")
OURS = "sparse_moe"  # the backend that is used where nobody asks for another
NOISE = 1.03


class Goal(NamedTuple):
    """
    One line of the page's first table.

    Attributes:
        what (`str`): What is measured.
        section (`str`): The section of the results file, named after the benchmark that writes it.
        values (`Callable`): The measured values, one a shape or case, from that section.
        bound (`float`): What every value should reach.
        at_most (`bool`): Whether it is an upper bound.
        obstacle (`str`): Shown where the goal is missed. No measured number stands there: those come from the results.
    """

    what: str
    section: str
    values: Callable[[Row], list[float]]
    bound: float
    at_most: bool
    obstacle: str

    def is_met(self, value: float) -> bool:
        shown = round(value, 2)
        return shown <= self.bound if self.at_most else shown >= self.bound


def experts(ratio: Callable[[Row], float], **wanted: tuple[float, float]) -> Callable[[Row], list[float]]:
    """`ratio` of the rows whose T, H, ... are between the two numbers wanted."""

    def values(section: Row) -> list[float]:
        rows = section["rows"]
        return [ratio(row) for row in rows if all(low <= row[name] <= high for name, (low, high) in wanted.items())]

    return values


def over_best_stock(field: str) -> Callable[[Row], float]:
    return lambda row: row[field][OURS] / min(row[field][name] for name in STOCK if name in row[field])


def over_bare(row: Row) -> float:
    return row["step_s"][OURS] / row["step_s"]["ideal"]


def kept(backend: str) -> Callable[[Row], float]:
    """What autograd keeps, over the numbers of the first projection in the compute dtype."""
    return lambda row: row["saved_bytes"][backend] / (row["T"] * row["K"] * 2 * row["I"] * row["bytes_a_number"])


def lora(value: Callable[[Row], float], most_tokens: int = 2**62) -> Callable[[Row], list[float]]:
    return lambda section: [value(row) for row in section.get("block", []) if row["T"] <= most_tokens]


def over_peft(field: str) -> Callable[[Row], float]:
    return lambda row: row[field]["PEFT"] / row[field]["ours"]


def generate(other: str, most_sequences: int = 2**62) -> Callable[[Row], list[float]]:
    """Tokens a second over those of `other`."""
    return lambda section: [
        row["seconds"][other] / row["seconds"][OURS] for row in section["rows"] if row["batch_size"] <= most_sequences
    ]


def growth(section: Row) -> list[float]:
    first, *others = (row["seconds"][OURS] for row in section["rows"])
    return [first / seconds for seconds in others]


FEW_ROWS = "What comes before and after the products counts most where there are few rows."
GOALS = [
    Goal("experts, forward and backward, over the best of transformers' backends: every shape", "experts",
         experts(over_best_stock("step_s")), NOISE, True, FEW_ROWS),
    Goal("the same, forward without gradient", "experts",
         experts(over_best_stock("forward_s")), NOISE, True, FEW_ROWS),
    Goal("experts, forward and backward, over the bare products: from 2,048 tokens", "experts",
         experts(over_bare, T=(2048, 1e9)), 1.15, True,
         "Rows are gathered and added up, and gradients are fresh memory in every step; narrow experts feel it most."),
    Goal("kept for backward, over T K 2I numbers in the compute dtype", "experts", experts(kept(OURS)), 1.0, True,
         "In half precision each expert's rows are filled up to one of few lengths."),
    Goal("the same with `sparse_moe_recompute`", "experts", experts(kept("sparse_moe_recompute")), 0.5, True, ""),
    Goal("8 to 256 experts, tokens a second over those at 8: 32 rows an expert and more", "growth", growth, 0.8, False,
         "The weights and their gradients grow with E and leave the caches; the multiplications stay the same."),
    Goal("LoRA on experts, tokens a second over PEFT's", "lora", lora(over_peft("seconds")), 1.5, False,
         "With many tokens for few experts, the frozen products dominate for both."),
    Goal("the same, PEFT's peak memory over ours, up to 512 tokens", "lora", lora(over_peft("peak"), 512), 2.5, False,
         "With few experts a call is mostly activations, the same for both."),
    Goal("`generate`, tokens a second over stock Mixtral's: every batch size", "generate", generate("Mixtral"),
         0.97, False, "The router heeds NaN and records, and the outer model wraps the dense one's forward."),
    Goal("the same, over the dense model of as many active parameters: one sequence", "generate",
         generate("dense", 1), 0.85, False, "Each sparse layer adds a dozen small operations to two products."),
]  # fmt: skip
