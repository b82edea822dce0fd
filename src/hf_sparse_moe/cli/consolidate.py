"""`consolidate`: what a training's ranks saved apart, as one normal checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import app
from .options import DtypeOption, JsonOption, print_json


@app.command(epilog="Example:\n\n`hf-sparse-moe consolidate ./run/checkpoint-1000 ./mixture`")
def consolidate(
    checkpoint: Annotated[Path, typer.Argument(help="The folder `checkpoint-...` of a training.")],
    output: Annotated[Path, typer.Argument(help="The folder to make; it appears when it is complete.")],
    config: Annotated[
        Path | None,
        typer.Option(help="Folder with the model's config and tokenizer, where the checkpoint has none beside it."),
    ] = None,
    dtype: DtypeOption = "auto",
    max_shard_size: Annotated[str, typer.Option(help="Of a file of weights.")] = "4GB",
    as_json: JsonOption = False,
) -> None:
    """
    Turn the checkpoint of any engine (FSDP, DeepSpeed ZeRO, expert parallelism) into a normal one.

    Memory holds one tensor at a time; no pickle runs code. Checkpoints of DeepSpeed need DeepSpeed.
    """
    from hf_sparse_moe.distributed.consolidation import consolidate as write_normal_checkpoint

    done = write_normal_checkpoint(checkpoint, output, config, dtype, max_shard_size)
    if as_json:
        print_json({"path": str(output), **done.to_dict()})
    else:
        typer.echo(f"{output}: {done.tensors} tensors, {done.parameters:,} parameters, from {done.engine}")
