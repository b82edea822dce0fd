"""`info`, `consolidate`: what a checkpoint holds, and a whole one from the shards of a training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .app import app
from .options import (
    DtypeOption,
    JsonOption,
    OutputArgument,
    RevisionOption,
    ShardSizeOption,
    SourceArgument,
    describe_difference,
    facts_table,
    show,
)


@app.command(epilog="Examples:\n\n`hf-sparse-moe info ./gpt2-8x`\n\n`hf-sparse-moe info user/gpt2-8x --json`")
def info(source: SourceArgument, revision: RevisionOption = None, as_json: JsonOption = False) -> None:
    """Show the experts, parameters and receipt of a mixture, or what a surgery made of one. Reads no weights."""
    from hf_sparse_moe.checkpoints.config import read_config
    from hf_sparse_moe.checkpoints.source import named_architecture
    from hf_sparse_moe.insight.anatomy import describe_checkpoint, read_receipt
    from hf_sparse_moe.models.configuration_sparse_moe import SparseMoeConfig
    from hf_sparse_moe.surgery.receipts import describe_operation

    config = read_config(source, revision)
    receipt = None if isinstance(config, SparseMoeConfig) else read_receipt(source, revision)
    if told := describe_operation(receipt or {}):
        architecture = named_architecture(config)
        show({"class": architecture, "receipt": receipt}, as_json, facts_table({"class": architecture, **told}))
        return
    description = describe_checkpoint(source, revision)
    names = ("family", "class", "dense_architecture", "num_experts", "num_experts_per_tok", "sparse_layers")
    facts = {name.replace("_", " "): description.to_dict()[name] for name in names}
    facts |= {"FLOPs per token": f"{description.flops_per_token:,}", "bytes": f"{description.stored_bytes:,}"}
    parts = Table("parameters", "total", "active per token")
    for column in parts.columns[1:]:
        column.justify = "right"
    for name, count in description.parameters.items():
        if name == "total":
            parts.add_section()
        parts.add_row(name, f"{count['total']:,}", f"{count['active']:,}")
    show(description.to_dict(), as_json, facts_table(facts), parts, _describe_receipt(description.receipt))


def _describe_receipt(receipt: dict[str, Any] | None) -> str:
    if receipt is None:
        return "No receipt: the checkpoint does not say how it was made."
    from hf_sparse_moe.surgery.receipts import describe_operation
    from hf_sparse_moe.upcycling.surgery_checks import last_surgery

    if facts := describe_operation(receipt):
        rest = {name: value for name, value in receipt.items() if name != last_surgery(receipt)}
        told = ", ".join(f"{name} {value}" for name, value in facts.items())
        return "; ".join([told, *([_describe_receipt(rest)] if rest else [])])
    try:
        source, arguments = receipt["source"], receipt["arguments"]
        return (
            f"receipt: {arguments['method']} of {source['name_or_path']} ({source['architecture']}), seed "
            f"{arguments['seed']}; {describe_difference(receipt['equality'])}"
        )
    except (LookupError, TypeError, ValueError):
        return "The receipt is not one that this package writes; `--json` shows it."


@app.command(epilog="Example:\n\n`hf-sparse-moe consolidate ./run/checkpoint-1000 ./mixture`")
def consolidate(
    source: Annotated[Path, typer.Argument(help="A folder `checkpoint-...` of a training.")],
    output: OutputArgument,
    config: Annotated[
        Path | None,
        typer.Option(help="Folder with the model's config and tokenizer, if the checkpoint has none beside it."),
    ] = None,
    dtype: DtypeOption = "auto",
    max_shard_size: ShardSizeOption = "4GB",
    as_json: JsonOption = False,
) -> None:
    """
    Convert a sharded training checkpoint (FSDP, DeepSpeed ZeRO, expert parallelism) into a normal one.

    Holds one tensor at a time in memory and runs no code from pickles. DeepSpeed checkpoints need DeepSpeed.
    """
    from hf_sparse_moe.distributed.consolidation import consolidate as write_normal_checkpoint

    done = write_normal_checkpoint(source, output, config, dtype, max_shard_size)
    told = f"{done.path}: {done.tensors} tensors, {done.parameters:,} parameters, from {done.engine}"
    show(done.to_dict(), as_json, told)
