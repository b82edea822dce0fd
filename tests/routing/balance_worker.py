"""Data-parallel steps of a tiny Mixtral, whose balance loss is fixed or not, and the routers' gradients in them."""

from pathlib import Path

import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_sparse_moe.routing import find_mixture_layers, fix_balance


SEQUENCES = 8
# Balance scope ("stock": not fixed), sequences, micro-batches a rank. Only the global batch of all ranks is the same
# for different sequences; over micro-batches it grows as they come.
CASES = [
    ("stock", "identical", 2),
    ("micro_batch", "identical", 2),
    ("sequence", "identical", 2),
    ("global_batch", "identical", 2),
    ("global_batch", "different", 1),
]


def tiny_mixtral(**fields) -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, router_aux_loss_coef=1.0,
        output_router_logits=True, **fields,
    )  # fmt: skip
    return MixtralForCausalLM(config)


def examples(identical: bool) -> list[dict[str, torch.Tensor]]:
    """8 sequences of 9 tokens, of which the last two are pads."""
    ids = torch.randint(1, 50, (SEQUENCES, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(9, dtype=torch.long)
    mask[-2:] = 0
    rows = [ids[0] if identical else row for row in ids]
    return [{"input_ids": row, "attention_mask": mask, "labels": row.masked_fill(mask == 0, -100)} for row in rows]


class RouterGradient(TrainerCallback):
    """Keeps the gradients of the routers at the optimizer step."""

    gradient: torch.Tensor

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        parameters = [p for layer in find_mixture_layers(model) for p in layer.router.parameters()]
        self.gradient = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])


def router_gradient(model: nn.Module, rows: list, batch_size: int, accumulation: int, folder: str, **arguments):
    """The routers' gradient of one optimizer step of the stock Trainer; `batch_size` is a process's."""
    callback = RouterGradient()
    arguments = TrainingArguments(
        output_dir=folder, per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation,
        max_steps=1, max_grad_norm=0.0, learning_rate=0.0, report_to=[], disable_tqdm=True, save_strategy="no",
        use_cpu=True, **arguments,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[callback]).train()
    return callback.gradient


def fixed_gradient(scope: str, kind: str, batch_size: int, accumulation: int, folder: str) -> torch.Tensor:
    model = tiny_mixtral()
    if scope != "stock":
        fix_balance(model, balance_scope=scope)
    return router_gradient(model, examples(kind == "identical"), batch_size, accumulation, folder)


def gradients_of_a_rank(out: Path) -> None:
    """The first rank writes to `out` the routers' gradients in each of `CASES`, and the world size."""
    process = TrainingArguments(output_dir=str(out.parent / "run"), use_cpu=True)
    rank_rows = SEQUENCES // process.world_size
    gradients = {
        (scope, kind, accumulation): fixed_gradient(
            scope, kind, rank_rows // accumulation, accumulation, process.output_dir
        )
        for scope, kind, accumulation in CASES
    }
    if process.process_index == 0:
        torch.save({"gradients": gradients, "world_size": process.world_size}, out)
