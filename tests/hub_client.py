"""Client processes for the tests' Hub: `huggingface_hub` reads HF_ENDPOINT and HF_HOME when it is imported."""

import inspect
import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

from cli_client import Finished


TESTS = Path(__file__).parent
WORKER = TESTS / "hub" / "client_worker.py"


class ClientError(AssertionError):
    """What a function raised in the client's process: `kinds` names its class and the classes above it."""

    def __init__(self, kinds: list[str], message: str):
        super().__init__(f"{kinds[0]}: {message}")
        self.kinds, self.message = kinds, message


def run_script(arguments: list[str], tests: str) -> list:
    import sys

    sys.path[:0] = [] if tests in sys.path else [tests]
    from types import SimpleNamespace

    from huggingface_hub.utils import _http

    from cli_client import run_cli
    from hf_sparse_moe.hub import errors

    errors.FIRST_PAUSE = 0.01
    _http.time = SimpleNamespace(sleep=lambda seconds: None)  # its backoff
    finished = run_cli(*arguments)
    return [finished.code, finished.out, finished.err]


class ClientProcess:
    """A Python process that runs functions of the tests. They import inside their body and speak JSON."""

    def __init__(self, environment: dict[str, str], *options: str):
        command = [sys.executable, *options, str(WORKER)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True, encoding="utf-8")

    def __call__(self, function: Callable, **arguments: object) -> object:
        source = textwrap.dedent(inspect.getsource(function))
        job = {"source": source, "name": function.__name__, "arguments": arguments}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline() or '{"kinds": ["ProcessDied"], "message": "see stderr"}')
        if "kinds" in answer:
            raise ClientError(answer["kinds"], answer["message"])
        return answer["result"]

    def cli(self, *arguments: object) -> Finished:
        """`hf-sparse-moe <arguments>` in the client's process."""
        return Finished(*self(run_script, arguments=[str(argument) for argument in arguments], tests=str(TESTS)))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(timeout=30)
