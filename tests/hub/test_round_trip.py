"""
A step of training, save, push, pull, doctor, predict: what comes back is what was sent, in every form of it. The row
of an adapter is `test_push_pull_doctor` of test_adapters_on_the_hub.py.
"""

import json
from pathlib import Path

import pytest
import torch

from hf_sparse_moe.hub.health_check import REMOTE_CODE
from hub_checkpoints import SHARD, save_mixture


FAMILIES = {"encoder": "bert", "decoder": "llama", "encoder-decoder": "t5"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Family, dtype, in several files or not: each with each is too long for every run.
FORMS = [
    ("decoder", "float32", False),
    ("encoder", "bfloat16", False),
    ("encoder-decoder", "float32", True),
    pytest.param("decoder", "bfloat16", True, marks=pytest.mark.conformance),
    pytest.param("encoder", "float32", True, marks=pytest.mark.conformance),
    pytest.param("encoder-decoder", "bfloat16", False, marks=pytest.mark.conformance),
]


def examined(client, folder: Path) -> dict[str, str]:
    """What `doctor` finds; without `--trust-remote-code`, as a stranger loads it below."""
    told = client.cli("doctor", folder, "--json")
    assert told.code == 0, told
    findings = json.loads(told.out)["findings"]
    return {found["check"]: found["verdict"] for found in findings if found["check"] != REMOTE_CODE}


def use(folder: str, trust_remote_code: bool, stock: bool = False) -> dict:
    """Loads a checkpoint by its Auto class; returns its weights' digest, and what it predicts or generates."""
    import hashlib
    import json
    from pathlib import Path

    import torch
    import transformers

    if not (trust_remote_code or stock):
        import hf_sparse_moe  # noqa: F401
    config = json.loads((Path(folder) / "config.json").read_text())
    reference = {value.rpartition(".")[2]: key for key, value in config.get("auto_map", {}).items()}
    auto_class = getattr(transformers, reference.get(config["architectures"][0], "AutoModelForCausalLM"))
    model = auto_class.from_pretrained(folder, trust_remote_code=trust_remote_code).eval()
    # without the package the tokenizer asks for trust too: it reads the config first
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    inputs = tokenizer("word5 word13 word8 word21 word30", return_tensors="pt")
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        if model.can_generate():
            tokens = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        else:
            tokens = model(**inputs).logits.argmax(-1)
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return {"weights": digest.hexdigest(), "tokens": tokens.tolist(), "module": type(model).__module__}


@pytest.mark.parametrize(("family", "dtype", "sharded"), FORMS)
def test_what_comes_back_is_what_was_trained(client, stranger, hub_server, repo_id, tmp_path, family, dtype, sharded):
    size = {"max_shard_size": SHARD} if sharded else {}
    saved = save_mixture(tmp_path / "saved", FAMILIES[family], DTYPES[dtype], train=True, **size)
    assert (len(list(saved.glob("*.safetensors"))) > 1) == sharded
    assert client.cli("push", saved, repo_id).code == 0
    pulled = tmp_path / "pulled"
    assert client.cli("pull", repo_id, pulled).code == 0
    assert set(examined(client, pulled).values()) == {"passed"}
    sent = client(use, folder=str(saved), trust_remote_code=False)
    by_package = client(use, folder=str(pulled), trust_remote_code=False)
    by_own_code = stranger(use, folder=str(pulled), trust_remote_code=True)
    assert by_package == sent
    assert by_own_code["module"].startswith("transformers_modules.")
    assert by_package["module"].startswith("hf_sparse_moe.")
    for part in ("weights", "tokens"):
        assert by_own_code[part] == sent[part]
    assert json.loads((pulled / "config.json").read_text())["dtype"] == dtype


def quantise_and_push(folder: str, repo_id: str) -> None:
    from transformers import AutoModelForCausalLM

    from hf_sparse_moe import ExpertsQuantizationConfig

    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=ExpertsQuantizationConfig(bits=4))
    model.push_to_hub(repo_id)
    model.save_pretrained(folder + "-packed")


def codes_of(model_id: str, trust_remote_code: bool) -> dict[str, str]:
    """Digests of the tensors that a model is saved as."""
    import hashlib

    from transformers import AutoModelForCausalLM

    if not trust_remote_code:
        import hf_sparse_moe  # noqa: F401
    model = AutoModelForCausalLM.from_pretrained(model_id, trust_remote_code=trust_remote_code)
    state, _ = model.hf_quantizer.get_state_dict_and_metadata(model)
    return {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in state.items()}


def test_packed_experts_come_back_bit_for_bit(client, stranger, hub_server, repo_id, tmp_path):
    pytest.importorskip("bitsandbytes")
    saved = save_mixture(tmp_path / "saved", "llama")
    client(quantise_and_push, folder=str(saved), repo_id=repo_id)
    sent = client(codes_of, model_id=f"{saved}-packed", trust_remote_code=False)
    assert sum(name.endswith("experts.down_proj.absmax") for name in sent) == 2
    assert client(codes_of, model_id=repo_id, trust_remote_code=False) == sent
    assert stranger(codes_of, model_id=repo_id, trust_remote_code=True) == sent
    found = json.loads(client.cli("doctor", repo_id, "--json").out)["findings"]
    assert not [finding for finding in found if finding["verdict"] in ("failed", "warning")]


def test_doctor_takes_a_repository_and_its_revision(client, hub_server, repo_id, tmp_path):
    saved = save_mixture(tmp_path / "saved")
    client.cli("push", saved, repo_id, "--tag", "v1")
    told = client.cli("doctor", repo_id, "--revision", "v1", "--json")
    assert told.code == 0, told
    report = json.loads(told.out)
    assert report["revision"] == hub_server.hub.repos[repo_id].tags["v1"]
    assert ("outputs equal the fingerprint", "passed") in [
        (row["check"], row["verdict"]) for row in report["findings"]
    ]
    weights = hub_server.hub.repos[repo_id].resolve("v1").files["model.safetensors"]
    hub_server.hub.blob(weights.sha256).write_bytes(bytes(weights.size))
    assert client.cli("doctor", repo_id, "--revision", "v1").code == 3
    assert client.cli("doctor", "tester/never-created").code == 2


def test_a_merged_adapter_in_a_stock_architecture_comes_back(client, stranger, hub_server, repo_id, tmp_path):
    adapters = pytest.importorskip("adapted_models", reason="needs peft")
    from hf_sparse_moe.stock import export
    from tiny_models import tiny_sparse

    base = tiny_sparse("llama")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    merged = adapters.adapted(base).merge_and_unload()
    changed = [name for name, tensor in merged.state_dict().items() if not torch.equal(tensor, before[name])]
    assert any("experts" in name for name in changed)  # an adapter that did nothing would come back as well
    folder = tmp_path / "merged"
    save_mixture(folder)  # its tokenizer
    for path in (*folder.glob("*.safetensors"), *folder.glob("*.py"), folder / "config.json"):
        path.unlink()
    merged.save_pretrained(folder)
    stock = export(folder, tmp_path / "stock").path
    assert "auto_map" not in json.loads((stock / "config.json").read_text())
    assert client.cli("push", stock, repo_id).code == 0
    pulled = tmp_path / "pulled"
    assert client.cli("pull", repo_id, pulled).code == 0
    found = examined(client, pulled)
    assert found["outputs equal the fingerprint"] == found["experts differ"] == "passed"
    sent = client(use, folder=str(folder), trust_remote_code=False)
    back = stranger(use, folder=str(pulled), trust_remote_code=False, stock=True)
    assert back["module"].startswith("transformers.models.")
    assert back["tokens"] == sent["tokens"]
