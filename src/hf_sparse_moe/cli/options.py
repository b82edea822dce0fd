"""The arguments and options that several commands share, and how they are read and printed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table


SourceArgument = Annotated[str, typer.Argument(help="Folder or Hub id of a mixture.")]
DenseSourceArgument = Annotated[str, typer.Argument(help="Folder or Hub id of a dense checkpoint.")]
OutputArgument = Annotated[Path, typer.Argument(help="The folder to create; it appears once it is complete.")]
ExpertsOption = Annotated[int, typer.Option(help="Number of routed experts in a layer.")]
TopKOption = Annotated[int, typer.Option(help="Number of experts that each token uses.")]
MethodOption = Annotated[
    str, typer.Option(help="How the experts are initialized; `copy` computes what the dense model computes.")
]
LayersOption = Annotated[
    str, typer.Option(help="Which layers become sparse: `all`, `none`, `every_N`, `first_N` or `last_N`.")
]
SettingsOption = Annotated[
    list[str],
    typer.Option("--set", help="NAME=VALUE: an option of the method, or a field of the config. Repeatable."),
]
DtypeOption = Annotated[str, typer.Option(help="Dtype of the result, such as `bfloat16`; `auto` keeps the source's.")]
BaseOption = Annotated[
    str | None,
    typer.Option(
        "--base", help="Folder or Hub id of an adapter's base model.", show_default="the one that the adapter names"
    ),
]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")]
SeedOption = Annotated[int, typer.Option(help="Seed of everything that is drawn at random.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Resume from what an interrupted call left.")]
ShardSizeOption = Annotated[str, typer.Option(help="Largest size of a file of weights.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object, for programs.")]


def to_settings(assignments: Sequence[str]) -> dict[str, Any]:
    """`name=value` each; the value is read as JSON where that is possible, else as text."""
    settings: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"`--set {assignment}` is not allowed: it must be NAME=VALUE, such as granularity=4.")
        try:
            settings[name] = json.loads(value)
        except json.JSONDecodeError:
            settings[name] = value
    return settings


def show(report: dict[str, Any], as_json: bool, *told: str | RenderableType) -> None:
    """A report as one JSON object, or in words and tables."""
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    for each in told:
        if isinstance(each, str):
            typer.echo(each)
        else:
            Console().print(each, highlight=False)


def facts_table(rows: dict[str, Any]) -> Table:
    """Names and values in two columns, without lines."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in rows.items():
        table.add_row(name, escape(str(value)))
    return table


def describe_difference(equality: dict[str, Any]) -> str:
    """The receipt's comparison with the dense outputs, in one sentence."""
    if "max_abs_difference" not in equality:
        return f"difference to the dense outputs: {equality['note']}"
    return (
        f"largest difference to the dense outputs {equality['max_abs_difference']:.1e} on {equality['probe_tokens']} "
        f"tokens in {equality['dtype']}, where they reach {equality['max_abs_output']:.1f}"
    )
