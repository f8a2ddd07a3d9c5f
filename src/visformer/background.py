"""Work that goes on beside the main thread, one job at a time, such as writing a checkpoint while training continues.

A job that fails is reported and does not stop the others: the next one may succeed, on a disk that has room again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from visformer import console
from visformer.errors import RunError


class Background:
    """Runs jobs in order in a thread of its own, at most one ahead of the caller.

    `then` ends the warning about a job that failed, such as "training goes on".
    """

    def __init__(self, then: str):
        self.then = then
        self.failure: RunError | None = None  # of the latest job
        self._thread: threading.Thread | None = None

    def start(self, job: Callable[[], None]) -> None:
        """Begin `job` as soon as the one before has ended, and return."""
        self.wait()
        # Not a daemon: Python waits for it at its end, so that no file is left half-written for want of patience.
        self._thread = threading.Thread(target=self._run, args=(job,), name="background")
        self._thread.start()

    def wait(self) -> None:
        """Return when no job is running."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def finish(self) -> None:
        """Wait, and raise the `RunError` of the latest job if it failed."""
        self.wait()
        if self.failure is not None:
            raise self.failure

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
            self.failure = None
        except RunError as error:
            self.failure = error
            console.warn(f"{error}; {self.then}")
