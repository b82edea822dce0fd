"""`hf-sparse-moe`: one thin command a capability."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import hf_sparse_moe


BAD_INPUT, HUB_UNAVAILABLE = 2, 3

app = typer.Typer(
    name="hf-sparse-moe",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Turn any dense Transformers checkpoint into a sparse mixture of experts, and look at the result.",
    epilog="Exit codes: 0 done; 1 a check did not pass; 2 bad input, or refused by the Hub; 3 the Hub could not do it "
    "now, and the same command may succeed later. 2 and 3 come with one sentence on stderr that says what to do.",
)

ExpertsOption = Annotated[int, typer.Option(help="Routed experts of a layer.")]
TopKOption = Annotated[int, typer.Option(help="Experts that serve one token.")]
MethodOption = Annotated[str, typer.Option(help="How the experts start; `copy` keeps the function.")]
LayersOption = Annotated[
    str, typer.Option(help="Which layers become sparse: `all`, `none`, `every_N`, `first_N` or `last_N`.")
]
SettingsOption = Annotated[
    list[str],
    typer.Option("--set", help="NAME=VALUE, once or more: an option of the method, or a field of the config."),
]
DtypeOption = Annotated[str, typer.Option(help="Of the result, such as `bfloat16`; `auto` keeps the source's.")]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")]
SeedOption = Annotated[int, typer.Option(help="Of everything that is drawn at random.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with what a call that was killed left.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object, for programs.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hf-sparse-moe {hf_sparse_moe.__version__}")
        raise typer.Exit


@app.callback()
def options(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


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
        dtype=_dtype(dtype),
        revision=revision,
        allow_pickle=allow_pickle,
        max_shard_size=max_shard_size,
        resume=resume,
        show_progress=sys.stderr.isatty(),
        **_settings(settings),
    )
    architecture = json.loads((dst / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    if as_json:
        _print_json({"path": str(dst), "class": architecture, "receipt": receipt})
        return
    parameters = receipt["parameters"]
    console = Console()
    console.print(f"[bold]{escape(str(dst))}[/]: {architecture}", highlight=False)
    console.print(
        f"parameters {parameters['dense']:,} dense -> {parameters['total']:,}, {parameters['active']:,} active\n"
        f"{_difference(receipt['equality'])}",
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
        _print_json(report)
    else:
        verdict = "[green]verified[/]" if report["passed"] else "[red]not verified[/]"
        Console().print("\n".join([verdict, *map(escape, report["findings"])]), highlight=False)
    if not report["passed"]:
        raise typer.Exit(1)


@app.command(
    epilog="Examples:\n\n`hf-sparse-moe plan gpt2 --num-experts 16`\n\n"
    "`hf-sparse-moe plan ./llama --method split --num-experts 64 --num-experts-per-tok 8 --set granularity=8 --json`"
)
def plan(
    src: Annotated[str, typer.Argument(help="Folder or Hub id of a dense checkpoint.")],
    num_experts: ExpertsOption = 8,
    num_experts_per_tok: TopKOption = 2,
    method: MethodOption = "copy",
    layers: LayersOption = "all",
    settings: SettingsOption = [],  # noqa: B006 (typer copies it)
    dtype: DtypeOption = "auto",
    revision: RevisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """What a mixture would cost to store, train and serve. Reads the config alone, writes nothing."""
    from hf_sparse_moe.export import explain_export
    from hf_sparse_moe.upcycling import plan as make_plan

    report = make_plan(
        src,
        num_experts,
        num_experts_per_tok,
        method,
        layers=layers,
        dtype=_dtype(dtype),
        revision=revision,
        **_settings(settings),
    )
    report["exports"] = explain_export(report.pop("config")).possible
    if as_json:
        _print_json(report)
    else:
        _print_plan(report)


@app.command(epilog="Examples:\n\n`hf-sparse-moe info ./gpt2-8x`\n\n`hf-sparse-moe info user/gpt2-8x --json`")
def info(
    checkpoint: Annotated[str, typer.Argument(help="Folder or Hub id of a mixture.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a mixture is made of. Reads its config and receipt, not its weights."""
    from hf_sparse_moe.analysis.anatomy import describe_checkpoint

    description = describe_checkpoint(checkpoint, revision)
    if as_json:
        _print_json(description)
    else:
        _print_description(description)


@app.command(
    epilog="Examples:\n\n`hf-sparse-moe card ./gpt2-8x`\n\n"
    "`hf-sparse-moe card ./gpt2-8x --repo user/gpt2-8x --license mit --language en`"
)
def card(
    folder: Annotated[Path, typer.Argument(help="Of a saved mixture.")],
    repo: Annotated[
        str | None, typer.Option(help="`user/name` where it is published.", show_default="the folder's name")
    ] = None,
    license: Annotated[str | None, typer.Option(help="Such as apache-2.0.", show_default="as recorded")] = None,
    language: Annotated[list[str] | None, typer.Option(help="Code, such as en; once or more.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="A further tag; once or more.")] = None,
) -> None:
    """
    Render the model card from the files of a checkpoint, into its README.md.

    What a person wrote there stays: the text between `free` markers, sections with headings of their own, metadata.
    Reads no weights but their headers.
    """
    from hf_sparse_moe.hub import write_model_card

    typer.echo(write_model_card(folder, repo, license=license, language=language, tags=tag))


@app.command(epilog="Example:\n\n`hf-sparse-moe export ./qwen3-8x ./qwen3-8x-stock`")
def export(
    src: Annotated[str, typer.Argument(help="Folder or Hub id of a mixture.")],
    dst: Annotated[Path, typer.Argument(help="The folder to make; it appears when it is complete.")],
    target: Annotated[str, typer.Option(help="The `model_type` to write; `auto` takes the first that fits.")] = "auto",
    revision: RevisionOption = None,
    resume: ResumeOption = False,
) -> None:
    """Write a mixture as a stock architecture (Mixtral, Qwen3-MoE, ...), which servers load without this package."""
    from hf_sparse_moe.export import export as write_stock

    shown = sys.stderr.isatty()
    typer.echo(write_stock(src, dst, target, revision=revision, resume=resume, show_progress=shown))


@app.command("import-native", epilog="Example:\n\n`hf-sparse-moe import-native allenai/OLMoE-1B-7B-0924 ./olmoe`")
def import_native(
    src: Annotated[str, typer.Argument(help="Folder or Hub id of a stock mixture.")],
    dst: Annotated[Path, typer.Argument(help="The folder to make; it appears when it is complete.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")] = None,
) -> None:
    """Read a stock mixture (Mixtral, Qwen3-MoE, ...) into this package's classes."""
    from hf_sparse_moe.export import import_native as read_stock
    from hf_sparse_moe.upcycling.output import check_target, write_checkpoint
    from hf_sparse_moe.upcycling.source import find_source

    check_target(dst)
    write_checkpoint(read_stock(src, revision=revision), dst, find_source(src, revision).folder)
    typer.echo(dst)


@app.command(
    epilog="Examples:\n\n`hf-sparse-moe push ./gpt2-8x user/gpt2-8x`\n\n"
    "`hf-sparse-moe push ./gpt2-8x user/gpt2-8x --private --revision trained --tag v1`"
)
def push(
    folder: Annotated[Path, typer.Argument(help="Of a saved mixture, a stock model or an adapter.")],
    repo: Annotated[str, typer.Argument(help="`user/name`; created if it does not exist.")],
    private: Annotated[
        bool | None, typer.Option(help="For a new repository.", show_default="your own setting")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="A branch, made if it does not exist.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    message: Annotated[str | None, typer.Option(help="Of the commit.", show_default="Upload <class>")] = None,
    tag: Annotated[str | None, typer.Option(help="A name for the commit.")] = None,
    as_json: JsonOption = False,
) -> None:
    """
    Publish a checkpoint in one commit, with its code, card and a fingerprint of its outputs.

    The commit deletes the weight files that it supersedes. Pickles and training states are left out. Run it again
    after an interruption: large files that arrived are not sent twice. The token is that of `hf auth login`, or
    `HF_TOKEN`.
    """
    from hf_sparse_moe.hub import push_folder

    published = push_folder(
        folder,
        repo,
        private=private,
        revision=revision,
        create_pr=create_pr,
        commit_message=message,
        tag=tag,
    )
    commit = published.commit
    if as_json:
        url = commit.pr_url or str(commit)
        _print_json({"commit": commit.oid, "url": url, "files": published.files, "left_out": published.left_out})
        return
    typer.echo(f"{commit.pr_url or commit}\n{len(published.files)} files, commit {commit.oid}")
    if published.left_out:
        typer.echo(f"left out: {', '.join(published.left_out)}")


@app.command(epilog="Example:\n\n`hf-sparse-moe pull user/gpt2-8x ./gpt2-8x --revision v1`")
def pull(
    repo: Annotated[str, typer.Argument(help="`user/name`.")],
    dst: Annotated[Path, typer.Argument(help="The folder to make; it appears when it is complete.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.", show_default="main")] = None,
    as_json: JsonOption = False,
) -> None:
    """
    Fetch a checkpoint, all of one commit, with the size and hash of each file checked.

    Run it again after an interruption: files that arrived are not fetched twice. Pickles are left out, and nothing is
    run. With `HF_HUB_OFFLINE=1` it is copied from the cache.
    """
    from hf_sparse_moe.hub import pull as fetch

    pulled = fetch(repo, dst, revision=revision)
    if as_json:
        report = {"path": str(dst), "revision": pulled.revision, "files": pulled.files, "left_out": pulled.left_out}
        _print_json(report)
        return
    typer.echo(f"{dst}: {len(pulled.files)} files of {repo} at commit {pulled.revision}")
    if pulled.left_out:
        typer.echo(f"left out: {', '.join(pulled.left_out)}")


@app.command(
    epilog="Examples:\n\n`hf-sparse-moe doctor ./gpt2-8x`\n\n`hf-sparse-moe doctor user/gpt2-8x --revision v1`\n\n"
    "Exit code 1 where a check failed."
)
def doctor(
    checkpoint: Annotated[str, typer.Argument(help="Folder or Hub id of a mixture.")],
    revision: RevisionOption = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Also run the code in the checkpoint. Read that code first."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Load a checkpoint in a fresh process, and check that it is whole and computes what was published."""
    from hf_sparse_moe.hub import doctor as examine

    diagnosis = examine(checkpoint, revision=revision, trust_remote_code=trust_remote_code)
    if as_json:
        _print_json({"healthy": diagnosis.healthy, "revision": diagnosis.revision, "findings": diagnosis.as_rows()})
    else:
        colours = {"passed": "green", "failed": "red", "warning": "yellow", "not checked": "dim"}
        table = Table("check", "", "")
        for check, verdict, told in diagnosis.as_rows():
            table.add_row(check, f"[{colours[verdict]}]{verdict}[/]", escape(told))
        Console().print(table)
    if not diagnosis.healthy:
        raise typer.Exit(1)


@app.command(
    epilog="Examples:\n\n`hf-sparse-moe quickstart`\n\n"
    "`hf-sparse-moe quickstart --model ./my-llama --data ./my-texts --steps 100 --learning-rate 5e-5`\n\n"
    "`hf-sparse-moe quickstart --push-to user/first-mixture`"
)
def quickstart(
    model: Annotated[
        str | None,
        typer.Option(help="Folder or Hub id of a dense language model; without one, a small one is trained."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Folder of .jsonl(.gz) and .txt(.gz) files, a domain each (or a column `domain`), or a Hub data set "
            "with a column `text`; without one, text of this Python installation."
        ),
    ] = None,
    output: Annotated[
        str | None, typer.Option(help="The folder to make.", show_default="quickstart, quickstart-2, ...")
    ] = None,
    push_to: Annotated[
        str | None, typer.Option(help="`user/name` to publish to; `HF_ENDPOINT` names the Hub.")
    ] = None,
    num_experts: ExpertsOption = 8,
    num_experts_per_tok: TopKOption = 2,
    dense_steps: Annotated[int, typer.Option(min=1, help="Training steps of the small dense model.")] = 300,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of the mixture, and of its dense twin.")] = 160,
    adapter_steps: Annotated[int, typer.Option(min=1, help="Training steps of the adapter.")] = 40,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences of a step.")] = 16,
    sequence_length: Annotated[int, typer.Option(min=8, help="Tokens of a sequence.")] = 128,
    learning_rate: Annotated[float, typer.Option(help="Of mixture and twin; the adapter's is twice that.")] = 1e-3,
    seed: SeedOption = 0,
) -> None:
    """
    The whole story in minutes: dense model, mixture, training beside its dense twin, comparison by domain, adapter,
    sharing, reloading, a picture of which expert served which domain.
    """
    arguments = dict(locals())
    from transformers.utils import logging

    from hf_sparse_moe.quickstart import QuickstartOptions, run_quickstart

    logging.disable_progress_bar()
    run_quickstart(QuickstartOptions(**arguments))


def main() -> None:
    """The entry point: bad input ends with one sentence and exit code 2, a Hub that cannot now with 3."""
    signal.signal(signal.SIGTERM, _leave)
    try:
        _quiet_libraries()
        app()
    except (ValueError, OSError, ImportError) as error:
        if isinstance(error, ImportError) and error.name is not None:
            raise  # a fault of an installation; an extra that is missing is told by us, and has no `name`
        typer.echo(f"Error: {' '.join(str(error).split())}", err=True)
        sys.exit(_exit_code(error))


def _exit_code(error: Exception) -> int:
    passing = isinstance(error, ConnectionError) and not isinstance(error, BrokenPipeError)
    return HUB_UNAVAILABLE if passing else BAD_INPUT


def _leave(number: int, _: Any) -> None:
    """Leave through every `finally`, so that no half-written folder stays."""
    sys.exit(128 + number)


def _quiet_libraries() -> None:
    """Progress bars are for people; warnings of the libraries underneath would bury our one sentence."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()  # its warnings show addresses, some of them signed
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def _dtype(name: str) -> Any:
    import torch

    if name == "auto":
        return name
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"`--dtype {name}` is not allowed: it must be auto, float32, bfloat16 or float16.")
    return dtype


def _settings(assignments: Sequence[str]) -> dict[str, Any]:
    """`name=value` each; a value is JSON where it can be read as such, else a word."""
    settings: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"`--set {assignment}` is not allowed: it must be NAME=VALUE, such as granularity=4.")
        try:
            settings[name] = json.loads(value)
        except json.JSONDecodeError:
            settings[name] = value
    return settings


def _batches(text: Path, checkpoint: str, revision: str | None) -> list[dict[str, Any]]:
    """A text file as batches of the checkpoint's own objective: next, masked or following tokens."""
    from transformers import AutoConfig, AutoTokenizer

    from hf_sparse_moe.quickstart.examples import make_examples

    tokenizer = AutoTokenizer.from_pretrained(checkpoint, revision=revision)
    config = AutoConfig.from_pretrained(checkpoint, revision=revision)
    examples = make_examples([text.read_text(encoding="utf-8")], tokenizer, type(config), length=128, limit=64)
    return [{name: tensor.unsqueeze(0) for name, tensor in example.items()} for example in examples]


def _difference(equality: dict[str, Any]) -> str:
    if "max_abs_difference" not in equality:
        return f"difference to the dense outputs: {equality['note']}"
    return (
        f"largest difference to the dense outputs {equality['max_abs_difference']:.1e} on {equality['probe_tokens']} "
        f"tokens in {equality['dtype']}, where they reach {equality['max_abs_output']:.1f}"
    )


def _print_plan(report: dict[str, Any]) -> None:
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
    console = Console()
    console.print(facts, highlight=False)
    console.print(memory)
    console.print(report["rule_of_thumb"], highlight=False)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e7 else f"{count / 1e6:,.2f} MB"


def _print_json(value: dict[str, Any]) -> None:
    typer.echo(json.dumps(value, indent=2))


def _print_description(description: dict[str, Any]) -> None:
    console = Console()
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name in ("family", "class", "dense_architecture", "num_experts", "num_experts_per_tok", "sparse_layers"):
        facts.add_row(name.replace("_", " "), escape(str(description[name])))
    facts.add_row("FLOPs a token", f"{description['flops_per_token']:,}")
    console.print(facts, highlight=False)
    parts = Table("parameters", "total", "active for a token")
    for column in parts.columns[1:]:
        column.justify = "right"
    for name, count in description["parameters"].items():
        if name == "total":
            parts.add_section()
        parts.add_row(name, f"{count['total']:,}", f"{count['active']:,}")
    console.print(parts)
    receipt = description["receipt"]
    if receipt is None:
        console.print("No receipt: it does not say how it was made.")
        return
    source = receipt["source"]
    console.print(
        f"receipt: {escape(str(receipt['arguments']['method']))} of {escape(str(source['name_or_path']))} "
        f"({escape(source['architecture'])}), seed {receipt['arguments']['seed']}; {_difference(receipt['equality'])}",
        highlight=False,
    )


if __name__ == "__main__":
    main()
