"""The recipes' commands on the pages run as they stand, on small checkpoints and files in the names' places."""

import re
import shlex
from pathlib import Path

import pytest

from training_runs import results


ROOT = Path(__file__).parents[2]
PAGES = ("training.md", "embeddings.md")
TEXTS = {page: (ROOT / "docs" / page).read_text(encoding="utf-8") for page in PAGES}
TEXT = "\n".join(TEXTS.values())
BLOCKS = {page: re.findall(r"^```py\n(.*?)^```", text, re.DOTALL | re.MULTILINE)[0] for page, text in TEXTS.items()}
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


@pytest.fixture
def run(checkpoints, files, call_recipe, tmp_path, monkeypatch):
    """Runs a command of the pages, in a folder that has what they name."""
    monkeypatch.chdir(tmp_path)
    for name, family in STAND_INS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(checkpoints[family])
    (tmp_path / "corpus").mkdir()
    for source, place in (
        ("docs.jsonl.gz", "corpus/docs.jsonl.gz"),
        ("docs.txt", "corpus/docs.txt"),
        ("docs.jsonl", "pairs.jsonl"),
        *((name, name) for name in ("words.jsonl", "squad.jsonl", "multi30k.jsonl")),
    ):
        (tmp_path / place).symlink_to(files[source])

    def run(command: list[str]) -> None:
        script = next(position for position, word in enumerate(command) if word.startswith("training/run_"))
        if command[0] == "accelerate":  # launching is tested elsewhere
            assert command[:3] == ["accelerate", "launch", "--config_file"]
            assert (ROOT / command[3]).is_file()
        else:
            assert command[:script] == ["python"]
        brief = ["--max_steps", "1", "--max_eval_samples", "4", "--use_cpu", "true", "--save_strategy", "no"]
        call_recipe(Path(command[script]).name, *command[script + 1 :], *brief)

    return run


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[-1])
def test_command(command, run, tmp_path):
    run(command)
    assert {"train_loss", "eval_loss"} <= set(results(tmp_path / command[-1]))


def test_the_models_are_used_as_the_page_says(run, capsys):
    """Every task's model, after a step of its command: texts, labels, and an answer that is a part of its context."""
    block = BLOCKS["training.md"]
    commands = [command for command in COMMANDS if f'"{command[-1]}"' in block]
    assert len(commands) == block.count("print(") == 6
    for command in commands:
        run(command)
    capsys.readouterr()
    exec(compile(block, "docs/training.md", "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("[{'generated_text': 'Once upon a time")
    assert "'label': 'long'" in printed[1] or "'label': 'short'" in printed[1]
    assert printed[2].startswith("[{'entity_group'") or printed[2] == "[]"
    assert printed[-1]
    assert printed[-1] in "Ada Lovelace was born in London."


def test_the_trained_encoder_searches(run, capsys):
    (command,) = [command for command in COMMANDS if command[-1] == "outputs/search"]
    run(command)
    capsys.readouterr()
    namespace: dict = {}
    exec(compile(BLOCKS["embeddings.md"], "docs/embeddings.md", "exec"), namespace)
    assert capsys.readouterr().out.startswith(tuple(namespace["documents"]))
