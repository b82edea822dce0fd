"""What is pushed comes back, by the package and by its own code, whatever happened on the way: over real HTTP."""

import json

import pytest
import yaml

from hub_client import ClientError
from hub_server import Fault


def push(repo_id: str, seed: int = 0, with_tokenizer: bool = False, **kwargs) -> dict:
    """Pushes a tiny mixture by its own method; returns the commit and what tells the model: its weights and logits."""
    import hashlib
    import tempfile

    import torch
    from tokenizers import Tokenizer, models
    from transformers import BertConfig, PreTrainedTokenizerFast

    import hf_sparse_moe

    shape = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    dense = BertConfig(intermediate_size=32, **shape)
    torch.manual_seed(seed)
    config = hf_sparse_moe.SparseMoeEncoderConfig.from_dense(dense, num_experts=4, num_experts_per_tok=2)
    model = hf_sparse_moe.SparseMoeEncoderForMaskedLM(config).eval()
    model.receipt = kwargs.pop("receipt", None)
    model.add_model_tags(kwargs.pop("model_tags", []))
    if with_tokenizer:
        backend = Tokenizer(models.WordLevel({"[UNK]": 0, "sparse": 1}, unk_token="[UNK]"))
        kwargs["tokenizer"] = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    if kwargs.pop("while_saving", False):
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder, push_to_hub=True, repo_id=repo_id, **kwargs)
        return {}
    commit = model.push_to_hub(repo_id, **kwargs)
    tokens = torch.tensor([[5, 3, 8, 1, 30]])
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    output = {"weights": digest.hexdigest(), "logits": model(tokens).logits.flatten().tolist()}
    return {"sha": commit.oid, "pull_request": commit.pr_revision, "model": output}


def load(repo_id: str, trust_remote_code: bool = False, **kwargs) -> dict:
    """Loads it through its Auto class; returns the weights' digest and the logits of the same tokens."""
    import hashlib
    import importlib.util

    import torch
    import transformers

    if trust_remote_code:
        try:
            installed = importlib.util.find_spec("hf_sparse_moe") is not None
        except ModuleNotFoundError:
            installed = False
        if installed:
            raise RuntimeError("this process must not know the package")
    else:
        import hf_sparse_moe  # noqa: F401
    model = transformers.AutoModelForMaskedLM.from_pretrained(repo_id, trust_remote_code=trust_remote_code, **kwargs)
    tokens = torch.tensor([[5, 3, 8, 1, 30]])
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return {"weights": digest.hexdigest(), "logits": model(tokens).logits.flatten().tolist()}


def push_tokenizer(repo_id: str) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))).push_to_hub(repo_id)


def load_without_trust(repo_id: str) -> None:
    from transformers import AutoModelForMaskedLM

    AutoModelForMaskedLM.from_pretrained(repo_id, trust_remote_code=False)


def push_as_a_second_rank(repo_id: str) -> None:
    """`save_pretrained` writes weights on the main process only."""
    from functools import partial

    from transformers import BertConfig

    from hf_sparse_moe import SparseMoeEncoderConfig, SparseMoeEncoderForMaskedLM

    shape = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = SparseMoeEncoderForMaskedLM(SparseMoeEncoderConfig.from_dense(BertConfig(intermediate_size=32, **shape)))
    model.save_pretrained = partial(model.save_pretrained, is_main_process=False)
    model.push_to_hub(repo_id)


def weight_files(hub_server, repo_id, revision="main"):
    return sorted(path for path in hub_server.hub.files(repo_id, revision) if ".safetensors" in path)


def metadata(hub_server, repo_id):
    readme = hub_server.hub.read(repo_id, "README.md").decode()
    return yaml.safe_load(readme.split("---\n")[1]), readme


def commits(hub_server, repo_id, revision="main"):
    """The titles from the head down to the first commit."""
    repo, titles = hub_server.hub.repos[repo_id], []
    commit = repo.resolve(revision)
    while commit:
        titles.append(commit.title)
        commit = repo.commits.get(commit.parent)
    return titles


def upcycle_and_push(dense_id: str, repo_id: str) -> str:
    """A stock model from the Hub becomes a mixture on the Hub; returns the commit of the stock model."""
    from transformers import BertConfig, BertForMaskedLM

    from hf_sparse_moe import upcycle

    shape = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    revision = BertForMaskedLM(BertConfig(intermediate_size=32, **shape)).push_to_hub(dense_id).oid
    upcycle(dense_id, num_experts=4, revision=revision).push_to_hub(repo_id, evaluation={"eval_loss": 3.5})
    return revision


def test_an_upcycled_model_names_its_source_on_the_hub(client, hub_server, repo_id):
    revision = client(upcycle_and_push, dense_id=f"{repo_id}-dense", repo_id=repo_id)
    data, readme = metadata(hub_server, repo_id)
    assert data["base_model"] == f"{repo_id}-dense"
    assert data["tags"] == ["moe", "sparse-moe", "encoder", "upcycled"]
    receipt = json.loads(hub_server.hub.read(repo_id, "receipt.json"))
    assert receipt["source"]["revision"] == revision
    for line in (f"`{revision}`", "| `method` | copy |", "| eval\\_loss | 3.5 |"):
        assert line in readme


def test_what_comes_back_is_what_was_sent(client, stranger, hub_server, repo_id):
    """Of one family; test_round_trip.py has all."""
    pushed = client(push, repo_id=repo_id)
    for back in (client(load, repo_id=repo_id), stranger(load, repo_id=repo_id, trust_remote_code=True)):
        assert back["weights"] == pushed["model"]["weights"]
        # the last bit of a product may depend on where in memory a tensor begins
        assert back["logits"] == pytest.approx(pushed["model"]["logits"], abs=1e-6)
    assert hub_server.count("POST", "/commit/") == 1

    data, readme = metadata(hub_server, repo_id)
    config = json.loads(hub_server.hub.read(repo_id, "config.json"))
    assert data["library_name"] == "transformers"
    assert data["tags"] == ["moe", "sparse-moe", "encoder"]
    assert "automatically generated" not in readme
    assert f"| {config['num_experts']} routed |" in readme
    for line in (f'from_pretrained("{repo_id}")', f'from_pretrained("{repo_id}", trust_remote_code=True)'):
        assert line in readme


def test_a_remote_code_load_without_trust_is_refused(client, stranger, repo_id):
    client(push, repo_id=repo_id)
    with pytest.raises(ClientError, match="trust_remote_code=True"):
        stranger(load_without_trust, repo_id=repo_id)


@pytest.mark.parametrize("sizes", [("10KB", "50GB"), ("50GB", "10KB"), ("10KB", "20KB")])
def test_only_the_last_push_s_weights_are_left(client, hub_server, repo_id, sizes):
    old = client(push, repo_id=repo_id, seed=0, max_shard_size=sizes[0])
    new = client(push, repo_id=repo_id, seed=1, max_shard_size=sizes[1])
    files = weight_files(hub_server, repo_id)
    if sizes[1] == "50GB":
        assert files == ["model.safetensors"]
    else:
        index = json.loads(hub_server.hub.read(repo_id, "model.safetensors.index.json"))
        assert files == sorted({*index["weight_map"].values(), "model.safetensors.index.json"})
    assert client(load, repo_id=repo_id)["weights"] == new["model"]["weights"] != old["model"]["weights"]
    assert client(load, repo_id=repo_id, revision=old["sha"])["weights"] == old["model"]["weights"]
    assert len(commits(hub_server, repo_id)) == 3


def test_a_receipt_leaves_with_the_weights_it_describes(client, hub_server, repo_id):
    client(push, repo_id=repo_id, receipt={"method": "copy", "seed": 0})
    assert json.loads(hub_server.hub.read(repo_id, "receipt.json")) == {"method": "copy", "seed": 0}
    assert "upcycled" in metadata(hub_server, repo_id)[0]["tags"]
    client(push, repo_id=repo_id, seed=1)
    assert "receipt.json" not in hub_server.hub.files(repo_id)
    assert "upcycled" not in metadata(hub_server, repo_id)[0]["tags"]


def test_the_arguments_of_transformers_are_understood(client, hub_server, repo_id):
    client(
        push,
        repo_id=repo_id,
        commit_message="A message",
        commit_description="And more",
        private=True,
        revision="experiment/one",
        max_shard_size="10KB",
        tags=["mine"],
        token="hf_writer",
    )
    repo = hub_server.hub.repos[repo_id]
    commit = repo.resolve("experiment/one")
    assert (commit.title, commit.message, repo.private) == ("A message", "And more", True)
    assert "mine" in hub_server.hub.read(repo_id, "README.md", "experiment/one").decode()
    assert len(weight_files(hub_server, repo_id, "experiment/one")) > 1
    assert hub_server.hub.files(repo_id) == {".gitattributes"}


@pytest.mark.parametrize(
    "asked",
    [
        {"tags": ["mine"], "model_tags": ["ours"]},
        {"tags": "mine", "model_tags": ["ours"]},
        {"revision": "draft", "commit_description": "And more", "commit_message": "A message"},
        {"private": True, "token": "hf_writer"},
        {"max_shard_size": "10KB"},
        {"create_pr": True},
    ],
    ids=["tags", "tag", "revision", "private", "shards", "pull-request"],
)
def test_saving_understands_the_arguments_of_transformers(client, hub_server, repo_id, asked):
    client(push, repo_id=repo_id, while_saving=True, **asked)
    revision = asked.get("revision") or ("refs/pr/1" if asked.get("create_pr") else "main")
    repo = hub_server.hub.repos[repo_id]
    commit = repo.resolve(revision)
    assert commit.title == asked.get("commit_message", "Upload SparseMoeEncoderForMaskedLM")
    assert commit.message == asked.get("commit_description", "")
    assert repo.private == asked.get("private", False)
    tags = yaml.safe_load(hub_server.hub.read(repo_id, "README.md", revision).decode().split("---\n")[1])["tags"]
    assert {"mine", "ours"} <= set(tags) or "tags" not in asked
    assert (len(weight_files(hub_server, repo_id, revision)) > 1) == ("max_shard_size" in asked)


def test_a_variant_comes_beside_the_weights_that_are_there(client, hub_server, repo_id):
    first = client(push, repo_id=repo_id)
    data, _ = metadata(hub_server, repo_id)
    client(push, repo_id=repo_id, seed=1, while_saving=True, variant="fp16", commit_message="Half")
    assert weight_files(hub_server, repo_id) == ["model.fp16.safetensors", "model.safetensors"]
    assert commits(hub_server, repo_id)[0] == "Half"
    assert metadata(hub_server, repo_id)[0] == data
    other = client(push, repo_id=f"{repo_id}-other", seed=1)
    assert client(load, repo_id=repo_id)["weights"] == first["model"]["weights"]
    assert client(load, repo_id=repo_id, variant="fp16")["weights"] == other["model"]["weights"]


def test_a_pull_request_holds_the_checkpoint_and_main_does_not(client, hub_server, repo_id):
    pushed = client(push, repo_id=repo_id, create_pr=True)
    loaded = client(load, repo_id=repo_id, revision=pushed["pull_request"])
    assert loaded["weights"] == pushed["model"]["weights"]
    assert hub_server.hub.files(repo_id) == {".gitattributes"}


def test_a_tokenizer_travels_in_the_same_commit(client, hub_server, repo_id):
    client(push, repo_id=repo_id, with_tokenizer=True)
    assert "tokenizer.json" in hub_server.hub.files(repo_id)
    assert hub_server.count("POST", "/commit/") == 1


def test_a_later_tokenizer_push_keeps_the_card(client, hub_server, repo_id):
    client(push, repo_id=repo_id)
    card = metadata(hub_server, repo_id)
    client(push_tokenizer, repo_id=repo_id)
    assert "tokenizer.json" in hub_server.hub.files(repo_id)
    assert metadata(hub_server, repo_id) == card


@pytest.mark.parametrize("trouble", [{"status": 500}, {"cut": True}])
@pytest.mark.parametrize("after", [False, True])
def test_a_lost_answer_neither_loses_nor_repeats_the_commit(client, hub_server, repo_id, trouble, after):
    hub_server.faults.append(Fault("POST", "/commit/", after=after, **trouble))
    pushed = client(push, repo_id=repo_id)
    assert commits(hub_server, repo_id) == ["Upload SparseMoeEncoderForMaskedLM", "initial commit"]
    assert hub_server.hub.repos[repo_id].resolve("main").sha == pushed["sha"]
    assert client(load, repo_id=repo_id)["weights"] == pushed["model"]["weights"]


def test_someone_else_s_push_in_between_is_kept(client, hub_server, repo_id):
    client(push, repo_id=repo_id, seed=0, max_shard_size="10KB")

    def intervene():
        repo = hub_server.hub.repos[repo_id]
        note = {"path": "note.txt", "content": "aGk="}
        lines = [{"key": "header", "value": {"summary": "note"}}, {"key": "file", "value": note}]
        hub_server.hub.commit(repo, "main", lines, author="tester")

    hub_server.faults.append(Fault("POST", "/commit/", action=intervene))
    pushed = client(push, repo_id=repo_id, seed=1)
    title = "Upload SparseMoeEncoderForMaskedLM"
    assert commits(hub_server, repo_id) == [title, "note", title, "initial commit"]
    assert hub_server.count("POST", "/commit/") == 3  # the second push was refused once, and looked again
    assert "note.txt" in hub_server.hub.files(repo_id)
    assert weight_files(hub_server, repo_id) == ["model.safetensors"]
    assert client(load, repo_id=repo_id)["weights"] == pushed["model"]["weights"]


def test_a_pull_request_is_never_opened_twice(client, hub_server, repo_id):
    hub_server.faults.append(Fault("POST", "/commit/", status=500, after=True))
    with pytest.raises(ClientError, match="500"):
        client(push, repo_id=repo_id, create_pr=True)
    assert list(hub_server.hub.repos[repo_id].pull_requests) == ["refs/pr/1"]


def test_an_upload_that_fails_commits_nothing(client, hub_server, repo_id):
    first = client(push, repo_id=repo_id, seed=0)
    hub_server.faults.append(Fault("PUT", "^/upload/", status=403))
    with pytest.raises(ClientError, match=r"did not finish with `model\.safetensors`.*status 403"):
        client(push, repo_id=repo_id, seed=1)
    assert client(load, repo_id=repo_id)["weights"] == first["model"]["weights"]
    second = client(push, repo_id=repo_id, seed=1)
    assert client(load, repo_id=repo_id)["weights"] == second["model"]["weights"]


@pytest.mark.parametrize("token", ["hf_wrong", "hf_other", False])
def test_a_refused_token_is_named_but_not_shown(client, hub_server, repo_id, token):
    with pytest.raises(ClientError, match="refused to let you write") as caught:
        client(push, repo_id=repo_id, token=token)
    assert "PermissionError" in caught.value.kinds
    assert "hf_wrong" not in caught.value.message
    assert repo_id not in hub_server.hub.repos


def test_a_push_without_weights_is_refused_before_anything_is_sent(client, hub_server, repo_id):
    with pytest.raises(ClientError, match="saved no weights"):
        client(push_as_a_second_rank, repo_id=repo_id)
    assert not hub_server.requests


def test_saving_with_push_to_hub_goes_where_it_was_told(client, hub_server, repo_id):
    told = {"commit_message": "while saving", "revision": "trained", "tags": ["mine"]}
    client(push, repo_id=repo_id, while_saving=True, **told)
    assert commits(hub_server, repo_id, "trained") == ["while saving", "initial commit"]
    assert commits(hub_server, repo_id) == ["initial commit"]
    card = hub_server.hub.read(repo_id, "README.md", "trained").decode()
    assert "## How to use" in card
    assert "mine" in yaml.safe_load(card.split("---\n")[1])["tags"]
    client(load, repo_id=repo_id, revision="trained")


@pytest.mark.parametrize("name", ["push_to_hub", "push_folder", "push_adapter", "push_trainer"])
def test_old_names_are_push(name):
    import hf_sparse_moe.hub

    for module in (hf_sparse_moe, hf_sparse_moe.hub):
        with pytest.warns(FutureWarning, match="is now `hf_sparse_moe.push`"):
            assert getattr(module, name) is hf_sparse_moe.push
    with pytest.raises(ValueError, match="cannot be pushed"):
        hf_sparse_moe.push(3, "user/name")
    with pytest.raises(ValueError, match="`repo_id` is missing"):
        hf_sparse_moe.push("folder")
