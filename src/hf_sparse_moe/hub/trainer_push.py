"""`Trainer.push_to_hub` with the checkpoint's own card, and without pickles."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitInfo
from transformers import Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from hf_sparse_moe.checkpoints.files import is_own
from hf_sparse_moe.models.pretrained_model import SparseMoePreTrainedModel

from .adapter_files import is_mixture, record_base
from .checkpoint import PICTURE_NAME, ROUTING_NAME
from .publish import PushReport, hub_model_id, push
from .training_record import ModelCardCallback


if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.get_logger(__name__)


def add_model_card(trainer: Trainer, callback: ModelCardCallback | None = None) -> ModelCardCallback:
    """
    Have a trainer record its training, and publish with the card that describes it.

    The stock `Trainer.push_to_hub` writes a card of its own last and uploads `training_args.bin`, a pickle; a callback
    is called before both, and is not given the trainer. So on this one trainer `push_to_hub` becomes [`push`], and the
    pushes of `TrainingArguments(push_to_hub=True)` go the same way. Those during the training take no fingerprint, and
    one that fails is a warning. The class `Trainer` stays as it is.

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
        "push_to_hub": partial(_push_to_hub, trainer),
        "_push_from_checkpoint": partial(_push_from_checkpoint, trainer, callback),
    }
    return callback


@contextmanager
def saved_trainer(trainer: Trainer) -> Iterator[Path | None]:
    """
    What a trainer publishes, in a folder of its own that is removed in the end; None but on the main process. All of
    them must ask, so that weights which are spread over them are gathered.
    """
    model = _check_model(trainer)
    trainer.callback_handler.on_push_begin(trainer.args, trainer.state, trainer.control)
    output = Path(str(trainer.args.output_dir))
    output.mkdir(parents=True, exist_ok=True)
    # A new name each time: what lies in the output folder is the user's, or of a push that was killed.
    with tempfile.TemporaryDirectory(prefix=".push-", dir=output) as temporary:
        folder = Path(temporary)
        trainer.save_model(str(folder), _internal_call=True)
        if not trainer.is_world_process_zero():
            yield None
            return
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's, beside an adapter
        for name in ("README.md", ROUTING_NAME, PICTURE_NAME):
            if is_own(output / name, output):
                shutil.copyfile(output / name, folder / name)
        if callback := _callback_of(trainer):
            callback.write(trainer.args, trainer.state, folder)
        if not isinstance(model, SparseMoePreTrainedModel):
            record_base(model, folder)
        yield folder


def _push_to_hub(
    trainer: Trainer,
    commit_message: str | None = "End of training",
    blocking: bool = True,
    token: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    **options: Any,
) -> CommitInfo | None:
    """[`push`] with the arguments of `Trainer.push_to_hub`."""
    if not blocking:
        raise ValueError("`blocking=False` is not supported: weights and card are one commit. Leave it out.")
    options |= {"token": token, "revision": revision, "private": private}
    report: PushReport | None = push(trainer, commit_message=commit_message, **options)
    return report.commit if report else None


def _push_from_checkpoint(trainer: Trainer, callback: ModelCardCallback, checkpoint_folder: str) -> None:
    """What Trainer calls after it has saved a checkpoint. A push that fails now does not end the training."""
    args, state = trainer.args, trainer.state
    if not trainer.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
        return
    trainer.callback_handler.on_push_begin(args, state, trainer.control)
    callback.write(args, state, checkpoint_folder)
    try:
        push(
            checkpoint_folder,
            hub_model_id(trainer),
            private=args.hub_private_repo,
            revision=args.hub_revision,
            commit_message=f"Training in progress, step {state.global_step}",
            fingerprint=False,
            token=args.hub_token,
        )
    except (OSError, ValueError) as error:
        logger.warning(f"Step {state.global_step} was not published; the training continues. {error}")


def _check_model(trainer: Trainer) -> SparseMoePreTrainedModel | PeftModel:
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    model = getattr(model, "transformers_model", model)  # that of sentence-transformers holds one of transformers
    if not isinstance(model, SparseMoePreTrainedModel) and not (hasattr(model, "peft_config") and is_mixture(model)):
        raise ValueError(
            f"`trainer.model` is a {type(model).__name__}; this needs a class of hf_sparse_moe, or an adapter of a "
            "mixture. Use the trainer's own `push_to_hub`."
        )
    return model


def _callback_of(trainer: Trainer) -> ModelCardCallback | None:
    callbacks = trainer.callback_handler.callbacks
    return next((callback for callback in callbacks if isinstance(callback, ModelCardCallback)), None)
