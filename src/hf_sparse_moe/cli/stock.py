"""`export`, `import-stock`: to and from the mixtures that transformers brings."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from .app import command
from .options import OutputArgument, ResumeOption, RevisionOption, SourceArgument


@command(epilog="Example:\n\n`hf-sparse-moe export ./qwen3-8x ./qwen3-8x-stock`")
def export(
    source: SourceArgument,
    output: OutputArgument,
    architecture: Annotated[
        str,
        typer.Option("--architecture", "--target", help="The `model_type` to write; `auto` is the first that fits."),
    ] = "auto",
    revision: RevisionOption = None,
    resume: ResumeOption = False,
) -> None:
    """Write a mixture as a stock architecture (Mixtral, Qwen3-MoE, ...) that servers load without this package."""
    from hf_sparse_moe.stock import export as write_stock

    shown = sys.stderr.isatty()
    typer.echo(write_stock(source, output, architecture, revision=revision, resume=resume, show_progress=shown))


@command("import-native", hidden=True, deprecated=True)  # its name in version 0.1
@command("import-stock", epilog="Example:\n\n`hf-sparse-moe import-stock allenai/OLMoE-1B-7B-0924 ./olmoe`")
def import_stock(
    source: Annotated[str, typer.Argument(help="Folder or Hub id of a stock mixture.")],
    output: OutputArgument,
    revision: RevisionOption = None,
) -> None:
    """Convert a stock mixture (Mixtral, Qwen3-MoE, ...) into a checkpoint of this package."""
    from hf_sparse_moe.checkpoints.folder import check_target, write_checkpoint
    from hf_sparse_moe.checkpoints.source import find_source
    from hf_sparse_moe.stock import import_native as read_stock

    check_target(output)
    write_checkpoint(read_stock(source, revision=revision), output, find_source(source, revision).folder)
    typer.echo(output)
