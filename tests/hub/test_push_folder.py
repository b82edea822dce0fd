"""`hf-sparse-moe push`: what is sent, what never is, and what stays where something goes wrong."""

import json
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest

from hub_checkpoints import SHARD, contents, save_mixture
from hub_server import Fault


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_mixture(tmp_path_factory.mktemp("checkpoint"), max_shard_size=SHARD)


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(checkpoint, tmp_path / "mixture"))


def titles(hub_server, repo_id: str, revision: str = "main") -> list[str]:
    repo, found = hub_server.hub.repos[repo_id], []
    commit = repo.resolve(revision)
    while commit:
        found.append(commit.title)
        commit = repo.commits.get(commit.parent)
    return found


def test_a_folder_arrives_in_one_commit(client, hub_server, repo_id, folder):
    before = contents(folder)
    pushed = client.cli("push", folder, repo_id, "--json")
    assert pushed.code == 0, pushed
    report = json.loads(pushed.out)
    assert report["commit"] == hub_server.hub.repos[repo_id].resolve("main").sha
    assert titles(hub_server, repo_id) == ["Upload SparseMoeEncoderForMaskedLM", "initial commit"]
    files = hub_server.hub.files(repo_id) - {".gitattributes"}
    assert files == set(before) | {"README.md", "fingerprint.json"}
    assert all(hub_server.hub.read(repo_id, name) == content for name, content in before.items())
    assert contents(folder) == before
    everything = [hub_server.hub.read(repo_id, name) for name in files]
    assert not any(b"hf_writer" in content for content in (*everything, pushed.out.encode(), pushed.err.encode()))
    assert f'from_pretrained("{repo_id}")' in hub_server.hub.read(repo_id, "README.md").decode()


def test_a_second_push_of_the_same_makes_no_commit(client, hub_server, repo_id, folder):
    first = json.loads(client.cli("push", folder, repo_id, "--json").out)
    assert json.loads(client.cli("push", folder, repo_id, "--json").out)["commit"] == first["commit"]


def test_what_people_ask_for_is_done(client, hub_server, repo_id, folder):
    arguments = ("--private", "--revision", "trained", "--message", "First try", "--tag", "v1")
    pushed = client.cli("push", folder, repo_id, *arguments, "--json")
    commit = json.loads(pushed.out)["commit"]
    repo = hub_server.hub.repos[repo_id]
    assert (repo.private, repo.branches["trained"], repo.tags) == (True, commit, {"v1": commit})
    assert titles(hub_server, repo_id, "trained")[0] == "First try"
    assert hub_server.hub.files(repo_id) == {".gitattributes"}
    assert client.cli("push", folder, repo_id, *arguments).code == 0  # the tag is where it should be


def test_a_tag_is_never_moved(client, hub_server, repo_id, folder):
    client.cli("push", folder, repo_id, "--tag", "v1")
    tagged = dict(hub_server.hub.repos[repo_id].tags)
    (folder / "notes.txt").write_text("new")
    client.cli("push", folder, repo_id)
    again = client.cli("push", folder, repo_id, "--tag", "v1")
    assert (again.code, "already" in again.err) == (2, True)
    assert hub_server.hub.repos[repo_id].tags == tagged


def test_a_tag_that_another_push_made_in_between_is_told(client, hub_server, repo_id, folder):
    def intervene():
        repo = hub_server.hub.repos[repo_id]
        repo.tags["v1"] = repo.commits[repo.resolve("main").sha].parent

    hub_server.faults.append(Fault("POST", "/tag/", action=intervene))
    pushed = client.cli("push", folder, repo_id, "--tag", "v1")
    assert (pushed.code, "has the tag `v1` already" in pushed.err) == (2, True), pushed
    assert titles(hub_server, repo_id)[0] == "Upload SparseMoeEncoderForMaskedLM"


def test_a_head_that_is_gone_at_the_commit_is_read_again(client, hub_server, repo_id, folder):
    hub_server.faults.append(Fault("POST", "/commit/", status=404, code="RevisionNotFound"))
    assert client.cli("push", folder, repo_id).code == 0
    assert len(titles(hub_server, repo_id)) == 2


def test_a_pull_request_leaves_main_alone(client, hub_server, repo_id, folder):
    pushed = client.cli("push", folder, repo_id, "--create-pr")
    assert "/discussions/1" in pushed.out
    assert hub_server.hub.files(repo_id) == {".gitattributes"}
    assert "config.json" in hub_server.hub.files(repo_id, "refs/pr/1")


def test_only_a_checkpoint_s_files_leave_the_machine(client, hub_server, repo_id, folder, tmp_path):
    ran = tmp_path / "ran"

    class Trap:
        def __reduce__(self):
            return (Path.touch, (ran,))

    (tmp_path / "secret.txt").write_text("mine")
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    (tmp_path / "blobs").mkdir()  # no cache of the Hub, though it looks like one from `folder/..`
    (tmp_path / "blobs" / "key").write_text("mine")
    (folder / "LICENSE").symlink_to("../blobs/key")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "mine.yaml").write_text("mine")
    (folder / ".eval_results").symlink_to(tmp_path / "results")
    os.mkfifo(folder / "pipe.txt")
    (folder / ".env").write_text("PASSWORD=1")
    (folder / "train.py").write_text("raise RuntimeError")
    (folder / "model.safetensors.old").write_text("")
    (folder / "model-00009-of-00009.safetensors").write_bytes((next(folder.glob("model-*"))).read_bytes())
    (folder / "checkpoint-5").mkdir()
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "tokenizer.pkl"):
        (folder / name).write_bytes(pickle.dumps(Trap()))
    pushed = client.cli("push", folder, repo_id)
    assert pushed.code == 0, pushed
    assert not ran.exists()
    kept = {
        "link.txt",
        "LICENSE",
        "pipe.txt",
        ".env",
        "train.py",
        "training_args.bin",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
    }
    kept |= {"tokenizer.pkl", "model.safetensors.old", "model-00009-of-00009.safetensors"}
    assert not kept & hub_server.hub.files(repo_id)
    assert ".eval_results/mine.yaml" not in hub_server.hub.files(repo_id)
    for name in (*kept, "checkpoint-5/", ".eval_results/"):
        assert name in pushed.out


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (("pytorch_model_fsdp_0/__0_0.distcp", "pytorch_model_fsdp_0/.metadata"), "FSDP"),
        (("global_step5/mp_rank_00_model_states.pt", "zero_to_fp32.py"), "DeepSpeed"),
        (
            ("global_step5/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",),
            "hf-sparse-moe consolidate {} CONSOLIDATED",
        ),
        (("model/__1_0.distcp",), "hf-sparse-moe consolidate {} CONSOLIDATED"),
        (("pytorch_model.bin",), "pickle"),
        ((), "not a checkpoint"),
    ],
)
def test_a_folder_without_whole_weights_is_refused(client, hub_server, repo_id, folder, state, said):
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    for name in state:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"")
    pushed = client.cli("push", folder, repo_id)
    assert (pushed.code, pushed.out, said.format(folder) in pushed.err) == (2, "", True), pushed
    assert not hub_server.requests


def test_weights_that_are_a_link_or_a_pipe_are_refused(client, hub_server, repo_id, folder, tmp_path):
    weights = next(folder.glob("model-00001*"))
    weights.rename(tmp_path / "elsewhere.safetensors")
    weights.symlink_to(tmp_path / "elsewhere.safetensors")
    pushed = client.cli("push", folder, repo_id)
    assert (pushed.code, "leads out of its folder" in pushed.err) == (2, True), pushed
    weights.unlink()
    os.mkfifo(weights)
    assert client.cli("push", folder, repo_id).code == 2
    assert not hub_server.requests


def test_the_fingerprint_is_left_out_where_it_is_not_wanted(client, hub_server, repo_id, folder):
    assert client.cli("push", folder, repo_id).code == 0
    assert "fingerprint.json" in hub_server.hub.files(repo_id)
    (folder / "fingerprint.json").write_bytes(hub_server.hub.read(repo_id, "fingerprint.json"))
    assert client.cli("push", folder, repo_id, "--no-fingerprint").code == 0
    assert "fingerprint.json" in hub_server.hub.files(repo_id)  # it is of these very files
    save_mixture(folder, train=True, max_shard_size=SHARD)
    assert client.cli("push", folder, repo_id, "--no-fingerprint").code == 0
    assert "fingerprint.json" not in hub_server.hub.files(repo_id)


def test_weights_that_do_not_fill_the_model_are_refused(client, hub_server, repo_id, folder):
    config = json.loads((folder / "config.json").read_text())
    config["num_experts"] = 5
    (folder / "config.json").write_text(json.dumps(config))
    pushed = client.cli("push", folder, repo_id)
    assert (pushed.code, "experts" in pushed.err) == (2, True), pushed
    assert not hub_server.requests


def test_a_token_in_a_file_is_never_published(client, hub_server, repo_id, folder):
    token = "hf_" + "a" * 34
    (folder / "notes.md").write_text(f"export HF_TOKEN={token}")
    pushed = client.cli("push", folder, repo_id)
    assert (pushed.code, "notes.md" in pushed.err, token in pushed.err) == (2, True, False)
    assert not hub_server.requests


@pytest.mark.parametrize("in_parts", [False, True])
def test_a_push_that_was_cut_goes_on(client, hub_server, repo_id, folder, in_parts):
    hub_server.part_size = 10_000 if in_parts else None
    shards = len(list(folder.glob("*.safetensors")))
    path = "/part/2$" if in_parts else "^/upload/"
    hub_server.faults.append(Fault("PUT", path, status=403))
    try:
        first = client.cli("push", folder, repo_id)
        assert (first.code, "safetensors" in first.err) == (3, True), first
        assert hub_server.hub.files(repo_id) == {".gitattributes"}
        arrived = len(hub_server.hub.repos[repo_id].lfs_objects)
        assert shards > 2
        assert 0 < arrived < shards
        hub_server.requests.clear()
        assert client.cli("push", folder, repo_id).code == 0
    finally:
        hub_server.part_size = None
    sent = {where.split("/")[2] for method, where in hub_server.requests if method == "PUT"}
    assert len(sent) == shards - arrived
    for name, content in contents(folder).items():
        assert hub_server.hub.read(repo_id, name) == content


def test_an_upload_cut_in_its_middle_is_sent_again(client, hub_server, repo_id, folder):
    hub_server.faults.append(Fault("PUT", "^/upload/", cut=True))
    assert client.cli("push", folder, repo_id).code == 0
    assert all(hub_server.hub.read(repo_id, name) == content for name, content in contents(folder).items())


@pytest.mark.parametrize(
    ("status", "where"),
    [(409, "/commit/"), (429, "/commit/"), (500, "/commit/"), (429, "/api/repos/create"), (503, "/api/repos/create")],
)
def test_a_busy_hub_is_asked_again_and_then_told(client, hub_server, repo_id, folder, status, where):
    if "commit" in where:
        client.cli("push", folder, repo_id)
        (folder / "notes.txt").write_text("new")
    head = hub_server.hub.repos[repo_id].resolve("main").sha if "commit" in where else None
    hub_server.requests.clear()
    hub_server.faults.append(Fault("POST", where, status=status, times=4))
    pushed = client.cli("push", folder, repo_id)
    assert (pushed.code, f"status {status}" in pushed.err, pushed.err.count("\n")) == (3, True, 1), pushed
    assert hub_server.count("POST", where) == 4
    if head:
        assert hub_server.hub.repos[repo_id].resolve("main").sha == head
    assert client.cli("push", folder, repo_id).code == 0


def test_somebody_who_never_stops_pushing_is_told_and_kept(client, hub_server, repo_id, folder):
    client.cli("push", folder, repo_id)
    repo = hub_server.hub.repos[repo_id]
    weights = {
        name: hub_server.hub.read(repo_id, name) for name in hub_server.hub.files(repo_id) if "safetensors" in name
    }
    (folder / "notes.txt").write_text("mine")

    def intervene():
        note = {"path": f"theirs-{len(repo.commits)}.txt", "content": "aGk="}
        lines = [{"key": "header", "value": {"summary": "theirs"}}, {"key": "file", "value": note}]
        hub_server.hub.commit(repo, "main", lines, author="tester")

    hub_server.faults.append(Fault("POST", "/commit/", action=intervene, times=4))
    pushed = client.cli("push", folder, repo_id)
    assert (pushed.code, pushed.err.count("\n")) == (3, 1), pushed
    assert "status 412" in pushed.err
    assert titles(hub_server, repo_id)[:4] == ["theirs"] * 4
    assert "notes.txt" not in hub_server.hub.files(repo_id)
    assert all(hub_server.hub.read(repo_id, name) == content for name, content in weights.items())
    assert client.cli("push", folder, repo_id).code == 0
    assert hub_server.hub.read(repo_id, "notes.txt") == b"mine"
    assert sum(name.startswith("theirs") for name in hub_server.hub.files(repo_id)) == 4


def test_others_repositories_and_bad_names_are_refused(client, hub_server, repo_id, folder):
    for target, said in (("other/theirs", "refused to let you write"), ("no id at all", "not a Hub id")):
        pushed = client.cli("push", folder, target)
        assert (pushed.code, said in pushed.err, pushed.err.count("\n")) == (2, True, 1), pushed
    assert "other/theirs" not in hub_server.hub.repos


def test_an_answer_that_echoes_the_token_is_not_shown(client, hub_server, repo_id, folder):
    hub_server.faults.append(Fault("POST", "/commit/", status=422, message="Bearer hf_writer may not"))
    pushed = client.cli("push", folder, repo_id)
    assert pushed.code == 2
    assert "may not" in pushed.err
    assert "hf_writer" not in pushed.err + pushed.out


def test_a_page_goes_along(client, hub_server, repo_id, folder, tmp_path):
    page = tmp_path / "look.html"
    page.write_text("<!DOCTYPE html>")
    pushed = client.cli("push", folder, repo_id, "--with-report", page)
    assert pushed.code == 0, pushed
    assert hub_server.hub.read(repo_id, "routing.html") == b"<!DOCTYPE html>"
    page.write_text("hf_" + "a" * 34)
    pushed = client.cli("push", folder, repo_id, "--with-report", page)
    assert pushed.code == 2
    assert "token of the Hub" in pushed.err


def test_the_card_shows_the_routing_and_leads_to_the_page(client, hub_server, repo_id, folder, tmp_path):
    data, page, again = tmp_path / "law.txt", folder / "routing.html", tmp_path / "again.html"
    data.write_text("word1 word2 word3\n\nword4 word5")
    looked = client.cli("look", folder, "--data", data, "-o", page)
    assert looked.code == 0, looked
    assert client.cli("push", folder, repo_id).code == 0
    assert "(routing.html)" not in hub_server.hub.read(repo_id, "README.md").decode()
    assert client.cli("push", folder, repo_id, "--with-report", page).code == 0
    card = hub_server.hub.read(repo_id, "README.md").decode()
    picture = hub_server.hub.read(repo_id, re.search(r"!\[[^\]]+\]\((.+?)\)", card)[1])
    assert picture == (folder / "expert_load.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert "[What every expert does](routing.html)" in card
    assert hub_server.hub.read(repo_id, "routing.html") == page.read_bytes()
    assert client.cli("push", folder, repo_id, "--tag", "second").code == 0  # which leaves the page where it is
    assert hub_server.hub.read(repo_id, "routing.html") == page.read_bytes()
    assert "(routing.html)" in hub_server.hub.read(repo_id, "README.md").decode()
    assert client.cli("look", repo_id, "--data", data, "-o", again).code == 0
    assert f'<th scope="row">Revision</th><td>{hub_server.hub.repos[repo_id].branches["main"]}' in again.read_text()
