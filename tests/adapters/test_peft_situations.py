"""What else PEFT can do to a model goes right with adapters of experts, or is refused with a sentence."""

import copy
import logging

import pytest
import torch
import transformers as hf
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from peft.helpers import rescale_adapter_scale
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils import logging as transformers_logging
from transformers.utils.peft_utils import check_peft_version

from adapted_models import adapted, logits_of, shake, stock_mixture
from hf_sparse_moe import expand, expert_lora_config, export, import_stock, load_adapter, prune_experts, to_dense
from hf_sparse_moe.adapters.expert_layer import ExpertLora
from tiny_models import FAMILIES, tiny_inputs, tiny_sparse


WEIGHTS = "adapter_model.safetensors"


def saved(folder, model, seed=0, **choice):
    """The logits of a model whose adapter is saved in `folder`."""
    peft_model = shake(adapted(model, **choice), seed=seed)
    peft_model.save_pretrained(folder)
    return logits_of(peft_model, tiny_inputs(model, labels=False))


@pytest.mark.parametrize("choice", [{}, {"experts": {1: [0, 2]}, "projections": ("gate", "down")}], ids=str)
@pytest.mark.parametrize("name", ["decoder", "mixtral"])
def test_another_adapter_is_swapped_in(name, choice, tmp_path):
    def make():
        return stock_mixture(name) if name == "mixtral" else tiny_sparse(name)

    saved(tmp_path / "one", make(), **choice)
    wanted = saved(tmp_path / "two", make(), seed=1, lora_alpha=7, **choice)
    model = load_adapter(make(), tmp_path / "one")
    hotswap_adapter(model, str(tmp_path / "two"), adapter_name="default", torch_device="cpu")
    torch.testing.assert_close(logits_of(model, tiny_inputs(make(), labels=False)), wanted)


def test_one_of_another_rank_is_not_swapped_in(tmp_path):
    wanted = saved(tmp_path / "one", tiny_sparse("decoder"))
    saved(tmp_path / "two", tiny_sparse("decoder"), r=5)
    model = load_adapter(tiny_sparse("decoder"), tmp_path / "one")
    with pytest.raises(ValueError, match="with the rank, that it was trained for"):
        hotswap_adapter(model, str(tmp_path / "two"), adapter_name="default", torch_device="cpu")
    torch.testing.assert_close(logits_of(model, tiny_inputs(tiny_sparse("decoder"), labels=False)), wanted)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (
            lambda tensors: {**tensors, "stray.lora_A.weight": torch.zeros(2)},
            "1 of 9 tensors in the file",
        ),
        (lambda tensors: dict(list(tensors.items())[1:]), "1 of 8 tensors that it needs are not in the file"),
        (lambda tensors: {f"x.{name}": tensor for name, tensor in tensors.items()}, "8 of 8 tensors that it needs"),
    ],
    ids=["one too many", "one too few", "none"],
)
@pytest.mark.parametrize("how", ["load_adapter", "a second adapter"])
def test_a_file_that_does_not_match_is_refused_with_counts(how, edit, said, tmp_path):
    model = tiny_sparse("decoder")
    saved(tmp_path, model)
    save_file(edit(load_file(tmp_path / WEIGHTS)), tmp_path / WEIGHTS)
    peft_model = adapted(tiny_sparse("decoder"))
    load = {
        "load_adapter": lambda: load_adapter(tiny_sparse("decoder"), tmp_path),
        "a second adapter": lambda: peft_model.load_adapter(str(tmp_path), "other"),
    }[how]
    with pytest.raises(ValueError, match=said):
        load()


def test_all_linear_says_that_it_leaves_the_experts_out(caplog):
    transformers_logging.enable_propagation()
    transformers_logging.get_logger("hf_sparse_moe").warning_once.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                get_peft_model(tiny_sparse("decoder"), LoraConfig(target_modules="all-linear"))
            get_peft_model(tiny_sparse("encoder"), LoraConfig(target_modules=["q_proj", "query"]))
    finally:
        transformers_logging.disable_propagation()
    told = [record.getMessage() for record in caplog.records if "all-linear" in record.getMessage()]
    assert len(told) == 1
    assert "leaves out the 8 experts in the 2 sparse layers" in told[0]
    assert "expert_lora_config(model, attention=True)" in told[0]


TASKS = {
    "encoder": ("SEQ_CLS", AutoModelForSequenceClassification),
    "decoder": ("CAUSAL_LM", AutoModelForCausalLM),
    "encoder_decoder": ("SEQ_2_SEQ_LM", AutoModelForSeq2SeqLM),
}
PROMPTS = {
    "prompt": lambda task: PromptTuningConfig(task_type=task, num_virtual_tokens=3),
    "p": lambda task: PromptEncoderConfig(task_type=task, num_virtual_tokens=3, encoder_hidden_size=16),
    "prefix": lambda task: PrefixTuningConfig(task_type=task, num_virtual_tokens=3),
}


@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_train_before_a_mixture(family, kind, tmp_path):
    task, auto_class = TASKS[family]
    model = tiny_sparse(family, auto_class)
    assert model.config.to_dict()["hidden_size"] == model.config.hidden_size == 32
    inputs = tiny_inputs(model)
    peft_model = get_peft_model(model, PROMPTS[kind](task)).train()
    if (family, kind) == ("encoder", "prefix"):  # an encoder has no cache
        with pytest.raises(ValueError, match="does not support past key values"):
            peft_model(**inputs)
        return
    peft_model(**inputs).loss.backward()
    trained = [p for name, p in peft_model.named_parameters() if p.requires_grad and "prompt_encoder" in name]
    assert any(p.grad is not None and p.grad.any() for p in trained)
    peft_model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_sparse(family, auto_class), tmp_path)
    torch.testing.assert_close(logits_of(again, inputs), logits_of(peft_model, inputs))


HEADS = [
    ("bert", hf.AutoModelForMultipleChoice),
    ("distilbert", hf.AutoModelForSequenceClassification),
    ("llama", hf.AutoModelForTokenClassification),
    ("bart", hf.AutoModelForSequenceClassification),
    ("t5", hf.AutoModelForSequenceClassification),
    ("t5", hf.AutoModelForQuestionAnswering),
]


@pytest.mark.parametrize(("name", "auto_class"), HEADS, ids=lambda one: getattr(one, "__name__", one))
def test_a_new_head_trains_and_travels_whatever_its_name(name, auto_class, tmp_path):
    model = tiny_sparse(name, auto_class)
    body = tuple(f"dense.{part}." for part in (model.dense.base_model_prefix, "shared", "encoder", "decoder"))
    heads = {key for key, _ in model.named_parameters() if not key.startswith(body)}
    assert heads
    peft_model = adapted(model)
    trained = {
        key.removeprefix("base_model.model.").replace(".modules_to_save.default", ""): p
        for key, p in peft_model.named_parameters()
        if p.requires_grad and "lora_" not in key
    }
    assert trained.keys() == heads
    for parameter in trained.values():
        parameter.data.mul_(-1.5)
    peft_model.save_pretrained(tmp_path)
    inputs = {key: value for key, value in tiny_inputs(model).items() if key in ("input_ids", "attention_mask")}
    if auto_class is hf.AutoModelForMultipleChoice:
        inputs = {key: value[:, None] for key, value in inputs.items()}
    loaded = load_adapter(tiny_sparse(name, auto_class), tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**inputs)[0], peft_model.eval()(**inputs)[0])


def two_adapters(model, **choice):
    peft_model = adapted(model, **choice)
    peft_model.add_adapter("other", copy.deepcopy(peft_model.peft_config["default"]))
    return shake(peft_model, "other", seed=1).eval()


def test_disabling_unloading_and_rescaling_give_the_base_back():
    model = tiny_sparse("decoder")
    inputs = tiny_inputs(model, labels=False)
    base = logits_of(model, inputs)
    peft_model = two_adapters(model)
    adapted_logits = logits_of(peft_model, inputs)
    with peft_model.disable_adapter():
        assert torch.equal(logits_of(peft_model, inputs), base)
    with rescale_adapter_scale(peft_model, 0.0):
        torch.testing.assert_close(logits_of(peft_model, inputs), base)
    assert torch.equal(logits_of(peft_model, inputs), adapted_logits)
    assert torch.equal(logits_of(peft_model.unload(), inputs), base)


def test_one_of_two_is_merged_and_taken_out_again():
    model = tiny_sparse("decoder")
    inputs = tiny_inputs(model, labels=False)
    peft_model = two_adapters(model)
    peft_model.set_adapter("other")
    wanted = logits_of(peft_model, inputs)
    peft_model.merge_adapter(["other"])
    torch.testing.assert_close(logits_of(peft_model, inputs), wanted, rtol=1e-4, atol=1e-4)
    peft_model.unmerge_adapter()
    torch.testing.assert_close(logits_of(peft_model, inputs), wanted, rtol=1e-4, atol=1e-4)
    peft_model.delete_adapter("default")
    torch.testing.assert_close(logits_of(peft_model, inputs), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("choice", [{}, {"lora_dropout": 0.1, "attention": True, "shared": True}], ids=str)
def test_peft_finds_the_base_by_itself(choice, tmp_path):
    tiny_sparse("decoder").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    inputs = tiny_inputs(base, labels=False)
    wanted = saved(tmp_path / "adapter", base, **choice)
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits_of(model, inputs), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "choice", [{"router": True, "attention": True}, {"shared": True, "lora_dropout": 0.1}], ids=str
)
def test_trainer_goes_back_to_its_best_adapter(choice, tmp_path):
    """Here the one of the highest loss, which is not the last."""
    model = tiny_sparse("decoder")
    peft_model = get_peft_model(model, expert_lora_config(model, r=2, **choice))
    rows = [{name: values[0] for name, values in tiny_inputs(model).items()}] * 4
    arguments = hf.TrainingArguments(
        str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = hf.Trainer(peft_model, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses[-1] < max(losses)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(max(losses), rel=1e-5)


def test_weighted_adapters_are_refused_by_peft():
    peft_model = two_adapters(tiny_sparse("decoder"))
    with pytest.raises(ValueError, match="does not support targeting"):
        peft_model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "both", combination_type="linear")


@pytest.mark.parametrize(("cast", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_the_dtype_of_adapters_on_a_half_precision_base(cast, dtype):
    model = tiny_sparse("decoder").bfloat16()
    peft_model = get_peft_model(model, expert_lora_config(model, r=2), autocast_adapter_dtype=cast)
    assert {p.dtype for p in peft_model.parameters() if p.requires_grad} == {dtype}
    peft_model.train()(**tiny_inputs(model)).loss.backward()
    assert any(p.grad.any() for p in peft_model.parameters() if p.requires_grad)


def test_modules_trained_in_full_travel_with_the_adapter(tmp_path):
    peft_model = adapted(tiny_sparse("decoder"), modules_to_save=["lm_head"])
    for name, parameter in peft_model.named_parameters():
        if "modules_to_save" in name:
            parameter.data.mul_(1.5)
    peft_model.save_pretrained(tmp_path)
    inputs = tiny_inputs(tiny_sparse("decoder"), labels=False)
    loaded = load_adapter(tiny_sparse("decoder"), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits_of(loaded, inputs), logits_of(peft_model, inputs))


def test_transformers_own_adapter_methods(tmp_path):
    try:
        check_peft_version(min_version=MIN_PEFT_VERSION)
    except ValueError as error:  # a transformers that is newer than the newest PEFT
        pytest.skip(str(error))
    model = tiny_sparse("decoder")
    inputs = tiny_inputs(model, labels=False)
    model.add_adapter(expert_lora_config(model, r=2))
    assert any(isinstance(module, ExpertLora) for module in model.modules())
    wanted = logits_of(shake(model), inputs)
    model.save_pretrained(tmp_path)
    again = tiny_sparse("decoder")
    again.load_adapter(str(tmp_path))
    torch.testing.assert_close(logits_of(again, inputs), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda model, _: expand(model, 2), "decoder"),
        (lambda model, _: prune_experts(model, keep=2, method="random"), "decoder"),
        (lambda model, _: to_dense(model), "decoder"),
        (lambda model, folder: export(model, folder / "out"), "decoder"),
        (lambda model, _: import_stock(model), "mixtral"),
    ],
    ids=["expand", "prune_experts", "to_dense", "export", "import_stock"],
)
def test_what_reads_the_weights_of_an_adapted_base_refuses_it(call, name, tmp_path):
    """`get_base_model()` of a PEFT model still holds the adapter, under other names."""
    model = stock_mixture(name) if name == "mixtral" else tiny_sparse(name)
    base = shake(adapted(model)).get_base_model()
    with pytest.raises(ValueError, match="adapter"):
        call(base, tmp_path)
    assert not list(tmp_path.iterdir())
