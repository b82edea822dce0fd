"""Exported checkpoints compute, in stock classes and without this package, what the mixture computes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification

from hf_sparse_moe import upcycle
from hf_sparse_moe.stock import EXPORT_TARGETS, explain_export, export
from tiny_models import tiny_inputs, tiny_sparse
from without_sibling import WITHOUT_SIBLING


TOLERANCE = 1e-5  # of the largest logit, in float32
WORKER = Path(__file__).with_name("stock_worker.py")


@pytest.fixture(scope="session")
def stock_results(tmp_path_factory, mixture, variants, all_pairs):
    """Of every pair and variant: our logits, and those of its export in one process that cannot import the package."""
    home = tmp_path_factory.mktemp("export")
    jobs, expected = {}, {}
    for target, dense, scoring in all_pairs:
        for variant, fields in variants.items():
            model = mixture(dense, **fields(target, scoring))
            key = (target.model_type, dense, scoring, variant)
            ours, stock = home / "ours", home / "-".join(key)
            model.save_pretrained(ours)
            export(ours, stock, architecture=target.model_type, max_shard_size="100KB")  # about 100 KB: several shards
            inputs = tiny_inputs(model, labels=False, pads=2)
            jobs[str(stock)] = {name: value.tolist() for name, value in inputs.items()}
            with torch.no_grad():
                expected[key] = (str(stock), model(**inputs).logits, inputs["attention_mask"])
    (home / "jobs.json").write_text(json.dumps(jobs))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(
        [sys.executable, WORKER, home / "jobs.json", home / "results.pt"], check=True, env=environment, cwd=home
    )
    return expected, torch.load(home / "results.pt")


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["plain", "rich"])
def test_stock_logits_are_ours(stock_results, variant, pair_target, pair_dense, pair_scoring):
    expected, results = stock_results
    folder, logits, mask = expected[pair_target.model_type, pair_dense, pair_scoring, variant]
    result = results[folder]
    assert result["model_type"] == pair_target.model_type
    assert not result["problems"]
    kept = mask.bool() if logits.shape[1] == mask.shape[1] else slice(None)  # a decoder's logits have no pads
    assert logits[kept].std() > 0.05  # else the comparison would say little
    difference = (result["logits"][kept] - logits[kept]).abs().max()
    assert difference <= TOLERANCE * logits[kept].abs().max()


def test_weights_are_sharded_in_the_names_of_the_hub(tmp_path, mixture):
    export(mixture("llama"), tmp_path / "stock", max_shard_size="100KB")
    index = json.loads((tmp_path / "stock" / "model.safetensors.index.json").read_text())
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in index["weight_map"]
    stored = {}
    for name in set(index["weight_map"].values()):
        shard = load_file(tmp_path / "stock" / name)
        assert all(index["weight_map"][key] == name for key in shard)
        stored |= shard
    assert stored.keys() == index["weight_map"].keys()
    assert sum(tensor.numel() * tensor.element_size() for tensor in stored.values()) == index["metadata"]["total_size"]


def test_a_model_and_its_folder_give_the_same_bytes(tmp_path, mixture):
    model = mixture("qwen3", num_experts=3)
    model.save_pretrained(tmp_path / "ours")
    export(model, tmp_path / "from_model")
    export(tmp_path / "ours", tmp_path / "from_folder")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "from_model" / name).read_bytes() == (tmp_path / "from_folder" / name).read_bytes()


def test_dtype_comes_along(tmp_path, mixture):
    model = mixture("qwen2", num_shared_experts=1).to(torch.bfloat16)
    export(model, tmp_path / "stock")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    assert {parameter.dtype for parameter in stock.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(("dense", "chosen"), [("llama", "mixtral"), ("t5", "switch_transformers")])
def test_the_coefficients_of_the_losses_come_along(tmp_path, mixture, dense, chosen):
    losses = {"router_aux_loss_coef": 0.0625, "router_z_loss_coef": 0.125}
    more = {"num_experts_per_tok": 1, "norm_topk_prob": False} if dense == "t5" else {}
    export(mixture(dense, **losses, **more), tmp_path / "stock")
    config = AutoConfig.from_pretrained(tmp_path / "stock")
    assert config.model_type == chosen
    for name, value in losses.items():
        assert getattr(config, name, value) == value
    assert config.router_aux_loss_coef == 0.0625


@pytest.mark.parametrize(
    ("dense", "target", "older"),
    [
        ("llama", "mixtral", {"rope_theta": 5000.0, "rope_scaling": {"factor": 2.0, "rope_type": "linear"}}),
        ("qwen3", "qwen3_moe", {"rope_theta": 10000.0, "rope_scaling": None, "num_experts": 4}),
        ("glm4_moe", "glm4_moe", {"partial_rotary_factor": 0.5, "n_routed_experts": 4}),
    ],
)
def test_the_config_holds_the_names_that_older_readers_know(tmp_path, mixture, dense, target, older):
    """With them transformers 4.57 computes the same logits; without, it takes its defaults in silence."""
    model = mixture(dense, **({"scoring_func": "sigmoid"} if target == "glm4_moe" else {}))
    export(model, tmp_path / "stock", target)
    fields = json.loads((tmp_path / "stock" / "config.json").read_text())
    assert fields.items() >= {**older, "torch_dtype": "float32"}.items()
    config = AutoConfig.from_pretrained(tmp_path / "stock")
    assert config.rope_parameters == fields["rope_parameters"]
    assert config.num_local_experts == 4


def test_companions_come_along(tmp_path, mixture):
    dense = mixture("qwen3").dense.config
    model = upcycle(AutoModelForCausalLM.from_config(dense), num_experts=4)
    model.generation_config.update(do_sample=True, top_k=7)
    model.save_pretrained(tmp_path / "ours")
    (tmp_path / "ours" / "tokenizer.json").write_text("{}")
    (tmp_path / "ours" / "LICENSE").write_text("Apache-2.0")
    export(str(tmp_path / "ours"), tmp_path / "stock")
    names = {path.name for path in (tmp_path / "stock").iterdir()}
    assert {"tokenizer.json", "LICENSE", "generation_config.json", "config.json", "receipt.json"} <= names
    assert not any(name.endswith(".py") for name in names)  # stock code needs none of ours
    assert json.loads((tmp_path / "stock" / "generation_config.json").read_text())["top_k"] == 7
    receipt = json.loads((tmp_path / "stock" / "receipt.json").read_text())
    assert receipt["arguments"] == model.receipt["arguments"]
    assert receipt["export"]["target"] == "qwen3_moe"
    assert "auto_map" not in json.loads((tmp_path / "stock" / "config.json").read_text())


@pytest.mark.parametrize(
    ("dense", "fields", "chosen"),
    [
        ("llama", {}, "mixtral"),
        ("llama", {"norm_topk_prob": False}, "qwen2_moe"),
        ("llama", {"num_shared_experts": 1}, "qwen2_moe"),
        ("llama", {"scoring_func": "sigmoid"}, "glm4_moe"),
        ("qwen3", {}, "qwen3_moe"),
        ("granite", {"num_shared_experts": 1}, "granitemoeshared"),
    ],
)
def test_auto_takes_the_first_that_fits(tmp_path, mixture, dense, fields, chosen):
    export(mixture(dense, **fields), tmp_path / "stock")
    assert AutoConfig.from_pretrained(tmp_path / "stock").model_type == chosen


@pytest.mark.parametrize(
    ("name", "dense_fields", "fields", "target", "obstacle"),
    [
        ("llama", {}, {"scoring_func": "sigmoid"}, "mixtral", "`scoring_func='sigmoid'`: mixtral has softmax"),
        ("llama", {}, {"norm_topk_prob": False}, "mixtral", "`norm_topk_prob=False`: mixtral always has True"),
        ("llama", {}, {"routed_scaling_factor": 2.0}, "mixtral", "`routed_scaling_factor=2.0`"),
        ("llama", {}, {"num_shared_experts": 1}, "mixtral", "mixtral has no shared experts"),
        ("llama", {}, {"mlp_layer_types": ["dense", "sparse"]}, "mixtral", "the choice of sparse layers"),
        (
            "llama",
            {},
            {"mlp_layer_types": ["sparse", "dense"], "scoring_func": "sigmoid"},
            "glm4_moe",
            "the choice of",
        ),
        ("llama", {"attention_bias": True}, {}, "mixtral", "`attention_bias=True`: mixtral has no such field"),
        ("llama", {"mlp_bias": True}, {}, "mixtral", "biased experts"),
        ("llama", {"attention_bias": True}, {}, "qwen2_moe", "`attention_bias=True`"),
        ("llama", {"attention_bias": True}, {"scoring_func": "sigmoid"}, "glm4_moe", "self_attn.k_proj.bias"),
        ("mistral", {}, {}, "qwen3_moe", "it is the sparse sibling of qwen3, not of mistral"),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 1}, {}, "qwen3_moe", "full attention in every"),
        ("qwen3", {}, {"num_experts": 1, "num_experts_per_tok": 1, "scoring_func": "sigmoid"}, "dots1", "at least 2"),
        ("t5", {}, {"norm_topk_prob": False}, "switch_transformers", "`num_experts_per_tok=2`"),
        ("t5_gated", {}, {"num_experts_per_tok": 1, "norm_topk_prob": False}, "switch_transformers", "gated (gate"),
        ("gpt2", {}, {}, "mixtral", "not of gpt2"),
        ("bert", {}, {}, "mixtral", "not of bert"),
    ],
)
def test_explain_names_what_stands_in_the_way(name, dense_fields, fields, target, obstacle):
    report = explain_export(tiny_sparse(name, dense_fields=dense_fields, **fields).config)
    assert target not in report.possible
    assert any(obstacle in found for found in report[target].obstacles), report[target].obstacles
    assert f"{target}: " in str(report)


def test_explain_says_what_is_possible(tmp_path, mixture):
    model = mixture("qwen3")
    model.save_pretrained(tmp_path)
    assert explain_export(model).possible == explain_export(tmp_path).possible == ["qwen3_moe", "mellum"]


def test_only_language_models_are_exported(tmp_path):
    model = tiny_sparse("llama", AutoModelForTokenClassification)
    with pytest.raises(ValueError, match="`SparseMoeDecoderForTokenClassification` is not a language model"):
        export(model, tmp_path / "stock")


def test_a_target_that_does_not_fit_writes_nothing(tmp_path, mixture):
    with pytest.raises(ValueError, match="mixtral always has True"):
        export(mixture("llama", norm_topk_prob=False), tmp_path / "stock", architecture="mixtral")
    with pytest.raises(ValueError, match=r"must be 'auto' or one of \['mixtral'"):
        export(mixture("llama"), tmp_path / "stock", architecture="mixtrall")
    with pytest.raises(ValueError, match="No stock architecture is the sparse sibling of gpt2"):
        export(tiny_sparse("gpt2"), tmp_path / "stock")
    assert not list(tmp_path.iterdir())


def test_an_incomplete_checkpoint_leaves_nothing_behind(tmp_path, mixture):
    mixture("llama").save_pretrained(tmp_path / "ours")
    weights = load_file(tmp_path / "ours" / "model.safetensors")
    del weights["dense.model.layers.3.mlp.experts.down_proj"]
    save_file(weights, tmp_path / "ours" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks `dense.model.layers.3.mlp.experts.down_proj`"):
        export(tmp_path / "ours", tmp_path / "stock")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_an_older_set_of_shards_is_not_read(tmp_path, mixture):
    model = mixture("llama")
    model.save_pretrained(tmp_path / "ours", max_shard_size="50KB")
    export(tmp_path / "ours", tmp_path / "first")
    old = next(path for path in (tmp_path / "ours").glob("model-*.safetensors"))
    save_file({name: tensor + 1 for name, tensor in load_file(old).items()}, old, metadata={"format": "pt"})
    save_file(
        {name: tensor.clone() for name, tensor in model.state_dict().items()}, tmp_path / "ours" / "model.safetensors"
    )
    export(tmp_path / "ours", tmp_path / "second")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_every_mixture_architecture_is_decided():
    """A new transformers brings new mixtures: each gets a row, or a reason why it has none."""
    models = Path(transformers.__file__).parent / "models"
    found = set()
    for path in models.glob("*/modeling_*.py"):
        source = path.read_text(encoding="utf-8")
        if any(
            mark in source for mark in ("@use_experts_implementation", "TopKRouter(", "Top1Router(", "Top2Router(")
        ):
            found.add(path.parent.name)
    decided = {row.model_type.removesuffix("_text") for row in EXPORT_TARGETS} | set(WITHOUT_SIBLING)
    assert found - decided == set()
    assert decided - {path.name for path in models.iterdir()} == set()


def test_reports_are_plain_json(tmp_path, mixture):
    model = mixture("qwen3")
    report = export(model, tmp_path / "stock", "qwen3_moe")
    assert report.to_dict() == {"path": str(tmp_path / "stock"), "architecture": "qwen3_moe"}
    explained = explain_export(model).to_dict()
    assert explained["possible"] == ["qwen3_moe", "mellum"]
    assert explained["obstacles"]["mixtral"] == list(explain_export(model)["mixtral"].obstacles)
    json.dumps(explained)
    for unknown in ("unknown", "phimoe"):  # transformers has the second, and no row does
        with pytest.raises(KeyError, match=rf"No mixture is written as `{unknown}`. Choose one of \['qwen3_moe', "):
            explain_export(model)[unknown]


def test_the_old_name_of_architecture_still_works(tmp_path, mixture):
    with pytest.warns(FutureWarning, match="is now `architecture`"):
        assert export(mixture("qwen3"), tmp_path / "stock", target="mellum").architecture == "mellum"
