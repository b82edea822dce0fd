"""The recipes' commands on the pages run as they stand, on small checkpoints and files in the names' places."""

import re
import shlex
from pathlib import Path

import pytest

from training_runs import results


ROOT = Path(__file__).parents[2]
PAGES = ("training.md", "embeddings.md")
TEXT = "\n".join((ROOT / "docs" / page).read_text(encoding="utf-8") for page in PAGES)
LINES = [
    shlex.split(line, comments=True)
    for block in re.findall(r"^```bash\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
    for line in block.replace("\\\n", " ").splitlines()
]
COMMANDS = [line for line in LINES if line and line[0] != "hf-sparse-moe"]
STAND_INS = {
    "Qwen/Qwen3-0.6B": "decoder",
    "google-bert/bert-base-uncased": "encoder",
    "google/flan-t5-small": "encoder_decoder",
}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[-1])
def test_command(command, checkpoints, files, call_recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, family in STAND_INS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(checkpoints[family])
    (tmp_path / "corpus").mkdir()
    for source, place in (
        ("docs.jsonl.gz", "corpus/docs.jsonl.gz"),
        ("docs.txt", "corpus/docs.txt"),
        ("docs.jsonl", "pairs.jsonl"),
    ):
        (tmp_path / place).symlink_to(files[source])
    script = next(position for position, word in enumerate(command) if word.startswith("training/run_"))
    if command[0] == "accelerate":  # launching is tested elsewhere
        assert command[:3] == ["accelerate", "launch", "--config_file"]
        assert (ROOT / command[3]).is_file()
    else:
        assert command[:script] == ["python"]
    brief = ["--max_steps", "1", "--max_eval_samples", "4", "--use_cpu", "true", "--save_strategy", "no"]
    call_recipe(Path(command[script]).name, *command[script + 1 :], *brief)
    assert {"train_loss", "eval_loss"} <= set(results(tmp_path / command[-1]))
