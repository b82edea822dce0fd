"""One optimizer step of the stock Trainer, and the routers' gradient in it, in one process or as a rank of several."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainerCallback, TrainingArguments

from tiny_models import FAMILIES, tiny_inputs, tiny_sparse, without_dropout


SEQUENCES = 8
SPLITS = [(8, 1), (4, 2), (2, 4), (1, 8)]  # batch size of a process, micro-batches
SCOPES = ["micro_batch", "sequence", "global_batch"]


class Case(NamedTuple):
    """
    What two processes run. Over micro-batches, the load of a global batch grows as they come; over ranks it is that of
    all of them. So only there different sequences give the gradient of one process, whatever their lengths.
    """

    family: str
    scope: str
    kind: str  # see `examples`
    accumulation: int
    z_loss: float = 0.1
    loss: str = "own"  # the model's, or one of `OUTSIDE_LOSSES`


CASES = [Case("decoder", scope, "identical", accumulation) for scope in SCOPES for accumulation in (1, 2, 4)]
CASES += [Case(family, scope, "identical", 2) for family in ("encoder", "encoder_decoder") for scope in SCOPES]
CASES += [Case(family, "global_batch", "ragged", 1, z_loss=0.0) for family in FAMILIES]
CASES += [Case("decoder", "sequence", "equal labels", accumulation) for accumulation in (1, 2)]
OUTSIDE_LOSSES = ["label smoothing", "contrastive"]
CASES += [Case(family, "sequence", "identical", 2, loss=loss) for family in FAMILIES for loss in OUTSIDE_LOSSES]
CASES += [Case("decoder", "global_batch", "identical", 2, loss=loss) for loss in OUTSIDE_LOSSES]


def balanced_model(family: str, scope: str, z_loss: float = 0.0) -> nn.Module:
    fields = {"router_aux_loss_coef": 1.0, "router_z_loss_coef": z_loss, "balance_scope": scope}
    return without_dropout(tiny_sparse(family, **fields))


def examples(model: nn.Module, kind: str) -> list[dict[str, torch.Tensor]]:
    """
    8 sequences, by `kind`: "identical" ones; "equal labels" or "unequal labels", different ones of equal length; each
    with two pads; "ragged" ones of 5 to 12 tokens and an end, to which `collate` adds the pads.
    """
    inputs = tiny_inputs(model, batch=1 if kind == "identical" else SEQUENCES, length=12 if kind == "ragged" else 7)
    if kind == "ragged":
        rows = [{name: value[row, : 5 + row].clone() for name, value in inputs.items()} for row in range(SEQUENCES)]
        for row in rows:
            row["labels"][-1] = model.config.eos_token_id
        return rows
    inputs["attention_mask"][:, -2:] = 0
    labels = inputs["input_ids"] if kind == "equal labels" else inputs["labels"]
    inputs["labels"] = labels.masked_fill(inputs["attention_mask"] == 0, -100)
    if model.config.is_encoder_decoder:  # a loss from outside takes the labels away from the model
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(inputs["labels"])
    return [{name: value[row % len(value)] for name, value in inputs.items()} for row in range(SEQUENCES)]


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Rows padded to the longest of their batch."""
    return {
        name: pad_sequence(
            [row[name] for row in rows], batch_first=True, padding_value=-100 if name == "labels" else 0
        )
        for name in rows[0]
    }


class RouterGradient(TrainerCallback):
    """Keeps the routers' gradient of the optimizer step."""

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.gradient = torch.cat([p.grad.flatten() for name, p in model.named_parameters() if "gate.weight" in name])


class ContrastiveTrainer(Trainer):
    """Two forward passes a micro-batch: the rows, and the rows reversed, whose vectors should be near."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs.pop("labels")
        reversed_inputs = {name: value.flip(0) for name, value in inputs.items()}
        left, right = (model(**one).logits.mean(dim=1) for one in (inputs, reversed_inputs))
        target = torch.arange(len(left), device=left.device).flip(0)
        return nn.functional.cross_entropy(left @ right.T, target)


def step_trainer(
    model: nn.Module,
    rows: list,
    batch_size: int,
    accumulation: int,
    folder: str,
    trainer_class=Trainer,
    callbacks=(),
    **arguments,
) -> Trainer:
    """A trainer of one optimizer step; `batch_size` is a process's."""
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation,
        max_grad_norm=0.0, report_to=[], disable_tqdm=True, save_strategy="no", use_cpu=True,
        **{"max_steps": 1, "learning_rate": 0.0, **arguments},
    )  # fmt: skip
    return trainer_class(
        model=model, args=arguments, train_dataset=rows, data_collator=collate, callbacks=list(callbacks)
    )


def router_gradient(
    model: nn.Module, rows: list, batch_size: int, accumulation: int, folder: str, **arguments
) -> torch.Tensor:
    """The routers' gradient of one optimizer step over `rows`, flat."""
    trainer, callback = step_trainer(model, rows, batch_size, accumulation, folder, **arguments), RouterGradient()
    trainer.add_callback(callback)
    trainer.train()
    return callback.gradient


def case_gradient(case: Case, batch_size: int, accumulation: int, folder: str) -> torch.Tensor:
    model = balanced_model(case.family, case.scope, case.z_loss)
    arguments: dict = {"label_smoothing_factor": 0.1} if case.loss == "label smoothing" else {}
    if case.loss == "contrastive":
        arguments["trainer_class"] = ContrastiveTrainer
    return router_gradient(model, examples(model, case.kind), batch_size, accumulation, folder, **arguments)


def relative_difference(gradient: torch.Tensor, reference: torch.Tensor) -> float:
    return ((gradient - reference).norm() / reference.norm()).item()


def gradients_of_a_rank(out: Path) -> None:
    """The first rank writes to `out` the gradients of `CASES`, the world size, and the wrapper around the model."""
    folder = str(out.parent / "run")
    process = TrainingArguments(output_dir=folder, use_cpu=True)
    rows_a_rank = SEQUENCES // process.world_size
    gradients = {
        case: case_gradient(case, rows_a_rank // case.accumulation, case.accumulation, folder) for case in CASES
    }
    model = balanced_model("decoder", "global_batch")
    trainer = step_trainer(model, examples(model, "identical"), rows_a_rank, 1, folder)
    trainer.train()
    if process.process_index == 0:
        wrapper = type(trainer.model_wrapped).__name__
        content = {"gradients": {tuple(case): gradient for case, gradient in gradients.items()}}
        torch.save(content | {"world_size": process.world_size, "wrapper": wrapper}, out)
