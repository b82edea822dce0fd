"""An adapter goes to the Hub and comes back to its base: what returns computes what was trained, and no other."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from adapted_models import logits_of
from hub_adapters import load, save_adapter, save_base
from hub_checkpoints import contents


BASE = "tester/base-of-adapters"


@pytest.fixture(scope="module")
def base(client, tmp_path_factory) -> Path:
    """A mixture, on the Hub and here."""
    folder = save_base(tmp_path_factory.mktemp("base"))
    assert client.cli("push", folder, BASE).code == 0
    return folder


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    save_adapter(tmp_path / "adapter", base)
    return tmp_path / "adapter"


def in_memory(repo_id: str, base: str, other_base: str | None = None, **choice) -> str:
    """Trains an adapter on the mixture of the Hub and pushes it from memory."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from hf_sparse_moe import expert_lora_config, push

    model = AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(model, expert_lora_config(model, r=2, **choice))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    tokens = torch.arange(5, 21).reshape(2, 8)
    model.train()(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    return push(model, repo_id, base=other_base).commit.oid


def train_and_push(repo_id: str, base: str, output: str, license: str) -> None:
    """The stock Trainer, with our card."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    from hf_sparse_moe import expert_lora_config
    from hf_sparse_moe.hub import ModelCardCallback, add_model_card

    model = AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(model, expert_lora_config(model, r=2))
    rows = [{"input_ids": list(range(5, 21)), "labels": list(range(5, 21))}] * 4
    arguments = TrainingArguments(
        output, max_steps=2, learning_rate=0.1, report_to=[], hub_model_id=repo_id, use_cpu=True, save_steps=2
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:1])
    add_model_card(trainer, ModelCardCallback(train_data="hf://datasets/me/law", license=license))
    trainer.train()
    trainer.evaluate()
    trainer.push_to_hub()


def stock_push(repo_id: str, base: str) -> None:
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from hf_sparse_moe import expert_lora_config

    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, expert_lora_config(model, r=2)).push_to_hub(repo_id)


def load_from_hub(repo_id: str, base: str, plain: bool, revision: str | None = None) -> list:
    """The logits of fixed tokens, by this package or by PEFT alone."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from hf_sparse_moe.hub import load_adapter

    model = AutoModelForCausalLM.from_pretrained(base)
    load = PeftModel.from_pretrained if plain else load_adapter
    model = load(model, repo_id, revision=revision).eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 21).reshape(2, 8)).logits.flatten().tolist()


def card_of(hub_server, repo_id: str) -> tuple[dict, str]:
    readme = hub_server.hub.read(repo_id, "README.md").decode()
    return yaml.safe_load(readme.split("---\n")[1]), readme


@pytest.mark.slow
def test_push_pull_doctor(client, hub_server, repo_id, base, folder, tmp_path):
    before = contents(folder)
    pushed = client.cli("push", folder, repo_id, "--base", BASE, "--tag", "v1", "--json")
    assert pushed.code == 0, pushed
    assert contents(folder) == before
    assert hub_server.count("POST", f"{repo_id}/commit/") == 1
    pulled = tmp_path / "pulled"
    assert client.cli("pull", repo_id, pulled, "--revision", "v1").code == 0
    assert contents(pulled)["adapter_model.safetensors"] == before["adapter_model.safetensors"]
    told = client.cli("doctor", repo_id, "--json")
    assert told.code == 0, told
    assert {finding["verdict"] for finding in json.loads(told.out)["findings"]} == {"passed"}
    revision = hub_server.hub.repos[BASE].resolve("main").sha
    config = json.loads((pulled / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (BASE, revision)
    data, card = card_of(hub_server, repo_id)
    assert (data["base_model"], data["base_model_relation"], data["library_name"]) == (BASE, "adapter", "peft")
    assert f"| Revision of the base | `{revision}` |" in card
    everything = b"".join(hub_server.hub.read(repo_id, name) for name in hub_server.hub.files(repo_id))
    assert str(base).encode() not in everything
    assert b"hf_writer" not in everything
    expected = logits_of(save_adapter(tmp_path / "again", base), {"input_ids": torch.arange(5, 21).reshape(2, 8)})
    for plain in (False, True):
        back = client(load_from_hub, repo_id=repo_id, base=BASE, plain=plain)
        assert back == pytest.approx(expected.flatten().tolist(), abs=1e-4)


@pytest.mark.parametrize("choice", [{}, {"experts": {"1": [0, 2]}, "projections": ["down"]}], ids=["all", "chosen"])
def test_from_memory(client, hub_server, repo_id, base, choice):
    commit = client(in_memory, repo_id=repo_id, base=BASE, **choice)
    assert hub_server.hub.repos[repo_id].resolve("main").sha == commit
    assert "[More Information Needed]" not in card_of(hub_server, repo_id)[1]
    assert client.cli("doctor", repo_id).code == 0


def test_a_link_beside_an_adapter_stays_here(client, hub_server, repo_id, base, folder, tmp_path):
    (tmp_path / "secret").write_text("mine")
    (folder / "LICENSE").symlink_to(tmp_path / "secret")
    pushed = client.cli("push", folder, repo_id, "--base", BASE, "--no-fingerprint")
    assert (pushed.code, "left out: LICENSE" in pushed.out) == (0, True), pushed
    assert {"LICENSE", "fingerprint.json"}.isdisjoint(hub_server.hub.files(repo_id))
    assert hub_server.count("GET", "^/cdn/") == 0  # the base is known by what the Hub says of its files
    recorded = json.loads(hub_server.hub.read(repo_id, "adapter_base.json"))
    weights = hub_server.hub.repos[BASE].resolve("main").files["model.safetensors"]
    assert recorded["sha256"] == {"model.safetensors": weights.sha256}


def test_a_base_that_moved_on_is_told_before_anything_is_sent(client, hub_server, repo_id, base, tmp_path):
    other = Path(shutil.copytree(base, tmp_path / "other"))
    model = load(other)
    model.sparse_blocks[0].experts.down_proj.data *= 2
    model.save_pretrained(other)
    with pytest.raises(Exception, match="was trained on another base") as caught:
        client(in_memory, repo_id=repo_id, base=BASE, other_base=str(other))
    assert "ValueError" in caught.value.kinds
    assert repo_id not in hub_server.hub.repos


def test_the_trainer_s_push_tells_its_training(client, hub_server, repo_id, base, tmp_path):
    client(train_and_push, repo_id=repo_id, base=BASE, output=str(tmp_path / "run"), license="mit")
    files = hub_server.hub.files(repo_id)
    assert {"adapter_model.safetensors", "adapter_base.json", "training_record.json", "fingerprint.json"} <= files
    assert "training_args.bin" not in files
    data, card = card_of(hub_server, repo_id)
    assert (data["license"], data["datasets"], data["base_model"]) == ("mit", ["me/law"], BASE)
    assert "| Optimizer steps | 2 |" in card
    assert client.cli("doctor", repo_id).code == 0
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert (checkpoint / "adapter_base.json").is_file()
    assert client.cli("push", checkpoint, f"{repo_id}-checkpoint").code == 0


def test_peft_s_own_push_leaves_the_stock_card_and_ours_repairs_it(client, hub_server, repo_id, base):
    client(stock_push, repo_id=repo_id, base=BASE)
    assert "adapter_base.json" not in hub_server.hub.files(repo_id)
    assert "Parameters that it adapts" not in card_of(hub_server, repo_id)[1]
    client(in_memory, repo_id=repo_id, base=BASE)
    assert "Parameters that it adapts" in card_of(hub_server, repo_id)[1]
    assert "[More Information Needed]" not in card_of(hub_server, repo_id)[1]


def test_model_and_adapter_do_not_share_a_repository(client, hub_server, repo_id, base, folder):
    head = hub_server.hub.repos[BASE].resolve("main").sha
    pushed = client.cli("push", folder, BASE)
    assert (pushed.code, "Choose a repository of its own" in pushed.err) == (2, True), pushed
    assert hub_server.hub.repos[BASE].resolve("main").sha == head
    assert client.cli("push", folder, repo_id).code == 0
    assert client.cli("push", base, repo_id).code == 2


def test_an_adapter_of_a_folder_names_no_path_and_needs_its_base_elsewhere(client, hub_server, repo_id, base, folder):
    assert client.cli("push", folder, repo_id).code == 0
    config = json.loads(hub_server.hub.read(repo_id, "adapter_config.json"))
    assert config["base_model_name_or_path"] == base.name
    assert "base_model" not in card_of(hub_server, repo_id)[0]
    assert client.cli("doctor", repo_id, "--base", base).code == 0
    assert client.cli("doctor", repo_id).code == 2


def test_a_repository_cannot_make_us_read_a_folder_here(client, hub_server, repo_id, base, folder):
    hub = hub_server.hub
    assert client.cli("push", folder, repo_id, "--base", BASE).code == 0
    repo = hub.repos[repo_id]
    files = dict(repo.resolve("main").files)
    for name, fields in (
        ("adapter_config", {"base_model_name_or_path": str(base)}),
        ("adapter_base", {"revision": None}),
    ):
        changed = json.loads(hub.read(repo_id, f"{name}.json")) | fields
        files[f"{name}.json"] = hub.regular(f"{name}.json", json.dumps(changed).encode())
    repo.branches["main"] = hub.snapshot(repo, None, files, "hostile", "", "tester").sha
    told = client.cli("doctor", repo_id)
    assert (told.code, "a folder here and not a Hub id" in told.err) == (2, True), told
    assert client.cli("doctor", repo_id, "--base", BASE).code == 0


@pytest.mark.parametrize(
    ("base_id", "code", "said"),
    [("tester/never-created", 2, "does not exist"), ("no id at all", 2, "not a Hub id")],
)
def test_a_base_that_is_not_there_is_told(client, hub_server, repo_id, base, folder, base_id, code, said):
    pushed = client.cli("push", folder, repo_id, "--base", base_id)
    assert (pushed.code, said in pushed.err, pushed.err.count("\n")) == (code, True, 1), pushed
    assert repo_id not in hub_server.hub.repos


def test_the_revision_is_that_of_all_its_files(client, hub_server, repo_id, base, folder, tmp_path):
    assert client.cli("push", folder, repo_id, "--base", BASE, "--tag", "all").code == 0
    first = client(load_from_hub, repo_id=repo_id, base=BASE, plain=False)
    chosen = tmp_path / "chosen"
    save_adapter(chosen, base, experts={0: [1]})
    assert client.cli("push", chosen, repo_id, "--base", BASE).code == 0
    assert client(load_from_hub, repo_id=repo_id, base=BASE, plain=False) != first
    assert client(load_from_hub, repo_id=repo_id, base=BASE, plain=False, revision="all") == first
