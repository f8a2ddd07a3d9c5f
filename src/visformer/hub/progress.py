"""How far a download has come: a bar on a terminal, elsewhere a line at the start and one every ten seconds."""

from __future__ import annotations

import time
from typing import Any

from visformer import console

LINE_EVERY_S = 10.0
_MB = 1_000_000


class Progress:
    """The progress of one file, called `name`, from `url`; sizes are in bytes."""

    def __init__(self, name: str, url: str):
        self.name, self.url = name, url
        self.bar = console.progress() if console.is_terminal() else None
        self.task: Any = None
        self.total: int | None = None

    def __enter__(self) -> Progress:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar:
            self.bar.stop()

    def begin(self, size: int, total: int | None) -> None:
        """An attempt starts, with `size` bytes here already."""
        self.began, self.first, self.total = time.monotonic(), size, total
        self.shown = self.began
        how = f"{total / _MB:,.1f} MB" if total is not None else "of a size that the server does not tell"
        here = f", {size / _MB:,.1f} MB of it here already" if size else ""
        self.say(f"downloading {self.name} ({how}{here}) from {self.url}")
        if self.bar:
            if self.task is not None:
                self.bar.remove_task(self.task)
            megabytes = None if total is None else round(total / _MB)
            self.task = self.bar.add_task(self.name, total=megabytes, completed=round(size / _MB), status="MB")

    def advance(self, size: int) -> None:
        """`size` bytes are here now."""
        now = time.monotonic()
        if self.bar:
            self.bar.update(self.task, completed=round(size / _MB), status=f"MB  {self._rate(size, now)}")
        elif now - self.shown >= LINE_EVERY_S:
            self.shown = now
            of = f" of {self.total / _MB:,.1f} MB ({size / self.total:.0%})" if self.total else " MB"
            console.note(f"{self.name}: {size / _MB:,.1f}{of}, {self._rate(size, now)}")

    def say(self, line: str) -> None:
        """Print a line, above the bar if there is one."""
        if self.bar:
            self.bar.console.print(line, markup=False)
        else:
            console.note(line)

    def _rate(self, size: int, now: float) -> str:
        return f"{(size - self.first) / max(now - self.began, 1e-3) / _MB:,.1f} MB/s"
