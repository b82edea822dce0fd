"""One optimizer step of trainers that compute a loss of their own: TRL's and sentence-transformers'."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers as hf
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer import losses, modules
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
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

from hf_sparse_moe import SparseMoeDecoderConfig, SparseMoeEncoderConfig, expert_lora_config, fix_balance, upcycle


SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
SIZES = {
    "vocab_size": 96,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }} "
    "</s>{% endgeneration %}{% else %}<s> {{ message['content'] }} {% endif %}{% endfor %}"
)
VARIANTS = ["whole", "`expert_lora_config`", "from `upcycle`"]
ROWS = 8


def tokenizer() -> hf.PreTrainedTokenizerFast:
    vocabulary = {word: place for place, word in enumerate([*SPECIAL, *(f"w{i}" for i in range(92))])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=words, chat_template=CHAT_TEMPLATE, model_max_length=32, **names
    )


def mixture(coefficient: float, variant: str, auto_class: Any = hf.AutoModelForCausalLM, **fields: Any) -> nn.Module:
    """A tiny mixture; the same weights for every coefficient."""
    torch.manual_seed(0)
    encoder = fields.pop("family", "decoder") == "encoder"
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    dense_config = hf.BertConfig(**SIZES, **dropout) if encoder else hf.Qwen2Config(**SIZES, num_key_value_heads=2)
    if labels := fields.pop("num_labels", None):
        dense_config.num_labels = labels
    if variant == "from `upcycle`":
        dense = auto_class.from_config(dense_config)
        return upcycle(dense, num_experts=4, router_aux_loss_coef=coefficient, method="drop", **fields)
    config_class = SparseMoeEncoderConfig if encoder else SparseMoeDecoderConfig
    config = config_class.from_dense(dense_config, num_experts=4, router_aux_loss_coef=coefficient, **fields)
    return auto_class.from_config(config)


def stock_mixture(coefficient: float) -> nn.Module:
    """A tiny Qwen3-MoE under `fix_balance`, whose config has another coefficient."""
    torch.manual_seed(0)
    sizes = {"num_key_value_heads": 2, "head_dim": 8, "moe_intermediate_size": 16}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.001}
    model = hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**SIZES, **sizes, **experts))
    fix_balance(model, router_aux_loss_coef=coefficient)
    return model


def text(length: int) -> str:
    return " ".join(f"w{place}" for place in torch.randint(92, (length,)).tolist())


def rows(identical: bool, **lengths: int) -> Dataset:
    torch.manual_seed(1)
    drawn = [{name: text(length) for name, length in lengths.items()} for _ in range(ROWS)]
    return Dataset.from_list([drawn[0]] * ROWS if identical else drawn)


class RouterGradient(hf.TrainerCallback):
    """Keeps the gradient of the routers in the optimizer step."""

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        gates = [p for name, p in model.named_parameters() if ".gate." in name and p.grad is not None]
        self.gradient = torch.cat([gate.grad.flatten().clone() for gate in gates])


class Run:
    """
    What a trainer is made with.

    Args:
        folder (`Path`): Where it writes.
        coefficient (`float`): Of the balance loss.
        variant (`str`): One of `VARIANTS`.
        accumulation (`int`, defaults to 1): Micro-batches, of `ROWS` rows in all (over `processes`).
        identical (`bool`, defaults to `False`): Whether the rows are the same.
        scope (`str`, defaults to `"micro_batch"`): Over what the load is evened.
    """

    def __init__(
        self, folder: Path, coefficient: float, variant: str = "whole", accumulation: int = 1, processes: int = 1,
        identical: bool = False, scope: str = "micro_batch",
    ):  # fmt: skip
        self.folder, self.coefficient, self.variant = folder, coefficient, variant
        self.accumulation, self.processes, self.identical, self.scope = accumulation, processes, identical, scope
        self.callback = RouterGradient()

    def model(self, *args: Any, **fields: Any) -> nn.Module:
        return mixture(self.coefficient, self.variant, *args, balance_scope=self.scope, **fields)

    def reference(self) -> dict[str, Any]:
        """TRL loads a reference model by name, and a model in memory has none; for an adapter the base is one."""
        return {} if self.variant == "`expert_lora_config`" else {"ref_model": self.model()}

    def settings(self, config_class: Any, **arguments: Any) -> Any:
        return config_class(
            str(self.folder), max_steps=1, report_to=[], gradient_accumulation_steps=self.accumulation,
            per_device_train_batch_size=ROWS // self.accumulation // self.processes, learning_rate=0.0,
            max_grad_norm=0.0, use_cpu=True, save_strategy="no", bf16=False, disable_tqdm=True, logging_steps=1,
            **arguments,
        )  # fmt: skip

    def trainer(self, trainer_class: Any, model: nn.Module, **arguments: Any) -> hf.Trainer:
        if self.variant == "`expert_lora_config`":
            arguments["peft_config"] = expert_lora_config(model, r=2, router=True)
        return trainer_class(model=model, processing_class=tokenizer(), callbacks=[self.callback], **arguments)

    def gradient(self, make: Any) -> torch.Tensor:
        trainer = make(self)
        trainer.train()
        log = next(entry for entry in trainer.state.log_history if "loss" in entry)
        assert torch.isfinite(torch.tensor(log["loss"]))
        return self.callback.gradient


def sft(run: Run, **arguments: Any) -> hf.Trainer:
    if arguments.get("completion_only_loss"):
        data = rows(run.identical, prompt=5, completion=7)
    elif arguments.get("assistant_only_loss"):
        turns = [
            [{"role": "user", "content": text(4)}, {"role": "assistant", "content": text(6)}] for _ in range(ROWS)
        ]
        data = Dataset.from_list([{"messages": turn} for turn in turns])
    else:
        data = rows(run.identical, text=12)
    length = None if arguments.get("padding_free") else 32
    arguments = run.settings(SFTConfig, max_length=length, gradient_checkpointing=False, **arguments)
    return run.trainer(SFTTrainer, run.model(), args=arguments, train_dataset=data)


def dpo(run: Run) -> hf.Trainer:
    arguments = run.settings(DPOConfig, max_length=32)  # with gradient checkpointing, TRL's default
    data = rows(run.identical, prompt=4, chosen=5, rejected=6)
    return run.trainer(DPOTrainer, run.model(), **run.reference(), args=arguments, train_dataset=data)


def kto(run: Run) -> hf.Trainer:
    data = rows(run.identical, prompt=4, completion=5).add_column("label", [bool(place % 2) for place in range(ROWS)])
    arguments = run.settings(KTOConfig, max_length=32)
    return run.trainer(KTOTrainer, run.model(), **run.reference(), args=arguments, train_dataset=data)


def reward(run: Run) -> hf.Trainer:
    data = rows(run.identical, prompt=4, chosen=5, rejected=6)
    model = run.model(hf.AutoModelForSequenceClassification, num_labels=1)
    return run.trainer(RewardTrainer, model, args=run.settings(RewardConfig, max_length=32), train_dataset=data)


def grpo(run: Run) -> hf.Trainer:
    return run.trainer(
        GRPOTrainer,
        run.model(),
        reward_funcs=lambda completions, **kwargs: [float(len(words)) for words in completions],
        args=run.settings(GRPOConfig, num_generations=4, max_completion_length=8),
        train_dataset=rows(run.identical, prompt=4),
    )


def sentences(run: Run, loss_class: Any, family: str, **arguments: Any) -> hf.Trainer:
    """A trainer of sentence-transformers, whose model is loaded from a folder."""
    model, saved = run.model(hf.AutoModel, family=family), str(run.folder / "model")
    model.save_pretrained(saved)
    tokenizer().save_pretrained(saved)
    transformer = modules.Transformer(saved)
    encoder = SentenceTransformer(modules=[transformer, modules.Pooling(SIZES["hidden_size"])], device="cpu")
    if run.variant == "`expert_lora_config`":
        encoder.add_adapter(expert_lora_config(transformer.model, r=2, router=True))
    data = rows(run.identical, anchor=4, positive=6)
    if loss_class is losses.CoSENTLoss:
        data = data.add_column("score", [place / ROWS for place in range(ROWS)])
    return SentenceTransformerTrainer(
        model=encoder,
        args=run.settings(SentenceTransformerTrainingArguments),
        train_dataset=data,
        loss=loss_class(encoder, **arguments),
        callbacks=[run.callback],
    )


TRAINERS = {
    ("`SFTTrainer`", "decoder"): sft,
    ("`SFTTrainer`, `packing`", "decoder"): lambda run: sft(run, packing=True),
    ("`SFTTrainer`, `padding_free`", "decoder"): lambda run: sft(run, padding_free=True),
    ("`SFTTrainer`, `assistant_only_loss`", "decoder"): lambda run: sft(run, assistant_only_loss=True),
    ("`SFTTrainer`, `completion_only_loss`", "decoder"): lambda run: sft(run, completion_only_loss=True),
    ("`DPOTrainer`", "decoder"): dpo,
    ("`KTOTrainer`", "decoder"): kto,
    ("`RewardTrainer`", "decoder"): reward,
    ("`GRPOTrainer`", "decoder"): grpo,
    **{
        (f"`{loss.__name__}`", family): lambda run, loss=loss, family=family: sentences(run, loss, family)
        for loss in (losses.MultipleNegativesRankingLoss, losses.CoSENTLoss)
        for family in ("encoder", "decoder")
    },
}


def outcome(trainer: str, family: str, variant: str, folder: Path) -> str:
    """Of the table in docs/training.md: whether it trains, and the balance loss reaches the routers."""
    make = TRAINERS[trainer, family]
    without, balanced = (Run(folder / str(c), c, variant).gradient(make) for c in (0.0, 1.0))
    return "trains" if (balanced - without).norm() > 1e-3 else "trains without balance loss"


def gradients_of_a_rank(out: Path, names: list[tuple[str, str]]) -> None:
    """The first rank writes to `out` the routers' gradients of two micro-batches a rank of the same rows."""
    process = hf.TrainingArguments(str(out.parent), use_cpu=True)
    folder = out.parent / str(process.process_index)
    runs = {
        name: Run(folder, 1.0, accumulation=2, processes=process.world_size, identical=True, scope="global_batch")
        for name in names
    }
    gradients = {name: run.gradient(TRAINERS[name]) for name, run in runs.items()}
    if process.process_index == 0:
        torch.save({"gradients": gradients, "world_size": process.world_size}, out)


def write_table(page: Path) -> None:
    """Run every trainer, and write what became of it into the table of `page`."""
    head = f"| trainer | family | {' | '.join(VARIANTS)} |\n"
    before, _, rest = page.read_text(encoding="utf-8").partition(head)
    rows = [head, f"| --- | --- |{' --- |' * len(VARIANTS)}\n"]
    for trainer, family in TRAINERS:
        with TemporaryDirectory() as folder:
            cells = [outcome(trainer, family, variant, Path(folder) / variant) for variant in VARIANTS]
        rows.append(f"| {trainer} | {family} | {' | '.join(cells)} |\n")
    page.write_text(before + "".join(rows) + rest[rest.index("\n\n") + 1 :], encoding="utf-8")


if __name__ == "__main__":
    write_table(Path(__file__).parents[1] / "docs" / "training.md")
