"""The local Hub against the real client, with a stock model: what later tests stand on must itself be right."""

import urllib.error
import urllib.request

import pytest

from hub_client import ClientError
from hub_server import Fault


def push_bert(repo_id: str, seed: int = 0, **kwargs) -> dict:
    """Pushes a tiny stock BERT and its tokenizer; returns the commit and the logits of one sentence."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "sparse", "experts", "share", "one", "router"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", mask_token="[MASK]")
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForMaskedLM(BertConfig(vocab_size=len(words), **shape)).eval()
    commit = model.push_to_hub(repo_id, **kwargs)
    tokenizer.push_to_hub(repo_id)
    logits = model(**tokenizer("sparse experts share", return_tensors="pt")).logits
    return {"sha": commit.oid, "url": str(commit), "logits": logits.tolist()}


def load_bert(repo_id: str, revision: str | None = None, **kwargs) -> list:
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(repo_id, **kwargs)
    model = AutoModelForMaskedLM.from_pretrained(repo_id, revision=revision, **kwargs)
    return model(**tokenizer("sparse experts share", return_tensors="pt")).logits.tolist()


def call(method: str, **arguments) -> object:
    """Calls one method of the real `HfApi` and returns what JSON can carry of its result."""
    import dataclasses

    from huggingface_hub import HfApi

    result = getattr(HfApi(), method)(**arguments)
    if not isinstance(result, str | dict | bool | type(None)) and not dataclasses.is_dataclass(result):
        result = list(result)
    return {"text": str(result), "sha": getattr(result, "oid", None) or getattr(result, "sha", None)}


def commit_text(repo_id: str, path: str, text: str, parent: str | None = None, **kwargs) -> dict:
    from huggingface_hub import CommitOperationAdd, HfApi

    operations = [CommitOperationAdd(path, text.encode())]
    commit = HfApi().create_commit(repo_id, operations, commit_message=path, parent_commit=parent, **kwargs)
    return {"sha": commit.oid, "pull_request": commit.pr_revision}


def head(repo_id: str) -> str:
    from huggingface_hub import HfApi

    return HfApi().repo_info(repo_id).sha


@pytest.mark.parametrize("max_shard_size", ["50GB", "10KB"])
def test_a_stock_model_comes_back_as_it_was_pushed(client, hub_server, repo_id, max_shard_size):
    pushed = client(push_bert, repo_id=repo_id, max_shard_size=max_shard_size)
    assert client(load_bert, repo_id=repo_id) == pushed["logits"]
    assert pushed["url"] == f"{hub_server.url}/{repo_id}/commit/{pushed['sha']}"
    files = hub_server.hub.repos[repo_id].resolve("main").files
    assert ("model.safetensors.index.json" in files) == (max_shard_size == "10KB")
    assert {"config.json", "tokenizer.json", "README.md"} <= set(files)
    assert all(entry.lfs == path.endswith(".safetensors") for path, entry in files.items())


def test_a_revision_pins_what_is_loaded(client, repo_id):
    first = client(push_bert, repo_id=repo_id, seed=0)
    client(call, method="create_tag", repo_id=repo_id, tag="v1", revision=first["sha"])
    client(call, method="create_branch", repo_id=repo_id, branch="old/one", revision="v1")
    second = client(push_bert, repo_id=repo_id, seed=1)
    assert first["logits"] != second["logits"]
    for revision in (first["sha"], "v1", "old/one"):
        assert client(load_bert, repo_id=repo_id, revision=revision) == first["logits"]
    assert client(load_bert, repo_id=repo_id) == second["logits"]
    with pytest.raises(ClientError, match="nowhere"):
        client(load_bert, repo_id=repo_id, revision="nowhere")


def test_a_snapshot_holds_the_bytes_of_every_file(client, hub_server, repo_id, tmp_path):
    client(push_bert, repo_id=repo_id, max_shard_size="10KB")
    client(commit_text, repo_id=repo_id, path="notes/deep/page.md", text="below a folder")
    client(call, method="snapshot_download", repo_id=repo_id, local_dir=str(tmp_path))
    for path in hub_server.hub.files(repo_id):
        assert (tmp_path / path).read_bytes() == hub_server.hub.read(repo_id, path)


def test_a_download_that_is_cut_is_tried_again(client, hub_server, repo_id):
    client(push_bert, repo_id=repo_id)
    hub_server.faults.append(Fault("GET", "^/cdn/", cut=True, after=True))
    client(load_bert, repo_id=repo_id, force_download=True)
    assert hub_server.count("GET", "^/cdn/") == 2


def test_a_range_of_bytes_is_served(client, hub_server, repo_id):
    client(push_bert, repo_id=repo_id)
    entry = hub_server.hub.repos[repo_id].resolve("main").files["model.safetensors"]
    request = urllib.request.Request(f"{hub_server.cdn_url}/cdn/{entry.sha256}", headers={"Range": "bytes=5-9"})
    with urllib.request.urlopen(request) as answer:
        assert answer.status == 206
        assert answer.headers["Content-Range"] == f"bytes 5-9/{entry.size}"
        assert answer.read() == hub_server.hub.read(repo_id, "model.safetensors")[5:10]


def test_a_list_shows_files_folders_and_refs(client, repo_id):
    client(call, method="create_repo", repo_id=repo_id)
    client(commit_text, repo_id=repo_id, path="notes/deep/page.md", text="below a folder")
    top = client(call, method="list_repo_tree", repo_id=repo_id)["text"]
    assert "path='notes'" in top
    assert "page.md" not in top
    assert "page.md" in client(call, method="list_repo_tree", repo_id=repo_id, recursive=True)["text"]
    assert "page.md" in client(call, method="list_repo_tree", repo_id=repo_id, path_in_repo="notes/deep")["text"]
    paths = ["notes/deep/page.md", "absent"]
    assert client(call, method="get_paths_info", repo_id=repo_id, paths=paths)["text"].count("RepoFile(") == 1
    assert "refs/heads/main" in client(call, method="list_repo_refs", repo_id=repo_id)["text"]
    assert client(call, method="list_repo_commits", repo_id=repo_id)["text"].count("GitCommitInfo(") == 2
    assert "'tester'" in client(call, method="whoami")["text"]


def test_a_commit_on_an_old_head_is_refused(client, hub_server, repo_id):
    client(call, method="create_repo", repo_id=repo_id)
    old = client(head, repo_id=repo_id)
    new = client(commit_text, repo_id=repo_id, path="a.txt", text="first", parent=old)["sha"]
    with pytest.raises(ClientError, match="412"):
        client(commit_text, repo_id=repo_id, path="b.txt", text="second", parent=old)
    assert client(head, repo_id=repo_id) == new
    assert "b.txt" not in hub_server.hub.files(repo_id)


def test_a_pull_request_leaves_the_branch_alone(client, hub_server, repo_id):
    client(call, method="create_repo", repo_id=repo_id)
    opened = client(commit_text, repo_id=repo_id, path="a.txt", text="proposed", create_pr=True)
    assert opened["pull_request"] == "refs/pr/1"
    assert "a.txt" not in hub_server.hub.files(repo_id)
    assert hub_server.hub.read(repo_id, "a.txt", "refs/pr/1") == b"proposed"


def test_a_repository_is_created_once(client, repo_id):
    client(call, method="create_repo", repo_id=repo_id)
    client(call, method="create_repo", repo_id=repo_id, exist_ok=True)
    with pytest.raises(ClientError, match="409"):
        client(call, method="create_repo", repo_id=repo_id)
    client(call, method="delete_repo", repo_id=repo_id)
    with pytest.raises(ClientError) as caught:
        client(head, repo_id=repo_id)
    assert "RepositoryNotFoundError" in caught.value.kinds


def test_what_is_missing_has_its_own_error(client, repo_id):
    with pytest.raises(ClientError, match="is not a valid model identifier"):
        client(load_bert, repo_id="tester/never-created")
    client(call, method="create_repo", repo_id=repo_id)
    for arguments, kind in (
        ({"method": "hf_hub_download", "repo_id": repo_id, "filename": "absent.txt"}, "RemoteEntryNotFoundError"),
        ({"method": "model_info", "repo_id": repo_id, "revision": "absent"}, "RevisionNotFoundError"),
        ({"method": "delete_file", "repo_id": repo_id, "path_in_repo": "absent.txt"}, "RemoteEntryNotFoundError"),
    ):
        with pytest.raises(ClientError) as caught:
            client(call, **arguments)
        assert kind in caught.value.kinds


def test_a_wrong_token_is_refused_even_where_reading_is_free(client, repo_id, tmp_path):
    client(push_bert, repo_id=repo_id)
    for arguments in ({"method": "whoami"}, {"method": "model_info", "repo_id": repo_id}):
        with pytest.raises(ClientError, match=r"401|Invalid user token"):
            client(call, token="hf_wrong", **arguments)
    with pytest.raises(ClientError, match=r"connection error[^!]*401"):  # so transformers words it
        client(load_bert, repo_id=repo_id, token="hf_wrong", cache_dir=str(tmp_path))
    with pytest.raises(ClientError, match="403"):
        client(call, method="create_branch", repo_id=repo_id, branch="mine", token="hf_other")


def test_a_private_repository_does_not_exist_for_others(client, repo_id):
    client(call, method="create_repo", repo_id=repo_id, private=True)
    assert client(call, method="model_info", repo_id=repo_id)["sha"]
    for token in (False, "hf_other"):
        with pytest.raises(ClientError) as caught:
            client(call, method="model_info", repo_id=repo_id, token=token)
        assert "RepositoryNotFoundError" in caught.value.kinds


@pytest.mark.parametrize("base_model", ["/a/local/folder", "two words"])
def test_a_card_with_invalid_metadata_is_refused(client, hub_server, repo_id, base_model):
    client(call, method="create_repo", repo_id=repo_id)
    with pytest.raises(ClientError, match="base_model"):
        client(commit_text, repo_id=repo_id, path="README.md", text=f"---\nbase_model: {base_model}\n---\n# Card\n")
    assert "README.md" not in hub_server.hub.files(repo_id)


def test_an_answer_can_be_lost_after_the_commit_happened(client, hub_server, repo_id):
    client(call, method="create_repo", repo_id=repo_id)
    for fault in (Fault("POST", "/commit/", status=500, after=True), Fault("POST", "/commit/", cut=True, after=True)):
        hub_server.faults.append(fault)
        with pytest.raises(ClientError, match=r"500|closed connection"):
            client(commit_text, repo_id=repo_id, path=f"{fault.cut}.txt", text="here all the same")
        assert f"{fault.cut}.txt" in hub_server.hub.files(repo_id)


def test_storage_refuses_a_token(client, hub_server, repo_id):
    client(push_bert, repo_id=repo_id)
    entry = hub_server.hub.repos[repo_id].resolve("main").files["model.safetensors"]
    headers = {"Authorization": "Bearer hf_writer"}
    request = urllib.request.Request(f"{hub_server.cdn_url}/cdn/{entry.sha256}", headers=headers)
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request)
