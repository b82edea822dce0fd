"""Dense checkpoints become mixtures."""

from .expand import expand
from .initialization import INITIALIZATION_METHODS
from .plan import plan
from .streaming import stream_upcycle
from .upcycle import upcycle
from .verify import verify


__all__ = ["INITIALIZATION_METHODS", "expand", "plan", "stream_upcycle", "upcycle", "verify"]
