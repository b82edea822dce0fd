"""Whether a checkpoint is one of the model that is to go on from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .consolidate import stored_tensors
from .consolidate_expert_parallel import plain_tensors


_ADAPTER = "adapter_model.safetensors"


def check_same_model(model: Any, checkpoint: str | Path) -> None:
    """
    Raise unless the tensors of a checkpoint, of whatever engine, are the model's by name and shape. Trainer would
    leave the others out without a word, or stop with some of the weights loaded. Headers are read, no weights.

    Args:
        model (`SparseMoePreTrainedModel` or `PeftModel`): That of the trainer, before `train`.
        checkpoint (`str` or `Path`): The folder `checkpoint-...` to go on from.

    Raises:
        ValueError: a checkpoint of another model, or a damaged one.
    """
    folder = Path(checkpoint)
    adapted = (folder / _ADAPTER).is_file()
    if adapted and hasattr(model, "peft_config"):
        from peft import get_peft_model_state_dict

        stored, state, tied = plain_tensors([folder / _ADAPTER]), get_peft_model_state_dict(model), {}
    elif hasattr(model, "peft_config"):
        return  # the engines that shard keep an adapter in ways of their own
    elif adapted:
        raise _another(folder, "it holds an adapter, and the model has none")
    else:
        stored, state, tied = stored_tensors(folder)[1], model.state_dict(), model.all_tied_weights_keys
    parameters = dict(model.named_parameters())
    # A parameter that ZeRO-3 cut up is empty here, and remembers its shape.
    shapes = {key: tuple(getattr(parameters.get(key), "ds_shape", value.shape)) for key, value in state.items()}
    for key, tensor in stored.items():
        if shapes.get(key) != tensor.shape:
            wanted = f"is {shapes[key]} in the model" if key in shapes else "is nowhere in the model"
            raise _another(folder, f"its `{key}` of shape {tensor.shape} {wanted}")
    for key in shapes:
        names = {key, tied.get(key, key), *(alias for alias, first in tied.items() if first == key)}
        if names.isdisjoint(stored):
            raise _another(folder, f"it lacks `{key}`")


def _another(folder: Path, reason: str) -> ValueError:
    return ValueError(
        f"`{folder}` is of another model: {reason}. Name another `--output_dir` to begin anew, or go on with the "
        "model that the checkpoint was made of."
    )
