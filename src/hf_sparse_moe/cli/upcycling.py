"""`plan`, `upcycle`, `verify`: from a dense checkpoint to a mixture."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .app import app
from .options import (
    DenseSourceArgument,
    DtypeOption,
    ExpertsOption,
    JsonOption,
    LayersOption,
    MethodOption,
    OutputArgument,
    ResumeOption,
    RevisionOption,
    SeedOption,
    SettingsOption,
    ShardSizeOption,
    SourceArgument,
    TopKOption,
    describe_difference,
    facts_table,
    show,
    to_settings,
)


@app.command(
    epilog="Examples:\n\n`hf-sparse-moe plan gpt2 --num-experts 16 --gpus 8`\n\n"
    "`hf-sparse-moe plan ./llama --method split --num-experts 64 --num-experts-per-tok 8 --set granularity=8 --json`"
)
def plan(
    source: DenseSourceArgument,
    num_experts: ExpertsOption = 8,
    num_experts_per_tok: TopKOption = 2,
    method: MethodOption = "copy",
    layers: LayersOption = "all",
    settings: SettingsOption = [],  # noqa: B006 (typer copies it)
    dtype: DtypeOption = "auto",
    revision: RevisionOption = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="Also compare how a training can be shared out over so many GPUs.")
    ] = None,
    tokens_per_gpu: Annotated[
        int, typer.Option(min=1, help="Tokens that a GPU sees in an optimizer step, for what it sends.")
    ] = 4096,
    as_json: JsonOption = False,
) -> None:
    """Estimate what a mixture would cost to store, train and serve. Reads the config alone and writes nothing."""
    from hf_sparse_moe.stock import explain_export
    from hf_sparse_moe.upcycling import plan as make_plan

    arguments: dict[str, Any] = {"method": method, "layers": layers, "dtype": dtype, "revision": revision}
    arguments |= {"gpus": gpus, "tokens_per_gpu": tokens_per_gpu, **to_settings(settings)}
    planned = make_plan(source, num_experts, num_experts_per_tok, **arguments)
    report = {**planned.to_dict(), "exports": explain_export(planned.config).possible}
    show(report, as_json, *_describe_plan(report))


def _describe_plan(report: dict[str, Any]) -> Iterator[str | Table]:
    parameters, flops = report["parameters"], report["flops_per_token"]
    ratio = flops["mixture"] / flops["dense"]
    facts = {
        "becomes": report["class"],
        "computes the same": report["exact"],
        "parameters": f"{parameters['dense']:,} dense -> {parameters['total']:,}",
        "active per token": f"{parameters['active']:,}",
        "checkpoint": _gigabytes(report["checkpoint_bytes"]),
        "FLOPs per token": f"{flops['dense']:,} dense -> {flops['mixture']:,} ({ratio:.2f} times)",
        "slowdown of decoding, by weights read": ", ".join(
            f"{factor:.2f} at batch {batch}" for batch, factor in report["decode_slowdown"].items()
        ),
        "can be exported to": ", ".join(report["exports"]) or "no stock architecture",
    }
    facts |= {f"training: {name}": _gigabytes(count) for name, count in report["training_bytes"].items()}
    yield facts_table(facts)
    if report["layouts"]:
        layouts = Table("per GPU", "weights", "gradients", "AdamW states", "sent in a step")
        for layout in report["layouts"]:
            sizes = (_gigabytes(layout[name]) for name in ("weights", "gradients", "states", "moved"))
            layouts.add_row(layout["name"], *sizes)
        yield layouts
    yield report["rule_of_thumb"]


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e7 else f"{count / 1e6:,.2f} MB"


@app.command(
    epilog="Examples:\n\n"
    "`hf-sparse-moe upcycle gpt2 gpt2-8x`\n\n"
    "`hf-sparse-moe upcycle ./my-bert ./my-bert-4x --num-experts 4 --num-experts-per-tok 1 --dtype bfloat16`\n\n"
    "`hf-sparse-moe upcycle ./llama ./llama-64x --method split --num-experts 64 --num-experts-per-tok 8 "
    "--set granularity=8 --layers every_2`\n\n"
    "`hf-sparse-moe upcycle ./llama-64x ./llama-more --layers first_4`\n\n"
    "`hf-sparse-moe upcycle ./base ./mixed --method branches --sources ./law --sources ./code --prompts law.txt "
    "--prompts code.txt`"
)
def upcycle(
    source: DenseSourceArgument,
    output: OutputArgument,
    num_experts: Annotated[
        int | None, typer.Option(help="Number of routed experts in a layer.", show_default="8, or one a source")
    ] = None,
    num_experts_per_tok: TopKOption = 2,
    method: MethodOption = "copy",
    seed: SeedOption = 0,
    layers: LayersOption = "all",
    settings: SettingsOption = [],  # noqa: B006 (typer copies it)
    sources: Annotated[
        list[str],
        typer.Option(help="Folder or Hub id of a branch that becomes an expert. Repeatable."),
    ] = [],  # noqa: B006
    prompts: Annotated[
        list[Path], typer.Option(help="A text file of each branch, in their order: its router row starts from it.")
    ] = [],  # noqa: B006
    data: Annotated[
        Path | None, typer.Option(help="A text file on which a method measures, such as `--set partition=activation`.")
    ] = None,
    evaluation: Annotated[
        Path | None, typer.Option(help="A text file on which the receipt tells the loss of both models.")
    ] = None,
    dtype: DtypeOption = "auto",
    quantize: Annotated[int | None, typer.Option(help="Pack the experts in 8 or 4 bits a weight.")] = None,
    revision: RevisionOption = None,
    max_shard_size: ShardSizeOption = "4GB",
    resume: ResumeOption = False,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read weights from pickles (*.bin), which may run code.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """
    Convert a dense checkpoint into a mixture of experts, or more layers of a mixture.

    Writes weights, config, code, tokenizer, generation config, license and receipt into a new folder that
    `AutoModelFor...from_pretrained` loads. Works tensor by tensor: neither model is ever in memory.
    """
    from hf_sparse_moe.upcycling import upcycle as make_mixture

    measured: dict[str, Any] = {"sources": sources, "prompts": [_batches(each, source, revision) for each in prompts]}
    measured |= {"data": data and _batches(data, source, revision)}
    measured |= {"evaluation": evaluation and _batches(evaluation, source, revision)}
    report = make_mixture(
        source,
        num_experts,
        num_experts_per_tok,
        method,
        seed,
        output=output,
        layers=layers,
        dtype=dtype,
        quantize=quantize,
        revision=revision,
        allow_pickle=allow_pickle,
        max_shard_size=max_shard_size,
        resume=resume,
        show_progress=sys.stderr.isatty(),
        **{name: value for name, value in measured.items() if value},
        **to_settings(settings),
    )
    if made := report.receipt.get("more_layers"):
        told, equality = f"{len(made['layers'])} more sparse layers", made["equality"]
    else:
        counts, equality = report.receipt["parameters"], report.receipt["equality"]
        told = f"parameters {counts['dense']:,} dense -> {counts['total']:,}, {counts['active']:,} active"
    show(report.to_dict(), as_json, f"{output}: {report.architecture}", told, describe_difference(equality))


@app.command(
    epilog="Examples:\n\n`hf-sparse-moe verify ./gpt2-8x --against gpt2`\n\n"
    "The exit code is 1 if the mixture is not what its receipt says."
)
def verify(
    source: SourceArgument,
    against: Annotated[str, typer.Option(help="Folder or Hub id of the checkpoint that it was made from.")],
    text: Annotated[Path | None, typer.Option(help="A text file on which to measure the loss of both models.")] = None,
    revision: RevisionOption = None,
    dense_revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the dense Hub id.")] = None,
    as_json: JsonOption = False,
) -> None:
    """
    Compare a checkpoint with what it was made of and its receipt. Loads both models.

    A mixture with its dense model; what `prune`, `merge`, `expand` or `to-dense` wrote, or `upcycle` of a mixture,
    with the mixture before.
    """
    from hf_sparse_moe.upcycling import verify as measure

    evaluation = None if text is None else _batches(text, source, revision)
    report = measure(source, against, evaluation=evaluation, revision=revision, dense_revision=dense_revision)
    colour = "red" if not report.passed else "green" if report.promised else "yellow"
    show(report.to_dict(), as_json, typer.style(report.verdict, fg=colour), *report.findings)
    if not report.passed:
        raise typer.Exit(1)


def _batches(text: Path, source: str, revision: str | None) -> list[dict[str, Any]]:
    """A text file as batches for the checkpoint's own objective."""
    from hf_sparse_moe.checkpoints.config import read_config
    from hf_sparse_moe.checkpoints.families import sparse_config_class
    from hf_sparse_moe.checkpoints.source import named_architecture
    from hf_sparse_moe.models.configuration_sparse_moe import SparseMoeConfig
    from hf_sparse_moe.quickstart.examples import load_tokenizer, make_examples

    content, config = text.read_text(encoding="utf-8"), read_config(source, revision)
    is_mixture = isinstance(config, SparseMoeConfig)
    family = type(config) if is_mixture else sparse_config_class(config, named_architecture(config))
    examples = make_examples([content], load_tokenizer(source, revision), family, length=128, limit=64)
    return [{name: tensor.unsqueeze(0) for name, tensor in example.items()} for example in examples]
