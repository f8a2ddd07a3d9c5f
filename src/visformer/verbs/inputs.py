"""From what was typed to the paths of images: files, folders, globs, and `-` for a list on standard input.

Everything is lazy, so a list of millions of files takes no memory: a folder is read one level at a time, standard
input a line at a time. The order is that of the inputs; within a folder or glob it is natural, so that `9.jpg` comes
before `10.jpg`.
"""

from __future__ import annotations

import glob
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from visformer.console import warn
from visformer.data.decode import IMAGE_SUFFIXES
from visformer.errors import UsageError

STDIN = "-"


def check_inputs(inputs: Sequence[str]) -> None:
    """Raise `UsageError` when nothing was given, or a folder or glob is named that holds no image."""
    if not inputs:
        raise UsageError(
            "inputs: no image given; name files, folders or globs, or - to read a list from standard input"
        )
    for entry in inputs:
        if os.path.isdir(entry) and next(images_below(entry), None) is None:
            raise UsageError(
                f"{entry}: no image in this folder or below; images end in {', '.join(sorted(IMAGE_SUFFIXES))}"
            )
        if _is_pattern(entry) and next(_matches(entry), None) is None:
            raise UsageError(f"{entry}: no file matches; quote the pattern and check it, ** stands for any folders")


def expand(inputs: Sequence[str], stdin: BinaryIO | None = None) -> Iterator[str]:
    """The paths of images that the inputs stand for. A path that does not exist is passed on as it is.

    Folders are searched at every depth for files with an image's suffix, hidden ones left out; a file that is named,
    or that a glob matches, is taken whatever its suffix. `stdin` (default: the process's own) holds one path a line.
    """
    for entry in inputs:
        if entry == STDIN:
            for line in stdin or sys.stdin.buffer:
                path = os.fsdecode(line.rstrip(b"\r\n"))
                if path:
                    yield from _files(path)
        elif _is_pattern(entry):
            yield from _matches(entry)
        else:
            yield from _files(entry)


def images_below(folder: str, _ancestors: frozenset[tuple[int, int]] = frozenset()) -> Iterator[str]:
    """Image files in `folder` and below, in natural order; links to folders are followed, but never in a circle."""
    try:
        status = os.stat(folder)
        identity = (status.st_dev, status.st_ino)
        if identity in _ancestors:
            return
        with os.scandir(folder) as scan:
            entries = sorted((entry.name, entry.is_dir()) for entry in scan if not entry.name.startswith("."))
    except OSError as error:
        warn(f"{folder}: passed over, cannot be read ({error.strerror})")
        return
    for name, is_folder in sorted(entries, key=lambda entry: natural(entry[0])):
        path = os.path.join(folder, name)
        if is_folder:
            yield from images_below(path, _ancestors | {identity})
        elif os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
            yield path


def natural(name: str) -> list[str | int]:
    """A sort key that puts `img9` before `img10`: text and numbers in turn."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", name.casefold()))]


def _files(path: str) -> Iterator[str]:
    return images_below(path) if os.path.isdir(path) else iter((path,))


def _is_pattern(entry: str) -> bool:
    """True for a glob; a file that exists under just that name is no glob."""
    return entry != STDIN and glob.has_magic(entry) and not os.path.lexists(entry)


def _matches(pattern: str) -> Iterator[str]:
    """What a glob stands for. With ** it goes through the folders itself, so only files count there."""
    found = sorted(glob.glob(pattern, recursive=True), key=lambda path: [natural(part) for part in path.split(os.sep)])
    for path in found:
        if "**" not in pattern:
            yield from _files(path)
        elif not os.path.isdir(path):
            yield path
