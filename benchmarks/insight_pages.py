"""
Two pages of `hf-sparse-moe look`, of a mixture trained on ten domains and of the Qwen3-MoE exported from it, for
docs/insight.md. Half an hour on one core.

    python benchmarks/insight_pages.py FOLDER --data DOMAINS

`FOLDER` gets the mixture, its checkpoints, the stock model and the pages; what is there already is not made again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments

from hf_sparse_moe import RoutingMonitor, add_leading_callback, export, upcycle
from hf_sparse_moe.cli import app
from hf_sparse_moe.models.configuration_sparse_moe import SparseMoeDecoderConfig
from hf_sparse_moe.quickstart.corpus import load_corpus
from hf_sparse_moe.quickstart.examples import interleave, make_examples
from hf_sparse_moe.quickstart.small_dense_model import new_dense_model, train_tokenizer


LENGTH, BATCH = 128, 16


def make_mixture(folder: Path, data: str, dense_steps: int, steps: int) -> None:
    corpus = load_corpus(data)
    tokenizer = train_tokenizer(text for texts in corpus.train.values() for text in texts)
    config, limit = SparseMoeDecoderConfig, steps * BATCH
    examples = {name: make_examples(texts, tokenizer, config, LENGTH, limit) for name, texts in corpus.train.items()}
    dense = new_dense_model(tokenizer, seed=0)
    _fit(dense, interleave(examples, dense_steps * BATCH, 0), folder / "dense-run", 3e-3, save=False)
    mixture = upcycle(dense, num_experts=8, num_experts_per_tok=2, dtype=torch.float32, router_aux_loss_coef=0.01)
    _fit(mixture, interleave(examples, steps * BATCH, 1), folder / "run", 2e-3, save=True)
    mixture.save_pretrained(folder / "mixture")
    tokenizer.save_pretrained(folder / "mixture")


def _fit(model, examples, folder: Path, learning_rate: float, save: bool) -> None:
    args = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH,
        num_train_epochs=1,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        save_strategy="steps" if save else "no",
        save_steps=0.1,
        save_only_model=True,
        logging_steps=10,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(model, args, train_dataset=examples)
    if save:
        add_leading_callback(trainer, RoutingMonitor())
    trainer.train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", required=True, help="folder of train/ and valid/, a .jsonl.gz a domain")
    parser.add_argument("--dense-steps", type=int, default=300)
    parser.add_argument("--steps", type=int, default=700)
    options = parser.parse_args()
    folder = options.folder
    if not (folder / "mixture").is_dir():
        make_mixture(folder, options.data, options.dense_steps, options.steps)
    if not (folder / "stock").is_dir():
        export(folder / "mixture", folder / "stock")
    files = [f"--data={path}" for path in sorted((Path(options.data) / "valid").glob("*.jsonl.gz"))]
    common = [*files, "--group-by=domain", "--max-texts=120", "--max-length=96", "--batch-size=24", "--ablate"]
    run = f"--checkpoints={folder / 'run'}"
    for arguments in (
        [str(folder / "mixture"), *common, run, f"--output={folder / 'mixture.html'}"],
        [str(folder / "stock"), *common, f"--output={folder / 'stock.html'}"],
    ):
        app(["look", *arguments], standalone_mode=False)


if __name__ == "__main__":
    main()
