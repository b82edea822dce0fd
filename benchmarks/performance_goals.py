"""What the library wants to reach in speed and memory, how a results file tells, and what stands in the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from training_step import NOW
from training_step import OURS as ADDED


Row = dict[str, Any]
STOCK = ("grouped_mm", "eager", "batched_mm")


class Goal(NamedTuple):
    """
    One line of the page's first table.

    Attributes:
        what (`str`): What is measured.
        section (`str`): The section of the results file, named after the benchmark that writes it.
        values (`Callable`): The measured values, one a shape or case, from that section.
        bound (`float`): What every value should reach.
        at_most (`bool`): Whether it is an upper bound.
        unit (`str`): `""` for a ratio, `"%"` for a share of 1, `"MB"` for bytes.
        obstacle (`str`): Key of [`OBSTACLES`], shown where the goal is missed.
    """

    what: str
    section: str
    values: Callable[[Row], list[float]]
    bound: float
    at_most: bool
    unit: str
    obstacle: str

    def is_met(self, value: float) -> bool:
        return value <= self.bound if self.at_most else value >= self.bound

    def shown(self, value: float) -> str:
        return {"%": f"{value:.1%}", "MB": f"{value / 1e6:.1f} MB"}.get(self.unit, f"{value:.2f}")


def ours(seconds: dict[str, float]) -> float:
    """Of the backend that is used where nobody asks for another, or of the one it chooses in training on a CPU."""
    return seconds["auto"] if "auto" in seconds else seconds["segment_mm"]


def experts(ratio: Callable[[Row], float], mode: str = "float32", **wanted: int | tuple[int, int]):
    """`ratio` of the rows in this mode whose T, H, ... are as wanted: a number, or the lowest and highest."""

    def values(section: Row) -> list[float]:
        rows = [row for row in section["rows"] if row["mode"] == mode]
        for name, value in wanted.items():
            lowest, highest = value if isinstance(value, tuple) else (value, value)
            rows = [row for row in rows if lowest <= row[name] <= highest]
        return [ratio(row) for row in rows]

    return values


def over_bare(field: str) -> Callable[[Row], float]:
    return lambda row: ours(row[field]) / row[field]["ideal"]


def over_best_stock(row: Row) -> float:
    return ours(row["step_s"]) / min(seconds for name, seconds in row["step_s"].items() if name in STOCK)


def over_dense(row: Row) -> float:
    return ours(row["step_s"]) / row["step_s"]["dense"]


def grouped_mm_over_ours(row: Row) -> float:
    return row["step_s"]["grouped_mm"] / ours(row["step_s"])


def lora(table: str, value: Callable[[Row], float], **wanted: Any) -> Callable[[Row], list[float]]:
    """`value` of the rows of the table whose E, T, dtype are among the wanted."""

    def values(section: Row) -> list[float]:
        rows = section.get(table, [])
        return [value(row) for row in rows if all(row[name] in allowed for name, allowed in wanted.items())]

    return values


def step_over_peft(row: Row) -> float:
    return row["seconds"]["ours"] / row["seconds"]["PEFT"]


def speed_up(row: Row) -> float:
    return row["seconds"]["PEFT"] / row["seconds"]["ours"]


def memory_saving(row: Row) -> float:
    return row["peak"]["PEFT"] / row["peak"]["ours"]


def generate(batch_size: int) -> Callable[[Row], list[float]]:
    def values(section: Row) -> list[float]:
        rows = [row["seconds"] for row in section["rows"] if row["batch_size"] == batch_size]
        return [seconds["dense"] / seconds["auto"] for seconds in rows]

    return values


def growth(name: str) -> Callable[[Row], list[float]]:
    def values(section: Row) -> list[float]:
        first, *others = (row["seconds"][name] for row in section["rows"])
        return [first / seconds for seconds in others]

    return values


def added_share(section: Row) -> list[float]:
    return [sum(row["parts"][NOW][part] for part in ADDED) for row in section["rows"]]


BARE = "experts, forward and backward, over the bare products"
GOALS = [
    Goal(f"{BARE}: 2,048 tokens, E 8 to 64", "experts", experts(over_bare("step_s"), T=2048, E=(8, 64)),
         1.15, True, "", "experts"),
    Goal(f"{BARE}: 8,192 tokens", "experts", experts(over_bare("step_s"), T=8192), 1.15, True, "", "experts"),
    Goal(f"{BARE}: 128 tokens", "experts", experts(over_bare("step_s"), T=128), 1.5, True, "", "few rows"),
    Goal("the same, forward only: 8,192 tokens", "experts", experts(over_bare("forward_s"), T=8192),
         1.15, True, "", "experts"),
    Goal("experts, forward and backward, over the best of transformers' backends: every shape", "experts",
         experts(over_best_stock), 1.0, True, "", "stock"),
    Goal("experts over a dense feed-forward of as many active parameters: 8,192 tokens", "experts",
         experts(over_dense, T=8192), 1.0, True, "", "dense"),
    Goal("kept for backward: 2,048 tokens, H 512, I 1,024, E 8, K 2", "experts",
         experts(lambda row: row["saved_bytes"]["segment_mm"], T=2048, H=512, I=1024, E=8, K=2),
         16e6, True, "MB", "saved"),
    Goal("the same, computed again in backward (`segment_mm_recompute`)", "experts",
         experts(lambda row: row["saved_bytes"]["segment_mm_recompute"], T=2048, H=512, I=1024, E=8, K=2),
         16e6, True, "MB", "saved"),
    Goal("`Trainer(bf16=True)`: `grouped_mm` over the experts, 2,048 tokens and more", "experts",
         experts(grouped_mm_over_ours, "bf16 autocast", T=(2048, 8192)), 2.0, False, "", "autocast"),
    Goal("`Trainer(bf16=True)`: experts over the dense feed-forward, 2,048 tokens and more", "experts",
         experts(over_dense, "bf16 autocast", T=(2048, 8192)), 1.2, True, "", "autocast"),
    *(
        Goal(f"{mode}, fresh routing: `grouped_mm` over the experts, 2,048 tokens, E {number}", "experts",
             experts(grouped_mm_over_ours, mode, T=2048, E=number), bound, False, "", "bfloat16")
        for mode in ("bfloat16", "bf16 autocast")
        for number, bound in ((64, 1.7), (8, 1.3))
    ),
    *(
        Goal(f"LoRA on experts, whole step of 4 layers, over PEFT: 1,024 tokens, E {number}", "lora",
             lora("step", step_over_peft, E=(number,), T=(1024,), dtype=("float32",)), bound, True, "", "lora step")
        for number, bound in ((16, 0.75), (128, 0.5))
    ),
    Goal("LoRA, the experts alone, PEFT over ours: every shape and dtype", "lora", lora("block", speed_up),
         1.5, False, "", "lora block"),
    Goal("the same, up to 512 tokens", "lora", lora("block", speed_up, T=(128, 512)), 2.5, False, "", "lora block"),
    Goal("the same, peak memory, E 64", "lora", lora("block", memory_saving, E=(64,)), 3.0, False, "", "lora memory"),
    Goal("the same, peak memory, E 8 and 16", "lora", lora("block", memory_saving, E=(8, 16)),
         2.5, False, "", "lora memory"),
    Goal("`generate`, tokens a second over the dense model's: one sequence", "generate", generate(1),
         0.85, False, "%", "generate one"),
    Goal("`generate`, tokens a second over the dense model's: 8 sequences", "generate", generate(8),
         0.85, False, "%", "generate eight"),
    Goal("more experts, tokens a second over those at E 8: experts of a layer, 32 rows an expert and more", "growth",
         growth("auto"), 0.85, False, "%", "growth"),
    Goal("time of a Trainer's step in router, record, statistics and balance loss: each family", "training_step",
         added_share, 0.10, True, "%", "training step"),
]  # fmt: skip

# Shown where a goal is missed. No measured number stands here: those come from the results.
OBSTACLES = {
    "experts": (
        "**Experts over the bare products.** What is left is memory traffic: rows are gathered for their experts and "
        "added up for their tokens, the activation reads and writes them once more, and the gradients of all experts "
        "are fresh memory in every step. With a narrow intermediate size an expert's products are short, and that "
        "traffic weighs more beside them."
    ),
    "few rows": (
        "**128 tokens.** An expert has a few rows, so that its weights, and in backward its whole weight gradient, "
        "are read and written for a handful of multiplications: the step waits for memory, the bare products into "
        "memory that is already there do not."
    ),
    "stock": (
        "**The best of transformers' backends.** `grouped_mm` loops over the experts outside Python. Where each "
        "expert has few rows the loop is much of the time, and ours, in Python, is behind; with coarse experts in "
        "float32 both wait for the same products and differ by no more than the machine's noise."
    ),
    "dense": (
        "**The dense feed-forward.** It reads rows where they lie and multiplies one long matrix. The experts gather "
        "and add up rows, and each reads weights of its own: E times the weights for the same multiplications, and E "
        "times the gradients."
    ),
    "saved": (
        "**Kept for backward.** One tensor is kept, the first projection of each pair of token and expert: T K rows "
        "of 2 I numbers. In float32 that is twice the goal; in bfloat16, and under autocast, it is the goal, and "
        "`segment_mm_recompute` keeps none of it for one more product in backward."
    ),
    "autocast": (
        "**Under autocast.** Each step casts the float32 weights of all experts that have a row, forward and "
        "backward, a dense feed-forward those of one. Where an expert has few rows the cast is most of the time."
    ),
    "bfloat16": (
        "**bfloat16 with fresh routing.** Segments are filled up to few row counts, so that oneDNN finds its products "
        "compiled; `grouped_mm` compiles them anew. How much that gains depends on how many row counts the run has "
        "met before: with few large experts there are fewer to meet."
    ),
    "lora step": (
        "**LoRA, whole step.** Attention, the frozen products of the experts and the head are the same for both; only "
        "what PEFT adds for the delta of all experts can be saved, and it is the less of the step the fewer experts "
        "there are."
    ),
    "lora block": (
        "**LoRA, the experts alone.** With many tokens the frozen products are nearly all of the time for both, and "
        "PEFT's delta, one for the call whatever its tokens, is spread over more of them. In bfloat16 the thin "
        "products of rank 16 are slow on a CPU."
    ),
    "lora memory": (
        "**LoRA, memory.** PEFT's delta has the size of all experts, whatever the tokens; activations grow with the "
        "tokens and are the same for both. Few experts with many tokens are mostly activations."
    ),
    "generate one": (
        "**Generate, one sequence.** A step of a model this small takes some milliseconds, and each sparse layer adds "
        "a dozen small operations (scores, choice, weights, sorting, adding up) that take the time of calls, not of "
        "arithmetic; the column of the bare products, which has none of them but the router's, is the limit. The "
        "larger the layers, the less they weigh."
    ),
    "generate eight": (
        "**Generate, 8 sequences.** The dense model reads its weights once for all 8 tokens of a step. The mixture's "
        "8 tokens ask up to 16 different experts, and each must be read from memory for one or two rows: as the "
        "column of the bare products shows, no backend that reads each expert once can reach the goal in this shape. "
        "Tokens that share experts (longer prompts, larger batches, fewer experts) bring it closer."
    ),
    "growth": (
        "**More experts.** The multiplications stay the same; the weights, and in backward their gradients, grow with "
        "E. Each expert's weights are read, and its gradient written into fresh memory, for ever fewer rows, until "
        "that traffic is the step. The column of the bare products, which write into memory that is already there, "
        "shows how much of the loss lies in the products themselves."
    ),
    "training step": (
        "**Trainer's step.** Router, record, statistics and balance loss are a few dozen small operations a layer, "
        "whose time hardly depends on the tokens; with larger layers or more tokens their share shrinks."
    ),
}
