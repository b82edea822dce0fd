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
    """Of the backend that is used where nobody asks for another."""
    return seconds["sparse_moe"]


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
        return [seconds["dense"] / seconds["sparse_moe"] for seconds in rows]

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
         experts(lambda row: row["saved_bytes"]["sparse_moe"], T=2048, H=512, I=1024, E=8, K=2),
         16e6, True, "MB", "saved"),
    Goal("the same, computed again in backward (`sparse_moe_recompute`)", "experts",
         experts(lambda row: row["saved_bytes"]["sparse_moe_recompute"], T=2048, H=512, I=1024, E=8, K=2),
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
         growth("sparse_moe"), 0.85, False, "%", "growth"),
    Goal("time of a Trainer's step in router, record, statistics and balance loss: each family", "training_step",
         added_share, 0.10, True, "%", "training step"),
]  # fmt: skip

# Shown where a goal is missed. No measured number stands here: those come from the results.
OBSTACLES = {
    "experts": (
        "**Experts over the bare products**: rows are gathered and added up, and gradients are fresh memory in every "
        "step. Narrow experts feel this most."
    ),
    "few rows": "**128 tokens**: whole weights are read, whole gradients written, for few rows.",
    "stock": (
        "**The best of transformers' backends**: with few rows an expert, a loop in Python is slower than that of "
        "`grouped_mm`."
    ),
    "dense": "**The dense feed-forward** multiplies one long matrix; the experts read E times the weights.",
    "saved": (
        "**Kept for backward**: the first projection, in the compute dtype; `sparse_moe_recompute` keeps nothing."
    ),
    "autocast": "**Under autocast** each step casts the float32 weights of all experts that have a row.",
    "bfloat16": "**bfloat16 with fresh routing**: with few large experts there are few row counts to compile anew.",
    "lora step": "**LoRA, whole step**: attention, frozen products and head are the same for both.",
    "lora block": "**LoRA, the experts alone**: with many tokens the frozen products dominate for both.",
    "lora memory": "**LoRA, memory**: few experts with many tokens are mostly activations, the same for both.",
    "generate one": ("**Generate, one sequence**: each sparse layer adds a dozen small operations."),
    "generate eight": (
        "**Generate, 8 sequences**: the dense model reads its weights once; 8 tokens ask up to 16 experts."
    ),
    "growth": "**More experts**: the weights and their gradients grow with E, the multiplications do not.",
    "training step": "**Trainer's step**: a few dozen small operations a layer; larger layers make their share small.",
}
