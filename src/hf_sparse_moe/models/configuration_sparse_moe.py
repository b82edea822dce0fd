"""Configurations of the three families: a dense config of transformers plus the fields of the mixture."""

# No `from __future__ import annotations` here: `strict` checks a field's type only where the annotation is a type.

import copy
from collections.abc import Iterator
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.utils import logging


logger = logging.get_logger(__name__)

ROUTER_TYPES = ("top_k", "expert_choice", "hash")
SCORING_FUNCTIONS = ("softmax", "sigmoid", "cosine")
BALANCE_SCOPES = ("micro_batch", "sequence", "global_batch")
LAYER_TYPES = ("dense", "sparse")

# What the dense model is when nobody says: the sizes of ModernBERT-base, Qwen3-0.6B and T5-v1.1-base.
_DEFAULT_ENCODER = {"model_type": "modernbert"}
_DEFAULT_DECODER = {
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
_DEFAULT_ENCODER_DECODER = {
    "model_type": "t5",
    "d_model": 768,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 12,
    "num_heads": 12,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "decoder_start_token_id": 0,
}

# What every config has and the dense model reads from its own: one value, that of the dense config where it is the
# default here.
_SHARED_FIELDS = (
    "output_hidden_states",
    "chunk_size_feed_forward",
    "id2label",
    "label2id",
    "problem_type",
)
# What tools look up in `to_dict()`; config.json holds it once, in `dense_config`.
_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "tie_word_embeddings",
)


@strict
class SparseMoeConfig(PreTrainedConfig):
    """
    The fields that the three families share. Use one of the subclasses.

    The config holds the mixture's own fields and a whole dense config. What it lacks (`hidden_size`, `vocab_size`,
    `pad_token_id`, ...) it reads from, and writes to, the dense one. What both have and the dense model reads
    (`output_hidden_states`, `output_attentions`, `id2label`, `problem_type`, ...) is written to both.

    Args:
        dense_config (`PreTrainedConfig` or `dict`, *optional*):
            The dense model inside, of any text architecture of transformers whose feed-forward layout is known
            (see `list_feed_forward_layouts`). Defaults to the sizes of ModernBERT-base, Qwen3-0.6B or T5-v1.1-base.
        num_experts (`int`, defaults to 8): Routed experts of a sparse layer.
        num_experts_per_layer (`list[int]`, *optional*):
            The routed experts of each sparse layer, where they differ; `num_experts` is then the largest of them.
        num_experts_per_tok (`int`, defaults to 2): Routed experts that serve one token (top-k).
        moe_intermediate_size (`int`, *optional*): Intermediate size of one expert. Defaults to the dense one's.
        num_shared_experts (`int`, defaults to 0):
            Experts that serve every token, beside the routed ones; together they are one feed-forward of
            `num_shared_experts * moe_intermediate_size` units.
        shared_expert_gate (`bool`, defaults to `False`):
            Multiply the shared experts by the sigmoid of a linear of the token, as Qwen2-MoE does.
        router_type (`str`, defaults to `"top_k"`):
            `"top_k"`: each token takes its best experts. `"expert_choice"`: each expert takes its best tokens of a
            sequence; for encoders and the encoder's side alone, because it sees the tokens that follow. `"hash"`: the
            token's id decides.
        scoring_func (`str`, defaults to `"softmax"`):
            `"softmax"` or `"sigmoid"` of the router's logits, or `"cosine"`: the softmax of the cosines of the token
            and learned expert keys, over a learned temperature. A sigmoid router has a selection bias.
        norm_topk_prob (`bool`, *optional*):
            Divide the weights of the chosen experts by their sum. Defaults to `True`, with one expert a token to
            `False`: its weight would always be 1, and the task's loss would never reach the router.
        routed_scaling_factor (`float`, defaults to 1.0): Multiplies the weights of the routed experts.
        n_group (`int`, defaults to 1): Groups that the experts are in, one after the other.
        topk_group (`int`, defaults to 1): How many groups a token may take experts from.
        capacity_factor (`float`, *optional*):
            With `"top_k"`: in training an expert takes at most ceil(capacity_factor * T * K / E) of the T tokens of a
            forward pass, those with the highest scores; the rest are dropped. None drops nothing. With
            `"expert_choice"`: how many experts serve a token on average; None means `num_experts_per_tok`.
        router_jitter_noise (`float`, defaults to 0.0):
            In training, multiply the router's input by U(1 - noise, 1 + noise).
        router_aux_loss_coef (`float`, defaults to 0.01):
            Weight of the load-balancing loss in training; 0 is off, as it always is with `"hash"`.
        router_z_loss_coef (`float`, defaults to 0.0): Weight of the router z-loss in training; 0 is off, likewise.
        balance_scope (`str`, defaults to `"micro_batch"`):
            Over which tokens the load-balancing loss evens the load: those of the `"micro_batch"`, of each
            `"sequence"` (DeepSeek-V3), or of the `"global_batch"`, all ranks and the micro-batches of the step so far
            (arXiv 2501.11873).
        router_bias_update_speed (`float`, defaults to 0.0):
            How far the selection bias of a sigmoid router moves after each optimizer step (arXiv 2408.15664 takes
            1e-3); `SelectionBiasCallback` moves it. 0 leaves it as it is.
        expert_dropout (`float`, *optional*):
            Dropout on the intermediate activations of the experts. Defaults to that of the dense feed-forward.
        output_router_logits (`bool`, defaults to `False`): Return `router_logits` and `aux_loss` in evaluation too.

    Raises:
        ValueError: names the field, the value and what is allowed.
    """

    attribute_map: ClassVar[dict[str, str]] = {"num_local_experts": "num_experts"}
    sub_configs: ClassVar[dict[str, type]] = {"dense_config": AutoConfig}
    _default_dense_config: ClassVar[dict[str, Any]] = {}
    _layer_type_fields: ClassVar[dict[str, str]] = {}

    dense_config: Any = None  # a `PreTrainedConfig` once the config is made
    num_experts: int = 8
    num_experts_per_layer: list[int] | None = None
    num_experts_per_tok: int = 2
    moe_intermediate_size: int | None = None
    num_shared_experts: int = 0
    shared_expert_gate: bool = False
    router_type: str = "top_k"
    scoring_func: str = "softmax"
    norm_topk_prob: bool | None = None  # a `bool` once the config is made
    routed_scaling_factor: float | int = 1.0
    n_group: int = 1
    topk_group: int = 1
    capacity_factor: float | int | None = None
    router_jitter_noise: float | int = 0.0
    router_aux_loss_coef: float | int = 0.01
    router_z_loss_coef: float | int = 0.0
    balance_scope: str = "micro_batch"
    router_bias_update_speed: float | int = 0.0
    expert_dropout: float | int | None = None
    output_router_logits: bool = False

    def __post_init__(self, **kwargs):
        dense = self.dense_config
        if isinstance(dense, PreTrainedConfig):
            dense = copy.deepcopy(dense)  # what is shared is written into it
        elif isinstance(dense, dict | None):
            fields = dict(self._default_dense_config if dense is None else dense)
            model_type = fields.pop("model_type", None)
            if model_type == "dense_olmoe":
                from .dense_olmoe import DenseOlmoeConfig  # noqa: F401  registers itself
            if model_type not in CONFIG_MAPPING:
                raise ValueError(
                    f"`dense_config` has `model_type={model_type!r}`, which the installed transformers does not know. "
                    "Pass the config of a dense text model of transformers, or upgrade transformers."
                )
            dense = AutoConfig.for_model(model_type, **fields)
        else:
            raise ValueError(f"`dense_config={dense!r}` is not allowed: it must be a config, its `dict` or None.")
        dense.name_or_path = ""  # where it lay is nobody's business who reads the published config
        self.dense_config = dense
        for name in _SHARED_FIELDS:
            given = getattr(self, name) != type(self).__dataclass_fields__[name].default
            given = given or (name in ("id2label", "label2id") and kwargs.get("num_labels") is not None)
            setattr(self, name, getattr(self if given else dense, name))  # in both
        kwargs.setdefault("output_attentions", dense.output_attentions)
        # Most dense models fail where their config says False; the mixture makes the tuple itself.
        self.return_dict, dense.return_dict = bool(self.return_dict and dense.return_dict), True
        one_of_many = self.num_experts_per_tok == 1 < self.num_experts and self.router_type != "hash"
        if self.norm_topk_prob is None:
            self.norm_topk_prob = not one_of_many
        elif self.norm_topk_prob and one_of_many and self.router_type == "top_k":
            logger.warning_once(
                "`num_experts_per_tok=1` with `norm_topk_prob=True` gives every token's expert the weight 1, so that "
                "the task's loss never trains the router. To train it, make a mixture with `norm_topk_prob=False`."
            )
        super().__post_init__(**kwargs)
        if "quantization_config" in kwargs:
            from .quantization import METHOD  # noqa: F401  tools look the method up before they load the model
        self._check_fields()

    # The dense config answers for what this one lacks. `PreTrainedConfig` stores its own fields in `__dict__`, so that
    # `__getattr__`, which Python calls last, never sees them.
    def __getattr__(self, name: str) -> Any:
        if not self._is_of_dense(name):
            raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")
        try:
            return getattr(self.dense_config, name)
        except RuntimeError as error:  # transformers' way to say that the layers differ in it
            raise AttributeError(f"'{type(self).__name__}' object has no single '{name}': {error}") from error

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.attribute_map:  # with the checks of the field's own name
            setattr(self, self.attribute_map[name], value)
            return
        own = name in self.__dict__ or hasattr(type(self), name)
        if not own and self._is_of_dense(name) and hasattr(self.dense_config, name):
            setattr(self.dense_config, name, value)
            return
        super().__setattr__(name, value)
        dense = self.__dict__.get("dense_config")
        if name in (*_SHARED_FIELDS, "_output_attentions") and isinstance(dense, PreTrainedConfig):
            setattr(dense, name, value)

    def _is_of_dense(self, name: str) -> bool:
        """Whether `name` may be the dense config's; of private names, its fields are."""
        dense = self.__dict__.get("dense_config")
        is_field = not name.startswith("_") or name in getattr(dense, "__dataclass_fields__", ())
        return isinstance(dense, PreTrainedConfig) and is_field

    @property
    def keys_to_ignore_at_inference(self) -> list[str]:
        """The outputs that Trainer does not gather in an evaluation: the dense model's, and those of the routing."""
        dense = getattr(type(self.dense_config), "keys_to_ignore_at_inference", ["past_key_values"])
        return [*dense, "router_logits", "aux_loss", "task_loss", "z_loss"]

    def _get_generation_parameters(self) -> dict[str, Any]:
        # Saving and `generate` refuse a config with undeclared generation parameters. The dense config declares those
        # that are read through (BART's `forced_eos_token_id`).
        declared = self.dense_config.__dataclass_fields__
        return {name: value for name, value in super()._get_generation_parameters().items() if name not in declared}

    def to_dict(self) -> dict[str, Any]:
        """[`PreTrainedConfig.to_dict`] with the sizes of the dense model, and without the folder that it came from."""
        output = super().to_dict()
        output["dense_config"].pop("_name_or_path", None)
        return output | {name: size for name in _SIZES if (size := getattr(self, name, None)) is not None}

    def to_diff_dict(self) -> dict[str, Any]:
        """What config.json holds."""
        return {name: value for name, value in super().to_diff_dict().items() if name not in _SIZES}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """[`PreTrainedConfig.from_dict`]; the sizes are those of `dense_config`."""
        if config_dict.get("dense_config") is not None:
            config_dict = {name: value for name, value in config_dict.items() if name not in _SIZES}
        return super().from_dict(config_dict, **kwargs)

    # The experts read this config; the dense model inside has none, and would refuse the name of a backend.
    @property
    def _experts_implementation(self) -> str | None:
        return self._experts_implementation_internal

    @_experts_implementation.setter
    def _experts_implementation(self, value: str | dict | None) -> None:
        self._experts_implementation_internal = value.get("") if isinstance(value, dict) else value

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """This config; for one side of an encoder-decoder (`decoder=True` or `encoder=True`) the dense one's view."""
        if self.is_encoder_decoder and decoder != encoder:
            return self.dense_config.get_text_config(decoder=decoder, encoder=encoder)
        return self

    @classmethod
    def from_dense(cls, dense: PreTrainedConfig | str, **fields) -> "SparseMoeConfig":
        """
        The config of a mixture whose dense part is `dense`.

        Args:
            dense (`PreTrainedConfig` or `str`): A dense config, or the id or folder of a checkpoint.
            **fields: Fields of this class, such as `num_experts=8`.

        Raises:
            ValueError: an architecture without a known feed-forward, one that is sparse already, or a wrong field.
        """
        from .size import meta_model

        source: Any = dense
        if not isinstance(dense, PreTrainedConfig):
            source = AutoConfig.from_pretrained(dense, trust_remote_code=False)
        if isinstance(source, SparseMoeConfig):
            raise ValueError(
                f"`dense` is a mixture already (`model_type={source.model_type!r}`). Pass a dense config."
            )
        config = cls.around(source, **fields)
        meta_model(config)  # finds the feed-forwards, or says why not
        return config

    @classmethod
    def around(cls, dense: PreTrainedConfig, **fields) -> "SparseMoeConfig":
        """[`from_dense`] of a config whose model is known to have feed-forwards."""
        known = (*cls.__dataclass_fields__, *cls.attribute_map, "num_labels")
        unknown = sorted(name for name in fields if name not in known and not hasattr(dense, name))
        if unknown:
            raise ValueError(f"`{unknown[0]}` is no field of `{cls.__name__}`. See its documentation.")
        return cls(dense_config=type(dense).from_dict(dense.to_dict()), **{"dtype": dense.dtype} | fields)

    def num_parameters(self, only_active: bool = False) -> int:
        """
        Parameters of the family's language model, tied ones counted once.

        Args:
            only_active (`bool`, defaults to `False`): Count, of the routed experts, only the `num_experts_per_tok`
                that serve a token.
        """
        from .size import count_parameters, meta_model

        return count_parameters(meta_model(self), only_active=only_active)

    def flops_per_token(self) -> int:
        """
        Floating-point operations of the matrix products of one forward pass for one token (one source and one target
        token for an encoder-decoder), 2 for each multiply-add, language-model head included. Attention scores, which
        grow with the sequence, are not counted.
        """
        from .size import count_flops_per_token, meta_model

        return count_flops_per_token(meta_model(self))

    def _check_fields(self) -> None:
        for field, is_allowed, allowed in self._rules():
            if not is_allowed:
                raise ValueError(f"`{field}={getattr(self, field)!r}` is not allowed: it must be {allowed}.")

    def _rules(self) -> Iterator[tuple[str, bool, str]]:
        """Field, whether its value is allowed, and what is; each is worked out when all before it have passed."""
        k, experts, size = self.num_experts_per_tok, self.num_experts, self.moe_intermediate_size
        each = self.num_experts_per_layer or [experts]
        yield "num_experts", experts >= 1, "at least 1"
        yield "num_experts_per_layer", min(each) >= 1 and max(each) == experts, f"a list up to `num_experts={experts}`"
        yield (
            "num_experts_per_layer",
            len(each) == 1 or self.router_type == "top_k",
            "None unless `router_type='top_k'`",
        )
        experts = min(each)
        yield "num_experts_per_tok", 1 <= k <= experts, f"between 1 and `num_experts={experts}`"
        yield "moe_intermediate_size", size is None or size >= 1, "None or at least 1"
        yield "num_shared_experts", self.num_shared_experts >= 0, "at least 0"
        gates_nothing = self.shared_expert_gate and not self.num_shared_experts
        yield "shared_expert_gate", not gates_nothing, "False unless `num_shared_experts` is at least 1"

        top_k, sides = self.router_type == "top_k", self._layer_type_fields.values()
        sees_later = "encoder" in sides and not getattr(self.dense_config, "is_decoder", False)
        can_choose = sees_later or type(self) is SparseMoeConfig
        causal = (
            "'top_k' or 'hash' in a causal decoder, because an expert that chooses its tokens sees those that follow"
        )
        yield "router_type", self.router_type in ROUTER_TYPES, f"one of {ROUTER_TYPES}"
        yield "router_type", self.router_type != "expert_choice" or can_choose, causal
        yield "scoring_func", self.scoring_func in SCORING_FUNCTIONS, f"one of {SCORING_FUNCTIONS}"
        yield "scoring_func", top_k or self.scoring_func == "softmax", "'softmax' unless `router_type='top_k'`"
        in_groups = self.n_group >= 1 and all(count % self.n_group == 0 for count in each)
        yield "n_group", in_groups, "a divisor of `num_experts`"
        yield "n_group", top_k or self.n_group == 1, "1 unless `router_type='top_k'`"
        yield "topk_group", 1 <= self.topk_group <= self.n_group, f"between 1 and `n_group={self.n_group}`"
        within = self.topk_group * experts // self.n_group
        yield "num_experts_per_tok", k <= within, f"at most {within}, those of `topk_group={self.topk_group}` groups"

        capacity, speed, dropout = self.capacity_factor, self.router_bias_update_speed, self.expert_dropout
        has_bias = top_k and self.scoring_func == "sigmoid"
        yield "capacity_factor", capacity is None or 0 < capacity < float("inf"), "None, or above 0 and finite"
        yield "routed_scaling_factor", 0 < self.routed_scaling_factor < float("inf"), "above 0 and finite"
        yield "router_jitter_noise", 0 <= self.router_jitter_noise < 1, "at least 0 and below 1"
        for field in ("router_aux_loss_coef", "router_z_loss_coef", "router_bias_update_speed"):
            yield field, 0 <= getattr(self, field) < float("inf"), "at least 0 and finite"
        yield "router_bias_update_speed", speed == 0 or has_bias, "0 unless `scoring_func='sigmoid'`"
        yield "balance_scope", self.balance_scope in BALANCE_SCOPES, f"one of {BALANCE_SCOPES}"
        yield "expert_dropout", dropout is None or 0 <= dropout < 1, "None, or at least 0 and below 1"
        for field in self._layer_type_fields:
            yield field, set(getattr(self, field) or ()) <= set(LAYER_TYPES), f"a list of {LAYER_TYPES}"

    @property
    def mean_experts_per_token(self) -> float:
        """The routed experts that serve a token, on average."""
        if self.router_type == "expert_choice" and self.capacity_factor is not None:
            return min(self.capacity_factor, self.num_experts)
        return self.num_experts_per_tok


@strict
class SparseMoeEncoderConfig(SparseMoeConfig):
    """
    Config of a sparse encoder (BERT, ModernBERT, ...). See [`SparseMoeConfig`] for the fields.

    Args:
        mlp_layer_types (`list[str]`, *optional*): `"dense"` or `"sparse"`, one a layer. Defaults to all sparse.
    """

    model_type = "sparse_moe_encoder"
    _default_dense_config: ClassVar[dict[str, Any]] = _DEFAULT_ENCODER
    _layer_type_fields: ClassVar[dict[str, str]] = {"mlp_layer_types": "encoder"}
    mlp_layer_types: list[str] | None = None


@strict
class SparseMoeDecoderConfig(SparseMoeConfig):
    """
    Config of a sparse decoder-only model (Llama, Qwen3, GPT-2, ...). See [`SparseMoeConfig`] for the fields.

    Args:
        mlp_layer_types (`list[str]`, *optional*): `"dense"` or `"sparse"`, one a layer. Defaults to all sparse.
    """

    model_type = "sparse_moe_decoder"
    _default_dense_config: ClassVar[dict[str, Any]] = _DEFAULT_DECODER
    _layer_type_fields: ClassVar[dict[str, str]] = {"mlp_layer_types": "decoder"}
    mlp_layer_types: list[str] | None = None


@strict
class SparseMoeEncoderDecoderConfig(SparseMoeConfig):
    """
    Config of a sparse encoder-decoder (T5, BART, ...). See [`SparseMoeConfig`] for the fields.

    Args:
        encoder_mlp_layer_types (`list[str]`, *optional*): As `mlp_layer_types`, for the encoder's layers.
        decoder_mlp_layer_types (`list[str]`, *optional*): As `mlp_layer_types`, for the decoder's layers.
    """

    model_type = "sparse_moe_encoder_decoder"
    _default_dense_config: ClassVar[dict[str, Any]] = _DEFAULT_ENCODER_DECODER
    _layer_type_fields: ClassVar[dict[str, str]] = {
        "encoder_mlp_layer_types": "encoder",
        "decoder_mlp_layer_types": "decoder",
    }
    is_encoder_decoder: bool = True
    encoder_mlp_layer_types: list[str] | None = None
    decoder_mlp_layer_types: list[str] | None = None


__all__ = ["SparseMoeConfig", "SparseMoeDecoderConfig", "SparseMoeEncoderConfig", "SparseMoeEncoderDecoderConfig"]
