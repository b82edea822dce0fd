"""`card`, `push`, `pull`, `doctor`: sharing checkpoints on the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from .app import app
from .options import BaseOption, JsonOption, OutputArgument, RevisionOption, show


@app.command(
    epilog="Examples:\n\n`hf-sparse-moe card ./gpt2-8x`\n\n"
    "`hf-sparse-moe card ./gpt2-8x --repo-id user/gpt2-8x --license mit --language en`"
)
def card(
    source: Annotated[Path, typer.Argument(help="Folder of a mixture or an adapter.")],
    repo_id: Annotated[
        str | None,
        typer.Option("--repo-id", "--repo", help="`user/name` on the Hub.", show_default="as before"),
    ] = None,
    license: Annotated[str | None, typer.Option(help="Such as apache-2.0.", show_default="as recorded")] = None,
    language: Annotated[list[str] | None, typer.Option(help="Language code, such as en. Repeatable.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="An additional tag. Repeatable.")] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Hub id of the dense source.", show_default="as recorded")
    ] = None,
) -> None:
    """
    Write the model card of a checkpoint into its README.md.

    Keeps what you wrote there: text above and below the generated part, and metadata. Reads no weights.
    """
    from hf_sparse_moe.hub import write_model_card

    typer.echo(write_model_card(source, repo_id, license=license, language=language, tags=tag, base_model=base_model))


@app.command(
    epilog="Examples:\n\n`hf-sparse-moe push ./gpt2-8x user/gpt2-8x`\n\n"
    "`hf-sparse-moe push ./gpt2-8x user/gpt2-8x --private --revision trained --tag v1`\n\n"
    "`hf-sparse-moe push ./adapter user/gpt2-8x-law --base user/gpt2-8x`"
)
def push(
    source: Annotated[Path, typer.Argument(help="Folder of a mixture, a stock model or an adapter.")],
    repo_id: Annotated[str, typer.Argument(help="`user/name` on the Hub; created if it does not exist.")],
    base: BaseOption = None,
    private: Annotated[
        bool | None, typer.Option(help="Visibility of a new repository.", show_default="your Hub setting")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; created if it does not exist.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    message: Annotated[str | None, typer.Option(help="Commit message.", show_default="Upload <class>")] = None,
    tag: Annotated[str | None, typer.Option(help="Tag to create on the commit.")] = None,
    fingerprint: Annotated[
        bool | None,
        typer.Option(
            help="Add outputs that `doctor` compares; loads the weights.", show_default="for weights up to 4 GiB"
        ),
    ] = None,
    with_report: Annotated[
        Path | None, typer.Option(help="A page of `look` to publish beside it; it shows the text it was made from.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """
    Publish a checkpoint or an adapter in one commit, with its code and model card.

    The commit deletes the weight files that it replaces, and leaves out pickles and training state. After an
    interruption run it again: large files that were uploaded are not sent twice. Uses the token of `hf auth login` or
    `HF_TOKEN`.
    """
    from hf_sparse_moe.hub import push as publish

    published = publish(
        source,
        repo_id,
        base=base,
        private=private,
        revision=revision,
        create_pr=create_pr,
        commit_message=message,
        tag=tag,
        fingerprint=fingerprint,
        with_report=with_report,
    )
    report = published.to_dict()
    told = f"{report['url']}\n{len(published.files)} files, commit {report['commit']}"
    show(report, as_json, told, *_left_out(published.left_out))


@app.command(epilog="Example:\n\n`hf-sparse-moe pull user/gpt2-8x ./gpt2-8x --revision v1`")
def pull(
    repo_id: Annotated[str, typer.Argument(help="`user/name` on the Hub.")],
    output: OutputArgument,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.", show_default="main")] = None,
    as_json: JsonOption = False,
) -> None:
    """
    Download a checkpoint from the Hub, all of one commit, and check the size and hash of each file.

    After an interruption run it again: complete files are not downloaded twice. Pickles are left out, and no code is
    run.
    """
    from hf_sparse_moe.hub import pull as download

    pulled = download(repo_id, output, revision=revision)
    told = f"{output}: {len(pulled.files)} files of {repo_id} at commit {pulled.revision}"
    show(pulled.to_dict(), as_json, told, *_left_out(pulled.left_out))


def _left_out(names: list[str]) -> list[str]:
    return [f"left out: {', '.join(names)}"] if names else []


@app.command(
    epilog="Examples:\n\n`hf-sparse-moe doctor ./gpt2-8x`\n\n`hf-sparse-moe doctor user/gpt2-8x --revision v1`\n\n"
    "The exit code is 1 if a check failed."
)
def doctor(
    source: Annotated[str, typer.Argument(help="Folder or Hub id of a mixture or an adapter.")],
    revision: RevisionOption = None,
    base: BaseOption = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Also run the checkpoint's own code. Read that code first."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """
    Load a checkpoint, and check that it is complete and computes what was published.

    An adapter is loaded with its base model.
    """
    from hf_sparse_moe.hub import doctor as examine

    report = examine(source, revision=revision, base=base, trust_remote_code=trust_remote_code)
    colours = {"passed": "green", "failed": "red", "warning": "yellow", "not checked": "dim"}
    table = Table("check", "", "")
    for finding in report.findings:
        table.add_row(finding.check, f"[{colours[finding.verdict]}]{finding.verdict}[/]", escape(finding.detail))
    show(report.to_dict(), as_json, table)
    if not report.healthy:
        raise typer.Exit(1)
