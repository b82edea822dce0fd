"""The model card, rendered from the files of a checkpoint or an adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from numbers import Number
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id
from jinja2 import ChainableUndefined, Environment, TemplateError
from markupsafe import Markup
from transformers import TrainerState

from hf_sparse_moe.checkpoints.files import read_text, write_whole
from hf_sparse_moe.models.pretrained_model import SparseMoePreTrainedModel
from hf_sparse_moe.surgery.receipts import surgery_card

from .adapter_files import Adapter, is_adapter, read_adapter
from .card_facts import FILTERS, card_facts
from .card_metadata import derived_metadata, merged_metadata
from .card_words import join, read_words
from .checkpoint import Checkpoint, SurgeryResult, checkpoint_in_memory, mapping, read_checkpoint
from .escaping import escape_markdown
from .evaluation_results import write_evaluation_results


TEMPLATE = Path(__file__).with_name("card_template.md")


def render_model_card(
    model: SparseMoePreTrainedModel | Checkpoint | SurgeryResult | Adapter | str | Path,
    repo_id: str,
    *,
    evaluation: Mapping[str, Any] | TrainerState | None = None,
    license: str | None = None,
    language: str | Iterable[str] | None = None,
    tags: Iterable[str] | None = None,
    base_model: str | None = None,
    previous: Iterable[str] = (),
) -> str:
    """
    Render the card of a mixture or an adapter. Every number is counted on the model or read from its config and the
    files beside its weights (receipt, training record, routing statistics); what is not recorded is left out.

    Args:
        model (`SparseMoePreTrainedModel`, [`Checkpoint`], [`Adapter`], `str` or `Path`):
            The model that is published, or the folder of a mixture or an adapter. The weights of a mixture in a
            folder are not loaded.
        repo_id (`str`): Where it is published, for the lines of code that load it.
        evaluation (`dict` or `TrainerState`, *optional*):
            Measured results by name; of a `TrainerState` the last evaluation is taken.
        license (`str`, *optional*):
            Such as `"apache-2.0"`. Defaults to that of the training record or of `previous`.
        language (`str` or `Iterable[str]`, *optional*): Codes, such as `"en"`. Defaults as `license` does.
        tags (`Iterable[str]`, *optional*): Further tags.
        base_model (`str`, *optional*):
            Hub id of the dense source, or of an adapter's base. Defaults to that of `previous` or of the files.
        previous (`Iterable[str]`, *optional*):
            Present cards, such as the folder's and the Hub's. Text outside the generated part and metadata that a
            person wrote are kept; the first card that has them wins.

    Returns:
        `str`: YAML metadata and Markdown. Nothing is fetched from the Hub.

    Raises:
        ValueError: a model of another package, a folder without a whole mixture or adapter, a `repo_id` or
            `base_model` that the Hub does not allow, or a `previous` that cannot be read.
    """
    for name in (repo_id, *([] if base_model is None else [base_model])):
        validate_repo_id(name)
    published = _read(model)
    cards = [read_words(card) for card in previous]
    derived, recorded = derived_metadata(published), mapping(published.record.get("card"))
    metadata = merged_metadata(
        derived,
        *(words.metadata for words in reversed(cards)),
        {name: recorded.get(name) for name in ("license", "language", "tags")},
        {"license": license, "language": language, "tags": tags, "base_model": base_model},
    )
    generated = _rendered(published, repo_id, _results(evaluation))
    data = ModelCardData()
    for name, value in metadata.items():
        data[name] = value
    card = f"---\n{data.to_yaml()}\n---\n\n{join(repo_id, generated, derived, cards)}"
    ModelCard(card)  # reads the metadata as the Hub does
    return card


def write_model_card(
    folder: str | Path,
    repo_id: str | None = None,
    *,
    license: str | None = None,
    language: str | Iterable[str] | None = None,
    tags: Iterable[str] | None = None,
    base_model: str | None = None,
) -> Path:
    """
    Render the card of a mixture's or an adapter's folder into its README.md, and its scores into `.eval_results/`.
    What a person wrote in the present README.md is kept.

    Args:
        folder (`str` or `Path`): Of a saved mixture, or of an adapter.
        repo_id (`str`, *optional*): Defaults to the one that the present card was rendered for, or the folder's name.
        license, language, tags, base_model: See [`render_model_card`].

    Returns:
        `Path`: the README.md.
    """
    published, folder = _read(folder), Path(folder)
    recalled = (read_words(card).repo_id for card in _present(folder))
    path = write_readme(
        folder,
        partial(
            render_model_card,
            published,
            repo_id or next((name for name in recalled if name), folder.resolve().name),
            license=license,
            language=language,
            tags=tags,
            base_model=base_model,
        ),
    )
    write_evaluation_results(published.record, folder)
    return path


def write_readme(folder: str | Path, render: Callable[..., str]) -> Path:
    """Replace a folder's README.md by what `render(previous=[its present text])` returns."""
    path = Path(folder) / "README.md"
    write_whole(path, render(previous=_present(path.parent)))
    return path


def _rendered(published: Checkpoint | SurgeryResult | Adapter, repo_id: str, given: Mapping[str, Any]) -> str:
    if isinstance(published, SurgeryResult):
        return surgery_card(published.receipt, published.architecture, given)
    environment = Environment(
        autoescape=True,  # so that a macro of the template returns text of ours
        finalize=escape_markdown,
        undefined=ChainableUndefined,  # what nobody recorded is left out
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= FILTERS
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    try:
        return template.render(repo_id=Markup(repo_id), given=given, **card_facts(published))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, TemplateError) as error:
        raise ValueError(
            "A file beside the weights (receipt.json, training_record.json, routing_statistics.json) is not what this "
            f"package writes ({type(error).__name__}). Delete it, or write it again."
        ) from error


def _present(folder: Path) -> list[str]:
    path = folder / "README.md"
    return [read_text(path)] if path.exists() or path.is_symlink() else []


def _read(
    model: SparseMoePreTrainedModel | Checkpoint | SurgeryResult | Adapter | str | Path,
) -> Checkpoint | SurgeryResult | Adapter:
    if isinstance(model, Checkpoint | SurgeryResult | Adapter):
        return model
    if isinstance(model, str | Path):
        return read_adapter(model) if is_adapter(model) else read_checkpoint(model)
    return checkpoint_in_memory(model)


def _results(evaluation: Mapping[str, Any] | TrainerState | None) -> dict[str, Any]:
    if isinstance(evaluation, TrainerState):
        logs = (log for log in reversed(evaluation.log_history) if any(name.startswith("eval_") for name in log))
        evaluation = next(logs, None)
    return {
        name: value
        for name, value in dict(evaluation or {}).items()
        # how fast the machine was says nothing about the model
        if isinstance(value, Number | str) and not name.endswith(("runtime", "per_second"))
    }
