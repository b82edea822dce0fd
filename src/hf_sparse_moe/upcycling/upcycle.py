"""`upcycle`: a dense model in, a mixture out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_sparse_moe.checkpoints.families import sparse_class
from hf_sparse_moe.checkpoints.source import Source, find_source, load_dense
from hf_sparse_moe.models.configuration_sparse_moe import SparseMoeConfig
from hf_sparse_moe.models.feed_forward import feed_forward_side, find_feed_forwards
from hf_sparse_moe.models.pretrained_model import SparseMoePreTrainedModel

from .branches import check_branches, make_trunk, router_centroids
from .conversion import Recipe, SparseLayer, reader, sparse_layers, sparse_state_dict
from .initialization import INITIALIZATION_METHODS
from .layers import layer_types
from .measuring import task_losses, unit_activations
from .receipt import describe_source, make_receipt, name_of


Layers = str | Sequence[int] | dict[str, str | Sequence[int]]


def upcycle(
    model_or_path: PreTrainedModel | str | None = None,
    num_experts: int | None = None,
    num_experts_per_tok: int = 2,
    method: str = "copy",
    seed: int = 0,
    *,
    layers: Layers = "all",
    data: Iterable[Any] | None = None,
    evaluation: Iterable[Any] | None = None,
    sources: Sequence[PreTrainedModel | str] = (),
    prompts: Sequence[Iterable[Any]] | None = None,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    allow_pickle: bool = False,
    **options_and_fields,
) -> SparseMoePreTrainedModel:
    """
    Make a mixture of experts of a dense model, with the same head.

    With `method="copy"` the mixture computes what the dense model computes; the receipt, `model.receipt`, holds the
    measured difference and is saved beside the weights. The dense model is left as it is.

    Args:
        model_or_path (`PreTrainedModel` or `str`): A dense text model, or the folder or Hub id of one. With
            `method="branches"`, the model that the branches were fine-tuned from; optional.
        num_experts (`int`, *optional*): Routed experts of a layer. Defaults to 8, or to the number of `sources`.
        num_experts_per_tok (`int`, defaults to 2): Experts that serve one token.
        method (`str`, defaults to `"copy"`): How the experts start: a key of `INITIALIZATION_METHODS`.
        seed (`int`, defaults to 0): Of all that is drawn at random; the same seed gives the same bits.
        layers (`str`, `list[int]` or `dict`, defaults to `"all"`): Which layers become sparse: `"all"`, `"none"`,
            `"every_N"`, `"first_N"`, `"last_N"`, or positions; for an encoder-decoder also one of these a side, as
            `{"encoder": "all", "decoder": "none"}`.
        data (`Iterable`, *optional*): Batches of token ids, for methods that measure activations.
        evaluation (`Iterable`, *optional*): Batches of held-out text, with `labels` or of token ids alone; the receipt
            then holds the task loss on them before and after.
        sources (`list`, *optional*): With `method="branches"`, the dense models that become the experts.
        prompts (`list`, *optional*): With `method="branches"`, for each of `sources` batches of token ids of its own
            text; the router starts from them. Without, it starts at random.
        revision (`str`, *optional*): Branch, tag or commit of a Hub id.
        dtype (`str` or `torch.dtype`, defaults to `"auto"`): Of the result; `"auto"` keeps the dense one.
        allow_pickle (`bool`, defaults to `False`): Whether weights in a pickle, which may run code, are read.
        **options_and_fields: Options of the method, such as `drop_ratio=0.5`, and fields of the family's config, such
            as `router_aux_loss_coef=0.01`.

    Returns:
        [`SparseMoePreTrainedModel`]: in evaluation mode, on the CPU or the dense model's device.

    Raises:
        ValueError: an unknown method, option or field, a source that cannot be read, or an architecture without a
            known feed-forward; each says what to do.

    Example:
        ```python
        model = upcycle("gpt2", num_experts=8, num_experts_per_tok=2)
        model.save_pretrained("gpt2-8x")
        ```
    """
    recipe, fields = make_recipe(method, seed, options_and_fields)

    def load(dense_or_path: PreTrainedModel | str) -> tuple[PreTrainedModel, Source | None]:
        if not isinstance(dense_or_path, str):
            return dense_or_path, None
        found = find_source(dense_or_path, revision, allow_pickle)
        return load_dense(found, dtype, allow_pickle), found

    if method == "branches":
        branches, branch_sources = zip(*map(load, sources), strict=True) if sources else ((), ())
        check_branches(branches, [name_of(*pair) for pair in zip(branches, branch_sources, strict=True)])
        base = None if model_or_path is None else load(model_or_path)[0]
        dense, source = make_trunk(branches, base, recipe.options["trunk"]), None
        num_experts = len(branches) if num_experts is None else num_experts
        if num_experts != len(branches):
            raise ValueError(f"`num_experts={num_experts}` is not allowed: `sources` names {len(branches)} branches.")
    elif model_or_path is None:
        raise ValueError("`model_or_path` is missing. Pass a dense model, or the folder or Hub id of one.")
    else:
        branches, branch_sources = (), ()
        dense, source = load(model_or_path)
    target = sparse_class(dense.config, type(dense).__name__)
    num_experts = 8 if num_experts is None else num_experts
    fields = {"num_experts": num_experts, "num_experts_per_tok": num_experts_per_tok, **fields}
    config = mixture_config(dense, target, recipe, fields, layers)
    measured = _measure(dense, sparse_layers(dense, config, target.family_side), data, branches, prompts)
    state = sparse_state_dict(dense, config, target.family_side, recipe, measured)
    if source is None:  # the caller keeps the dense model, and must not share memory with the mixture
        shared = {tensor.data_ptr() for tensor in dense.state_dict().values()}
        state = {key: tensor.clone() if tensor.data_ptr() in shared else tensor for key, tensor in state.items()}
    result_dtype = dense.dtype if dtype == "auto" else dtype
    sparse = target.from_pretrained(None, config=config, state_dict=state, dtype=result_dtype).to(dense.device)
    if sparse.can_generate():
        sparse.generation_config = dense.generation_config
    sparse.receipt = make_receipt(dense, sparse, source, recipe, fields)
    if evaluation is not None:
        sparse.receipt["loss"] = task_losses({"dense": dense, "mixture": sparse}, evaluation)
    if branches:
        pairs = zip(branches, branch_sources, strict=True)
        sparse.receipt["branches"] = [describe_source(branch, found) for branch, found in pairs]
    return sparse


def _measure(
    dense: PreTrainedModel,
    layers: list[SparseLayer],
    data: Iterable[Any] | None,
    branches: Sequence[PreTrainedModel],
    prompts: Sequence[Iterable[Any]] | None,
) -> Callable[[SparseLayer], dict[str, Any]]:
    """What a method gets for each layer besides the dense weights, as [`LayerContext`] takes it."""
    if prompts is not None and len(prompts) != len(branches):
        raise ValueError(f"`prompts` has {len(prompts)} entries for {len(branches)} `sources`. Give one each.")
    activations = None if data is None else unit_activations(dense, layers, data)
    centroids = None if prompts is None else router_centroids(dense, layers, prompts)
    states = [branch.state_dict() for branch in branches]

    def of(layer: SparseLayer) -> dict[str, Any]:
        return {
            "activations": None if activations is None else activations[layer.position],
            "centroids": None if centroids is None else centroids[layer.position],
            "branches": [layer.weights(reader(state)) for state in states],
        }

    return of


def make_recipe(method: str, seed: int, options_and_fields: dict[str, Any]) -> tuple[Recipe, dict[str, Any]]:
    """Tell a method's options from config fields, and fill in the defaults."""
    if method not in INITIALIZATION_METHODS:
        raise ValueError(f"`method={method!r}` is not allowed: it must be one of {sorted(INITIALIZATION_METHODS)}.")
    defaults = INITIALIZATION_METHODS[method].options
    options = {name: options_and_fields.get(name, default) for name, default in defaults.items()}
    fields = {name: value for name, value in options_and_fields.items() if name not in defaults}
    return Recipe(method, seed, options), fields


def mixture_config(
    dense: PreTrainedModel,
    target: type[SparseMoePreTrainedModel],
    recipe: Recipe,
    fields: dict[str, Any],
    layers: Layers,
) -> SparseMoeConfig:
    """The config of the mixture that `dense`, which may be without storage, becomes; completes `fields`."""
    config_class = target.config_class
    unknown = sorted(set(fields) - set(config_class.__dataclass_fields__))
    if unknown:
        raise ValueError(
            f"`{unknown[0]}` is no field of `{config_class.__name__}`, and no option of `method={recipe.method!r}`."
        )
    config_class.from_dense(dense.config, **fields)  # says what is wrong with the fields, before anything else
    sizes: dict[str, list[int]] = {}
    for feed_forward in find_feed_forwards(dense):
        side = feed_forward_side(dense, feed_forward, target.family_side)
        sizes.setdefault(side, []).append(feed_forward.intermediate_size)
    for name, side in config_class._layer_type_fields.items():
        chosen = layers.get(side, "all") if isinstance(layers, dict) else layers
        if chosen != "all":
            fields[name] = layer_types(chosen, len(sizes.get(side, [])))
    units = {size for side in sizes.values() for size in side}
    decided = recipe.initialization.fields(fields, max(units), recipe.options)
    if decided.get("moe_intermediate_size") and len(units) > 1:
        raise ValueError(
            f"`method={recipe.method!r}` needs feed-forwards of one size, but `{type(dense).__name__}` has sizes "
            f"{sorted(units)}."
        )
    fields |= decided
    return config_class.from_dense(dense.config, **fields)
