"""Text of others in Markdown: shown as it is, in its place, and nothing else."""

from __future__ import annotations

import html
import re
import unicodedata
from pathlib import Path

from markupsafe import Markup


LONGEST_VALUE = 300


def escape_markdown(value: object) -> Markup:
    """The value on one line that Markdown, a table cell and HTML show as it is, whoever wrote it."""
    if isinstance(value, Markup):  # text of ours
        return value
    return Markup(re.sub(r"([\\`*_\[\]|~$])", r"\\\1", html.escape(_one_line(value), quote=False)))


def as_code(value: object) -> Markup:
    """A name, path or hash as inline code; whatever else it is, as escaped text: code knows no escapes."""
    text = _one_line(value)
    return Markup(f"`{text}`") if re.fullmatch(r"[\w./:@+ -]+", text) else escape_markdown(value)


def _one_line(value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    text = f"{value:.6g}" if isinstance(value, float) else text
    if Path(text).is_absolute():
        text = Path(text).name  # where it lay on someone's disk is nobody else's business
    text = " ".join(text.split())
    # control and direction characters could hide or reorder what a reader sees
    text = "".join(letter for letter in text if not unicodedata.category(letter).startswith("C"))
    return text if len(text) <= LONGEST_VALUE else text[:LONGEST_VALUE] + "…"
