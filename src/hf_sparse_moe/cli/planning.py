"""`plan`: what a mixture would cost; before anything is made."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .app import app
from .options import (
    DtypeOption,
    ExpertsOption,
    JsonOption,
    LayersOption,
    MethodOption,
    RevisionOption,
    SettingsOption,
    TopKOption,
    print_json,
    to_dtype,
    to_settings,
)


@app.command(
    epilog="Examples:\n\n`hf-sparse-moe plan gpt2 --num-experts 16`\n\n"
    "`hf-sparse-moe plan ./llama --method split --num-experts 64 --num-experts-per-tok 8 --set granularity=8 --json`"
)
def plan(
    src: Annotated[str, typer.Argument(help="Folder or Hub id of a dense checkpoint,.")],
    num_experts: ExpertsOption = 8,
    num_experts_per_tok: TopKOption = 2,
    method: MethodOption = "copy",
    layers: LayersOption = "all",
    settings: SettingsOption = [],  # noqa: B006 (typer copies it)
    dtype: DtypeOption = "auto",
    revision: RevisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """
    What a mixture would cost to store, train and serve. Reads the config alone, writes nothing.

    """
    from hf_sparse_moe.stock import explain_export
    from hf_sparse_moe.upcycling import plan as make_plan

    method_and_layers = {"method": method, "layers": layers, "dtype": to_dtype(dtype), "revision": revision}
    report = make_plan(src, num_experts, num_experts_per_tok, **method_and_layers, **to_settings(settings))
    report["exports"] = explain_export(report.pop("config")).possible
    if as_json:
        print_json(report)
    else:
        _print_plan(report, Console())


def _print_plan(report: dict[str, Any], console: Console) -> None:
    parameters, flops = report["parameters"], report["flops_per_token"]
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    facts.add_row("becomes", report["class"])
    facts.add_row("keeps the function", report["exact"])
    facts.add_row("parameters", f"{parameters['dense']:,} dense -> {parameters['total']:,}")
    facts.add_row("active for a token", f"{parameters['active']:,}")
    facts.add_row("checkpoint", _gigabytes(report["checkpoint_bytes"]))
    ratio = flops["mixture"] / flops["dense"]
    facts.add_row("FLOPs a token", f"{flops['dense']:,} dense -> {flops['mixture']:,} ({ratio:.2f} times)")
    slower = ", ".join(f"{factor:.2f} at batch {batch}" for batch, factor in report["decode_slowdown"].items())
    facts.add_row("times slower to decode, by weights read", slower)
    facts.add_row("can be exported to", ", ".join(report["exports"]) or "no stock architecture")
    memory = Table("training memory, activations not counted", "")
    memory.columns[1].justify = "right"
    for name, count in report["training_bytes"].items():
        memory.add_row(name, _gigabytes(count))
    console.print(facts, highlight=False)
    console.print(memory)
    console.print(report["rule_of_thumb"], highlight=False)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e7 else f"{count / 1e6:,.2f} MB"
