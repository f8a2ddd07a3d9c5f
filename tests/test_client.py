"""`visformer.Client` and `AsyncClient` against a server that answers by a script: retries, refusals, faults."""

import asyncio
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from PIL import Image

import visformer.client
from visformer.client import AsyncClient, Client
from visformer.errors import RunError, UsageError

pytest.importorskip("httpx2")


class Script:
    """Answers in turn, (status, headers, document); the last one again and again. `seen` holds what was asked."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.seen = []
        self.lock = threading.Lock()

    def next(self, method, path, headers, body):
        with self.lock:
            self.seen.append((method, path, headers, body))
            return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


@pytest.fixture
def serve():
    servers = []

    def start(*answers):
        script = Script(*answers)

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self):
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                status, headers, document = script.next(self.command, self.path, dict(self.headers.items()), body)
                if status is None:  # hang up
                    self.close_connection = True
                    return
                data = document if isinstance(document, bytes) else json.dumps(document).encode()
                self.send_response(status)
                for name, value in {"content-length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = answer  # noqa: N815

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}", script

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """How long was waited, without waiting."""
    slept = []

    async def sleep(seconds):
        slept.append(seconds)

    monkeypatch.setattr(visformer.client.time, "sleep", slept.append)
    monkeypatch.setattr(visformer.client, "asyncio", _Asyncio(sleep))
    return slept


class _Asyncio:
    """asyncio with another `sleep`."""

    def __init__(self, sleep):
        self.sleep = sleep

    def __getattr__(self, name):
        return getattr(asyncio, name)


def predicted(label="cat", name="ignored"):
    record = {"path": name, "predictions": [{"label": label, "index": 0, "probability": 0.9}]}
    return 200, {}, {"model": "m", "version": "1", "images": [record]}


BUSY = (503, {"retry-after": "3"}, {"error": "the server is busy; try again later"})


def sync_predict(url, images, top_k=5, **options):
    with Client(url, **options) as client:
        return client.predict(images, top_k=top_k)


def async_predict(url, images, top_k=5, **options):
    async def run():
        async with AsyncClient(url, **options) as client:
            return await client.predict(images, top_k=top_k)

    return asyncio.run(run())


both = pytest.mark.parametrize("predict", [sync_predict, async_predict])


@both
def test_files_are_sent_as_they_are_and_pixels_as_png(serve, predict, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    path = tmp_path / "cat.bin"
    path.write_bytes(b"any bytes")
    url, script = serve(predicted())
    images = [path, str(path), b"more bytes", pixels, Image.fromarray(pixels)]
    records = predict(url, images, top_k=3, model="pets", version="2", api_key="secret")
    assert [record["path"] for record in records] == [str(path), str(path), "", "", ""]
    assert all(record["predictions"][0]["label"] == "cat" for record in records)
    bodies = [body for *_, body in script.seen]
    assert bodies.count(b"any bytes") == 2 and b"more bytes" in bodies
    pictures = [body for body in bodies if body.startswith(b"\x89PNG")]
    assert len(pictures) == 2 and all((np.array(Image.open(io.BytesIO(b))) == pixels).all() for b in pictures)
    for method, where, headers, _ in script.seen:
        assert (method, urlsplit(where).path) == ("POST", "/predict")
        assert parse_qs(urlsplit(where).query) == {"top_k": ["3"], "model": ["pets"], "version": ["2"]}
        assert {k.lower(): v for k, v in headers.items()}["authorization"] == "Bearer secret"


@both
@pytest.mark.parametrize("one", [b"bytes", np.zeros((4, 4), np.uint8), Image.new("L", (3, 3))])
def test_a_single_image_gives_a_list_of_one(serve, predict, one):
    url, _ = serve(predicted())
    assert len(predict(url, one)) == 1


@both
def test_a_busy_server_is_asked_again_when_it_says(serve, predict, waits):
    url, script = serve(BUSY, BUSY, (502, {}, b"<html>proxy</html>"), (500, {}, b"Internal Server Error"), predicted())
    [record] = predict(url, b"x")
    assert record["predictions"] and len(script.seen) == 5
    assert len(waits) == 4 and all(wait >= 3 for wait in waits[:2])
    assert 0.8 <= waits[2] <= 1.3 and 1.6 <= waits[3] <= 2.5


@both
def test_a_server_that_stays_busy_is_told_in_its_words(serve, predict, waits):
    url, script = serve(BUSY)
    with pytest.raises(RunError, match=r"too busy \(503\): the server is busy; try again later"):
        predict(url, b"x", retries=2)
    assert len(script.seen) == 3 and len(waits) == 2


@both
def test_a_connection_that_breaks_is_made_again(serve, predict, waits):
    url, script = serve((None, {}, b""), predicted())
    assert predict(url, b"x")[0]["predictions"] and len(waits) == 1 and len(script.seen) == 2


@both
def test_nobody_there(predict, waits):
    with pytest.raises(RunError, match=r"does not answer .*is it running"):
        predict("http://127.0.0.1:9", b"x", retries=3)
    assert len(waits) == 3 and waits == sorted(waits)


@both
def test_an_image_that_cannot_be_read_is_a_record(serve, predict):
    url, _ = serve((400, {}, {"error": "not an image in a format that can be read"}))
    assert predict(url, b"x") == [{"path": "", "error": "not an image in a format that can be read"}]
    url, _ = serve((413, {}, {"error": "the body is larger than 10 bytes"}))
    assert predict(url, b"x") == [{"path": "", "error": "the body is larger than 10 bytes"}]


@both
@pytest.mark.parametrize(
    "status, document, error, words",
    [
        (401, {"error": "an API key is needed"}, UsageError, "an API key is needed"),
        (404, {"error": "no model 'dogs'"}, UsageError, "no model 'dogs'"),
        (500, {"error": "internal error"}, RunError, r"the server failed \(500\): internal error"),
        (400, {"detail": [{"msg": "top_k must be at least 1"}]}, UsageError, "top_k must be"),
    ],
)
def test_what_is_wrong_with_the_request_is_raised(serve, predict, status, document, error, words):
    url, script = serve((status, {}, document))
    with pytest.raises(error, match=words):
        predict(url, b"x")
    assert len(script.seen) == 1


def test_models_and_readiness(serve):
    index = [{"name": "pets", "version": "1", "state": "READY", "reason": ""}]
    url, script = serve((200, {}, index))
    with Client(url) as client:
        assert client.models() == index and client.ready()
    assert [where for _, where, *_ in script.seen] == ["/v2/repository/index", "/v2/health/ready"]
    url, _ = serve((503, {}, {}))
    assert not Client(url).ready() and not Client("http://127.0.0.1:9").ready()

    async def run():
        async with AsyncClient("http://127.0.0.1:9") as client:
            return await client.ready()

    assert not asyncio.run(run())


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", ""])
def test_an_address_that_is_none(url):
    with pytest.raises(UsageError, match="no address of a server"):
        Client(url)


def test_a_file_that_is_not_there(serve):
    url, _ = serve(predicted())
    with pytest.raises(UsageError, match=r"nowhere.jpg: can't be read: No such file"):
        sync_predict(url, "nowhere.jpg")
