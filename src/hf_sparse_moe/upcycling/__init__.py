"""Dense checkpoints become mixtures."""

from .initialization import INITIALIZATION_METHODS
from .upcycle import upcycle


__all__ = ["INITIALIZATION_METHODS", "upcycle"]
