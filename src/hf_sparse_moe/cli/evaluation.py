"""`evaluate`: the scores of a mixture on tasks of lm-eval."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from .app import app
from .options import JsonOption, SourceArgument, show


@app.command(epilog="Example:\n\n`hf-sparse-moe evaluate ./gpt2-8x --tasks arc_easy,lambada_openai`")
def evaluate(
    source: SourceArgument,
    tasks: Annotated[
        str, typer.Option(help="Names of tasks, with commas between them; `lm-eval ls tasks` shows them.")
    ],
    include_path: Annotated[str | None, typer.Option(help="Folder with further tasks.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples in front of each question.")] = None,
    limit: Annotated[int | None, typer.Option(help="Rows of each task, for a first look.")] = None,
    batch_size: Annotated[str, typer.Option(help="Requests in a forward pass, or `auto`.")] = "1",
    device: Annotated[str | None, typer.Option(help="Such as `cuda:1`.", show_default="the accelerator")] = None,
    as_json: JsonOption = False,
) -> None:
    """
    Score a mixture with lm-eval, the language model evaluation harness.

    Where SOURCE is a folder, the scores go to its training record, and `card` and `push` take them from there.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table
    except ImportError as error:
        raise ImportError("`evaluate` needs lm-eval: pip install 'hf-sparse-moe[evaluate]'.") from error
    import torch
    from transformers import AutoConfig

    manager, names = TaskManager(include_path=include_path), tasks.split(",")
    if unknown := sorted(set(names) - set(manager.all_tasks)):
        raise ValueError(f"`--tasks {unknown[0]}` is no task of lm-eval: `lm-eval ls tasks` shows them.")
    # lm-eval takes a type that transformers does not know for a decoder.
    backend = "seq2seq" if AutoConfig.from_pretrained(source).is_encoder_decoder else "causal"
    measured = lm_eval.simple_evaluate(
        "hf",
        {"pretrained": source, "backend": backend},
        names,
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        device=device or str(torch.accelerator.current_accelerator(check_available=True) or "cpu"),
        limit=limit,
        log_samples=False,
        task_manager=manager,
    )
    if Path(source).is_dir():
        record_scores(measured, source, limit)
    show(measured["results"], as_json, make_table(measured))


def record_scores(measured: dict[str, Any], folder: str | Path, limit: int | None = None) -> None:
    """Add what `lm_eval.simple_evaluate` returned to the training record in `folder`, for the model card."""
    from hf_sparse_moe.hub import record_results

    for task, values in measured["results"].items():
        config = measured["configs"].get(task, {})  # a group of tasks has none
        data = str(config.get("dataset_path"))
        on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", data) and not Path(data).exists()
        how = f"lm-eval {measured['lm_eval_version']}, {config.get('num_fewshot') or 0}-shot"
        how += f", {limit} rows" if limit else ""
        scores = {
            name.removesuffix(",none"): value
            for name, value in values.items()
            if "," in name and "_stderr" not in name and isinstance(value, float | int)
        }
        record_results(folder, {f"{task} ({how})": scores}, f"hf://datasets/{data}" if on_hub else None)
