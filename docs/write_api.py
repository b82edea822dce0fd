"""Writes docs/api.md, the reference of every public name, from the docstrings: `python docs/write_api.py`."""

from __future__ import annotations

import inspect
from pathlib import Path

import hf_sparse_moe


PAGE = Path(__file__).with_name("api.md")
HEAD = """# Python API

Import every name below from `hf_sparse_moe`; importing the package itself loads neither torch nor transformers.
`source`, `output`, `max_shard_size`, `seed`, `revision` and `token` mean the same everywhere; a path is a `str` or a
`Path`. Reports are frozen dataclasses whose `to_dict()` is what the command line prints with `--json`. This page is
written by `python docs/write_api.py`.
"""


def first_paragraph(name: str) -> str:
    """What the docstring of a public name opens with, on one line."""
    return " ".join((inspect.getdoc(getattr(hf_sparse_moe, name)) or "").split("\n\n")[0].split())


def render() -> str:
    """The page: an overview, then a directive for each name, which the site replaces by its full reference."""
    classes = {name for name in hf_sparse_moe.__all__ if name.startswith("SparseMoe")}
    topics = {"Functions and callbacks": set(hf_sparse_moe.__all__) - classes, "Configurations and models": classes}
    lines = [HEAD]
    for topic, names in topics.items():
        lines += [f"## {topic}", "", "| name | |", "| --- | --- |"]
        lines += [f"| `{name}` | {first_paragraph(name).replace('|', '&#124;')} |" for name in sorted(names)]
        lines.append("")
    lines += ["## Reference", ""]
    for name in hf_sparse_moe.__all__:
        lines += [f"::: {getattr(hf_sparse_moe, name).__module__}.{name}", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
