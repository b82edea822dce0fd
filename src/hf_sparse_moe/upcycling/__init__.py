"""Dense checkpoints become mixtures."""

from .initialization import INITIALIZATION_METHODS
from .mixtures import UpcycleReport, upcycle
from .planning import UpcyclePlan, plan
from .verification import Verification, verify


__all__ = [
    "INITIALIZATION_METHODS",
    "UpcyclePlan",
    "UpcycleReport",
    "Verification",
    "plan",
    "upcycle",
    "verify",
]
