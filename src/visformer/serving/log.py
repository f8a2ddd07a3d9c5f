"""What happened, one JSON object a line on stderr: `{"time": ..., "event": "request", ...}`."""

from __future__ import annotations

import json
import sys
import time
import traceback
from typing import Any


def event(kind: str, **fields: Any) -> None:
    """Write one line. `time` is UTC, in ISO 8601, to the millisecond."""
    now = time.time()
    stamp = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now))}.{int(now % 1 * 1000):03d}Z"
    line = json.dumps({"time": stamp, "event": kind, **fields}, default=str)
    try:
        sys.stderr.write(line + "\n")
        sys.stderr.flush()
    except (OSError, ValueError):  # whoever read it has gone; the server goes on
        return


def fault(error: BaseException, **fields: Any) -> None:
    """An error of ours, with its traceback; only the log ever has it."""
    event("fault", error=repr(error), trace="".join(traceback.format_exception(error)), **fields)
