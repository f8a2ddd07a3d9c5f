"""The errors that a person sees as one line.

A mistake in what the user gave us is a `UsageError` (exit code 2); work that was asked for rightly and could not be
done is a `RunError` (exit code 1). Both carry a message that names the file or value, the rule and the way out.
Anything else that escapes is a bug of ours and shows its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VisformerError(Exception):
    """Base of the errors that end a command with one clear line."""

    exit_code = 1
    told = False  # another process of the same run says it


class UsageError(VisformerError, ValueError):
    """What was asked for is wrong: a missing file, an unknown name, a value out of range. Exit code 2."""

    exit_code = 2


class RunError(VisformerError, RuntimeError):
    """What was asked for is right, and failed: a full disk, a diverged loss. Exit code 1."""


class Interrupted(VisformerError):  # noqa: N818 (it is no error)
    """Stopped by a signal, after saving. Exit code 130."""

    exit_code = 130


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence that offers the known names closest to `name`, or an empty string when none is near."""
    matches = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(matches)}?" if matches else ""
