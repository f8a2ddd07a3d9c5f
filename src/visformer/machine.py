"""What this machine has for us: processor cores, their name, and a folder for downloads. Loads nothing heavy."""

from __future__ import annotations

import os
import platform
from pathlib import Path

CACHE_VARIABLE = "VISFORMER_CACHE"


def available_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor_name() -> str:
    """The processor as its maker calls it, or what the system says of its kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def cache_folder() -> Path:
    """Where downloads are kept: $VISFORMER_CACHE, else $XDG_CACHE_HOME/visformer, else ~/.cache/visformer."""
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.environ[CACHE_VARIABLE]).expanduser()
    shared = Path(os.environ.get("XDG_CACHE_HOME") or "")
    return (shared if shared.is_absolute() else Path("~/.cache").expanduser()) / "visformer"
