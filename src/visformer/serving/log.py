"""What happened, one JSON object a line on stderr: `{"time": ..., "event": "request", ...}`."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
import traceback
from typing import Any

_pending: list[str] = []  # lines of this turn of the event loop
_lock = threading.Lock()


def event(kind: str, **fields: Any) -> None:
    """Write one line. `time` is UTC, in ISO 8601, to the millisecond."""
    line = _line(kind, fields)
    with _lock:
        _pending.append(line)
    _write()


def event_soon(kind: str, **fields: Any) -> None:
    """As `event`, from the event loop; the lines of one of its turns are written together, as it ends."""
    line = _line(kind, fields)
    with _lock:
        _pending.append(line)
        if len(_pending) == 1:
            asyncio.get_running_loop().call_soon(_write)


def _line(kind: str, fields: dict[str, Any]) -> str:
    now = time.time()
    stamp = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now))}.{int(now % 1 * 1000):03d}Z"
    return json.dumps({"time": stamp, "event": kind, **fields}, default=str) + "\n"


def _write() -> None:
    with _lock:
        text = "".join(_pending)
        _pending.clear()
    if not text:
        return
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except (OSError, ValueError):  # whoever read it has gone; the server goes on
        return


def fault(error: BaseException, **fields: Any) -> None:
    """An error of ours, with its traceback; only the log ever has it."""
    event("fault", error=repr(error), trace="".join(traceback.format_exception(error)), **fields)
