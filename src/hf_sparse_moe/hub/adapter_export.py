"""Adapters of a mixture for its stock export, for servers of that, and back."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import isclose
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from hf_sparse_moe.adapters.expert_factors import ExpertFactor
from hf_sparse_moe.checkpoints.folder import check_target, new_folder
from hf_sparse_moe.models.configuration_sparse_moe import SparseMoeConfig
from hf_sparse_moe.models.pretrained_model import SparseMoePreTrainedModel
from hf_sparse_moe.models.size import meta_model
from hf_sparse_moe.stock import ExportReport
from hf_sparse_moe.stock.fit import config_of, empty_model
from hf_sparse_moe.stock.targets import ExportTarget
from hf_sparse_moe.stock.tensors import Place, Tensors, target_places
from hf_sparse_moe.stock.to_stock import choose_target

from .adapter_files import ADAPTER_WEIGHTS, Adapter, without_adapter
from .adapter_loading import attach, fetch_adapter
from .adapter_publish import named_base, save_adapter


if TYPE_CHECKING:
    from peft import PeftModel

_TARGETS = ("stock", "vllm", "sglang")
# SGLang's names of an expert's projections, whatever the checkpoint calls them.
_SGLANG = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def export_adapter(
    adapter: PeftModel | str | Path,
    output: str | Path,
    target: Literal["stock", "vllm", "sglang"] = "stock",
    *,
    architecture: str = "auto",
    base: SparseMoeConfig | PreTrainedModel | str | Path | None = None,
    revision: str | None = None,
    token: bool | str | None = None,
) -> ExportReport:
    """
    Write a LoRA adapter of a mixture for what [`export`] writes of that mixture.

    Reads the base's config, never its weights. Adapters on experts, attention and dense layers, and routers trained in
    full, come along. Adapters of other kinds, and with biases or DoRA, are refused.

    Args:
        adapter (`PeftModel`, `str` or `Path`): The adapter, in memory (`"default"`), in a folder or on the Hub.
        output (`str` or `Path`): A folder that does not exist yet, or is empty.
        target (`str`, defaults to `"stock"`): Who reads it: `"stock"` is PEFT with the stock model of transformers, in
            PEFT's fused form for experts; `"vllm"` and `"sglang"` get two matrices of each projection of each expert,
            in the names of the exported checkpoint, with the scale multiplied into B. Neither server is run here.
        architecture (`str`, defaults to `"auto"`): The `model_type` that the mixture was exported as, as [`export`]
            chooses it.
        base (`SparseMoeConfig`, `PreTrainedModel`, `str` or `Path`, *optional*): The mixture, its config, or the
            folder or Hub id of one. Defaults to what the adapter names.
        revision (`str`, *optional*): Branch, tag or commit of the adapter's Hub id.
        token (`bool` or `str`, *optional*): For the Hub; defaults to that of `hf auth login`.

    Returns:
        [`ExportReport`]: the folder and the architecture.

    Raises:
        ValueError: not a LoRA adapter of this mixture, a mixture that no stock architecture fits, or a part that the
            reader does not read.
        OSError: the output folder is taken.

    Example:
        ```python
        export("qwen3-8x", "qwen3-8x-stock")
        export_adapter("qwen3-8x-law", "qwen3-8x-stock-law")
        ```
    """
    if target not in _TARGETS:
        raise ValueError(f"`target={target!r}` is not allowed: it must be one of {', '.join(_TARGETS)}.")
    check_target(output)
    with tempfile.TemporaryDirectory() as temporary:
        if not isinstance(adapter, str | Path):
            base = without_adapter(adapter)
            found = fetch_adapter(save_adapter(adapter, Path(temporary)))
        else:
            found = fetch_adapter(adapter, revision, token)
        commit = None
        if base is None or isinstance(base, str | Path):
            base, commit = named_base(found, base, from_hub=not Path(str(adapter)).is_dir())
        row, ours, theirs = _both(base, architecture, commit, token)
        places = target_places(row, ours)
        read = _read(found, ours)  # which puts adapters into the model
        names = {name: place.names[0] for name, place in places.items()}
        converted = _Adapted(read.config, _split(read.loras, places), _renamed(read.full, names, theirs))
        with new_folder(output) as folder:
            if target == "stock":
                _write(converted, theirs, folder)
            else:
                _write_for_server(converted, theirs, folder, target)
    return ExportReport(Path(output), row.model_type)


def import_adapter(
    adapter: str | Path,
    mixture: SparseMoeConfig | PreTrainedModel | str | Path,
    output: str | Path,
    *,
    architecture: str = "auto",
    revision: str | None = None,
    token: bool | str | None = None,
) -> ExportReport:
    """
    The way back of [`export_adapter`]: an adapter that was trained on the stock export of a mixture, for the mixture.

    Args:
        adapter (`str` or `Path`): Folder or Hub id of an adapter in PEFT's form.
        mixture (`SparseMoeConfig`, `PreTrainedModel`, `str` or `Path`): The mixture, its config, or the folder or Hub
            id of one, of which the config is read.
        output (`str` or `Path`): A folder that does not exist yet, or is empty.
        architecture (`str`, defaults to `"auto"`): The `model_type` that the adapter was trained on, as [`export`]
            chooses it.
        revision (`str`, *optional*): Branch, tag or commit of the adapter's Hub id.
        token (`bool` or `str`, *optional*): For the Hub; defaults to that of `hf auth login`.

    Returns:
        [`ExportReport`]: the folder, and the `model_type` of the mixture.

    Raises:
        ValueError: not a LoRA adapter of the mixture's stock export.
        OSError: the output folder is taken.

    Example:
        ```python
        import_adapter("qwen3-8x-stock-law", "qwen3-8x", "qwen3-8x-law")
        ```
    """
    check_target(output)
    row, ours, theirs = _both(mixture, architecture, None, token)
    places, shapes = target_places(row, ours), {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    read = _read(fetch_adapter(adapter, revision, token), theirs)  # which puts adapters into the model
    names = {place.names[0]: name for name, place in places.items()}
    converted = _Adapted(read.config, _joined(read.loras, places, shapes), _renamed(read.full, names, ours))
    with new_folder(output) as folder:
        _write(converted, ours, folder)
    return ExportReport(Path(output), ours.config.model_type)


@dataclass(frozen=True)
class _Lora:
    """`s B A` of a weight (out, in), or of each of E experts: A (r, in) or (E, r, in), B (out, r) or (E, out, r)."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    experts: tuple[int, ...] = ()  # those that are trained, where it is one of experts

    def per_output(self, change: Callable[[torch.Tensor], torch.Tensor]) -> _Lora:
        """With `change` of what has a row for each output."""
        return replace(self, b=change(self.b))

    def of_rank(self, rank: int) -> _Lora:
        """The same at a higher rank, with the scale in B."""
        missing = rank - self.a.shape[-2]
        return replace(
            self, a=F.pad(self.a, (0, 0, 0, missing)), b=F.pad(self.b * self.scale, (0, missing)), scale=1.0
        )


@dataclass(frozen=True)
class _Adapted:
    """What an adapter holds, by the names of the base's weights."""

    config: Any  # of PEFT
    loras: dict[str, _Lora]
    full: Tensors  # trained in full


def _both(
    mixture: Any, architecture: str, revision: str | None, token: bool | str | None
) -> tuple[ExportTarget, Any, Any]:
    """The stock architecture of a mixture, and both models without weights."""
    if not isinstance(mixture, str | Path | SparseMoeConfig | SparseMoePreTrainedModel):
        raise ValueError(
            f"`{type(mixture).__name__}` is not a mixture of this package, between which and its export adapters are "
            "converted. PEFT loads an adapter of a stock model as it is."
        )
    config, saved_as = config_of(mixture, revision, token)
    row, stock_config = choose_target(architecture, config, saved_as)
    return row, _hollow(meta_model(config)), _hollow(empty_model(stock_config))


def _hollow(model: PreTrainedModel) -> PreTrainedModel:
    """A model from meta memory as one whose weights are all one zero: PEFT puts adapters where the weights are."""
    for module in model.modules():
        for name, parameter in [*module.named_parameters(recurse=False)]:
            setattr(module, name, nn.Parameter(_zeros(parameter), requires_grad=False))
        for name, buffer in [*module.named_buffers(recurse=False)]:
            setattr(module, name, _zeros(buffer))
    return model


def _zeros(like: torch.Tensor) -> torch.Tensor:
    return torch.zeros((), dtype=like.dtype).expand(like.shape)


def _read(adapter: Adapter, base: PreTrainedModel) -> _Adapted:
    from peft.utils import ModulesToSaveWrapper

    config = adapter.config
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or config.get("use_dora"):
        raise ValueError(
            f"`{adapter.folder.name}` is of type {config.get('peft_type')} with `bias={config.get('bias')!r}` and "
            f"`use_dora={config.get('use_dora')}`: only LoRA without them is converted. Merge it into the mixture, "
            "and export that."
        )
    peft_model = attach(base, adapter, low_cpu_mem_usage=True)
    full = Tensors()
    for name, module in peft_model.get_base_model().named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            full |= {f"{name}.{key}": one for key, one in module.modules_to_save["default"].state_dict().items()}
    return _Adapted(
        peft_model.peft_config["default"], {name: _lora_of(name, layer) for name, layer in _layers(peft_model)}, full
    )


def _layers(peft_model: PeftModel) -> Iterator[tuple[str, Any]]:
    """The adapted weights and PEFT's layers around them."""
    from peft.tuners.lora import LoraLayer

    for name, layer in peft_model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer) and "default" in layer.r:
            yield f"{name.replace('.base_layer', '')}.{getattr(layer, 'parameter_name', 'weight')}", layer


def _lora_of(name: str, layer: Any) -> _Lora:
    if "default" not in layer.lora_A:
        raise ValueError(
            f"`{name}` is adapted as neither a linear layer nor experts, which is not converted. Merge it."
        )
    a, b, scale = layer.lora_A["default"], layer.lora_B["default"], layer.scaling["default"]
    if isinstance(a, ExpertFactor):
        return _Lora(a.all_experts().detach(), b.all_experts().mT.detach(), scale, a.experts)
    return _Lora(a.weight.detach(), b.weight.detach(), scale)


def _split(loras: Mapping[str, _Lora], places: Mapping[str, Place]) -> dict[str, _Lora]:
    """In the target's weights, which may be several where ours is one."""
    result: dict[str, _Lora] = {}
    for name, lora in loras.items():
        theirs, factor = places[name]
        lora = lora.per_output(lambda one, by=factor: one * by)
        if len(theirs) == 1:
            parts: Iterable[_Lora] = [lora]
        elif lora.a.dim() == 3:
            parts = [_Lora(a, b, lora.scale) for a, b in zip(lora.a, lora.b, strict=True)]
        else:
            parts = [replace(lora, b=b) for b in lora.b.chunk(len(theirs))]
        result |= dict(zip(theirs, parts, strict=True))
    return result


def _joined(
    loras: Mapping[str, _Lora], places: Mapping[str, Place], shapes: Mapping[str, torch.Size]
) -> dict[str, _Lora]:
    """The way back of [`_split`]."""
    result = {}
    for name, (theirs, factor) in places.items():
        parts = [loras.get(one) for one in theirs]
        ranks = [part.a.shape[-2] for part in parts if part]
        if not ranks:
            continue
        if len(theirs) == 1:
            lora = loras[theirs[0]]
        else:
            filled = [
                (part or _no_lora(shapes[one], max(ranks))).of_rank(max(ranks))
                for one, part in zip(theirs, parts, strict=True)
            ]
            a, b = [one.a for one in filled], [one.b for one in filled]
            if name.endswith(".weight"):
                lora = _Lora(torch.cat(a), torch.block_diag(*b), 1.0)
            else:
                lora = _Lora(torch.stack(a), torch.stack(b), 1.0, tuple(range(len(theirs))))
        result[name] = lora.per_output(lambda one, by=factor: one / by)
    return result


def _no_lora(shape: torch.Size, rank: int) -> _Lora:
    *experts, rows, columns = shape
    return _Lora(torch.zeros(*experts, rank, columns), torch.zeros(*experts, rows, rank), 1.0)


def _renamed(full: Tensors, names: Mapping[str, str], base: PreTrainedModel) -> Tensors:
    """The tensors that are trained in full, in the modules of `base` that have such."""
    shapes = {name: tensor.shape for name, tensor in base.state_dict().items()}
    found = {names.get(name, name): tensor for name, tensor in full.items()}
    modules = tuple(f"{name.removesuffix('weight')}" for name in found if name.endswith(".weight") and name in shapes)
    lost = [name for name in found if name not in shapes or not name.startswith(modules)]
    if trained := [name for name in lost if found[name].any()]:
        raise ValueError(
            f"`{trained[0]}` is trained, and `{type(base).__name__}` has no place for it. Merge the adapter into its "
            "own base, and export that."
        )
    return {name: found[name].reshape(shapes[name]) for name in found.keys() - {*lost}}


def _write(adapted: _Adapted, base: PreTrainedModel, folder: Path) -> None:
    """As PEFT writes it, by PEFT."""
    from peft import get_peft_model
    from peft.utils import ModulesToSaveWrapper

    config, loras = adapted.config, adapted.loras
    ranks = {name.removesuffix(".weight"): lora.a.shape[-2] for name, lora in loras.items()}
    alphas = {
        name.removesuffix(".weight"): lora.scale * (rank**0.5 if config.use_rslora else rank)
        for (name, lora), rank in zip(loras.items(), ranks.values(), strict=True)
    }
    on_experts = {name: lora for name, lora in loras.items() if lora.a.dim() == 3}
    linear = [name.removesuffix(".weight") for name in loras.keys() - on_experts.keys()]
    modules, parameters = [name for name, _ in base.named_modules()], [name for name, _ in base.named_parameters()]
    chosen = {name.rpartition(".")[0]: [*lora.experts] for name, lora in on_experts.items()}
    all_chosen = all(len(chosen[name.rpartition(".")[0]]) == len(lora.a) for name, lora in on_experts.items())
    config = replace(
        config,
        target_modules=_suffixes(linear, modules),
        target_parameters=_suffixes(on_experts, parameters) or None,
        modules_to_save=_suffixes({name.rpartition(".")[0] for name in adapted.full}, modules) or None,
        rank_pattern={name: rank for name, rank in ranks.items() if rank != config.r},
        alpha_pattern={name: alpha for name, alpha in alphas.items() if not isclose(alpha, config.lora_alpha)},
        experts=None if all_chosen else chosen,
        projections=config.projections if on_experts else None,
        shared=config.shared and bool(on_experts),
        base_model_name_or_path=None,
        revision=None,
    )
    peft_model = get_peft_model(base, config, low_cpu_mem_usage=True)
    for name, layer in _layers(peft_model):
        a, b = layer.lora_A["default"], layer.lora_B["default"]
        lora = loras[name]
        if isinstance(a, ExpertFactor):
            a.weight, b.weight = nn.Parameter(a.chosen(lora.a, name)), nn.Parameter(b.chosen(lora.b.mT, name))
        else:
            a.weight, b.weight = nn.Parameter(lora.a), nn.Parameter(lora.b)
    for name, module in peft_model.get_base_model().named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            trained = module.modules_to_save["default"]
            state = {key: adapted.full.get(f"{name}.{key}", one.clone()) for key, one in trained.state_dict().items()}
            trained.load_state_dict(state, assign=True)
    peft_model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's stock card


def _suffixes(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """What names them among the `known` ones as a user would, by their last parts; in full where others end so too."""
    names, known = set(names), set(known)
    suffixes = {".".join(name.split(".")[-2:]) for name in names}
    reached = {name for name in known if ".".join(name.split(".")[-2:]) in suffixes}
    return sorted(suffixes if reached == names else names)


def _write_for_server(adapted: _Adapted, base: PreTrainedModel, folder: Path, server: str) -> None:
    """Two matrices a linear layer, in the names of the exported checkpoint, each projection of an expert being one."""
    from peft import LoraConfig

    kind = base.config.model_type
    if adapted.full:
        raise ValueError(
            f"`{next(iter(adapted.full))}` is trained in full, which {server} does not read from an adapter. Merge "
            "the adapter into the mixture, and export that."
        )
    shapes = {name: tensor.shape for name, tensor in base.state_dict().items()}
    rank = max(lora.a.shape[-2] for lora in adapted.loras.values())
    loras = {name: lora.of_rank(rank) for name, lora in adapted.loras.items()}
    # Servers read an expert's projections together.
    for module in {name.rpartition(".")[0] for name, lora in loras.items() if lora.a.dim() == 3}:
        for name, shape in shapes.items():
            if name.rpartition(".")[0] == module and len(shape) == 3 and name not in loras:
                loras[name] = _no_lora(shape, rank)
    tensors = Tensors()
    for letter, factors in (
        # Gate and up of an expert stand in one matrix, which the checkpoint cuts in halves of its rows.
        ("A", {n: lora.a.repeat(1, 2, 1) if n.endswith("gate_up_proj") else lora.a for n, lora in loras.items()}),
        ("B", {n: lora.b for n, lora in loras.items()}),
    ):
        for name, factor in revert_weight_conversion(base, factors).items():
            if factor.dim() != 2:
                raise ValueError(
                    f"A {kind} checkpoint keeps all experts in one tensor, for which {server} reads no adapter. Merge "
                    "the adapter into the mixture, and export that."
                )
            module = name.removesuffix(".weight")
            if server == "sglang" and ".experts." in module:
                stem, _, leaf = module.rpartition(".")
                module = f"{stem}.{_SGLANG.get(leaf, leaf)}"
            tensors[f"base_model.model.{module}.lora_{letter}.weight"] = factor.contiguous()
    leaves = sorted({name.split(".")[-3] for name in tensors})
    LoraConfig(r=rank, lora_alpha=rank, target_modules=leaves, task_type="CAUSAL_LM").save_pretrained(str(folder))
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
