"""A local server that speaks the hub's protocol, with a second one as its CDN, and faults on the way.

Facts: ``GET /api/models/ID/revision/REV?blobs=true`` lists the files; ``/ID/resolve/REV/FILE`` answers with
``X-Repo-Commit`` and ``ETag``, and for LFS files redirects to a signed link of another host, with ``X-Linked-Size`` and
``X-Linked-ETag``. Refusals have ``X-Error-Code``. ``POST /api/repos/create`` makes a repository; before a commit
``preupload`` says of each file whether it goes into the commit itself or by LFS's batch API to a link; the commit is a
line of JSON for its header and one for each file. ``GET /api/models/ID/tree/REV/FOLDER`` lists a folder, and
``POST /api/models/ID/paths-info/REV`` tells of the paths that its form names.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
LFS = (".safetensors", ".bin", ".gguf")


@dataclass
class Fault:
    """What goes wrong, for the next ``times`` requests whose path matches ``where``."""

    where: str
    kind: str
    times: int = 1
    after: int = 0
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    range: str | None
    token: str | None
    server: str


@dataclass
class Hub:
    """The repositories, what was asked, and how many bytes of files went out.

    Attributes:
        repos: ``org/name`` → file → its bytes.
        private: needs a token; gated: needs consent too.
        lfs: files with LFS's suffixes are taken by its way alone.
        read_only: nobody may write.
        revisions: branch or tag → commit.
    """

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    gated: set[str] = field(default_factory=set)
    revisions: dict[str, str] = field(default_factory=lambda: {"main": COMMIT})
    faults: list[Fault] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    sent: int = 0
    blobs: dict[str, bytes] = field(default_factory=dict)
    lfs: bool = False
    read_only: bool = False
    url: str = ""
    cdn: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fault(self, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.where, path):
                    fault.times -= 1
                    return fault
        return None

    def paths(self, method: str = "GET") -> list[str]:
        return [request.path for request in self.requests if request.method == method]

    def digest(self, content: bytes) -> str:
        """The content's hash, by which the CDN gives it out."""
        known = next((digest for digest, held in self.blobs.items() if held is content), None)
        if known is None:
            known = hashlib.sha256(content).hexdigest()
            self.blobs[known] = content
        return known


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    name: str
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.blobs[hashlib.sha256(body).hexdigest()] = body
        self._plain(200, b"")

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        if self.hub.read_only:
            self._plain(403, b"{}", {"X-Error-Message": "Forbidden"})
        elif path == "/api/validate-yaml":
            self._plain(200, b'{"errors": [], "warnings": []}')
        elif path == "/api/repos/create":
            self._create(json.loads(raw))
        elif path.endswith(".git/info/lfs/objects/batch"):
            asked = json.loads(raw)["objects"]
            links = [
                {**one, "actions": {"upload": {"href": f"{self.hub.cdn}/blobs/{one['oid']}", "header": {}}}}
                for one in asked
            ]
            self._plain(200, json.dumps({"transfer": "basic", "objects": links}).encode())
        elif "/paths-info/" in path:
            repo, _, revision = path.removeprefix("/api/models/").partition("/paths-info/")
            if not self._refused(repo) and self._commit(revision) is not None:
                entries = {entry["path"]: entry for entry in self._entries(repo)}
                asked = parse_qs(raw.decode())["paths"]
                self._plain(200, json.dumps([entries[path] for path in asked if path in entries]).encode())
        elif "/preupload/" in path:
            files = [
                {"path": name, "uploadMode": self._mode(name), "shouldIgnore": False, "oid": None}
                for name in (file["path"] for file in json.loads(raw)["files"])
            ]
            self._plain(200, json.dumps({"files": files}).encode())
        elif "/commit/" in path:
            self._take("/".join(path.removeprefix("/api/models/").split("/")[:2]), raw)
        else:
            self._plain(404, b"{}")

    def _mode(self, name: str) -> str:
        return "lfs" if self.hub.lfs and name.endswith(LFS) else "regular"

    def _create(self, asked: dict[str, Any]) -> None:
        repo = "/".join(part for part in (asked.get("organization"), asked["name"]) if part)
        known = repo in self.hub.repos
        self.hub.repos.setdefault(repo, {})
        if asked.get("private") or asked.get("visibility") == "private":
            self.hub.private.add(repo)
        self._plain(409 if known else 200, json.dumps({"url": f"{self.hub.url}/{repo}", "id": repo}).encode())

    def _take(self, repo: str, raw: bytes) -> None:
        for line in raw.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                self.hub.repos[repo][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                self.hub.repos[repo][value["path"]] = self.hub.blobs[value["oid"]]
            elif entry["key"] == "deletedFile":
                del self.hub.repos[repo][value["path"]]
            elif entry["key"] == "deletedFolder":
                folder = value["path"].rstrip("/") + "/"
                self.hub.repos[repo] = {n: c for n, c in self.hub.repos[repo].items() if not n.startswith(folder)}
        address = {"commitUrl": f"{self.hub.url}/{repo}/commit/{COMMIT}", "commitOid": COMMIT, "pullRequestUrl": None}
        self._plain(200, json.dumps({"success": True, "hookOutput": "", **address}).encode())

    def _answer(self) -> None:
        request = Request(
            self.command, unquote(self.path), self.headers.get("Range"), self.headers.get("Authorization"), self.name
        )
        with self.hub.lock:
            self.hub.requests.append(request)
        fault = self.hub.fault(self.path)
        if fault is not None and fault.kind.isdigit():
            self._plain(int(fault.kind), b"{}", fault.headers)
        elif self.name == "cdn":
            content = self.hub.blobs.get(urlsplit(self.path).path.rpartition("/")[2])
            self._plain(404, b"") if content is None else self._file(content, {}, fault)
        elif self.path.startswith("/api/models/") and "/tree/" in self.path:
            self._tree()
        elif self.path.startswith("/api/models/"):
            self._listing()
        else:
            self._resolve(fault)

    def _refused(self, repo: str) -> bool:
        if repo not in self.hub.repos or (repo in self.hub.private and not self.headers.get("Authorization")):
            self._plain(401, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif repo in self.hub.gated:
            self._plain(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        else:
            return False
        return True

    def _commit(self, revision: str) -> str | None:
        commit = self.hub.revisions.get(revision, revision)
        if commit in self.hub.revisions.values():
            return commit
        self._plain(404, b"{}", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
        return None

    def _listing(self) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.removeprefix("/api/models/").split("/")]
        repo, revision = "/".join(parts[:2]), parts[3] if len(parts) > 3 else "main"
        if self._refused(repo) or (commit := self._commit(revision)) is None:
            return
        siblings = []
        for name, content in self.hub.repos[repo].items():
            entry: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": "0" * 40}
            if name.endswith(LFS):
                digest = self.hub.digest(content)
                entry["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 130}
            siblings.append(entry)
        self._plain(200, json.dumps({"id": repo, "modelId": repo, "sha": commit, "siblings": siblings}).encode())

    def _entries(self, repo: str) -> list[dict[str, Any]]:
        """Every file and folder of a repository, as the tree tells of it."""
        files, folders = [], set()
        for name, content in self.hub.repos[repo].items():
            digest = self.hub.digest(content)
            entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": digest[:40]}
            if name.endswith(LFS):
                entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
            files.append(entry)
            folders |= {str(parent) for parent in PurePosixPath(name).parents} - {"."}
        return [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in sorted(folders)] + files

    def _tree(self) -> None:
        path, query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
        repo, _, rest = path.removeprefix("/api/models/").partition("/tree/")
        revision, _, folder = rest.partition("/")
        folder = unquote(folder)
        if self._refused(repo) or self._commit(unquote(revision)) is None:
            return
        entries = self._entries(repo)
        below = [e for e in entries if not folder or e["path"].startswith(f"{folder}/")]
        if folder and not any(e["path"] == folder and e["type"] == "directory" for e in entries):
            self._plain(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            return
        if query.get("recursive", ["false"])[0].lower() != "true":
            depth = folder.count("/") + 1 if folder else 0
            below = [e for e in below if e["path"].count("/") == depth]
        self._plain(200, json.dumps(below).encode())

    def _resolve(self, fault: Fault | None) -> None:
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", unquote(urlsplit(self.path).path))
        if found is None:
            self._plain(404, b"")
            return
        repo, revision, name = found.groups()
        if self._refused(repo) or (commit := self._commit(revision)) is None:
            return
        content = self.hub.repos[repo].get(name)
        if content is None:
            self._plain(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return
        digest = self.hub.digest(content)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{digest}"'}
        if name.endswith(LFS):
            linked = {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{digest}"'}
            location = {"Location": f"{self.hub.cdn}/blobs/{digest}?Signature=SIGNED"}
            self._plain(302, b"", {**headers, **linked, **location})
        else:
            self._file(content, headers, fault)

    def _file(self, content: bytes, headers: dict[str, str], fault: Fault | None) -> None:
        kind = fault.kind if fault is not None else ""
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        start, stop, status = 0, len(content), 200
        if wanted is not None and kind != "ignores ranges":
            start, status = int(wanted[1]), 206
            stop = min(len(content), int(wanted[2]) + 1) if wanted[2] else len(content)
            if kind == "other range":
                start, stop = start + 1, stop + 1
            total = len(content) + (1 if kind == "other size" else 0)
            headers = {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{total}"}
        body = content[start:stop]
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body)), "Accept-Ranges": "bytes"}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if kind == "cut" and fault is not None:
            body = body[: fault.after]
            self.close_connection = True
        with self.hub.lock:
            self.hub.sent += len(body)
        # A client that has enough hangs up.
        try:
            self.wfile.write(body)
            self.wfile.flush()
        except OSError:
            self.close_connection = True

    def _plain(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """A client that hangs up is no news."""


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """The hub and its CDN on two ports of this machine."""
    servers = []
    for name in ("hub", "cdn"):
        handler = type("Handler", (_Handler,), {"hub": hub, "name": name})
        server = _Server(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
    hub.url, hub.cdn = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
