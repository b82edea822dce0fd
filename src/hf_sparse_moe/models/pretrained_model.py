"""The common base: a dense model of transformers whose feed-forwards are experts."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from types import MethodType
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.utils import ModelOutput

from .balancing import OptimizerStep, listen_to_trainers
from .configuration_sparse_moe import SparseMoeConfig
from .losses import (
    BalanceLosses,
    at_least_one,
    balance_when_alone,
    carry_from,
    has_balance_loss,
    loss_of_step,
)
from .masks import tokens_by_side
from .moe_block import SparseMoeBlock, install_sparse_blocks
from .routers import router_probabilities
from .routing import RoutingRecord, checkpoint_with_routing
from .saving import RECEIPT_NAME as RECEIPT_NAME
from .saving import SavedMixture


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


class SparseMoePreTrainedModel(SavedMixture):
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
    compute_task_loss: Callable[..., torch.Tensor] | None = None  # see losses.py
    counted_labels: ClassVar[Callable[..., torch.Tensor]] = staticmethod(lambda labels: labels)
    labels_are_targets: ClassVar[bool] = False  # whether the labels are what a decoder writes that reads an encoder
    family_side: ClassVar[str]

    def __init__(self, config: SparseMoeConfig, **dense_arguments):
        super().__init__(config)
        config._check_fields()  # they may have been assigned to since
        if type(config.dense_config) not in self.dense_auto_class._model_mapping:
            raise ValueError(
                f"`{type(self).__name__}` needs a dense architecture with an `{self.dense_auto_class.__name__}` "
                f"head; transformers has none for `model_type={config.dense_config.model_type!r}`."
            )
        dense_arguments["dtype"] = torch.get_default_dtype()
        self.dense = self.dense_auto_class.from_config(config.dense_config, **dense_arguments)
        config.dense_config = self.dense.config
        config._attn_implementation_internal = self.dense.config._attn_implementation
        install_sparse_blocks(self.dense, config, self.family_side)
        for trait in _DENSE_TRAITS:
            setattr(self, trait, getattr(self.dense, trait))
        self.main_input_name = self.dense.main_input_name
        if self.can_generate():
            self.generation_config = self.dense.generation_config
        self._name_inputs()
        self.optimizer_step = OptimizerStep(config)
        listen_to_trainers()
        balance_when_alone(self.base_model, self.optimizer_step)
        if config.is_encoder_decoder:
            balance_when_alone(self.dense.get_encoder(), self.optimizer_step)
        if self.compute_task_loss is not None:
            around = self.base_model is self.dense  # T5: its head has no body but two stacks
            carry_from(self.dense.get_decoder() if around else self.base_model, self.optimizer_step)
        self.post_init()
        # T5 keeps its `wo` in float32; where that became experts, the name fits nothing and transformers would say so.
        # And a selection bias is a sigmoid router's alone.
        tensors = (*self.named_parameters(), *self.named_buffers())
        parts = {part for name, _ in tensors for part in name.split(".")}
        for names in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
            setattr(self, names, parts.intersection(getattr(self, names) or ()))

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "config" and "dense" in vars(self).get("_modules", ()):  # a composite shares its own with its parts
            value.dense_config = self.dense.config
            value._experts_implementation = value._experts_implementation or self.config._experts_implementation
            self.optimizer_step.settings = value
            for block in self.sparse_blocks:
                block.config = block.experts.config = value
        super().__setattr__(name, value)

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

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *args,
        labels: torch.Tensor | None = None,
        output_router_logits: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> ModelOutput | tuple:
        """
        The dense model's forward, which takes what the dense model takes (`inspect.signature(model.forward)` names
        it). In training `loss` is the task loss plus the balance losses; in evaluation it is the task loss alone.

        Args:
            attention_mask (`torch.Tensor` of shape `(B, S)`, *optional*): 0 for pads, which never count as load.
            *args: Further inputs of the dense model, in its order.
            labels (`torch.Tensor`, *optional*): As the dense head takes them, for a causal LM not yet shifted; -100 is
                ignored. Where they are what a decoder writes, its `decoder_input_ids` are made from them.
            output_router_logits (`bool`, *optional*): Return `router_logits` and `aux_loss`.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*): Labels of the whole optimizer step, all
                micro-batches and ranks; the losses of its micro-batches then sum to the loss of the whole.
            **kwargs: Further inputs of the dense model, arguments of `model.loss_function` such as `ignore_index`, and
                `shift_labels`, which replaces `labels` where a collator has put each at the token that predicts it
                (packed and distributed sequences).
        """
        config = self.config
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        inputs |= dict(zip(self._further_inputs, args, strict=False)) | kwargs
        # Not an argument of its own: Trainer would take every argument with "label" in its name for required.
        if (shift_labels := inputs.pop("shift_labels", None)) is not None:
            labels = kwargs["shift_labels"] = shift_labels.contiguous()
        if labels is not None and self.compute_task_loss is None:
            raise ValueError(f"`labels` need a head, and `{type(self).__name__}` has none. Use a `For...` class.")
        if labels is not None and len(labels) == 0:  # attention of transformers cannot do without rows
            raise ValueError(
                "The batch holds no rows. Where a rank may have none, give it a row of pads: `attention_mask` 0, "
                "`labels` -100; it then adds nothing to loss and gradient."
            )
        written = any(inputs.get(name) is not None for name in ("decoder_input_ids", "decoder_inputs_embeds"))
        if self.labels_are_targets and labels is not None and not written:
            inputs["decoder_input_ids"] = self.prepare_decoder_input_ids_from_labels(labels)  # type: ignore[operator]
        wants_logits = config.output_router_logits if output_router_logits is None else output_router_logits
        balances = self.training and has_balance_loss(config)
        tokens = tokens_by_side(self, {**inputs, "labels": labels})
        record = RoutingRecord(tokens, keep=wants_logits or balances, owner=self.optimizer_step)
        inputs = {name: value for name, value in inputs.items() if value is not None}
        if "past_key_values" in inputs and "cache" in self._further_inputs:  # its name from transformers 5.24 on
            inputs["cache"] = inputs.pop("past_key_values")
        counted, balance = labels, None
        if record.keep and labels is not None and shift_labels is None:
            counted = self.counted_labels(labels)

        def attach(outputs: Any) -> Any:
            nonlocal balance
            balance = balance or self._balance_losses(record, counted, num_items_in_batch)
            return outputs if balance is None else balance.attach_to(outputs)

        # The graph of a model that computes its own loss is not broken by what only other losses need.
        carries = balances and not (labels is not None and torch.compiler.is_compiling())
        record.attach = attach if carries else None
        record.open()
        try:
            outputs = self.dense(**inputs, return_dict=True)
        finally:
            record.close()
        if carries:
            outputs = attach(outputs)
        else:
            balance = self._balance_losses(record, counted, num_items_in_batch)
        fields = {name: outputs.get(name) for name in self.output_class.__dataclass_fields__}
        if labels is not None:
            further = {name: value for name, value in kwargs.items() if name not in self._further_inputs}
            fields["loss"] = self.compute_task_loss(outputs, labels, at_least_one(num_items_in_batch), **further)
        if balance is not None:
            fields["aux_loss"], fields["z_loss"] = balance.aux_loss, balance.z_loss
            if balances and labels is not None:
                fields["task_loss"] = loss_of_step(fields["loss"], counted)
                fields["loss"] = balance.add_to(fields["task_loss"])
        if wants_logits:
            fields["router_logits"] = tuple(event.routing.router_logits for event in record.events)
        result = self.output_class(**fields)
        return_dict = getattr(config, "return_dict", True) if return_dict is None else return_dict
        return result if return_dict else result.to_tuple()

    def _balance_losses(self, record: RoutingRecord, labels: Any, num_items_in_batch: Any) -> BalanceLosses | None:
        if not record.events:
            return None
        scoring_func = self.config.scoring_func
        return BalanceLosses(
            record.events,
            [router_probabilities(event.routing.router_logits, scoring_func) for event in record.events],
            self.optimizer_step,
            trains=self.training and torch.is_grad_enabled(),
            labels=labels,
            num_items_in_batch=num_items_in_batch,
        )

    def _name_inputs(self) -> None:
        """
        Have `inspect.signature(self.forward)` name what the dense model takes as well: by it Trainer keeps columns,
        `generate` accepts inputs, and others tell whether a model reads an encoder or which outputs it has.
        """
        written = inspect.signature(type(self).forward)
        own = {**written.parameters, "return_dict": None, "labels": None}
        dense = inspect.signature(self.dense.forward).parameters
        self._further_inputs = tuple(
            name for name, one in dense.items() if name not in own and one.kind is one.POSITIONAL_OR_KEYWORD
        )

        def forward(self, *args, **kwargs):
            return type(self).forward(self, *args, **kwargs)

        parameters = []
        for one in written.parameters.values():
            if one.kind is one.VAR_POSITIONAL:
                parameters += [dense[name].replace(default=None) for name in self._further_inputs]
            else:
                parameters.append(one)
        signature = written.replace(parameters=parameters, return_annotation=self.output_class)
        forward.__doc__, forward.__annotations__ = type(self).forward.__doc__, {"return": self.output_class}
        vars(forward)["__signature__"] = signature
        vars(self)["forward"] = MethodType(forward, self)

    def _replicate_for_data_parallel(self) -> Any:
        replica = super()._replicate_for_data_parallel()
        vars(replica).pop("forward", None)  # that of the model itself
        return replica

    # ---- delegation to the dense model ------------------------------------------------------------------------

    @property
    def base_model(self) -> nn.Module:
        """The dense model without its head."""
        return self.dense.base_model

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """As transformers counts it, but packed experts by their codes and scales."""
        tensors = [*self.parameters(), *(self.buffers() if return_buffers else ())]
        return sum(tensor.nbytes for tensor in tensors)

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
        """Where nobody asks, the package's `"sparse_moe"`, or transformers' own where this folder travels alone."""
        if requested_experts is None and "sparse_moe" in ALL_EXPERTS_FUNCTIONS.valid_keys():
            return "sparse_moe"
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


def _wildcard(name: str) -> str:
    """As transformers looks a rule up: of two numbers in a row, the second stays."""
    return re.sub(r"\.\d+(\.|$)", r".*\1", name)
