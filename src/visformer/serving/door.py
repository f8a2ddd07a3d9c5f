"""Who comes in: how many at a time, with how many bytes, for how long, and whether they are still there.

Requests are counted here, at the door. (A limit on the queue before the model never fires: decoding queues first.) A
request that finds the house full is told so before its body is read; it takes its place only when its body is there, so
that slow clients fill no places. The work for a request ends when its deadline passes or its client has gone.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from visformer.serving.refusals import CLIENT_GONE, Refusal, bad, body_too_large, busy, late
from visformer.serving.settings import Settings
from visformer.serving.statistics import Statistics

T = TypeVar("T")
Gone = Callable[[], Coroutine[Any, Any, None]]
_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_KINDS = {"queue": "queue", "decode": "compute_input", "compute": "compute_infer", "output": "compute_output"}


@dataclass
class Call:
    """One request, from its first byte to its answer: what the log and the metrics say of it."""

    request_id: str
    deadline_s: float  # on the event loop's clock
    timeout_s: float
    started: float = field(default_factory=time.perf_counter)
    bytes_held: int = 0
    model: str = ""
    version: str = ""
    images: int = 0
    statistics: Statistics | None = None  # of the model, once it is known
    stages: dict[str, float] = field(default_factory=dict)  # seconds
    limit: asyncio.Timeout | None = None  # while it is being worked on

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.perf_counter() - self.started

    def shorten(self, timeout_s: float) -> None:
        """Take an earlier deadline, at the client's wish; a later one is not given. Raises `Refusal` 400."""
        if not timeout_s > 0:
            raise bad(f"timeout: {timeout_s:g} s is out of range; it must be above 0")
        if timeout_s < self.timeout_s:
            self.deadline_s += timeout_s - self.timeout_s
            self.timeout_s = timeout_s
            if self.limit is not None:
                self.limit.reschedule(self.deadline_s)

    def count(self, good: bool) -> None:
        """Enter it into its model's statistics, now that it is over."""
        if self.statistics is None:
            return
        if good:
            stages = {kind: self.stages.get(stage, 0.0) for stage, kind in _KINDS.items()}
            self.statistics.success(self.images, {"success": self.seconds, **stages})
        else:
            self.statistics.fail(self.seconds)


class Door:
    """Counts what is in flight. Lives on the event loop."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.in_flight = 0
        self.bytes_held = 0
        self.draining = False  # answers go on, but nobody should send more
        self.closing = False  # the ports are closed

    def enter(self, request_id: str = "") -> Call:
        """Begin a request; `request_id` is the client's, which is kept if it is short and plain."""
        known = request_id if _REQUEST_ID.fullmatch(request_id) else f"{random.getrandbits(64):016x}"
        timeout_s = self.settings.timeout_s
        return Call(known, asyncio.get_running_loop().time() + timeout_s, timeout_s)

    def leave(self, call: Call) -> None:
        """End it: its bytes are free. (`Call.count` and the metrics have what came of it.)"""
        self.bytes_held -= call.bytes_held
        call.bytes_held = 0

    def check(self) -> None:
        """Raise `Refusal` 503 when the house is full."""
        if self.in_flight >= self.settings.max_in_flight:
            raise busy()

    async def body(self, call: Call, request: Request) -> bytes:
        """The whole body. Raises `Refusal`: 503 when full, 413 when too large, 408 when too slow, 499 when cut off."""
        self.check()
        try:
            async with asyncio.timeout(self.settings.body_timeout_s):
                pieces = [piece async for piece in self._pieces(call, request)]
        except TimeoutError:
            raise Refusal(408, f"the body did not come within {self.settings.body_timeout_s:g} s") from None
        except ClientDisconnect:
            raise Refusal(CLIENT_GONE, "the client has gone") from None
        call.stages["read"] = call.seconds
        return b"".join(pieces)

    async def _pieces(self, call: Call, request: Request) -> AsyncIterator[bytes]:
        async for piece in request.stream():
            call.bytes_held += len(piece)
            self.bytes_held += len(piece)
            if call.bytes_held > self.settings.max_bytes:
                raise body_too_large(self.settings.max_bytes)
            if self.bytes_held > self.settings.max_bytes_in_flight:
                raise busy()
            yield piece

    async def work(self, call: Call, task: Coroutine[Any, Any, T], gone: Gone | None = None) -> T:
        """Do a task in a place of its own. It is cancelled when `gone` returns, or at the deadline.

        Raises `Refusal`: 503 when full or late, 499 when the client has gone.
        """
        try:
            with self._place():
                async with asyncio.timeout_at(call.deadline_s) as limit:
                    call.limit = limit
                    return await (task if gone is None else _unless(gone, task))
        except TimeoutError:
            if limit.expired():
                raise late(call.timeout_s) from None
            raise
        finally:
            task.close()

    @contextmanager
    def _place(self) -> Iterator[None]:
        self.check()
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1


async def disconnected(request: Request) -> None:
    """Return when the client has gone. Its body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _unless(gone: Gone, task: Coroutine[Any, Any, T]) -> T:
    """The task's result; `Refusal` 499 when `gone` returns first, and the task is cancelled."""
    this = asyncio.current_task()
    assert this is not None
    before, left = this.cancelling(), False

    def leave(_: asyncio.Task[None]) -> None:
        nonlocal left
        left = True
        this.cancel()

    watching = asyncio.ensure_future(gone())
    watching.add_done_callback(leave)
    try:
        return await task
    except asyncio.CancelledError:
        if left and this.uncancel() <= before:  # nothing else has cancelled it
            raise Refusal(CLIENT_GONE, "the client has gone") from None
        raise
    finally:
        watching.remove_done_callback(leave)
        watching.cancel()
