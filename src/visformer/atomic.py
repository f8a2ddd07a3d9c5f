"""Files that are either whole or not there: written beside their place, flushed to the disk, then renamed onto it.

A crash, a kill or a full disk leaves what stood before untouched, and no temporary file survives an error.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from visformer.errors import RunError

TEMPORARY_PREFIX = ".writing-"


def atomic_write(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Call `write(file)` and put what it wrote at `path`, with the folder made if need be.

    Raises `RunError` naming the file when the disk is full, read-only or otherwise refuses.
    """

    def write_to(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            write(file)

    atomic_replace(path, write_to)


def atomic_replace(path: str | Path, write_to: Callable[[Path], object]) -> None:
    """As `atomic_write`, for a writer that opens its file by itself: it gets the temporary file's path."""
    path = Path(path)
    with _reported(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, suffix=path.suffix, dir=path.parent)
        try:
            os.close(descriptor)
            write_to(Path(name))
            with open(name, "rb+") as file:
                os.fsync(file.fileno())
            os.chmod(name, 0o666 & ~_umask())
            os.replace(name, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(name)
            raise
        _sync_folder(path.parent)


def atomic_text(path: str | Path, text: str) -> None:
    """Put `text`, as UTF-8, at `path`."""
    atomic_write(path, lambda file: file.write(text.encode()))


@contextmanager
def replaced(path: Path, before: Path) -> Iterator[None]:
    """Around the writing of `path`: what stands there gets a second name, `before`, and keeps it.

    If the writing fails, both names have what they had. A file system without links keeps no `before`.
    """
    link = path.with_name(f"{TEMPORARY_PREFIX}{before.name}")
    with suppress(OSError):
        link.unlink(missing_ok=True)
        os.link(path, link)
    try:
        yield
    except BaseException:
        link.unlink(missing_ok=True)
        raise
    if link.exists():
        os.replace(link, before)


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files of writers that were killed; call it where no other writer is at work."""
    for leftover in folder.glob(f"{TEMPORARY_PREFIX}*"):
        with suppress(OSError):
            leftover.unlink()


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error.strerror or error}; what was saved before is untouched. "
            "Free some space or choose another folder"
        ) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # elsewhere a folder cannot be opened, and the rename itself is durable
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
