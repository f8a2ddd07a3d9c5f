"""The first and last of every HTTP request: id, key, origin, metrics, the line in the log, and errors as JSON.

It is ASGI around the whole application, so that nothing is answered which it has not seen. Whatever escapes the
application is answered with 500 and the request's id, and logged with its traceback.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Set
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from visformer.serving import log
from visformer.serving.door import Call, Door
from visformer.serving.metrics import Metrics
from visformer.serving.refusals import CLIENT_GONE, Refusal, body_too_large, forget
from visformer.serving.tracing import Tracing

PROBES = frozenset({"/v2/health/live", "/v2/health/ready"})  # they carry no key


class Front:
    """Wraps an ASGI application; its endpoints find their `Call` in `scope["call"]`. `open_paths` need no key."""

    def __init__(
        self, app: ASGIApp, door: Door, metrics: Metrics, tracing: Tracing, open_paths: Set[str] = frozenset()
    ) -> None:
        self.app, self.door, self.metrics, self.tracing = app, door, metrics, tracing
        self.settings = door.settings
        self.open_paths = PROBES | open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        call = scope["call"] = self.door.enter(headers.get("x-request-id", ""))
        answer = _Answer(send, call, self.door)
        try:
            with self.tracing.request(call, f"{scope['method']} {scope['path']}", headers):
                self._admit(scope, headers)
                await self.app(scope, receive, answer.send)
        except Refusal as refusal:
            forget(refusal)
            await answer.refuse(refusal, scope, receive)
        except Exception as error:
            log.fault(error, request_id=call.request_id)
            forget(error)
            await answer.refuse(internal(call), scope, receive)
        finally:
            self.door.leave(call)
            self._record(scope, call, answer)

    def _admit(self, scope: Scope, headers: Headers) -> None:
        """Raise `Refusal` 401 without a key where one is asked for, 413 for a body that is said to be too large, 403
        for a page of another site."""
        if scope["path"] not in self.open_paths:
            check_key(self.settings.api_keys, headers.get("authorization", ""), headers.get("x-api-key", ""))
        declared = headers.get("content-length", "")
        if declared.isdecimal() and (len(declared) > 18 or int(declared) > self.settings.max_bytes):
            raise body_too_large(self.settings.max_bytes)
        origin = headers.get("origin")
        if origin is None or scope["method"] in ("GET", "HEAD") or "*" in self.settings.cors_origins:
            return
        if origin not in self.settings.cors_origins and urlsplit(origin).netloc != headers.get("host"):
            raise Refusal(403, "pages of this origin may not use the server; see --cors_origins")

    def _record(self, scope: Scope, call: Call, answer: _Answer) -> None:
        endpoint = getattr(scope.get("route"), "path", "other")
        status = answer.status or CLIENT_GONE
        call.count(good=status < 300)
        self.metrics.request(call, endpoint, status)
        if self.settings.access_log:
            log.event_soon("request", **access_record(call, scope["method"], scope["path"], status), bytes=answer.bytes)


class _Answer:
    """What goes out: counted, with the request's id, and `Connection: close` while the server drains."""

    def __init__(self, send: Send, call: Call, door: Door) -> None:
        self._send, self._call, self._door = send, call, door
        self.status = 0
        self.bytes = 0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self._call.request_id
            headers["x-content-type-options"] = "nosniff"
            headers["server-timing"] = server_timing(self._call)
            if self._door.draining:
                headers["connection"] = "close"
        elif message["type"] == "http.response.body":
            self.bytes += len(message.get("body", b""))
        await self._send(message)

    async def refuse(self, refusal: Refusal, scope: Scope, receive: Receive) -> None:
        if not self.status:
            await refusal_response(refusal)(scope, receive, self.send)


def server_timing(call: Call) -> str:
    """The header by which browsers learn where the time went, in milliseconds; the page at `/` draws it."""
    stages = {**call.stages, "total": call.seconds}
    return ", ".join(f"{stage};dur={1000 * seconds:.3f}" for stage, seconds in stages.items())


def refusal_response(refusal: Refusal) -> JSONResponse:
    """`{"error": ...}` with the refusal's status and headers."""
    return JSONResponse({"error": refusal.message}, refusal.status, headers=refusal.headers)


def internal(call: Call) -> Refusal:
    """What a client learns of a fault of ours."""
    return Refusal(500, f"internal error; the server's log has it under request id {call.request_id}")


def check_key(known: tuple[str, ...], authorization: str, plain: str) -> None:
    """Raise `Refusal` 401 unless one of the keys is given, as `Bearer KEY` or plainly; if none is known, all may pass.

    `known` are SHA-256 sums, compared in a time that says nothing of them.
    """
    if not known:
        return
    scheme, _, token = authorization.partition(" ")
    given = token.strip() if scheme.lower() == "bearer" else plain
    digest = hashlib.sha256(given.encode("utf-8", "surrogateescape")).hexdigest()
    if not sum(hmac.compare_digest(digest, one) for one in known):
        raise Refusal(401, "an API key is needed: Authorization: Bearer KEY, or X-API-Key: KEY")


def access_record(call: Call, method: str, path: str, status: int) -> dict[str, Any]:
    """The fields of a request's line in the log; times in milliseconds."""
    stages = {f"{stage}_ms": round(seconds * 1000, 3) for stage, seconds in call.stages.items()}
    model = {"model": call.model, "version": call.version, "images": call.images} if call.model else {}
    total = round((time.perf_counter() - call.started) * 1000, 3)
    about = {"request_id": call.request_id, "method": method, "path": path[:200], "status": status, "total_ms": total}
    return {**about, **model, **stages}
