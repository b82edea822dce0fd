"""A small Hub on 127.0.0.1, so that the real `huggingface_hub` client can be tested over real HTTP.

It answers what the client asks for when it creates, fills, lists and downloads model repositories: create, whoami,
preupload, LFS batch, upload in one piece and in parts, verify, commit with parent check, tree, paths-info, model info,
refs, branches, tags, pull requests, resolve with ETag, redirect and Range, YAML validation, and the Hub's error codes.
Commits are immutable snapshots. Large files live on a second host name ("localhost"), as they do on the Hub's CDN, and
that host refuses requests which still carry the caller's token. Gated repositories are listed for everybody, and read
by those whom `Repo.readers` names. It does not serve xet.

    with HubServer(tokens={"hf_writer": "tester"}) as server:
        ...  # run a process with server.client_environment(token="hf_writer")
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml

from hub_store import Hub, HubError, Repo, card_errors


TREE_PAGE = 1000


@dataclass
class Fault:
    """Trouble for the requests that match `method` and `path` (a regular expression), `times` times.

    `action` runs before the request is served. A `status` is answered instead of the result; `cut` ends the connection
    instead, an upload in its middle. With `after` the request is served first, so that a commit happens although the
    client sees an error, and a cut comes in the middle of the answer. `message` is the reason that the client is told.
    """

    method: str
    path: str
    status: int | None = None
    cut: bool = False
    after: bool = False
    action: Callable[[], object] | None = None
    times: int = 1
    message: str = "injected"
    code: str | None = None


class HubServer:
    """The server in its threads, as a context manager. `url` is what `HF_ENDPOINT` must be."""

    def __init__(self, tokens: Mapping[str, str] | None = None):
        self.tokens = tokens or {"hf_writer": "tester"}

    def __enter__(self) -> "HubServer":
        self.folder = Path(tempfile.mkdtemp(prefix="hub-server-"))
        self.hub = Hub(self.folder, self.tokens)
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.part_size: int | None = None  # larger files are uploaded in parts of so many bytes
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_for(self))
        self._server.daemon_threads = True
        port = self._server.server_address[1]
        self.url, self.cdn_url = f"http://127.0.0.1:{port}", f"http://localhost:{port}"
        # a short poll, so that closing does not cost every test half a second
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        shutil.rmtree(self.folder)

    def client_environment(self, home: str | os.PathLike, token: str | None = "hf_writer") -> dict[str, str]:
        """The environment variables of a process whose Hub is this server and whose cache is `home`."""
        ours = {"HF_SPARSE_MOE_MEASURE": "0"}
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGINGFACE_"))}
        hub = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1"}
        return inherited | ours | hub | quiet | ({"HF_TOKEN": token} if token else {})

    def count(self, method: str, path: str) -> int:
        """How many requests matched, by method and a regular expression on the path."""
        return sum(seen == method and re.search(path, where) is not None for seen, where in self.requests)

    def fault_for(self, method: str, path: str) -> Fault | None:
        with self.hub.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None


ROUTES: list[tuple[str, re.Pattern, str]] = []


def route(method: str, pattern: str) -> Callable:
    """Registers a handler. `{rev}` and `{name}` are one quoted segment, `{repo}` is two, `{path}` the rest."""
    for name, regex in (("repo", "[^/]+/[^/]+?"), ("rev", "[^/]+"), ("name", "[^/]+"), ("path", ".+")):
        pattern = pattern.replace(f"{{{name}}}", f"(?P<{name}>{regex})")

    def register(function: Callable) -> Callable:
        ROUTES.append((method, re.compile(pattern), function.__name__))
        return function

    return register


def _handler_for(server: HubServer) -> type["HubHandler"]:
    return type("BoundHubHandler", (HubHandler,), {"server_state": server, "hub": server.hub})


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits for the client's delayed acknowledgement
    server_state: HubServer
    hub: Hub

    def log_message(self, *args: object) -> None:
        """Says nothing: what was asked is in `HubServer.requests`."""

    # one request
    def _serve(self) -> None:
        url = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        self.server_state.requests.append((self.command, url.path))
        fault = self.server_state.fault_for(self.command, url.path)
        if fault and fault.action:
            fault.action()
        if fault is None or not (fault.cut or fault.status):
            self._answer(*self._result(url.path))
            return
        self.close_connection = True
        if fault.after:
            answer = self._result(url.path)
        else:
            if fault.cut and self.command == "PUT":
                self.rfile.read(int(self.headers["Content-Length"]) // 2)
                return
            for _ in self._body():  # bytes left unread would reset the connection before an answer arrives
                pass
        if fault.status:
            code = {"X-Error-Code": fault.code} if fault.code else {}
            self._answer(fault.status, {"X-Error-Message": fault.message} | code, {"error": fault.message})
        elif fault.after:
            self._answer(*answer, cut=True)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _result(self, path: str) -> tuple[int, dict, object]:
        # what is uploaded goes to the disk in pieces, and only its own route reads it
        self.content = b"" if self.command == "PUT" else b"".join(self._body())
        try:
            for method, pattern, name in ROUTES:
                asked = "GET" if self.command == "HEAD" else self.command
                if method == asked and (match := pattern.fullmatch(path)):
                    return getattr(self, name)(**{key: unquote(value) for key, value in match.groupdict().items()})
            raise HubError(404, f"Sorry, this server has no {self.command} {path}")
        except HubError as error:
            code = {"X-Error-Code": error.code} if error.code else {}
            return error.status, {"X-Error-Message": error.message} | code | error.headers, error.body

    def _answer(self, status: int, headers: Mapping[str, str], payload: object, cut: bool = False) -> None:
        body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        default = {"Content-Type": "application/json; charset=utf-8", "Content-Length": str(len(body))}
        self.send_response(status)
        for key, value in (default | dict(headers)).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)

    def _body(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length", 0))
        while left > 0 and (chunk := self.rfile.read(min(left, 1 << 20))):
            left -= len(chunk)
            yield chunk

    # who asks, and for what
    def user(self, required: bool = False) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise HubError(401, "Invalid credentials in Authorization header")
        if required and not token:
            raise HubError(401, "Invalid username or password.")
        return self.hub.tokens[token] if token else None

    def repo(self, repo: str, write: bool = False) -> Repo:
        """The repository, for one who may see it: to all others it does not exist."""
        user = self.user(required=write)
        found = self.hub.repos.get(repo)
        owner = repo.split("/")[0]
        if found is None or (found.private and user != owner):
            raise HubError(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and user != owner:
            raise HubError(403, f"You do not have write access to {repo}")
        return found

    def readable(self, repo: str) -> Repo:
        """The repository, for one who may read its files."""
        found, user = self.repo(repo), self.user()
        if found.gated and user != repo.split("/")[0] and user not in found.readers:
            message = f"Access to model {repo} is restricted and you are not in the authorized list."
            raise HubError(403 if user else 401, message, "GatedRepo")
        return found

    @property
    def sent(self) -> dict:
        return json.loads(self.content or b"{}")

    # accounts and repositories
    @route("GET", "/api/whoami-v2")
    def whoami(self):
        name = self.user(required=True)
        return 200, {}, {"type": "user", "name": name, "orgs": [], "auth": {"accessToken": {"role": "write"}}}

    @route("POST", "/api/repos/create")
    def create_repo(self):
        user, sent = self.user(required=True), self.sent
        repo_id = f"{sent.get('organization') or user}/{sent['name']}"
        if repo_id.split("/")[0] != user:
            raise HubError(403, f"You don't have the rights to create a model under the namespace of {repo_id}")
        url = {"url": f"{self.server_state.url}/{repo_id}"}
        try:
            self.hub.create(repo_id, sent.get("visibility") == "private", user)
        except HubError as error:
            error.body |= url
            raise
        return 200, {}, url

    @route("DELETE", "/api/repos/delete")
    def delete_repo(self):
        repo_id = f"{self.sent.get('organization') or self.user()}/{self.sent['name']}"
        del self.hub.repos[self.repo(repo_id, write=True).id]
        return 200, {}, {}

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self):
        errors = card_errors(self.sent["content"])
        return 400 if errors else 200, {}, {"errors": errors, "warnings": []}

    # references
    @route("GET", "/api/models/{repo}/refs")
    def refs(self, repo):
        found = self.repo(repo)

        def listed(references: dict[str, str], prefix: str) -> list[dict]:
            return [{"name": n, "ref": prefix + n, "targetCommit": sha} for n, sha in references.items()]

        answer = {"branches": listed(found.branches, "refs/heads/"), "tags": listed(found.tags, "refs/tags/")}
        return 200, {}, answer | {"converts": [], "pullRequests": listed(found.pull_requests, "")}

    @route("POST", "/api/models/{repo}/branch/{name}")
    def create_branch(self, repo, name):
        found = self.repo(repo, write=True)
        if name in found.branches:
            raise HubError(409, f"Reference already exists: {name}")
        found.branches[name] = found.resolve(self.sent.get("startingPoint", "main")).sha
        return 200, {}, {}

    @route("POST", "/api/models/{repo}/tag/{rev}")
    def create_tag(self, repo, rev):
        found = self.repo(repo, write=True)
        if self.sent["tag"] in found.tags:
            raise HubError(409, f"Tag already exists: {self.sent['tag']}")
        found.tags[self.sent["tag"]] = found.resolve(rev).sha
        return 200, {}, {}

    @route("GET", "/api/models/{repo}/commits/{rev}")
    def commits(self, repo, rev):
        found = self.repo(repo)
        history, commit = [], found.resolve(rev)
        while commit:
            authors = [{"user": commit.author}]
            entry = {"id": commit.sha, "title": commit.title, "message": commit.message, "date": commit.date}
            history.append(entry | {"authors": authors})
            commit = found.commits.get(commit.parent)
        return 200, {}, history

    # reading
    @route("GET", "/api/models/{repo}")
    @route("GET", "/api/models/{repo}/revision/{rev}")
    def model_info(self, repo, rev="main"):
        found = self.repo(repo)
        commit = found.resolve(rev)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        if "blobs" in self.query:
            for sibling in siblings:
                entry = commit.files[sibling["rfilename"]]
                sibling |= {"size": entry.size, "blobId": entry.oid}
                if entry.lfs:
                    sibling["lfs"] = {"sha256": entry.sha256, "size": entry.size, "pointerSize": 134}
        card = {}
        if "README.md" in commit.files:
            readme = self.hub.blob(commit.files["README.md"].sha256).read_text(encoding="utf-8")
            front_matter = re.match(r"---\n(.*?)\n---", readme, re.DOTALL)
            card = (yaml.safe_load(front_matter[1]) if front_matter else None) or {}
        info = {"_id": "0" * 24, "id": repo, "modelId": repo, "author": repo.split("/")[0], "sha": commit.sha}
        gated = "manual" if found.gated else False
        info |= {"private": found.private, "gated": gated, "disabled": False, "lastModified": commit.date}
        info |= {"tags": card.get("tags", []), "cardData": card, "siblings": siblings, "downloads": 0, "likes": 0}
        return 200, {}, info | {key: card[key] for key in ("library_name", "pipeline_tag") if key in card}

    @route("GET", "/api/models/{repo}/tree/{rev}")
    @route("GET", "/api/models/{repo}/tree/{rev}/{path}")
    def tree(self, repo, rev, path=""):
        commit = self.repo(repo).resolve(rev)
        prefix = path.rstrip("/") + "/" if path else ""
        below = [entry for name, entry in commit.files.items() if name.startswith(prefix)]
        if path and not below:
            raise HubError(404, f"{path} does not exist on {rev}", "EntryNotFound")
        recursive = self.query.get("recursive", "false").lower() == "true"
        listed = {}
        for entry in below:
            parents = [str(folder) for folder in list(PurePosixPath(entry.path).parents)[:-1]]
            parents = [folder for folder in parents if folder.startswith(prefix)]
            for folder in parents if recursive else parents[-1:]:
                oid = hashlib.sha1(f"{commit.sha}{folder}".encode()).hexdigest()
                listed[folder] = {"type": "directory", "path": folder, "size": 0, "oid": oid}
            if recursive or not parents:
                listed[entry.path] = entry.describe()
        start = int(self.query.get("cursor", 0))
        page, headers = [listed[name] for name in sorted(listed)][start : start + TREE_PAGE], {}
        if start + TREE_PAGE < len(listed):
            here = f"{self.server_state.url}{urlsplit(self.path).path}"
            headers["Link"] = f'<{here}?recursive={recursive}&cursor={start + TREE_PAGE}>; rel="next"'
        return 200, headers, page

    @route("POST", "/api/models/{repo}/paths-info/{rev}")
    def paths_info(self, repo, rev):
        files = self.repo(repo).resolve(rev).files
        wanted = parse_qs(self.content.decode()).get("paths", [])
        return 200, {}, [files[path].describe() for path in wanted if path in files]

    @route("GET", "/{repo}/resolve/{rev}/{path}")
    def resolve(self, repo, rev, path):
        commit = self.readable(repo).resolve(rev)
        headers = {"X-Repo-Commit": commit.sha}
        if path not in commit.files:
            error = HubError(404, "Entry not found", "EntryNotFound")
            error.headers = headers
            raise error
        entry = commit.files[path]
        if entry.lfs:
            location = f"{self.server_state.cdn_url}/cdn/{entry.sha256}?filename={quote(path)}"
            linked = {"X-Linked-Size": str(entry.size), "X-Linked-Etag": f'"{entry.etag}"', "Location": location}
            return 302, headers | linked, b""
        return self._file(entry.sha256, entry.etag, headers)

    @route("GET", "/cdn/{name}")
    def cdn(self, name):
        if "Authorization" in self.headers:  # a storage service refuses a signed address plus a token
            raise HubError(400, "Only one auth mechanism allowed")
        return self._file(name, name, {})

    def _file(self, sha256: str, etag: str, headers: dict[str, str]) -> tuple[int, dict, bytes]:
        content = self.hub.blob(sha256).read_bytes()
        headers = headers | {"ETag": f'"{etag}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return 200, headers, content
        start, end = int(asked[1]), min(int(asked[2] or len(content) - 1), len(content) - 1)
        if start >= len(content):
            return 416, {"Content-Range": f"bytes */{len(content)}"}, b""
        return 206, headers | {"Content-Range": f"bytes {start}-{end}/{len(content)}"}, content[start : end + 1]

    # writing
    @route("POST", "/api/models/{repo}/preupload/{rev}")
    def preupload(self, repo, rev):
        head = self.repo(repo, write=True).resolve(rev)
        answer = []
        for file in self.sent["files"]:
            known = head.files.get(file["path"])
            mode = "lfs" if self.hub.is_large(head, file) else "regular"
            answer.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
            if known is not None:
                answer[-1]["oid"] = known.etag
        return 200, {}, {"files": answer}

    @route("POST", r"/{repo}\.git/info/lfs/objects/batch")
    def lfs_batch(self, repo):
        known, objects, part_size = self.repo(repo, write=True).lfs_objects, [], self.server_state.part_size
        in_parts = part_size is not None and "multipart" in self.sent["transfers"]
        for wanted in self.sent["objects"]:
            upload = {"href": f"{self.server_state.cdn_url}/upload/{wanted['oid']}"}
            if in_parts and wanted["size"] > part_size:
                parts = range(1, -(-wanted["size"] // part_size) + 1)
                addresses = {str(part): f"{upload['href']}/part/{part}" for part in parts}
                complete = f"{self.server_state.url}/complete/{wanted['oid']}"
                upload = {"href": complete, "header": {"chunk_size": str(part_size)} | addresses}
            verify = {"href": f"{self.server_state.url}/{repo}.git/info/lfs/objects/verify"}
            actions = {} if wanted["oid"] in known else {"actions": {"upload": upload, "verify": verify}}
            objects.append({"oid": wanted["oid"], "size": wanted["size"]} | actions)
        answer = {"transfer": "multipart" if in_parts else "basic", "objects": objects}
        return 200, {"Content-Type": "application/vnd.git-lfs+json"}, answer

    @route("PUT", "/upload/{name}")
    def lfs_upload(self, name):
        self._store(name, self._body())
        return 200, {}, b""

    @route("PUT", "/upload/{name}/part/{rev}")
    def lfs_upload_part(self, name, rev):
        content = b"".join(self._body())
        self.hub.blob(f"{name}.{rev}").write_bytes(content)
        return 200, {"ETag": f'"{hashlib.md5(content).hexdigest()}"'}, b""

    @route("POST", "/complete/{name}")
    def lfs_complete(self, name):
        if self.sent["oid"] != name:
            raise HubError(400, "The parts are not those of this object")
        paths = [self.hub.blob(f"{name}.{part['partNumber']}") for part in self.sent["parts"]]
        for path, part in zip(paths, self.sent["parts"], strict=True):
            if not path.exists() or part["etag"] != f'"{hashlib.md5(path.read_bytes()).hexdigest()}"':
                raise HubError(400, f"Part {part['partNumber']} was not uploaded")
        self._store(name, (path.read_bytes() for path in paths))
        for path in paths:
            path.unlink()
        return 200, {}, {}

    def _store(self, sha256: str, chunks: Iterator[bytes]) -> None:
        with tempfile.NamedTemporaryFile(dir=self.hub.folder, delete=False) as file:
            digest = hashlib.sha256()
            for chunk in chunks:
                digest.update(chunk)
                file.write(chunk)
        if digest.hexdigest() != sha256:
            os.unlink(file.name)
            raise HubError(400, "The content does not have the announced sha256")
        os.replace(file.name, self.hub.blob(sha256))

    @route("POST", r"/{repo}\.git/info/lfs/objects/verify")
    def lfs_verify(self, repo):
        found, sent = self.repo(repo, write=True), self.sent
        blob = self.hub.blob(sent["oid"])
        if not blob.exists() or blob.stat().st_size != sent["size"]:
            raise HubError(404, "The object was not uploaded, or has another size")
        found.lfs_objects.add(sent["oid"])
        return 200, {}, {}

    @route("POST", "/api/models/{repo}/commit/{rev}")
    def commit(self, repo, rev):
        found, lines = self.repo(repo, write=True), [json.loads(line) for line in self.content.splitlines()]
        commit, number = self.hub.commit(found, rev, lines, self.user(), "create_pr" in self.query)
        home = f"{self.server_state.url}/{repo}"
        answer = {"success": True, "commitOid": commit.sha, "commitUrl": f"{home}/commit/{commit.sha}"}
        if number:
            answer["pullRequestUrl"] = f"{home}/discussions/{number.split('/')[-1]}"
        return 200, {}, answer
