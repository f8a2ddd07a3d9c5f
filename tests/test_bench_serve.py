"""`visformer bench --what serve`: its processes on a small model, and the figures that are made of their turns."""

import asyncio
import json
import os
import socket
import threading
from collections import Counter

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from tests.serving.models import write_small_bundle, write_small_checkpoint
from visformer.cli import main
from visformer.verbs import bench_serve
from visformer.verbs.bench_serve_client import Load, Turn, memory, post, processor_s
from visformer.verbs.bench_serve_loop import Pass

SMALL = [
    "bench", "--what", "serve", "--clients", "1,3", "--num_images", "3", "--seconds", "0.3", "--repeats", "2",
    "--warmup", "0",
]  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_small_checkpoint(tmp_path_factory.mktemp("run") / "best.safetensors")


@pytest.mark.slow
def test_the_document_holds_loops_and_clients(checkpoint, tmp_path, capsys):
    bundle, output = write_small_bundle(checkpoint, tmp_path / "bundle"), tmp_path / "serve.json"
    capsys.readouterr()
    assert main([*SMALL, "--ckpt_path", str(bundle), "--json", "--output", str(output)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert json.loads(output.read_text()) == document
    assert (document["what"], document["against"], document["clients"]) == ("serve", "loop", [1, 3])
    assert {"torch", "uvicorn", "onnxruntime", "pillow"} <= set(document["versions"])
    [result] = document["results"]
    assert (result["engine"], result["precision"], result["image_size"]) == ("onnxruntime", "fp32", [32, 32])
    assert (result["images"], result["batch_size"]) == (3, 16) and result["bytes_per_image"] > 50_000
    one, batches = result["loops"]
    assert (one["name"], batches["name"], batches["ratio"]) == (bench_serve.ONE, bench_serve.BATCHES, 1.0)
    for count, record in zip((1, 3), result["clients"], strict=True):
        assert (record["clients"], record["errors"], list(record["statuses"])) == (count, {}, ["200"])
        assert record["against"] == (bench_serve.ONE if count == 1 else bench_serve.BATCHES)
        low, high = record["images_per_s_quartiles"]
        assert 0 < low <= record["images_per_s"] <= high and record["ratio"] > 0
        assert record["statuses"]["200"] >= 2 * 0.3 * low
        latency = record["latency_ms"]
        assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"] <= latency["max"]
        assert record["processor_ms_per_request"] > 0 and record["processor_ratio"] > 0
        assert record["peak_memory_bytes"] > 30e6


@pytest.mark.slow
def test_a_checkpoint_is_served_and_the_tables_name_everything(checkpoint, capsys):
    assert main([*SMALL, "--ckpt_path", str(checkpoint), "--device_target", "cpu"]) == 0
    printed = capsys.readouterr().out
    for words in (
        "serving visformer_tiny, torch_cpu fp32",
        bench_serve.ONE,
        "1 client",
        "3 clients",
        "p99 ms",
        "x 200",
    ):
        assert words in printed


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--clients", "0"], "clients must be at least 1"),
        (["--seconds", "0"], "seconds from 0.1"),
        (["--ckpt_path", "nothing-here"], "nothing-here"),
        (["--models", "visformer_tinny"], "visformer_tinny"),
    ],
)
def test_what_is_asked_wrongly_ends_in_one_line(words, reason, capsys):
    assert main([*SMALL, *words]) in (1, 2)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("visformer: error: ") and reason in last


# ---- the figures


def test_rates_and_ratios_are_of_the_same_round():
    one = [Pass(10, 1.0, 2.0), Pass(30, 1.0, 3.0)]
    turns = [
        Turn(2.0, [0.1] * 10, Counter({200: 12, 503: 1}), Counter(), 4.0, 1.0, 7_000_000),
        Turn(1.0, [0.3] * 15, Counter({200: 15}), Counter({"reset": 2}), 3.0, 1.5, 9_000_000),
    ]
    kept = {bench_serve.BATCHES: one, "2 clients": turns}
    rated = {
        name: bench_serve.Timed(
            bench_serve._contender(name, "fp32", {}, lambda: None), [bench_serve._seconds_each(t) for t in made], True
        )
        for name, made in kept.items()
    }
    record = bench_serve._client_record(2, rated["2 clients"], rated, kept, turns)
    assert record["images_per_s"] == pytest.approx((10 / 2 + 15 / 1) / 2)
    assert record["ratio"] == pytest.approx((5 / 10 + 15 / 30) / 2)
    assert record["processor_ms_per_request"] == pytest.approx((400 + 200) / 2)
    assert record["processor_ratio"] == pytest.approx((200 / 400 + 100 / 200) / 2)
    assert record["client_processor_ms_per_request"] == pytest.approx(100)
    assert record["latency_ms"]["p50"] == pytest.approx(300) and record["latency_ms"]["max"] == pytest.approx(300)
    assert record["statuses"] == {"200": 27, "503": 1} and record["errors"] == {"reset": 2}
    assert record["peak_memory_bytes"] == 9_000_000


def test_what_a_process_takes_is_read_where_it_can_be():
    before = processor_s(os.getpid())
    assert before is not None and before > 0
    assert sum(range(3_000_000)) and processor_s(os.getpid()) > before
    assert memory(os.getpid(), "VmRSS") > 10e6
    assert processor_s(0) is None and memory(0, "VmRSS") is None


# ---- the clients


class Answering:
    """A server of canned answers, one for each request in turn, on a thread; `None` closes the connection instead."""

    def __init__(self, answers: list[bytes | None]) -> None:
        self.answers, self.asked = answers, 0
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port = self.listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            connection, _ = self.listening.accept()
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            while connection.recv(65536):
                answer = self.answers[min(self.asked, len(self.answers) - 1)]
                self.asked += 1
                if answer is None:
                    return
                connection.sendall(answer[:20])
                connection.sendall(answer[20:])


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbody"
BUSY = b"HTTP/1.1 503 Busy\r\nretry-after: 1\r\ncontent-length: 0\r\n\r\n"
LAST = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


def turn(answers: list[bytes | None], clients: int = 1, seconds: float = 0.2) -> Turn:
    server = Answering(answers)
    return asyncio.run(Load(server.port, [post("/predict", b"x")]).turn(clients, seconds))


def test_answers_are_counted_whole_and_errors_by_their_kind():
    result = turn([OK], clients=3)
    assert set(result.statuses) == {200} and not result.errors
    assert 0 < len(result.latencies_s) <= result.statuses[200]
    assert result.seconds == pytest.approx(0.2, abs=0.15)
    assert turn([OK, None, OK]).errors == Counter({"closed without an answer": 1})


def test_a_client_that_is_told_to_wait_waits():
    result = turn([BUSY, OK], seconds=0.5)
    assert result.statuses[503] == 1 and result.statuses[200] > 1


def test_a_connection_that_the_server_ends_is_made_again():
    result = turn([LAST, OK])
    assert result.statuses[200] > 2 and not result.errors
