"""Which model a recipe trains."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import distributed
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from hf_sparse_moe import SparseMoeConfig, upcycle
from hf_sparse_moe.checkpoints.families import sparse_class, sparse_config_class
from hf_sparse_moe.checkpoints.source import find_source
from hf_sparse_moe.models.modeling_sparse_moe import AUTO_CLASSES
from hf_sparse_moe.models.size import count_parameters
from hf_sparse_moe.upcycling.streaming import check_distributed_config


logger = logging.getLogger("recipe")

SPECIAL_TOKENS = ("pad", "bos", "eos", "cls", "sep", "mask")


@dataclass
class ModelArguments:
    """The model: a dense checkpoint to upcycle, a mixture to go on with, or a config to begin from scratch."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id. A dense checkpoint becomes a mixture; a mixture is trained further."},
    )
    config_name: str | None = field(
        default=None,
        metadata={"help": "From scratch: the dense config, as an architecture (such as qwen3), folder or Hub id."},
    )
    config_overrides: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Fields of the mixture's config, and from scratch also of the dense one, as JSON (in a YAML file "
            'a mapping): {"hidden_size": 256, "num_shared_experts": 1}.'
        },
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of the tokenizer. Defaults to the model's own."}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub id."})
    num_experts: int | None = field(
        default=None, metadata={"help": "Routed experts of a new mixture; 8 if not given."}
    )
    num_experts_per_tok: int | None = field(
        default=None, metadata={"help": "Experts that serve one token; 2 if not given, or as the mixture has it."}
    )
    dense: bool = field(
        default=False,
        metadata={
            "help": "Train the dense model itself, to compare with: what is said of experts is then left aside."
        },
    )
    upcycling_method: str = field(default="copy", metadata={"help": "How the experts of a dense checkpoint start."})
    router_aux_loss_coef: float | None = field(
        default=None, metadata={"help": "Weight of the balance loss; 0.01 if not given, or as the mixture has it."}
    )
    expert_dropout: float | None = field(
        default=None,
        metadata={"help": "Dropout inside the experts (0.4 against overfitting); the dense model's if not given."},
    )
    experts_implementation: str | None = field(
        default=None, metadata={"help": "Backend of the experts, such as grouped_mm, batched_mm or eager."}
    )
    distributed_config: dict[str, int] | str | None = field(
        default=None,
        metadata={
            "help": "Share the mixture out over the processes by transformers' own FSDP2, expert and tensor "
            'parallelism, as JSON (in a YAML file a mapping): {"fsdp_size": 8, "ep_size": 4}.'
        },
    )
    dtype: str = field(
        default="float32", metadata={"help": "Of the weights; for mixed precision leave float32 and pass --bf16."}
    )

    def __post_init__(self) -> None:
        if (self.model_name_or_path is None) == (self.config_name is None):
            raise ValueError("Pass either `--model_name_or_path`, or `--config_name` to begin from scratch.")
        if self.config_name is not None and self.tokenizer_name is None:
            raise ValueError("`--config_name` begins from scratch: pass `--tokenizer_name` with it.")
        self.config_overrides = _as_mapping("config_overrides", self.config_overrides)
        self.distributed_config = _as_mapping("distributed_config", self.distributed_config)
        if self.dense and self.distributed_config is not None:
            raise ValueError("`--dense` and `--distributed_config` do not go together: use Accelerate's FSDP2 or DDP.")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"`--dtype={self.dtype}` must be auto, float32, bfloat16 or float16.")

    @property
    def fields(self) -> dict[str, Any]:
        """What was asked of the config, by name."""
        names = ("num_experts", "num_experts_per_tok", "router_aux_loss_coef", "expert_dropout")
        named = {name: value for name in names if (value := getattr(self, name)) is not None}
        return (self.config_overrides or {}) | named


def _as_mapping(name: str, value: dict[str, Any] | str | None) -> dict[str, Any] | None:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"`--{name}={value}` is no JSON: {error}.") from error
    if not isinstance(value, dict | None):
        raise ValueError(f"`--{name}={value!r}` must be a JSON object.")
    return value


def load_tokenizer(args: ModelArguments) -> PreTrainedTokenizerBase:
    """The tokenizer of `--tokenizer_name`, or the model's own."""
    if args.tokenizer_name is not None:
        return AutoTokenizer.from_pretrained(_checked(args.tokenizer_name, "tokenizer_name"))
    name = _checked(args.model_name_or_path, "model_name_or_path")
    return AutoTokenizer.from_pretrained(name, revision=args.model_revision)


def load_config(args: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The checkpoint's config, dense or sparse; from scratch the config of a mixture to be."""
    if args.model_name_or_path is None:
        return _scratch_config(args, tokenizer)
    name = _checked(args.model_name_or_path, "model_name_or_path")
    return AutoConfig.from_pretrained(name, revision=args.model_revision)


def load_model(
    args: ModelArguments,
    auto_class: type,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    **head_fields,
) -> PreTrainedModel:
    """
    The mixture to train; with `--dense` the dense model.

    Args:
        auto_class (`type`): The task, such as `AutoModelForCausalLM`.
        config (`PreTrainedConfig`): What [`load_config`] returned.
        head_fields: Config fields of a head that the checkpoint may lack, such as `id2label`.
    """
    sparse = isinstance(config, SparseMoeConfig)
    architecture = (config.architectures or [None])[0]
    config_class = type(config) if sparse else sparse_config_class(config, architecture)
    if (model_class := AUTO_CLASSES[config_class].get(auto_class)) is None:
        raise ValueError(
            f"`{args.model_name_or_path or args.config_name}` is of the family `{config_class.model_type}`, which "
            f"has no `{auto_class.__name__}`. Use the recipe of its own task."
        )
    path = args.model_name_or_path
    sharing = _sharing(args, config, len(tokenizer))
    if args.dense:
        model = _dense_model(args, auto_class, config, head_fields)
    elif path is None:
        for name, value in head_fields.items():
            setattr(config, name, value)
        model = auto_class.from_config(config, dtype=None if args.dtype == "auto" else args.dtype)
    elif sparse:
        fields = args.fields
        if fields.get("num_experts", config.num_experts) != config.num_experts:
            raise ValueError(
                f"`--num_experts={fields['num_experts']}` does not fit: `{path}` has {config.num_experts} experts."
            )
        unknown = sorted(set(fields) - set(config_class.__dataclass_fields__))
        if unknown:
            raise ValueError(f"`{unknown[0]}` in `--config_overrides` is no field of `{config_class.__name__}`.")
        folder = find_source(path, args.model_revision).folder
        model = auto_class.from_pretrained(folder, dtype=args.dtype, **sharing, **fields, **head_fields)
    else:
        options = {"method": args.upcycling_method, "seed": seed, "dtype": args.dtype, **args.fields}
        has_the_head = not head_fields and sparse_class(config, architecture) is model_class
        if is_deepspeed_zero3_enabled():
            raise ValueError(
                f"`{path}` is dense, and ZeRO-3 leaves a process no dense model to upcycle. Run "
                f"`hf-sparse-moe upcycle {path} FOLDER` and pass `--model_name_or_path FOLDER`, or replace "
                "`--deepspeed` by `--distributed_config`."
            )
        if sharing and not has_the_head:
            raise ValueError(
                f"`--distributed_config` makes the shards of `{path}` with the head that it has, and this task needs "
                "another. Pass a mixture of it, made by `hf-sparse-moe upcycle`."
            )
        if has_the_head:
            model = upcycle(path, revision=args.model_revision, **sharing, **options)
        else:  # the dense model gets the task's head first
            folder = find_source(path, args.model_revision).folder
            dense = auto_class.from_pretrained(folder, dtype=args.dtype, use_safetensors=True, **head_fields)
            model = upcycle(dense, **options)
    if len(tokenizer) > model.config.vocab_size:
        model.resize_token_embeddings(len(tokenizer))
    if args.experts_implementation is not None and not args.dense:
        model.set_experts_implementation(args.experts_implementation)
    total = model.num_parameters()
    active = total if args.dense else count_parameters(model, only_active=True)
    logger.info("%s: %s parameters, %s active a token", type(model).__name__, f"{total:,}", f"{active:,}")
    return model


def _dense_model(
    args: ModelArguments, auto_class: type, config: PreTrainedConfig, head_fields: dict[str, Any]
) -> PreTrainedModel:
    """The dense model that the other arguments would make a mixture of."""
    dtype = None if args.dtype == "auto" else args.dtype
    if args.model_name_or_path is None:
        for name, value in head_fields.items():
            setattr(config.dense_config, name, value)
        model = auto_class.from_config(config.dense_config, dtype=dtype)
    elif isinstance(config, SparseMoeConfig):
        raise ValueError(f"`--dense` trains a dense checkpoint, and `{args.model_name_or_path}` is a mixture.")
    else:
        folder = find_source(args.model_name_or_path, args.model_revision).folder
        model = auto_class.from_pretrained(folder, dtype=args.dtype, use_safetensors=True, **head_fields)
    # Heads such as BERT's take `num_items_in_batch` and leave it aside: Trainer itself then has to divide.
    model.accepts_loss_kwargs = False
    return model


def _sharing(args: ModelArguments, config: PreTrainedConfig, vocab_size: int) -> dict[str, DistributedConfig]:
    """What `from_pretrained` and `upcycle` take to put the weights straight into shards."""
    if args.distributed_config is None:
        return {}
    if args.model_name_or_path is None:
        raise ValueError(
            "`--distributed_config` reads a checkpoint straight into shards, and from scratch there is none: run this "
            "recipe with `--max_steps 1` and without it first, and pass the result as `--model_name_or_path`."
        )
    if vocab_size > config.vocab_size:
        raise ValueError(
            f"The tokenizer has {vocab_size} tokens, `{args.model_name_or_path}` {config.vocab_size}, and a model in "
            "shards cannot be resized: train one step without `--distributed_config` first."
        )
    unknown = sorted(set(args.distributed_config) - set(DistributedConfig.__dataclass_fields__))
    if unknown:
        raise ValueError(f"`{unknown[0]}` in `--distributed_config` is no field of `DistributedConfig`.")
    sizes = DistributedConfig(**args.distributed_config)
    num_experts = config.num_experts if isinstance(config, SparseMoeConfig) else args.fields.get("num_experts", 8)
    check_distributed_config(sizes, num_experts, distributed.get_world_size() if distributed.is_initialized() else 1)
    return {"distributed_config": sizes}


def _scratch_config(args: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> SparseMoeConfig:
    name = str(args.config_name)
    if name in CONFIG_MAPPING:
        base = AutoConfig.for_model(name)
    else:
        base = AutoConfig.from_pretrained(_checked(name, "config_name"))
    sparse = base if isinstance(base, SparseMoeConfig) else None
    dense = base.dense_config if sparse else base
    config_class = type(sparse) if sparse else sparse_config_class(dense)
    sparse_fields = {key: value for key, value in args.fields.items() if key in config_class.__dataclass_fields__}
    dense_fields = {key: value for key, value in args.fields.items() if key not in sparse_fields}
    for key in dense_fields:
        if not hasattr(dense, key):
            raise ValueError(
                f"`{key}` in `--config_overrides` is a field of neither `{config_class.__name__}` nor "
                f"`{type(dense).__name__}`."
            )
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in SPECIAL_TOKENS}
    ids = {key: value for key, value in ids.items() if hasattr(dense, key)} | {"vocab_size": len(tokenizer)}
    if dense.is_encoder_decoder:
        ids["decoder_start_token_id"] = tokenizer.pad_token_id
    changes = ids | dense_fields
    if sparse:
        fields = sparse.to_dict() | sparse_fields
        return config_class.from_dict(fields | {"dense_config": dense.to_dict() | changes})
    # Built anew, not changed: some configs derive fields, such as the layer types, from others.
    if name in CONFIG_MAPPING:
        dense = AutoConfig.for_model(name, **changes)
    else:
        dense = AutoConfig.from_pretrained(name, **changes)
    return config_class.from_dense(dense, **sparse_fields)


def _checked(name_or_path: str | None, argument: str) -> str:
    """The name, unless it is plainly the path of a folder that is not there: transformers would ask the Hub for it."""
    name = str(name_or_path)
    if not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ValueError(f"`--{argument}={name}` is no folder. Check the path.")
    return name
