"""The rows of [`doctor`]'s table."""

from __future__ import annotations

from dataclasses import dataclass


PASSED, FAILED, WARNING, NOT_CHECKED = "passed", "failed", "warning", "not checked"
MANY = 3  # names in a sentence


@dataclass(frozen=True)
class Finding:
    """
    One row of the table.

    Args:
        check (`str`): What was asked.
        verdict (`str`): `"passed"`, `"failed"`, `"warning"` or `"not checked"`.
        told (`str`): What was seen, in a sentence.
    """

    check: str
    verdict: str
    told: str


def some(names: list[str]) -> str:
    """The first of the names, and how many more there are."""
    more = "" if len(names) <= MANY else f" and {len(names) - MANY} more"
    return ", ".join(f"`{name}`" for name in names[:MANY]) + more
