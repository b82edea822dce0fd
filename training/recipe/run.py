"""The frame of a recipe: arguments in, a run, a model and its numbers out."""

from __future__ import annotations

import logging
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import yaml
from datasets.exceptions import DatasetsError
from torch.utils.data import SequentialSampler
from transformers import HfArgumentParser, Trainer, set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.utils import CONFIG_NAME

from hf_sparse_moe.distributed.checkpoint import find_last_checkpoint, keep_checkpoints_whole
from hf_sparse_moe.distributed.stored_weights import check_same_model
from hf_sparse_moe.hub import ModelCardCallback, add_model_card, write_model_card
from hf_sparse_moe.models.pretrained_model import SparseMoePreTrainedModel
from hf_sparse_moe.routing import RoutingMonitor, SelectionBiasCallback, add_leading_callback
from recipe.launch import (
    apply_timeout,
    check_engine,
    check_processes,
    check_same_everywhere,
    join_deepspeed,
)

from .data import DataArguments, data_names
from .optimization import TrainingArguments, prepare_training
from .tracking import keep_one_run


logger = logging.getLogger("recipe")


@contextmanager
def stop_on_bad_input() -> Iterator[None]:
    """End the program with one sentence and exit code 2 where arguments, files or checkpoints are wrong."""
    try:
        yield
    except (ValueError, OSError, DatasetsError, yaml.YAMLError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from error


def parse_arguments(description: str, *classes: type) -> tuple:
    """
    The arguments by class, of the command line, of which the first may be a YAML or JSON file: what is said on the
    line wins. The last class is `TrainingArguments`.

    Seeds all generators, and looks for an interrupted run: its last checkpoint goes into `resume_from_checkpoint`.
    """
    parser = HfArgumentParser(classes, description=description)
    line, file = sys.argv[1:], None
    if line and line[0].endswith((".yaml", ".yml", ".json")):
        file = line.pop(0)
        arguments = parser.parse_dict(_file_and_line(parser, file, line))
    else:
        arguments = parser.parse_args_into_dataclasses(look_for_args_file=False)
    args: TrainingArguments = arguments[-1]
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logger.setLevel(args.get_process_log_level())
    output = Path(args.output_dir)
    if args.resume_from_checkpoint is not None and not Path(args.resume_from_checkpoint).is_dir():
        raise ValueError(f"`--resume_from_checkpoint={args.resume_from_checkpoint}` is no folder. Check the path.")
    if args.resume_from_checkpoint is None and output.is_dir() and any(output.iterdir()):
        args.resume_from_checkpoint = find_last_checkpoint(args.output_dir)
        if args.resume_from_checkpoint is None:
            raise ValueError(f"`--output_dir={output}` is not empty and holds no checkpoint. Name another folder.")
        logger.warning("Going on from %s; name another `--output_dir` to begin anew.", args.resume_from_checkpoint)
    check_processes(args)
    join_deepspeed(args)
    apply_timeout(args)
    check_same_everywhere(args, **{type(part).__name__: part for part in arguments[:-1]})
    set_seed(args.seed)
    return arguments


def _file_and_line(parser: HfArgumentParser, file: str, line: list[str]) -> dict[str, Any]:
    """The arguments of a file and of a command line, which wins; numbers that YAML reads as text are numbers."""

    def fail(message: str) -> NoReturn:
        raise ValueError(f"`{file}`: {message}")

    values = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        fail("it must hold a mapping of arguments to values")
    parser.error = fail
    scalars = [
        f"--{name}={value}"
        for name, value in values.items()
        if isinstance(value, str | int | float) and not isinstance(value, bool)
    ]
    unset = Namespace(**dict.fromkeys(vars(parser.parse_args([]))))  # no defaults, which would win over the file
    given = vars(parser.parse_args([*scalars, *line], unset))
    return values | {name: value for name, value in given.items() if value is not None}


def train_and_evaluate(trainer: Trainer, data_args: DataArguments, eval_metrics: str | None = None) -> None:
    """
    Train where there is training data, evaluate where there is validation data; write the model, the numbers and the
    model card, with `eval_metrics` on how they were computed, and with `--push_to_hub` publish them.
    """
    checkpoint = trainer.args.resume_from_checkpoint
    model = trainer.accelerator.unwrap_model(trainer.model)
    model = getattr(model, "transformers_model", model)  # that of sentence-transformers holds one of transformers
    is_mixture = isinstance(model, SparseMoePreTrainedModel)
    with stop_on_bad_input():
        check_engine(trainer)
        check_same_everywhere(trainer.args, model=trainer.model.config)  # each node may have a disk of its own
        if checkpoint is not None:
            check_same_model(model, checkpoint)
        prepare_training(trainer, is_mixture)
    # Metrics pair each prediction with its row; Trainer's `group_by_length` would shuffle the validation data too.
    trainer.__dict__["_get_eval_sampler"] = SequentialSampler
    apply_timeout(trainer.args)  # the model may have opened groups of its own
    train_data, eval_data = data_names(data_args)
    if is_mixture:  # a dense model gets the card of transformers
        task = "default"
        if data_args.whole_split:
            task = data_args.dataset_config_name or task
            eval_metrics = f"{eval_metrics}; on the split {data_args.validation_split}"
        add_model_card(trainer, ModelCardCallback(train_data, eval_data, task, eval_metrics=eval_metrics))
    if trainer.train_dataset is not None:
        if is_mixture:
            add_leading_callback(trainer, RoutingMonitor())
        if is_mixture and trainer.model.config.router_bias_update_speed > 0:
            trainer.add_callback(SelectionBiasCallback())
        keep_checkpoints_whole(trainer)
        keep_one_run(trainer, checkpoint)
        result = trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        trainer.save_state()
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
    if trainer.eval_dataset is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    unset_hf_deepspeed_config()  # or the models that the card is checked with would be shared out, on one rank alone
    if not is_mixture:
        trainer.create_model_card()
    elif trainer.is_world_process_zero() and (Path(trainer.args.output_dir) / CONFIG_NAME).is_file():
        write_model_card(trainer.args.output_dir)
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    trainer.accelerator.wait_for_everyone()  # DeepSpeed's last process would wait for one that has gone
