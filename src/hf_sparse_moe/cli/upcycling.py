"""`upcycle`, `verify`: a mixture of a dense checkpoint."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from .app import app
from .options import (
    DtypeOption,
    ExpertsOption,
    JsonOption,
    LayersOption,
    MethodOption,
    ResumeOption,
    RevisionOption,
    SeedOption,
    SettingsOption,
    TopKOption,
    describe_difference,
    print_json,
    to_dtype,
    to_settings,
)


@app.command(
    epilog="Examples:\n\n"
    "`hf-sparse-moe upcycle gpt2 gpt2-8x`\n\n"
    "`hf-sparse-moe upcycle ./my-bert ./my-bert-4x --num-experts 4 --num-experts-per-tok 1 --dtype bfloat16`\n\n"
    "`hf-sparse-moe upcycle ./llama ./llama-64x --method split --num-experts 64 --num-experts-per-tok 8 "
    "--set granularity=8 --layers every_2`"
)
def upcycle(
    src: Annotated[str, typer.Argument(help="Folder or Hub id of a dense checkpoint.")],
    dst: Annotated[Path, typer.Argument(help="The folder to make; it appears when it is complete.")],
    num_experts: ExpertsOption = 8,
    num_experts_per_tok: TopKOption = 2,
    method: MethodOption = "copy",
    seed: SeedOption = 0,
    layers: LayersOption = "all",
    settings: SettingsOption = [],  # noqa: B006 (typer copies it)
    dtype: DtypeOption = "auto",
    revision: RevisionOption = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file of weights.")] = "4GB",
    resume: ResumeOption = False,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read weights in a pickle (*.bin), which may run code.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """
    Make a mixture of experts of a dense checkpoint.

    Weights, config, remote code, tokenizer, generation config, licence and receipt go into a new folder that
    `AutoModelFor...from_pretrained` loads. It is written tensor by tensor: neither model is ever in memory.
    """
    from hf_sparse_moe.upcycling import stream_upcycle

    receipt = stream_upcycle(
        src,
        dst,
        num_experts,
        num_experts_per_tok,
        method,
        seed,
        layers=layers,
        dtype=to_dtype(dtype),
        revision=revision,
        allow_pickle=allow_pickle,
        max_shard_size=max_shard_size,
        resume=resume,
        show_progress=sys.stderr.isatty(),
        **to_settings(settings),
    )
    architecture = json.loads((dst / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    if as_json:
        print_json({"path": str(dst), "class": architecture, "receipt": receipt})
        return
    parameters = receipt["parameters"]
    console = Console()
    console.print(f"[bold]{escape(str(dst))}[/]: {architecture}", highlight=False)
    console.print(
        f"parameters {parameters['dense']:,} dense -> {parameters['total']:,}, {parameters['active']:,} active\n"
        f"{describe_difference(receipt['equality'])}",
        highlight=False,
    )


@app.command(
    epilog="Examples:\n\n`hf-sparse-moe verify ./gpt2-8x --against gpt2`\n\n"
    "Exit code 1 where the mixture is not what its receipt says."
)
def verify(
    checkpoint: Annotated[str, typer.Argument(help="Folder or Hub id of a mixture.")],
    against: Annotated[str, typer.Option(help="Folder or Hub id of the dense checkpoint that it was made of.")],
    text: Annotated[Path | None, typer.Option(help="A text file, to measure the task loss of both models on.")] = None,
    revision: RevisionOption = None,
    dense_revision: Annotated[str | None, typer.Option(help="The same of the dense checkpoint.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a mixture against its dense checkpoint, and compare with its receipt. Loads both."""
    from hf_sparse_moe.upcycling import verify as measure

    evaluation = None if text is None else _batches(text, checkpoint, revision)
    report = measure(checkpoint, against, evaluation=evaluation, revision=revision, dense_revision=dense_revision)
    if as_json:
        print_json(report)
    else:
        verdict = "[green]verified[/]" if report["passed"] else "[red]not verified[/]"
        Console().print("\n".join([verdict, *map(escape, report["findings"])]), highlight=False)
    if not report["passed"]:
        raise typer.Exit(1)


def _batches(text: Path, checkpoint: str, revision: str | None) -> list[dict[str, Any]]:
    """A text file as batches of the checkpoint's own objective: next, masked or following tokens."""
    from transformers import AutoConfig, AutoTokenizer

    from hf_sparse_moe.quickstart.examples import make_examples

    tokenizer = AutoTokenizer.from_pretrained(checkpoint, revision=revision)
    config = AutoConfig.from_pretrained(checkpoint, revision=revision)
    examples = make_examples([text.read_text(encoding="utf-8")], tokenizer, type(config), length=128, limit=64)
    return [{name: tensor.unsqueeze(0) for name, tensor in example.items()} for example in examples]
