"""The layouts of N GPUs that the engines offer for a mixture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .machine import Machine
from .shape import ModelShape


@dataclass(frozen=True)
class Layout:
    """
    What each of the N GPUs holds. Ranks are numbered as transformers' meshes number them: neighbours are of one
    tensor- or expert-parallel group, and replicas are farthest apart.

    Args:
        engine (`str`):
            `"ddp"`: all of the model on each rank. `"zero2"`: DeepSpeed's second stage, gradients and optimizer states
            sharded. `"fsdp"`: weights too; FSDP2, and the same bytes as ZeRO's third stage.
        replicas (`int`): Groups of ranks with all of the model between them (`dp_replicate_size`).
        fsdp, tp, ep (`int`): As in `DistributedConfig`: `replicas * fsdp * tp` ranks, and `ep` of `fsdp * tp`.
    """

    engine: str
    replicas: int = 1
    fsdp: int = 1
    tp: int = 1
    ep: int = 1

    @property
    def gpus(self) -> int:
        return self.replicas * self.fsdp * self.tp

    @property
    def efsdp(self) -> int:
        """Ranks that share one part of the experts between them."""
        return self.fsdp * self.tp // self.ep

    @property
    def batches(self) -> int:
        """Ranks, or groups of them, that see different sequences."""
        return self.replicas * self.fsdp

    @property
    def name(self) -> str:
        if self.engine == "ddp":
            return "one GPU" if self.gpus == 1 else f"DDP {self.gpus}"
        if self.engine == "zero2":
            return f"ZeRO-2 {self.gpus}"
        parts = [f"FSDP {self.fsdp}"] if self.fsdp > 1 else []
        parts += [f"{kind} {degree}" for kind, degree in (("EP", self.ep), ("TP", self.tp)) if degree > 1]
        return (f"{self.replicas} replicas of " if self.replicas > 1 else "") + " x ".join(parts)


def possible_layouts(shape: ModelShape, gpus: int, machine: Machine) -> Iterator[Layout]:
    """
    The layouts of `gpus` GPUs whose degrees divide the experts, the heads and the GPUs. Tensor-parallel groups stay
    within a node; replicas are whole nodes.
    """
    yield Layout("ddp", replicas=gpus)
    if gpus == 1:
        return
    yield Layout("zero2", replicas=gpus)
    nodes = gpus // machine.gpus_per_node if gpus % machine.gpus_per_node == 0 else 1
    for replicas in sorted({1, nodes}):
        for tp in _degrees(shape, gpus // replicas, machine):
            sharded = gpus // replicas
            for ep in range(1, min(shape.num_experts, sharded) + 1):
                if shape.num_experts % ep == 0 and sharded % ep == 0 and (ep == 1 or ep % tp == 0):
                    yield Layout("fsdp", replicas, sharded // tp, tp, ep)


def _degrees(shape: ModelShape, gpus: int, machine: Machine) -> Iterator[int]:
    for tp in range(1, min(gpus, machine.gpus_per_node) + 1):
        divides = gpus % tp == 0 and machine.gpus_per_node % tp == 0 and not any(heads % tp for heads in shape.heads)
        if tp == 1 or (shape.tensor_parallel and divides):
            yield tp
