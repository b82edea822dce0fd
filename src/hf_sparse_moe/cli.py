"""`hf-sparse-moe`: one thin command a capability."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import hf_sparse_moe


BAD_INPUT = 2

app = typer.Typer(
    name="hf-sparse-moe",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Turn any dense Transformers checkpoint into a sparse mixture of experts, and look at the result.",
    epilog="Exit codes: 0 done; 2 bad input, with one sentence on stderr that says what to do.",
)

ExpertsOption = Annotated[int, typer.Option(help="Routed experts of a layer.")]
TopKOption = Annotated[int, typer.Option(help="Experts that serve one token.")]
SeedOption = Annotated[int, typer.Option(help="Of everything that is drawn at random.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object, for programs.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hf-sparse-moe {hf_sparse_moe.__version__}")
        raise typer.Exit


@app.callback()
def options(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


@app.command(
    epilog="Examples:\n\n"
    "`hf-sparse-moe upcycle gpt2 gpt2-8x`\n\n"
    "`hf-sparse-moe upcycle ./my-bert ./my-bert-4x --num-experts 4 --num-experts-per-tok 1 --dtype bfloat16`"
)
def upcycle(
    src: Annotated[str, typer.Argument(help="Folder or Hub id of a dense checkpoint.")],
    dst: Annotated[Path, typer.Argument(help="The folder to make; it appears when it is complete.")],
    num_experts: ExpertsOption = 8,
    num_experts_per_tok: TopKOption = 2,
    method: Annotated[str, typer.Option(help="How the experts start; `copy` keeps the function.")] = "copy",
    seed: SeedOption = 0,
    dtype: Annotated[str, typer.Option(help="Of the result, such as `bfloat16`; `auto` keeps the source's.")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read weights in a pickle (*.bin), which may run code.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """
    Make a mixture of experts of a dense checkpoint.

    Weights, config, remote code, tokenizer, generation config, licence and receipt go into a new folder that
    `AutoModelFor...from_pretrained` loads.
    """
    from hf_sparse_moe.upcycling import upcycle as make_mixture
    from hf_sparse_moe.upcycling.output import check_target, write_checkpoint
    from hf_sparse_moe.upcycling.source import find_source

    check_target(dst)
    source = find_source(src, revision, allow_pickle)
    model = make_mixture(
        src,
        num_experts,
        num_experts_per_tok,
        method,
        seed,
        revision=revision,
        dtype=_dtype(dtype),
        allow_pickle=allow_pickle,
    )
    write_checkpoint(model, dst, source.folder)
    if as_json:
        _print_json({"path": str(dst), "class": type(model).__name__, "receipt": model.receipt})
        return
    receipt: Any = model.receipt
    parameters, equality = receipt["parameters"], receipt["equality"]
    console = Console()
    console.print(f"[bold]{escape(str(dst))}[/]: {type(model).__name__}", highlight=False)
    console.print(
        f"parameters {parameters['dense']:,} dense -> {parameters['total']:,}, {parameters['active']:,} active\n"
        f"largest difference to the dense outputs {equality['max_abs_difference']:.1e} on {equality['probe_tokens']} "
        f"tokens in {equality['dtype']}, where they reach {equality['max_abs_output']:.1f}",
        highlight=False,
    )


@app.command(epilog="Examples:\n\n`hf-sparse-moe info ./gpt2-8x`\n\n`hf-sparse-moe info user/gpt2-8x --json`")
def info(
    checkpoint: Annotated[str, typer.Argument(help="Folder or Hub id of a mixture.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a mixture is made of. Reads its config and receipt, not its weights."""
    from hf_sparse_moe.analysis.anatomy import describe_checkpoint

    description = describe_checkpoint(checkpoint, revision)
    if as_json:
        _print_json(description)
    else:
        _print_description(description)


@app.command(epilog="Example:\n\n`hf-sparse-moe export ./qwen3-8x ./qwen3-8x-stock`")
def export(
    src: Annotated[str, typer.Argument(help="Folder or Hub id of a mixture.")],
    dst: Annotated[Path, typer.Argument(help="The folder to make; it appears when it is complete.")],
    target: Annotated[str, typer.Option(help="The `model_type` to write; `auto` takes the first that fits.")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")] = None,
) -> None:
    """Write a mixture as a stock architecture (Mixtral, Qwen3-MoE, ...), which servers load without this package."""
    from hf_sparse_moe.export import export as write_stock

    typer.echo(write_stock(src, dst, target, revision=revision))


@app.command("import-native", epilog="Example:\n\n`hf-sparse-moe import-native allenai/OLMoE-1B-7B-0924 ./olmoe`")
def import_native(
    src: Annotated[str, typer.Argument(help="Folder or Hub id of a stock mixture.")],
    dst: Annotated[Path, typer.Argument(help="The folder to make; it appears when it is complete.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")] = None,
) -> None:
    """Read a stock mixture (Mixtral, Qwen3-MoE, ...) into this package's classes."""
    from hf_sparse_moe.export import import_native as read_stock
    from hf_sparse_moe.upcycling.output import check_target, write_checkpoint
    from hf_sparse_moe.upcycling.source import find_source

    check_target(dst)
    write_checkpoint(read_stock(src, revision=revision), dst, find_source(src, revision).folder)
    typer.echo(dst)


@app.command(
    epilog="Examples:\n\n`hf-sparse-moe quickstart`\n\n"
    "`hf-sparse-moe quickstart --model ./my-llama --data ./my-texts --steps 100 --learning-rate 5e-5`\n\n"
    "`hf-sparse-moe quickstart --push-to user/first-mixture`"
)
def quickstart(
    model: Annotated[
        str | None,
        typer.Option(help="Folder or Hub id of a dense language model; without one, a small one is trained."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Folder of .jsonl(.gz) and .txt(.gz) files, a domain each (or a column `domain`), or a Hub data set "
            "with a column `text`; without one, text of this Python installation."
        ),
    ] = None,
    output: Annotated[
        str | None, typer.Option(help="The folder to make.", show_default="quickstart, quickstart-2, ...")
    ] = None,
    push_to: Annotated[
        str | None, typer.Option(help="`user/name` to publish to; `HF_ENDPOINT` names the Hub.")
    ] = None,
    num_experts: ExpertsOption = 8,
    num_experts_per_tok: TopKOption = 2,
    dense_steps: Annotated[int, typer.Option(min=1, help="Training steps of the small dense model.")] = 300,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of the mixture, and of its dense twin.")] = 160,
    adapter_steps: Annotated[int, typer.Option(min=1, help="Training steps of the adapter.")] = 40,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences of a step.")] = 16,
    sequence_length: Annotated[int, typer.Option(min=8, help="Tokens of a sequence.")] = 128,
    learning_rate: Annotated[float, typer.Option(help="Of mixture and twin; the adapter's is twice that.")] = 1e-3,
    seed: SeedOption = 0,
) -> None:
    """
    The whole story in minutes: dense model, mixture, training beside its dense twin, comparison by domain, adapter,
    sharing, reloading, a picture of which expert served which domain.
    """
    arguments = dict(locals())
    from transformers.utils import logging

    from hf_sparse_moe.quickstart import QuickstartOptions, run_quickstart

    logging.disable_progress_bar()
    run_quickstart(QuickstartOptions(**arguments))


def main() -> None:
    """The entry point: bad input ends with one sentence and exit code 2."""
    signal.signal(signal.SIGTERM, _leave)
    try:
        _quiet_libraries()
        app()
    except (ValueError, OSError, ImportError) as error:
        if isinstance(error, ImportError) and error.name is not None:
            raise  # a fault of an installation; an extra that is missing is told by us, and has no `name`
        typer.echo(f"Error: {' '.join(str(error).split())}", err=True)
        sys.exit(BAD_INPUT)


def _leave(number: int, _: Any) -> None:
    """Leave through every `finally`, so that no half-written folder stays."""
    sys.exit(128 + number)


def _quiet_libraries() -> None:
    """Progress bars are for people; warnings of the libraries underneath would bury our one sentence."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def _dtype(name: str) -> Any:
    import torch

    if name == "auto":
        return name
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"`--dtype {name}` is not allowed: it must be auto, float32, bfloat16 or float16.")
    return dtype


def _print_json(value: dict[str, Any]) -> None:
    typer.echo(json.dumps(value, indent=2))


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
    source, equality = receipt["source"], receipt["equality"]
    console.print(
        f"receipt: {escape(str(receipt['arguments']['method']))} of {escape(str(source['name_or_path']))} "
        f"({escape(source['architecture'])}), seed {receipt['arguments']['seed']}; the outputs then differed by at "
        f"most {equality['max_abs_difference']:.1e}",
        highlight=False,
    )


if __name__ == "__main__":
    main()
