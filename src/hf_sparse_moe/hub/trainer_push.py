"""`Trainer.push_to_hub` with the checkpoint's own card, and without pickles."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitInfo
from transformers import Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from hf_sparse_moe.models.pretrained_model import SparseMoePreTrainedModel

from .adapter_folder import Adapter
from .adapter_publish import adapter_in_memory
from .base_identity import is_mixture, record_base
from .checkpoint import PICTURE_NAME, ROUTING_NAME, Checkpoint, checkpoint_in_memory, read_json
from .errors import HubUnavailableError
from .model_card import render_model_card, write_model_card, write_readme
from .publish import push_folder
from .training_record import ModelCardCallback


if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.get_logger(__name__)


def add_model_card(trainer: Trainer, callback: ModelCardCallback | None = None) -> ModelCardCallback:
    """
    Have a trainer record its training, and publish with the card that tells it.

    The stock `Trainer.push_to_hub` writes a card of its own over ours and uploads `training_args.bin`, a pickle, and
    no callback can keep it from that. So on this one trainer `push_to_hub` becomes [`push_trainer`],
    `create_model_card` writes our card, and the pushes of `TrainingArguments(push_to_hub=True)` go the same way. The
    class `Trainer` stays as it is.

    Args:
        trainer (`Trainer`):
            With one of this package's models, or an adapter of a mixture; of any subclass of `Trainer`.
        callback ([`ModelCardCallback`], *optional*): Knows names of data, licence and language.

    Returns:
        [`ModelCardCallback`]: the callback, now one of the trainer's.

    Raises:
        ValueError: another model, or a `hub_strategy` that uploads optimizer states, which are pickles.
    """
    _check_model(trainer)
    strategy = HubStrategy(trainer.args.hub_strategy).value
    if strategy in ("checkpoint", "all_checkpoints"):
        raise ValueError(
            f"`hub_strategy={strategy!r}` uploads the optimizer's state, which is a pickle, and none is published. "
            "Choose 'every_save' or 'end'."
        )
    callback = callback or ModelCardCallback()
    trainer.add_callback(callback)
    trainer.__dict__ |= {
        "push_to_hub": partial(push_trainer, trainer),
        "create_model_card": partial(create_model_card, trainer),
        "_push_from_checkpoint": partial(_push_from_checkpoint, trainer, callback),
    }
    return callback


def push_trainer(
    trainer: Trainer,
    commit_message: str | None = "End of training",
    blocking: bool = True,
    token: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    *,
    create_pr: bool = False,
    license: str | None = None,
    language: str | Iterable[str] | None = None,
    tags: Iterable[str] | None = None,
) -> CommitInfo | None:
    """
    Publish a trainer's model, tokenizer and card in one commit. Called by every process of the training, so that
    weights which are spread over them are gathered; pickles and logs are not published.

    Args:
        trainer (`Trainer`): With one of this package's models, or an adapter of a mixture.
        commit_message (`str`, *optional*): As `Trainer.push_to_hub` takes it.
        blocking (`bool`): It waits for the commit; False is refused.
        token (`str`, *optional*): Defaults to `hub_token` of the training arguments.
        revision (`str`, *optional*): Defaults to `hub_revision` of the training arguments.
        private (`bool`, *optional*): Defaults to `hub_private_repo` of the training arguments.
        create_pr (`bool`, defaults to `False`): Open a pull request.
        license (`str`, *optional*): See [`render_model_card`].
        language (`str` or `Iterable[str]`, *optional*): The same.
        tags (`Iterable[str]`, *optional*): The same.

    Returns:
        [`~huggingface_hub.CommitInfo`], on the main process.
    """
    model = _check_model(trainer)
    if not blocking:
        raise ValueError("`blocking=False` is not allowed: weights and card are one commit, which is waited for.")
    args = trainer.args
    trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
    output = Path(str(args.output_dir))
    folder = output / "_push"  # fresh, so that no weights of an earlier save can take these ones' place
    trainer.save_model(str(folder), _internal_call=True)
    if not trainer.is_world_process_zero():
        return None
    try:
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's, beside an adapter
        for name in ("README.md", ROUTING_NAME, PICTURE_NAME):
            if (output / name).is_file():
                shutil.copyfile(output / name, folder / name)
        if callback := _callback_of(trainer):
            callback.write(args, trainer.state, folder)
        if _is_adapted(model):
            record_base(model, folder)
        repo_id = _repo_id(trainer)
        write_model_card(folder, repo_id, license=license, language=language, tags=tags)
        published = push_folder(
            folder,
            repo_id,
            private=args.hub_private_repo if private is None else private,
            revision=revision or args.hub_revision,
            create_pr=create_pr,
            commit_message=commit_message,
            token=token or args.hub_token,
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return published.commit


def create_model_card(
    trainer: Trainer,
    language: str | Iterable[str] | None = None,
    license: str | None = None,
    tags: str | Iterable[str] | None = None,
) -> None:
    """Write the card of a trainer's model, as it is now, into its output folder."""
    if not trainer.is_world_process_zero():
        return
    callback, folder = _callback_of(trainer), Path(str(trainer.args.output_dir))
    record = None if callback is None else callback.record(trainer.args, trainer.state)
    model = _check_model(trainer)
    if isinstance(model, SparseMoePreTrainedModel):
        published: Checkpoint | Adapter = checkpoint_in_memory(model, record, read_json(folder / ROUTING_NAME))
    else:
        published = adapter_in_memory(model, record)
    write_readme(
        folder,
        partial(
            render_model_card,
            published,
            _repo_id(trainer),
            license=license,
            language=language,
            tags=[tags] if isinstance(tags, str) else tags,
        ),
    )


def _push_from_checkpoint(trainer: Trainer, callback: ModelCardCallback, checkpoint_folder: str) -> None:
    """What Trainer calls after it has saved a checkpoint. A push that fails now does not end the training."""
    args, state = trainer.args, trainer.state
    if not trainer.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
        return
    trainer.callback_handler.on_push_begin(args, state, trainer.control)
    callback.write(args, state, checkpoint_folder)
    try:
        push_folder(
            checkpoint_folder,
            _repo_id(trainer),
            private=args.hub_private_repo,
            revision=args.hub_revision,
            commit_message=f"Training in progress, step {state.global_step}",
            token=args.hub_token,
        )
    except HubUnavailableError as error:
        logger.warning(f"Step {state.global_step} was not published, and the training goes on. {error}")


def _check_model(trainer: Trainer) -> SparseMoePreTrainedModel | PeftModel:
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    if not isinstance(model, SparseMoePreTrainedModel) and not _is_adapted(model):
        raise ValueError(
            f"`trainer.model` is a {type(model).__name__}, of which this card knows nothing: it is for the classes of "
            "hf_sparse_moe, and for adapters of mixtures. Use the trainer as it is."
        )
    return model


def _is_adapted(model: Any) -> bool:
    return hasattr(model, "get_base_model") and is_mixture(model)


def _callback_of(trainer: Trainer) -> ModelCardCallback | None:
    callbacks = trainer.callback_handler.callbacks
    return next((callback for callback in callbacks if isinstance(callback, ModelCardCallback)), None)


def _repo_id(trainer: Trainer) -> str:
    return trainer.hub_model_id or trainer.args.hub_model_id or Path(str(trainer.args.output_dir)).resolve().name
