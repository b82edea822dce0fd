"""`plan`: what a mixture would cost, on one GPU and on many, before anything is made."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

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


if TYPE_CHECKING:
    from hf_sparse_moe.planning import LayoutPlan, Machine, Workload

ROWS = 12  # layouts in the table; `--json` has all


@app.command(
    epilog="Examples:\n\n`hf-sparse-moe plan gpt2 --num-experts 16`\n\n"
    "`hf-sparse-moe plan ./llama --method split --num-experts 64 --num-experts-per-tok 8 --set granularity=8 --json`"
    "\n\n"
    "`hf-sparse-moe plan Qwen/Qwen3-8B --num-experts 64 --gpus 64 --gpu h100 --interconnect nvlink4,ndr`"
)
def plan(
    src: Annotated[str, typer.Argument(help="Folder or Hub id of a dense checkpoint, or, with --gpus, of a mixture.")],
    num_experts: ExpertsOption = 8,
    num_experts_per_tok: TopKOption = 2,
    method: MethodOption = "copy",
    layers: LayersOption = "all",
    settings: SettingsOption = [],  # noqa: B006 (typer copies it)
    dtype: DtypeOption = "auto",
    revision: RevisionOption = None,
    gpus: Annotated[int | None, typer.Option(help="Plan its training on so many GPUs.")] = None,
    gpu: Annotated[str, typer.Option(help="a100, h100, h200, b200 or l40s.")] = "h100",
    gpu_memory: Annotated[str | None, typer.Option(help="Of a GPU, such as `80GB`.")] = None,
    interconnect: Annotated[
        str | None,
        typer.Option(help="Links within and between nodes: names such as `nvlink4,ndr`, or GB/s a GPU as `450,50`."),
    ] = None,
    gpus_per_node: Annotated[int | None, typer.Option(help="GPUs of a node.")] = None,
    sequence_length: Annotated[int, typer.Option(help="Tokens of a sequence in training.")] = 4096,
    sequences_per_gpu: Annotated[int, typer.Option(help="Sequences of the global batch over the GPUs.")] = 1,
    precision: Annotated[str, typer.Option(help="float32, mixed (bf16 products) or bfloat16.")] = "mixed",
    optimizer: Annotated[str, typer.Option(help="adamw, adamw_8bit or sgd.")] = "adamw",
    as_json: JsonOption = False,
) -> None:
    """
    What a mixture would cost to store, train and serve. Reads the config alone, writes nothing.

    With `--gpus`, also the layouts of its training: memory of a GPU, bytes moved, time of a step, and what fits.
    """
    from transformers import AutoConfig

    from hf_sparse_moe.export import explain_export
    from hf_sparse_moe.models.configuration_sparse_moe import SparseMoeConfig
    from hf_sparse_moe.planning import Workload, make_machine, plan_layouts
    from hf_sparse_moe.upcycling import plan as make_plan

    machine = make_machine(gpu, gpu_memory, interconnect, gpus_per_node)
    workload = Workload(sequence_length, sequences_per_gpu, precision, optimizer)
    config = AutoConfig.from_pretrained(src, revision=revision) if gpus is not None else None
    report: dict[str, Any] = {}
    if not isinstance(config, SparseMoeConfig):
        method_and_layers = {"method": method, "layers": layers, "dtype": to_dtype(dtype), "revision": revision}
        report = make_plan(src, num_experts, num_experts_per_tok, **method_and_layers, **to_settings(settings))
        config = report.pop("config")
        report["exports"] = explain_export(config).possible
    plans = [] if gpus is None else plan_layouts(config, gpus, machine=machine, workload=workload)
    if as_json:
        if plans:
            report |= {"machine": asdict(machine), "workload": asdict(workload)}
            report["layouts"] = [each.to_dict() for each in plans]
        print_json(report)
        return
    console = Console()
    if report:
        _print_plan(report, console)
    if plans:
        _print_layouts(plans, machine, workload, console)


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


def _print_layouts(plans: list[LayoutPlan], machine: Machine, workload: Workload, console: Console) -> None:
    best = plans[0]
    table = Table("layout", "GB a GPU", "fits", "gathered", "scattered", "reduced", "dispatched", "ms a step")
    table.title = "GB that a GPU sends in a step, and its time with and without overlap"
    for plan in plans[:ROWS]:
        kinds = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")
        sent = [f"{plan.sent(kind) / 1e9:,.2f}" for kind in kinds]
        time = f"{1e3 * plan.fastest_seconds:,.0f} to {1e3 * plan.slowest_seconds:,.0f}"
        table.add_row(plan.name, f"{plan.memory.total / 1e9:,.1f}", "yes" if plan.fits else "no", *sent, time)
    for column in table.columns[1:]:
        column.justify = "right"
    console.print(table)
    if len(plans) > ROWS:
        console.print(f"{len(plans) - ROWS} slower or larger layouts are left out; --json has them.")
    if best.fits:
        rate = best.layout.gpus * workload.tokens_per_gpu
        memory = ", ".join(f"{name} {size / 1e9:,.2f}" for name, size in asdict(best.memory).items() if size)
        verdict = (
            f"[bold]{best.name}[/] is the fastest that fits: {rate / best.slowest_seconds:,.0f} to "
            f"{rate / best.fastest_seconds:,.0f} tokens a second. GB a GPU: {memory}."
        )
    else:
        smallest = min(plans, key=lambda plan: plan.memory.total)
        verdict = (
            f"[bold]Nothing fits[/] {machine.memory / 1e9:,.0f} GB; {smallest.name} comes nearest, with "
            f"{smallest.memory.total / 1e9:,.1f} GB. Take more GPUs, shorter sequences or `--optimizer adamw_8bit`."
        )
    console.print(verdict, highlight=False)
    console.print(
        f"Assumed: {workload.tokens_per_gpu:,} tokens a GPU in sequences of {workload.sequence_length:,}, even "
        f"routing, {workload.precision} precision, {workload.optimizer}; {machine.flops / 1e12:,.0f} TFLOPS used to "
        f"{machine.utilisation:.0%}; {machine.gpus_per_node} GPUs a node, which send {machine.intra / 1e9:,.0f} GB/s "
        f"in it and {machine.inter / 1e9:,.0f} GB/s out of it, used to {machine.link_utilisation:.0%}; a tenth of the "
        "memory left free. A calculation, not a measurement.",
        highlight=False,
    )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e7 else f"{count / 1e6:,.2f} MB"
