"""Dense checkpoints become mixtures."""

from .expand import expand
from .initialization import INITIALIZATION_METHODS
from .upcycle import upcycle


__all__ = ["INITIALIZATION_METHODS", "expand", "upcycle"]
