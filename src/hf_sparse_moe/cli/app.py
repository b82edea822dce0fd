"""The command `hf-sparse-moe` itself: its name, its exit codes, and what every command shares at the end."""

from __future__ import annotations

import signal
import sys
from typing import Annotated, Any

import typer

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


def main() -> None:
    """The entry point: bad input ends with one sentence and exit code 2, a Hub that cannot now with 3."""
    signal.signal(signal.SIGTERM, leave_on_signal)
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


def leave_on_signal(number: int, _: Any) -> None:
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
