"""Which of TRL's trainers train a mixture, with which settings: the table of docs/training.md."""

import re
from pathlib import Path

import pytest
import torch
import transformers as hf
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from hf_sparse_moe import SparseMoeDecoderConfig


PAGE = Path(__file__).parents[2] / "docs" / "training.md"
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
SIZES = {
    "vocab_size": 96,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {word: place for place, word in enumerate([*SPECIAL, *(f"w{i}" for i in range(92))])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return hf.PreTrainedTokenizerFast(tokenizer_object=words, **names)


def text(length: int) -> str:
    return " ".join(f"w{place}" for place in torch.randint(92, (length,)).tolist())


def mixture(coefficient: float, auto_class=hf.AutoModelForCausalLM, **fields):
    config = SparseMoeDecoderConfig.from_dense(
        hf.Qwen2Config(**SIZES), num_experts=4, router_aux_loss_coef=coefficient, **fields
    )
    return auto_class.from_config(config)


class SFTWithTransformersLoss(SFTTrainer):
    compute_loss = hf.Trainer.compute_loss


def settings(config_class, folder, **arguments):
    return config_class(
        str(folder),
        max_steps=1,
        report_to=[],
        per_device_train_batch_size=4,
        logging_steps=1,
        use_cpu=True,
        save_strategy="no",
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        **arguments,
    )


def sft(folder, tokenizer, coefficient, trainer=SFTTrainer):
    rows = Dataset.from_list([{"text": text(12)} for _ in range(8)])
    args = settings(SFTConfig, folder, max_length=32)
    return trainer(model=mixture(coefficient), args=args, train_dataset=rows, processing_class=tokenizer)


def sft_with_transformers_loss(folder, tokenizer, coefficient):
    return sft(folder, tokenizer, coefficient, SFTWithTransformersLoss)


def dpo(folder, tokenizer, coefficient):
    rows = Dataset.from_list([{"prompt": text(4), "chosen": text(5), "rejected": text(6)} for _ in range(8)])
    args = settings(DPOConfig, folder, max_length=32)
    model, reference = mixture(coefficient), mixture(coefficient)
    return DPOTrainer(model=model, ref_model=reference, args=args, train_dataset=rows, processing_class=tokenizer)


def kto(folder, tokenizer, coefficient):
    rows = [{"prompt": text(4), "completion": text(5), "label": bool(place % 2)} for place in range(8)]
    args = settings(KTOConfig, folder, max_length=32)
    model, reference = mixture(coefficient), mixture(coefficient)
    data = Dataset.from_list(rows)
    return KTOTrainer(model=model, ref_model=reference, args=args, train_dataset=data, processing_class=tokenizer)


def reward(folder, tokenizer, coefficient):
    rows = Dataset.from_list([{"prompt": text(4), "chosen": text(5), "rejected": text(6)} for _ in range(8)])
    model = mixture(coefficient, hf.AutoModelForSequenceClassification, num_labels=1)
    args = settings(RewardConfig, folder, max_length=32)
    return RewardTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)


def grpo(folder, tokenizer, coefficient):
    rows = Dataset.from_list([{"prompt": text(4)} for _ in range(8)])
    args = settings(GRPOConfig, folder, num_generations=4, max_completion_length=8)
    return GRPOTrainer(
        model=mixture(coefficient),
        reward_funcs=lambda completions, **kwargs: [float(len(words)) for words in completions],
        args=args,
        train_dataset=rows,
        processing_class=tokenizer,
    )


TRAINERS = {
    "`SFTTrainer`": sft,
    "`SFTTrainer` with `compute_loss = transformers.Trainer.compute_loss`": sft_with_transformers_loss,
    "`DPOTrainer`": dpo,
    "`KTOTrainer`": kto,
    "`RewardTrainer`": reward,
    "`GRPOTrainer`": grpo,
}


def documented(trainer: str, coefficient: float) -> str:
    row = re.search(rf"^\| {re.escape(trainer)} \| (.*?) \| (.*?) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert row is not None, f"docs/training.md has no row for {trainer}"
    return row[1 if coefficient == 0 else 2]


@pytest.mark.parametrize("coefficient", [0.0, 0.01])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_table_says_what_happens(trainer, coefficient, tokenizer, tmp_path):
    made = TRAINERS[trainer](tmp_path, tokenizer, coefficient)
    if documented(trainer, coefficient) == "refused":
        with pytest.raises(ValueError, match="balance loss"):
            made.train()
        return
    assert documented(trainer, coefficient) == "trains"
    made.train()
    log = next(entry for entry in made.state.log_history if "loss" in entry)
    assert torch.isfinite(torch.tensor(log["loss"]))
