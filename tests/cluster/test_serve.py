"""The server on Ray Serve, as a process of its own: Triton's clients, a rolling update, and a killed replica."""

from __future__ import annotations

import collections
import fcntl
import http.client
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="ray is not installed: pip install 'visformer[cluster]'")
pytest.importorskip("onnxruntime")

from tests.serving.fakes import picture
from tests.serving.running import Running, running

TRITON_PYTHON = os.environ.get("VISFORMER_TRITON_PYTHON", sys.executable)
CALLS = Path(__file__).parents[1] / "serving" / "triton_calls.py"


@contextmanager
def on_ray(*arguments: str):
    """Two that start at the same time may choose the same ports: tests in other processes wait for this one's start."""
    with ExitStack() as stack:
        with open(Path(tempfile.gettempdir()) / "visformer-tests-ray.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            server = stack.enter_context(running(*arguments, "--engine", "ray", "--access_log", "False"))
            server.event("ready")
        yield server


def address(server: Running, scheme: str) -> str:
    return next(one["url"] for one in server.events("listening") if one["url"].startswith(scheme)).partition("//")[2]


def replicas(server: Running) -> list[int]:
    """Processes of the server's replicas, which Ray starts below it."""
    parents, names = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                names[int(entry.name)] = (entry / "cmdline").read_bytes()
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:  # it has ended
                continue

    def below(pid: int) -> bool:
        return pid == server.process.pid or (pid in parents and below(parents[pid]))

    return [pid for pid, name in names.items() if name.startswith(b"ray::ServeReplica") and below(pid)]


class Load:
    """Clients that ask again and again; `answers` counts statuses, and errors by their names."""

    def __init__(self, host: str, clients: int = 3) -> None:
        self.host, self.image = host, picture(80, (40, 30))
        self.answers: collections.Counter = collections.Counter()
        self.versions: set[bytes] = set()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._client) for _ in range(clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(40)

    def _client(self) -> None:
        connection = http.client.HTTPConnection(self.host, timeout=30)
        while not self._stop.is_set():
            try:
                connection.request("POST", "/predict", self.image)
                answer = connection.getresponse()
                body = answer.read()
                self.answers[answer.status] += 1
                self.versions.add(body.partition(b'"version":"')[2][:1])
            except (OSError, http.client.HTTPException) as error:
                self.answers[type(error).__name__] += 1
                connection.close()


@pytest.fixture(scope="module")
def alone(bundle):
    with on_ray(str(bundle), "--grpc_port", "0") as server:
        yield server


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_every_call_of_tritons_client(protocol, alone, tmp_path):
    if subprocess.run([TRITON_PYTHON, "-c", f"import tritonclient.{protocol}.aio"], capture_output=True).returncode:
        pytest.skip(f"tritonclient[{protocol}] is not installed for {TRITON_PYTHON}")
    (tmp_path / "a.png").write_bytes(picture(80, (40, 30)))
    ended = subprocess.run(
        [TRITON_PYTHON, CALLS, protocol, address(alone, protocol), tmp_path / "a.png"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == "all calls answered"


@pytest.mark.slow
def test_grpc_without_tritons_client(alone):
    """Refusals keep their codes and details through Serve; the page and the metrics are there as well."""
    import grpc

    from visformer.serving.messages import SERVICE, message

    with grpc.insecure_channel(address(alone, "grpc")) as channel:

        def call(name: str, **fields):
            send = channel.unary_unary(
                f"/{SERVICE}/{name}",
                request_serializer=lambda request: request.SerializeToString(),
                response_deserializer=message(f"{name}Response").FromString,
            )
            return send(message(f"{name}Request")(**fields), timeout=20)

        assert call("ServerReady").ready
        request = {"name": "image", "datatype": "BYTES", "shape": [1], "contents": {"bytes_contents": [picture(9)]}}
        answer = call("ModelInfer", model_name="pets", id="seven", inputs=[request])
        assert (answer.id, answer.model_name, len(answer.raw_output_contents[0])) == ("seven", "pets", 4 * 5)
        for fields, code, words in (
            ({"model_name": "none", "inputs": [request]}, grpc.StatusCode.NOT_FOUND, "no model called none"),
            ({"model_name": "pets"}, grpc.StatusCode.INVALID_ARGUMENT, "input"),
        ):
            with pytest.raises(grpc.RpcError) as refused:
                call("ModelInfer", **fields)
            assert refused.value.code() == code
            assert words in refused.value.details()
    assert alone.ask("/v2/health/ready")[0] == 200
    assert b"visformer_requests_total" in alone.ask("/metrics")[1]["text"].encode()
    assert "<html" in alone.ask("/")[1]["text"]


@pytest.mark.slow
def test_a_rolling_update_and_a_killed_replica_under_load(bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", "2")
    shutil.copytree(bundle, tmp_path / "pets" / "1")
    with on_ray(str(tmp_path / "pets"), "--replicas", "2") as server:
        with Load(address(server, "http")) as load:
            time.sleep(1)
            shutil.copytree(bundle, tmp_path / "pets" / ".2")
            (tmp_path / "pets" / ".2").rename(tmp_path / "pets" / "2")
            server.process.send_signal(signal.SIGHUP)
            server.event("reloaded")
            time.sleep(1)
        assert set(load.answers) == {200}, load.answers
        assert load.versions == {b"1", b"2"}
        assert server.ask("/predict", load.image)[1]["version"] == "2"

        with Load(address(server, "http")) as load:
            time.sleep(1)
            # One that still drains, of the version before, may be among them: the others answer.
            killed = replicas(server)[-1]
            os.kill(killed, signal.SIGKILL)
            time.sleep(4)
        assert load.answers[200] > 50
        # A request that was at the replica is sent to another, when HAProxy has all of it; its own proxy does not.
        lost = load.answers.total() - load.answers[200]
        assert lost <= 3, load.answers
        deadline = time.monotonic() + 30
        while len(replicas(server)) < 2 or killed in replicas(server):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert server.stop() == 0
        assert server.events("stopped")


def test_the_ports_that_are_taken_are_told(bundle, capsys):
    import socket

    from visformer import cli

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert cli.main(["serve", str(bundle), "--engine", "ray", "--port", port]) == 2
    assert f"port: can't listen on 127.0.0.1, port {port}" in capsys.readouterr().err
