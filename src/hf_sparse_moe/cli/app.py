"""The command `hf-sparse-moe` itself: its exit codes, and how an error becomes one sentence."""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from typing import Annotated, Any

import typer

import hf_sparse_moe


BAD_INPUT, HUB_UNAVAILABLE, FAULT = 2, 3, 70

app = typer.Typer(
    name="hf-sparse-moe",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Turn any dense Transformers checkpoint into a sparse mixture of experts, inspect it and share it.",
    epilog="Exit codes: 0 success; 1 a check did not pass; 2 bad input, or the Hub refused the request; 3 the Hub is "
    "not available, and the same command may succeed later; 70 a bug. With 2 and 3, one sentence on stderr says what "
    "to do.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hf-sparse-moe {hf_sparse_moe.__version__}")
        raise typer.Exit


@app.callback()
def options(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    __: Annotated[
        bool,
        typer.Option(
            "--debug",
            help="Show the traceback of an error, before or after the command; `HF_SPARSE_MOE_DEBUG=1` does the same.",
        ),
    ] = False,
) -> None:
    pass


def main() -> None:
    """The entry point: an error that a user can act on ends with one sentence and exit code 2 or 3."""
    signal.signal(signal.SIGTERM, leave_on_signal)
    # The libraries' warnings would bury our one sentence, and some of the Hub's show signed addresses.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    for name in ("torchao", "torch.utils._pytree"):  # which transformers imports where it is installed
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1 or os.environ.get("HF_SPARSE_MOE_DEBUG", "0") not in ("", "0")
    try:
        app(args=arguments)
    except Exception as error:  # noqa: BLE001  Python would exit with 1, which says that a check did not pass
        sentence = _sentence(error)
        if debug or sentence is None:
            traceback.print_exc()
        if sentence is None:
            sys.exit(FAULT)
        typer.echo(f"Error: {sentence}", err=True)
        unavailable = isinstance(error, ConnectionError) and not isinstance(error, BrokenPipeError)
        sys.exit(HUB_UNAVAILABLE if unavailable else BAD_INPUT)


def _sentence(error: Exception) -> str | None:
    """What to tell a user; None for an error that is a bug here or a broken installation."""
    told = " ".join(str(error).split())
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "memory" in told):
        return f"Out of memory. {told}".strip()
    if isinstance(error, ImportError):
        return told if error.name is None else None  # a missing extra is reported by us, without a `name`
    from huggingface_hub.errors import StrictDataclassError  # only now: `--help` starts without it

    # The last: settings of a config that transformers takes apart and not together.
    return told if isinstance(error, ValueError | OSError | StrictDataclassError) else None


def leave_on_signal(number: int, _: Any) -> None:
    """Leave through every `finally`, so that no half-written folder stays."""
    sys.exit(128 + number)
