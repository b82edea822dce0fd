"""Running the recipes of training/ as a person does, and reading what they leave."""

import json
import os
import subprocess
import tempfile
from pathlib import Path

from processes import run_script


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
    with tempfile.TemporaryDirectory() as folder:
        code, output = run_script(TRAINING / script, line, Path(folder) / "output")
    assert code == 0, output[-4000:]
    return output


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
