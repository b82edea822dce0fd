"""A loss from outside carries the balance loss on every engine: the routers learn what they learn in one process."""

from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import Trainer, TrainingArguments

from distributed.recovery_runs import _fsdp_on_cpu, facts, final_weights, finish
from models.balance_worker import SEQUENCES, balanced_model, examples, step_trainer
from processes import in_processes
from recipe.launch import join_deepspeed


ZERO2 = {
    "zero_optimization": {"stage": 2},
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 0.0,  # Accelerate clips at 1 otherwise
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
}
ENGINES = {
    "ddp": ("DistributedDataParallel", {}),
    "fsdp2": ("FSDP", {"fsdp": True, "accelerator_config": {"use_configured_state": True}}),
    "zero2": ("DeepSpeedEngine", {"deepspeed": ZERO2}),
}
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")


class OutsideTrainer(Trainer):
    """Not label smoothing: Trainer does not know the class that FSDP2 makes for a causal one, and shifts no labels."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs.pop("labels")
        return model(**inputs).logits.square().mean()


def train(engine: str, coefficient: float, folder: Path) -> None:
    """Two steps of plain gradient descent, as one of the ranks."""
    folder.mkdir(exist_ok=True)
    arguments = {} if engine == "one" else ENGINES[engine][1]
    if engine == "fsdp2":
        _fsdp_on_cpu()
    process = TrainingArguments(str(folder), use_cpu=True, **arguments)
    join_deepspeed(process)
    model = balanced_model("decoder", "global_batch")
    model.config.router_aux_loss_coef = coefficient
    trainer = step_trainer(
        model, examples(model, "unequal labels"), SEQUENCES // process.world_size, 1, folder,
        trainer_class=OutsideTrainer, optim="sgd", learning_rate=0.1, lr_scheduler_type="constant", max_steps=2,
        **arguments,
    )  # fmt: skip
    trainer.train()
    finish(trainer, folder)


def router_change(folder: Path, start: dict) -> dict:
    return {name: value - start[name] for name, value in final_weights(folder).items() if name.endswith("gate.weight")}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", pytest.param("zero2", marks=needs_deepspeed, id="deepspeed")])
def test_the_routers_learn_what_they_learn_in_one_process(engine, tmp_path):
    for name, ranks, coefficient in (("one", 1, 1.0), ("one", 1, 0.0), (engine, 2, 1.0)):
        folder = tmp_path / f"{name}-{coefficient}"
        assert in_processes(ranks, train, name, coefficient, folder) == [0] * ranks
    assert facts(folder)["world_size"] == 2
    assert facts(folder)["wrapper"].startswith(ENGINES[engine][0])
    start = balanced_model("decoder", "global_batch").state_dict()
    expected, without = (router_change(tmp_path / f"one-{coefficient}", start) for coefficient in (1.0, 0.0))
    for name, value in router_change(folder, start).items():
        assert (value - expected[name]).norm() <= 1e-4 * expected[name].norm(), name
        assert (without[name] - expected[name]).norm() > 0.01 * expected[name].norm()
