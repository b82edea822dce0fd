"""What the tests' Hub holds: repositories as immutable snapshots of files, and the bytes behind them.

`hub_server.py` puts HTTP in front of it. A commit is all or nothing, and refused when its parent is not the head.
"""

import base64
import codecs
import hashlib
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

import yaml


LARGE = ("*.bin", "*.gz", "*.h5", "*.model", "*.npy", "*.npz", "*.parquet", "*.pkl", "*.pt", "*.safetensors")
GIT_ATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LARGE).encode()
REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")


class HubError(Exception):
    """An answer other than success: the status, the Hub's `X-Error-Code` if it has one, and the sentence."""

    def __init__(self, status: int, message: str, code: str | None = None, body: dict | None = None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.body = body or {"error": message}
        self.headers: dict[str, str] = {}


@dataclass(frozen=True)
class Entry:
    """One file of a snapshot: `oid` is its git object, `sha256` names its bytes in the store."""

    path: str
    size: int
    oid: str
    sha256: str
    lfs: bool

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid

    def describe(self) -> dict:
        entry = {"type": "file", "path": self.path, "size": self.size, "oid": self.oid}
        return entry | {"lfs": {"oid": self.sha256, "size": self.size, "pointerSize": 134}} if self.lfs else entry


@dataclass(frozen=True)
class Commit:
    sha: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: Mapping[str, Entry]


@dataclass
class Repo:
    id: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pull_requests: dict[str, str] = field(default_factory=dict)
    lfs_objects: set[str] = field(default_factory=set)
    gated: bool = False
    readers: set[str] = field(default_factory=set)  # of a gated repository, beside its owner

    def resolve(self, revision: str) -> Commit:
        sha = self.branches.get(revision) or self.tags.get(revision) or self.pull_requests.get(revision) or revision
        if sha not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[sha]


def _git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def card_errors(readme: str) -> list[dict]:
    """What the Hub's YAML validation finds in a model card, as far as this project's fields go."""
    front_matter = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", readme, re.DOTALL)
    try:
        data = yaml.safe_load(front_matter[1]) if front_matter else {}
    except yaml.YAMLError as error:
        return [{"message": f"YAML: {error}"}]
    if not isinstance(data, dict):
        return [{"message": "metadata must be a mapping"}]
    errors = []
    base = data.get("base_model", [])
    for value in base if isinstance(base, list) else [base]:
        if not isinstance(value, str) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", value):
            errors.append({"message": f'"base_model" with value {value!r} is not valid. Use a model id.'})
    if data.get("base_model_relation", "finetune") not in ("adapter", "finetune", "merge", "quantized"):
        errors.append({"message": '"base_model_relation" must be one of [adapter, finetune, merge, quantized]'})
    tags = data.get("tags") or []
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        errors.append({"message": '"tags" must be an array of strings'})
    for name in ("library_name", "license", "pipeline_tag"):
        if not isinstance(data.get(name, ""), str):
            errors.append({"message": f'"{name}" must be a string'})
    return errors


class Hub:
    """The repositories and the bytes in them. Thread safe through one lock around whatever changes a reference."""

    def __init__(self, folder: Path, tokens: Mapping[str, str]):
        self.folder, self.tokens = folder, dict(tokens)
        self.repos: dict[str, Repo] = {}
        self.lock = threading.RLock()

    # bytes
    def blob(self, sha256: str) -> Path:
        return self.folder / sha256

    def put(self, content: bytes) -> str:
        sha256 = hashlib.sha256(content).hexdigest()
        self.blob(sha256).write_bytes(content)
        return sha256

    def read(self, repo_id: str, path: str, revision: str = "main") -> bytes:
        return self.blob(self.repos[repo_id].resolve(revision).files[path].sha256).read_bytes()

    def files(self, repo_id: str, revision: str = "main") -> set[str]:
        return set(self.repos[repo_id].resolve(revision).files)

    # repositories
    def create(self, repo_id: str, private: bool, author: str) -> Repo:
        with self.lock:
            if repo_id in self.repos:
                raise HubError(409, "You already created this model repo")
            if not REPO_ID.fullmatch(repo_id):
                raise HubError(400, f"Invalid repo id: {repo_id}")
            repo = self.repos[repo_id] = Repo(repo_id, private)
            files = {".gitattributes": self.regular(".gitattributes", GIT_ATTRIBUTES)}
            repo.branches["main"] = self.snapshot(repo, None, files, "initial commit", "", author).sha
            return repo

    def regular(self, path: str, content: bytes) -> Entry:
        return Entry(path, len(content), _git_blob(content), self.put(content), lfs=False)

    def large(self, repo: Repo, path: str, sha256: str) -> Entry:
        if sha256 not in repo.lfs_objects:
            raise HubError(400, "Your push was rejected because an LFS pointer pointed to a file that does not exist")
        size = self.blob(sha256).stat().st_size
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        return Entry(path, size, _git_blob(pointer), sha256, lfs=True)

    def snapshot(
        self, repo: Repo, parent: str | None, files: dict[str, Entry], title: str, message: str, author: str
    ) -> Commit:
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
        listing = json.dumps([parent, title, message, len(repo.commits), sorted((p, e.oid) for p, e in files.items())])
        commit = Commit(hashlib.sha1(listing.encode()).hexdigest(), parent, title, message, author, date, dict(files))
        repo.commits[commit.sha] = commit
        return commit

    def commit(
        self, repo: Repo, revision: str, lines: list[dict], author: str, create_pr: bool = False
    ) -> tuple[Commit, str | None]:
        """Applies the operations as one commit; returns it and the pull request it opened, if it opened one."""
        with self.lock:
            head = repo.resolve(revision)
            header = next(line["value"] for line in lines if line["key"] == "header")
            if header.get("parentCommit", head.sha) != head.sha:
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            files = dict(head.files)
            for line in lines:
                self._apply(repo, files, line["key"], line["value"])
            commit = self.snapshot(repo, head.sha, files, header["summary"], header.get("description", ""), author)
            if create_pr:
                number = f"refs/pr/{len(repo.pull_requests) + 1}"
                repo.pull_requests[number] = commit.sha
                return commit, number
            references = repo.pull_requests if revision in repo.pull_requests else repo.branches
            if revision not in references:
                raise HubError(404, f"Cannot commit to {revision}: it is not a branch", "RevisionNotFound")
            references[revision] = commit.sha
            return commit, None

    def _apply(self, repo: Repo, files: dict[str, Entry], key: str, value: dict) -> None:
        path = value.get("path", "")
        if path.startswith("/") or ".." in path.split("/"):
            raise HubError(400, f"Invalid path: {path}")
        if key == "file":
            content = base64.b64decode(value["content"])
            if path == "README.md" and (errors := card_errors(content.decode())):
                raise HubError(400, "Invalid metadata in README.md", body={"errors": errors})
            files[path] = self.regular(path, content)
        elif key == "lfsFile":
            files[path] = self.large(repo, path, value["oid"])
        elif key == "deletedFile":
            if files.pop(path, None) is None:
                raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        elif key == "deletedFolder":
            for name in [name for name in files if name.startswith(path.rstrip("/") + "/")]:
                del files[name]
        elif key != "header":
            raise HubError(400, f"Unknown operation {key}")

    def is_large(self, head: Commit, file: dict) -> bool:
        attributes, patterns = head.files.get(".gitattributes"), []
        if attributes:
            lines = self.blob(attributes.sha256).read_text().splitlines()
            patterns = [line.split()[0] for line in lines if "filter=lfs" in line]
        name = PurePosixPath(file["path"]).name
        if file["size"] > 10_000_000 or any(fnmatch(name, pattern) for pattern in patterns):
            return True
        try:  # the sample may end inside a character, which an incremental decoder forgives
            return "\0" in codecs.getincrementaldecoder("utf-8")().decode(base64.b64decode(file["sample"]))
        except UnicodeDecodeError:
            return True
