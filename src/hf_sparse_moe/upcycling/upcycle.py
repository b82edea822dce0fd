"""`upcycle`: a dense model in, a mixture out."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from hf_sparse_moe.models.pretrained_model import SparseMoePreTrainedModel

from .conversion import sparse_state_dict
from .families import sparse_class
from .initialization import INITIALIZATION_METHODS
from .receipt import make_receipt
from .source import find_source, load_dense


def upcycle(
    model_or_path: PreTrainedModel | str,
    num_experts: int = 8,
    num_experts_per_tok: int = 2,
    method: str = "copy",
    seed: int = 0,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    allow_pickle: bool = False,
    **config_fields,
) -> SparseMoePreTrainedModel:
    """
    Make a mixture of experts of a dense model, with the same head.

    With `method="copy"` the mixture computes what the dense model computes; the receipt, `model.receipt`, holds the
    measured difference and is saved beside the weights. The dense model is left as it is.

    Args:
        model_or_path (`PreTrainedModel` or `str`): A dense text model, or the folder or Hub id of one.
        num_experts (`int`, defaults to 8): Routed experts of a layer.
        num_experts_per_tok (`int`, defaults to 2): Experts that serve one token.
        method (`str`, defaults to `"copy"`): How the experts start: a key of `INITIALIZATION_METHODS`.
        seed (`int`, defaults to 0): Of all that is drawn at random; the same seed gives the same bits.
        revision (`str`, *optional*): Branch, tag or commit of a Hub id.
        dtype (`str` or `torch.dtype`, defaults to `"auto"`): Of the result; `"auto"` keeps the dense one.
        allow_pickle (`bool`, defaults to `False`): Whether weights in a pickle, which may run code, are read.
        **config_fields: Fields of the family's config, such as `router_aux_loss_coef=0.01`.

    Returns:
        [`SparseMoePreTrainedModel`]: in evaluation mode, on the CPU or the dense model's device.

    Raises:
        ValueError: an unknown method or field, a source that cannot be read, or an architecture without a known
            feed-forward; each says what to do.

    Example:
        ```python
        model = upcycle("gpt2", num_experts=8, num_experts_per_tok=2)
        model.save_pretrained("gpt2-8x")
        ```
    """
    if method not in INITIALIZATION_METHODS:
        raise ValueError(f"`method={method!r}` is not allowed: it must be one of {sorted(INITIALIZATION_METHODS)}.")
    if isinstance(model_or_path, str):
        source = find_source(model_or_path, revision, allow_pickle)
        dense = load_dense(source, dtype, allow_pickle)
    else:
        source, dense = None, model_or_path
    target = sparse_class(dense.config, type(dense).__name__)
    config_class = target.config_class
    unknown = sorted(set(config_fields) - set(config_class.__dataclass_fields__))
    if unknown:
        raise ValueError(f"`{unknown[0]}` is no field of `{config_class.__name__}`. See its documentation.")
    fields = {"num_experts": num_experts, "num_experts_per_tok": num_experts_per_tok, **config_fields}
    config = config_class.from_dense(dense.config, **fields)
    state = sparse_state_dict(dense, config, target.family_side, method, seed)
    if source is None:  # the caller keeps the dense model, and must not share memory with the mixture
        state = {key: tensor if ".experts." in key else tensor.clone() for key, tensor in state.items()}
    result_dtype = dense.dtype if dtype == "auto" else dtype
    sparse = target.from_pretrained(None, config=config, state_dict=state, dtype=result_dtype).to(dense.device)
    if sparse.can_generate():
        sparse.generation_config = dense.generation_config
    sparse.receipt = make_receipt(dense, sparse, source, {"method": method, "seed": seed, **fields})
    return sparse
