"""Serves for a long time and under attack, and holds the server against what it was at the start.

    python -m tests.soak.serving [--requests 100000] [--malformed 10000] [--seed 0]

`visformer serve` runs as a process with a small model (five classes, 32 pixels, ONNX). With `--requests`, 64 clients
send valid requests of every kind: raw files of three formats, forms, the protocol's JSON and binary tensors. With
`--malformed`, sixteen threads send what no client should: files cut short and of wrong types, sizes that are not so,
decompression bombs, random damage to good requests, bodies and headers that trickle, connections that are dropped or
reset half-way. 0 leaves a part out.

The rules; a part that breaks one makes the exit code 1:

- no answer is 5xx but 503; valid requests are answered 200 or 503; the log has no fault
- memory is flat: after the first fifth of the requests, a straight line through the samples of the resident set, taken
  at twenty moments or more while nothing is under way, rises by less than 16 MiB until the end (64 MiB for fewer than
  5,000 requests: the allocator's arenas are still filling)
- threads and open files are at most two more afterwards than after the first fifth
- the answer to one image is the same at the end as at the start

pytest does not collect this file; tests/serving/test_soak.py runs it with a few hundred requests.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import functools
import gzip
import io
import itertools
import json
import random
import socket
import statistics
import struct
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

from tests.serving.fakes import enormous_picture
from tests.serving.models import write_small_bundle, write_small_checkpoint
from tests.serving.running import Running, running
from visformer.verbs.bench_serve_client import Load, post

FLAT_BYTES, FILLING_BYTES, ENOUGH = 16 * 2**20, 64 * 2**20, 5000
WARM = 0.2  # the first share of the requests, which says nothing of memory
SAMPLES = 20
CLIENTS = 64
ATTACKERS = 16
TURN_S = 2.0
ANSWER_S = 1.5  # more than a body may take
INFER = "/v2/models/pets/infer"
SLOW_BODIES, SLOW_HEADERS = 1 / 100, 1 / 1000  # shares of the malformed requests; each takes 1 s and 10 s


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--malformed", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    broken: list[str] = []
    with tempfile.TemporaryDirectory() as place:
        bundle = write_small_bundle(write_small_checkpoint(Path(place) / "best.safetensors"), Path(place) / "pets")
        for count, part in ((options.requests, valid), (options.malformed, malformed)):
            if count:
                with running(str(bundle), "--body_timeout_s", "1", "--access_log", "False") as server:
                    server.event("ready")
                    broken += held(server, count, functools.partial(part, count=count, seed=options.seed))
    for rule in broken:
        print(f"BROKEN: {rule}")
    print("a rule was broken" if broken else "every rule was kept")
    return 1 if broken else 0


class Watch:
    """The server's memory, threads and open files, as they were after so many requests."""

    def __init__(self, server: Running) -> None:
        self.server = server
        self.statuses: Counter[str] = Counter()
        self.memory: list[tuple[int, int]] = []  # (requests, bytes)
        self.settled: tuple[int, int] | None = None  # threads and open files once it is warm
        self.bad: list[str] = []

    def sample(self, requests: int, share: float) -> None:
        """Look at it; `share` of the requests are done."""
        self.memory.append((requests, self.server.resident()))
        if self.settled is None and share >= WARM:
            self.settled = self.threads(), self.server.open_files()

    def threads(self) -> int:
        status = Path(f"/proc/{self.server.process.pid}/status").read_text()
        return int(status.split("Threads:")[1].split()[0])


def held(server: Running, count: int, work: Callable[[Watch], None], patience_s: float = 15) -> list[str]:
    """Do the work, print what came of it, and return the rules that were broken. Threads and files of connections that
    have just ended may stay for `patience_s`."""
    watch = Watch(server)
    question = encoded("JPEG", np.random.default_rng(0))
    before = server.ask("/predict?top_k=5", question)
    began = time.monotonic()
    work(watch)
    seconds = time.monotonic() - began
    assert watch.settled is not None
    threads, files = watch.settled
    deadline = time.monotonic() + patience_s
    while (server.open_files() > files + 2 or watch.threads() > threads + 2) and time.monotonic() < deadline:
        time.sleep(0.1)
    after = server.ask("/predict?top_k=5", question)
    rise = risen(watch.memory)
    total, first, last = sum(watch.statuses.values()), watch.memory[0][1], watch.memory[-1][1]
    counted = ", ".join(f"{count:,} x {status}" for status, count in sorted(watch.statuses.items()))
    print(f"{total:,} requests in {seconds:,.0f} s: {counted}")
    print(
        f"  resident memory {first / 2**20:.1f} MiB at the start, {last / 2**20:.1f} at the end; the line through the "
        f"samples rises by {rise / 2**20:+.1f} MiB\n"
        f"  threads {threads} -> {watch.threads()}, open files {files} -> {server.open_files()}",
        flush=True,
    )
    allowed = FLAT_BYTES if count >= ENOUGH else FILLING_BYTES
    rules = {
        f"memory is not flat: it rises by {rise / 2**20:.1f} MiB": rise < allowed,
        f"threads: {threads} -> {watch.threads()}": watch.threads() <= threads + 2,
        f"open files: {files} -> {server.open_files()}": server.open_files() <= files + 2,
        f"the answer was {before}, and is {after}": before == after and after[0] == 200,
        f"the log has faults: {server.events('fault')[:1]}": not server.events("fault"),
        "it does not stop with exit code 0": server.stop() == 0,
    }
    return [*watch.bad, *(rule for rule, kept in rules.items() if not kept)]


def progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"{text}   ", end="\r", file=sys.stderr, flush=True)


def risen(samples: list[tuple[int, int]]) -> float:
    """Bytes by which a straight line through (requests, bytes) rises, without the first share `WARM` of requests."""
    counted = [sample for sample in samples if sample[0] >= WARM * samples[-1][0]]
    requests, memory = zip(*counted, strict=True)
    if len(set(requests)) < 2:
        return 0.0
    return statistics.linear_regression(requests, memory).slope * (requests[-1] - requests[0])


# ---- valid requests


def encoded(kind: str, rng: np.random.Generator, size: tuple[int, int] = (75, 100)) -> bytes:
    """An image file of noise."""
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(file, kind)
    return file.getvalue()


def good_requests(seed: int) -> list[bytes]:
    """Requests of every kind, each of which is answered 200."""
    rng = np.random.default_rng(seed)
    made = [post("/predict?top_k=3", encoded(kind, rng)) for kind in ("JPEG", "JPEG", "PNG", "WEBP")]
    jpeg, png = encoded("JPEG", rng), encoded("PNG", rng, (33, 47))
    part = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n%s\r\n'
    form = part % jpeg + part % png + b"--b--\r\n"
    made.append(post("/predict", form, ["Content-Type: multipart/form-data; boundary=b"]))
    texts = [base64.b64encode(one).decode() for one in (jpeg, png)]
    given = {"name": "image", "datatype": "BYTES", "shape": [2, 1], "data": texts}
    plain = json.dumps({"inputs": [given]}).encode()
    made += [post(INFER, plain), post(INFER, gzip.compress(plain, mtime=0), ["Content-Encoding: gzip"])]
    elements = struct.pack("<I", len(jpeg)) + jpeg
    made.append(binary({"name": "image", "datatype": "BYTES", "shape": [1]}, elements))
    pixels = rng.normal(size=(3, 3, 32, 32)).astype("<f4").tobytes()
    made.append(binary({"name": "images", "datatype": "FP32", "shape": [3, 3, 32, 32]}, pixels))
    return made


def binary(tensor: dict, data: bytes) -> bytes:
    """An infer request with a raw tensor behind its JSON."""
    head = json.dumps({"inputs": [{**tensor, "parameters": {"binary_data_size": len(data)}}]}).encode()
    return post(INFER, head + data, [f"Inference-Header-Content-Length: {len(head)}"])


def valid(watch: Watch, count: int, seed: int) -> None:
    """`count` valid requests, or a few more: a turn is not cut short."""
    load = Load(watch.server.port, good_requests(seed))
    seconds = min(TURN_S, count / 10_000)
    while (done := sum(watch.statuses.values())) < count:
        turn = asyncio.run(load.turn(CLIENTS, seconds))
        watch.statuses.update({str(status): number for status, number in turn.statuses.items()})
        done = sum(watch.statuses.values())
        watch.sample(done, done / count)
        if turn.errors or set(turn.statuses) - {200, 503}:
            watch.bad.append(f"valid requests: {dict(turn.statuses)}, {dict(turn.errors)}")
            break
        progress(f"{done:,} requests, {watch.memory[-1][1] / 2**20:.1f} MiB")
    watch.settled = watch.settled or (watch.threads(), watch.server.open_files())


# ---- malformed ones


def bomb_picture(side: int) -> bytes:
    """A PNG of some kB that really unfolds to `side` x `side` pixels."""
    packing = zlib.compressobj(9)
    rows = b"".join(packing.compress(bytes(1 + 3 * side)) for _ in range(side)) + packing.flush()

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def declared(length: int | str, body: bytes = b"x", path: str = "/predict") -> bytes:
    """A request whose header says another length than its body has."""
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode() + body


def bad_requests(seed: int) -> list[bytes]:
    """What no client should send, whole."""
    rng = np.random.default_rng(seed)
    jpeg, png, bomb = encoded("JPEG", rng), encoded("PNG", rng), bomb_picture(6000)
    zeros = gzip.compress(bytes(50_000_000), mtime=0)
    image = {"name": "image", "datatype": "BYTES", "shape": [1]}
    pixels = {"name": "images", "datatype": "FP32", "shape": [1, 3, 32, 32]}
    wrong = [
        {}, {"inputs": []}, {"inputs": [image]}, {"inputs": [{**image, "data": [7]}]}, {"inputs": {"a": 1}},
        {"inputs": [{**image, "data": ["////"], "shape": [2**40]}]}, {"inputs": [{**image, "shape": "x", "data": []}]},
        {"inputs": [{**pixels, "data": [1e400]}]}, {"inputs": [{**pixels, "data": [[[["a"]]]]}]}, [1], 7, None,
        {"inputs": [{**pixels, "shape": [2**31 - 1] * 8, "data": [1.0]}]}, {"inputs": [pixels, image]},
        {"inputs": [{**image, "data": ["AAAA"]}], "outputs": [{"name": "nothing"}]},
        {"inputs": [{**image, "data": ["AAAA"]}], "parameters": {"timeout": -1}},
    ]  # fmt: skip
    return [
        *(post("/predict", data) for data in (jpeg[: len(jpeg) // 2], png[:40], jpeg[:2], b"", b"GIF89a", bytes(5000))),
        *(post("/predict", data) for data in (enormous_picture(), bomb, b"%!PS-Adobe", b"<svg></svg>", b"II*\0" * 9)),
        *(post(INFER, json.dumps(document).encode()) for document in wrong),
        *(post(INFER, text) for text in (b"[" * 100_000, b'{"inputs": [NaN]}', b"\xff\xfe", b"{", jpeg)),
        post(INFER, zeros, ["Content-Encoding: gzip"]), post(INFER, zeros[:900], ["Content-Encoding: gzip"]),
        post(INFER, jpeg, ["Content-Encoding: br"]), post(INFER, b"{}", ["Inference-Header-Content-Length: -1"]),
        post(INFER, b"{}", ["Inference-Header-Content-Length: 99999999999999999999"]),
        binary({**image, "parameters": {}}, b"\xff\xff\xff\xff"), binary(pixels, b"1234567"),
        *(declared(length) for length in (10**15, -1, "abc", "1, 2", 10**30, "0x10", "")),
        declared(5, jpeg), declared(0, jpeg), post("/predict?top_k=-1", jpeg), post("/predict?top_k=1e9", jpeg),
        post("/predict?model=../../etc", jpeg), post("/v2/models/%00/infer", b"{}"), post("/v2/nothing", b""),
        post("/predict", jpeg, ["Content-Type: multipart/form-data"]), post("/explain?index=-5", jpeg),
        post("/predict", b"--b\r\n\r\n" * 2000, ["Content-Type: multipart/form-data; boundary=b"]),
        post("/predict", jpeg, ["Transfer-Encoding: chunked"]), post("/predict", jpeg, ["Expect: 100-continue"]),
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", b"nonsense\r\n\r\n", b"\x16\x03\x01\x02\x00\x01",
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 20_000 + b"\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZZ\r\n",
        b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\nx",
    ]  # fmt: skip


def damaged(data: bytes, chance: random.Random) -> bytes:
    """A request with some of its bytes changed, dropped or repeated, anywhere or in its first 600."""
    made = bytearray(data)
    for _ in range(chance.randint(1, 8)):
        place = chance.randrange(min(len(made), chance.choice((600, len(made)))))
        kind = chance.randrange(3)
        if kind == 0:
            made[place] = chance.randrange(256)
        elif kind == 1:
            del made[place : place + chance.randint(1, 30)]
        else:
            made[place:place] = made[place : place + chance.randint(1, 30)]
    return bytes(made)


class Attack:
    """Sends malformed requests from several threads, and counts what is said to them."""

    def __init__(self, watch: Watch, seed: int) -> None:
        self.watch, self.seed = watch, seed
        self.good, self.bad = good_requests(seed), bad_requests(seed)
        self.lock = threading.Lock()

    def run(self, numbers: range) -> None:
        """Send the requests of these numbers, and wait for their ends."""
        with ThreadPoolExecutor(ATTACKERS) as pool:
            list(pool.map(self._one, numbers))

    def _one(self, number: int) -> None:
        self._count(self._sent(random.Random(f"{self.seed} {number}")))

    def _sent(self, chance: random.Random) -> bytes:
        dice = chance.random()
        if dice < SLOW_HEADERS:
            return self._exchange(b"GET /v2 HTTP/1.1\r\nHost: x\r\n", trickle=b"X: y\r\n")
        if dice < SLOW_HEADERS + SLOW_BODIES:
            return self._exchange(declared(1000), trickle=b"x")
        data = chance.choice(self.bad) if chance.random() < 0.6 else damaged(chance.choice(self.good), chance)
        if dice < 0.15:
            return self._leave(data[: chance.randrange(1, len(data))], reset=chance.random() < 0.5)
        if dice < 0.25:
            return self._leave(data, reset=chance.random() < 0.5)
        return self._exchange(data)

    def _exchange(self, data: bytes, trickle: bytes = b"") -> bytes:
        """Send, and read what is answered first; what does not come within `ANSWER_S` is not waited for."""
        with suppress(OSError), self._connection() as connection:
            connection.sendall(data)
            if not trickle:
                connection.settimeout(ANSWER_S)
                return connection.recv(65536)
            connection.settimeout(0.2)
            for _ in range(150):
                try:
                    return connection.recv(65536)
                except TimeoutError:
                    connection.sendall(trickle)
        return b""

    def _leave(self, data: bytes, reset: bool) -> bytes:
        """Send, and go without reading; `reset` takes back what the kernel has not delivered."""
        with suppress(OSError), self._connection() as connection:
            if reset:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sendall(data)
        return b""

    def _connection(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.watch.server.port), timeout=40)

    def _count(self, answer: bytes) -> None:
        said = answer.split(b" ", 2)[1].decode() if answer.startswith(b"HTTP/1.1 ") else "no answer"
        with self.lock:
            self.watch.statuses[said] += 1
            if said.startswith("5") and said != "503":
                self.watch.bad.append(f"malformed requests: {answer[:300]!r}")


def malformed(watch: Watch, count: int, seed: int) -> None:
    """`count` malformed requests, some of which turn out to be valid."""
    attack = Attack(watch, seed)
    places = [round(count * part / SAMPLES) for part in range(SAMPLES + 1)]
    for first, end in itertools.pairwise(places):
        attack.run(range(first, end))
        watch.sample(end, end / count)
        progress(f"{end:,} malformed requests, {watch.memory[-1][1] / 2**20:.1f} MiB")


if __name__ == "__main__":
    sys.exit(main())
