"""`measure`, `prune`, `merge`, `expand`, `to-dense`: mixtures with other experts, or none."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
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
    facts_table,
    show,
)


_TEXT = "A .jsonl file with a column `text`, or a .txt file of paragraphs, also as .gz; each is a group. Repeatable."
_LOSSES = "Text for the losses in the receipt, for which both models are loaded."
MeasuredOption = Annotated[Path | None, typer.Option(help="The file that `measure` wrote.")]


@dataclass
class _Text:
    """The options of text, of which `data` is an option of each command."""

    group_by: Annotated[
        str | None,
        typer.Option(help="Column with the group (domain, language) of each text.", show_default="the file"),
    ] = None
    max_texts: Annotated[int, typer.Option(min=1, help="Texts to read, as many of each group.")] = 200
    max_length: Annotated[int, typer.Option(min=1, help="Tokens of a text.")] = 256
    revision: RevisionOption = None
    as_json: JsonOption = False

    def read(self, source: str, data: list[Path]) -> tuple[list[dict[str, Any]], list[str]]:
        """Texts as batches of one, and their groups."""
        from hf_sparse_moe.checkpoints.config import read_config
        from hf_sparse_moe.checkpoints.source import find_source
        from hf_sparse_moe.insight.texts import longest
        from hf_sparse_moe.quickstart.examples import load_tokenizer

        found = find_source(source, self.revision)
        tokenizer, pairs = load_tokenizer(found.folder), []
        most = longest(read_config(found), tokenizer, self.max_length)
        for text, group in zip(*read_texts(data, self.group_by, self.max_texts), strict=True):
            whole = text if isinstance(text, str) else " ".join(text)
            batch = tokenizer(whole, return_tensors="pt", truncation=True, max_length=most)
            if batch["input_ids"].numel():
                names = batch.keys() & {"input_ids", "attention_mask"}
                pairs.append(({name: batch[name] for name in names}, str(group)))
        if not pairs:
            raise ValueError(f"`--data {data[0]}` has no text with a token.")
        batches, groups = zip(*pairs, strict=True)
        return list(batches), list(groups)


@dataclass
class _Writing(_Text):
    """The options of the commands that write a model."""

    data: Annotated[list[Path] | None, typer.Option(help=f"{_LOSSES} {_TEXT}")] = None
    max_shard_size: ShardSizeOption = "4GB"
    resume: ResumeOption = False

    def run(self, operation: Callable[..., Any], source: str, *arguments: Any, output: Path) -> None:
        """Write a model, and show what its receipt says."""
        from hf_sparse_moe.checkpoints.folder import check_target
        from hf_sparse_moe.surgery.receipts import describe_operation

        check_target(output)
        report = operation(
            source,
            *arguments,
            output=output,
            evaluation=self.read(source, self.data) if self.data else None,
            revision=self.revision,
            max_shard_size=self.max_shard_size,
            resume=self.resume,
            show_progress=sys.stderr.isatty(),
        )
        told = facts_table(describe_operation(report.receipt))
        show(report.to_dict(), self.as_json, f"{output}: {report.architecture}", told)


def _with_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameter `options` is the fields of a dataclass, as options of their own."""
    parameters = dict(inspect.signature(command, eval_str=True).parameters)
    make = parameters.pop("options").annotation
    shared = inspect.signature(make, eval_str=True).parameters

    @wraps(command)
    def run(**given: Any) -> None:
        command(**{name: given[name] for name in parameters}, options=make(**{name: given[name] for name in shared}))

    every = [each.replace(kind=each.KEYWORD_ONLY) for each in (*parameters.values(), *shared.values())]
    run.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]
    return run


@app.command(
    epilog="Examples:\n\n`hf-sparse-moe measure ./gpt2-8x --data law.txt --data code.jsonl -o measured.safetensors`"
)
@_with_options
def measure(
    source: SourceArgument,
    data: Annotated[list[Path], typer.Option(help=_TEXT)],
    options: _Text,
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")] = Path("measured.safetensors"),
) -> None:
    """
    Measure what each expert of a mixture does on some text: frequency, EAN, REAP, outputs and their similarity.

    Loads the model. The file is what `prune`, `merge` and `expand` choose by.
    """
    from hf_sparse_moe.checkpoints.loading import load_whole
    from hf_sparse_moe.checkpoints.source import find_source
    from hf_sparse_moe.quickstart.examples import load_tokenizer
    from hf_sparse_moe.surgery import measure_experts

    if output.exists():
        raise FileExistsError(f"`{output}` exists already. Choose another name, or remove it.")
    batches, groups = options.read(source, data)
    folder = find_source(source, options.revision).folder
    measured = measure_experts(load_whole(folder), batches, groups, load_tokenizer(folder))
    measured.save(output)
    table = Table("layer", "lowest REAP", "highest", "tokens of the rarest expert")
    for layer in measured.layers:
        reap = layer.reap if "norms" in layer.tensors else layer.frequency
        table.add_row(layer.name, f"{reap.min():.3g}", f"{reap.max():.3g}", f"{int(layer.tokens.min()):,}")
    show(measured.to_dict(), options.as_json, table, f"{output}: what {len(batches)} texts tell of the experts")


@app.command(
    epilog="Examples:\n\n`hf-sparse-moe prune ./gpt2-8x ./gpt2-6x --measured measured.safetensors --keep 0.75`\n\n"
    "`hf-sparse-moe prune ./gpt2-8x ./gpt2-7x --drop 0:3 --drop 1:5 --data law.txt`"
)
@_with_options
def prune(
    source: SourceArgument,
    output: OutputArgument,
    options: _Writing,
    measured: MeasuredOption = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(help="How many experts of a layer stay, or which share; LAYER:NUMBER for some. Repeatable."),
    ] = None,
    drop: Annotated[
        list[str] | None, typer.Option(help="LAYER:EXPERT,EXPERT...: the experts of a layer that go. Repeatable.")
    ] = None,
    method: Annotated[
        str, typer.Option(help="Which experts stay: `reap`, `ean`, `frequency`, `naee` or `random`.")
    ] = "reap",
    seed: SeedOption = 0,
) -> None:
    """
    Make a mixture with fewer experts, of this package or of transformers.

    Works tensor by tensor: neither model is in memory, but for `--data`. The result computes what the mixture computes
    with those experts disabled.
    """
    from hf_sparse_moe.surgery import prune_experts

    gone = _by_layer("drop", drop or []) or None
    chosen = (measured, _numbers("keep", keep), gone, method)
    options.run(partial(prune_experts, seed=seed), source, *chosen, output=output)


@app.command(epilog="Example:\n\n`hf-sparse-moe merge ./qwen3-8x ./qwen3-6x --measured measured.safetensors --into 6`")
@_with_options
def merge(
    source: SourceArgument,
    output: OutputArgument,
    measured: Annotated[Path, typer.Option(help="The file that `measure` wrote.")],
    into: Annotated[
        list[str],
        typer.Option(help="How many experts of a layer there will be, or a share; LAYER:NUMBER for some. Repeatable."),
    ],
    options: _Writing,
    method: Annotated[str, typer.Option(help="`hc`, `m-smoe` or `ream`.")] = "hc",
    align: Annotated[bool, typer.Option(help="Match the hidden units of the experts first.")] = True,
) -> None:
    """Merge the experts of a mixture into fewer, by what was measured of them."""
    from hf_sparse_moe.surgery import merge_experts

    options.run(merge_experts, source, measured, _numbers("into", into), method, align, output=output)


@app.command(
    epilog="Examples:\n\n`hf-sparse-moe expand ./gpt2-8x ./gpt2-16x --factor 2`\n\n"
    "`hf-sparse-moe expand ./gpt2-8x ./gpt2-16x --by measured.safetensors --data law.txt`\n\n"
    "`hf-sparse-moe expand ./gpt2-8x ./gpt2-8x-top1 --factor 1 --num-experts-per-tok 1`"
)
@_with_options
def expand(
    source: SourceArgument,
    output: OutputArgument,
    options: _Writing,
    factor: Annotated[int, typer.Option(help="How many times more experts there will be.")] = 2,
    by: Annotated[
        Path | None, typer.Option(help="The file that `measure` wrote: experts that carry more get more copies.")
    ] = None,
    num_experts_per_tok: Annotated[
        int | None,
        typer.Option(
            help="Number of experts that each token uses.", show_default="times the factor; as before with --by"
        ),
    ] = None,
    router_noise: Annotated[
        float, typer.Option(help="Noise on the copies' router rows, relative to the rows; 0 keeps the function.")
    ] = 0.01,
    seed: SeedOption = 0,
) -> None:
    """
    Make a mixture with more experts of a mixture of this package, or with another number of them a token.

    Works tensor by tensor: neither model is in memory, but for `--data`.
    """
    from hf_sparse_moe.surgery import expand as make_larger

    options.run(make_larger, source, factor, seed, router_noise, by, num_experts_per_tok, output=output)


@app.command("to-dense", epilog="Example:\n\n`hf-sparse-moe to-dense ./qwen3-8x ./qwen3-dense`")
@_with_options
def to_dense(
    source: SourceArgument,
    output: OutputArgument,
    options: _Writing,
    measured: MeasuredOption = None,
    method: Annotated[str, typer.Option(help="`mean`, `best` or `merge`.")] = "mean",
) -> None:
    """
    Make one feed-forward of the experts of each layer: a dense model for plain transformers.

    Works layer by layer: neither model is in memory, but for `--data`.
    """
    from hf_sparse_moe.surgery import to_dense as write_dense

    options.run(write_dense, source, measured, method, output=output)


def _numbers(option: str, given: list[str] | None) -> Any:
    """One number for all layers, or one each for some."""
    if not given:
        return None
    if len(given) == 1 and ":" not in given[0]:
        return _number(option, given[0])
    return {layer: values[0] for layer, values in _by_layer(option, given).items()}


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
