"""Listening, and the life of the process: start, load, serve, reload on SIGHUP, drain and stop on SIGTERM.

The port is open before the models are loaded, so that probes learn the truth (live, not ready). On SIGTERM or Ctrl-C
the server says that it is not ready, goes on answering for `drain_s` with `Connection: close`, closes the port, gives
connections as long again and what is under way `shutdown_s`, and ends with exit code 0. A second Ctrl-C ends it now.
"""

from __future__ import annotations

import asyncio
import ctypes
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from visformer.errors import RunError, UsageError
from visformer.serving import log
from visformer.serving.app import Service, make_app
from visformer.serving.repository import describe
from visformer.serving.settings import Settings

HEADERS_WITHIN_S = 10.0  # of a connection's opening, and of the first byte of a later request
IDLE_S = 75  # between two requests on a connection; longer than proxies keep theirs
TAKEN_WITHIN_S = 30.0  # of an answer that the client does not read
_LONGEST_HEADERS = 64 * 2**10  # bytes
_HANDSHAKE_S = 0.1  # for connections that are being made when the port is closed
_SO_ATTACH_FILTER = 26  # of <asm-generic/socket.h>
_NO_SYN = (  # a classic BPF program, of (code, jump if true, jump if false, value)
    (0x30, 0, 0, 13),  # the flags of the TCP header
    (0x45, 0, 1, 0x02),  # is SYN among them?
    (0x06, 0, 0, 0),  # drop it
    (0x06, 0, 0, 2**32 - 1),  # pass it
)
_MOST_PIPELINED = 8  # requests on one connection that wait for the answer to an earlier one


class Protocol(HttpToolsProtocol):
    """uvicorn's HTTP, with an end to clients that send nothing, or headers without end, or do not read."""

    _header_bytes = 0
    _patience: asyncio.TimerHandle | None = None
    _untaken: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait_for_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._headers_are_here()
        self._is_taken()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._patience is not None:
            self._header_bytes += len(data)
        super().data_received(data)
        if self._patience is not None and self._header_bytes > _LONGEST_HEADERS:
            self.send_400_response("The headers are too long.")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._patience is None:
            self._wait_for_headers()

    def on_headers_complete(self) -> None:
        self._headers_are_here()
        if len(self.pipeline) >= _MOST_PIPELINED:  # uvicorn would go on reading, and keep them all
            raise ValueError("too many requests before the first is answered")
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        if not self.transport.is_closing():
            body = b'{"error": "%s"}' % msg.encode("ascii", "replace")
            head = (
                b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close"
            )
            self.transport.write(head % len(body) + b"\r\n\r\n" + body)
            self._wait_for_reader()
            self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait_for_reader()

    def resume_writing(self) -> None:
        self._is_taken()
        super().resume_writing()

    def _wait_for_reader(self) -> None:
        if self._untaken is None:
            self._untaken = self.loop.call_later(TAKEN_WITHIN_S, self.transport.abort)

    def _is_taken(self) -> None:
        if self._untaken is not None:
            self._untaken.cancel()
            self._untaken = None

    def _wait_for_headers(self) -> None:
        self._header_bytes = 0
        self._patience = self.loop.call_later(HEADERS_WITHIN_S, self.transport.close)

    def _headers_are_here(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None


class Server(uvicorn.Server):
    """uvicorn's server with our signals, loading in the background, and a drain before the port is closed."""

    def __init__(
        self, service: Service, sockets: list[socket.socket], load_first: bool = False, own_port: bool = True
    ) -> None:
        settings = service.settings
        super().__init__(
            uvicorn.Config(
                make_app(service),
                http=Protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=IDLE_S,
                ssl_certfile=settings.tls_cert,
                ssl_keyfile=settings.tls_key,
                timeout_graceful_shutdown=round(settings.shutdown_s),
            )
        )
        self.service, self._listening, self._load_first = service, sockets, load_first
        self._own_port = own_port
        self.failure: Exception | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._grpc: Any = None

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until told to stop. Raises what kept the models from being loaded at the start."""
        super().run(sockets or self._listening)
        if self.failure is not None:
            raise self.failure

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        if self._load_first:
            await self._load()
        await super().startup(sockets)
        settings = self.service.settings
        if settings.grpc_port is not None:
            from visformer.serving.grpc_server import start_grpc

            try:
                self._grpc, _ = await start_grpc(self.service)
            except Exception as error:
                self.failure = error
                self.should_exit = True
                self.started = True  # the port for HTTP is open, and must be closed
                return
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop, number)
        if hasattr(signal, "SIGHUP"):
            loop.add_signal_handler(signal.SIGHUP, lambda: self._begin(self._reload()))
        if not self._load_first:
            self._begin(self._load())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        door = self.service.door
        door.draining = True
        log.event("draining", in_flight=door.in_flight)
        if self.failure is None and not self.force_exit:
            await asyncio.sleep(self.service.settings.drain_s)
            await self._stop_listening(sockets or [])
            door.closing = True
            await asyncio.sleep(self.service.settings.drain_s)  # for requests on connections that have just been made
        grpc_stop = self._grpc.stop(self.service.settings.shutdown_s) if self._grpc is not None else asyncio.sleep(0)
        await asyncio.gather(super().shutdown(sockets), grpc_stop)
        for task in list(self._tasks):
            task.cancel()
        with suppress(TimeoutError):
            async with asyncio.timeout(1):
                await self.service.close()
        log.event("stopped")

    async def _stop_listening(self, sockets: list[socket.socket]) -> None:
        """Close the ports. Connections that the kernel has made, and we have not seen yet, are taken over first: they
        would be reset otherwise. Where the kernel can be told so, it makes no more meanwhile; not of a port that
        replicas share."""
        loop, last = asyncio.get_running_loop(), [one.dup() for one in sockets]
        if self._own_port:
            for listening in last:
                make_no_more(listening)
            await asyncio.sleep(_HANDSHAKE_S)
        for server in self.servers:
            server.close()
        for listening in last:
            listening.setblocking(False)
            with listening, suppress(OSError):  # BlockingIOError at the end
                while True:
                    connection, _ = listening.accept()
                    connection.setblocking(False)
                    await loop.connect_accepted_socket(self._protocol, connection, ssl=self.config.ssl)

    def _protocol(self) -> Protocol:
        state = self.lifespan.state
        return Protocol(config=self.config, server_state=self.server_state, app_state=state)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are handled on the event loop, from `startup` on."""
        yield

    def _stop(self, number: int) -> None:
        log.event("stopping", signal=signal.Signals(number).name)
        self.force_exit = self.should_exit and number == signal.SIGINT
        self.should_exit = True

    def _begin(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _load(self) -> None:
        started = time.perf_counter()
        try:
            await self.service.repository.start()
        except Exception as error:
            self.failure = error
            self.should_exit = True
            return
        for model in self.service.repository.models():
            log.event("loaded", **describe(model))
        log.event("ready", seconds=round(time.perf_counter() - started, 3))

    async def _reload(self) -> None:
        before = set(self.service.repository.models())
        for problem in await self.service.repository.reload():
            log.event("reload_failed", reason=problem)
        for model in self.service.repository.models():
            if model not in before:
                log.event("loaded", **describe(model))
        log.event("reloaded")


def make_no_more(listening: socket.socket) -> None:
    """Let the kernel pass over requests for a connection, on Linux; those being made are finished, and can be accepted.
    Who asked asks again a second later, and learns then that the port is closed."""
    if sys.platform != "linux":
        return
    program = b"".join(struct.pack("HBBI", *step) for step in _NO_SYN)
    buffer = ctypes.create_string_buffer(program, len(program))
    pointer = struct.pack("HP", len(_NO_SYN), ctypes.addressof(buffer))
    with suppress(OSError):  # a kernel without it
        listening.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, pointer)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 is any that is free. Raises `UsageError` when the address can't be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(address)
            made.listen(2048)
            made.setblocking(False)
        except OSError:
            made.close()
            raise
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(
            f"port: can't listen on {host}, port {port}: {reason}; choose with --host and --port"
        ) from None
    return made


def serve_here(
    targets: list[str], settings: Settings, listening: socket.socket | None = None, load_first: bool = False
) -> None:
    """Serve in this process until a signal says stop. Raises `UsageError` or `RunError`.

    With `load_first` no connection is taken before everything is loaded.
    """
    service = Service(targets, settings)
    made = listening or listen(settings.host, settings.port)
    port = made.getsockname()[1]
    scheme = "https" if settings.tls_cert else "http"
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    log.event("listening", url=f"{scheme}://{host}:{port}", models=service.repository.names())
    try:
        Server(service, [made], load_first, own_port=listening is None).run()
    except OSError as error:  # of a certificate that can't be read
        raise RunError(f"can't serve: {error.strerror or error}") from error
