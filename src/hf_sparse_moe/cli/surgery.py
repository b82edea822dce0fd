"""`measure`, `prune`: mixtures with other experts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .app import app
from .look import read_texts
from .options import (
    JsonOption,
    OutputArgument,
    ResumeOption,
    RevisionOption,
    SeedOption,
    ShardSizeOption,
    SourceArgument,
    show,
)


_TEXT = "A .jsonl file with a column `text`, or a .txt file of paragraphs, also as .gz; each is a group. Repeatable."
MaxTextsOption = Annotated[int, typer.Option(min=1, help="Texts to read, as many of each group.")]
MaxLengthOption = Annotated[int, typer.Option(min=1, help="Tokens of a text.")]
_LOSSES = "Text for the losses in the receipt, for which both models are loaded."
LossDataOption = Annotated[list[Path], typer.Option("--data", help=f"{_LOSSES} {_TEXT}")]
GroupByOption = Annotated[
    str | None, typer.Option(help="Column with the group (domain, language) of each text.", show_default="the file")
]


@app.command(
    epilog="Examples:\n\n`hf-sparse-moe measure ./gpt2-8x --data law.txt --data code.jsonl -o measured.safetensors`"
)
def measure(
    source: SourceArgument,
    data: Annotated[list[Path], typer.Option(help=_TEXT)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")] = Path("measured.safetensors"),
    group_by: GroupByOption = None,
    max_texts: MaxTextsOption = 200,
    max_length: MaxLengthOption = 256,
    revision: RevisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """
    Measure what each expert of a mixture does on some text: frequency, EAN, REAP, outputs and their similarity.

    Loads the model. The file is what `prune` chooses by.
    """
    from hf_sparse_moe.checkpoints.loading import load_whole
    from hf_sparse_moe.checkpoints.source import find_source
    from hf_sparse_moe.surgery import measure_experts

    if output.exists():
        raise FileExistsError(f"`{output}` exists already. Choose another name, or remove it.")
    found = find_source(source, revision)
    batches, groups = _read(found.folder, data, group_by, max_texts, max_length)
    measured = measure_experts(load_whole(found.folder), batches, groups)
    measured.save(output)
    show(measured.to_dict(), as_json, *_describe(measured), f"{output}: what {len(batches)} texts tell of the experts")


def _describe(measured: Any) -> list[Table]:
    table = Table("layer", "lowest REAP", "highest", "tokens of the rarest expert")
    for layer in measured.layers:
        reap = layer.reap if "norms" in layer.tensors else layer.frequency
        table.add_row(layer.name, f"{reap.min():.3g}", f"{reap.max():.3g}", f"{int(layer.tokens.min()):,}")
    return [table]


@app.command(
    epilog="Examples:\n\n`hf-sparse-moe prune ./gpt2-8x ./gpt2-6x --measured measured.safetensors --keep 0.75`\n\n"
    "`hf-sparse-moe prune ./gpt2-8x ./gpt2-7x --drop 0:3 --drop 1:5 --data law.txt`"
)
def prune(
    source: SourceArgument,
    output: OutputArgument,
    measured: Annotated[Path | None, typer.Option(help="The file that `measure` wrote.")] = None,
    keep: Annotated[
        list[str],
        typer.Option(help="How many experts of a layer stay, or which share; LAYER:NUMBER for some. Repeatable."),
    ] = [],  # noqa: B006 (typer copies it)
    drop: Annotated[
        list[str], typer.Option(help="LAYER:EXPERT,EXPERT...: the experts of a layer that go. Repeatable.")
    ] = [],  # noqa: B006
    method: Annotated[
        str, typer.Option(help="Which experts stay: `reap`, `ean`, `frequency`, `naee` or `random`.")
    ] = "reap",
    data: LossDataOption = [],  # noqa: B006
    group_by: GroupByOption = None,
    max_texts: MaxTextsOption = 200,
    max_length: MaxLengthOption = 256,
    seed: SeedOption = 0,
    revision: RevisionOption = None,
    max_shard_size: ShardSizeOption = "4GB",
    resume: ResumeOption = False,
    as_json: JsonOption = False,
) -> None:
    """
    Make a mixture with fewer experts, of this package or of transformers.

    Works tensor by tensor: neither model is in memory, but for `--data`. The result computes what the mixture computes
    with those experts disabled.
    """
    from hf_sparse_moe.checkpoints.folder import check_target
    from hf_sparse_moe.surgery import prune_experts

    check_target(output)
    evaluation = read_evaluation(source, revision, data, group_by, max_texts, max_length)
    report = prune_experts(
        source,
        measured,
        _numbers(keep),
        {int(layer): ids for layer, ids in _by_layer("drop", drop).items()} or None,
        method,
        output,
        seed,
        evaluation=evaluation,
        revision=revision,
        max_shard_size=max_shard_size,
        resume=resume,
        show_progress=sys.stderr.isatty(),
    )
    pruned = report.receipt["pruned"]
    counts, sizes = pruned["parameters"], pruned["bytes"]
    told = [
        f"{output}: {report.architecture}, {_kept(pruned['kept'])}",
        f"parameters {counts['before']:,} -> {counts['after']:,}, {sizes['before'] / 1e6:,.1f} MB -> "
        f"{sizes['after'] / 1e6:,.1f} MB",
    ]
    told += describe_losses(pruned["loss"])
    show(report.to_dict(), as_json, *told)


def describe_losses(losses: dict[str, dict[str, float]] | None) -> list[str]:
    """Those of a receipt, a line for each group."""
    return [
        f"loss on {group}: {loss['before']:.4f} -> {loss['after']:.4f} ({loss['labels']:,} labels)"
        for group, loss in (losses or {}).items()
    ]


def _kept(kept: dict[str, list[int]]) -> str:
    counts = sorted({len(ids) for ids in kept.values()})
    return f"{' or '.join(map(str, counts))} experts in {len(kept)} layers" if kept else "all experts"


def _numbers(given: list[str]) -> Any:
    """`--keep`: one number for all layers, or one each for some."""
    if not given:
        return None
    if len(given) == 1 and ":" not in given[0]:
        return _number("keep", given[0])
    return {layer: values[0] for layer, values in _by_layer("keep", given).items()}


def _by_layer(option: str, given: list[str]) -> dict[int, list[Any]]:
    chosen: dict[int, list[Any]] = {}
    for each in given:
        layer, colon, values = each.partition(":")
        if not colon or not layer.isdigit() or not values:
            raise ValueError(f"`--{option} {each}` is not allowed: it must be LAYER:NUMBER, such as 0:3.")
        chosen.setdefault(int(layer), []).extend(_number(option, value) for value in values.split(","))
    return chosen


def _number(option: str, text: str) -> int | float:
    try:
        number = json.loads(text)
    except json.JSONDecodeError:
        number = None
    if not isinstance(number, int | float) or isinstance(number, bool):
        raise ValueError(f"`--{option} {text}` is not allowed: it must be a number.")
    return number


def read_evaluation(source: str, revision: str | None, data: list[Path], *sizes: Any) -> Any:
    """What the losses of a receipt are measured on, if that was asked for."""
    from hf_sparse_moe.checkpoints.source import find_source

    return _read(find_source(source, revision).folder, data, *sizes) if data else None


def _read(
    folder: Path, data: list[Path], group_by: str | None, max_texts: int, max_length: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """Texts as batches of one, and their groups."""
    from hf_sparse_moe.quickstart.examples import load_tokenizer

    texts, groups = read_texts(data, group_by, max_texts)
    tokenizer = load_tokenizer(folder)
    whole = [text if isinstance(text, str) else " ".join(text) for text in texts]
    encoded = [dict(tokenizer(text, return_tensors="pt", truncation=True, max_length=max_length)) for text in whole]
    pairs = [(batch, str(group)) for batch, group in zip(encoded, groups, strict=True) if batch["input_ids"].numel()]
    if not pairs:
        raise ValueError(f"`--data {data[0]}` has no text with a token.")
    names = ("input_ids", "attention_mask")
    return [{name: batch[name] for name in names if name in batch} for batch, _ in pairs], [
        group for _, group in pairs
    ]
