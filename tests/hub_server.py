"""A Hugging Face Hub in one file: what the real client needs to push, pull and list models, on loopback.

It keeps accounts, repositories with commits, branches, tags, visibility and gates in memory, stores large files by
the LFS protocol, serves them directly or redirects to "another host", checks the metadata of model cards, logs every
request, and fails on demand. `python tests/hub_server.py` starts one to try the examples against.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LICENCES = ("apache-2.0", "mit", "cc-by-4.0", "cc-by-nc-4.0", "openrail", "other")  # of the Hub's list, a few
MODEL_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


class File(NamedTuple):
    data: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        if self.lfs:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


class Commit(NamedTuple):
    oid: str
    parent: str | None
    title: str
    files: dict[str, File]


@dataclass
class Repo:
    id: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: list[str] = field(default_factory=list)
    readers: set[str] | None = None  # who was let through the gate; None: no gate

    @property
    def owner(self) -> str:
        return self.id.partition("/")[0]

    def add(self, parent: str | None, title: str, files: dict[str, File]) -> Commit:
        oid = hashlib.sha1(repr((self.id, parent, title, sorted((k, f.oid) for k, f in files.items()))).encode())
        commit = Commit(oid.hexdigest(), parent, title, files)
        self.commits[commit.oid] = commit
        return commit

    def find(self, revision: str) -> Commit | None:
        pulls = {f"refs/pr/{number}": oid for number, oid in enumerate(self.pulls, 1)}
        return self.commits.get({**pulls, **self.tags, **self.branches}.get(revision, revision))

    @property
    def head(self) -> Commit:
        return self.commits[self.branches["main"]]

    @property
    def card(self) -> dict[str, Any]:
        readme = self.head.files.get("README.md")
        try:
            return front_matter(readme.data.decode()) if readme else {}
        except yaml.YAMLError:
            return {}


class Request(NamedTuple):
    method: str
    path: str
    host: str
    headers: dict[str, str]
    body: bytes


class Answer(Exception):  # raised as well as returned: a refusal ends the handling
    def __init__(self, status: int = 200, body: Any = None, headers: dict[str, str] | None = None) -> None:
        self.status, self.headers = status, dict(headers or {})
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode() if body is not None else b""


@dataclass
class Fault:
    method: str
    path: str  # regular expression, searched
    answer: Answer
    times: int


def refuse(status: int, code: str = "", message: str = "") -> Answer:
    headers = {"X-Error-Code": code, "X-Error-Message": message}
    return Answer(status, {"error": message}, {key: value for key, value in headers.items() if value})


def front_matter(text: str) -> dict[str, Any]:
    match = re.match(r"---\n(.*?)\n---\n", text, re.S)
    data = yaml.safe_load(match.group(1)) if match else {}
    return data if isinstance(data, dict) else {}


def problems(card: dict[str, Any]) -> list[str]:
    """What the Hub has against the metadata of a model card; the rules that convlora could break."""
    found = []
    bases = card.get("base_model") or []
    for base in [bases] if isinstance(bases, str) else bases:
        if not MODEL_ID.fullmatch(base):
            found.append(f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.')
    if (licence := card.get("license")) is not None and licence not in LICENCES:
        found.append(f'"license" must be one of [{", ".join(LICENCES)}]')
    if not all(isinstance(tag, str) for tag in card.get("tags") or ()):
        found.append('"tags" must be a list of strings')
    if not isinstance(card.get("library_name", ""), str) or not isinstance(card.get("license_link", ""), str):
        found.append('"library_name" and "license_link" must be strings')
    return found


class HubServer:
    """`with HubServer() as hub:` serves at `hub.endpoint` until the block ends.

    `lfs`: whether .safetensors files go by LFS (for clients with xet off) or inside the commit like small files.
    `cdn`: whether large files are served by another host name, to which a client must not send its token.
    """

    def __init__(self, lfs: bool = False, cdn: bool = False, port: int = 0) -> None:
        self.lfs, self.cdn = lfs, cdn
        self.tokens = {"hf_me": ("me", True), "hf_reader": ("me", False), "hf_other": ("other", True)}
        self.repos: dict[str, Repo] = {}
        self.stored: dict[str, bytes] = {}  # LFS objects by their SHA-256
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", port), type("Bound", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        self.cdn_host = f"http://localhost:{self.server.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        from huggingface_hub.utils import close_session

        close_session()  # kept-alive connections would outlive the server
        self.server.shutdown()
        self.server.server_close()

    # ------------------------------------------------------------------------------------------ for tests

    def make(self, repo_id: str, private: bool = True, gated: bool = False, **files: bytes) -> Repo:
        """A repository as it is after its creation, with `files` (a double underscore stands for a dot)."""
        repo = self.repos[repo_id] = Repo(repo_id, private, readers=set() if gated else None)
        first = {".gitattributes": File(b"*.safetensors filter=lfs\n", False)}
        held = {name.replace("__", "."): File(data, False) for name, data in files.items()}
        repo.branches["main"] = repo.add(None, "initial commit", first | held).oid
        return repo

    def fail(self, method: str, path: str, status: int, code: str = "", message: str = "", times: int = 1) -> None:
        """Answer the next `times` requests that match with an error, and do nothing."""
        self.faults.append(Fault(method, path, refuse(status, code, message), times))

    def sent(self, method: str = "", path: str = "") -> list[Request]:
        """The requests so far of a method, with `path` (a regular expression) in theirs."""
        with self.lock:
            return [r for r in self.requests if method in ("", r.method) and re.search(path, r.path)]

    # ------------------------------------------------------------------------------------------ access

    def account(self, request: Request) -> tuple[str | None, bool]:
        """Who asks, and whether the token may write."""
        header = request.headers.get("authorization")
        if header is None:
            return None, False
        if header.removeprefix("Bearer ") not in self.tokens:
            raise refuse(401, message="Invalid credentials in Authorization header")
        return self.tokens[header.removeprefix("Bearer ")]

    def repo(self, request: Request, repo_id: str, write: bool = False, content: bool = False) -> Repo:
        user, may_write = self.account(request)
        repo = self.repos.get(repo_id)
        if repo is None or (repo.private and user != repo.owner):
            # A private repository and none at all look the same from outside.
            raise refuse(401 if user is None else 404, "RepoNotFound", "Repository not found")
        if content and repo.readers is not None and user not in {repo.owner, *repo.readers}:
            raise refuse(401 if user is None else 403, "GatedRepo", f"Access to model {repo_id} is restricted.")
        if write and (user != repo.owner or not may_write):
            raise refuse(403, message=f"You don't have the rights to write to {repo_id}")
        return repo

    def commit(self, repo: Repo, revision: str) -> Commit:
        commit = repo.find(unquote(revision))
        if commit is None:
            raise refuse(404, "RevisionNotFound", f"Invalid rev id: {unquote(revision)}")
        return commit

    # ------------------------------------------------------------------------------------------ the protocol

    def answer(self, request: Request) -> Answer:
        with self.lock:
            self.requests.append(request)
            for fault in self.faults:
                if fault.times and fault.method == request.method and re.search(fault.path, request.path):
                    fault.times -= 1
                    return fault.answer
            path = urlsplit(request.path).path
            for method, pattern, handle in ROUTES:
                if request.method in method.split("|") and (match := re.fullmatch(pattern, path)):
                    return handle(self, request, *match.groups())
        return refuse(404, message=f"this test server does not know {request.method} {path}")

    def whoami(self, request: Request) -> Answer:
        user, _ = self.account(request)
        return Answer(200, {"name": user, "type": "user"}) if user else refuse(401, message="Invalid username")

    def create(self, request: Request) -> Answer:
        user, may_write = self.account(request)
        asked = json.loads(request.body)
        owner = asked.get("organization") or user
        if user is None:
            return refuse(401, message="Invalid username or password.")
        if owner != user or not may_write:
            return refuse(403, message=f"You don't have the rights to create a model under the namespace {owner!r}")
        repo_id = f"{owner}/{asked['name']}"
        url = f"{self.endpoint}/{repo_id}"
        if repo_id in self.repos:
            return Answer(409, {"error": "You already created this model repo", "url": url})
        self.make(repo_id, asked.get("visibility", "public") == "private")
        return Answer(200, {"url": url, "name": repo_id, "id": repo_id})

    def validate(self, request: Request) -> Answer:
        text = json.loads(request.body)["content"]
        try:
            found = problems(front_matter(text))
        except yaml.YAMLError as error:
            found = [f"YAML: {error}"]
        return Answer(400 if found else 200, {"errors": [{"message": m} for m in found], "warnings": []})

    def preupload(self, request: Request, repo_id: str, revision: str) -> Answer:
        create_pr = "create_pr=1" in request.path
        repo = self.repo(request, repo_id, write=not create_pr)
        held = self.commit(repo, revision).files
        answers = []
        for asked in json.loads(request.body)["files"]:
            lfs = self.lfs and asked["path"].endswith((".safetensors", ".png"))
            answer = {"path": asked["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if asked["path"] in held:
                answer["oid"] = held[asked["path"]].oid
            answers.append(answer)
        return Answer(200, {"files": answers})

    def lfs_batch(self, request: Request, repo_id: str) -> Answer:
        self.repo(request, repo_id, write=True)
        objects = []
        for asked in json.loads(request.body)["objects"]:
            entry = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.stored:
                upload = {"href": f"{self.cdn_host}/upload/{asked['oid']}"}
                entry["actions"] = {"upload": upload, "verify": {"href": f"{self.endpoint}/{repo_id}.git/verify"}}
            objects.append(entry)
        return Answer(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, request: Request, oid: str) -> Answer:
        if hashlib.sha256(request.body).hexdigest() != oid:
            return refuse(400, message="the content does not have the announced SHA-256")
        self.stored[oid] = request.body
        return Answer()

    def lfs_verify(self, request: Request, repo_id: str) -> Answer:
        self.repo(request, repo_id, write=True)
        asked = json.loads(request.body)
        good = len(self.stored.get(asked["oid"], b"")) == asked["size"]
        return Answer(200, {}) if good else refuse(404, message="no such object")

    def push(self, request: Request, repo_id: str, revision: str) -> Answer:
        create_pr = "create_pr=1" in request.path
        repo = self.repo(request, repo_id, write=not create_pr)
        revision = unquote(revision)
        parent = self.commit(repo, revision)
        lines = [json.loads(line) for line in request.body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit") and repo.find(header["parentCommit"]) is not parent:
            return refuse(412, message="A commit has happened since. Please refresh and try again.")
        files = dict(parent.files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.stored:
                    return refuse(400, message=f"the LFS object of {value['path']} was never uploaded")
                files[value["path"]] = File(self.stored[value["oid"]], True)
            else:
                return refuse(400, message=f"this test server does not know {line['key']}")
        if "README.md" in files and (found := problems(front_matter(files["README.md"].data.decode()))):
            return refuse(400, message="; ".join(found))
        commit = repo.add(parent.oid, header["summary"], files)
        url = f"{self.endpoint}/{repo_id}/commit/{commit.oid}"
        answer = {"success": True, "commitOid": commit.oid, "commitUrl": url}
        if create_pr:
            repo.pulls.append(commit.oid)
            answer["pullRequestUrl"] = f"{self.endpoint}/{repo_id}/discussions/{len(repo.pulls)}"
        else:
            repo.branches[revision] = commit.oid
        return Answer(200, answer)

    def resolve(self, request: Request, repo_id: str, revision: str, path: str) -> Answer:
        repo = self.repo(request, repo_id, content=True)
        commit = self.commit(repo, revision)
        file = commit.files.get(unquote(path))
        if file is None:
            return refuse(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{file.oid}"'}
        if file.lfs and self.cdn:
            linked = {"X-Linked-Etag": f'"{file.oid}"', "X-Linked-Size": str(len(file.data))}
            return Answer(302, headers={**headers, **linked, "Location": f"{self.cdn_host}/cdn/{file.oid}"})
        return Answer(200, file.data, headers)

    def from_cdn(self, request: Request, oid: str) -> Answer:
        return Answer(200, self.stored[oid], {"ETag": f'"{oid}"'})

    def info(self, request: Request, repo_id: str, revision: str | None = None) -> Answer:
        repo = self.repo(request, repo_id)
        return Answer(200, self.described(repo, self.commit(repo, revision or "main")))

    def described(self, repo: Repo, commit: Commit) -> dict[str, Any]:
        card = repo.card
        tags = [*(card.get("tags") or ()), *([card["library_name"]] if "library_name" in card else ())]
        return {
            "id": repo.id, "modelId": repo.id, "author": repo.owner, "sha": commit.oid, "private": repo.private,
            "gated": "auto" if repo.readers is not None else False, "tags": list(dict.fromkeys(tags)),
            "library_name": card.get("library_name"), "pipeline_tag": card.get("pipeline_tag"), "cardData": card,
            "lastModified": "2026-01-01T00:00:00.000Z", "downloads": 0, "likes": 0,
            "siblings": [{"rfilename": path} for path in commit.files],
        }  # fmt: skip

    def tree(self, request: Request, repo_id: str, revision: str) -> Answer:
        files = self.commit(self.repo(request, repo_id), revision).files
        rows = [{"type": "file", "path": path, "size": len(f.data), "oid": f.oid} for path, f in files.items()]
        return Answer(200, rows)

    def models(self, request: Request) -> Answer:
        user, _ = self.account(request)
        asked = parse_qs(urlsplit(request.path).query)
        found = []
        for repo in self.repos.values():
            row = self.described(repo, repo.head)
            if (
                (not repo.private or user == repo.owner)
                and set(asked.get("filter", ())) <= set(row["tags"])
                and asked.get("author", [repo.owner]) == [repo.owner]
                and asked.get("search", [""])[0].lower() in repo.id.lower()
            ):
                found.append(row)
        start, page = int(asked.get("cursor", ["0"])[0]), 2  # two to a page, so that clients must turn pages
        headers = {}
        if start + page < len(found):
            query = re.sub(r"&?cursor=\d+", "", urlsplit(request.path).query)
            headers["Link"] = f'<{self.endpoint}/api/models?{query}&cursor={start + page}>; rel="next"'
        return Answer(200, found[start : start + page], headers)

    def refs(self, request: Request, repo_id: str) -> Answer:
        repo = self.repo(request, repo_id)
        branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": oid} for n, oid in repo.branches.items()]
        tags = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": oid} for n, oid in repo.tags.items()]
        return Answer(200, {"branches": branches, "converts": [], "tags": tags})

    def branch(self, request: Request, repo_id: str, name: str) -> Answer:
        repo = self.repo(request, repo_id, write=True)
        if (name := unquote(name)) in repo.branches:
            return refuse(409, message=f"Reference already exists: refs/heads/{name}")
        asked = json.loads(request.body or b"{}")
        repo.branches[name] = self.commit(repo, asked.get("startingPoint", "main")).oid
        return Answer(201, {})

    def tag(self, request: Request, repo_id: str, revision: str) -> Answer:
        repo = self.repo(request, repo_id, write=True)
        repo.tags[json.loads(request.body)["tag"]] = self.commit(repo, revision).oid
        return Answer(201, {})


ID = r"([^/]+/[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., Answer]]] = [
    ("GET", r"/api/whoami-v2", HubServer.whoami),
    ("POST", r"/api/repos/create", HubServer.create),
    ("POST", r"/api/validate-yaml", HubServer.validate),
    ("GET", r"/api/models", HubServer.models),
    ("GET", rf"/api/models/{ID}", HubServer.info),
    ("GET", rf"/api/models/{ID}/revision/([^/]+)", HubServer.info),
    ("GET", rf"/api/models/{ID}/tree/([^/]+)", HubServer.tree),
    ("GET", rf"/api/models/{ID}/refs", HubServer.refs),
    ("POST", rf"/api/models/{ID}/preupload/([^/]+)", HubServer.preupload),
    ("POST", rf"/api/models/{ID}/commit/([^/]+)", HubServer.push),
    ("POST", rf"/api/models/{ID}/branch/([^/]+)", HubServer.branch),
    ("POST", rf"/api/models/{ID}/tag/([^/]+)", HubServer.tag),
    ("POST", rf"/{ID}\.git/info/lfs/objects/batch", HubServer.lfs_batch),
    ("POST", rf"/{ID}\.git/verify", HubServer.lfs_verify),
    ("PUT", r"/upload/(\w+)", HubServer.lfs_put),
    ("GET|HEAD", r"/cdn/(\w+)", HubServer.from_cdn),
    ("GET|HEAD", rf"/{ID}/resolve/([^/]+)/(.+)", HubServer.resolve),
]


class Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {key.lower(): value for key, value in self.headers.items()}
        request = Request(self.command, self.path, headers.get("host", ""), headers, body)
        try:
            answer = self.hub.answer(request)
        except Answer as refusal:
            answer = refusal
        self.send_response(answer.status)
        for key, value in answer.headers.items():
            self.send_header(key, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def log_message(self, *_: object) -> None:
        """Quiet: `HubServer.requests` has them all."""


if __name__ == "__main__":
    with HubServer(port=8765) as hub:
        print(f"a Hub on {hub.endpoint}; the token hf_me is of the account me; Ctrl-C ends it", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            pass
