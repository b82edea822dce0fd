"""`upcycle`: a dense model in, a mixture out; in memory, on disk or in shards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.utils import logging

from hf_sparse_moe.checkpoints.config import read_config
from hf_sparse_moe.checkpoints.families import check_not_quantised
from hf_sparse_moe.checkpoints.folder import check_target, write_checkpoint
from hf_sparse_moe.checkpoints.journal import WatchedSource
from hf_sparse_moe.checkpoints.reader import NotStreamableError
from hf_sparse_moe.checkpoints.source import Source, find_source
from hf_sparse_moe.models.configuration_sparse_moe import SparseMoeConfig
from hf_sparse_moe.models.pretrained_model import SparseMoePreTrainedModel
from hf_sparse_moe.models.quantization import ExpertsQuantizationConfig, require_bitsandbytes

from .conversion import Conversion
from .in_memory import DenseModels, upcycle_in_memory
from .more_layers import upcycle_more_layers
from .receipt import make_receipt
from .recipe import Layers, check_dtype, make_recipe
from .streaming import check_distributed_config, load_shards, plan_from_disk, write_mixture


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class UpcycleReport:
    """
    What `upcycle` wrote.

    Args:
        path (`Path`): The folder.
        architecture (`str`): The mixture's class.
        receipt (`dict`): How it was made. Where it was streamed, it holds no measured difference to the dense model,
            which was never loaded: see [`verify`].
    """

    path: Path
    architecture: str
    receipt: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"path": str(self.path), "class": self.architecture, "receipt": self.receipt}


def upcycle(
    source: PreTrainedModel | str | Path | None = None,
    num_experts: int | None = None,
    num_experts_per_tok: int = 2,
    method: str = "copy",
    seed: int = 0,
    *,
    output: str | Path | None = None,
    distributed_config: DistributedConfig | None = None,
    layers: Layers = "all",
    data: Iterable[Any] | None = None,
    evaluation: Iterable[Any] | None = None,
    sources: Sequence[PreTrainedModel | str | Path] = (),
    prompts: Sequence[Iterable[Any]] | None = None,
    tokenizer: Any = None,
    revision: str | None = None,
    token: bool | str | None = None,
    dtype: str | torch.dtype = "auto",
    quantize: int | None = None,
    allow_pickle: bool = False,
    max_shard_size: int | str = "4GB",
    resume: bool = False,
    show_progress: bool = False,
    **options_and_fields,
) -> Any:
    """
    Make a mixture of experts of a dense model, with the same head.

    With `method="copy"` the mixture computes what the dense model computes. The receipt, `model.receipt`, says how it
    was made and is saved beside the weights. The dense model is left as it is. The same seed gives the same bits in
    memory, on disk and in shards.

    Args:
        source (`PreTrainedModel`, `str` or `Path`): A dense text model, or the folder or Hub id of one; or a mixture,
            whose dense `layers` become sparse too. With `method="branches"`, the model that the branches
            were fine-tuned from; optional.
        num_experts (`int`, *optional*): Routed experts of a layer. Defaults to 8, or to the number of `sources`.
        num_experts_per_tok (`int`, defaults to 2): Experts that serve one token.
        method (`str`, defaults to `"copy"`): How the experts start: a key of `INITIALIZATION_METHODS`.
        seed (`int`, defaults to 0): Of all that is drawn at random; the same seed gives the same bits.
        output (`str` or `Path`, *optional*): A folder that does not exist yet, or is empty, to write the mixture to,
            tensor by tensor: memory holds two layers' dense weights, whatever the checkpoint's size. The folder
            appears when it is complete, with the tokenizer and licence of the source. What cannot be streamed (a model
            in memory, a pickle, a method that measures on data, weights that loading transforms) is upcycled in memory
            first, and the log says so.
        distributed_config (`DistributedConfig`, *optional*): Make a model that is shared out over the processes by
            FSDP2, expert and tensor parallelism; every process calls `upcycle`, and makes the experts, or parts of
            experts, that it keeps. Needs a checkpoint that can be streamed.
        layers (`str`, `list[int]` or `dict`, defaults to `"all"`): Which layers become sparse: `"all"`, `"none"`,
            `"every_N"`, `"first_N"`, `"last_N"`, or positions; for an encoder-decoder also one of these a side, as
            `{"encoder": "all", "decoder": "none"}`.
        data (`Iterable`, *optional*): Batches of token ids (batch, sequence), of a tokenizer's output, or texts, for
            methods that measure activations.
        evaluation (`Iterable`, *optional*): Batches of held-out text, as for `data`, for other heads than language
            models with `labels`; the receipt then holds the task loss on them before and after.
        sources (`list`, *optional*): With `method="branches"`, the dense models that become the experts. Their configs
            and vocabularies must agree.
        prompts (`list`, *optional*): With `method="branches"`, for each of `sources` batches of its own text, as for
            `data`; the router starts from them. Without, it starts at random.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): For texts; defaults to that of the first folder or Hub id.
        revision (`str`, *optional*): Branch, tag or commit of a Hub id.
        token (`bool` or `str`, *optional*): For the Hub; defaults to that of `hf auth login`.
        dtype (`str` or `torch.dtype`, defaults to `"auto"`): Of the result; `"auto"` keeps the dense one.
        quantize (`int`, *optional*): 8 or 4: pack the experts in so many bits, as [`ExpertsQuantizationConfig`] says.
        allow_pickle (`bool`, defaults to `False`): Whether weights in a pickle, which may run code, are read.
        max_shard_size (`int` or `str`, defaults to `"4GB"`): Of a file of weights, with `output`; a larger tensor gets
            a file of its own.
        resume (`bool`, defaults to `False`): With `output`, continue an interrupted call from its finished shards. The
            source's files and the arguments must be the same; where there is nothing to resume, start.
        show_progress (`bool`, defaults to `False`): With `output`, a bar with rate and time left, on stderr.
        **options_and_fields: Options of the method, such as `drop_ratio=0.5`, and fields of the family's config, such
            as `router_aux_loss_coef=0.01`.

    Returns:
        [`SparseMoePreTrainedModel`] in evaluation mode, on the CPU or the dense model's device, or sharded with
        `distributed_config`; with `output`, an [`UpcycleReport`].

    Raises:
        ValueError: an unknown method, option or field, a source that cannot be read or changes while it is read, an
            architecture without a known feed-forward, a model that has adapters, is quantised or holds NaN, a mixture
            that does not keep the function as its method promises, or a `resume` with other arguments.
        OSError: `output` is taken, or its disk is too small.

    Example:
        ```python
        model = upcycle("gpt2", num_experts=8, num_experts_per_tok=2)
        model.save_pretrained("gpt2-8x")

        upcycle("Qwen/Qwen3-0.6B", num_experts=8, output="qwen3-8x")

        sizes = DistributedConfig(fsdp_size=8, ep_size=8)
        model = upcycle("Qwen/Qwen3-0.6B", num_experts=64, distributed_config=sizes)
        ```
    """
    if method == "branches" and (isinstance(sources, str | Path) or len(sources) < 2):
        raise ValueError('`sources` must name at least 2 dense checkpoints for `method="branches"`.')
    if prompts is not None and len(prompts) != len(sources):
        raise ValueError(f"`prompts` has {len(prompts)} entries for {len(sources)} `sources`. Give one each.")
    if prompts is not None and options_and_fields.get("router_type") == "hash":
        raise ValueError("`prompts` start the rows of a router, and `router_type='hash'` has none. Leave them out.")
    if source is None and method != "branches":
        raise ValueError("`source` is missing. Pass a dense model, or the folder or Hub id of one.")
    if output is not None and distributed_config is not None:
        raise ValueError("`output` and `distributed_config` exclude each other: save the sharded model instead.")
    if quantize not in (None, 8, 4):
        raise ValueError(f"`quantize={quantize!r}` must be 8 or 4, or None for floats.")
    if quantize is not None and distributed_config is not None:
        raise ValueError("`quantize` and `distributed_config` exclude each other: packed experts are not sharded.")
    asked = (num_experts, num_experts_per_tok, method, distributed_config, data, evaluation, dtype, quantize)
    layers_alone = asked == (None, 2, "copy", None, None, None, "auto", None) and not (sources or options_and_fields)
    packing = None if quantize is None else ExpertsQuantizationConfig(quantize)
    if packing is not None:
        require_bitsandbytes()
    recipe, fields = make_recipe(method, seed, options_and_fields)
    if num_experts is None:
        num_experts = len(sources) * recipe.options.get("granularity", 1) or 8
    fields = {"num_experts": num_experts, "num_experts_per_tok": num_experts_per_tok, **fields}
    chosen_dtype = check_dtype(dtype)
    if distributed_config is not None:
        check_distributed_config(distributed_config, num_experts)
    if output is not None:
        check_target(output)
    found = find_source(source, revision, allow_pickle, token) if isinstance(source, str | Path) else None
    writing = (max_shard_size, resume, show_progress)
    if isinstance(source, SparseMoePreTrainedModel) or (found and isinstance(read_config(found), SparseMoeConfig)):
        if not layers_alone:
            raise ValueError(
                "`upcycle` of a mixture takes `layers` and `seed` alone: the rest is as the mixture has it."
            )
        grown: Any = upcycle_more_layers(found or source, layers, seed, output, *writing)  # type: ignore[arg-type]
        return grown if output is None else UpcycleReport(Path(output), type(grown).__name__, grown.receipt)
    if output is not None or distributed_config is not None:
        needs = {
            "data": data,
            "evaluation": evaluation,
            "sources": sources or None,
            "prompts": prompts,
            "source": None if found or source is None else type(source).__name__,
        }
        try:
            conversion, watched = _plan_streaming(found, needs, recipe, fields, layers, chosen_dtype)
        except NotStreamableError as reason:
            if output is None:
                raise ValueError(
                    f"`{source}` cannot be upcycled part by part: {reason}. Make the mixture with `hf-sparse-moe "
                    "upcycle` first, and load that with `from_pretrained(..., distributed_config=...)`."
                ) from reason
            logger.warning(f"The mixture is made in memory, not streamed: {reason}.")
        else:
            if output is None:
                return load_shards(conversion, found, watched, distributed_config)  # type: ignore[arg-type]
            sparse: Any = conversion.sparse
            told = conversion.fields if packing is None else {**conversion.fields, "quantize": packing.bits}
            tell = partial(make_receipt, conversion.dense, sparse, found, recipe, told)
            write_mixture(conversion, found, watched, tell, output, *writing, packing)  # type: ignore[arg-type]
            return UpcycleReport(Path(output), type(sparse).__name__, sparse.receipt)
    given = DenseModels(source, found, sources, tokenizer, revision, token, dtype, allow_pickle)
    sparse, folder = upcycle_in_memory(given, recipe, fields, layers, data, evaluation, prompts, quantize)
    if output is None:
        return sparse
    write_checkpoint(sparse, output, folder, max_shard_size=max_shard_size)
    return UpcycleReport(Path(output), type(sparse).__name__, sparse.receipt)


def _plan_streaming(found: Source | None, needs: dict[str, Any], *settings: Any) -> tuple[Conversion, WatchedSource]:
    """Raises a `NotStreamableError` where one of `needs` is given."""
    for name, value in needs.items():
        if value is not None:
            raise NotStreamableError(f"`{name}` needs the model itself")
    assert found is not None
    check_not_quantised(read_config(found), found.name)
    watched = WatchedSource(found)
    return plan_from_disk(found, *settings), watched


def stream_upcycle(source: str | Path, target: str | Path, *args, **kwargs) -> dict[str, Any]:
    """The name of `upcycle(..., output=target)` in version 0.1; returns the receipt."""
    return upcycle(source, *args, output=target, **kwargs).receipt


def upcycle_into_shards(source: str | Path, distributed_config: DistributedConfig, *args, **kwargs) -> Any:
    """The name of `upcycle(..., distributed_config=distributed_config)` in version 0.1."""
    return upcycle(source, *args, distributed_config=distributed_config, **kwargs)
