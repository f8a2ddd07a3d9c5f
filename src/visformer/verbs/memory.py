"""Memory that a training step frees is kept for the next one.

Left alone, glibc hands freed memory back to the kernel, which has to find and clear it again, page by page, when the
next step asks for it: a fifth of a step of visformer_tiny (batch 64, 64 pixels, one core). Kept, it stays with the
process until training ends, at the size of the largest step. Other C libraries are left as they are.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Names and numbers of <malloc.h>; the values to go back to are glibc's defaults.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_KEEP = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 64 << 20}
_DEFAULTS = {_MMAP_MAX: 65_536, _TRIM_THRESHOLD: 128 << 10, _TOP_PAD: 0}


@contextmanager
def kept_memory(device: torch.device, use: bool = True) -> Iterator[bool]:
    """While it is open, this process keeps what it frees, if it computes on the CPU; gives whether it does."""
    library = _glibc() if use and device.type == "cpu" else None
    if library is None:
        yield False
        return
    kept = all(library.mallopt(name, value) for name, value in _KEEP.items())
    try:
        yield kept
    finally:
        for name, value in _DEFAULTS.items():
            library.mallopt(name, value)
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """The C library of this process, if it is GNU's."""
    try:
        library = ctypes.CDLL(None)
    except (OSError, TypeError):
        return None
    return library if all(hasattr(library, name) for name in ("gnu_get_libc_version", "mallopt")) else None
