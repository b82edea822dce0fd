"""`hf-sparse-moe`: one thin command a capability, one file a topic."""

from .app import app, main


# The commands register themselves with `app`; the order here is that of the help.
from . import upcycling, planning, consolidate, inspection, export, hub, quickstart  # noqa: F401  # isort: skip


__all__ = ["app", "main"]
