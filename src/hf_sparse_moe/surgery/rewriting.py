"""
Other experts in the place of those of a mixture, in memory and from disk to disk.

A tensor has an expert axis where its shape follows the number of experts: experts' weights and biases, router rows and
biases, selection biases, quantised codes and scales. On disk, experts may also be tensors of their own, by number.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import dot_natural_key, revert_weight_conversion
from transformers.utils import logging

from hf_sparse_moe.checkpoints.companions import copy_companions
from hf_sparse_moe.checkpoints.config import read_config, read_generation_config, sensible_config
from hf_sparse_moe.checkpoints.files import read_json
from hf_sparse_moe.checkpoints.folder import check_target, new_folder, write_description
from hf_sparse_moe.checkpoints.journal import WatchedSource, written_shards
from hf_sparse_moe.checkpoints.loading import class_of, load_whole
from hf_sparse_moe.checkpoints.reader import NotStreamableError, TensorFiles, stored_dtype
from hf_sparse_moe.checkpoints.source import Source, find_source, missing_weight, weight_files
from hf_sparse_moe.checkpoints.writer import ShardWriter
from hf_sparse_moe.models.configuration_sparse_moe import SparseMoeConfig
from hf_sparse_moe.models.pretrained_model import RECEIPT_NAME, SparseMoePreTrainedModel
from hf_sparse_moe.routing.mixture_layers import NUM_EXPERTS_NAMES, MixtureLayer, find_mixture_layers
from hf_sparse_moe.stock.tensors import Tensors, stored_tensors
from hf_sparse_moe.upcycling.mixtures import UpcycleReport, check_unwrapped


logger = logging.get_logger(__name__)

Part = tuple[list[str], Callable[[Mapping[str, torch.Tensor]], Tensors]]  # names, and what makes these tensors
_EXPERTS = re.compile(r"\bexperts\.")
_NUMBER = re.compile(r"(?<=\bexperts\.)((?:expert_)?)\d+(?=\.)")


@dataclass(frozen=True)
class ExpertRows:
    """
    The new experts of one sparse layer, of E experts before and N after.

    Args:
        sources (`Sequence[Sequence[int]]`): For each new expert, the old ones that it comes from; one each in a cut.
        combine (`Callable`, *optional*): Makes the layer's tensors with an expert axis, given those of before. Their
            names start at the sparse layer (`"experts.gate_up_proj"`, `"gate.weight"`); the expert axis is the first,
            E entries long and then N. On disk experts may be apart: `"experts.w1.weight"` then is the stack of
            `"experts.0.w1.weight"` and so on. Without it each new expert is a copy of its one source.
    """

    sources: Sequence[Sequence[int]]
    combine: Callable[[Tensors], Tensors] | None = None


class SurgeryReport(UpcycleReport):
    """What an operation on a mixture's experts wrote."""


@dataclass(frozen=True)
class Mixture:
    """
    What is operated on.

    Args:
        model (`PreTrainedModel`): The mixture; without storage where it is read from files tensor by tensor.
        layers (`list[MixtureLayer]`): Its sparse layers.
        source (`Source`, *optional*): Where it was read from.
        receipt (`dict`, *optional*): What is known of how it was made.
    """

    model: PreTrainedModel
    layers: list[MixtureLayer]
    source: Source | None
    receipt: dict[str, Any] | None

    @property
    def name(self) -> str:
        return self.source.name if self.source else type(self.model).__name__

    @property
    def before(self) -> PreTrainedModel | Path:
        """What can be run."""
        return self.source.folder if self.source and self.model.device.type == "meta" else self.model


def open_mixture(
    source: PreTrainedModel | str | Path,
    into_memory: bool,
    revision: str | None = None,
    token: bool | str | None = None,
) -> Mixture:
    """
    A mixture of this package or of transformers: a model, or the folder or Hub id of one, whose weights are read only
    `into_memory`. Raises a `ValueError` for a dense model and for one with adapters.
    """
    if not isinstance(source, str | Path):
        check_unwrapped(source)
        return Mixture(source, find_mixture_layers(source), None, getattr(source, "receipt", None))
    found = find_source(source, revision, token=token)
    config = read_config(found)
    if into_memory:
        model = load_whole(found.folder, "auto")
    else:
        cls = class_of(found, config)
        with sensible_config(found), torch.device("meta"):
            dtype = config.dtype or stored_dtype(found)
            model = cls._from_config(config, dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        if model.can_generate():
            model.generation_config = read_generation_config(found.folder) or model.generation_config
    with sensible_config(found):
        return Mixture(model, find_mixture_layers(model), found, _receipt_of(found))


def router_tensors(mixture: Mixture, layer: MixtureLayer) -> Tensors:
    """The tensors of a layer's router, read from the files where the model has no storage."""
    state = layer.router.state_dict()
    if mixture.source is None or not any(tensor.is_meta for tensor in state.values()):
        return state
    files = TensorFiles(weight_files(mixture.source))
    path = next(name for name, child in layer.block.named_modules() if child is layer.router)
    named = {f"{layer.name}.{path}.{name}": tensor for name, tensor in state.items()}
    names = {name for form in _forms(mixture.model, named) for name in form}
    return {name: files.read(name) for name in names & set(files.names)}


@torch.no_grad()
def rewrite_in_memory(mixture: Mixture, rows: Mapping[int, ExpertRows]) -> PreTrainedModel:
    """A new model in evaluation mode, that shares no memory with `mixture`, whose layer `place` has `rows[place]`."""
    old = mixture.model
    new = _resized(mixture, rows)
    state = stored_tensors(old)
    rewriting = Rewriting(mixture, new, rows, state)
    made: Tensors = {}
    for _, make in rewriting.parts:
        for name, tensor in make(state).items():
            made[name] = require_numbers(name, tensor.clone() if tensor is state.get(name) else tensor)
    new.load_state_dict(made, strict=False, assign=True)
    trained = {name: parameter.requires_grad for name, parameter in old.named_parameters()}
    buffers = dict(old.named_buffers())
    for name, buffer in [*new.named_buffers()]:
        if buffer.is_meta:  # what no checkpoint holds
            owner, _, attribute = name.rpartition(".")
            setattr(new.get_submodule(owner), attribute, buffers[name].clone())
    new.tie_weights()
    for name, parameter in new.named_parameters():
        parameter.requires_grad_(trained[name])
    if hasattr(old, "generation_config"):
        new.generation_config = copy.deepcopy(old.generation_config)
    new.name_or_path = new.config.name_or_path = ""
    return new.eval()


def rewrite_on_disk(
    mixture: Mixture,
    rows: Mapping[int, ExpertRows],
    output: str | Path,
    made_from: dict[str, Any],
    make_receipt: Callable[[PreTrainedModel, dict[str, str], Path], dict[str, Any]],
    max_shard_size: int | str = "4GB",
    resume: bool = False,
    show_progress: bool = False,
) -> SurgeryReport:
    """
    Write the mixture with other experts to a folder. Memory holds one tensor at a time, or where `rows` combine
    experts those of a layer.

    Args:
        made_from (`dict`): What the result depends on beside the source's files, for `resume`.
        make_receipt (`Callable`): Given the new model without storage, the source's hashes and the folder with all of
            the checkpoint but the receipt, makes that.
    """
    source = mixture.source
    assert source is not None
    check_target(output)
    watched, files = WatchedSource(source), TensorFiles(weight_files(source))
    stored = {name: torch.empty(files.shape(name), dtype=files.dtype(name), device="meta") for name in files.names}
    with sensible_config(source):
        new = _resized(mixture, rows)
        rewriting = Rewriting(mixture, new, rows, stored)

    def write(writer: ShardWriter) -> Generator[int]:
        for names, make in rewriting.parts:
            if any(map(writer.wants, names)):
                for name, tensor in make(_Files(files)).items():
                    if writer.wants(name):
                        yield writer.write(name, require_numbers(name, tensor))

    made_from = {"surgery": {**made_from, "max_shard_size": max_shard_size}}
    settings = (max_shard_size, resume, show_progress)
    with written_shards(output, rewriting.outputs, write, watched, made_from, *settings) as (folder, sha256):
        if isinstance(new, SparseMoePreTrainedModel):
            new.receipt = None
        elif new.can_generate():
            new.generation_config = mixture.model.generation_config
        write_description(new, folder)
        copy_companions(source.folder, folder)
        receipt = make_receipt(new, sha256, folder)
        write_receipt(receipt, folder)
    return SurgeryReport(Path(output), type(new).__name__, receipt)


def require_numbers(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor; raises a `ValueError` where it is broken. Codes of quantised experts are not looked at."""
    if tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1 and tensor.isnan().any():
        raise ValueError(f"`{name}` would hold NaN, as the checkpoint does: it is broken. Take an earlier one.")
    return tensor


def write_receipt(receipt: dict[str, Any], folder: Path) -> None:
    (folder / RECEIPT_NAME).write_text(json.dumps(receipt, indent=2) + "\n", encoding="utf-8")


def save_rewritten(
    model: PreTrainedModel, source: Source | None, output: str | Path, max_shard_size: int | str
) -> SurgeryReport:
    """Write a model of [`rewrite_in_memory`], with its `receipt` and what belongs to its source."""
    with new_folder(output, needed_bytes=sum(parameter.nbytes for parameter in model.parameters())) as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        if source is not None:
            copy_companions(source.folder, folder)
        receipt: Any = model.receipt
        write_receipt(receipt, folder)
    return SurgeryReport(Path(output), type(model).__name__, receipt)


class Rewriting:
    """
    All of a rewriting that is known before a weight is read.

    Args:
        mixture ([`Mixture`]): As it is.
        new (`PreTrainedModel`): As it will be, without storage.
        rows (`Mapping[int, ExpertRows]`): By the place of the layer; other layers stay as they are.
        stored (`Mapping[str, torch.Tensor]`): The mixture's tensors, by their names in memory or on disk. Only their
            shapes and dtypes are read.

    Raises:
        NotStreamableError: they have other names or forms than transformers would give them.
    """

    def __init__(
        self,
        mixture: Mixture,
        new: PreTrainedModel,
        rows: Mapping[int, ExpertRows],
        stored: Mapping[str, torch.Tensor],
    ):
        _require_all(mixture, stored)
        self.outputs: Tensors = {}
        self.parts: list[Part] = []
        new_layers = find_mixture_layers(new)
        left = dict(stored)
        for place, layer_rows in rows.items():
            stacks = _expert_stacks(mixture, place, new, new_layers[place], stored, len(layer_rows.sources))
            for stack in stacks:
                self.outputs |= stack.outputs(stored)
                for name in stack.names:
                    del left[name]
            if layer_rows.combine is None:
                kept = [only for (only,) in layer_rows.sources]
                self.parts += [part for stack in stacks for part in stack.cut(kept)]
            else:
                self.parts.append(_combined(stacks, layer_rows.combine))
        for name, tensor in left.items():
            self.outputs[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            self.parts.append(([name], partial(_as_it_is, name)))


@dataclass(frozen=True)
class _Stack:
    """
    A tensor of all experts of a layer, or those of each.

    Args:
        short (`str`): Its name from the layer, without the number of an expert.
        names (`list[str]`): Where it is stored: under one name, or expert by expert.
        dim (`int`, *optional*): The expert axis; None where the experts are apart.
        before (`int`), after (`int`): The experts.
    """

    short: str
    names: list[str]
    dim: int | None
    before: int
    after: int

    @property
    def new_names(self) -> list[str]:
        if self.dim is not None:
            return self.names
        return [_NUMBER.sub(rf"\g<1>{number}", self.names[0], count=1) for number in range(self.after)]

    def outputs(self, stored: Mapping[str, torch.Tensor]) -> Tensors:
        shape, dtype = list(stored[self.names[0]].shape), stored[self.names[0]].dtype
        if self.dim is not None:
            shape[self.dim] = shape[self.dim] // self.before * self.after
        return {name: torch.empty(shape, dtype=dtype, device="meta") for name in self.new_names}

    def read(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """`(E, ...)`."""
        if self.dim is None:
            return torch.stack([tensors[name] for name in self.names])
        tensor = tensors[self.names[0]]
        if tensor.shape[self.dim] != self.before:  # several entries an expert
            tensor = tensor.unflatten(self.dim, (self.before, -1))
        return tensor if self.dim == 0 else tensor.movedim(self.dim, 0)

    def split(self, stacked: torch.Tensor, stored: torch.Tensor) -> Tensors:
        """The way back of `(N, ...)`; `stored` has the shape of before."""
        if self.dim is None:
            return dict(zip(self.new_names, stacked, strict=True))
        tensor = stacked if self.dim == 0 else stacked.movedim(0, self.dim)
        if tensor.dim() != stored.dim():
            tensor = tensor.flatten(self.dim, self.dim + 1)
        return {self.names[0]: tensor.contiguous()}

    def cut(self, kept: list[int]) -> Iterator[Part]:
        if self.dim is None:
            for name, old in zip(self.new_names, kept, strict=True):
                yield [name], partial(_as_it_is, self.names[old], called=name)
        else:
            yield self.names, partial(self._cut_whole, kept)

    def _cut_whole(self, kept: list[int], tensors: Mapping[str, torch.Tensor]) -> Tensors:
        stacked, stored = self.read(tensors), tensors[self.names[0]]
        return self.split(stacked.index_select(0, torch.tensor(kept, device=stacked.device)), stored)


def _as_it_is(name: str, tensors: Mapping[str, torch.Tensor], called: str | None = None) -> Tensors:
    return {called or name: tensors[name]}


def _combined(stacks: list[_Stack], combine: Callable[[Tensors], Tensors]) -> Part:
    def make(tensors: Mapping[str, torch.Tensor]) -> Tensors:
        made = combine({stack.short: stack.read(tensors) for stack in stacks})
        parts = [stack.split(made[stack.short], tensors[stack.names[0]]) for stack in stacks]
        return {name: tensor for part in parts for name, tensor in part.items()}

    return [name for stack in stacks for name in stack.new_names], make


def _forms(model: PreTrainedModel, names: Mapping[str, torch.Tensor]) -> list[Tensors]:
    """Tensors of a model as it has them, and as transformers writes them."""
    bare = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in names.items()}
    ours = isinstance(model, SparseMoePreTrainedModel)  # these are saved as they are
    return [bare] if ours else [bare, revert_weight_conversion(model, bare)]


def _require_all(mixture: Mixture, stored: Mapping[str, torch.Tensor]) -> None:
    """What is stored must be in one of the two forms; where it is quantised, it has tensors of its own."""
    if getattr(mixture.model.config, "quantization_config", None) is not None:
        return
    forms = _forms(mixture.model, stored_tensors(mixture.model))
    missing = [sorted(form.keys() - stored.keys()) for form in forms]
    if all(missing):
        fewest = min(missing, key=len)
        if 2 * len(fewest) < len(forms[0]):
            raise missing_weight(mixture.name, mixture.model, fewest[0])
        raise NotStreamableError(f"it lacks `{missing[-1][0]}`, or has it under another name")
    for name, tensor in forms[missing.index([])].items():
        if stored[name].shape != tensor.shape:
            raise ValueError(
                f"`{name}` of `{mixture.name}` has the shape {list(stored[name].shape)}, but its config asks for "
                f"{list(tensor.shape)}. Save the model again."
            )


def _expert_stacks(
    mixture: Mixture,
    place: int,
    new: PreTrainedModel,
    new_layer: MixtureLayer,
    stored: Mapping[str, torch.Tensor],
    after: int,
) -> list[_Stack]:
    layer = mixture.layers[place]
    before = layer.num_experts
    dims: dict[str, int | None] = {}
    known: set[str] = set()
    for form, new_form in zip(_forms(mixture.model, _state(layer)), _forms(new, _state(new_layer)), strict=True):
        known |= form.keys()
        for name, tensor in form.items():
            if _NUMBER.search(name):
                dims[name] = None
            elif tensor.shape != new_form[name].shape:
                pairs = enumerate(zip(tensor.shape, new_form[name].shape, strict=True))
                dims[name] = dim = next(dim for dim, (old, other) in pairs if old != other)
                if tensor.shape[dim] % before:
                    raise ValueError(
                        f"`{name}` of `{mixture.name}` has {tensor.shape[dim]} rows for {before} experts: its router "
                        "also chooses among other things than experts, which this package does not cut."
                    )
    inside = {name[: found.end()] for name in known if (found := _EXPERTS.search(name))}
    for name, tensor in stored.items():  # codes and scales of quantised experts
        if name not in known and name.startswith(tuple(inside)):
            if not _NUMBER.search(name) and (tensor.dim() == 0 or tensor.shape[0] != before):
                raise ValueError(f"`{name}` of `{mixture.name}` is no tensor of {before} experts, and cannot be cut.")
            dims[name] = None if _NUMBER.search(name) else 0
    stacks: dict[str, _Stack] = {}
    for name in sorted(dims.keys() & stored.keys(), key=dot_natural_key):
        short = _short(name, layer, inside)
        stacks.setdefault(short, _Stack(short, [], dims[name], before, after)).names.append(name)
    for stack in stacks.values():
        if stack.dim is None and len(stack.names) != before:
            raise ValueError(f"`{mixture.name}` has `{stack.names[0]}` of {len(stack.names)} of its {before} experts.")
    if not stacks:
        raise NotStreamableError(f"it has no experts for `{layer.name}`")
    return list(stacks.values())


def _state(layer: MixtureLayer) -> Tensors:
    return {f"{layer.name}.{name}": tensor for name, tensor in layer.block.state_dict().items()}


def _short(name: str, layer: MixtureLayer, inside: set[str]) -> str:
    """The name from the layer, whatever that is called on disk."""
    bare = _NUMBER.sub("", name, count=1).replace("experts..", "experts.")
    for prefix in inside:
        if name.startswith(prefix):
            return f"experts.{bare[len(prefix) :]}"
        owner = prefix.removesuffix("experts.")
        if name.startswith(owner):
            return bare[len(owner) :]
    return bare.removeprefix(f"{layer.name}.")


def _resized(mixture: Mixture, rows: Mapping[int, ExpertRows]) -> PreTrainedModel:
    """The model with other numbers of experts, without storage."""
    old, layers = mixture.model, mixture.layers
    counts = [len(rows[place].sources) if place in rows else layer.num_experts for place, layer in enumerate(layers)]
    config = copy.deepcopy(old.config)
    if isinstance(config, SparseMoeConfig):
        _resize_ours(config, counts)
    else:
        _resize_stock(config, layers, counts)
    with torch.device("meta"):
        new = type(old)._from_config(config, dtype=old.dtype)
    if [layer.num_experts for layer in find_mixture_layers(new)] != counts:
        raise ValueError(
            f"The config of `{mixture.name}` (`model_type={config.model_type!r}`) has no field that this package "
            "knows for the number of its experts. `import_stock` may read it into a mixture of this package."
        )
    return new


def _resize_ours(config: SparseMoeConfig, counts: list[int]) -> None:
    before, after = config.num_experts, max(counts)
    if len(set(counts)) > 1 and config.router_type != "top_k":
        raise ValueError(f'`router_type="{config.router_type}"` needs as many experts in each layer, not {counts}.')
    config.num_experts = after
    config.num_experts_per_layer = counts if len(set(counts)) > 1 else None
    if config.router_type == "expert_choice":  # each expert goes on taking as many tokens
        factor = config.capacity_factor or config.num_experts_per_tok
        config.capacity_factor = factor * after / before


def _resize_stock(config: PreTrainedConfig, layers: list[MixtureLayer], counts: list[int]) -> None:
    if len(set(counts)) > 1:
        raise ValueError(
            f"`model_type={config.model_type!r}` has one number of experts for all layers, not {counts}. Keep as many "
            "in each layer, or `import_stock` it first: mixtures of this package may have other numbers in each."
        )
    before = layers[0].num_experts
    text = config.get_text_config()
    for holder in (text, *(part for part in vars(text).values() if isinstance(part, PreTrainedConfig))):
        for name in NUM_EXPERTS_NAMES:
            if getattr(holder, name, None) == before:
                setattr(holder, name, counts[0])


def _receipt_of(source: Source) -> dict[str, Any] | None:
    return read_json(source.folder / RECEIPT_NAME, optional=True) or None


class _Files(Mapping[str, torch.Tensor]):
    """The tensors of files, read when they are asked for."""

    def __init__(self, files: TensorFiles):
        self._files = files

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._files.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files.names)

    def __len__(self) -> int:
        return len(self._files.names)
