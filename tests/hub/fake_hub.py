"""As much of the Hugging Face hub as its client needs to read a repository and to push one, on 127.0.0.1."""

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
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_secret"


@dataclass
class FakeHub:
    """Repositories, each {revision: {file: bytes}}, and what was asked of them."""

    repositories: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    url: str = ""
    requests: list[str] = field(default_factory=list)
    commits: list[dict[str, Any]] = field(default_factory=list)
    validated: list[dict[str, Any]] = field(default_factory=list)  # cards

    def add(self, repo_id: str, files: dict[str, bytes], revision: str = "main") -> None:
        self.repositories.setdefault(repo_id, {})[revision] = files


class RefusalError(Exception):
    """An answer of the hub that says no: (status, its code for why)."""


@contextmanager
def serving_hub() -> Iterator[FakeHub]:
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.answer()

        def do_HEAD(self) -> None:
            self.answer()

        def do_POST(self) -> None:
            self.answer()

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            try:
                headers, content = respond(hub, self, path, body)
                status = 200
            except RefusalError as error:
                status, code = error.args
                headers, content = {"X-Error-Code": code, "X-Error-Message": code}, b"{}"
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(content))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        httpd.daemon_threads = True
        threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True).start()
        hub.url = f"http://127.0.0.1:{httpd.server_address[1]}"
        yield hub
        httpd.shutdown()


def respond(hub: FakeHub, request: BaseHTTPRequestHandler, path: str, body: bytes) -> tuple[dict[str, str], bytes]:
    logged_in = request.headers.get("Authorization") == f"Bearer {TOKEN}"
    if request.command == "POST":
        if not logged_in:
            raise RefusalError(401, "Unauthorized")
        return as_json(post(hub, path, body))
    if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/(.+?)/([^/]+)", path):
        return one_file(*find(hub, match[1], match[2]), match[3])
    if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/(.+)", path):
        files, _ = find(hub, match[1], match[2])
        return as_json([entry(name, content) for name, content in files.items()])
    if match := re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/revision/(.+))?", path):
        find(hub, match[1], match[2] or "main")
        return as_json({"id": match[1], "sha": COMMIT, "siblings": [], "private": False, "tags": []})
    raise RefusalError(404, "NotImplemented")


def post(hub: FakeHub, path: str, body: bytes) -> dict[str, Any]:
    if path == "/api/repos/create":
        wanted = json.loads(body)
        name = f"{wanted.get('organization') or 'someone'}/{wanted['name']}"
        hub.repositories.setdefault(name, {"main": {}})
        return {"url": f"{hub.url}/{name}", "name": name}
    if path == "/api/validate-yaml":
        hub.validated.append(json.loads(body))
        return {"errors": [], "warnings": []}
    repo_id, action, revision = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(\w+)/(.+)", path).groups()
    if action == "preupload":
        files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]
        return {"files": files}
    assert action == "commit", path
    lines = [json.loads(line) for line in body.splitlines()]
    hub.commits.append(next(line["value"] for line in lines if line["key"] == "header"))
    for line in lines:
        if line["key"] == "file":
            content = base64.b64decode(line["value"]["content"])
            hub.repositories[repo_id].setdefault(revision, {})[line["value"]["path"]] = content
    return {"commitUrl": f"{hub.url}/{repo_id}/commit/{COMMIT}", "commitOid": COMMIT}


def find(hub: FakeHub, repo_id: str, revision: str) -> tuple[dict[str, bytes], str]:
    if repo_id in hub.gated:
        raise RefusalError(403, "GatedRepo")
    if repo_id not in hub.repositories:
        raise RefusalError(401, "RepoNotFound")
    revisions = hub.repositories[repo_id]
    if revision == COMMIT:
        revision = "main"
    if revision not in revisions:
        raise RefusalError(404, "RevisionNotFound")
    return revisions[revision], hashlib.sha1(revision.encode()).hexdigest() if revision != "main" else COMMIT


def one_file(files: dict[str, bytes], commit: str, name: str) -> tuple[dict[str, str], bytes]:
    if name not in files:
        raise RefusalError(404, "EntryNotFound")
    return {"ETag": f'"{hashlib.sha1(files[name]).hexdigest()}"', "X-Repo-Commit": commit}, files[name]


def entry(name: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


def as_json(document: Any) -> tuple[dict[str, str], bytes]:
    return {"Content-Type": "application/json"}, json.dumps(document).encode()
