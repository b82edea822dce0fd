"""Stock mixtures read into this package's classes compute what they computed."""

import sys

import pytest
import torch
import transformers as hf
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from hf_sparse_moe import SparseMoeDecoderForCausalLM, SparseMoeEncoderDecoderForConditionalGeneration
from hf_sparse_moe.checkpoints.config import read_config
from hf_sparse_moe.checkpoints.files import read_json
from hf_sparse_moe.checkpoints.source import find_source
from hf_sparse_moe.stock import ImportReport, export, import_stock
from hf_sparse_moe.stock.streamed import StockTensors
from hf_sparse_moe.stock.tensors import stored_tensors
from processes import in_processes
from tiny_models import ARCHITECTURES, enlarge_weights, tiny_inputs


_SIZES = ARCHITECTURES["llama"].fields
_T5 = {name: value for name, value in ARCHITECTURES["t5"].fields.items() if name != "num_layers"}
STOCK = {
    "mixtral": (hf.MixtralConfig, {**_SIZES, "num_local_experts": 4, "head_dim": 16, "sliding_window": 3}),
    "qwen3_moe": (
        hf.Qwen3MoeConfig,
        {**_SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": [0]},
    ),
    "olmoe": (hf.OlmoeConfig, {**_SIZES, "num_experts": 4, "num_experts_per_tok": 2}),
    "switch_transformers": (
        hf.SwitchTransformersConfig,
        {
            **_T5,
            "num_layers": 4,
            "num_decoder_layers": 2,
            "num_sparse_encoder_layers": 2,
            "num_sparse_decoder_layers": 2,
        }
        | {"num_experts": 4},
    ),
}


def stock_model(name: str, **changes) -> hf.PreTrainedModel:
    config_class, fields = STOCK[name]
    auto_class = AutoModelForSeq2SeqLM if name == "switch_transformers" else AutoModelForCausalLM
    return enlarge_weights(auto_class.from_config(config_class(**{**fields, **changes}))).eval()


@torch.no_grad()
def logits(model: hf.PreTrainedModel) -> torch.Tensor:
    return model(**tiny_inputs(model, labels=False)).logits


@pytest.mark.parametrize("name", STOCK)
def test_logits_are_the_stock_models(tmp_path, name):
    stock = stock_model(name)
    stock.save_pretrained(tmp_path / "stock")
    sparse = import_stock(tmp_path / "stock")
    assert logits(stock).std() > 0.05
    torch.testing.assert_close(logits(sparse), logits(stock), rtol=1e-5, atol=1e-5)
    assert sparse.receipt["equality"]["max_abs_difference"] < 1e-4
    assert sparse.receipt["source"]["model_type"] == name
    assert "config.json" in sparse.receipt["source"]["sha256"]
    expected = SparseMoeDecoderForCausalLM
    if name == "switch_transformers":
        expected = SparseMoeEncoderDecoderForConditionalGeneration
    assert type(sparse) is expected

    sparse.save_pretrained(tmp_path / "ours")
    reloaded = type(sparse).from_pretrained(tmp_path / "ours").eval()
    torch.testing.assert_close(logits(reloaded), logits(stock), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", ["plain", "rich"])
def test_there_and_back_keeps_every_weight(
    tmp_path, mixture, variants, variant, pair_target, pair_dense, pair_scoring
):
    model = mixture(pair_dense, **variants[variant](pair_target, pair_scoring))
    export(model, tmp_path / "stock", architecture=pair_target.model_type)
    back = import_stock(tmp_path / "stock")
    for field in ("num_experts", "num_experts_per_tok", "num_shared_experts", "shared_expert_gate", "scoring_func"):
        assert getattr(back.config, field) == getattr(model.config, field)
    expected, found = model.state_dict(), back.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    source = find_source(tmp_path / "stock")
    streamed = StockTensors(source, read_config(source))
    assert streamed.sparse.config.to_dict() == back.config.to_dict()
    assert streamed.sparse.state_dict().keys() == found.keys()
    for name in stored_tensors(streamed.sparse):
        assert torch.equal(streamed.reader()(name), found[name]), name


def test_the_stock_model_is_left_as_it_is():
    stock = stock_model("mixtral")
    before = logits(stock)
    sparse = import_stock(stock, router_aux_loss_coef=0.5)
    assert sparse.config.router_aux_loss_coef == 0.5
    with torch.no_grad():
        for parameter in sparse.parameters():
            parameter.zero_()
    assert torch.equal(logits(stock), before)


def test_it_trains():
    sparse = import_stock(stock_model("olmoe")).train()
    output = sparse(**tiny_inputs(sparse))
    output.loss.backward()
    assert output.aux_loss >= 1 - 1e-4
    assert all(block.gate.weight.grad.any() for block in sparse.sparse_blocks)


def test_clipped_attention_is_read():
    stock = stock_model("olmoe", clip_qkv=0.5)
    torch.testing.assert_close(logits(import_stock(stock)), logits(stock), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(stock), logits(stock_model("olmoe")), atol=0.1)


_ROUTED = {**_SIZES, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (hf.PhimoeConfig(**_SIZES, num_local_experts=4), "`phimoe` cannot be read. Pass one of"),
        (ARCHITECTURES["llama"].config(), "`llama` cannot be read. Pass one of"),
        (
            hf.Qwen2MoeConfig(**_ROUTED, num_experts=4, shared_expert_intermediate_size=20),
            "not a multiple of a routed",
        ),
        (hf.DeepseekV2Config(**_ROUTED, n_routed_experts=4, topk_method="noaux_tc"), "`topk_method='noaux_tc'`"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_what_has_no_place_is_refused_by_name(config, message):
    stock = enlarge_weights(AutoModelForCausalLM.from_config(config))
    with pytest.raises(ValueError, match=message):
        import_stock(stock)


def test_a_trained_selection_bias_of_a_softmax_router_is_refused():
    stock = AutoModelForCausalLM.from_config(hf.Ernie4_5_MoeConfig(**_ROUTED, moe_num_experts=4, moe_k=2))
    biases = [each for name, each in stock.state_dict().items() if name.endswith("e_score_correction_bias")]
    for bias in biases:
        bias.fill_(0.1)
    with pytest.raises(
        ValueError, match=r"selection bias \(`mlp.gate.moe_statics.e_score_correction_bias`\) .* trained"
    ):
        import_stock(stock)


def test_only_language_models_are_read():
    config_class, fields = STOCK["qwen3_moe"]
    stock = hf.AutoModelForTokenClassification.from_config(config_class(**fields))
    with pytest.raises(ValueError, match="Pass a `Qwen3MoeForCausalLM`"):
        import_stock(stock)


def test_output_is_a_folder_that_any_process_loads(tmp_path):
    """OLMoE has no dense sibling in transformers: ours is registered when the config is read, not with `stock`."""
    stock_model("olmoe").save_pretrained(tmp_path / "stock")
    report = import_stock(tmp_path / "stock", tmp_path / "ours", router_aux_loss_coef=0.5)
    assert isinstance(report, ImportReport)
    assert report.to_dict() == {
        "path": str(tmp_path / "ours"),
        "class": "SparseMoeDecoderForCausalLM",
        "receipt": read_json(tmp_path / "ours" / "receipt.json"),
    }
    assert in_processes(1, load_alone, tmp_path / "ours") == [0]


def load_alone(folder):
    """To run in a process of its own, from which what others registered is gone."""
    import transformers.models.auto.auto_factory  # noqa: F401

    import hf_sparse_moe  # noqa: F401

    for registered in (hf.CONFIG_MAPPING, AutoModelForCausalLM._model_mapping):
        registered._extra_content = {
            key: value for key, value in registered._extra_content.items() if "olmoe" not in str(key).lower()
        }
    for name in [
        name for name in sys.modules if name.startswith(("hf_sparse_moe.stock", "hf_sparse_moe.models.dense"))
    ]:
        del sys.modules[name]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert "hf_sparse_moe.stock" not in sys.modules
    assert model.config.router_aux_loss_coef == 0.5
    assert logits(model).isfinite().all()


def test_a_stock_model_with_an_adapter_is_refused():
    peft = pytest.importorskip("peft")
    stock = stock_model("mixtral")
    peft.get_peft_model(stock, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="merge_and_unload"):
        import_stock(stock)


def test_generation_settings_are_a_copy():
    stock = stock_model("mixtral")
    sparse = import_stock(stock)
    sparse.generation_config.max_new_tokens = 3
    assert stock.generation_config.max_new_tokens != 3
