"""
Does training on several processes give the numbers of one?

A small mixture of each family (Llama, BERT or EuroBERT, T5; 8 experts, 2 a token, balance loss on) is trained by the
stock Trainer for 20 steps of 8 sequences of unequal lengths, in one process and in several (gloo, on the CPU), from
the same checkpoint. The table shows, over the steps, the largest relative difference of the logged loss, and of the
routers' gradient before clipping (norm of the difference over the norm). Where the load is that of a micro-batch, the
one process sees the same micro-batches one after the other; with `global_batch` it sees those of all ranks at once. In
bf16 the gradient is that of the first step: rounding changes here and there which experts a token goes to, and from
then on the weights are others.

    python benchmarks/equality.py
    python benchmarks/equality.py --quick
    python benchmarks/equality.py --engines ddp ep2 --families decoder --variants micro_batch
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import socket
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers as hf
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.utils import logging

import hf_sparse_moe


sys.path.append(str(Path(__file__).parents[1] / "training"))

from recipe.launch import check_engine, join_deepspeed


STEPS, QUICK_STEPS, SEQUENCES, VOCABULARY = 20, 3, 8, 96
ROOT = Path(__file__).parents[1]
PATIENCE = 1800.0  # seconds for the trainings of one engine
# Ranks are forked from a process that has imported these and started no thread, so that it alone pays for the imports.
PROCESSES = get_context("forkserver")
PROCESSES.set_forkserver_preload(["transformers.trainer", "hf_sparse_moe.models.modeling_sparse_moe"])


# Tensor parallelism needs an architecture that has a plan for it, Accelerate's FSDP2 one whose weights are not tied:
# BERT and T5 are neither.
UNTIED = ("decoder", "eurobert")


@dataclass(frozen=True)
class Engine:
    """How a training is spread. `ranks` processes, of which `replicas` see different data."""

    title: str
    ranks: int
    replicas: int
    distributed: dict[str, Any] | None = None  # fields of transformers' DistributedConfig
    zero_stage: int | None = None
    accelerate_fsdp: bool = False
    families: tuple[str, ...] = ("decoder", "encoder", "encoder_decoder")


ENGINES = {
    "one": Engine("one process", 1, 1),
    "ddp": Engine("DDP 2", 2, 2),
    "fsdp2": Engine("FSDP2 2, Accelerate", 2, 2, accelerate_fsdp=True, families=UNTIED),
    "fsdp2_native": Engine("FSDP2 2, DistributedConfig", 2, 2, {"fsdp_size": 2}),
    "zero2": Engine("DeepSpeed ZeRO 2, 2", 2, 2, zero_stage=2),
    "zero3": Engine("DeepSpeed ZeRO 3, 2", 2, 2, zero_stage=3),
    "ep2": Engine("FSDP2 2 x EP 2", 2, 2, {"fsdp_size": 2, "ep_size": 2}),
    "ep4": Engine("FSDP2 4 x EP 4", 4, 4, {"fsdp_size": 4, "ep_size": 4}),
    "efsdp": Engine("FSDP2 4 x EP 2", 4, 4, {"fsdp_size": 4, "ep_size": 2}),
    "tp": Engine("TP 2 x FSDP2 2 x EP 4", 4, 2, {"tp_size": 2, "fsdp_size": 2, "ep_size": 4}, families=UNTIED),
}


@dataclass(frozen=True)
class Variant:
    title: str
    scope: str = "micro_batch"
    accumulation: int = 1
    arguments: dict[str, Any] = field(default_factory=dict)
    tolerance: tuple[float, float] = (1e-5, 1e-5)  # of the losses, of the routers' gradients
    gradient_steps: int = STEPS


VARIANTS = {
    "micro_batch": Variant("`micro_batch`"),
    "accumulation": Variant("`micro_batch`, 2 micro-batches", accumulation=2),
    "global_batch": Variant("`global_batch`", scope="global_batch"),
    "global_accumulation": Variant("`global_batch`, 2 micro-batches", scope="global_batch", accumulation=2),
    "checkpointing": Variant("gradient checkpointing", arguments={"gradient_checkpointing": True}),
    "bf16": Variant("bf16", arguments={"bf16": True}, tolerance=(2e-2, 0.3), gradient_steps=1),
}


class Training(NamedTuple):
    """One training; `batch` is a process's."""

    family: str
    engine: str
    variant: str
    batch: int
    accumulation: int
    steps: int


# ---- the training, in one process or as one rank of several -------------------------------------------------------

_IDS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 1}
_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_PLAIN = {**_IDS, **_SIZES, "bos_token_id": 2, "max_position_embeddings": 64}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_T5 = {"d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8, "dropout_rate": 0.0}
FAMILIES = {
    "decoder": (
        hf.LlamaConfig(**_PLAIN, num_key_value_heads=2),
        hf_sparse_moe.SparseMoeDecoderConfig,
        hf.AutoModelForCausalLM,
    ),
    "encoder": (
        hf.BertConfig(**_PLAIN, **_NO_DROPOUT),
        hf_sparse_moe.SparseMoeEncoderConfig,
        hf.AutoModelForMaskedLM,
    ),
    "encoder_decoder": (
        hf.T5Config(**_IDS, **_T5, decoder_start_token_id=0),
        hf_sparse_moe.SparseMoeEncoderDecoderConfig,
        hf.AutoModelForSeq2SeqLM,
    ),
    "eurobert": (
        hf.EuroBertConfig(**_PLAIN, num_key_value_heads=2, mask_token_id=3),
        hf_sparse_moe.SparseMoeEncoderConfig,
        hf.AutoModelForMaskedLM,
    ),
}


def save_start(folder: Path) -> None:
    """The checkpoint of each family from which every run begins."""
    for family, (dense, config_class, auto_class) in FAMILIES.items():
        torch.manual_seed(0)
        config = config_class.from_dense(dense, num_experts=8, num_experts_per_tok=2, router_aux_loss_coef=0.1)
        auto_class.from_config(config).save_pretrained(folder / family)


def examples(family: str) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)

    def ids(low: int, high: int) -> torch.Tensor:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(3, VOCABULARY, (length,), generator=generator)

    rows = []
    for _ in range(STEPS * SEQUENCES):
        source = ids(6, 25)
        labels = source.clone()
        if FAMILIES[family][2] is hf.AutoModelForSeq2SeqLM:
            labels = ids(3, 13)
        elif FAMILIES[family][2] is hf.AutoModelForMaskedLM:  # a third of the tokens are predicted
            labels[torch.arange(len(labels)) % 3 != 0] = -100
        rows.append({"input_ids": source, "attention_mask": torch.ones_like(source), "labels": labels})
    return rows


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    def padded(name: str) -> torch.Tensor:
        return pad_sequence([row[name] for row in rows], True, -100 if name == "labels" else 0)

    return {name: padded(name) for name in rows[0]}


class RecordedTrainer(hf.Trainer):
    """Keeps the routers' gradient of every optimizer step, whole, before it is clipped."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.router_gradients: list[torch.Tensor] = []

    def _clip_grad_norm(self, model):
        if not self.is_deepspeed_enabled:
            self.record()
        return super()._clip_grad_norm(model)

    def record(self) -> None:
        gates = [p for name, p in self.model.named_parameters() if "gate.weight" in name]
        self.router_gradients.append(torch.cat([self._whole_gradient(gate).flatten() for gate in gates]).cpu())

    def _whole_gradient(self, parameter: torch.Tensor) -> torch.Tensor:
        if self.is_deepspeed_enabled:
            from deepspeed.utils import safe_get_full_grad

            return safe_get_full_grad(parameter).float().clone()
        gradient = parameter.grad
        return (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).float().clone()


class RecordBeforeDeepSpeedSteps(hf.TrainerCallback):
    """DeepSpeed's engine clips and steps inside of `backward`."""

    def __init__(self, trainer: RecordedTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        engine = self.trainer.model_wrapped
        step = engine.step

        def recorded_step(*arguments, **options):
            if engine.is_gradient_accumulation_boundary():
                self.trainer.record()
            return step(*arguments, **options)

        engine.step = recorded_step


def train(start: Path, training: Training, out: Path) -> dict[str, Any]:
    """Losses and router gradients of each step, and how it was run."""
    engine, variant = ENGINES[training.engine], VARIANTS[training.variant]
    if engine.accelerate_fsdp or (engine.distributed or {}).get("tp_size", 1) > 1:
        stand_in_for_gpus()
    arguments = hf.TrainingArguments(
        output_dir=str(out), per_device_train_batch_size=training.batch,
        gradient_accumulation_steps=training.accumulation, max_steps=training.steps, learning_rate=3e-3,
        logging_steps=1, report_to=[], disable_tqdm=True, save_strategy="no", use_cpu=True,
        dataloader_pin_memory=False, **engine_arguments(engine), **variant.arguments,
    )  # fmt: skip
    join_deepspeed(arguments)
    options = {} if engine.distributed is None else {"distributed_config": DistributedConfig(**engine.distributed)}
    auto_class = FAMILIES[training.family][2]
    model = auto_class.from_pretrained(start / training.family, balance_scope=variant.scope, **options)
    trainer = RecordedTrainer(
        model=model, args=arguments, train_dataset=examples(training.family), data_collator=collate
    )
    check_engine(trainer)
    if engine.zero_stage is not None:
        trainer.add_callback(RecordBeforeDeepSpeedSteps(trainer))
    trainer.train()
    return {
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "gradients": torch.stack(trainer.router_gradients),
        "wrapper": type(trainer.model_wrapped).__name__,
        "world_size": arguments.world_size,
    }


def engine_arguments(engine: Engine) -> dict[str, Any]:
    if engine.zero_stage is not None:
        config = json.loads((ROOT / f"training/configs/zero{engine.zero_stage}.json").read_text())
        return {"deepspeed": config}
    if engine.accelerate_fsdp:
        return {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}}
    return {}


def stand_in_for_gpus() -> None:
    """
    On CPUs Accelerate runs DDP in the place of FSDP2 without a word, and refuses tensor parallelism: told that they
    are GPUs, its own code does both over gloo.
    """
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    initialize = AcceleratorState.__init__

    def initialize_as_on_gpus(self, *args, **kwargs):
        if PartialState._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        initialize(self, *args, **kwargs)

    if AcceleratorState.__init__.__name__ != "initialize_as_on_gpus":
        AcceleratorState.__init__ = initialize_as_on_gpus


def run_as_rank(rank: int, ranks: int, port: int, start: Path, trainings: list[Training], out: Path) -> None:
    """Trainings of one engine, one after the other; the first rank leaves what came of them in `out`."""
    with (out / f"rank_{rank}.log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if ranks > 1:
        addresses = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        os.environ |= {name: str(value) for name, value in addresses.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    gc.freeze()  # accelerate collects garbage around each training: what was imported is none
    results = {training: train(start, training, out / "trainer") for training in trainings}
    if rank == 0:
        torch.save({tuple(training): result for training, result in results.items()}, out / "results.pt")


# ---- the comparison -----------------------------------------------------------------------------------------------


def launch(start: Path, trainings: list[Training], ranks: int) -> dict[Training, dict[str, Any]]:
    """Run trainings of one engine in `ranks` processes of their own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        arguments = (ranks, port, start, trainings, out)
        processes = [PROCESSES.Process(target=run_as_rank, args=(rank, *arguments)) for rank in range(ranks)]
        for process in processes:
            process.start()
        deadline = time.monotonic() + PATIENCE
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
        if any(code != 0 for code in codes):
            failed = next(rank for rank, code in enumerate(codes) if code != 0)
            log = (out / f"rank_{failed}.log").read_text()[-4000:]
            raise SystemExit(f"{ENGINES[trainings[0].engine].title} failed, exit codes {codes}:\n{log}")
        return {Training(*key): result for key, result in torch.load(out / "results.pt").items()}


def spread(family: str, engine: str, variant: str, steps: int) -> tuple[Training, Training]:
    """A training on an engine, and its like in one process."""
    replicas, accumulation = ENGINES[engine].replicas, VARIANTS[variant].accumulation
    batch = SEQUENCES // (replicas * accumulation)
    many = Training(family, engine, variant, batch, accumulation, steps)
    if VARIANTS[variant].scope == "global_batch":
        return many, Training(family, "one", variant, batch * replicas, accumulation, steps)
    return many, Training(family, "one", variant, batch, accumulation * replicas, steps)


def compare(many: dict[str, Any], one: dict[str, Any], gradient_steps: int) -> tuple[float, float]:
    """The largest relative differences of the loss, over all steps, and of the routers' gradient, over the first."""
    losses, expected = (torch.tensor(run["losses"], dtype=torch.float64) for run in (many, one))
    gradients, wanted = many["gradients"].double(), one["gradients"].double()
    loss = ((losses - expected).abs() / expected).max()
    gradient = ((gradients - wanted).norm(dim=1) / wanted.norm(dim=1))[:gradient_steps].max()
    return float(loss), float(gradient)


def choose(engines: list[str], families: list[str], variants: list[str], quick: bool) -> list[tuple[str, str, str]]:
    """Family, engine and variant of each cell; `quick` takes one family a cell, each in its turn."""
    cells = []
    for line, engine in enumerate(engines):
        fitting = [family for family in ENGINES[engine].families if family in families]
        for column, variant in enumerate(variants):
            turn = (line + column) % len(fitting) if fitting else 0
            cells += [(family, engine, variant) for family in (fitting[turn : turn + 1] if quick else fitting)]
    return cells


def measure(cells: list[tuple[str, str, str]], steps: int = STEPS) -> list[dict[str, Any]]:
    """One row a training."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}  # the ranks inherit it
    pairs = [spread(*cell, steps) for cell in cells]
    with tempfile.TemporaryDirectory() as folder:
        start = Path(folder)
        save_start(start)
        references = launch(start, list(dict.fromkeys(one for _, one in pairs)), ranks=1)
        results = {}
        for engine in dict.fromkeys(many.engine for many, _ in pairs):
            mine = [many for many, _ in pairs if many.engine == engine]
            results |= launch(start, mine, ENGINES[engine].ranks)
    rows = []
    for many, one in pairs:
        loss, gradient = compare(results[many], references[one], VARIANTS[many.variant].gradient_steps)
        row = {"loss": loss, "gradient": gradient, "wrapper": results[many]["wrapper"]}
        rows.append({**many._asdict(), **row, "world_size": results[many]["world_size"]})
    return rows


def within_tolerance(row: dict[str, Any]) -> bool:
    loss, gradient = VARIANTS[row["variant"]].tolerance
    return row["loss"] <= loss and row["gradient"] <= gradient


def table(rows: list[dict[str, Any]]) -> str:
    """A line an engine, a column a variant; in each the worst family's loss, then router gradient."""
    cells: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        cells.setdefault(row["engine"], {}).setdefault(row["variant"], []).append(row)
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    lines = [f"| engine | of | {' | '.join(VARIANTS[name].title for name in variants)} |"]
    lines.append("| --- " * (len(variants) + 2) + "|")
    for engine, found in cells.items():
        types = dict.fromkeys(FAMILIES[row["family"]][0].model_type for rows in found.values() for row in rows)
        worst = [
            f"{max(row['loss'] for row in found[name]):.1e}, {max(row['gradient'] for row in found[name]):.1e}"
            if name in found
            else ""
            for name in variants
        ]
        lines.append(f"| {' | '.join([ENGINES[engine].title, ', '.join(types), *worst])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # On CPUs DeepSpeed compiles a small extension when it is first used.
    deepspeed = find_spec("deepspeed") and shutil.which("c++")
    available = [name for name, engine in ENGINES.items() if engine.zero_stage is None or deepspeed]
    parser.add_argument("--engines", nargs="+", default=available, choices=[name for name in ENGINES if name != "one"])
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--quick", action="store_true", help="one family a cell, each in its turn, and fewer steps")
    parser.add_argument("--json", help="where to write the rows as well")
    args = parser.parse_args()
    cells = choose([name for name in args.engines if name != "one"], args.families, args.variants, args.quick)
    if not cells:
        parser.error(f"none of `--families {' '.join(args.families)}` is trained by `{' '.join(args.engines)}`")
    rows = measure(cells, QUICK_STEPS if args.quick else STEPS)
    if args.json is not None:
        Path(args.json).write_text(json.dumps(rows, indent=1))
    print(table(rows))
    over = [row for row in rows if not within_tolerance(row)]
    if over:
        raise SystemExit(f"{len(over)} of {len(rows)} trainings differ by more than their tolerance.")


if __name__ == "__main__":
    main()
