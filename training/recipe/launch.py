"""Refuses a training that would quietly run in fewer processes, or on another engine, than was asked for."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import distributed
from torch.distributed import distributed_c10d
from transformers import PreTrainedConfig, Trainer, TrainingArguments
from transformers.utils import strtobool


# Their versions decide what is computed; two ranks with different ones would drift apart, or wait for each other.
PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "peft", "hf-sparse-moe")
# Of the arguments, what may differ from rank to rank.
_OF_A_RANK = {"local_rank", "logging_dir", "output_dir", "log_level", "log_level_replica"}


def check_processes(args: TrainingArguments) -> None:
    """
    Raise unless Trainer sees all the processes that a launcher has started.

    Args:
        args (`TrainingArguments`): Those of the run; reading them opens the process group.

    Raises:
        ValueError: torchrun, `accelerate launch` or SLURM started, or were asked for, more processes.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > args.world_size:
        raise ValueError(
            f"{launched} processes were launched, but each would train alone (`world_size={args.world_size}`), since "
            "this machine has no GPU that torch can use. To train on the CPU pass `--use_cpu true`."
        )
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks > args.world_size:
        raise ValueError(
            f"`srun` started {tasks} tasks that know nothing of each other (`world_size={args.world_size}`). Start "
            "one task a node, and in it `torchrun`, as training/launch/slurm.sh does."
        )
    asked = _asked_of_accelerate()
    if asked > args.world_size:
        raise ValueError(
            f"`accelerate launch` was asked for {asked} processes and started {args.world_size}: with `--cpu` it "
            "ignores `--num_processes`. Use `--config_file training/configs/cpu_2_processes.yaml`, or `torchrun "
            f"--nproc_per_node {asked}` with `--use_cpu true`."
        )


def _asked_of_accelerate() -> int:
    """The processes that the `accelerate launch` above this process was asked for; 1 where there is none."""
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return 1
    import psutil
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    parent = psutil.Process().parent()
    line = [] if parent is None else parent.cmdline()
    start = next((place for place, word in enumerate(line) if word == "launch" or "commands.launch" in word), None)
    if start is None or not any("accelerate" in word for word in line):
        return 1
    asked, _ = launch_command_parser().parse_known_args(line[start + 1 :])
    if asked.num_processes is None and asked.config_file is not None:
        return load_config_from_file(asked.config_file).num_processes
    return asked.num_processes or 1


def check_engine(trainer: Trainer) -> None:
    """
    Raise unless a trainer, before its training, is going to run on the engine that was asked for.

    Args:
        trainer (`Trainer`): One whose model is loaded.

    Raises:
        ValueError: FSDP or DeepSpeed would quietly become DDP, or a model is shared out in no way though
            `distributed_config` was given.
    """
    args, runs = trainer.args, trainer.accelerator.distributed_type.value
    fsdp = trainer.is_fsdp_enabled or trainer.is_fsdp_xla_enabled
    for name, asked, is_on in (
        ("FSDP", bool(args.fsdp) or _flag("ACCELERATE_USE_FSDP"), fsdp),
        ("DeepSpeed", bool(args.deepspeed) or _flag("ACCELERATE_USE_DEEPSPEED"), trainer.is_deepspeed_enabled),
    ):
        if asked and not is_on:
            raise ValueError(
                f"{name} was asked for, but on `{args.device.type}` Accelerate runs {runs} in its place, a whole copy "
                "of the model in each process. Use GPUs, or what shares the model out on CPUs too: `--deepspeed "
                "training/configs/zero3.json`, or `--distributed_config '{\"fsdp_size\": 2}'`."
            )
    if getattr(trainer.accelerator, "is_fsdp2", False):
        check_tied_weights(trainer)
    if args.deepspeed and args.device.type == "cpu" and args.world_size > 1:
        _check_deepspeed_processes(args.world_size)


def _check_deepspeed_processes(processes: int) -> None:
    from deepspeed import comm

    if not comm.is_initialized() or comm.get_world_size() != processes:
        raise ValueError(
            f"DeepSpeed does not see the {processes} processes. On CPUs call `deepspeed.init_distributed("
            'dist_backend="gloo")` before the model is loaded; the recipes do.'
        )


def check_same_everywhere(args: TrainingArguments, **configs: Any) -> None:
    """
    Raise, on every rank, unless all ranks run the same packages with the same arguments and configs.

    Args:
        args (`TrainingArguments`): Those of this rank.
        **configs (`PreTrainedConfig` or dataclass, *optional*): What else must agree, by name.

    Raises:
        ValueError: they do not; names the first difference.
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return
    mine = {f"version of {name}": _version(name) for name in PACKAGES} | {"python": platform.python_version()}
    mine |= {f"--{name}": repr(value) for name, value in args.to_dict().items() if name not in _OF_A_RANK}
    for title, config in configs.items():
        fields = config.to_dict() if isinstance(config, PreTrainedConfig) else vars(config)
        mine |= {f"{title}.{name}": repr(value) for name, value in fields.items() if not name.startswith("_")}
    ranks: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(ranks, mine)
    for rank, theirs in enumerate(ranks):
        for name in sorted({*ranks[0], *theirs}):
            if theirs.get(name) != ranks[0].get(name):
                raise ValueError(
                    f"The ranks differ in `{name}`: {ranks[0].get(name)} on rank 0, {theirs.get(name)} on rank {rank}."
                    " Start all of them with the same environment and the same command line."
                )


def check_tied_weights(trainer: Trainer) -> None:
    """
    Raise where Accelerate's FSDP2 would stop in the first forward pass: it gives embedding and head a group of their
    own, and what is tied to them elsewhere would be in a second one.

    Args:
        trainer (`Trainer`): One whose model is loaded.

    Raises:
        ValueError: modules beside embedding and head share a parameter, as in BERT and T5.
    """
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    ends = {model.get_input_embeddings(), model.get_output_embeddings()}
    owners: dict[int, list[str]] = {}
    outside: set[int] = set()
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
                outside |= set() if module in ends else {id(parameter)}
    shared = [names for parameter, names in owners.items() if len(names) > 1 and parameter in outside]
    if shared:
        raise ValueError(
            f"Accelerate's FSDP2 cannot shard `{type(model).__name__}`, in which {' and '.join(shared[0])} share a "
            "parameter. Use `--distributed_config '{\"fsdp_size\": 2}'` (the number of processes), DeepSpeed, or DDP."
        )


def apply_timeout(args: TrainingArguments) -> None:
    """
    Have `--ddp_timeout` hold on CPUs too, for all groups of processes that there are: a rank that waits longer than
    that for the others raises an error. Trainer itself passes it on for GPUs only, and leaves gloo's own 30 minutes.

    Args:
        args (`TrainingArguments`): Those of the run.
    """
    if args.device.type == "cpu" and distributed.is_available() and distributed.is_initialized():
        for group in distributed_c10d._world.pg_map:
            distributed_c10d._set_pg_timeout(args.ddp_timeout_delta, group)


def join_deepspeed(args: TrainingArguments) -> None:
    """
    Have DeepSpeed know of all processes before a model is built. Accelerate sees to it on GPUs; on CPUs ZeRO-3 would
    take each process for the only one.
    """
    if args.deepspeed and args.device.type == "cpu" and args.world_size > 1:
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)


def _flag(name: str) -> bool:
    return bool(strtobool(os.environ.get(name, "false")))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
