"""The common base: a dense model of transformers whose feed-forwards are experts."""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.core_model_loading import WeightRenaming
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.utils import ModelOutput, cached_file, logging

from .balancing import OptimizerStep, listen_to_trainers
from .configuration_sparse_moe import SparseMoeConfig
from .losses import BalanceLosses, balance_when_alone, has_balance_loss, language_model_loss
from .masks import tokens_by_side
from .moe_block import SparseMoeBlock, install_sparse_blocks
from .routers import router_probabilities
from .routing import RoutingRecord, checkpoint_with_routing


logger = logging.get_logger(__name__)

RECEIPT_NAME = "receipt.json"

# What `generate`, `device_map` and attention dispatch ask of a model class, answered by the dense model inside.
_DENSE_TRAITS = (
    "supports_gradient_checkpointing",
    "_is_stateful",
    "_can_compile_fullgraph",
    "_supports_flash_attn",
    "_supports_sdpa",
    "_supports_flex_attn",
    "_supports_attention_backend",
)


class SparseMoePreTrainedModel(PreTrainedModel):
    """
    A dense model of transformers, head included, in `self.dense`, with a [`SparseMoeBlock`] in the place of its
    feed-forwards. Attention, positions, caches, heads and generation are the dense model's; this class adds routing
    records, the balance loss, initialisation, saving and loading.
    """

    config_class: ClassVar[Any] = SparseMoeConfig
    base_model_prefix = "dense"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict: ClassVar[Any] = {"e_score_correction_bias"}  # its steps are too small for bfloat16

    dense_auto_class: ClassVar[Any] = AutoModel
    output_class: ClassVar[Any]
    compute_task_loss: ClassVar[Callable[..., torch.Tensor] | None] = None  # see losses.py
    counted_labels: ClassVar[Callable[..., torch.Tensor]] = staticmethod(lambda labels: labels)
    family_side: ClassVar[str]
    # Set by the package: publishes with a model card. Where only this folder travelled, the stock push is used.
    publisher: ClassVar[Callable[..., Any] | None] = None

    def __init__(self, config: SparseMoeConfig):
        super().__init__(config)
        config._check_fields()  # they may have been assigned to since
        # A checkpoint's own heads need its own sizes; `id2label` and `dtype` are kept by the outer config.
        config.dense_config.id2label, config.dense_config.label2id = config.id2label, config.label2id
        try:
            self.dense = self.dense_auto_class.from_config(config.dense_config, dtype=torch.get_default_dtype())
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
            raise ValueError(
                f"`{type(self).__name__}` needs a dense architecture with an `{self.dense_auto_class.__name__}` "
                f"head; transformers has none for `model_type={config.dense_config.model_type!r}`."
            ) from None
        config.dense_config = self.dense.config
        config._attn_implementation_internal = self.dense.config._attn_implementation
        install_sparse_blocks(self.dense, config, self.family_side)
        for trait in _DENSE_TRAITS:
            setattr(self, trait, getattr(self.dense, trait))
        self.main_input_name = self.dense.main_input_name
        if self.can_generate():
            self.generation_config = self.dense.generation_config
        self._dense_arguments = set(inspect.signature(self.dense.forward).parameters)
        self.optimizer_step = OptimizerStep(config)
        listen_to_trainers()
        balance_when_alone(self.base_model, self.optimizer_step)
        if config.is_encoder_decoder:
            balance_when_alone(self.dense.get_encoder(), self.optimizer_step)
        self.receipt: dict[str, Any] | None = None
        self.post_init()
        # T5 keeps its `wo` in float32; where that became experts, the name fits nothing and transformers would say so.
        # And a selection bias is a sigmoid router's alone.
        tensors = (*self.named_parameters(), *self.named_buffers())
        parts = {part for name, _ in tensors for part in name.split(".")}
        self._keep_in_fp32_modules = {name for name in self._keep_in_fp32_modules or () if name in parts}
        strict = self._keep_in_fp32_modules_strict or ()
        self._keep_in_fp32_modules_strict = {name for name in strict if name in parts}

    @property
    def sparse_blocks(self) -> list[SparseMoeBlock]:
        """The sparse layers, in the order of the dense model's modules."""
        return [module for module in self.modules() if isinstance(module, SparseMoeBlock)]

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Every Trainer asks, before it makes its callbacks, whether `forward` takes `num_items_in_batch`."""
        listen_to_trainers()
        return True

    def start_optimizer_step(self, micro_batches: int = 1, loss_scale: float = 1.0) -> None:
        """
        Call it before the first micro-batch of each optimizer step in a training loop of your own that accumulates
        gradients, where the loss is not `outputs.loss` or `balance_scope="global_batch"`. Trainer calls it by itself.

        Args:
            micro_batches (`int`, defaults to 1): Those of the step, by which the loss is divided.
            loss_scale (`float`, defaults to 1.0): By what a gradient scaler multiplies it: `scaler.get_scale()`.
        """
        self.optimizer_step.start(micro_batches, loss_scale)

    # ---- forward ----------------------------------------------------------------------------------------------

    def _run(
        self,
        inputs: dict[str, Any],
        labels: torch.Tensor | None,
        num_items_in_batch: torch.Tensor | int | None,
        output_router_logits: bool | None,
        return_dict: bool | None,
        shifted: bool = False,
    ) -> ModelOutput | tuple:
        """
        Run the dense model without labels, and add the losses and the routing.

        Args:
            inputs (`dict`): What the dense model's forward takes; entries that are None are left out.
            labels (`torch.Tensor`, *optional*): What the task loss is taken against.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*): The labels of the whole optimizer step.
            output_router_logits (`bool`, *optional*): Defaults to the config's.
            return_dict (`bool`, *optional*): Defaults to the config's.
            shifted (`bool`, defaults to `False`): Whether the labels stand at the tokens that predict them already.
        """
        config = self.config
        if labels is not None and self.compute_task_loss is None:
            raise ValueError(f"`labels` need a head, and `{type(self).__name__}` has none. Use a `For...` class.")
        if labels is not None and len(labels) == 0:  # attention of transformers cannot do without rows
            raise ValueError(
                "The batch holds no rows. Where a rank may have none, give it a row of pads: `attention_mask` 0, "
                "`labels` -100; it then adds nothing to loss and gradient."
            )
        wants_logits = config.output_router_logits if output_router_logits is None else output_router_logits
        balances = self.training and has_balance_loss(config)
        tokens = tokens_by_side(self, {**inputs, "labels": labels})
        record = RoutingRecord(tokens, keep=wants_logits or balances, owner=self.optimizer_step)
        inputs = {name: value for name, value in inputs.items() if value is not None}
        if "logits_to_keep" not in self._dense_arguments:
            inputs.pop("logits_to_keep", None)
        if "past_key_values" in inputs and "cache" in self._dense_arguments:  # its name from transformers 5.24 on
            inputs["cache"] = inputs.pop("past_key_values")
        record.open()
        try:
            outputs = self.dense(**inputs, return_dict=True)
        finally:
            record.close()

        balance = None
        if record.events:
            balance = BalanceLosses(
                record.events,
                [router_probabilities(event.routing.router_logits, config.scoring_func) for event in record.events],
                self.optimizer_step,
                trains=self.training and torch.is_grad_enabled(),
                labels=labels if labels is None or shifted else self.counted_labels(labels),
                num_items_in_batch=num_items_in_batch,
            )
            # The graph of a model that computes its own loss is not broken by what only other losses need.
            if balances and not (labels is not None and torch.compiler.is_compiling()):
                outputs = balance.attach_to(outputs, has_labels=labels is not None)
        fields = {name: outputs.get(name) for name in self.output_class.__dataclass_fields__}
        if labels is not None:
            compute = language_model_loss if shifted else self.compute_task_loss
            fields["loss"] = compute(outputs, labels, config, num_items_in_batch)
        if balance is not None:
            fields["aux_loss"], fields["z_loss"] = balance.aux_loss, balance.z_loss
            if balances and labels is not None:
                fields["task_loss"] = fields["loss"]
                fields["loss"] = balance.add_to(fields["loss"])
        if wants_logits:
            fields["router_logits"] = tuple(event.routing.router_logits for event in record.events)
        result = self.output_class(**fields)
        return_dict = getattr(config, "return_dict", True) if return_dict is None else return_dict
        return result if return_dict else result.to_tuple()

    # ---- delegation to the dense model ------------------------------------------------------------------------

    @property
    def base_model(self) -> nn.Module:
        """The dense model without its head."""
        return self.dense.base_model

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def get_input_embeddings(self) -> nn.Module:
        return self.dense.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.dense.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        return self.dense.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.dense.set_output_embeddings(new_embeddings)

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """As the dense model does it: input, output and position-independent biases, tied weights, `vocab_size`."""
        return self.dense.resize_token_embeddings(*args, **kwargs)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks for the decorator's name in this file's source; it stands in experts.py.
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """The package's `"auto"` where nobody asks for another; where this folder travels alone, transformers' own."""
        if requested_experts is None and "auto" in ALL_EXPERTS_FUNCTIONS.valid_keys():
            return "auto"
        return super().get_correct_experts_implementation(requested_experts)

    def _set_gradient_checkpointing(self, enable: bool = True, gradient_checkpointing_func=None, **kwargs) -> None:
        if gradient_checkpointing_func is not None:
            kwargs["gradient_checkpointing_func"] = checkpoint_with_routing(gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable=enable, **kwargs)

    def init_parallel_plans(self) -> None:
        """The dense model's plans without the feed-forwards that are gone, and the experts' own rules."""
        super().init_parallel_plans()
        present = {_wildcard(name) for name, _ in (*self.named_modules(), *self.named_parameters())}
        self._tp_plan = {rule: style for rule, style in (self._tp_plan or {}).items() if rule in present}
        self._ep_plan = {rule: style for rule, style in (self._ep_plan or {}).items() if rule in present}
        self._fsdp_plan = {rule: style for rule, style in (self._fsdp_plan or {}).items() if rule in present}
        for name, module in self.named_modules():
            if isinstance(module, SparseMoeBlock):
                # transformers names the layers of most architectures otherwise than they are called.
                self._fsdp_plan.setdefault(_wildcard(self._layer_of(name)), "free_full_weight")
                experts, up = f"{_wildcard(name)}.experts", module.experts.up_name
                if not module.experts.biased:  # every rank would add the bias of the whole
                    tp_up = "packed_colwise" if module.experts.gated else "colwise"
                    self._tp_plan |= {f"{experts}.{up}": tp_up, f"{experts}.down_proj": "rowwise"}
                    self._tp_plan[experts] = "moe_tp_experts"
                self._ep_plan |= {f"{experts}.{parameter}": "grouped_gemm" for parameter in module.experts._parameters}
                self._ep_plan[experts] = "ep_dispatch_experts"

    def _layer_of(self, block: str) -> str:
        """The outermost numbered module around a block: what FSDP gathers and frees. A list has no forward."""
        parts = block.split(".")
        paths = [".".join(parts[: end + 1]) for end, part in enumerate(parts) if part.isdigit()]
        return next((path for path in paths if not isinstance(self.get_submodule(path), nn.ModuleList)), block)

    # ---- initialisation ---------------------------------------------------------------------------------------

    @torch.no_grad()
    @init.guard_torch_init_functions()
    def initialize_weights(self) -> None:
        # transformers hands the dense subtree to the dense model's `_init_weights`, which knows no experts. The
        # functions of `initialization` leave alone each parameter that a checkpoint filled; the flag keeps those
        # that were drawn here before from being drawn again.
        # In custom code transformers takes a module without tensors of its own for initialised, but that is where a
        # model may fill buffers of its layers that no checkpoint holds (Falcon-H1's multipliers).
        skipped = [
            module
            for module in self.dense.modules()
            if isinstance(module, PreTrainedModel)
            and not module._parameters
            and not getattr(module, "_is_hf_initialized", False)
        ]
        super().initialize_weights()
        for module in skipped:
            module._init_weights(module)
        for block in self.sparse_blocks:
            if not block.is_initialized:
                block.reset_parameters()
                block.is_initialized = True

    # ---- saving and loading -----------------------------------------------------------------------------------

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args, push_to_hub: bool = False, repo_id: str | None = None, **kwargs
    ) -> None:
        """
        [`PreTrainedModel.save_pretrained`], and the receipt. The config's `auto_map` names every class of the family,
        and the code they need is copied beside the weights. `push_to_hub=True` then publishes as `repo_id`, or as the
        folder's name.
        """
        self.config.auto_map = self.family_auto_map()
        # Keys are saved as they stand in the module, so that a strict load (a Trainer's resume) finds them.
        kwargs.setdefault("save_original_format", False)
        if kwargs.get("is_main_process", True) and self.receipt is not None:
            os.makedirs(save_directory, exist_ok=True)
            with open(os.path.join(save_directory, RECEIPT_NAME), "w", encoding="utf-8") as file:
                json.dump(self.receipt, file, indent=2)
                file.write("\n")
        hub_arguments = ("commit_message", "commit_description", "create_pr", "private", "revision", "tags")
        hub = {name: kwargs.pop(name) for name in hub_arguments if push_to_hub and name in kwargs}
        with _called_as_written(type(self)):
            super().save_pretrained(save_directory, *args, **kwargs)
        if push_to_hub and kwargs.get("is_main_process", True):
            kept = {name: kwargs[name] for name in ("token", "max_shard_size") if name in kwargs}
            self.push_to_hub(repo_id or os.path.basename(os.path.abspath(save_directory)), **hub, **kept)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """[`PreTrainedModel.from_pretrained`]; `model.receipt` is the checkpoint's, where it has one."""
        hub_arguments = ("revision", "token", "cache_dir", "subfolder", "local_files_only")
        hub: dict[str, Any] = {name: kwargs[name] for name in hub_arguments if name in kwargs}
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if pretrained_model_name_or_path is not None:
            path = cached_file(
                pretrained_model_name_or_path,
                RECEIPT_NAME,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
                **hub,
            )
            model.receipt = None if path is None else _read_receipt(path)
        return loaded

    def push_to_hub(self, repo_id: str, **kwargs):
        """
        Publish the checkpoint with its code and a model card made from the checkpoint itself.

        Args:
            repo_id (`str`): `"user/name"`.
            **kwargs: As [`PreTrainedModel.push_to_hub`] takes them.
        """
        if type(self).publisher is None:
            return super().push_to_hub(repo_id, **kwargs)  # type: ignore[arg-type]
        return type(self).publisher(self, repo_id, **kwargs)

    @classmethod
    def family_auto_map(cls) -> dict[str, str]:
        """The `auto_map` of a checkpoint: the config and every class of the family, by their Auto class."""
        config = cls.config_class
        auto_map: dict[str, str] = {"AutoConfig": f"{config.__module__.rpartition('.')[2]}.{config.__name__}"}
        for member in cls.family_classes():
            auto_map[str(member._auto_class)] = f"{member.__module__.rpartition('.')[2]}.{member.__name__}"
        return auto_map

    @classmethod
    def family_classes(cls) -> list[type[SparseMoePreTrainedModel]]:
        """The classes of this package that load this class's checkpoints; heads of a user's own are none of them."""
        base: Any = next(parent for parent in cls.__mro__ if "family_side" in vars(parent))
        return [member for member in base.__subclasses__() if member.__module__ == base.__module__]

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs):
        """Let a checkpoint of one head load into another: the body's prefix and the head's shape differ."""
        renaming = model._body_renaming(_checkpoint_keys(state_dict, checkpoint_files))
        if renaming is not None:
            load_config = replace(load_config, weight_mapping=[*(load_config.weight_mapping or []), renaming])
        info, disk_offload_index = PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args, **kwargs
        )
        name, body = type(model).__name__, model._body_prefix()
        if name not in (model.config.architectures or [name]):
            # Heads may share a name: the classifier of a sequence and that of a choice. The other one's is no error.
            foreign = {entry for entry in info.mismatched_keys if not entry[0].startswith(body)}
            info.mismatched_keys -= foreign
            info.missing_keys |= {entry[0] for entry in foreign}
        return info, disk_offload_index

    def _body_prefix(self) -> str:
        """What the keys of the headless model begin with here; it differs between heads, for some even in name."""
        prefix = self.dense.base_model_prefix
        nested = prefix != "" and isinstance(getattr(self.dense, prefix, None), nn.Module)
        return f"dense.{prefix}." if nested else "dense."

    def _body_renaming(self, checkpoint_keys: set[str]) -> WeightRenaming | None:
        here = self._body_prefix()
        body = [key.removeprefix(here) for key in self.state_dict() if key.startswith(here)]
        landmark = next((key for key in body if key.endswith("experts.down_proj")), body[0])
        there = next((key.removesuffix(landmark) for key in checkpoint_keys if key.endswith(f".{landmark}")), here)
        if there == here:
            return None
        children = "|".join(sorted({re.escape(key.partition(".")[0]) for key in body}))
        return WeightRenaming(rf"^{re.escape(there)}(?=(?:{children})\.)", here)


def _read_receipt(path: str) -> dict[str, Any] | None:
    """The receipt of a checkpoint; None where it is a link to a file of neither its folder nor the Hub's cache."""
    home, real = os.path.realpath(os.path.dirname(path)), os.path.realpath(path)
    cache, is_snapshot, _ = home.partition(f"{os.sep}snapshots{os.sep}")
    homes = [os.path.join(home, ""), *([os.path.join(cache, "blobs", "")] if is_snapshot else [])]
    if not real.startswith(tuple(homes)):
        logger.warning(f"`{path}` is a link that leads out of its folder, and is not read.")
        return None
    try:
        with open(path, encoding="utf-8") as file:
            receipt = json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"`{path}` is not JSON. Repair it, or delete it.") from error
    if not isinstance(receipt, dict):
        raise ValueError(f"`{path}` holds a JSON {type(receipt).__name__}, not an object. Repair it, or delete it.")
    return receipt


@contextmanager
def _called_as_written(cls: type) -> Iterator[None]:
    """
    For what FSDP2 wrapped: torch makes a class of its own of it, in a module of its own, whose name would stand in
    `auto_map`, and whose code would be copied beside the weights.
    """
    name, module = cls.__name__, cls.__module__
    ours = next(base for base in cls.__mro__ if not base.__module__.startswith("torch."))
    cls.__name__, cls.__module__ = ours.__name__, ours.__module__
    try:
        yield
    finally:
        cls.__name__, cls.__module__ = name, module


def _checkpoint_keys(state_dict: dict | None, checkpoint_files: list[str] | None) -> set[str]:
    if state_dict is not None:
        return set(state_dict)
    keys: set[str] = set()
    for path in checkpoint_files or []:
        if str(path).endswith(".safetensors"):
            with safe_open(path, framework="pt") as file:
                keys.update(file.keys())
    return keys


def _wildcard(name: str) -> str:
    """As transformers looks a rule up: of two numbers in a row, the second stays."""
    return re.sub(r"\.\d+(\.|$)", r".*\1", name)
