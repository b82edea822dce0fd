"""`to_dense`: a mixture becomes a model of the dense architecture that it came from. E experts, I units, H hidden."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_sparse_moe.checkpoints.companions import copy_companions
from hf_sparse_moe.checkpoints.config import read_config, read_generation_config, sensible_config
from hf_sparse_moe.checkpoints.families import check_not_quantised
from hf_sparse_moe.checkpoints.files import read_json
from hf_sparse_moe.checkpoints.folder import check_target
from hf_sparse_moe.checkpoints.journal import WatchedSource, written_shards
from hf_sparse_moe.checkpoints.reader import DenseTensors, NotStreamableError, loaded_dtypes, stored_dtype
from hf_sparse_moe.checkpoints.source import Source, find_source, named_architecture
from hf_sparse_moe.checkpoints.writer import ShardWriter
from hf_sparse_moe.insight.losses import Evaluation, loss_change
from hf_sparse_moe.models.configuration_sparse_moe import SparseMoeConfig
from hf_sparse_moe.models.modeling_sparse_moe import AUTO_CLASSES
from hf_sparse_moe.models.moe_block import sparse_feed_forwards
from hf_sparse_moe.models.pretrained_model import RECEIPT_NAME, SparseMoePreTrainedModel
from hf_sparse_moe.stock import import_stock
from hf_sparse_moe.stock.streamed import StockTensors
from hf_sparse_moe.upcycling.conversion import (
    LoadedTensors,
    SparseLayer,
    expert_parameters,
    load_mixture,
    set_dtype,
)
from hf_sparse_moe.upcycling.in_memory import check_unwrapped
from hf_sparse_moe.upcycling.initialization import (
    INITIALIZATION_METHODS,
    FeedForwardWeights,
    expert_scale,
    has_constant_weights,
)
from hf_sparse_moe.upcycling.receipt import describe_source, versions
from hf_sparse_moe.upcycling.recipe import check_argument

from .alignment import aligned, blended
from .measurements import ExpertMeasurements, router_sha256
from .receipts import write_card, write_receipt
from .rewriting import SurgeryReport, require_numbers, sizes


logger = logging.get_logger(__name__)

METHODS = ("mean", "best", "merge")


def to_dense(
    source: PreTrainedModel | str | Path,
    measured: ExpertMeasurements | str | Path | None = None,
    method: str = "mean",
    output: str | Path | None = None,
    *,
    evaluation: Evaluation | None = None,
    revision: str | None = None,
    token: bool | str | None = None,
    max_shard_size: int | str = "4GB",
    resume: bool = False,
    show_progress: bool = False,
) -> Any:
    """
    Make one feed-forward of the experts of each layer: a plain model of the dense architecture inside the mixture.

    An upcycled copy that was not trained becomes its dense source again, bit for bit. Slices of a split feed-forward
    are put together; a grafted mixture keeps the dense feed-forward beside its experts, and loses those. After a
    training the dense model is a start, not a substitute: distil the mixture into it with `training/run_distill.py`.

    Args:
        source (`PreTrainedModel`, `str` or `Path`): A mixture, which is left as it is, or the folder or Hub id of one;
            a stock one where [`import_stock`] reads it.
        measured ([`ExpertMeasurements`], `str` or `Path`, *optional*): Of [`measure_experts`], or its file: the
            experts count by their REAP salience, and where the weights of a token are not normalised, the result is
            scaled by their mean sum on the text. Without, experts count alike and routers are taken to be even.
        method (`str`, defaults to `"mean"`): `"mean"` of the experts; the `"best"` one of each layer, which needs
            `measured`; `"merge"`: the mean after their hidden units were matched to those of the first, or the best.
        output (`str` or `Path`, *optional*): A folder that does not exist yet, or is empty, to write the model to,
            with tokenizer, licence, card and receipt: layer by layer from a folder or Hub id.
        evaluation (`tuple`, *optional*): Batches and the group of each of their sequences, as for [`measure_experts`],
            on which with `output` the receipt tells the loss before and after. Both models are loaded for it.
        revision (`str`, *optional*): Branch, tag or commit of a Hub id.
        token (`bool` or `str`, *optional*): For the Hub; defaults to that of `hf auth login`.
        max_shard_size (`int` or `str`, defaults to `"4GB"`): Of a file of weights, with `output`.
        resume (`bool`, defaults to `False`): With a folder and `output`, continue an interrupted call.
        show_progress (`bool`, defaults to `False`): With `output`, a bar on stderr.

    Returns:
        `PreTrainedModel` in evaluation mode; with `output`, a [`SurgeryReport`].

    Raises:
        ValueError: not a mixture, experts that do not make up a dense feed-forward, an unknown method, or
            measurements of another model.
        OSError: `output` is taken, or its disk is too small.

    Example:
        ```python
        dense = to_dense("qwen3-8x")
        ```
    """
    check_argument("method", method, *METHODS)
    if method == "best" and measured is None:
        raise ValueError(
            '`method="best"` needs `measured`: what `measure_experts` (`hf-sparse-moe measure`) tells of the mixture.'
        )
    if output is not None:
        check_target(output)
    found = None
    if not isinstance(source, PreTrainedModel):
        found = find_source(source, revision, token=token)
        config = read_config(found)
        check_not_quantised(config, found.name)
        of = {"architecture": named_architecture(config), "model_type": config.model_type}
        if not isinstance(config, SparseMoeConfig):
            source = _stock(source, found, config, revision, token)
    else:
        check_unwrapped(source)
        check_not_quantised(source.config, type(source).__name__)
        of = {"architecture": type(source).__name__, "model_type": source.config.model_type}
        source = source if isinstance(source, SparseMoePreTrainedModel) else import_stock(source)
    known = None if measured is None else ExpertMeasurements.of(measured)
    if known is not None:
        known.check_text(found.folder if found else None)
    plan = _plan(source if isinstance(source, SparseMoePreTrainedModel | StockTensors) else found, known, method)
    if output is None:
        state = {key: tensor for keys in plan.made() for key, tensor in keys.items()}
        model: Any = load_mixture(type(plan.dense), plan.dense.config, state, plan.dtype, plan.generation_config)
        return model.to(source.device) if isinstance(source, PreTrainedModel) else model.eval()
    watched = WatchedSource(found) if found else None
    made_from = {"to_dense": {"method": method, "measured": plan.salience, "max_shard_size": max_shard_size}}
    settings = (max_shard_size, resume and watched is not None, show_progress)
    with written_shards(output, plan.outputs, plan.write, watched, made_from, *settings) as (folder, sha256):
        plan.dense.config.architectures = [type(plan.dense).__name__]
        plan.dense.config.save_pretrained(folder)
        if plan.generation_config is not None:
            plan.generation_config.save_pretrained(folder)
        if found is not None:
            copy_companions(found.folder, folder)
        before = found.folder if found and plan.sparse.device.type == "meta" else plan.sparse
        receipt = plan.receipt(found, of, sha256, loss_change(before, folder, evaluation))
        write_receipt(receipt, folder)
        write_card(receipt, folder, Path(output).name, type(plan.dense).__name__)
    return SurgeryReport(Path(output), type(plan.dense).__name__, receipt)


@dataclass(frozen=True)
class _Plan:
    """A mixture and the dense model that it becomes, which is without storage, before a weight is read."""

    sparse: SparseMoePreTrainedModel
    dense: PreTrainedModel
    layers: list[SparseLayer]
    tensors: Any
    method: str
    salience: list[list[float]] | None
    sums: list[float] | None  # of a token's weights, their mean in each layer
    dtype: torch.dtype

    @property
    def generation_config(self) -> Any:
        return self.sparse.generation_config if self.sparse.can_generate() else None

    @property
    def outputs(self) -> dict[str, torch.Tensor]:
        """Every tensor of the dense model, tied ones once, without storage and in its dtype."""
        dtypes, tied = loaded_dtypes(self.dense, self.dtype), set(self.dense.all_tied_weights_keys)
        if isinstance(self.tensors, LoadedTensors):  # a mixture may have untied what its config ties
            tied -= {name.removeprefix("dense.") for name in self.tensors.names}
        return {
            key: torch.empty(tensor.shape, dtype=dtypes[key], device="meta")
            for key, tensor in self.dense.state_dict().items()
            if key not in tied
        }

    def made(self, wanted: Callable[[str], bool] = lambda key: True) -> Generator[dict[str, torch.Tensor]]:
        """The dense model's tensors that are wanted, a layer's feed-forward at a time."""
        outputs = self.outputs
        shapes = {key: tensor.shape for key, tensor in outputs.items()}
        inside = {key for layer in self.layers for key in layer.sources}
        for key in outputs:
            if key not in inside and wanted(key):
                read = self.tensors.reader(reuse=False)  # one a tensor: a reader keeps the memory of all that it read
                yield {key: require_numbers(key, read(f"dense.{key}").to(outputs[key].dtype).clone())}
        for layer in self.layers:
            if any(map(wanted, layer.sources)):
                read = self.tensors.reader(reuse=False)
                made = layer.dense_tensors(self._feed_forward(layer, read), shapes)
                parameters = layer.activation_keys().items()
                made |= {key: read(f"{layer.block}.experts.act_fn.{name}") for key, name in parameters}
                yield {key: require_numbers(key, tensor.to(outputs[key].dtype)) for key, tensor in made.items()}

    def write(self, writer: ShardWriter) -> Generator[int]:
        """Write all that is wanted; yields the bytes of each tensor."""
        for tensors in self.made(writer.wants):
            for key, tensor in tensors.items():
                if writer.wants(key):
                    yield writer.write(key, tensor)

    def _feed_forward(self, layer: SparseLayer, read: Any) -> FeedForwardWeights:
        config: Any = self.sparse.config
        if config.shared_expert_gate:
            raise ValueError(
                "`shared_expert_gate=True` weighs the shared experts token by token: no dense feed-forward does."
            )
        site = layer.feed_forward
        names = expert_parameters(site.layout.gated)
        names = {name: key for name, key in names.items() if site.biased or not key.endswith("bias")}
        paths = {name: f"{layer.block}.experts.{key}" for name, key in names.items()}
        stacked = {name: require_numbers(path, read(path)) for name, path in paths.items()}
        every = zip(*stacked.values(), strict=True)
        experts = [_weights(layer, dict(zip(names, matrices, strict=True))) for matrices in every]
        shared = None
        if config.num_shared_experts:
            keys = {
                name: f"{part}_proj.{kind or 'weight'}" for name in names for part, _, kind in [name.partition("_")]
            }
            prefix = f"{layer.block}.shared_experts"
            shared = _weights(layer, {name: read(f"{prefix}.{key}") for name, key in keys.items()})
        units, size = site.intermediate_size, stacked["down"].shape[-1]
        beside = 0 if shared is None else shared.down.shape[1]
        if shared is not None and beside == units:  # a graft
            return shared
        parts, left = divmod(units - beside, size)
        if left or parts < 1 or len(experts) % parts:
            raise ValueError(
                f"`{layer.block}` cannot become dense: its {len(experts)} experts of {size} units, and {beside} "
                f"shared ones, do not make up whole feed-forwards of {units}, as those of an unpruned mixture do."
            )
        scale, unsteady = expert_scale(config, layer.side)
        if unsteady and self.sums is not None and config.router_type != "expert_choice":
            scale = 1 / max(self.sums[layer.position], 1e-6)
        salience = self.salience[layer.position] if self.salience else [1.0] * len(experts)
        groups = [sum(salience[start : start + parts]) for start in range(0, len(experts), parts)]
        slices = [
            self._one_of(
                experts[part::parts], groups, lambda each: each.scale(1 / (parts * scale), 1 / scale, evenly=unsteady)
            )
            for part in range(parts)
        ]
        return _joined(slices, shared)

    def _one_of(self, experts: list[FeedForwardWeights], salience: list[float], scale: Any) -> FeedForwardWeights:
        best = max(range(len(experts)), key=salience.__getitem__)
        if self.method == "best":
            return scale(experts[best])
        if self.method == "merge":
            experts = [aligned(expert, experts[best]) for expert in experts]
        total = sum(salience)
        weights = [each / total if total else 1 / len(experts) for each in salience]
        return blended([scale(expert) for expert in experts], weights)

    def receipt(
        self, source: Source | None, of: dict[str, Any], sha256: dict[str, str], loss: dict[str, Any] | None
    ) -> dict[str, Any]:
        """How it was made, and of what: `of` is the class that a stock mixture had before it was imported."""
        return {
            "to_dense": {
                "method": self.method,
                "weighted": "by REAP salience" if self.salience else "evenly",
                "loss": loss,
                **sizes(self.sparse, self.dense),
                "source": describe_source(self.sparse, source, sha256) | of,
                "versions": versions(),
                "from": self.sparse.receipt,
            }
        }


def _stock(source: Any, found: Source, config: Any, revision: str | None, token: bool | str | None) -> Any:
    """A stock mixture in our names, in memory where its files cannot be streamed."""
    try:
        return StockTensors(found, config)
    except NotStreamableError as reason:
        logger.warning(f"The mixture becomes dense in memory, not streamed: {reason}.")
        return import_stock(source, revision=revision, token=token)


def _plan(source: Any, measured: ExpertMeasurements | None, method: str) -> _Plan:
    if isinstance(source, SparseMoePreTrainedModel):
        sparse, dtype = source, source.dtype
        tensors: Any = LoadedTensors(source)
    elif isinstance(source, StockTensors):
        sparse, dtype, tensors = source.sparse, source.dtype, source
    else:
        config = read_config(source)
        classes = {one.__name__: one for one in AUTO_CLASSES[type(config)].values()}
        if (name := named_architecture(config)) not in classes:
            raise ValueError(f"`{source.name}` names no class of its family in `architectures`: {name!r}.")
        with sensible_config(source):
            dtype = config.dtype or stored_dtype(source)
            set_dtype(config, dtype)
            with torch.device("meta"):
                sparse = classes[name]._from_config(config, dtype=dtype)
        sparse.receipt = read_json(source.folder / RECEIPT_NAME, optional=True) or None
        if sparse.can_generate():
            sparse.generation_config = read_generation_config(source.folder) or sparse.generation_config
        tensors = DenseTensors(source, sparse, dtype)
    dense, layers = _empty_dense(sparse, dtype)
    salience, sums = None, None
    sparse_config: Any = sparse.config
    if measured is not None:  # by place: a stock mixture that was imported has layers of other names
        found = measured.layers
        read = tensors.reader(reuse=False)
        gates = [block.gate.named_parameters() for block in sparse.sparse_blocks]
        known = [
            {name: read(f"{layer.block}.gate.{name}") for name, _ in gate}
            or {"first expert": read(f"{layer.block}.experts.down_proj")[0]}
            for layer, gate in zip(layers, gates, strict=True)
        ]
        if [layer.router_sha256 for layer in found] != [router_sha256(tensors) for tensors in known]:
            raise ValueError("`measured` is of another model: its routers have other weights. Measure again.")
        salience = [layer.reap.tolist() for layer in found]
        sums = [layer.found("sampled_weights").sum(dim=-1).mean().item() for layer in found]
    elif _method_of(sparse.receipt) not in INITIALIZATION_METHODS and not has_constant_weights(sparse_config):
        logger.warning(
            "The weights of a token are not normalised, and without `measured` nothing tells their sum: the dense "
            "model is scaled as if the routers were even. Pass what `measure_experts` finds on some text."
        )
    return _Plan(sparse, dense, layers, tensors, method, salience, sums, dtype)


def _empty_dense(sparse: SparseMoePreTrainedModel, dtype: torch.dtype) -> tuple[PreTrainedModel, list[SparseLayer]]:
    """
    The dense model without storage, and the feed-forwards that were sparse. Where no upcycling made the experts, as in
    a stock mixture, they are whole feed-forwards of their own size, which becomes the dense model's.
    """
    config = sparse.config
    dense_config = copy.deepcopy(config.dense_config)
    set_dtype(dense_config, dtype)

    def build() -> tuple[PreTrainedModel, list[SparseLayer]]:
        with torch.device("meta"):
            dense = sparse.dense_auto_class.from_config(dense_config, dtype=dtype)
        found = sparse_feed_forwards(dense, config, sparse.family_side)
        return dense, [SparseLayer(position, *each) for position, each in enumerate(found)]

    dense, layers = build()
    size = (config.moe_intermediate_size or 0) * (1 + config.num_shared_experts)
    units = {layer.feed_forward.intermediate_size for layer in layers}
    if not size or _method_of(sparse.receipt) in INITIALIZATION_METHODS or units == {size}:
        return dense, layers
    all_sparse = all("dense" not in (getattr(config, field) or ()) for field in config._layer_type_fields)
    if not all_sparse or not hasattr(dense_config, "intermediate_size"):
        raise ValueError(
            f"The experts have {size} units and the dense feed-forwards of `{dense_config.model_type}` {max(units)}: "
            "no dense architecture has both. Only a mixture whose layers are all sparse can become dense here."
        )
    dense_config.intermediate_size = size
    return build()


def _method_of(receipt: Any) -> str | None:
    """The method of the upcycling at the root of a receipt."""
    while isinstance(receipt, dict):
        if "arguments" in receipt:
            return receipt["arguments"].get("method")
        receipt = next((each["from"] for each in receipt.values() if isinstance(each, dict) and "from" in each), None)
    return None


def _weights(layer: SparseLayer, matrices: dict[str, torch.Tensor]) -> FeedForwardWeights:
    up_bias, down_bias = matrices.get("up_bias"), matrices.get("down_bias")
    gated = layer.feed_forward.layout.gated
    return FeedForwardWeights(matrices["up"], matrices["down"], up_bias, down_bias, gated, layer.degree)


def _joined(slices: list[FeedForwardWeights], shared: FeedForwardWeights | None) -> FeedForwardWeights:
    """One feed-forward with the units of all slices, whose second bias each of them holds whole."""
    every = slices if shared is None else [shared, *slices]

    def join(name: str) -> torch.Tensor | None:
        matrices = [each.matrices[name][0 : each.matrices[name].shape[0]] for each in every if name in each.matrices]
        if not matrices:
            return None
        halves = zip(*(matrix.chunk(every[0].parts) for matrix in matrices), strict=True)
        return torch.cat([half for same in halves for half in same])

    down = torch.cat([each.down[0 : each.down.shape[0]] for each in every], dim=1)
    down_bias = None
    if slices[0].down_bias is not None:
        down_bias = blended(slices, [1 / len(slices)] * len(slices)).down_bias[0 : len(down)]
        down_bias = down_bias if shared is None else down_bias + shared.down_bias
    return FeedForwardWeights(join("up"), down, join("up_bias"), down_bias, every[0].gated, every[0].degree)
