"""`card`, `push`, `pull`, `doctor`: a checkpoint on its way to the Hub and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .app import app
from .options import JsonOption, RevisionOption, print_json


BaseOption = Annotated[
    str | None,
    typer.Option("--base", help="Of an adapter: folder or Hub id of its base.", show_default="what the adapter names"),
]


@app.command(
    epilog="Examples:\n\n`hf-sparse-moe card ./gpt2-8x`\n\n"
    "`hf-sparse-moe card ./gpt2-8x --repo user/gpt2-8x --license mit --language en`"
)
def card(
    folder: Annotated[Path, typer.Argument(help="Of a saved mixture, or an adapter.")],
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
    Reads no weights but their headers, and an adapter's.
    """
    from hf_sparse_moe.hub import write_model_card

    typer.echo(write_model_card(folder, repo, license=license, language=language, tags=tag))


@app.command(
    epilog="Examples:\n\n`hf-sparse-moe push ./gpt2-8x user/gpt2-8x`\n\n"
    "`hf-sparse-moe push ./gpt2-8x user/gpt2-8x --private --revision trained --tag v1`\n\n"
    "`hf-sparse-moe push ./adapter user/gpt2-8x-law --base user/gpt2-8x`"
)
def push(
    folder: Annotated[Path, typer.Argument(help="Of a saved mixture, a stock model or an adapter.")],
    repo: Annotated[str, typer.Argument(help="`user/name`; created if it does not exist.")],
    base: BaseOption = None,
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
    Publish a checkpoint or an adapter in one commit, with its code, card and a fingerprint of its outputs.

    The commit deletes the weight files that it supersedes. Pickles and training states are left out. Run it again
    after an interruption: large files that arrived are not sent twice. The token is that of `hf auth login`, or
    `HF_TOKEN`.
    """
    from hf_sparse_moe.hub import push_folder

    published = push_folder(
        folder,
        repo,
        base=base,
        private=private,
        revision=revision,
        create_pr=create_pr,
        commit_message=message,
        tag=tag,
    )
    commit = published.commit
    if as_json:
        url = commit.pr_url or str(commit)
        print_json({"commit": commit.oid, "url": url, "files": published.files, "left_out": published.left_out})
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
        print_json(report)
        return
    typer.echo(f"{dst}: {len(pulled.files)} files of {repo} at commit {pulled.revision}")
    if pulled.left_out:
        typer.echo(f"left out: {', '.join(pulled.left_out)}")


@app.command(
    epilog="Examples:\n\n`hf-sparse-moe doctor ./gpt2-8x`\n\n`hf-sparse-moe doctor user/gpt2-8x --revision v1`\n\n"
    "Exit code 1 where a check failed."
)
def doctor(
    checkpoint: Annotated[str, typer.Argument(help="Folder or Hub id of a mixture, or of an adapter.")],
    revision: RevisionOption = None,
    base: BaseOption = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Also run the code in the checkpoint. Read that code first."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """
    Load a checkpoint in a fresh process, and check that it is whole and computes what was published. An adapter is
    loaded with its base.
    """
    from hf_sparse_moe.hub import doctor as examine

    diagnosis = examine(checkpoint, revision=revision, base=base, trust_remote_code=trust_remote_code)
    if as_json:
        print_json({"healthy": diagnosis.healthy, "revision": diagnosis.revision, "findings": diagnosis.as_rows()})
    else:
        colours = {"passed": "green", "failed": "red", "warning": "yellow", "not checked": "dim"}
        table = Table("check", "", "")
        for check, verdict, told in diagnosis.as_rows():
            table.add_row(check, f"[{colours[verdict]}]{verdict}[/]", escape(told))
        Console().print(table)
    if not diagnosis.healthy:
        raise typer.Exit(1)
