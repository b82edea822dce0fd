"""`export`, `import-stock`: to and from the mixtures that transformers brings."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from .app import app
from .options import (
    JsonOption,
    OutputArgument,
    ResumeOption,
    RevisionOption,
    ShardSizeOption,
    SourceArgument,
    show,
)


@app.command(epilog="Example:\n\n`hf-sparse-moe export ./qwen3-8x ./qwen3-8x-stock`")
def export(
    source: SourceArgument,
    output: OutputArgument,
    architecture: Annotated[
        str,
        typer.Option("--architecture", "--target", help="The `model_type` to write; `auto` is the first that fits."),
    ] = "auto",
    revision: RevisionOption = None,
    max_shard_size: ShardSizeOption = "4GB",
    resume: ResumeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a mixture as a stock architecture (Mixtral, Qwen3-MoE, ...) that servers load without this package."""
    from hf_sparse_moe.stock import export as write_stock

    report = write_stock(
        source,
        output,
        architecture,
        revision=revision,
        max_shard_size=max_shard_size,
        resume=resume,
        show_progress=sys.stderr.isatty(),
    )
    show(report.to_dict(), as_json, f"{report.path}: {report.architecture}")


@app.command("import-native", hidden=True, deprecated=True)  # its name in version 0.1
@app.command("import-stock", epilog="Example:\n\n`hf-sparse-moe import-stock allenai/OLMoE-1B-7B-0924 ./olmoe`")
def import_stock(
    source: Annotated[str, typer.Argument(help="Folder or Hub id of a stock mixture.")],
    output: OutputArgument,
    revision: RevisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Convert a stock mixture (Mixtral, Qwen3-MoE, ...) into a checkpoint of this package."""
    from hf_sparse_moe.stock import import_stock as read_stock

    report = read_stock(source, output, revision=revision)
    show(report.to_dict(), as_json, f"{report.path}: {report.architecture}")
