"""Worker processes that make batches: in order, in shared memory, and survived when they die.

Each worker writes a batch's images straight into memory that it shares with this process, and sends only the few
numbers that go with them; the memory is used again once the last tensor on it is gone. It is anonymous, so a small
/dev/shm, as containers have it, is no limit.

What a worker is reading stands in shared memory as well. One that dies, or that spends longer than the time limit on
one image, is named with that image and replaced, and its batches are made anew: a batch depends on nothing but its
group. An image that has ended two workers is given up; a batch that ends `ATTEMPTS` workers ends the run.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import signal
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

import numpy as np
import torch
import torch.multiprocessing as multiprocessing

from visformer import console
from visformer.errors import RunError, VisformerError

AHEAD = 2  # batches that each worker has to do, or has done, before they are asked for
SPARE = 2  # batches that whoever iterates can usually hold on to before copies are made
ATTEMPTS = 3  # workers that one batch may end
_TICK_S = 1.0  # between looks at workers that say nothing


class Job(Protocol):
    """What workers do. `shape` is that of a whole batch's memory, uint8: (N, H, W, C) for images, (any,) for bytes."""

    shape: tuple[int, ...]

    def __call__(
        self, group: Sequence[Any], out: np.ndarray, given_up: frozenset[int], reading: Callable[[int], None]
    ) -> tuple[int, Any]:
        """Write the images of `group` into `out`; how much of its first axis is used, and whatever else there is to
        tell.

        `reading` is called with the index of each image before it is read; those in `given_up` are not to be read.
        """
        ...

    def name(self, index: int) -> str:
        """What a message calls an image."""
        ...


@dataclass
class _Task:
    group: Sequence[Any]
    slab: int
    wanted: bool = True
    attempts: int = 0
    ended: int = 0
    given_up: frozenset[int] = frozenset()
    suspects: list[int] = field(default_factory=list)
    result: tuple[int, Any, np.ndarray | None] | None = None
    error: Exception | None = None


class _Worker:
    """One process, this end of its pipe, and the numbers of the tasks that it has, first the one it is at."""

    def __init__(self, slot: int, process: Any, connection: Connection) -> None:
        self.slot = slot
        self.process = process
        self.connection = connection
        self.tasks: deque[int] = deque()
        self.beat = -1
        self.since = time.monotonic()


class WorkerPool:
    """`count` processes that do a `Job`; they start with the first `run` and stay until `close`. Whoever iterates can
    hold on to `spare` batches before copies are made."""

    def __init__(self, job: Job, count: int, *, timeout_s: float = 0.0, spare: int = SPARE) -> None:
        self.job = job
        self.count = count
        self.timeout_s = timeout_s
        self.spare = spare
        self._workers: list[_Worker] = []
        self._tasks: dict[int, _Task] = {}
        self._next = 0
        self._slabs: list[np.ndarray] = []
        self._free: deque[int] = deque()
        self._finalizer: weakref.finalize | None = None

    @property
    def processes(self) -> list[Any]:
        """The worker processes that run now."""
        return [worker.process for worker in self._workers]

    def run(self, groups: Iterable[Sequence[Any]]) -> Iterator[tuple[torch.Tensor, Any]]:
        """For each group, in order, what was written for it, uint8 shaped as the job says, and what else was told.

        Raises `RunError` when a batch has ended too many workers, and what the job raised.
        """
        if not self._workers:
            self._start()
        groups = iter(groups)
        order: deque[int] = deque()
        try:
            while True:
                while len(order) < AHEAD * self.count and (group := next(groups, None)) is not None:
                    order.append(self._submit(group))
                if not order:
                    return
                while self._tasks[order[0]].result is None:
                    self._wait()
                yield self._hand_out(self._tasks.pop(order.popleft()))
        finally:
            for number in order:
                self._abandon(number)

    def close(self) -> None:
        """End the processes. The pool can be used again, and starts new ones."""
        if self._finalizer is not None:
            self._finalizer()
        self._workers, self._tasks, self._slabs, self._free = [], {}, [], deque()

    # ---- starting

    def _start(self) -> None:
        self._beats, self._reading = (processes().RawArray("q", self.count) for _ in range(2))
        fork = processes().get_start_method() == "fork"
        slabs = AHEAD * self.count + self.spare
        self._slabs = [_shared(self.job.shape) for _ in range(slabs)] if fork else []
        self._free = deque(range(slabs))
        self._workers = []
        self._finalizer = weakref.finalize(self, _end, self._workers)
        for slot in range(self.count):
            self._workers.append(self._spawn(slot))

    def _spawn(self, slot: int) -> _Worker:
        here, there = processes().Pipe()
        try:
            process = processes().Process(
                target=_serve,
                args=(self.job, there, self._slabs, self._beats, self._reading, slot, os.getpid()),
                name=f"data worker {slot}",
                daemon=True,
            )
            process.start()
        except OSError as error:
            raise RunError(f"data worker {slot} can't be started ({error}); lower num_parallel_workers") from error
        there.close()  # the process alone holds this end, so its death is the end of the pipe
        return _Worker(slot, process, here)

    # ---- giving and receiving

    def _submit(self, group: Sequence[Any]) -> int:
        while not self._free:  # tasks that nobody wants any more, until they are done
            self._wait()
        number, self._next = self._next, self._next + 1
        self._tasks[number] = _Task(group, self._free.pop())
        self._give(min(self._workers, key=lambda worker: len(worker.tasks)), number)
        return number

    def _give(self, worker: _Worker, number: int) -> None:
        task = self._tasks[number]
        if not worker.tasks:
            worker.since = time.monotonic()
        worker.tasks.append(number)
        with contextlib.suppress(OSError):  # if it is dead, waiting finds that out
            worker.connection.send((number, task.group, task.slab, task.given_up))

    def _wait(self) -> None:
        """Until a worker has answered, died, or been found to hang; or for a moment."""
        by_handle = {handle: w for w in self._workers for handle in (w.connection, w.process.sentinel)}
        tick = min(_TICK_S, self.timeout_s / 4) if self.timeout_s else _TICK_S
        for worker in {by_handle[handle] for handle in wait(list(by_handle), timeout=tick)}:
            alive = worker.process.is_alive()
            try:
                while worker.connection.poll():
                    self._receive(worker, *worker.connection.recv())
            except (EOFError, OSError):
                alive = False
            if not alive:
                worker.process.join(1.0)
                self._replace(worker, _died(worker.process.exitcode))
        if self.timeout_s:
            self._look_for_hanging()

    def _receive(self, worker: _Worker, number: int, result: Any, error: Exception | None) -> None:
        worker.tasks.remove(number)
        worker.since = time.monotonic()
        task = self._tasks[number]
        task.result, task.error = result or (0, None, None), error
        if not task.wanted:
            self._abandon(number)

    def _hand_out(self, task: _Task) -> tuple[torch.Tensor, Any]:
        """The batch, on the shared memory itself; on a copy when whoever iterates holds on to too much of that."""
        assert task.result is not None
        if task.error is not None:
            self._free.append(task.slab)
            raise task.error
        count, told, own = task.result
        if own is not None:  # made where memory can't be shared beforehand
            self._free.append(task.slab)
            return torch.from_numpy(own[:count]), told
        images = self._slabs[task.slab][:count]
        held = len(self._slabs) - len(self._free) - len(self._tasks) - 1
        if held >= self.spare:
            images = images.copy()
            self._free.append(task.slab)
        else:  # torch keeps the array, and so the finalizer, as long as any tensor shows its memory
            weakref.finalize(images, self._free.append, task.slab).atexit = False
        return torch.from_numpy(images), told

    def _abandon(self, number: int) -> None:
        """Forget a task; if a worker is still at it, when it is done."""
        task = self._tasks.get(number)
        if task is None:  # the pool was closed meanwhile
            return
        task.wanted = False
        if task.result is not None:
            self._free.append(self._tasks.pop(number).slab)

    # ---- the dead and the stuck

    def _look_for_hanging(self) -> None:
        now = time.monotonic()
        for worker in self._workers:
            beat = self._beats[worker.slot]
            if beat != worker.beat or not worker.tasks:
                worker.beat, worker.since = beat, now
            elif now - worker.since > self.timeout_s:
                self._replace(worker, f"has been silent for {self.timeout_s:g} s (data_timeout_s)")

    def _replace(self, worker: _Worker, how: str) -> None:
        """Start another worker in its place, with its tasks."""
        index = self._reading[worker.slot] - 1
        where = f" while reading {self.job.name(index)}" if index >= 0 else ""
        what = f"data worker {worker.slot} (process {worker.process.pid}) {how}{where}"
        worker.process.kill()
        worker.process.join(1.0)
        worker.connection.close()
        tasks = [number for number in worker.tasks if self._tasks[number].wanted]
        for number in set(worker.tasks).difference(tasks):
            self._free.append(self._tasks.pop(number).slab)
        if tasks:
            self._blame(self._tasks[tasks[0]], index, what)
        console.warn(f"{what}; another takes its place")
        self._reading[worker.slot] = 0
        fresh = self._workers[worker.slot] = self._spawn(worker.slot)
        for number in tasks:
            self._give(fresh, number)

    def _blame(self, task: _Task, index: int, what: str) -> None:
        """Count an attempt; give an image up that has ended two workers. Raises `RunError` after `ATTEMPTS`."""
        task.attempts += 1
        task.ended += 1
        if index >= 0 and index in task.suspects:
            task.given_up |= {index}
            task.attempts -= 1  # the image is to blame, not the batch
        elif task.attempts >= ATTEMPTS:
            raise RunError(
                f"{what}; {task.ended} workers ended at this batch. Most often memory is short or the storage does not "
                "answer: lower num_parallel_workers or batch_size, raise data_timeout_s, or check the disk"
            )
        task.suspects.append(index)


def processes() -> Any:
    """How processes are started here: forked on Linux, anew elsewhere."""
    return multiprocessing.get_context()


def _died(exitcode: int | None) -> str:
    if exitcode is None:
        return "does not answer"
    if exitcode >= 0:
        return f"ended with exit code {exitcode}"
    return f"was killed by {signal.Signals(-exitcode).name}"


def _end(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.connection.close()
        worker.process.terminate()
    for worker in workers:
        worker.process.join(1.0)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join(1.0)


def _shared(shape: tuple[int, ...]) -> np.ndarray:
    """Anonymous memory that forked processes share; pages that are never written take no room."""
    return np.frombuffer(mmap.mmap(-1, max(math.prod(shape), 1)), np.uint8, math.prod(shape)).reshape(shape)


def _serve(
    job: Job, connection: Connection, slabs: list[np.ndarray], beats: Any, reading: Any, slot: int, parent: int
) -> None:
    """A worker's life: until its pipe or its parent is gone.

    Ctrl-C and `timeout` signal the whole process group, and are for the parent, which ends its workers once it has
    saved; so each worker gets a group of its own.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    torch.set_num_threads(1)

    def read(index: int) -> None:
        reading[slot] = index + 1
        beats[slot] += 1

    while os.getppid() == parent:
        try:
            if not connection.poll(5.0):
                continue
            number, group, slab, given_up = connection.recv()
        except (EOFError, OSError):
            return
        out = slabs[slab] if slabs else np.empty(job.shape, np.uint8)
        result, failure = None, None
        try:
            count, told = job(group, out, given_up, read)
            result = (count, told, None if slabs else out[:count])
        except VisformerError as error:
            failure = error
        except Exception:
            failure = RuntimeError(f"in data worker {slot}:\n{traceback.format_exc()}")
        reading[slot] = 0
        beats[slot] += 1
        try:
            connection.send((number, result, failure))
        except OSError:
            return
