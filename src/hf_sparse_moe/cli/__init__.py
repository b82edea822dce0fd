"""`hf-sparse-moe`: one thin command for each capability, one file for each topic."""

from .app import app, main


# The commands register themselves with `app`; the order here is that of the help.
from . import upcycling, surgery, checkpoints, look, evaluation, stock, hub, demo  # noqa: F401  # isort: skip


__all__ = ["app", "main"]
