"""What we lean on in transformers beyond its documented API, each pinned by name.

An upstream change fails here and says what breaks, before it breaks in a person's run.
"""

import inspect

import pytest
import torch
from torch import nn
from torch.distributed import distributed_c10d
from torch.distributed.checkpoint import _hf_utils
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import (
    GenerationMixin,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    conversion_mapping,
    core_model_loading,
    modeling_layers,
    trainer_utils,
)
from transformers import initialization as init
from transformers.core_model_loading import WeightRenaming
from transformers.distributed import checkpoint as distributed_checkpoint
from transformers.dynamic_module_utils import custom_object_save, get_relative_imports
from transformers.integrations import moe
from transformers.loss import loss_utils
from transformers.modeling_utils import LoadStateDictConfig
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D
from transformers.utils.output_capturing import CompileableContextVar


TINY_MIXTRAL = {
    "vocab_size": 16,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 2,
}


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize("backend", ["batched_mm", "grouped_mm"])
def test_experts_backends_are_functions_of_module_tokens_index_and_weights(backend):
    """Else `SparseMoeExperts` is called by a backend in a way it does not know, or runs `eager` only."""
    function = moe.ALL_EXPERTS_FUNCTIONS[backend]
    assert parameters(function)[:4] == ["self", "hidden_states", "top_k_index", "top_k_weights"]


def test_experts_decorator_says_gate_bias_and_layout():
    """Else plain and biased experts (GPT-2, BERT) are computed as if they were gated and without bias."""
    assert {"has_gate", "has_bias"} <= set(parameters(moe.use_experts_implementation))

    @moe.use_experts_implementation(has_gate=False, has_bias=True)
    class Experts(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.config = config

        def forward(self, hidden_states, top_k_index, top_k_weights):
            return hidden_states

    experts = Experts(MixtralConfig(experts_implementation="eager"))
    assert (experts.has_gate, experts.has_bias, experts.is_transposed) == (False, True, False)


@pytest.mark.parametrize(
    "attribute",
    ["num_experts", "gate_up_proj", "up_proj", "down_proj", "_apply_gate", "act_fn", "has_gate", "has_bias"],
)
def test_experts_backends_read_these_attributes(attribute):
    """Else a backend looks for our parameters under another name."""
    assert f"self.{attribute}" in inspect.getsource(moe)


def test_support_of_experts_backends_is_read_from_the_source_of_the_class():
    """`SparseMoePreTrainedModel` overrides this, since its decorator stands in another file; else `eager` for all."""
    assert "@use_experts_implementation" in inspect.getsource(PreTrainedModel._can_set_experts_implementation)


def test_context_variable_takes_set_get_and_reset():
    """Else the routing record, and with it the balance loss, is lost, or `torch.compile(fullgraph=True)` breaks."""
    variable = CompileableContextVar("contract")
    assert variable.get() is None
    token = variable.set("record")
    assert variable.get() == "record"
    variable.reset(token)
    assert variable.get() is None

    @torch.compile(fullgraph=True, backend="eager")
    def forward(x):
        token = variable.set([])
        variable.get().append(x * 2)
        record = variable.get()
        variable.reset(token)
        return record[0]

    assert torch.equal(forward(torch.ones(2)), torch.full((2,), 2.0))


def test_initialize_weights_takes_the_module_tree_and_spares_what_a_checkpoint_filled():
    """Else experts keep the garbage of `torch.empty`, or loaded ones are drawn anew."""
    assert parameters(PreTrainedModel.initialize_weights) == ["self"]
    assert {"normal_", "zeros_", "guard_torch_init_functions"} <= set(dir(init))
    filled, fresh = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    filled._is_hf_initialized = True
    with torch.no_grad():
        init.zeros_(filled)
        init.zeros_(fresh)
    assert filled.eq(1).all()
    assert fresh.eq(0).all()


def test_checkpoint_loading_takes_model_state_files_and_config():
    """Our override renames the body's prefix there, so that one head's checkpoint loads into another."""
    assert parameters(PreTrainedModel._load_pretrained_model)[:4] == [
        "model", "state_dict", "checkpoint_files", "load_config",
    ]  # fmt: skip
    assert isinstance(inspect.getattr_static(PreTrainedModel, "_load_pretrained_model"), staticmethod)
    assert "weight_mapping" in LoadStateDictConfig.__dataclass_fields__
    assert LoadStateDictConfig.__dataclass_params__.frozen  # so the override passes on a changed copy
    assert parameters(WeightRenaming)[:2] == ["source_patterns", "target_patterns"]


def test_saving_keeps_the_keys_when_asked():
    """Else a checkpoint of ours no longer loads strictly, which is what a Trainer's resume does."""
    assert "save_original_format" in parameters(PreTrainedModel.save_pretrained)


def test_gradient_checkpointing_hands_over_its_function():
    """Else router logits inside a reentrant checkpoint carry no gradient, and the router is not balanced."""
    names = parameters(PreTrainedModel._set_gradient_checkpointing)
    assert {"enable", "gradient_checkpointing_func"} <= set(names)
    assert "value" not in names  # the old protocol, told apart by this name


def test_parallel_plans_are_made_per_model():
    """Else the plans of the dense feed-forwards, which are gone, stay, and experts are not sharded."""
    config = MixtralConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, vocab_size=9,
                           num_attention_heads=2, num_key_value_heads=2, num_local_experts=2)  # fmt: skip
    model = MixtralForCausalLM(config)
    model.init_parallel_plans()
    assert model._ep_plan["model.layers.*.mlp.experts"] == "ep_dispatch_experts"
    assert model._ep_plan["model.layers.*.mlp.experts.gate_up_proj"] == "grouped_gemm"
    assert model._tp_plan["model.layers.*.mlp.experts"] == "moe_tp_experts"
    assert model._tp_plan["model.layers.*.mlp.experts.gate_up_proj"] == "packed_colwise"


def test_remote_code_follows_from_dot_name_import_only(tmp_path):
    """Why models/ imports as it does: what is written otherwise is not copied to the Hub."""
    (tmp_path / "a.py").write_text("from .b import x\nfrom . import c\n", encoding="utf-8")
    assert get_relative_imports(tmp_path / "a.py") == ["b"]
    assert parameters(custom_object_save) == ["obj", "folder", "config"]
    assert "_auto_class" in dir(PreTrainedModel)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("ForCausalLMLoss", ["logits", "labels", "vocab_size", "num_items_in_batch"]),
        ("ForMaskedLMLoss", ["logits", "labels", "vocab_size", "num_items_in_batch"]),
        ("ForSequenceClassificationLoss", ["labels", "pooled_logits", "config"]),
        ("ForQuestionAnsweringLoss", ["start_logits", "end_logits", "start_positions", "end_positions"]),
        ("fixed_cross_entropy", ["source", "target", "num_items_in_batch"]),
    ],
)
def test_losses_take_logits_labels_and_count(name, arguments):
    """Our task losses call these with these places; a changed order is a wrong loss, not an error."""
    assert parameters(getattr(loss_utils, name))[: len(arguments)] == arguments


def test_fixed_cross_entropy_divides_by_the_count():
    """Else the loss grows with gradient accumulation."""
    logits, labels = torch.randn(6, 5), torch.tensor([0, 1, -100, 2, 3, 4])
    mean = loss_utils.fixed_cross_entropy(logits, labels)
    assert torch.allclose(loss_utils.fixed_cross_entropy(logits, labels, 10), mean * 5 / 10)


def test_a_class_named_for_conditional_generation_shifts():
    """Why our encoder-decoder sets `loss_type`: Trainer counts one label a row too few for a shifting loss."""
    assert loss_utils.LOSS_MAPPING["ForConditionalGeneration"] is loss_utils.ForCausalLMLoss
    assert loss_utils.LOSS_MAPPING["ForMaskedLM"] is loss_utils.ForMaskedLMLoss


def test_trainer_passes_the_count_to_a_forward_with_keyword_arguments():
    """The weight of the balance loss is (labels of the micro-batch / count); without it each one counts in full."""
    assert 'kwargs["num_items_in_batch"]' in inspect.getsource(Trainer.compute_loss)
    assert "model_accepts_loss_kwargs" in inspect.getsource(Trainer.training_step)
    # It multiplies by the number of processes afterwards, because DDP takes the mean of the gradients.
    assert "average_tokens_across_devices" in inspect.getsource(Trainer.compute_loss)


def test_trainer_divides_a_loss_that_took_no_count():
    """The other half of the same bargain: never both."""
    assert "current_gradient_accumulation_steps" in inspect.getsource(Trainer.training_step)


@pytest.mark.parametrize(
    "trait",
    [
        "supports_gradient_checkpointing",
        "_can_compile_fullgraph",
        "_supports_flash_attn",
        "_supports_sdpa",
        "_supports_flex_attn",
        "_supports_attention_backend",
    ],
)
def test_traits_of_a_model_class(trait):
    """We answer these for the dense model inside; a renamed one would say no for it."""
    assert hasattr(PreTrainedModel, trait)


def test_statefulness_is_a_trait_of_generation():
    """As above: a cache that cannot be rolled back must not be handed to assisted generation."""
    assert "_is_stateful" in inspect.getsource(PreTrainedModel) + inspect.getsource(GenerationMixin)


def test_conv1d_is_transposed():
    """GPT-2's weights are (in, out); upcycling turns them."""
    assert Conv1D(nf=5, nx=3).weight.shape == (3, 5)


def test_a_config_tells_its_stray_generation_parameters():
    """Our config asks the dense one; else configs of BART and its kin could not be saved."""
    assert parameters(PreTrainedConfig._get_generation_parameters) == ["self"]


@pytest.mark.parametrize(
    ("function", "first"),
    [
        (core_model_loading.rename_source_key, ["source_key", "weight_renamings", "weight_converters"]),
        (core_model_loading.dot_natural_key, ["s"]),
        (conversion_mapping.get_model_conversion_mapping, ["model"]),
        (PreTrainedModel._get_dtype_plan, ["self", "dtype"]),
        (PreTrainedModel._from_config, ["config"]),
    ],
)
def test_streaming_names_and_types_tensors_as_the_loader_does(function, first):
    """Else a streamed mixture would hold other names or dtypes than one that was loaded and saved."""
    assert parameters(function)[: len(first)] == first


def test_modules_without_tensors_are_skipped_in_custom_code():
    """`initialize_weights` makes up for it; else buffers that a model fills in its layers stay empty memory."""
    assert "is_custom_code" in inspect.getsource(PreTrainedModel._initialize_weights)


def test_a_head_knows_the_loss_that_shifts():
    """Else `fix_balance` counts a causal model's labels as Trainer does not, and the weights of a step miss 1."""
    model = MixtralForCausalLM._from_config(MixtralConfig(**TINY_MIXTRAL))
    assert loss_utils.LOSS_MAPPING[model.loss_type] is loss_utils.ForCausalLMLoss


def test_classification_heads_take_a_mean_and_take_the_count_too():
    """Else `fix_balance` weighs their task loss although transformers has begun to."""
    source = inspect.getsource(modeling_layers.GenericForSequenceClassification.forward)
    assert "num_items_in_batch" not in source
    assert "num_items_in_batch" not in inspect.getsource(modeling_layers.GenericForTokenClassification.forward)


def test_backward_pass_is_told_from_a_forward_pass():
    """Else the second pass of gradient checkpointing is taken for routing of its own."""
    seen = []
    leaf = torch.ones(1, requires_grad=True)
    leaf.register_hook(lambda gradient: seen.append(torch._C._current_graph_task_id()))
    (2 * leaf).backward()
    assert torch._C._current_graph_task_id() == -1
    assert seen[0] != -1


def test_optimizer_step_event_comes_after_the_step_and_before_the_gradients_go():
    """Else `SelectionBiasCallback` moves the bias at another time, or `global_batch` misses a new step."""
    source = inspect.getsource(Trainer._run_epoch) if hasattr(Trainer, "_run_epoch") else inspect.getsource(Trainer)
    step, event, zero = (source.index(part) for part in ("optimizer.step()", "on_optimizer_step(", ".zero_grad()"))
    assert step < event < zero


def test_trainer_asks_itself_for_the_order_of_an_evaluation():
    """Else the recipes' metrics meet validation data in the order of `group_by_length`."""
    assert parameters(Trainer._get_eval_sampler) == ["self", "eval_dataset"]
    assert "self._get_eval_sampler" in inspect.getsource(Trainer.get_eval_dataloader)


def test_grouped_linear_takes_rows_weight_offsets_bias_and_layout():
    """Else LoRA on experts has no path for CUDA and for torch.compile."""
    assert parameters(moe._grouped_linear) == ["input", "weight", "offs", "bias", "is_transposed"]


def test_peft_knows_its_wrapper_of_parameters_by_name_and_lets_it_be_replaced():
    """Else our layer for experts is not found again when a second adapter comes, or is never made."""
    from peft import LoraConfig
    from peft.tuners.lora.layer import ParamWrapper
    from peft.tuners.tuners_utils import BaseTuner

    assert '__class__.__name__ == "ParamWrapper"' in inspect.getsource(BaseTuner._inject_parameters)
    assert {"parameter_name", "config"} <= set(parameters(ParamWrapper.__init__))
    assert parameters(LoraConfig._register_custom_module) == ["self", "mapping"]


def test_peft_chooses_and_names_the_tensors_of_a_file_by_two_methods():
    """Else adapters on experts are written in our own form, and what PEFT packed is not read."""
    lora = pytest.importorskip("peft.tuners.lora")
    file = pytest.importorskip("peft.utils.save_and_load")
    for function, method in (
        (file.get_peft_model_state_dict, "_get_adapter_state_dict"),
        (file.set_peft_model_state_dict, "_remap_adapter_state_dict_for_load"),
    ):
        assert inspect.ismethod(getattr(lora.LoraModel, method))
        assert f".{method}(" in inspect.getsource(function)


def test_adapters_are_put_in_and_loaded_by_methods_that_can_be_replaced():
    """Else an adapter without a place in a mixture is passed over in silence, and PEFT refuses dropout on experts."""
    from peft.tuners.tuners_utils import BaseTuner
    from transformers.integrations.peft import PeftAdapterMixin

    assert parameters(inspect.unwrap(BaseTuner.inject_adapter))[:3] == ["self", "model", "adapter_name"]
    assert "self.inject_adapter(" in inspect.getsource(BaseTuner.__init__)
    assert inspect.ismethod(BaseTuner._remap_adapter_state_dict_for_load)
    load = inspect.unwrap(PeftAdapterMixin.load_adapter)
    assert parameters(load)[:3] == ["self", "peft_model_id", "adapter_name"]
    assert "return loading_info" in inspect.getsource(load)


def test_transformers_has_no_backend_of_our_names_and_one_plain_gate():
    """Else ours hides theirs, or `sparse_moe` takes the long way through every gate."""
    source = inspect.getsource(moe.ExpertsInterface)
    assert not [name for name in ("sparse_moe", "sparse_moe_recompute") if f'"{name}"' in source]
    assert parameters(moe._default_apply_gate) == ["self", "gate_up_out"]


def test_trainer_publishes_through_methods_that_can_be_replaced():
    """Else `add_model_card` replaces what nobody calls, and the stock card and `training_args.bin` reach the Hub."""
    source = inspect.getsource(Trainer)
    assert "self._push_from_checkpoint(" in source
    assert "self.push_to_hub(" in source
    assert parameters(Trainer._push_from_checkpoint) == ["self", "checkpoint_folder"]
    assert parameters(Trainer.save_model) == ["self", "output_dir", "_internal_call"]
    assert parameters(Trainer.push_to_hub)[1:6] == ["commit_message", "blocking", "token", "revision", "private"]


def test_a_trainer_s_evaluation_names_its_runtime():
    """Else the training record takes no evaluation for one, and cannot tell the parts of the evaluation data."""
    assert 'f"{split}_runtime"' in inspect.getsource(trainer_utils.speed_metrics)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("_get_output_dir", ["self", "trial"]),
        ("_load_best_model", ["self"]),
        ("_load_from_checkpoint", ["self", "resume_from_checkpoint", "model"]),
        ("_load_optimizer_and_scheduler", ["self", "checkpoint"]),
        ("_save", ["self", "output_dir", "state_dict"]),
        ("_save_checkpoint", ["self", "model", "trial"]),
        ("_save_optimizer_and_scheduler", ["self", "output_dir"]),
    ],
)
def test_trainer_saves_and_resumes_through_methods_that_can_be_replaced(name, arguments):
    """Else `ResumableTrainer` and `keep_checkpoints_whole` replace what nobody calls."""
    assert parameters(getattr(Trainer, name)) == arguments
    assert f"self.{name}(" in inspect.getsource(Trainer)


def test_trainer_asks_only_after_a_step_whether_it_was_the_last():
    """`keep_checkpoints_whole` skips the epoch from the end of a training; else it takes a step too many."""
    source = inspect.getsource(Trainer._inner_training_loop)
    assert source.index("self._run_epoch(") < source.index("self.control.should_training_stop")
    assert "global_step >=" not in inspect.getsource(Trainer._run_epoch)


def test_a_model_in_shards_is_loaded_and_its_optimizer_saved_by_functions_of_transformers():
    """Else expert-parallel trainings neither save nor resume."""
    assert parameters(distributed_checkpoint._load_model_checkpoint_distributed)[:2] == ["model", "checkpoint_dir"]
    for function in ("save_optimizer_distributed", "load_optimizer_distributed"):
        assert parameters(getattr(distributed_checkpoint, function)) == ["model", "optimizer", "checkpoint_dir"]
    assert "is_distributed_loading_by_transformers" in inspect.getsource(Trainer)


def test_torch_s_sharded_checkpoints_say_where_their_parts_lie():
    """Else `consolidate` and `check_same_model` cannot read what FSDP and expert parallelism write."""
    fields = _StorageInfo.__dataclass_fields__
    assert {"relative_path", "offset", "length"} <= set(fields)
    assert (_hf_utils.DCP_SHARDING_INFO_KEY, _hf_utils.SAVED_OFFSETS_KEY) == ("DCP_SHARDING_INFO", "saved_offsets")


def test_torch_s_groups_of_processes_take_another_timeout():
    """Else `--ddp_timeout` has no effect on CPUs, and a rank that hangs stops the others for 30 minutes."""
    assert parameters(distributed_c10d._set_pg_timeout) == ["timeout", "group"]
    assert isinstance(distributed_c10d._world.pg_map, dict)


def sharded_class(module: nn.Module) -> type[nn.Module]:
    distributed_c10d.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        return type(fully_shard(module, mesh=init_device_mesh("cpu", (1,))))
    finally:
        distributed_c10d.destroy_process_group()


def test_fsdp_makes_a_class_of_torch_s_own():
    """Else `save_pretrained` no longer knows it, and its name stands in `auto_map`, its code beside the weights."""
    wrapped = sharded_class(nn.Linear(2, 2))
    assert wrapped.__name__ == "FSDPLinear"
    assert wrapped.__module__.startswith("torch.")


def test_trainer_does_not_know_a_causal_model_under_fsdp():
    """Its label smoothing shifts no labels then, of a stock model as of ours: a sentence of docs/balance.md."""
    known = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    assert "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()" in inspect.getsource(Trainer.compute_loss)
    model = MixtralForCausalLM(MixtralConfig(**TINY_MIXTRAL))
    assert model._get_name() in known
    sharded_class(model)
    assert model._get_name() == "FSDPMixtralForCausalLM"
    assert model._get_name() not in known
