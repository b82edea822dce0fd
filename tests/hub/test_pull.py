"""`hf-sparse-moe pull`: all of one commit as it was announced, or nothing; and nothing outside the target."""

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hub_checkpoints import SHARD, contents, save_mixture
from hub_client import ClientProcess
from hub_server import Fault, HubServer


PUBLISHED = "tester/published"


@pytest.fixture(scope="module")
def published(hub_server, client, tmp_path_factory) -> dict[str, bytes]:
    """A checkpoint on the Hub, and the bytes of its files."""
    folder = save_mixture(tmp_path_factory.mktemp("checkpoint"), max_shard_size=SHARD)
    assert client.cli("push", folder, PUBLISHED, "--tag", "v1").code == 0
    return read(hub_server, PUBLISHED)


@pytest.fixture
def target(tmp_path: Path, hub_server) -> Path:
    hub_server.faults.clear()
    hub_server.requests.clear()
    return tmp_path / "below" / "pulled"


def read(hub_server, repo_id: str) -> dict[str, bytes]:
    names = hub_server.hub.files(repo_id) - {".gitattributes"}
    return {name: hub_server.hub.read(repo_id, name) for name in names}


def rewrite(hub_server, repo_id: str, **entries) -> None:
    """Make `repo_id` a copy of the published repository with other or more files, as no client could push them."""
    hub = hub_server.hub
    source = hub.repos[PUBLISHED].resolve("main")
    repo = hub.repos.get(repo_id) or hub.create(repo_id, False, "tester")
    files = dict(source.files) | {entry.path: entry for entry in entries.values()}
    repo.branches["main"] = hub.snapshot(repo, None, files, "rewritten", "", "tester").sha


def leftovers(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir()) if target.parent.exists() else []


def test_what_was_pushed_arrives_byte_for_byte(client, hub_server, published, target):
    pulled = client.cli("pull", PUBLISHED, target, "--json")
    assert pulled.code == 0, pulled
    report = json.loads(pulled.out)
    assert contents(target) == published
    assert report["revision"] == hub_server.hub.repos[PUBLISHED].resolve("main").sha
    assert report["files"] == sorted(published)
    assert leftovers(target) == ["pulled"]


def test_every_file_is_of_the_commit_that_the_branch_stood_at(client, hub_server, published, target, repo_id):
    rewrite(hub_server, repo_id)
    before = hub_server.hub.repos[repo_id].branches["main"]

    def move():
        rewrite(hub_server, repo_id, config=hub_server.hub.regular("config.json", b"{}"))

    hub_server.faults.append(Fault("HEAD", "/resolve/", action=move))
    assert json.loads(client.cli("pull", repo_id, target, "--json").out)["revision"] == before
    assert hub_server.hub.repos[repo_id].branches["main"] != before
    assert contents(target) == published


@pytest.mark.parametrize("revision", ["v1", "main"])
def test_a_tag_and_a_branch_are_resolved(client, hub_server, published, target, revision):
    pulled = client.cli("pull", PUBLISHED, target, "--revision", revision)
    assert hub_server.hub.repos[PUBLISHED].resolve("v1").sha in pulled.out


def test_a_pull_that_failed_goes_on(client, hub_server, published, target):
    others = sorted(name for name in published if name.endswith(".safetensors"))[1:]
    hub_server.faults.append(Fault("GET", f"/resolve/.*/{others[0]}|^/cdn/", status=500, times=100))
    hub_server.faults.insert(0, Fault("GET", "^/cdn/", action=lambda: None))  # lets the first shard through
    failed = client.cli("pull", PUBLISHED, target)
    assert (failed.code, failed.err.count("\n"), "status 500" in failed.err) == (3, 1, True), failed
    assert not target.exists()
    hub_server.faults.clear()
    hub_server.requests.clear()
    assert client.cli("pull", PUBLISHED, target).code == 0
    assert contents(target) == published
    assert hub_server.count("GET", "^/cdn/") == len(others)
    assert leftovers(target) == ["pulled"]


def test_a_download_that_is_cut_goes_on_where_it_was(client, hub_server, published, target):
    hub_server.faults.append(Fault("GET", "^/cdn/", cut=True, after=True))
    assert client.cli("pull", PUBLISHED, target).code == 0
    assert contents(target) == published


@pytest.mark.parametrize("spoil", [lambda data: data[:-1], lambda data: data[:-1] + bytes([data[-1] ^ 1])])
def test_a_shard_that_arrives_damaged_is_never_kept(client, hub_server, published, target, spoil):
    name = next(name for name in sorted(published) if name.endswith(".safetensors"))
    blob = hub_server.hub.blob(hub_server.hub.repos[PUBLISHED].resolve("main").files[name].sha256)
    blob.write_bytes(spoil(published[name]))
    try:
        pulled = client.cli("pull", PUBLISHED, target)
        assert (pulled.code, pulled.err.count("\n")) == (3, 1), pulled
        assert not target.exists()
        assert not list(target.parent.glob(f".pulled.*.partial/content/{name}"))
    finally:
        blob.write_bytes(published[name])
    assert client.cli("pull", PUBLISHED, target).code == 0
    assert contents(target) == published


@pytest.mark.parametrize(
    "name",
    ["../outside", "/tmp/outside", "a/../../outside", "..\\outside", "C:outside", ".git/x", "a//b", ".cache/x", "nul"],
)
def test_nothing_is_written_outside_the_target(client, hub_server, published, target, repo_id, name):
    entry = replace(hub_server.hub.regular("x", b"evil"), path=name)
    rewrite(hub_server, repo_id, evil=entry)
    pulled = client.cli("pull", repo_id, target)
    assert (pulled.code, "outside the target" in pulled.err) == (2, True), pulled
    assert leftovers(target) == []
    assert not (target.parent / "outside").exists()


def test_names_that_are_one_file_on_some_disks_are_refused(client, hub_server, published, target, repo_id):
    rewrite(hub_server, repo_id, other=hub_server.hub.regular("CONFIG.json", b"{}"))
    assert "one file" in client.cli("pull", repo_id, target).err


def test_a_link_in_a_repository_arrives_as_text(client, hub_server, published, target, repo_id):
    """git keeps a link as a file with its target in it; on the Hub it is a file too."""
    rewrite(hub_server, repo_id, link=hub_server.hub.regular("link.json", b"/etc/passwd"))
    assert client.cli("pull", repo_id, target).code == 0
    assert not (target / "link.json").is_symlink()
    assert (target / "link.json").read_bytes() == b"/etc/passwd"


def test_pickles_stay_there(client, hub_server, published, target, repo_id):
    rewrite(hub_server, repo_id, pickle=hub_server.hub.regular("training_args.bin", b"x"))
    pulled = client.cli("pull", repo_id, target)
    assert "left out: training_args.bin" in pulled.out
    assert contents(target) == published


def test_a_repository_without_safetensors_is_refused(client, hub_server, target, repo_id):
    hub_server.hub.create(repo_id, False, "tester")
    pulled = client.cli("pull", repo_id, target)
    assert (pulled.code, "no safetensors" in pulled.err) == (2, True)


def pull_on_a_full_disk(repo_id: str, target: str, free: int, full_after: int | None) -> dict:
    """Pulls where `shutil.disk_usage` says `free`, and a write fails after so many bytes, as a kernel does it."""
    import resource
    import shutil
    import signal

    import hf_sparse_moe.hub

    real = shutil.disk_usage
    shutil.disk_usage = lambda path: real(path)._replace(free=free)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if full_after is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (full_after, limits[1]))
    try:
        hf_sparse_moe.hub.pull(repo_id, target)
    except OSError as error:
        return {"kind": type(error).__name__, "message": str(error)}
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        shutil.disk_usage = real
    return {}


def test_a_disk_without_room_is_told_before_anything_is_fetched(client, hub_server, published, target):
    told = client(pull_on_a_full_disk, repo_id=PUBLISHED, target=str(target), free=1000, full_after=None)
    assert (told["kind"], "its disk has" in told["message"]) == ("OSError", True), told
    assert hub_server.count("GET", "/resolve/|^/cdn/") == 0


def test_a_disk_that_fills_up_is_told_and_a_second_call_goes_on(client, hub_server, published, target):
    told = client(pull_on_a_full_disk, repo_id=PUBLISHED, target=str(target), free=10**12, full_after=25_000)
    assert (told["kind"], "full" in told["message"]) == ("OSError", True), told
    assert os.strerror(errno.EFBIG) not in told["message"]
    assert not target.exists()
    assert client.cli("pull", PUBLISHED, target).code == 0
    assert contents(target) == published


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MB; where nobody may mount one, the test above stands in."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def fill(disk: Path, leave: int) -> None:
    (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - leave))


@pytest.mark.skipif(shutil.which("mount") is None, reason="needs mount")
def test_a_real_disk_that_fills_up_is_told_and_a_second_call_goes_on(client, hub_server, published, small_disk):
    target = small_disk / "pulled"
    hub_server.faults.append(Fault("GET", "^/cdn/", action=lambda: fill(small_disk, leave=8192)))
    pulled = client.cli("pull", PUBLISHED, target)
    assert (pulled.code, "is full" in pulled.err, pulled.err.count("\n")) == (2, True, 1), pulled
    assert not target.exists()
    again = client.cli("pull", PUBLISHED, target)
    assert (again.code, "Free some space" in again.err) == (2, True), again
    (small_disk / "filler").unlink()
    hub_server.requests.clear()
    assert client.cli("pull", PUBLISHED, target).code == 0
    assert contents(target) == published


def test_a_target_that_is_taken_is_left_alone(client, published, target):
    target.mkdir(parents=True)
    (target / "mine.txt").write_text("mine")
    pulled = client.cli("pull", PUBLISHED, target)
    assert (pulled.code, contents(target)) == (2, {"mine.txt": b"mine"})


def test_who_may_not_read_is_told_why(client, stranger_with_package, hub_server, published, target, repo_id):
    rewrite(hub_server, repo_id)
    repo = hub_server.hub.repos[repo_id]
    repo.gated = True
    for who, status in ((stranger_with_package, 401), (client_of_other(client), 403)):
        pulled = who("pull", repo_id, target)
        assert (pulled.code, "refused to show you" in pulled.err, f"status {status}" in pulled.err) == (
            2,
            True,
            True,
        ), pulled
    repo.readers.add("other")
    assert client_of_other(client)("pull", repo_id, target).code == 0
    repo.gated, repo.private = False, True
    for who in (stranger_with_package, client_of_other(client)):
        pulled = who("pull", repo_id, target.with_name("again"))
        assert (pulled.code, "or is private" in pulled.err) == (2, True), pulled


def test_a_wrong_token_is_named_even_where_none_is_needed(client, published, target):
    pulled = client_with(client, "hf_wrong")("pull", PUBLISHED, target)
    assert (pulled.code, "Invalid" in pulled.err) == (2, True), pulled
    assert "hf_wrong" not in pulled.err


@pytest.mark.parametrize(
    ("repo_id", "arguments", "said"),
    [
        (PUBLISHED, ("--revision", "nowhere"), "no branch, tag or commit `nowhere`"),
        ("tester/never-created", (), "does not exist"),
        ("not an id", (), "not a Hub id"),
    ],
)
def test_what_does_not_exist_is_named(client, published, target, repo_id, arguments, said):
    pulled = client.cli("pull", repo_id, target, *arguments)
    assert (pulled.code, said in pulled.err, pulled.err.count("\n")) == (2, True, 1), pulled
    assert leftovers(target) == []


@pytest.mark.parametrize("fault", [{"status": 429}, {"status": 503}, {"cut": True}])
def test_a_busy_hub_is_asked_again(client, hub_server, published, target, fault):
    hub_server.faults.append(Fault("GET", "^/api/models/", times=2, **fault))
    assert client.cli("pull", PUBLISHED, target).code == 0
    hub_server.faults.append(Fault("GET", "^/api/models/", times=9, **fault))
    pulled = client.cli("pull", PUBLISHED, target.with_name("again"))
    assert (pulled.code, pulled.err.count("\n")) == (3, 1), pulled


def set_offline(offline: bool) -> None:
    """What `HF_HUB_OFFLINE` sets when huggingface_hub is imported."""
    import huggingface_hub.constants

    huggingface_hub.constants.HF_HUB_OFFLINE = offline


def test_a_machine_that_is_set_to_stay_offline_is_told(client, published, target):
    saved = save_mixture(target.with_name("saved"))
    client(set_offline, offline=True)
    try:
        for command in (("pull", PUBLISHED, target), ("doctor", PUBLISHED), ("push", saved, "tester/offline")):
            told = client.cli(*command)
            assert (told.code, "stay offline" in told.err, told.err.count("\n")) == (3, True, 1), told
    finally:
        client(set_offline, offline=False)
    assert not target.exists()


def client_with(client: ClientProcess, token: str):
    """The client's command line with another token: it is read anew for each request."""

    def run(*arguments):
        client(set_token, token=token)
        try:
            return client.cli(*arguments)
        finally:
            client(set_token, token="hf_writer")

    return run


def client_of_other(client: ClientProcess):
    return client_with(client, "hf_other")


def set_token(token: str | None) -> None:
    import os

    os.environ.pop("HF_TOKEN", None)
    if token:
        os.environ["HF_TOKEN"] = token


@pytest.fixture
def stranger_with_package(client: ClientProcess, hub_server: HubServer) -> Iterator:
    """The command line of somebody who is not logged in."""
    return client_with(client, "")
