"""Which mixture an adapter was trained on: a sample of its weights, to know it again."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_sparse_moe.checkpoints.source import Source
from hf_sparse_moe.routing.mixture_layers import MixtureLayer, find_mixture_layers, without_wrapper
from hf_sparse_moe.upcycling.receipt import source_files

from .checkpoint import mapping, read_json


if TYPE_CHECKING:
    from peft import PeftModel

BASE_NAME = "adapter_base.json"
SAMPLES = 4  # of each expert in each tensor: a further step of training moves most of them
MATRIX_SAMPLES = 32  # of each other weight
ROUTER = "router"


def read_base(folder: Path) -> Mapping[str, Any]:
    """
    The record beside an adapter; empty where there is none.

    Raises:
        ValueError: a file that [`identify_base`] did not make.
    """
    recorded = read_json(folder / BASE_NAME)
    try:
        for tensors in [*recorded["layers"].values(), recorded.get("weights", {})] if recorded else ():
            for described in tensors.values():
                experts, *_ = described["shape"]
                _decode(described)
                if not all(isinstance(size, int) for size in described["shape"]) or experts < 1:
                    raise ValueError(f"`shape` is {described['shape']}")
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"`{folder / BASE_NAME}` is not what this package writes ({type(error).__name__}). Fetch the adapter "
            "again, or delete that file."
        ) from error
    return recorded


def identify_base(model: PreTrainedModel | PeftModel, source: Source | None = None) -> dict[str, Any]:
    """
    What tells a mixture from others, for `adapter_base.json` beside an adapter: of each sparse layer the shapes and a
    few numbers of each expert, and a few numbers of each other weight but the embeddings, which may grow. As bfloat16
    holds them, so that a base in another dtype is recognised.

    Args:
        model (`PreTrainedModel`): The base, alone or inside a `PeftModel` whose adapters are not merged.
        source ([`Source`], *optional*): Where it was read from; gives id, revision and hashes.
    """
    model = without_adapter(model)
    return {
        "name_or_path": source.name if source else public_name(model.config.name_or_path),
        "revision": source.revision if source else None,
        "architecture": type(model).__name__,
        "sha256": source_files(source.folder) if source else {},
        "dtype": _name(model.dtype),
        "layers": {
            layer.name: {name: _describe(tensor) for name, tensor in _tensors(layer)} for layer in _layers(model)
        },
        "weights": {name: _describe(weight, MATRIX_SAMPLES) for name, weight in _other_weights(model)},
    }


def record_base(model: Any, folder: str | Path) -> None:
    """Write what tells a `PeftModel`'s base from others beside its adapter; nothing for a base without experts."""
    if is_mixture(model):
        write_base(identify_base(model), Path(folder))


def write_base(recorded: Mapping[str, Any], folder: Path) -> None:
    """Write `adapter_base.json`."""
    (folder / BASE_NAME).write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")


def without_adapter(model: Any) -> PreTrainedModel:
    """The model inside a `PeftModel`, its layers still wrapped; another model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_mixture(model: PreTrainedModel | PeftModel) -> bool:
    """Whether a model, alone or inside a `PeftModel`, has sparse layers."""
    try:
        return bool(_layers(model))
    except ValueError:
        return False


def base_difference(recorded: Mapping[str, Any], model: PreTrainedModel) -> str | None:
    """
    How `model` differs from the base that was recorded, in words; None where it is that base.

    Args:
        recorded (`Mapping`): What [`identify_base`] returned, perhaps long ago and elsewhere.
        model (`PreTrainedModel`): A mixture, alone or inside a `PeftModel`.
    """
    if not is_mixture(model):
        return "it has no sparse layer"
    layers = {layer.name: layer for layer in _layers(model)}
    wanted: Mapping[str, Any] = recorded["layers"]
    if layers.keys() != wanted.keys():
        return f"it has {len(layers)} sparse layers, and that base {len(wanted)} or others"
    tolerant = torch.float16 in (model.dtype, getattr(torch, str(recorded.get("dtype")), None))
    for name, layer in layers.items():
        there, here = wanted[name], dict(_tensors(layer))
        for tensor in sorted(here.keys() & there.keys()):
            shape, own = there[tensor]["shape"], list(here[tensor].shape)
            if shape[0] != own[0]:
                return f"`{name}` has {own[0]} experts, and had {shape[0]} there"
            if shape != own and there[tensor]["samples"] is not None and _sample(here[tensor]) is not None:
                return f"`{tensor}` of `{name}` has the shape {tuple(own)}, and had {tuple(shape)} there"
        if found := _content_difference(name, there, here, tolerant):
            return found
    others = recorded.get("weights", {})
    for name, weight in _other_weights(model):
        if name in others and _close(others[name], weight, tolerant, MATRIX_SAMPLES) is False:
            return f"`{name}` holds other numbers"
    return None


def _close(described: Mapping[str, Any], weight: torch.Tensor, tolerant: bool, samples: int) -> bool | None:
    recorded, own = _decode(described), _sample(weight, samples)
    if recorded is None or own is None:
        return None
    return recorded.shape == own.shape and bool(_same(recorded, own, tolerant).all())


def _same(recorded: torch.Tensor, own: torch.Tensor, tolerant: bool) -> torch.Tensor:
    return torch.isclose(recorded, own, rtol=2**-7, atol=1e-6) if tolerant else torch.eq(recorded, own)


def _content_difference(
    layer: str, there: Mapping[str, Any], here: dict[str, torch.Tensor], tolerant: bool
) -> str | None:
    equal = {}  # (E, E) of each tensor: whether expert e there is expert f here
    for tensor in sorted(here.keys() & there.keys()):
        recorded, own = _decode(there[tensor]), _sample(here[tensor])
        if recorded is not None and own is not None:
            equal[tensor] = _same(recorded[:, None], own[None, :], tolerant).all(-1)
    different = [tensor for tensor, same in equal.items() if not same.diagonal().all()]
    if not different:
        return None
    same = torch.stack(list(equal.values())).all(0)
    if same.any(0).all() and same.any(1).all():
        moved = int((~same.diagonal()).nonzero()[0])
        return (
            f"the experts of `{layer}` stand in another order: expert {moved} there is expert "
            f"{int(same[moved].nonzero()[0])} here"
        )
    return f"`{different[0]}` of `{layer}` holds other numbers"


def _layers(model: PreTrainedModel | PeftModel) -> list[MixtureLayer]:
    return find_mixture_layers(without_adapter(model))


def _tensors(layer: MixtureLayer) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors with one entry an expert: the router's weight and those of the experts."""
    scores = (
        weight for weight in _own(layer.router).parameters() if weight.dim() == 2 and len(weight) == layer.num_experts
    )
    if (weight := next(scores, None)) is not None:
        yield ROUTER, weight
    for name, weight in without_wrapper(layer.experts).named_parameters(recurse=False):
        if weight.dim() == 3:
            yield name, weight


def _other_weights(model: PreTrainedModel | PeftModel) -> Iterator[tuple[str, torch.Tensor]]:
    """(1, O, I) of each matrix outside of sparse layers and embeddings, by the name that it has in the base."""
    model = without_adapter(model)
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    passed = {_own(end) for end in ends if end is not None}
    for layer in _layers(model):
        passed |= {_own(layer.router), _own(layer.experts)}
    waiting = [("", cast("nn.Module", model))]
    while waiting:
        prefix, module = waiting.pop()
        module = _own(module)
        if module in passed or isinstance(module, nn.Embedding):
            continue
        weight = module._parameters.get("weight")
        if weight is not None and weight.dim() == 2:
            yield f"{prefix}weight", weight[None]
        waiting.extend((f"{prefix}{name}.", child) for name, child in module.named_children())


def _own(module: nn.Module) -> Any:
    """The base's module inside PEFT's layers; a copy that is trained stands beside the original."""
    module = without_wrapper(module)
    return getattr(module, "original_module", module)


def _describe(tensor: torch.Tensor, samples: int = SAMPLES) -> dict[str, Any]:
    return {"shape": list(tensor.shape), "samples": _encode(tensor, samples)}


def _sample(weight: torch.Tensor, samples: int = SAMPLES) -> torch.Tensor | None:
    """(E, samples), rounded to bfloat16; None of weights that are quantised, sharded or not in memory."""
    plain = type(weight.data) is torch.Tensor and weight.is_floating_point() and weight.device.type != "meta"
    if not plain:
        return None
    flat = weight.detach().flatten(1)
    places = torch.linspace(0, flat.shape[1] - 1, min(samples, flat.shape[1]), device=flat.device).long()
    return flat[:, places].bfloat16().cpu()


def _encode(weight: torch.Tensor, samples: int = SAMPLES) -> str | None:
    sample = _sample(weight, samples)
    return None if sample is None else base64.b64encode(sample.view(torch.uint8).numpy().tobytes()).decode()


def _decode(described: Mapping[str, Any]) -> torch.Tensor | None:
    if described["samples"] is None:
        return None
    data = bytearray(base64.b64decode(described["samples"]))
    return torch.frombuffer(data, dtype=torch.bfloat16).view(described["shape"][0], -1)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def public_name(name_or_path: str | None) -> str | None:
    """A Hub id as it is; of a folder its own name, for where it lies is nobody else's business."""
    if not name_or_path:
        return None
    path = Path(name_or_path)
    return path.resolve().name if path.is_absolute() or path.exists() else name_or_path


def base_experts(base: Mapping[str, Any]) -> dict[str, int]:
    """The number of experts of each sparse layer that is recorded, by the layer's name."""
    return {name: next(iter(tensors.values()))["shape"][0] for name, tensors in mapping(base.get("layers")).items()}
