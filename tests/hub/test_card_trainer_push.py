"""A trainer publishes the checkpoint's own card and no pickle, over real HTTP; the stock way does neither."""

import base64
import json

import pytest
import yaml

from hub_client import ClientError
from hub_server import Fault


def train(repo_id: str, folder: str, with_card: bool = True, push: bool = True, **arguments) -> dict:
    """Trains a tiny mixture two steps by the stock Trainer, and publishes it; returns what its folder holds."""
    from pathlib import Path

    import torch
    from transformers import LlamaConfig, Trainer, TrainingArguments

    from hf_sparse_moe import SparseMoeDecoderConfig, SparseMoeDecoderForCausalLM
    from hf_sparse_moe.hub import ModelCardCallback, add_model_card, errors

    errors.FIRST_PAUSE = 0.01
    shape = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    dense = LlamaConfig(intermediate_size=32, **shape)
    torch.manual_seed(0)
    model = SparseMoeDecoderForCausalLM(SparseMoeDecoderConfig.from_dense(dense, num_experts=4))
    drawn = torch.randint(32, (4, 6), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": ids, "labels": ids} for ids in drawn]
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    args = TrainingArguments(folder, hub_model_id=repo_id, max_steps=2, logging_steps=1, **quiet | arguments)
    trainer = Trainer(model=model, args=args, train_dataset=rows, eval_dataset=rows)
    if with_card:
        add_model_card(
            trainer, ModelCardCallback(train_data="hf://datasets/a/corpus", eval_data="hf://datasets/a/exam")
        )
    trainer.train()
    trainer.evaluate()
    if push:
        trainer.push_to_hub(license="mit")
    return {
        "files": sorted(path.name for path in Path(folder).iterdir()),
        "loss": trainer.evaluate()["eval_loss"],
    }


def loss_of(repo_id: str, revision: str | None = None) -> float:
    import torch
    from transformers import AutoModelForCausalLM

    import hf_sparse_moe  # noqa: F401

    model = AutoModelForCausalLM.from_pretrained(repo_id, revision=revision)
    ids = torch.randint(32, (4, 6), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=ids, labels=ids).loss.item()


def push_folder_of(folder: str, repo_id: str) -> None:
    from hf_sparse_moe import push

    push(folder, repo_id)


def test_the_stock_push_has_a_stock_card_and_a_pickle(client, hub_server, repo_id, tmp_path):
    """What is set right below; where this fails, transformers has changed and `add_model_card` may be simpler."""
    client(train, repo_id=repo_id, folder=str(tmp_path / "out"), with_card=False)
    assert "training_args.bin" in hub_server.hub.files(repo_id)
    assert b"generated automatically" in hub_server.hub.read(repo_id, "README.md")


def test_our_push_has_our_card_and_no_pickle(client, hub_server, repo_id, tmp_path):
    trained = client(train, repo_id=repo_id, folder=str(tmp_path / "out"))
    files = hub_server.hub.files(repo_id)
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth"))]
    assert {"model.safetensors", "config.json", "training_record.json", ".eval_results/hf-sparse-moe.yaml"} <= files
    readme = hub_server.hub.read(repo_id, "README.md").decode()
    metadata = yaml.safe_load(readme.split("---\n")[1])
    assert (metadata["license"], metadata["datasets"]) == ("mit", ["a/corpus"])
    record = json.loads(hub_server.hub.read(repo_id, "training_record.json"))
    assert record["evaluation"]["results"][""]["loss"] == trained["loss"]
    assert f"| all | {trained['loss']:.6g} |" in readme
    assert "generated automatically" not in readme
    assert hub_server.count("POST", "/commit/") == 1
    assert client(loss_of, repo_id=repo_id) == pytest.approx(trained["loss"], rel=1e-5)
    assert not [name for name in trained["files"] if "push" in name]


def test_pushes_while_training_are_ours_too(client, hub_server, repo_id, tmp_path):
    often = {"push_to_hub": True, "save_strategy": "steps", "save_steps": 1}
    client(train, repo_id=repo_id, folder=str(tmp_path / "out"), **often)
    assert "fingerprint.json" in hub_server.hub.files(repo_id)
    repo, titles, commit = hub_server.hub.repos[repo_id], [], hub_server.hub.repos[repo_id].resolve("main")
    while commit:
        titles.append(commit.title)
        if commit.title != "initial commit":
            files = hub_server.hub.files(repo_id, commit.sha)
            assert not [name for name in files if name.endswith((".bin", ".pt", ".pth"))]
            # the weights are not loaded once more while a training waits
            assert ("fingerprint.json" in files) == (not commit.title.startswith("Training in progress"))
            record = json.loads(hub_server.hub.read(repo_id, "training_record.json", commit.sha))
            card = hub_server.hub.read(repo_id, "README.md", commit.sha).decode()
            assert f"| Optimizer steps | {record['training']['steps']} |" in card
        commit = repo.commits.get(commit.parent)
    assert titles[0] == "End of training"
    assert {"Training in progress, step 1", "Training in progress, step 2"} <= set(titles)


@pytest.mark.parametrize("fault", [{"status": 401}, {"status": 403}, {"status": 404}, {"status": 503}, {"cut": True}])
def test_a_push_that_fails_does_not_end_the_training(client, hub_server, repo_id, tmp_path, fault):
    hub_server.faults.append(Fault("POST", "/commit/", times=20, **fault))
    often = {"push_to_hub": True, "save_strategy": "steps", "save_steps": 2}
    client(train, repo_id=repo_id, folder=str(tmp_path / "out"), push=False, **often)
    assert hub_server.count("POST", "/commit/") > 0
    assert hub_server.hub.files(repo_id) == {".gitattributes"}
    assert (tmp_path / "out" / "checkpoint-2" / "model.safetensors").is_file()
    assert json.loads((tmp_path / "out" / "training_record.json").read_text())["training"]["steps"] == 2
    hub_server.faults.clear()
    client(push_folder_of, folder=str(tmp_path / "out" / "checkpoint-2"), repo_id=repo_id)
    assert "model.safetensors" in hub_server.hub.files(repo_id)


def test_what_lies_in_the_output_folder_is_neither_published_nor_deleted(client, hub_server, repo_id, tmp_path):
    """A user's own folder, what a push that was killed left, and a link."""
    out = tmp_path / "out"
    for name in ("_push", ".push-killed"):
        (out / name).mkdir(parents=True)
        (out / name / "receipt.json").write_text('{"source": {"name": "other/model"}}')
        (out / name / "README.md").write_text("of another model")
    (tmp_path / "private.json").write_text("{}")
    (out / "routing_statistics.json").symlink_to(tmp_path / "private.json")
    trained = client(train, repo_id=repo_id, folder=str(out))
    assert {"receipt.json", "routing_statistics.json"}.isdisjoint(hub_server.hub.files(repo_id))
    assert b"of another model" not in hub_server.hub.read(repo_id, "README.md")
    assert (out / "_push" / "receipt.json").is_file()
    assert [name for name in trained["files"] if "push" in name] == [".push-killed", "_push"]


def test_what_a_person_wrote_on_the_hub_stays(client, hub_server, repo_id, tmp_path):
    client(train, repo_id=repo_id, folder=str(tmp_path / "out"))
    card = hub_server.hub.read(repo_id, "README.md").decode()
    edited = f"{card}\n## Thanks\n\nTo all.\n".replace("license: mit", "license: mit\nthumbnail: a.png")

    content = {"path": "README.md", "content": base64.b64encode(edited.encode()).decode()}
    lines = [{"key": "header", "value": {"summary": "words"}}, {"key": "file", "value": content}]
    hub_server.hub.commit(hub_server.hub.repos[repo_id], "main", lines, author="tester")
    client(train, repo_id=repo_id, folder=str(tmp_path / "again"), learning_rate=0.25)
    card = hub_server.hub.read(repo_id, "README.md").decode()
    assert card.endswith("\n## Thanks\n\nTo all.\n")
    assert "thumbnail: a.png" in card
    assert "| `learning_rate` | 0.25 |" in card


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_optimizer_states_are_not_published(client, hub_server, repo_id, tmp_path, strategy):
    with pytest.raises(ClientError, match=f"hub_strategy='{strategy}'.*pickle"):
        client(train, repo_id=repo_id, folder=str(tmp_path / "out"), hub_strategy=strategy)
