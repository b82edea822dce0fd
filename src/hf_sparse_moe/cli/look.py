"""`look`: one page that shows what every expert does."""

from __future__ import annotations

import shlex
import sys
from itertools import chain, zip_longest
from pathlib import Path
from typing import Annotated, Any

import typer

from .app import app
from .options import JsonOption, RevisionOption, SourceArgument, show


@app.command(
    epilog="Examples:\n\n`hf-sparse-moe look ./gpt2-8x --data law.txt --data code.jsonl`\n\n"
    "`hf-sparse-moe look user/gpt2-8x --data domains.jsonl.gz --group-by domain --ablate -o routing.html`"
)
def look(
    source: SourceArgument,
    data: Annotated[
        list[Path],
        typer.Option(
            help="A .jsonl file with a column `text`, or a .txt file of paragraphs, also as .gz; a folder stands for "
            "such files in it. Repeatable."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write.")] = Path("routing.html"),
    group_by: Annotated[
        str | None,
        typer.Option(
            help="Column with the group of each text (domain, language, label), or with a list of tags where `text` "
            "is a list of words.",
            show_default="the file",
        ),
    ] = None,
    max_texts: Annotated[int, typer.Option(min=1, help="Texts to read, as many of each group.")] = 200,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens of a text.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts in a forward pass.")] = 4,
    ablate: Annotated[
        bool, typer.Option("--ablate", help="Measure the loss without each expert: one more pass for each.")
    ] = False,
    checkpoints: Annotated[
        list[Path] | None,
        typer.Option(help="A folder `checkpoint-...` of the training, or one that holds such folders. Repeatable."),
    ] = None,
    revision: RevisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """
    Write one HTML page that shows what every expert of a mixture does on some text.

    Takes mixtures of this package and of transformers. The page needs no server, no network and no other file. Written
    into the mixture's own folder, it leaves the routing's statistics and picture there too, for the model card.
    """
    from hf_sparse_moe.checkpoints.hashes import source_files
    from hf_sparse_moe.checkpoints.loading import load_whole
    from hf_sparse_moe.checkpoints.source import find_source
    from hf_sparse_moe.hub.checkpoint import save_routing_statistics
    from hf_sparse_moe.insight import explain_routing
    from hf_sparse_moe.quickstart.examples import load_tokenizer
    from hf_sparse_moe.routing import find_mixture_layers

    texts, groups = read_texts(data, group_by, max_texts)
    found = find_source(source, revision)
    model, tokenizer = load_whole(found.folder), load_tokenizer(found.folder)
    layers = find_mixture_layers(model)
    if ablate:
        passes = sum(layer.num_experts for layer in layers)
        typer.echo(f"--ablate: {passes + 1} more passes over {len(texts)} texts, one without each expert.", err=True)
    hashes = source_files(found.folder)
    explained = explain_routing(
        model,
        tokenizer,
        texts,
        groups,
        max_length=max_length,
        batch_size=batch_size,
        ablate=ablate,
        checkpoints=list(chain.from_iterable(map(_checkpoints, checkpoints or []))),
        about={
            "Model": f"{found.name} ({type(model).__name__})",
            **({"Revision": found.revision} if found.revision else {}),
            "Weights, SHA-256": ", ".join(digest for name, digest in hashes.items() if name.endswith(".safetensors")),
            "Files": ", ".join(path.name for path in data),
            "Command": _command(),
        },
    )
    explained.to_html(output)
    if output.resolve().parent == Path(source).resolve():
        save_routing_statistics(explained.statistics, output.parent)
    told = [f"{claim.head} {claim.text}" for claim in explained.verdict]
    show(explained.to_dict(), as_json, *told, f"The page is {output} ({output.stat().st_size / 1e6:.1f} MB).")


def read_texts(paths: list[Path], group_by: str | None, most: int) -> tuple[list[Any], list[Any]]:
    """The first texts of each group in turn, and their groups."""
    from hf_sparse_moe.quickstart.corpus import SUFFIXES, read_rows

    files = [file for path in paths for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    files = [file for file in files if file.name.lower().endswith(SUFFIXES)]
    if not files:
        raise ValueError(f"`--data {paths[0]}` names no file that ends in one of {SUFFIXES}.")
    queues: dict[str, list[tuple[Any, Any]]] = {}
    for file in files:
        for row in read_rows(file):
            missing = [name for name in ("text", group_by) if name is not None and name not in row]
            if missing:
                raise ValueError(f"A row of `{file}` has no column `{missing[0]}`, only {sorted(row)}.")
            group = file.name.split(".")[0] if group_by is None else row[group_by]
            tags = [str(tag) for tag in group] if isinstance(group, list) else str(group)
            text = row["text"]
            if text:
                queues.setdefault(tags if isinstance(tags, str) else file.name, []).append((text, tags))
    if not queues:
        raise ValueError(f"`--data {paths[0]}` has no text.")
    turns = [pair for turn in zip_longest(*queues.values()) for pair in turn if pair is not None][:most]
    return [text for text, _ in turns], [group for _, group in turns]


def _checkpoints(folder: Path) -> list[Path]:
    """A checkpoint, or those in a training's folder, oldest first."""
    if (folder / "config.json").is_file():
        return [folder]
    found = [path for path in folder.glob("checkpoint-*") if path.name.partition("-")[2].isdigit()]
    if not found:
        raise ValueError(f"`--checkpoints {folder}` is no checkpoint, and holds no folder `checkpoint-...`.")
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def _command() -> str:
    """What was typed; folders by their last name, because where they lie is nobody else's business."""
    words = [
        "=".join(Path(part).name if part.startswith("/") else part for part in word.split("=", 1))
        for word in sys.argv[1:]
    ]
    return f"hf-sparse-moe {shlex.join(words)}"
