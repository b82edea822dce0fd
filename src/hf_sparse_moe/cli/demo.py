"""`quickstart`: an end-to-end demo."""

from __future__ import annotations

from typing import Annotated

import typer

from .app import app
from .options import ExpertsOption, SeedOption, TopKOption


@app.command(
    epilog="Examples:\n\n`hf-sparse-moe quickstart`\n\n"
    "`hf-sparse-moe quickstart --model ./my-llama --data ./my-texts --steps 100 --learning-rate 5e-5`\n\n"
    "`hf-sparse-moe quickstart --push-to user/first-mixture`"
)
def quickstart(
    model: Annotated[
        str | None,
        typer.Option(help="Folder or Hub id of a dense language model.", show_default="a small one, trained first"),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Folder of .jsonl(.gz) and .txt(.gz) files, one for each domain (or with a column `domain`), or the "
            "id of a Hub data set with a column `text`.",
            show_default="text of this Python installation",
        ),
    ] = None,
    output: Annotated[
        str | None, typer.Option(help="The folder to create.", show_default="quickstart, quickstart-2, ...")
    ] = None,
    push_to: Annotated[
        str | None, typer.Option(help="`user/name` to publish to, on the Hub that `HF_ENDPOINT` names.")
    ] = None,
    num_experts: ExpertsOption = 8,
    num_experts_per_tok: TopKOption = 2,
    dense_steps: Annotated[int, typer.Option(min=1, help="Training steps of the small dense model.")] = 300,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of the mixture, and of its dense twin.")] = 160,
    adapter_steps: Annotated[int, typer.Option(min=1, help="Training steps of the adapter.")] = 40,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences in a step.")] = 16,
    sequence_length: Annotated[int, typer.Option(min=8, help="Tokens in a sequence.")] = 128,
    learning_rate: Annotated[float, typer.Option(help="Of mixture and twin; the adapter uses twice that.")] = 1e-3,
    seed: SeedOption = 0,
) -> None:
    """
    Run the package's main job from end to end, in minutes.

    Upcycles a dense model, trains the mixture beside its dense twin, compares them by domain, shows which expert
    served which domain, trains an adapter, and saves, publishes (with `--push-to`) and checks the result.
    """
    arguments = dict(locals())
    from transformers.utils import logging

    from hf_sparse_moe.quickstart import QuickstartOptions, run_quickstart

    logging.disable_progress_bar()
    run_quickstart(QuickstartOptions(**arguments))
