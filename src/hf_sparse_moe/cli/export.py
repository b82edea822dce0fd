"""`export`, `import-native`: to stock architectures and back."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from .app import app
from .options import ResumeOption, RevisionOption


@app.command(epilog="Example:\n\n`hf-sparse-moe export ./qwen3-8x ./qwen3-8x-stock`")
def export(
    src: Annotated[str, typer.Argument(help="Folder or Hub id of a mixture.")],
    dst: Annotated[Path, typer.Argument(help="The folder to make; it appears when it is complete.")],
    target: Annotated[str, typer.Option(help="The `model_type` to write; `auto` takes the first that fits.")] = "auto",
    revision: RevisionOption = None,
    resume: ResumeOption = False,
) -> None:
    """Write a mixture as a stock architecture (Mixtral, Qwen3-MoE, ...), which servers load without this package."""
    from hf_sparse_moe.stock import export as write_stock

    shown = sys.stderr.isatty()
    typer.echo(write_stock(src, dst, target, revision=revision, resume=resume, show_progress=shown))


@app.command("import-native", epilog="Example:\n\n`hf-sparse-moe import-native allenai/OLMoE-1B-7B-0924 ./olmoe`")
def import_native(
    src: Annotated[str, typer.Argument(help="Folder or Hub id of a stock mixture.")],
    dst: Annotated[Path, typer.Argument(help="The folder to make; it appears when it is complete.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")] = None,
) -> None:
    """Read a stock mixture (Mixtral, Qwen3-MoE, ...) into this package's classes."""
    from hf_sparse_moe.checkpoints.folder import check_target, write_checkpoint
    from hf_sparse_moe.checkpoints.source import find_source
    from hf_sparse_moe.stock import import_native as read_stock

    check_target(dst)
    write_checkpoint(read_stock(src, revision=revision), dst, find_source(src, revision).folder)
    typer.echo(dst)
