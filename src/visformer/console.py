"""What a person reads: messages and progress on stderr, so that stdout stays for results.

`note` and `warn` print one line each; `progress` is a bar on a terminal and silent elsewhere, where callers print plain
lines of their own. Rich does the drawing, and is imported only when something is drawn.
"""

from __future__ import annotations

import json
import sys
from typing import Any

_warned: set[str] = set()
_quiet = False


def _console():
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def is_terminal() -> bool:
    """True when a person watches stderr."""
    return sys.stderr.isatty() and not _quiet


def set_quiet(quiet: bool) -> None:
    """Say nothing from now on, as all but the first of several processes do; errors still come out."""
    global _quiet
    _quiet = quiet


def note(message: str) -> None:
    """Print one line for the person who watches."""
    if not _quiet:
        _console().print(message, markup=False)


def warn(message: str, *, once: bool = False) -> None:
    """Print a warning; with `once`, only the first time that this very message comes up."""
    if once:
        if message in _warned:
            return
        _warned.add(message)
    if not _quiet:
        _console().print(f"warning: {message}", style="yellow", markup=False)


def table(title: str, columns: list[str], rows: list[list[str]], *, numeric_from: int = 1) -> None:
    """Print a table on stdout; columns from `numeric_from` on are aligned to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    drawn = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for i, column in enumerate(columns):
        drawn.add_column(column, justify="right" if i >= numeric_from else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 120).print(drawn)


def print_json(document: Any) -> None:
    """Print one JSON document on stdout."""
    print(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False), flush=True)


def progress(transient: bool = True):
    """A Rich progress bar on stderr: description, bar, count, time left and a free `status` field."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
        console=_console(),
        transient=transient,
        disable=not is_terminal(),
    )


def duration(seconds: float) -> str:
    """`seconds` in the form a person would write: 45 s, 12 min 30 s, 3 h 05 min."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
