"""A file server on 127.0.0.1 that misbehaves as told, for tests of downloads."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Server:
    """What is served, and how. Each of `statuses` and `drops` is used up by one request, in order."""

    content: bytes
    ranges: bool = True
    length: bool = True  # tell the size
    etag: str | None = '"v1"'
    modified: str | None = None
    statuses: list[int] = field(default_factory=list)  # answered before anything else; 200 stands for a good answer
    drops: list[int] = field(default_factory=list)  # bytes after which the connection is closed
    silence_s: float = 0.0  # before the body
    headers: dict[str, str] = field(default_factory=dict)
    redirect: str | None = None
    url: str = ""
    requests: list[dict[str, str]] = field(default_factory=list)  # the headers of each

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def ranges_asked(self) -> list[str | None]:
        return [headers.get("Range") for headers in self.requests]


@contextmanager
def serving(content: bytes, **behaviour) -> Iterator[Server]:
    """Serve `content` at every path of `Server.url`."""
    server = Server(content, **behaviour)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self, server)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        httpd.daemon_threads = True
        threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True).start()
        server.url = f"http://127.0.0.1:{httpd.server_address[1]}/model.bin"
        yield server
        httpd.shutdown()


def answer(handler: BaseHTTPRequestHandler, server: Server) -> None:
    server.requests.append(dict(handler.headers))
    status = server.statuses.pop(0) if server.statuses else 200
    if server.redirect and handler.path == "/model.bin":
        handler.send_response(302)
        handler.send_header("Location", server.redirect)
        return handler.end_headers()
    if status != 200:
        handler.send_response(status)
        handler.send_header("Content-Length", "0")
        return handler.end_headers()
    start = wanted_start(handler, server)
    if start > 0 and start >= len(server.content):
        handler.send_response(416)
        handler.send_header("Content-Range", f"bytes */{len(server.content)}")
        return handler.end_headers()
    send_from(handler, server, start)
    return None


def wanted_start(handler: BaseHTTPRequestHandler, server: Server) -> int:
    asked, version = handler.headers.get("Range"), handler.headers.get("If-Range")
    if not server.ranges or asked is None or version not in (server.etag, server.modified):
        return 0
    return int(asked.removeprefix("bytes=").rstrip("-"))


def send_from(handler: BaseHTTPRequestHandler, server: Server, start: int) -> None:
    size = len(server.content)
    handler.send_response(206 if start else 200)
    if start:
        handler.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
    if server.length:
        handler.send_header("Content-Length", str(size - start))
    for name, value in (("ETag", server.etag), ("Last-Modified", server.modified), *server.headers.items()):
        if value:
            handler.send_header(name, value)
    handler.end_headers()
    time.sleep(server.silence_s)
    body = server.content[start:]
    if server.drops:
        body = body[: server.drops.pop(0)]
    with suppress(OSError):
        handler.wfile.write(body)
    handler.close_connection = True
