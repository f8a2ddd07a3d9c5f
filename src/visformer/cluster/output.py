"""The folder that offline labelling writes: one Parquet file for each piece, whole or not there.

    _run.json                what was asked for: the model's fingerprint, the options, how many pieces
    _inputs.jsonl            the pieces, one a line; their number is the line's, from 0
    part-0000000.parquet     the rows of piece 0, in its order

A part that is there is done, and that is all there is to resume from. The first two names begin with _, so that readers
of Parquet folders pass them over. The folder may be behind an address.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from visformer.atomic import atomic_write, remove_leftovers
from visformer.cluster.places import file_system, with_patience
from visformer.data.streams import is_address
from visformer.errors import RunError, UsageError

RUN, INPUTS, LOCK = "_run.json", "_inputs.jsonl", "_lock"
_PART = re.compile(r"part-(\d{7,})\.parquet")


def part_name(number: int) -> str:
    """The file of a piece."""
    return f"part-{number:07d}.parquet"


class LocalFolder:
    """A folder of this machine, made if need be."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"output: {path} is a file; with --engine ray give a folder")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep others out. Raises `UsageError` when another run is at it."""
        from filelock import FileLock, Timeout

        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / LOCK, timeout=0)
            lock.acquire()
        except Timeout:
            raise UsageError(
                f"output: another run is writing to {self.path}; wait for it, or give another folder"
            ) from None
        except OSError as error:
            raise RunError(f"output: can't write to {self.path} ({error.strerror})") from None
        try:
            remove_leftovers(self.path)
            yield
        finally:
            lock.release()

    def names(self) -> list[str]:
        return [path.name for path in self.path.iterdir()] if self.path.is_dir() else []

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def lines(self, name: str) -> Iterator[bytes]:
        with open(self.path / name, "rb") as file:
            yield from file

    def write(self, name: str, chunks: Iterable[bytes]) -> None:
        atomic_write(self.path / name, lambda file: file.writelines(chunks))


class RemoteFolder:
    """A folder behind an address. What object stores take becomes visible whole; other systems rename."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.system, root = file_system(address)
        self.root = root.rstrip("/")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Nothing keeps others out here: parts of two runs of one command are the same."""
        yield

    def names(self) -> list[str]:
        def names() -> list[str]:
            self.system.invalidate_cache()
            try:
                return [posixpath.basename(path) for path in self.system.ls(self.root, detail=False)]
            except FileNotFoundError:
                return []

        return with_patience(self.address, names)

    def read(self, name: str) -> bytes:
        return with_patience(f"{self.address}/{name}", lambda: self.system.cat_file(f"{self.root}/{name}"))

    def lines(self, name: str) -> Iterator[bytes]:
        with self.system.open(f"{self.root}/{name}", "rb") as file:
            yield from file

    def write(self, name: str, chunks: Iterable[bytes]) -> None:
        content = b"".join(chunks)
        target = f"{self.root}/{name}"

        def write() -> None:
            self.system.makedirs(self.root, exist_ok=True)
            beside = f"{self.root}/.writing-{name}"
            self.system.pipe_file(beside, content)
            self.system.mv(beside, target)

        try:
            with_patience(target, write)
        except OSError as error:
            raise RunError(f"output: can't write {target} ({error.strerror or error})") from None


OutputFolder = LocalFolder | RemoteFolder


def open_output(where: str) -> OutputFolder:
    """The folder at a path or an address. Raises `UsageError`."""
    return RemoteFolder(where) if is_address(where) else LocalFolder(where)


def finished(folder: OutputFolder) -> set[int]:
    """Numbers of the pieces whose part is there."""
    return {int(match[1]) for name in folder.names() if (match := _PART.fullmatch(name))}


def parts(folder: OutputFolder) -> list[str]:
    """Names of the parts, in order."""
    return [part_name(number) for number in sorted(finished(folder))]


def settings_differ(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One text for each setting that is not what it was."""
    known = {**dict.fromkeys(then), **dict.fromkeys(now)}
    return [
        f"{name}: {then.get(name)!r} then, {now.get(name)!r} now" for name in known if then.get(name) != now.get(name)
    ]
