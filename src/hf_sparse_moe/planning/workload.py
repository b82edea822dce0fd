"""What is trained on: sequences, precision, optimizer, checkpointing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Precision:
    """
    Bytes of one number.

    Args:
        stored (`int`): Of a weight as the optimizer steps it, of its gradient and of each of its states.
        computed (`int`): Of weights and activations in products, and so of what is gathered and dispatched.
        reduced (`int`): Of gradients while they are reduced.
    """

    stored: int
    computed: int
    reduced: int


PRECISIONS = {
    "float32": Precision(4, 4, 4),
    "mixed": Precision(4, 2, 4),  # bf16 products, float32 weights: `bf16=True`, `fsdp_mixed_precision=True`
    "bfloat16": Precision(2, 2, 2),
}
# States a weight, and their bytes (None: as the weight).
OPTIMIZERS: dict[str, tuple[int, int | None]] = {"adamw": (2, None), "adamw_8bit": (2, 1), "sgd": (0, None)}


@dataclass(frozen=True)
class Workload:
    """
    One optimizer step.

    Args:
        sequence_length (`int`, defaults to 4096): Tokens of a sequence.
        sequences_per_gpu (`int`, defaults to 1):
            The global batch over the GPUs. Ranks of a tensor-parallel group share the sequences of all of them.
        precision (`str`, defaults to `"mixed"`): A key of `PRECISIONS`.
        optimizer (`str`, defaults to `"adamw"`): A key of `OPTIMIZERS`.
        gradient_checkpointing (`bool`, *optional*):
            Whether layers are computed again in the backward pass; where it is left open, [`plan_layouts`] tries both.
    """

    sequence_length: int = 4096
    sequences_per_gpu: int = 1
    precision: str = "mixed"
    optimizer: str = "adamw"
    gradient_checkpointing: bool | None = None

    def __post_init__(self) -> None:
        for name in ("sequence_length", "sequences_per_gpu"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}={getattr(self, name)}` must be at least 1.")
        for name, known in (("precision", PRECISIONS), ("optimizer", OPTIMIZERS)):
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}={getattr(self, name)!r}` is none of {', '.join(known)}.")

    @property
    def bytes(self) -> Precision:
        return PRECISIONS[self.precision]

    @property
    def tokens_per_gpu(self) -> int:
        return self.sequence_length * self.sequences_per_gpu

    @property
    def state_bytes(self) -> int:
        """Of the optimizer, for each weight."""
        states, size = OPTIMIZERS[self.optimizer]
        return states * (size or self.bytes.stored)
