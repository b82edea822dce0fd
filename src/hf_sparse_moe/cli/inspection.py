"""`info`: what a mixture is made of."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .app import app
from .options import JsonOption, describe_difference, print_json


@app.command(epilog="Examples:\n\n`hf-sparse-moe info ./gpt2-8x`\n\n`hf-sparse-moe info user/gpt2-8x --json`")
def info(
    checkpoint: Annotated[str, typer.Argument(help="Folder or Hub id of a mixture.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a mixture is made of. Reads its config and receipt, not its weights."""
    from hf_sparse_moe.insight.anatomy import describe_checkpoint

    description = describe_checkpoint(checkpoint, revision)
    if as_json:
        print_json(description)
    else:
        _print_description(description)


def _print_description(description: dict[str, Any]) -> None:
    console = Console()
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name in ("family", "class", "dense_architecture", "num_experts", "num_experts_per_tok", "sparse_layers"):
        facts.add_row(name.replace("_", " "), escape(str(description[name])))
    facts.add_row("FLOPs a token", f"{description['flops_per_token']:,}")
    console.print(facts, highlight=False)
    parts = Table("parameters", "total", "active for a token")
    for column in parts.columns[1:]:
        column.justify = "right"
    for name, count in description["parameters"].items():
        if name == "total":
            parts.add_section()
        parts.add_row(name, f"{count['total']:,}", f"{count['active']:,}")
    console.print(parts)
    receipt = description["receipt"]
    if receipt is None:
        console.print("No receipt: it does not say how it was made.")
        return
    source, arguments = receipt["source"], receipt["arguments"]
    console.print(
        f"receipt: {escape(str(arguments['method']))} of {escape(str(source['name_or_path']))} "
        f"({escape(source['architecture'])}), seed {arguments['seed']}; {describe_difference(receipt['equality'])}",
        highlight=False,
    )
