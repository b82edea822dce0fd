"""Running the recipes of training/ as a person does, and reading what they leave."""

import json
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing import current_process
from pathlib import Path

from processes import in_processes


TRAINING = Path(__file__).parents[1] / "training"
# Enough to be quick and quiet; every recipe gets them.
COMMON = {
    "num_experts": 4,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 8,
    "max_length": 32,
    "max_steps": 10,
    "logging_steps": 5,
    "use_cpu": True,
    "dataloader_pin_memory": False,
}


def command_line(arguments: dict) -> list[str]:
    line = []
    for name, value in {**COMMON, **arguments}.items():
        values = value if isinstance(value, list) else [value]
        line += [] if value is None else [f"--{name}", *map(str, values)]
    return line


def run_recipe(script: str, *line: str) -> str:
    """A recipe as the main script of a process of its own, forked from one that has imported torch; its output."""
    with tempfile.NamedTemporaryFile("r") as output:
        codes = in_processes(1, run_as_main, script, line, output.name)
        told = output.read()
    assert codes == [0], told[-4000:]
    return told


def run_as_main(script: str, line: Sequence[str], output: str | None = None) -> None:
    """To run in a process of its own: a recipe as its main script, whose output goes to a file."""
    if output is not None:
        with open(output, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    current_process().name = "MainProcess"  # by which libraries tell a script from a worker
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    sys.path.insert(0, str(TRAINING))
    sys.argv = [script, *line]
    runpy.run_path(str(TRAINING / script), run_name="__main__")


def launch_recipe(script: str, *line: str, launcher: tuple[str, ...]) -> None:
    """A recipe as a person launches it on several processes; `line` as from [`command_line`], or one file."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [*launcher, str(TRAINING / script), *line]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-4000:]


def results(folder: Path) -> dict:
    return json.loads((folder / "all_results.json").read_text())


def history(folder: Path) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]
