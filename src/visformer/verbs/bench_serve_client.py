"""The clients of `visformer bench --what serve`: many connections in one process, each of which asks, waits, and asks
again.

They speak HTTP/1.1 themselves, over connections that stay open, so that their own share of the processor is small. One
that is told 503 waits as long as the answer says (Retry-After). It runs as a process of its own, so that it shares no
event loop with the server, and imports nothing heavy.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SETTLE_S = 0.5  # before answers count, and until half of the clients have had one: then there is a steady flow
LONGEST_SETTLE_S = 15.0
PATIENCE_S = 60.0  # for the last answers of a turn
_AGAIN_AFTER_S = 0.1  # a connection that could not be made
_LENGTH = re.compile(rb"content-length: *(\d+)")
_RETRY_AFTER = re.compile(rb"retry-after: *(\d+)")


@dataclass
class Turn:
    """What came of a turn. `statuses` and `errors` are of every request, the rest of the `seconds` that count."""

    seconds: float = 0.0
    latencies_s: list[float] = field(default_factory=list)  # of answers with status 200
    statuses: Counter[int] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    server_processor_s: float | None = None
    client_processor_s: float = 0.0
    server_peak_bytes: int | None = None


class Load:
    """Clients of one server; `pid` is its process, for what it takes of processor and memory (0: not asked for)."""

    def __init__(self, port: int, requests: Sequence[bytes], pid: int = 0) -> None:
        self.port, self.pid = port, pid
        self.requests = itertools.cycle(requests)
        self.over = False
        self.counting = False
        self.result = Turn()
        self._open: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def turn(self, clients: int, seconds: float) -> Turn:
        """Let so many clients ask for so long, and wait for their last answers."""
        self.over, self.result = False, Turn()
        for _ in range(clients):
            self.connect()
        await self._settle(clients, min(SETTLE_S, seconds / 4))
        forget_peak(self.pid)
        server, own, began = processor_s(self.pid), time.process_time(), time.perf_counter()
        self.counting = True
        await asyncio.sleep(seconds)
        self.counting = False
        result, after = self.result, processor_s(self.pid)
        result.seconds, result.client_processor_s = time.perf_counter() - began, time.process_time() - own
        result.server_processor_s = None if server is None or after is None else after - server
        result.server_peak_bytes = memory(self.pid, "VmHWM")
        await self._finish()
        return result

    async def _settle(self, clients: int, at_least_s: float) -> None:
        began = time.perf_counter()
        while (waited := time.perf_counter() - began) < at_least_s or (
            self.result.statuses[200] < clients / 2 and waited < LONGEST_SETTLE_S
        ):
            await asyncio.sleep(0.01)

    async def _finish(self) -> None:
        self.over = True
        for connection in list(self._open):
            connection.leave_if_idle()
        with suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_S):
                while self._open or self._tasks:
                    await asyncio.sleep(0.01)
        for connection in list(self._open):
            self.result.errors["no answer"] += 1
            connection.transport.abort()

    def connect(self) -> None:
        """Open a connection, again and again until there is one."""
        task = asyncio.get_running_loop().create_task(self._connect())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect(self) -> None:
        while not self.over:
            try:
                await asyncio.get_running_loop().create_connection(lambda: _Connection(self), "127.0.0.1", self.port)
                return
            except OSError as error:
                self.result.errors[type(error).__name__] += 1
                await asyncio.sleep(_AGAIN_AFTER_S)

    def answered(self, status: int, latency_s: float) -> None:
        """Count an answer."""
        self.result.statuses[status] += 1
        if self.counting and status == 200:
            self.result.latencies_s.append(latency_s)

    def opened(self, connection: _Connection) -> None:
        self._open.add(connection)

    def closed(self, connection: _Connection, unanswered: bool, error: Exception | None) -> None:
        """Note that a connection has ended, and make another."""
        self._open.discard(connection)
        if unanswered:
            self.result.errors[type(error).__name__ if error else "closed without an answer"] += 1
        if not self.over:
            self.connect()


class _Connection(asyncio.Protocol):
    """One client, for as long as its connection lasts."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.received = bytearray()
        self.asked: float | None = None  # when; None while nothing is awaited

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.set_write_buffer_limits(high=2**24)
        self.load.opened(self)
        self.ask()

    def ask(self) -> None:
        if self.transport.is_closing():
            return
        if self.load.over:
            self.transport.close()
            return
        self.asked = time.perf_counter()
        self.transport.write(next(self.load.requests))

    def leave_if_idle(self) -> None:
        if self.asked is None:
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        self.received += data
        end = self.received.find(b"\r\n\r\n")
        if end < 0:
            return
        head = bytes(self.received[:end]).lower()
        if len(self.received) < end + 4 + _number(_LENGTH, head) or self.asked is None:
            return
        self.received.clear()
        status, latency_s = int(head[9:12]), time.perf_counter() - self.asked
        self.asked = None
        self.load.answered(status, latency_s)
        wait_s = _number(_RETRY_AFTER, head) if status == 503 else 0
        if b"connection: close" in head:
            self.transport.close()
        elif wait_s:
            asyncio.get_running_loop().call_later(wait_s, self.ask)
        else:
            self.ask()

    def connection_lost(self, exc: Exception | None) -> None:
        self.load.closed(self, self.asked is not None, exc)


def _number(pattern: re.Pattern[bytes], head: bytes) -> int:
    found = pattern.search(head)
    return int(found[1]) if found else 0


def post(path: str, body: bytes, headers: Sequence[str] = ()) -> bytes:
    """A request, ready to be sent."""
    lines = (f"POST {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(body)}", *headers)
    return "".join(f"{line}\r\n" for line in lines).encode() + b"\r\n" + body


def run_clients(pipe: Any, port: int, pid: int, folder: str) -> None:
    """The process of the clients: gets (clients, seconds) from `pipe` and gives a `Turn`, until it gets None. They send
    the JPEGs below `folder` in turn."""
    requests = [post("/predict", path.read_bytes()) for path in sorted(Path(folder).rglob("*.jpg"))]
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        load = Load(port, requests, pid)
        while (asked := pipe.recv()) is not None:
            pipe.send(runner.run(load.turn(*asked)))


def _loop_factory() -> Any:
    """uvloop's, where it is: the same as the server's."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


# ---- what a process takes, as Linux tells it; None elsewhere


def processor_s(pid: int) -> float | None:
    """Seconds of processors that a process has used, in all its threads."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # user and system, in ticks


def memory(pid: int, kind: str) -> int | None:
    """Bytes of a process's resident memory: VmRSS now, VmHWM its peak."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    found = re.search(rf"^{kind}:\s+(\d+) kB", text, flags=re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def forget_peak(pid: int) -> None:
    """Let a process's peak of memory begin anew, where that is allowed."""
    with suppress(OSError):
        Path(f"/proc/{pid}/clear_refs").write_text("5")
