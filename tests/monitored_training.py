"""Trainings with `RoutingMonitor` and `SelectionBiasCallback`, in this process or on all ranks of several."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers as hf
from torch import distributed
from transformers import Trainer, TrainingArguments

from hf_sparse_moe.routing import RoutingMonitor, SelectionBiasCallback, add_leading_callback, find_mixture_layers
from tiny_models import VOCAB_SIZE, tiny_inputs, tiny_sparse, without_dropout


LENGTH = 9
STOCK = {
    "mixtral": hf.MixtralConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0,
    ),
    "deepseek_v3": hf.DeepseekV3Config(
        vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=8, num_experts_per_tok=2, n_group=2,
        topk_group=1, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=8, pad_token_id=0,
    ),
}  # fmt: skip


def make_model(family: str, **fields) -> hf.PreTrainedModel:
    """A tiny mixture without dropout: ours of a family or architecture, or a stock one."""
    torch.manual_seed(0)
    if family not in STOCK:
        return without_dropout(tiny_sparse(family, **fields))
    model = hf.AutoModelForCausalLM.from_config(STOCK[family])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return without_dropout(model)


def make_rows(model: hf.PreTrainedModel, count: int = 16) -> list[dict[str, torch.Tensor]]:
    """Rows with ever more pads, so that their token and label counts differ."""
    inputs = tiny_inputs(model, batch=count, length=LENGTH)
    for row in range(count):
        inputs["attention_mask"][row, LENGTH - row % 5 :] = 0
        inputs["labels"][row, LENGTH - row % 5 :] = -100
    return [{name: value[row] for name, value in inputs.items()} for row in range(count)]


def make_trainer(model, folder, rows, callbacks=(), monitor=None, **arguments) -> Trainer:
    """A trainer over the rows in their order, that moves no weight unless `learning_rate` says so."""
    defaults = {"per_device_train_batch_size": 4, "max_steps": 4, "logging_steps": 2, "learning_rate": 0.0}
    arguments = TrainingArguments(
        output_dir=str(folder),
        **{"save_strategy": "no", "report_to": [], "disable_tqdm": True, **defaults, **arguments},
        train_sampling_strategy="sequential",
        use_cpu=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows, callbacks=list(callbacks))
    if monitor is not None:
        add_leading_callback(trainer, monitor)
    return trainer


def biases(model: torch.nn.Module) -> list[torch.Tensor]:
    return [layer.selection_bias.clone() for layer in find_mixture_layers(model)]


def train_as_a_rank(out: Path, family: str, fields: dict, bias: bool, **arguments) -> None:
    """Write, into the folder `out` and by its number, what this rank logged, its biases, and the number of ranks."""
    model = make_model(family, **fields)
    callbacks = [SelectionBiasCallback(0.01)] if bias else []
    monitor = RoutingMonitor(log_layers=True)
    trainer = make_trainer(model, out, make_rows(model), callbacks, monitor, **arguments)
    trainer.train()
    facts = {"world_size": trainer.args.world_size, "log_history": trainer.state.log_history}
    facts["biases"] = [bias.tolist() for bias in biases(model)] if bias else []
    (out / f"{trainer.args.process_index}.json").write_text(json.dumps(facts))
    # Gloo's threads take the interpreter's lock to let go of the last tensors, which must not come in its very end.
    distributed.barrier()
