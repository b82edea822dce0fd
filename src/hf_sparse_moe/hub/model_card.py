"""The model card, rendered from the checkpoint itself: a fact that is not recorded there says so."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from numbers import Number
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from jinja2 import StrictUndefined, Template
from jinja2.sandbox import SandboxedEnvironment
from transformers import TrainerState

from hf_sparse_moe.models.pretrained_model import SparseMoePreTrainedModel

from .adapter_card import ADAPTER_TEMPLATE, adapter_facts, adapter_metadata
from .adapter_folder import Adapter, is_adapter, read_adapter
from .card_facts import card_facts
from .card_metadata import card_metadata
from .card_sections import TEMPLATE, keep_free_sections, split_front_matter
from .checkpoint import Checkpoint, checkpoint_in_memory, read_checkpoint
from .escaping import Markdown, as_code, escape_markdown
from .evaluation_results import evaluation_entries, write_evaluation_results


def render_model_card(
    model: SparseMoePreTrainedModel | Checkpoint | Adapter | str | Path,
    repo_id: str,
    *,
    evaluation: Mapping[str, Any] | TrainerState | None = None,
    license: str | None = None,
    language: str | Iterable[str] | None = None,
    tags: Iterable[str] | None = None,
    previous: Iterable[str] = (),
) -> str:
    """
    The card of a mixture or an adapter: every number is counted on the model, or read from its config and the files
    beside its weights (receipt, training record, routing statistics).

    Args:
        model (`SparseMoePreTrainedModel`, [`Checkpoint`], [`Adapter`], `str` or `Path`):
            The model that is published, or the folder where it or an adapter lies; no weights of a model in a folder
            are loaded.
        repo_id (`str`): Where it is published, for the lines of code that load it.
        evaluation (`dict` or `TrainerState`, *optional*):
            Measured results by name; of a `TrainerState` the last evaluation is taken.
        license (`str`, *optional*):
            The model's licence, such as `"apache-2.0"`. Defaults to that of the training record or `previous`.
        language (`str` or `Iterable[str]`, *optional*): Codes, such as `"en"`. Defaults as `license` does.
        tags (`Iterable[str]`, *optional*): Further tags.
        previous (`Iterable[str]`, *optional*):
            Present cards, such as the folder's and the Hub's. What a person wrote there stays: free sections, sections
            of their own, and metadata that this function does not set; the first card that has it wins.

    Returns:
        `str`: YAML metadata and Markdown. Nothing is asked of the Hub.

    Raises:
        ValueError: a model of another package, a folder that holds no whole mixture, a `repo_id` that the Hub does
            not allow, or a `previous` that cannot be read.
    """
    validate_repo_id(repo_id)
    published = _read(model)
    old = [split_front_matter(card) for card in previous]
    told: dict[str, Any] = {
        "license": license,
        "language": language,
        "tags": tags,
        "previous": [values for values, _ in old],
    }
    if isinstance(published, Adapter):
        template, metadata = ADAPTER_TEMPLATE, adapter_metadata(published, **told)
        facts = adapter_facts(published, _results(evaluation), license=metadata.license, language=metadata.language)
    else:
        template, metadata = TEMPLATE, card_metadata(published, **told)
        facts = card_facts(published, _results(evaluation), license=metadata.license, language=metadata.language)
    body = _template(template).render(repo_id=Markdown(repo_id), title=repo_id, **facts)
    for _, old_body in old:
        body = keep_free_sections(body, old_body)
    card = f"---\n{metadata.to_yaml()}\n---\n\n{body}"
    ModelCard(card)  # reads the metadata as the Hub does
    return card


def _read(model: SparseMoePreTrainedModel | Checkpoint | Adapter | str | Path) -> Checkpoint | Adapter:
    if isinstance(model, Checkpoint | Adapter):
        return model
    if isinstance(model, str | Path):
        return read_adapter(model) if is_adapter(model) else read_checkpoint(model)
    return checkpoint_in_memory(model)


def write_model_card(
    folder: str | Path,
    repo_id: str | None = None,
    *,
    license: str | None = None,
    language: str | Iterable[str] | None = None,
    tags: Iterable[str] | None = None,
) -> Path:
    """
    Render the card of a mixture's or an adapter's folder into its README.md, and its scores into `.eval_results/`.
    What a person wrote in the present README.md stays.

    Args:
        folder (`str` or `Path`): Of a saved mixture, or of an adapter.
        repo_id (`str`, *optional*): Defaults to the folder's name.
        license (`str`, *optional*): See [`render_model_card`].
        language (`str` or `Iterable[str]`, *optional*): The same.
        tags (`Iterable[str]`, *optional*): The same.

    Returns:
        `Path`: the README.md.
    """
    checkpoint = _read(folder)
    repo_id = repo_id or Path(folder).resolve().name
    render = partial(render_model_card, checkpoint, repo_id, license=license, language=language, tags=tags)
    path = write_readme(folder, render)
    write_evaluation_results(evaluation_entries(checkpoint.record), folder)
    return path


def write_readme(folder: str | Path, render: Callable[..., str]) -> Path:
    """Replace a folder's README.md by what `render(previous=[its present text])` returns."""
    path = Path(folder) / "README.md"
    card = render(previous=[path.read_bytes().decode()] if path.is_file() else [])
    partial_path = path.with_name(".README.md.partial")
    partial_path.write_bytes(card.encode())
    os.replace(partial_path, path)  # whole or not at all, and never through a link
    return path


def _template(path: Path) -> Template:
    environment = SandboxedEnvironment(
        undefined=StrictUndefined, finalize=escape_markdown, trim_blocks=True, keep_trailing_newline=True
    )
    environment.filters["code"] = as_code
    environment.globals |= {"table": _table, "grid": _grid}
    return environment.from_string(path.read_text(encoding="utf-8"))


def _table(rows: Mapping[str, Any]) -> Markdown:
    return Markdown("\n".join(_row(pair) for pair in rows.items()))


def _grid(header: Iterable[Any], rows: Iterable[Iterable[Any]]) -> Markdown:
    header = list(header)
    return Markdown("\n".join([_row(header), _row(Markdown("---") for _ in header), *map(_row, rows)]))


def _row(cells: Iterable[Any]) -> str:
    return f"| {' | '.join(map(escape_markdown, cells))} |"


def _results(evaluation: Mapping[str, Any] | TrainerState | None) -> dict[str, Any]:
    if isinstance(evaluation, TrainerState):
        logs = [log for log in evaluation.log_history if any(name.startswith("eval_") for name in log)]
        evaluation = logs[-1] if logs else None
    elif not isinstance(evaluation, Mapping | None):
        raise ValueError(
            f"`evaluation` is a {type(evaluation).__name__}; pass results by name, such as `trainer.evaluate()` "
            "returns them, or `trainer.state`."
        )
    return {
        name: value
        for name, value in (evaluation or {}).items()
        # how fast the machine was says nothing of the model
        if isinstance(value, Number | str) and not name.endswith(("runtime", "per_second"))
    }
