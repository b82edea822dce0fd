"""Runs the command line in this process, as the installed script does."""

import io
import re
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from unittest.mock import patch

from transformers.utils import logging

from hf_sparse_moe.cli import main


@dataclass
class Finished:
    code: int
    out: str
    err: str


def run_cli(*arguments: object, bars: bool = False) -> Finished:
    """`hf-sparse-moe <arguments>`; puts back what the script may change in its process."""
    out, err = io.StringIO(), io.StringIO()
    handler, verbosity = signal.getsignal(signal.SIGTERM), logging.get_verbosity()
    had_bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # which the script asks for before transformers is imported
    (logging.enable_progress_bar if bars else logging.disable_progress_bar)()
    code = 0
    with (
        redirect_stdout(out),
        redirect_stderr(err),
        patch.object(sys, "argv", ["hf-sparse-moe", *map(str, arguments)]),
        patch.dict("os.environ", {"COLUMNS": "120", "NO_COLOR": "1"}),
    ):
        try:
            main()
        except SystemExit as leaving:
            code = leaving.code or 0
    signal.signal(signal.SIGTERM, handler)
    logging.set_verbosity(verbosity)
    (logging.enable_progress_bar if had_bars else logging.disable_progress_bar)()
    return Finished(code, out.getvalue(), re.sub(r"\x1b\[[0-9;]*m", "", err.getvalue()))


def assert_one_sentence(finished: Finished, *parts: str) -> None:
    """Exit code 2, nothing on stdout, one line on stderr that says all of `parts` and ends as a sentence."""
    assert finished.code == 2, finished
    assert finished.out == ""
    assert re.fullmatch(r"Error: [^\n]+\n", finished.err), finished.err
    for part in parts:
        assert part in finished.err
