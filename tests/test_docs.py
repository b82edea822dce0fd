"""Every python block of the README and the docs runs, offline, on small checkpoints that stand in the ids' places."""

import re
import shlex
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from hf_sparse_moe.cli import app
from tiny_models import tiny_dense


ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
# A folder of this name in the working directory is what `from_pretrained` and `upcycle` find first.
STAND_INS = {
    "Qwen/Qwen3-0.6B": ("qwen3", {}),
    "google-bert/bert-base-uncased": ("bert", {}),
    "google/flan-t5-small": ("t5_gated", {"num_layers": 8}),
}
# Commands that take minutes, a server or a file of text have tests of their own.
LONG_COMMANDS = ("quickstart", "push", "pull", "look", "evaluate")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stand_ins")
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=["<pad>", "<s>", "</s>", "<unk>"])
    tokenizer.train_from_iterator(["Once upon a time there was a mixture of experts."], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    for name, (architecture, fields) in STAND_INS.items():
        tiny_dense(architecture, **fields).save_pretrained(folder / name)
        fast.save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page, stand_ins, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in STAND_INS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(stand_ins / name)
    namespace: dict = {"__name__": "__main__"}
    for number, block in enumerate(blocks(page, "python"), start=1):
        exec(compile(block, f"{page.name}, python block {number}", "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_run(page, stand_ins, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in STAND_INS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(stand_ins / name)
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["hf-sparse-moe"] and words[1] not in LONG_COMMANDS:
                result = CliRunner().invoke(app, words[1:])
                assert result.exit_code == 0, f"{line}\n{result.output}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?://)([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_docs_stay_short():
    words = {
        page.name: sum(
            any(map(str.isalnum, part)) for part in page.read_text(encoding="utf-8").split()
        )  # no table lines
        for page in PAGES
        if page.parent.name == "docs"
    }
    assert sum(words.values()) <= 20_000, f"Say a thing once and link to it: {words}"
