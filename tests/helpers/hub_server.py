"""A Hugging Face Hub of one process: enough of the protocol for the real client to push and to load.

It holds everything in memory and listens on the loopback only. What it speaks was read off huggingface_hub 2.4.0:
push is ``POST repos/create``, ``POST validate-yaml``, ``POST preupload``, ``POST info/lfs/objects/batch``, ``PUT`` of
each large object, ``POST verify``, ``POST commit``; load is ``GET models/{id}/revision/{rev}``, ``GET tree`` and a
``HEAD`` and ``GET`` of ``resolve`` for each file, where a large file answers with a redirect to another host name.

Use it from a test, and start the client in a process whose environment is `LoopbackHub.environment`:
huggingface_hub reads HF_ENDPOINT once, when it is imported.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import unquote, urlsplit

LARGE_SUFFIXES = (".safetensors", ".bin", ".pt", ".png", ".npz")
"""Files of these kinds are Git LFS objects regardless of their size, as on the real Hub."""


@dataclass
class Fault:
    """What goes wrong: calls whose "METHOD path" matches are answered with a status, dropped, or never answered.

    Attributes:
        call: regular expression.
        what: an HTTP status, ``"drop"`` (the connection is closed) or ``"stall"`` (no response until the end).
        times: how often.
        message: of the answer.
        error_code: what the Hub puts into X-Error-Code.
    """

    call: str
    what: int | str
    times: int = 10**9
    message: str = "a fault"
    error_code: str = "Fault"


@dataclass
class Commit:
    """One state of a repository: its id, the message it came with, and the oid of every file."""

    sha: str
    message: str
    files: dict[str, str]


@dataclass
class Repo:
    """A repository: its commits, oldest first, and where its branches and tags point."""

    repo_id: str
    private: bool = False
    commits: list[Commit] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)

    def add(self, files: dict[str, str], message: str, branch: str = "main") -> Commit:
        """Append a commit to a branch and return it."""
        text = json.dumps([self.repo_id, len(self.commits), files, message], sort_keys=True)
        commit = Commit(hashlib.sha1(text.encode()).hexdigest(), message, files)
        self.commits.append(commit)
        self.refs[branch] = commit.sha
        return commit

    def at(self, revision: str) -> Commit | None:
        """The commit that a branch, a tag or a commit id names."""
        sha = self.refs.get(revision, revision)
        return next((commit for commit in self.commits if commit.sha == sha), None)


def git_id(content: bytes) -> str:
    """The git object id of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Silent: a client that is killed resets its connection."""


class LoopbackHub:
    """The server, its repositories and a log of every call.

    Args:
        tokens: name of the token -> "write" or "read". A push needs one that writes, a private repository any of
            them. The account behind every token is ``user``.
        user: namespace of a repository that is pushed without one.
    """

    def __init__(self, tokens: dict[str, str] | None = None, user: str = "alice") -> None:
        self.tokens = {"hf_writer": "write", "hf_reader": "read"} if tokens is None else tokens
        self.user = user
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.calls: list[str] = []
        self.faults: list[Fault] = []
        self.closing = threading.Event()
        self.lock = threading.RLock()
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def port(self) -> int:
        """The port, chosen by the system."""
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        """Value for HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def cdn(self) -> str:
        """The same server under another host name: the client follows a redirect to the same host by itself."""
        return f"http://localhost:{self.port}"

    def environment(self, home: str, token: str | None = "hf_writer") -> dict[str, str]:
        """Variables for a client process: this endpoint, a separate cache below ``home``, no Xet, a token."""
        variables = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }
        return variables | ({"HF_TOKEN": token} if token is not None else {})

    def store(self, content: bytes) -> str:
        """Keep a file's bytes and return the sha256 that names them."""
        oid = hashlib.sha256(content).hexdigest()
        self.blobs[oid] = content
        return oid

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Path -> bytes of one revision, to look at what a push really sent."""
        commit = self.repos[repo_id].at(revision)
        if commit is None:
            raise KeyError(f"{repo_id} has no revision {revision}")
        return {path: self.blobs[oid] for path, oid in commit.files.items()}

    def __enter__(self) -> LoopbackHub:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"
    ROUTES = (
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/tag/(?P<revision>[^/]+)", "tag"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<revision>[^/]+)", "branch"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?", "tree"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/revision/(?P<revision>[^/]+))?", "info"),
        ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_put"),
        ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/verify", "lfs_verify"),
        ("GET", r"/cdn/(?P<oid>[0-9a-f]{64})", "cdn"),
        ("GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    )

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on the console: the log is `LoopbackHub.calls`."""

    def do_GET(self) -> None:
        self._route("GET")

    def do_HEAD(self) -> None:
        self._route("GET")

    def do_POST(self) -> None:
        self._route("POST")

    def do_PUT(self) -> None:
        self._route("PUT")

    def _route(self, method: str) -> None:
        path = urlsplit(self.path).path
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        called = f"{self.command} {unquote(path)}"
        fault = next((f for f in self.hub.faults if f.times > 0 and re.search(f.call, called)), None)
        if fault is not None:
            self.hub.calls.append(f"{called} !{fault.what}")
            fault.times -= 1
            if fault.what == "stall":
                self.hub.closing.wait(60)
            if not isinstance(fault.what, int):
                self.close_connection = True
                self.connection.close()
                return None
            return self._fail(fault.what, fault.error_code, fault.message)
        with self.hub.lock:
            self.hub.calls.append(called)
            for verb, pattern, name in self.ROUTES:
                match = re.fullmatch(pattern, path)
                if verb == method and match:
                    groups = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                    return getattr(self, f"_{name}")(body, **groups)
        return self._fail(404, "NotFound", f"this Hub has no {method} {path}")

    # ------------------------------------------------------------------ answers

    def _send(self, status: int, content: bytes = b"", kind: str = "application/json", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: object, status: int = 200, **headers: str) -> None:
        self._send(status, json.dumps(value).encode(), **headers)

    def _fail(self, status: int, code: str, message: str, **headers: str) -> None:
        self._json({"error": message}, status, X_Error_Code=code, X_Error_Message=message, **headers)

    # ------------------------------------------------------------------ who may do what

    def _right(self) -> str | None:
        return self.hub.tokens.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))

    def _may_write(self) -> bool:
        right = self._right()
        if right is None:
            self._fail(401, "Unauthorized", "a token is needed")
        elif right != "write":
            self._fail(403, "Forbidden", "this token only reads")
        return right == "write"

    def _find(self, repo: str, revision: str = "main") -> tuple[Repo, Commit] | None:
        record = self.hub.repos.get(repo)
        if record is None or (record.private and self._right() is None):
            return self._fail(401, "RepoNotFound", f"no repository {repo}")
        commit = record.at(revision)
        if commit is None:
            return self._fail(404, "RevisionNotFound", f"{repo} has no revision {revision}")
        return record, commit

    # ------------------------------------------------------------------ push

    def _whoami(self, body: bytes) -> None:
        if self._right() is None:
            return self._fail(401, "Unauthorized", "a token is needed")
        return self._json({"type": "user", "name": self.hub.user, "orgs": [], "auth": {}})

    def _create(self, body: bytes) -> None:
        if not self._may_write():
            return None
        request = json.loads(body)
        repo_id = f"{request.get('organization') or self.hub.user}/{request['name']}"
        answer = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id}
        if repo_id in self.hub.repos:
            return self._json(answer, 409)
        private = bool(request.get("private")) or request.get("visibility") == "private"
        self.hub.repos[repo_id] = Repo(repo_id, private)
        self.hub.repos[repo_id].add({}, "initial commit")
        return self._json(answer)

    def _validate_yaml(self, body: bytes) -> None:
        self._json({"errors": [], "warnings": []})

    def _preupload(self, body: bytes, repo: str, revision: str) -> None:
        target = self._find(repo, revision) if self._may_write() else None
        if target is None:
            return None
        files = []
        for one in json.loads(body)["files"]:
            name, held = one["path"], target[1].files.get(one["path"])
            mode = "lfs" if name.endswith(LARGE_SUFFIXES) else "regular"
            oid = None if held is None else held if mode == "lfs" else git_id(self.hub.blobs[held])
            files.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return self._json({"files": files})

    def _lfs_batch(self, body: bytes, repo: str) -> None:
        if not self._may_write():
            return None
        objects = []
        for one in json.loads(body)["objects"]:
            entry = {"oid": one["oid"], "size": one["size"]}
            if one["oid"] not in self.hub.blobs:
                put = f"{self.hub.cdn}/lfs/{one['oid']}"
                verify = f"{self.hub.url}/lfs/{one['oid']}/verify"
                entry |= {"actions": {"upload": {"href": put}, "verify": {"href": verify}}}
            objects.append(entry)
        return self._json({"transfer": "basic", "objects": objects}, kind="application/vnd.git-lfs+json")

    def _lfs_put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self._fail(422, "BadObject", "the bytes do not have this sha256")
        self.hub.store(body)
        return self._send(200)

    def _lfs_verify(self, body: bytes, oid: str) -> None:
        size = json.loads(body)["size"]
        if len(self.hub.blobs.get(oid, b"")) != size:
            return self._fail(404, "BadObject", f"{oid} is not here with {size} bytes")
        return self._json({})

    def _commit(self, body: bytes, repo: str, revision: str) -> None:
        if not self._may_write():
            return None
        target = self._find(repo, revision)
        if target is None:
            return None
        files, message = dict(target[1].files), ""
        for line in filter(None, body.splitlines()):
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
            elif item["key"] == "file":
                files[value["path"]] = self.hub.store(base64.b64decode(value["content"]))
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    return self._fail(400, "BadRequest", f"{value['path']} was never uploaded")
                files[value["path"]] = value["oid"]
            elif item["key"] == "deletedFile":
                files.pop(value["path"], None)
            elif item["key"] == "deletedFolder":
                folder = value["path"].rstrip("/") + "/"
                files = {path: oid for path, oid in files.items() if not path.startswith(folder)}
        commit = target[0].add(files, message, revision)
        url = f"{self.hub.url}/{repo}/commit/{commit.sha}"
        return self._json({"success": True, "commitOid": commit.sha, "commitUrl": url, "hookOutput": ""})

    def _tag(self, body: bytes, repo: str, revision: str) -> None:
        target = self._find(repo, revision) if self._may_write() else None
        if target is not None:
            target[0].refs[json.loads(body)["tag"]] = target[1].sha
            self._json({})

    def _branch(self, body: bytes, repo: str, revision: str) -> None:
        start = json.loads(body or b"{}").get("startingPoint", "main")
        target = self._find(repo, start) if self._may_write() else None
        if target is not None:
            target[0].refs[revision] = target[1].sha
            self._json({})

    # ------------------------------------------------------------------ load

    def _info(self, body: bytes, repo: str, revision: str = "main") -> None:
        target = self._find(repo, revision)
        if target is None:
            return
        record, commit = target
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        answer = {"_id": "0", "id": repo, "modelId": repo, "sha": commit.sha, "private": record.private}
        self._json(answer | {"siblings": siblings, "tags": [], "downloads": 0, "likes": 0, "gated": False})

    def _tree(self, body: bytes, repo: str, revision: str, path: str = "") -> None:
        target = self._find(repo, revision)
        if target is None:
            return
        entries = []
        for name, oid in sorted(target[1].files.items()):
            if not name.startswith(path):
                continue
            size = len(self.hub.blobs[oid])
            entry: dict[str, object] = {"type": "file", "path": name, "size": size, "oid": git_id(self.hub.blobs[oid])}
            if name.endswith(LARGE_SUFFIXES):
                entry["lfs"] = {"oid": oid, "size": size, "pointerSize": 130}
            entries.append(entry)
        self._json(entries)

    def _resolve(self, body: bytes, repo: str, revision: str, path: str) -> None:
        target = self._find(repo, revision)
        if target is None:
            return None
        commit = target[1]
        if path not in commit.files:
            return self._fail(404, "EntryNotFound", f"{repo} has no file {path}", X_Repo_Commit=commit.sha)
        oid = commit.files[path]
        content = self.hub.blobs[oid]
        if not path.endswith(LARGE_SUFFIXES):
            kind = "application/octet-stream"
            return self._send(200, content, kind, ETag=f'"{oid[:40]}"', X_Repo_Commit=commit.sha)
        linked = {"X_Linked_Etag": f'"{oid}"', "X_Linked_Size": str(len(content)), "X_Repo_Commit": commit.sha}
        return self._send(302, b"", "text/plain", Location=f"{self.hub.cdn}/cdn/{oid}", **linked)

    def _cdn(self, body: bytes, oid: str) -> None:
        if self.headers.get("Authorization"):
            return self._fail(400, "BadRequest", "a token was sent to another host")
        content = self.hub.blobs[oid]
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if start is None:
            return self._send(200, content, "application/octet-stream")
        first = int(start[1])
        span = f"bytes {first}-{len(content) - 1}/{len(content)}"
        return self._send(206, content[first:], "application/octet-stream", Content_Range=span)
