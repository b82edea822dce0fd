"""What each inference server computes as the mixture does, and what stands in the way."""

import json
from functools import wraps
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
from transformers.cli.serve import Serve
from transformers.cli.serving import model_manager
from transformers.cli.serving.model_manager import ModelManager
from transformers.generation.continuous_batching.cache import PagedAttentionMemoryHandler
from typer.testing import CliRunner

from hf_sparse_moe import explain_serving, export
from hf_sparse_moe.cli import app
from hf_sparse_moe.stock import EXPORT_TARGETS
from hf_sparse_moe.stock.servers import SERVERS
from tiny_models import tiny_sparse


def test_every_architecture_that_a_server_reads_is_one_that_export_writes():
    assert set().union(*SERVERS.values()) <= {row.model_type for row in EXPORT_TARGETS}


@pytest.mark.parametrize(
    ("dense", "fields", "chosen"),
    [
        ("llama", {}, {"vllm": "mixtral", "sglang": "mixtral", "llama.cpp": "mixtral"}),
        ("qwen3", {}, {"vllm": "qwen3_moe", "sglang": "qwen3_moe", "llama.cpp": "qwen3_moe"}),
        ("qwen3", {"norm_topk_prob": False}, {"vllm": "qwen3_moe", "sglang": "qwen3_moe"}),
        ("qwen2", {"num_shared_experts": 1, "shared_expert_gate": True}, {"vllm": "qwen2_moe", "sglang": "qwen2_moe"}),
        ("granite", {"num_shared_experts": 1}, {"vllm": "granitemoeshared"}),
        ("youtu", {"scoring_func": "sigmoid"}, dict.fromkeys(("vllm", "sglang", "tgi"), "deepseek_v3")),
        ("t5", {"num_experts_per_tok": 1, "norm_topk_prob": False}, {}),
    ],
)
def test_each_server_gets_an_architecture_that_it_reads(mixture, dense, fields, chosen):
    report = explain_serving(mixture(dense, **fields))
    assert {server: report[server].config.model_type for server in report.possible} == chosen
    assert report.to_dict()["possible"] == list(chosen)


@pytest.mark.parametrize(
    ("name", "dense_fields", "fields", "server", "obstacle"),
    [
        ("llama", {"hidden_act": "gelu"}, {}, "vllm", "`hidden_act='gelu'`: vllm's experts compute SiLU"),
        ("llama", {"head_dim": 16}, {}, "tgi", "`head_dim=16`: tgi takes `hidden_size / num_attention_heads`"),
        ("llama", {"head_dim": 16}, {"norm_topk_prob": False}, "sglang", "qwen2_moe: `head_dim=16`: sglang takes"),
        ("mistral", {"sliding_window": 8}, {}, "llama.cpp", "`sliding_window=8`: llama.cpp attends to everything"),
        ("qwen3", {}, {"norm_topk_prob": False}, "llama.cpp", "llama.cpp always divides the weights"),
        ("qwen3", {}, {"mlp_layer_types": ["dense", "sparse"]}, "llama.cpp", "dense layers"),
        ("qwen3", {"attention_bias": True}, {}, "llama.cpp", "`attention_bias=True`"),
        ("qwen2", {}, {"num_shared_experts": 1}, "llama.cpp", "it reads no qwen2_moe"),
        ("gpt2", {}, {}, "vllm", "transformers has no sparse sibling of gpt2"),
        ("gpt2", {}, {}, "vllm", "fused experts would compute SiLU without biases"),
    ],
)
def test_what_stands_in_the_way_is_named(tmp_path, name, dense_fields, fields, server, obstacle):
    model = tiny_sparse(name, dense_fields=dense_fields, **fields)
    report = explain_serving(model.config)
    assert server not in report.possible
    assert obstacle in "; ".join(report[server].obstacles)
    assert obstacle in str(report)
    with pytest.raises(ValueError, match=f"mixture cannot be written for {server}: "):
        export(model, tmp_path / "stock", server=server)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("rope", "reads"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, True),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 16.0}, False),
        ({"rope_type": "dynamic", "factor": 4.0}, False),
    ],
)
def test_rotary_embeddings_that_gguf_holds(rope, reads):
    model = tiny_sparse("qwen3", dense_fields={"rope_parameters": {"rope_theta": 10000.0, **rope}})
    assert ("llama.cpp" in explain_serving(model).possible) is reads


def test_block_sizes_are_told():
    notes = explain_serving(tiny_sparse("qwen3", moe_intermediate_size=96).config)["llama.cpp"].notes
    assert any("`moe_intermediate_size=96` is not a multiple of 256, as K-quants" in note for note in notes)
    assert not any("moe_intermediate_size=96` is not a multiple of 32" in note for note in notes)


def test_the_command_writes_what_the_server_reads(tmp_path, mixture):
    mixture("llama", norm_topk_prob=False).save_pretrained(tmp_path / "ours")
    run = CliRunner().invoke(app, ["export", str(tmp_path / "ours"), str(tmp_path / "stock"), "--for", "tgi"])
    assert run.exit_code == 1
    assert "cannot be written for tgi: mixtral: `norm_topk_prob=False`: mixtral always has True" in str(run.exception)
    mixture("youtu", scoring_func="sigmoid").save_pretrained(tmp_path / "other")
    run = CliRunner().invoke(
        app, ["export", str(tmp_path / "other"), str(tmp_path / "stock"), "--for", "tgi", "--json"]
    )
    assert json.loads(run.stdout)["architecture"] == AutoConfig.from_pretrained(tmp_path / "stock").model_type
    with pytest.raises(ValueError, match="`server='ollama'` is not allowed: it must be None or one of"):
        export(tmp_path / "ours", tmp_path / "none", server="ollama")


def test_transformers_serve_loads_exports_and_our_serve_mixtures(tmp_path, mixture, monkeypatch):
    """
    What `transformers serve` does with a request's model. It looks the class up in transformers' own namespace, so
    that no remote code is ever found there: when that changes, `hf-sparse-moe serve` can go.
    """
    model = mixture("qwen3")
    model.save_pretrained(tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "stock")
    manager = ModelManager(device="cpu", trust_remote_code=True, model_timeout=-1)
    input_ids = torch.randint(4, 90, (1, 8))
    served = manager._load_model(f"{tmp_path / 'stock'}@main")
    torch.testing.assert_close(served(input_ids).logits, model(input_ids).logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(AttributeError, match="module transformers has no attribute SparseMoeDecoderForCausalLM"):
        manager._load_model(f"{tmp_path / 'ours'}@main")

    namespace = SimpleNamespace(**vars(model_manager.transformers))
    monkeypatch.setattr(model_manager, "transformers", namespace)
    calls = []
    start = wraps(Serve.__init__)(lambda self, **options: calls.append(options))  # the options are read from it
    monkeypatch.setattr(Serve, "__init__", start)
    arguments = ["serve", str(tmp_path / "ours"), "--device", "cpu", "--port", "8123"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert calls[0]["force_model"] == arguments[1]
    assert calls[0]["port"] == 8123
    again = ModelManager(device="cpu", model_timeout=-1)._load_model(f"{tmp_path / 'ours'}@main")
    assert torch.equal(again(input_ids).logits, model(input_ids).logits)


def test_continuous_batching_takes_what_it_is_given(mixture, monkeypatch):
    """By default it takes 0.6 of the machine's memory, for a mixture as for its dense twin."""
    planned = []
    footprint = PagedAttentionMemoryHandler.compute_memory_footprint

    def note(self, *sizes):
        planned.append(footprint(self, *sizes))
        return planned[-1]

    monkeypatch.setattr(PagedAttentionMemoryHandler, "compute_memory_footprint", note)
    model = mixture("qwen3")
    settings = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=95, pad_token_id=0)
    bounded = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)
    prompts = [[5, 6, 7], list(range(10, 22))]
    results = model.generate_batch(prompts, settings, continuous_batching_config=bounded, progress_bar=False)
    expected = [model.generate(torch.tensor([prompt]), settings)[0, len(prompt) :].tolist() for prompt in prompts]
    assert sorted(result.generated_tokens for result in results.values()) == sorted(expected)
    dense = AutoModelForCausalLM.from_config(model.config.dense_config).eval()
    dense.generate_batch(prompts, settings, continuous_batching_config=bounded, progress_bar=False)
    assert planned[0] == planned[1] < 50e6
