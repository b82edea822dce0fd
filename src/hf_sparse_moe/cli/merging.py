"""`merge`, `to-dense`: fewer experts, or none."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from .app import app
from .options import JsonOption, OutputArgument, ResumeOption, RevisionOption, ShardSizeOption, SourceArgument, show
from .surgery import (
    GroupByOption,
    LossDataOption,
    MaxLengthOption,
    MaxTextsOption,
    describe_losses,
    read_evaluation,
)


@app.command(epilog="Example:\n\n`hf-sparse-moe merge ./qwen3-8x ./qwen3-6x --measured measured.safetensors --into 6`")
def merge(
    source: SourceArgument,
    output: OutputArgument,
    measured: Annotated[Path, typer.Option(help="What `hf-sparse-moe measure` wrote.")],
    into: Annotated[str, typer.Option(help="How many experts of a layer there will be, or a share such as 0.75.")],
    method: Annotated[str, typer.Option(help="`hc`, `m-smoe` or `ream`.")] = "hc",
    align: Annotated[bool, typer.Option(help="Match the hidden units of the experts first.")] = True,
    data: LossDataOption = [],  # noqa: B006
    group_by: GroupByOption = None,
    max_texts: MaxTextsOption = 200,
    max_length: MaxLengthOption = 256,
    revision: RevisionOption = None,
    max_shard_size: ShardSizeOption = "4GB",
    resume: ResumeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Merge the experts of a mixture into fewer, by what was measured of them."""
    from hf_sparse_moe.checkpoints.folder import check_target
    from hf_sparse_moe.surgery import merge_experts

    check_target(output)
    try:
        count: int | float = float(into) if "." in into else int(into)
    except ValueError:
        raise ValueError(f"`--into {into}` is not allowed: it must be a number of experts or a share.") from None
    report = merge_experts(
        source,
        measured,
        count,
        method,
        align,
        output,
        evaluation=read_evaluation(source, revision, data, group_by, max_texts, max_length),
        revision=revision,
        max_shard_size=max_shard_size,
        resume=resume,
        show_progress=sys.stderr.isatty(),
    )
    merged = report.receipt["merged"]
    told = f"{report.path}: {merged['parameters']['after']:,} parameters"
    show(report.to_dict(), as_json, told, *describe_losses(merged["loss"]))


@app.command("to-dense", epilog="Example:\n\n`hf-sparse-moe to-dense ./qwen3-8x ./qwen3-dense`")
def to_dense(
    source: SourceArgument,
    output: OutputArgument,
    measured: Annotated[Path | None, typer.Option(help="What `hf-sparse-moe measure` wrote.")] = None,
    method: Annotated[str, typer.Option(help="`mean`, `best` or `merge`.")] = "mean",
    data: LossDataOption = [],  # noqa: B006
    group_by: GroupByOption = None,
    max_texts: MaxTextsOption = 200,
    max_length: MaxLengthOption = 256,
    revision: RevisionOption = None,
    max_shard_size: ShardSizeOption = "4GB",
    resume: ResumeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make one feed-forward of the experts of each layer: a dense model for plain transformers."""
    from hf_sparse_moe.checkpoints.folder import check_target
    from hf_sparse_moe.surgery import to_dense as write_dense

    check_target(output)
    report = write_dense(
        source,
        measured,
        method,
        output,
        evaluation=read_evaluation(source, revision, data, group_by, max_texts, max_length),
        revision=revision,
        max_shard_size=max_shard_size,
        resume=resume,
        show_progress=sys.stderr.isatty(),
    )
    told = f"{report.path}: {report.architecture}"
    show(report.to_dict(), as_json, told, *describe_losses(report.receipt["to_dense"]["loss"]))
