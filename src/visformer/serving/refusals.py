"""What the server says when it will not or cannot answer: an HTTP status and one sentence, the same for gRPC.

A refusal never carries a path or a traceback. `Refusal` is the client's to read; every other exception is a fault of
ours, which is logged, and of which the client learns no more than the request's id.
"""

from __future__ import annotations

import math


class Refusal(Exception):  # noqa: N818 (it is an answer)
    """An answer that is no result. `status` is HTTP's; `retry_after_s` goes with 503; `late`: the deadline passed."""

    def __init__(self, status: int, message: str, *, retry_after_s: float | None = None, late: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.retry_after_s = retry_after_s
        self.late = late

    @property
    def headers(self) -> dict[str, str]:
        """Headers that HTTP sends with it."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {} if self.retry_after_s is None else {"Retry-After": str(math.ceil(self.retry_after_s))}


def forget(error: BaseException) -> None:
    """Let an error that has been answered go of the functions it came through, and so of the bodies and pixels in them.

    Functions hold the error that passes through them as it holds them, so that megabytes would wait for Python to look
    for cycles, which it does the more rarely the more there is in memory.
    """
    error.__traceback__ = error.__context__ = error.__cause__ = None


CLIENT_GONE = 499  # as nginx has it; nobody reads it but the log


def bad(message: str) -> Refusal:
    """The request is wrong."""
    return Refusal(400, message)


def too_large(message: str) -> Refusal:
    """More bytes than are allowed."""
    return Refusal(413, message)


def body_too_large(max_bytes: int) -> Refusal:
    """A body beyond the limit."""
    return too_large(f"the body is larger than {max_bytes:,} bytes")


def busy(message: str = "the server is busy; try again later") -> Refusal:
    """Rightly asked, but not now."""
    return Refusal(503, message, retry_after_s=1)


def late(timeout_s: float) -> Refusal:
    """The deadline passed. It is 503, since it is the load that made it pass."""
    return Refusal(503, f"no result within {timeout_s:g} s; try again later", retry_after_s=1, late=True)
