"""Clients that hold a connection without using it, and where spans go."""

import os
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from tests.serving.fakes import picture
from tests.serving.running import running
from visformer.serving import rest, server


def closed_after(port: int, data: bytes, drip: bytes = b"") -> float:
    """Seconds until the server closes a connection on which this was sent, and then `drip` again and again."""
    started = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=0.1) as connection:
        connection.sendall(data)
        while time.monotonic() < started + 10:
            try:
                if not connection.recv(1000):
                    break
            except TimeoutError:
                connection.sendall(drip)
            except ConnectionError:
                break
        return time.monotonic() - started


def test_headers_that_do_not_come_are_not_waited_for(listening, monkeypatch):
    monkeypatch.setattr(server, "HEADERS_WITHIN_S", 0.4)

    def client(port: int) -> list[float]:
        first = b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n"
        return [
            closed_after(port, b""),
            closed_after(port, b"POST /predict HTTP/1.1\r\nHost", drip=b"x"),
            closed_after(port, first + b"GET /v2 HTTP/1.1\r\n", drip=b"X: y\r\n"),
        ]

    assert all(0.3 < seconds < 3 for seconds in listening(client))


def test_an_answer_that_is_not_read_is_not_kept(listening, monkeypatch):
    """The answer is larger than what the kernel takes, so the server holds the rest, and not for long."""
    monkeypatch.setattr(server, "TAKEN_WITHIN_S", 0.4)
    monkeypatch.setattr(rest.documents, "server_metadata", lambda release: {"text": "x" * 20_000_000})

    def client(port: int) -> int:
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.settimeout(10)
            connection.connect(("127.0.0.1", port))
            connection.sendall(b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n")
            time.sleep(1.5)
            received = 0
            try:
                while data := connection.recv(1_000_000):
                    received += len(data)
            except ConnectionError:
                return received
        return received

    assert listening(client) < 20_000_000


def test_requests_are_not_heaped_up_on_one_connection(listening):
    def client(port: int) -> tuple[int, bool]:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            asking, answers = b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n", b""
            connection.sendall(asking * 5)
            while answers.count(b"HTTP/1.1 200") < 5:
                answers += connection.recv(65536)
            try:
                for _ in range(200):
                    connection.sendall(asking * 1000)
            except ConnectionError:
                return answers.count(b"HTTP/1.1 200"), True
            return answers.count(b"HTTP/1.1 200"), False

    assert listening(client) == (5, True)


def test_spans_go_where_the_environment_says(bundle, monkeypatch):
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    received: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                import gzip

                body = gzip.decompress(body)
            received.append((self.path, body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Nothing."""

    collector = HTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
    with running(str(bundle), "--tracing", "True", "--drain_s", "0") as started:
        started.event("ready")
        assert started.ask("/predict", picture(), **{"X-Request-Id": "traced-one"})[0] == 200
        assert started.stop() == 0
    collector.shutdown()
    collector.server_close()
    assert received
    assert all(path == "/v1/traces" for path, _ in received)
    spans = b"".join(body for _, body in received)
    for word in (b"POST /predict", b"traced-one", b"pets", b"stage.compute_s"):
        assert spans.count(word) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can be told so")
def test_no_more_connections_are_made_and_those_made_are_accepted():
    with server.listen("127.0.0.1", 0) as listening:
        place = listening.getsockname()
        with socket.create_connection(place, timeout=5) as made:
            server.make_no_more(listening)
            with pytest.raises(TimeoutError):
                socket.create_connection(place, timeout=0.3)
            accepted, _ = listening.accept()
            with accepted:
                made.sendall(b"x")
                accepted.settimeout(5)
                assert accepted.recv(1) == b"x"
            with pytest.raises(BlockingIOError):
                listening.accept()
