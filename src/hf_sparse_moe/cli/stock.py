"""`export`, `import-stock`: to and from the mixtures that transformers brings."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .app import app
from .options import (
    BaseOption,
    JsonOption,
    OutputArgument,
    ResumeOption,
    RevisionOption,
    ShardSizeOption,
    SourceArgument,
    show,
)


@app.command(
    epilog="Examples:\n\n`hf-sparse-moe export ./qwen3-8x ./qwen3-8x-stock`\n\n"
    "`hf-sparse-moe export ./law-adapter ./law-adapter-vllm --for vllm`"
)
def export(
    source: Annotated[str, typer.Argument(help="Folder or Hub id of a mixture, or the folder of an adapter of one.")],
    output: OutputArgument,
    architecture: Annotated[
        str,
        typer.Option("--architecture", "--target", help="The `model_type` to write; `auto` is the first that fits."),
    ] = "auto",
    reader: Annotated[
        str,
        typer.Option(
            "--for", help="What reads it: `stock` (transformers, PEFT), `vllm`, `sglang`, `llama.cpp`, `tgi`."
        ),
    ] = "stock",
    base: BaseOption = None,
    revision: RevisionOption = None,
    max_shard_size: ShardSizeOption = "4GB",
    resume: ResumeOption = False,
    as_json: JsonOption = False,
) -> None:
    """
    Write a mixture as a stock architecture (Mixtral, Qwen3-MoE, ...) that servers load without this package, or an
    adapter of a mixture for what is written of that.
    """
    if Path(source, "adapter_config.json").is_file():
        from hf_sparse_moe.hub import export_adapter

        report = export_adapter(source, output, reader, architecture=architecture, base=base)  # type: ignore[arg-type]
    else:
        from hf_sparse_moe.stock import export as write_stock

        report = write_stock(
            source,
            output,
            architecture,
            revision=revision,
            max_shard_size=max_shard_size,
            resume=resume,
            show_progress=sys.stderr.isatty(),
            server=None if reader == "stock" else reader,
        )
    show(report.to_dict(), as_json, f"{report.path}: {report.architecture}")


@app.command("import-native", hidden=True, deprecated=True)  # its name in version 0.1
@app.command("import-stock", epilog="Example:\n\n`hf-sparse-moe import-stock allenai/OLMoE-1B-7B-0924 ./olmoe`")
def import_stock(
    source: Annotated[
        str, typer.Argument(help="Folder or Hub id of a stock mixture, or the folder of an adapter of one.")
    ],
    output: OutputArgument,
    base: BaseOption = None,
    revision: RevisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """
    Convert a stock mixture (Mixtral, Qwen3-MoE, ...) into a checkpoint of this package, or an adapter of one into an
    adapter of the mixture that `--base` names.
    """
    if Path(source, "adapter_config.json").is_file():
        from hf_sparse_moe.hub import import_adapter

        if base is None:
            raise ValueError(
                "An adapter needs the mixture that it is to fit. Give it: `--base`, a folder or a Hub id."
            )
        report: Any = import_adapter(source, base, output)
    else:
        from hf_sparse_moe.stock import import_stock as read_stock

        report = read_stock(source, output, revision=revision)
    show(report.to_dict(), as_json, f"{report.path}: {report.architecture}")


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Example:\n\n`hf-sparse-moe serve ./gemma-8x --device cpu --port 8000`",
)
def serve(context: typer.Context, source: SourceArgument) -> None:
    """
    Run `transformers serve`, which looks for a model's class in transformers alone, so that it finds a mixture's too.
    Takes all its options.
    """
    from transformers.cli.transformers import app as transformers_app

    from hf_sparse_moe.stock.servers import add_classes_to_transformers

    add_classes_to_transformers()
    transformers_app(["serve", source, *context.args], prog_name="transformers")
