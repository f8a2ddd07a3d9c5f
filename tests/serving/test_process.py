"""`visformer serve` as a process: from its start to its end, under load and under attack."""

import concurrent.futures
import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from tests.serving.fakes import enormous_picture, picture
from tests.serving.running import Running, running


@pytest.fixture(scope="module")
def server(bundle):
    with running(str(bundle), "--max_bytes", "200000", "--body_timeout_s", "1") as started:
        started.event("ready")
        yield started


def test_a_bundle_is_served_from_start_to_stop(bundle, tmp_path):
    with running(str(bundle), "--drain_s", "0.1") as server:
        server.event("ready")
        assert server.ask("/v2/health/ready")[0] == 200
        status, answer = server.ask("/predict?top_k=2", picture(80, (40, 30)))
        assert status == 200
        assert answer["model"] == "pets"
        assert len(answer["images"][0]["predictions"]) == 2
        assert server.ask("/openapi.json")[0] == 200
        server.event("request", 3)  # a line is written once its answer has left
        (line,) = (one for one in server.events("request") if one["path"] == "/predict")
        assert (line["status"], line["model"], line["images"]) == (200, "pets", 1)
        assert {"request_id", "total_ms", "read_ms", "decode_ms", "queue_ms", "compute_ms"} <= set(line)
        assert server.stop() == 0
        assert server.events("stopped")


def test_the_answer_is_what_predict_says(server, checkpoint, tmp_path):
    from visformer.verbs.predictor import Predictor

    path = tmp_path / "a.png"
    path.write_bytes(picture(80, (40, 30)))
    (expected,) = Predictor(checkpoint, device="cpu", top_k=5).predict([path])
    _, answer = server.ask("/predict?top_k=5", path.read_bytes())
    got = answer["images"][0]["predictions"]
    assert [one["label"] for one in got] == [one["label"] for one in expected["predictions"]]
    for one, other in zip(got, expected["predictions"], strict=True):
        assert one["probability"] == pytest.approx(other["probability"], abs=1e-4)


def test_a_checkpoint_is_served_too(checkpoint):
    with running(f"birds={checkpoint}", "--device_target", "cpu") as server:
        before = server.ask("/v2/health/live")[0], server.ask("/v2/health/ready")[0], server.ask("/predict", picture())
        server.event("ready")
        assert before[0] == 200
        assert before[1] == 503  # torch takes seconds to load, the port is open before
        assert before[2] == (503, {"error": "model birds is loading; try again later"})
        assert server.ask("/predict", picture())[1]["model"] == "birds"


def test_every_accepted_request_is_answered_when_it_is_told_to_stop(bundle):
    results: list[int | str] = []

    def client(server: Running, started: threading.Barrier) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        started.wait()
        while True:
            try:
                connection.connect()
            except ConnectionError:
                return  # the port is closed: it was not accepted
            try:
                while True:
                    connection.request("POST", "/predict", picture(9, (300, 200)))
                    answer = connection.getresponse()
                    answer.read()
                    results.append(answer.status)
                    if answer.getheader("connection") == "close":
                        break
            except (ConnectionError, http.client.HTTPException) as error:
                results.append(repr(error))
            connection.close()

    with running(str(bundle)) as server:
        server.event("ready")
        barrier = threading.Barrier(9)
        threads = [threading.Thread(target=client, args=(server, barrier)) for _ in range(8)]
        for thread in threads:
            thread.start()
        barrier.wait()
        time.sleep(1)
        assert server.stop() == 0
        for thread in threads:
            thread.join(30)
    assert len(results) > 50
    assert set(results) == {200}


def test_sighup_brings_the_next_version_under_load(bundle, tmp_path):
    pets = tmp_path / "pets"
    shutil.copytree(bundle, pets / "1")
    seen, stop = [], threading.Event()
    with running(str(pets)) as server:
        server.event("ready")

        def client() -> None:
            while not stop.is_set():
                status, answer = server.ask("/predict", picture())
                seen.append((status, answer.get("version")))

        threads = [threading.Thread(target=client) for _ in range(3)]
        for thread in threads:
            thread.start()
        for number in (2, 3):
            shutil.copytree(bundle, pets / ".new")
            (pets / ".new").rename(pets / str(number))
            server.process.send_signal(signal.SIGHUP)
            server.event("reloaded", number - 1)
            assert server.ask("/predict", picture())[1]["version"] == str(number)
        stop.set()
        for thread in threads:
            thread.join()
        assert server.stop() == 0
    assert {status for status, _ in seen} == {200}
    assert {version for _, version in seen} == {"1", "2", "3"}


def send(port: int, data: bytes, wait: bool = True) -> bytes:
    """Raw bytes to the server; what it says, if waited for."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        try:
            connection.sendall(data)
            if not wait:
                return b""
            connection.shutdown(socket.SHUT_WR)
            return connection.recv(65536)
        except ConnectionError:
            return b""


def post(body: bytes, path: bytes = b"/predict", headers: bytes = b"", length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    return b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n%s\r\n%s" % (path, size, headers, body)


INFER = b"/v2/models/pets/infer"
MALFORMED = [
    post(picture()[:30]),
    post(enormous_picture()),
    post(b"", length=10**15),
    post(b"x" * 300_000),
    post(b"abc", length=-1),
    post(b'{"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": [7]}]}', INFER),
    post(b'{"inputs": []}', INFER, b"Inference-Header-Content-Length: 99999999999999999999\r\n"),
    post(b"\xff\xff\xff\xff", INFER, b"Inference-Header-Content-Length: 0\r\n"),
    post(b"\x1f\x8b broken", INFER, b"Content-Encoding: gzip\r\n"),
    post(b"--b\r\n\r\n", headers=b"Content-Type: multipart/form-data; boundary=b\r\n"),
    post(b"[" * 100_000, INFER),
    post(b"{}", b"/v2/models/%00%2e%2e/infer"),
    b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 20_000,
    b"nonsense\r\n\r\n",
    b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZZ\r\n",
    b"\x16\x03\x01\x02\x00\x01",
]


def test_malformed_requests_are_the_clients_fault_and_leave_nothing_behind(server):
    def statuses(rounds: int) -> set[int]:
        answers = [send(server.port, one, wait=index % 3 != 1) for index in range(rounds) for one in MALFORMED]
        return {int(answer.split()[1]) for answer in answers if answer.startswith(b"HTTP/")}

    statuses(4)
    memory, files = server.resident(), server.open_files()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        seen = set().union(*pool.map(statuses, [12] * 4))
    assert seen <= {400, 404, 413, 499}
    assert {400, 413} <= seen
    deadline = time.monotonic() + 10
    while server.open_files() > files + 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert server.open_files() <= files + 2
    assert server.resident() < memory + 30e6
    assert not server.events("fault")
    assert server.ask("/predict", picture())[0] == 200


def test_a_slow_body_is_given_up(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(post(b"x", length=1000))
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")
    assert server.ask("/predict", picture())[0] == 200


def test_a_replica_that_is_killed_is_started_again(bundle):
    with running(str(bundle), "--replicas", "2") as server:
        server.event("ready", 2)
        first = server.events("replica_started")[0]["pid"]
        os.kill(first, signal.SIGKILL)
        assert server.event("replica_died")["pid"] == first
        statuses = set()
        while len(server.events("ready")) < 3:
            statuses.add(server.ask("/predict", picture())[0])
        assert statuses == {200}
        assert server.ask("/v2/repository/models/pets/unload", b"{}")[0] == 403
        counted = server.ask("/metrics")[1]["text"]
        assert 'visformer_requests_total{endpoint="/predict",model="pets",status="200",version="1"}' in counted
        assert server.stop() == 0


@pytest.mark.parametrize(
    ("arguments", "reason", "code"),
    [
        ([], "models: nothing to serve", 2),
        (["nothing-here"], "nothing-here", 2),
        (["broken"], "broken: not a bundle that can be used", 2),
        (["broken", "--replicas", "2"], "a replica can't serve", 2),
        (["nothing-here", "--max_in_flight", "0"], "max_in_flight: 0 is out of range", 2),
        (["nothing-here", "--tls_cert", "x"], "tls_cert, tls_key: give both, or neither", 2),
        (["nothing-here", "--api_keys", "none.txt"], "api_keys: none.txt: can't be read", 2),
        (["nothing-here", "--host", "256.0.0.1"], "port: can't listen on 256.0.0.1", 2),
    ],
)
def test_what_can_not_be_served_ends_in_one_line(arguments, reason, code, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "bundle.json").write_text("{}")
    command = [sys.executable, "-m", "visformer", "serve", *arguments, "--port", "0"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert ended.returncode == code
    assert "Traceback" not in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("visformer: error: ")
    assert reason in ended.stderr
