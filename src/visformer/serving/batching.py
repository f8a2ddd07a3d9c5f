"""Dynamic batching: a lone image is computed at once, and while one batch is computed the next one gathers.

Nothing ever waits for company. On an idle model the first image starts a batch of one; what arrives meanwhile goes
together into the next batch, so that batches grow with the load and the load alone. (A wait of 5 ms halved the rate of
a lone client and gained nothing under load.) Whoever has given up, because of a deadline or a closed connection, has
cancelled its future, and is left out when the next batch is made.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Computed:
    """One image's logits, float32 (classes,), and how it got them; times in seconds."""

    logits: np.ndarray
    queue_s: float
    compute_s: float
    batch_size: int


@dataclass(frozen=True)
class _Waiting:
    row: np.ndarray
    future: asyncio.Future[Computed]
    since: float


class Batcher:
    """Gathers images for one model. All methods are called on the event loop; `run` is called in threads of its own.

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
        self._waiting: deque[_Waiting] = deque()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="model")

    @property
    def waiting(self) -> int:
        """Images that no batch has taken yet."""
        return len(self._waiting)

    def submit(self, rows: Sequence[np.ndarray]) -> list[asyncio.Future[Computed]]:
        """Queue images, each float32 (C, H, W). Cancel a future to withdraw its image."""
        loop, now = asyncio.get_running_loop(), time.perf_counter()
        added = [_Waiting(row, loop.create_future(), now) for row in rows]
        self._waiting.extend(added)
        self._start()
        return [item.future for item in added]

    def close(self) -> None:
        """Let the threads end; nothing may be submitted afterwards."""
        self._pool.shutdown(wait=False)

    def _start(self) -> None:
        while self._idle and (batch := self._take()):
            self._idle -= 1
            work = asyncio.get_running_loop().run_in_executor(self._pool, self._compute, [item.row for item in batch])
            work.add_done_callback(functools.partial(self._finish, batch))

    def _take(self) -> list[_Waiting]:
        """The next batch: the first in the queue, and those of its shape behind it."""
        batch: list[_Waiting] = []
        others: list[_Waiting] = []
        while self._waiting and len(batch) < self._max_batch:
            item = self._waiting.popleft()
            if item.future.done():
                continue
            fits = not batch or item.row.shape == batch[0].row.shape
            (batch if fits else others).append(item)
        self._waiting.extendleft(reversed(others))
        return batch

    def _compute(self, rows: list[np.ndarray]) -> tuple[np.ndarray, float, float]:
        started = time.perf_counter()
        logits = self._run(np.stack(rows))
        return logits, started, time.perf_counter()

    def _finish(self, batch: list[_Waiting], work: asyncio.Future[tuple[np.ndarray, float, float]]) -> None:
        self._idle += 1
        error = work.exception()
        if error is None:
            logits, started, ended = work.result()
            self._on_batch(len(batch), ended - started)
            for item, row in zip(batch, logits, strict=True):
                if not item.future.done():
                    item.future.set_result(Computed(row, started - item.since, ended - started, len(batch)))
        else:
            for item in batch:
                if not item.future.done():
                    item.future.set_exception(error)
        self._start()
