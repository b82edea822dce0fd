"""`plan_layouts`: each layout of N GPUs with its memory, traffic and time; what fits, and what is fastest."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hf_sparse_moe.models.configuration_sparse_moe import SparseMoeConfig

from .formulas import Collective, Memory, compute_seconds, memory_of_rank, step_seconds, traffic
from .layouts import Layout, possible_layouts
from .machine import Machine, make_machine
from .shape import ModelShape, read_shape
from .workload import Workload


RESERVED = 0.1  # of a GPU's memory, for the context, the libraries and fragments


@dataclass(frozen=True)
class LayoutPlan:
    """
    What one layout costs.

    Args:
        gradient_checkpointing (`bool`): Whether layers are computed again in the backward pass.
        memory (`Memory`): Bytes of a rank.
        traffic (`list[Collective]`): Of a rank in one optimizer step.
        compute_seconds (`float`): Of the products.
        slowest_seconds, fastest_seconds (`float`): A step without any overlap, and with all that the engine may do.
        fits (`bool`): Whether nine tenths of a GPU's memory hold it.
    """

    layout: Layout
    gradient_checkpointing: bool
    memory: Memory
    traffic: list[Collective]
    compute_seconds: float
    slowest_seconds: float
    fastest_seconds: float
    fits: bool

    def sent(self, kind: str) -> float:
        """Bytes that a rank sends in collectives of one kind."""
        return sum(collective.sent for collective in self.traffic if collective.kind == kind)

    @property
    def name(self) -> str:
        return self.layout.name + (", checkpointing" if self.gradient_checkpointing else "")

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name,
            **asdict(self),
            "memory": {**asdict(self.memory), "total": self.memory.total},
        }


def plan_layouts(
    mixture: SparseMoeConfig | ModelShape | str | Path,
    gpus: int,
    *,
    machine: Machine | None = None,
    workload: Workload | None = None,
) -> list[LayoutPlan]:
    """
    The layouts of `gpus` GPUs for a mixture: those that fit first, the fastest of them first. A calculation from the
    config: no weights are read, and nothing is run.

    Args:
        mixture (`SparseMoeConfig`, `ModelShape`, `str` or `Path`): Or folder or Hub id of a mixture.
        gpus (`int`): From 1 to thousands.
        machine (`Machine`, *optional*): Defaults to nodes of 8 H100; see [`make_machine`].
        workload (`Workload`, *optional*): One optimizer step; defaults to a sequence of 4,096 tokens a GPU in bf16.

    Returns:
        `list[LayoutPlan]`: The first one is the fastest that fits, where its `fits` is true.

    Raises:
        ValueError: no GPU, or no mixture of this package.

    Example:
        ```python
        best = plan_layouts("me/my-mixture", 64, machine=make_machine("h100"))[0]
        print(best.name, best.fits, best.fastest_seconds)
        ```
    """
    if gpus < 1:
        raise ValueError(f"`gpus={gpus}` must be at least 1.")
    shape = mixture if isinstance(mixture, ModelShape) else read_shape(mixture)
    machine, workload = machine or make_machine(), workload or Workload()
    asked = workload.gradient_checkpointing
    choices = (False, True) if asked is None else (asked,)
    workloads = [replace(workload, gradient_checkpointing=choice) for choice in choices]
    layouts = possible_layouts(shape, gpus, machine)
    plans = [_plan(shape, layout, machine, each) for layout in layouts for each in workloads]
    return sorted(plans, key=lambda plan: (not plan.fits, plan.fastest_seconds, plan.slowest_seconds))


def _plan(shape: ModelShape, layout: Layout, machine: Machine, workload: Workload) -> LayoutPlan:
    memory = memory_of_rank(shape, layout, workload)
    collectives = traffic(shape, layout, workload)
    compute = compute_seconds(shape, layout, workload, machine)
    slowest, fastest = step_seconds(collectives, compute, machine)
    fits = memory.total <= (1 - RESERVED) * machine.memory
    checkpointing = bool(workload.gradient_checkpointing)
    return LayoutPlan(layout, checkpointing, memory, collectives, compute, slowest, fastest, fits)
