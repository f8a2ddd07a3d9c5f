"""Several server processes on one port, watched over by this one.

The port for HTTP is opened here and inherited; gRPC's is shared by the kernel (SO_REUSEPORT). A replica that dies is
started again, at once the first time and then after a growing pause, so that one which can't live does not spin. SIGHUP
goes to all; SIGTERM too, and then this process ends when the last of them has drained. `/metrics` adds them all up.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import tempfile
import threading
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from types import FrameType

from visformer.errors import RunError, UsageError, VisformerError
from visformer.serving import log
from visformer.serving.settings import Settings

_WRONG_USAGE, _FAILED = 2, 1
_PAUSES_S = (0.0, 1.0, 5.0, 30.0)
_SETTLED_S = 60.0  # after which a death counts as the first again
_TICK_S = 0.1


@dataclass
class _Replica:
    """A place for a process. `start_at` is when to start one, on the monotonic clock."""

    process: BaseProcess | None = None
    deaths: int = 0
    started: float = 0.0
    start_at: float = 0.0


class _Supervisor:
    def __init__(self, targets: list[str], settings: Settings, listening: socket.socket) -> None:
        self._targets, self._settings, self._listening = targets, settings, listening
        self._context = multiprocessing.get_context("spawn")
        self._replicas = [_Replica() for _ in range(settings.replicas)]
        self._stopping = ""
        self._lived = False

    def run(self) -> None:
        handlers = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        handlers[signal.SIGHUP] = signal.signal(signal.SIGHUP, self._pass_on)
        try:
            while not self._stopping:
                for index, replica in enumerate(self._replicas):
                    self._tend(index, replica)
                time.sleep(_TICK_S)
            self._end()
        finally:
            living = [replica.process for replica in self._replicas if replica.process is not None]
            for process in living:
                process.terminate()
            for process in living:  # so that what one of them still has to say comes before our own last line
                process.join(self._settings.shutdown_s)
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _tend(self, index: int, replica: _Replica) -> None:
        process, now = replica.process, time.monotonic()
        if process is None:
            if now >= replica.start_at:
                self._start(index, replica)
            return
        if process.is_alive():
            self._lived = self._lived or now - replica.started > _SETTLED_S
            return
        log.event("replica_died", replica=index, pid=process.pid, exit_code=process.exitcode)
        if process.exitcode in (_WRONG_USAGE, _FAILED) and replica.deaths == 0 and not self._lived:
            raise (UsageError if process.exitcode == _WRONG_USAGE else RunError)("a replica can't serve; it said why")
        replica.deaths = 0 if now - replica.started > _SETTLED_S else replica.deaths
        replica.start_at = now + _PAUSES_S[min(replica.deaths, len(_PAUSES_S) - 1)]
        replica.deaths += 1
        replica.process = None
        _forget(process.pid)

    def _start(self, index: int, replica: _Replica) -> None:
        arguments = (self._targets, self._settings, self._listening, replica.deaths > 0)
        replica.process = self._context.Process(target=_replica, args=arguments, name=f"replica-{index}")
        replica.process.start()
        replica.started = time.monotonic()
        log.event("replica_started", replica=index, pid=replica.process.pid)

    def _end(self) -> None:
        """Tell all to drain, and wait."""
        self._listening.close()
        self._send(signal.SIGTERM)
        patience = self._settings.drain_s + self._settings.shutdown_s + 5
        deadline = time.monotonic() + patience
        for replica in self._replicas:
            if replica.process is not None:
                replica.process.join(max(0.0, deadline - time.monotonic()))
        log.event("stopped", replicas=len(self._replicas))

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopping = signal.Signals(number).name

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._send(number)

    def _send(self, number: int) -> None:
        for replica in self._replicas:
            if replica.process is not None and replica.process.is_alive() and replica.process.pid is not None:
                os.kill(replica.process.pid, number)


def serve_replicas(targets: list[str], settings: Settings) -> None:
    """Serve in `settings.replicas` processes until SIGTERM or Ctrl-C. Raises `UsageError` or `RunError`."""
    from visformer.serving.server import listen
    from visformer.serving.sources import scan

    if not hasattr(signal, "SIGHUP"):
        raise UsageError("replicas: need a Unix system; give 1")
    scan(targets)  # what is wrong with them is said once
    if settings.grpc_port == 0:
        raise UsageError("grpc_port: with replicas it must be a number, which they share")
    with tempfile.TemporaryDirectory(prefix="visformer-metrics-") as folder:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
        try:
            _Supervisor(targets, settings, listen(settings.host, settings.port)).run()
        finally:
            del os.environ["PROMETHEUS_MULTIPROC_DIR"]


def _replica(targets: list[str], settings: Settings, listening: socket.socket, load_first: bool) -> None:
    """What a replica's process runs. One that replaces another loads before it takes connections from its fellows."""
    from visformer.serving.server import serve_here

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of the terminal; the first one tells us
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        threading.Thread(target=_follow, daemon=True).start()
        serve_here(targets, settings, listening, load_first)
    except VisformerError as error:
        log.event("failed", reason=str(error))
        raise SystemExit(error.exit_code) from None


def _follow() -> None:
    """Stop when the supervisor is gone."""
    supervisor = multiprocessing.parent_process()
    if supervisor is not None:
        supervisor.join()
        os.kill(os.getpid(), signal.SIGTERM)


def _forget(pid: int | None) -> None:
    """The gauges of a process that has died no longer count."""
    from prometheus_client.multiprocess import mark_process_dead

    if pid is not None:
        mark_process_dead(pid)
