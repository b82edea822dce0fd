"""Small trainings on real text, healthy ones and ones that collapse, to see when `RoutingMonitor` warns."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

import torch
import transformers as hf
from torch import nn

from hf_sparse_moe import RoutingMonitor, add_leading_callback, find_mixture_layers, routing_statistics, upcycle
from hf_sparse_moe.quickstart.corpus import load_corpus
from hf_sparse_moe.quickstart.small_dense_model import train_tokenizer
from hf_sparse_moe.routing.routing_alarms import dominance, evenness


STEPS, LENGTH = 100, 48
# What holds the load even. The decoder states of T5, whose norms do not centre, share one large direction: at the
# default of 0.01 one expert a token collapses.
COEFFICIENTS = {"llama": 0.01, "bert": 0.01, "t5": 0.2}


@cache
def token_rows() -> tuple[int, list[torch.Tensor]]:
    """The size of a vocabulary, and pieces of the text that Python carries."""
    texts = [text for documents in load_corpus(None).train.values() for text in documents]
    random.Random(0).shuffle(texts)
    tokenizer = train_tokenizer(texts[:100])
    ids = torch.tensor([i for text in texts[:150] for i in tokenizer(text)["input_ids"]][:60_000])
    return len(tokenizer), list(ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH))


@cache
def dense_model(kind: str) -> hf.PreTrainedModel:
    """A dense model that has learned for 60 steps, whose hidden states are no longer noise."""
    hf.set_seed(0)
    vocabulary = token_rows()[0]
    sizes = {"vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    if kind == "t5":
        config = hf.T5Config(
            vocab_size=vocabulary, d_model=32, d_ff=64, num_layers=1, num_heads=4, d_kv=8, pad_token_id=0
        )
        config.decoder_start_token_id = 0
        model = hf.T5ForConditionalGeneration(config)
    elif kind == "bert":
        model = hf.BertForMaskedLM(hf.BertConfig(**sizes, num_hidden_layers=2))
    else:
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, num_hidden_layers=2))
    _train(model, 60, 0, 1e-3, logging_steps=60)
    return model


def train(
    kind: str, experts: int, top_k: int, seed: int, folder: Path, collapse: str | None = None, logging_steps: int = 5
) -> hf.Trainer:
    """
    Upcycle, and train for `STEPS` with a monitor.

    Args:
        collapse (`str`, *optional*): `"rewarded"`, by a loss that it lowers, or `"from_start"`, by router
            rows along the mean hidden state and no balance loss. None is a healthy training.
    """
    model = upcycle(dense_model(kind), experts, top_k, seed=seed, router_aux_loss_coef=COEFFICIENTS[kind])
    if collapse == "rewarded":
        model.config.router_aux_loss_coef = 1e-9  # so that there is an `aux_loss`
    elif collapse == "from_start":
        model.config.router_aux_loss_coef = 0.0
        _prefer(model, top_k, _rows(model, 8, seed))
    trainer_class = Rewarding if collapse == "rewarded" else hf.Trainer
    monitor = RoutingMonitor(log_layers=False)
    return _train(model, STEPS, seed + 1, 5e-4, folder, monitor, logging_steps, trainer_class)


def final_loads(trainer: hf.Trainer, seed: int) -> list[tuple[float, float]]:
    """The evenness and the dominance of each layer's load, on text that the model was not trained on."""
    rows = _rows(trainer.model, 32, 1000 + seed)
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    statistics = routing_statistics(trainer.model, [batch])
    top_k = statistics.num_experts_per_tok
    return [(evenness(layer.load, top_k), dominance(layer.load, top_k)) for layer in statistics.layers]


class Rewarding(hf.Trainer):
    """Rewards an uneven load."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = outputs.loss - 2 * outputs.aux_loss
        return (loss, outputs) if return_outputs else loss


def _prefer(model: nn.Module, top_k: int, rows: list[dict[str, torch.Tensor]]) -> None:
    """Let the first `top_k` experts of every layer win."""
    layers, means = find_mixture_layers(model), {}

    def keep(router: nn.Module, args: tuple) -> None:
        means[router] = args[0].flatten(0, -2).mean(dim=0)

    handles = [layer.router.register_forward_pre_hook(keep) for layer in layers]
    with torch.no_grad():
        model(**{name: torch.stack([row[name] for row in rows]) for name in rows[0]})
        for handle in handles:
            handle.remove()
        for layer in layers:
            mean = means[layer.router]
            weight = next(parameter for parameter in layer.router.parameters() if parameter.dim() == 2)
            weight[:top_k] += 8 * mean / mean.norm() ** 2


def _rows(model: hf.PreTrainedModel, count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        ids = draw.choice(token_rows()[1])
        if model.config.is_encoder_decoder:
            found.append({"input_ids": ids[: LENGTH // 2], "labels": ids[LENGTH // 2 :]})
        elif "MaskedLM" in type(model).__name__:
            masked = torch.rand(LENGTH, generator=generator) < 0.15
            found.append({"input_ids": ids.masked_fill(masked, 3), "labels": ids.masked_fill(~masked, -100)})
        else:
            found.append({"input_ids": ids, "labels": ids})
    return found


def _train(
    model, steps, seed, learning_rate, folder="unused", monitor=None, logging_steps=5, trainer_class=hf.Trainer
) -> hf.Trainer:
    arguments = hf.TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=learning_rate,
        logging_steps=logging_steps,
        seed=seed,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    trainer = trainer_class(model, arguments, train_dataset=_rows(model, 8 * steps, seed))
    trainer.remove_callback(hf.PrinterCallback)
    if monitor is not None:
        add_leading_callback(trainer, monitor)
    trainer.train()
    return trainer
