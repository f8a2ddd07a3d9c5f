"""What this machine has for us: processor cores, and a folder for what is fetched. Loads nothing heavy."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "VISFORMER_CACHE"


def available_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_folder() -> Path:
    """Where downloads are kept: $VISFORMER_CACHE, else $XDG_CACHE_HOME/visformer, else ~/.cache/visformer."""
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.environ[CACHE_VARIABLE]).expanduser()
    shared = Path(os.environ.get("XDG_CACHE_HOME") or "")
    return (shared if shared.is_absolute() else Path("~/.cache").expanduser()) / "visformer"
