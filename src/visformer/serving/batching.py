"""Dynamic batching: a lone image is computed at once, and while one batch is computed the next one gathers.

Nothing ever waits for company. On an idle model the first image starts a batch of one; what arrives meanwhile goes
together into the next batch, so that batches grow with the load and the load alone. (A wait of 5 ms halved the rate of
a lone client and gained nothing under load.) Whoever has given up, because of a deadline or a closed connection, has
cancelled its future, and is left out when the next batch is made.

A thread that has computed a batch takes the next one itself, and decoding threads put images in the queue themselves:
under load neither waits for the event loop, which hears of a batch once, when it is done. Images are decoded no more
than a batch ahead (`when_room`): those of a burst wait as the files they are, in far less memory, and what is
taken is still in the processor's cache.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from visformer.serving.scores import probabilities


@dataclass(frozen=True)
class Computed:
    """One image's logits, float32 (classes,), and how it got them; times in seconds."""

    logits: np.ndarray
    probabilities: np.ndarray  # float32 (classes,)
    finite: bool  # all of the logits are
    decode_s: float  # 0 for what came decoded
    queue_s: float
    compute_s: float
    batch_size: int


Answer = asyncio.Future[Computed]
_Outcome = tuple[np.ndarray, np.ndarray, Any]  # logits, probabilities, (B, classes), and which are finite


@dataclass(frozen=True)
class Waiting:
    """An image, float32 (C, H, W), in the queue; `since` is when it came, on `time.perf_counter`'s clock."""

    row: np.ndarray
    answer: Answer
    since: float
    waited_s: float = 0.0  # before it was decoded
    decode_s: float = 0.0
    has_room: bool = False  # of `Batcher.when_room`


class Batcher:
    """Gathers images for one model. `run` is called in threads of its own, which end at `close`.

    `run` takes float32 (B, C, H, W) and gives float32 (B, classes). At most `workers` batches are computed at a time.
    `on_batch(size, seconds)` is called on the event loop after each that went well.
    """

    def __init__(
        self,
        run: Callable[[np.ndarray], np.ndarray],
        *,
        max_batch: int,
        workers: int = 1,
        on_batch: Callable[[int, float], None] = lambda size, seconds: None,
    ) -> None:
        self._run, self._max_batch, self._on_batch = run, max_batch, on_batch
        self._idle = workers
        self._waiting: deque[Waiting] = deque()
        self._room = workers * max_batch  # for images that are being decoded, or have been
        self._undecoded: deque[Callable[[], None]] = deque()
        self._lock = threading.Lock()  # of the four above
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="model")

    @property
    def waiting(self) -> int:
        """Images that no batch has taken yet, decoded or not."""
        return len(self._waiting) + len(self._undecoded)

    def submit(self, rows: Sequence[np.ndarray]) -> list[Answer]:
        """Queue images, each float32 (C, H, W), from the event loop. Cancel a future to withdraw its image."""
        loop, now = asyncio.get_running_loop(), time.perf_counter()
        added = [Waiting(row, loop.create_future(), now) for row in rows]
        self.put(added)
        return [one.answer for one in added]

    def put(self, images: Sequence[Waiting]) -> None:
        """Queue images, from any thread."""
        left = 0
        with self._lock:
            self._waiting.extend(images)
            while self._idle and self._waiting:
                batch, room = self._take()
                left += room
                if batch:
                    self._idle -= 1
                    self._pool.submit(self._work, batch)
        self.give_room(left)

    def when_room(self, decode: Callable[[], None]) -> None:
        """Call `decode` at once, or when a batch has been taken; from any thread. Its image must come to `put` with
        `has_room`, or if there is none, its room be given back."""
        with self._lock:
            self._undecoded.append(decode)
        self.give_room(0)

    def give_room(self, count: int) -> None:
        """So many images have left; from any thread."""
        with self._lock:
            self._room += count
            now = [self._undecoded.popleft() for _ in range(min(self._room, len(self._undecoded)))]
            self._room -= len(now)
        for decode in now:
            decode()

    def close(self) -> None:
        """Let the threads end; nothing may be submitted afterwards."""
        self._pool.shutdown(wait=False)

    def _take(self) -> tuple[list[Waiting], int]:
        """The next batch: the first in the queue, and those of its shape behind it; and how much room there is without
        it. The lock must be held."""
        batch: list[Waiting] = []
        others: list[Waiting] = []
        room = 0
        while self._waiting and len(batch) < self._max_batch:
            one = self._waiting.popleft()
            if one.answer.done():
                room += one.has_room
                continue
            fits = not batch or one.row.shape == batch[0].row.shape
            (batch if fits else others).append(one)
        self._waiting.extendleft(reversed(others))
        return batch, room + sum(one.has_room for one in batch)

    def _work(self, batch: list[Waiting]) -> None:
        """A thread's: this batch, and then the next one, until none is waiting."""
        while batch:
            self._compute(batch)
            with self._lock:
                batch, room = self._take()
                self._idle += not batch
            self.give_room(room)

    def _compute(self, batch: list[Waiting]) -> None:
        started = time.perf_counter()
        outcome: _Outcome | Exception
        try:
            logits = self._run(np.stack([one.row for one in batch]))
            with np.errstate(all="ignore"):  # what is not finite is refused
                outcome = logits, probabilities(logits), np.isfinite(logits).all(axis=1)
        except Exception as error:
            outcome = error
        loop = batch[0].answer.get_loop()
        with suppress(RuntimeError):  # the loop is closed, and nobody waits any more
            loop.call_soon_threadsafe(self._deliver, batch, outcome, started, time.perf_counter())

    def _deliver(self, batch: list[Waiting], outcome: _Outcome | Exception, started: float, ended: float) -> None:
        """Back on the event loop."""
        if isinstance(outcome, Exception):
            for one in batch:
                if not one.answer.done():
                    one.answer.set_exception(outcome)
            return
        self._on_batch(len(batch), ended - started)
        for one, logits, chances, finite in zip(batch, *outcome, strict=True):
            if not one.answer.done():
                times = one.decode_s, one.waited_s + max(0.0, started - one.since), ended - started
                one.answer.set_result(Computed(logits, chances, bool(finite), *times, len(batch)))
