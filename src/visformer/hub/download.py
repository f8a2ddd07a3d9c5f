"""One file over https, whole and verified or not at all.

What has arrived is in `NAME.part` beside the destination, and `NAME.part.json` says of which version of the file. A
dropped connection goes on where it stopped, in this process or a later one, if the server still has that very version
(Range with If-Range); otherwise the download begins again. Only a file whose SHA-256 is right gets its final name. A
lock keeps two processes from writing the same part: the second waits, and then finds the file there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from visformer import console
from visformer.atomic import atomic_text
from visformer.errors import RunError
from visformer.hub.https import Dropped, Refused, Response, check_url, open_url, redacted
from visformer.hub.progress import Progress
from visformer.machine import CACHE_VARIABLE

ATTEMPTS = 5  # in a row that bring nothing new
BACKOFF_S = 1.0  # before the second attempt, doubled for each one after
MAX_WAIT_S = 60.0
MAX_BYTES = 4 * 2**30
SPARE_BYTES = 64 * 2**20  # left free on the disk
CHUNK_BYTES = 2**20


def download(url: str, destination: str | Path, *, sha256: str | None) -> Path:
    """Fetch `url` into the file `destination` and return its path; a file that is there already is verified and kept.

    Args:
        url: an https address; plain http is for this machine itself (127.0.0.1).
        destination: the file to write; its folder is made.
        sha256: hex digits with which the file's SHA-256 begins; None: nothing to verify.

    Raises `UsageError` for an address that is not allowed, and `RunError`, which says where to put the file by hand,
    when the download fails or gives another file.
    """
    destination, expected = Path(destination), sha256.lower() if sha256 else None
    check_url(url)
    if destination.exists():
        return verified(destination, expected)
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with _locked(destination):
            if not destination.exists():
                _Download(url, destination, expected).run()
                return destination
    except Refused as error:
        raise RunError(_by_hand(url, destination, str(error))) from error
    except OSError as error:
        raise RunError(
            _by_hand(url, destination, f"cannot write to {destination.parent} ({error.strerror or error})")
        ) from error
    return verified(destination, expected)


def verified(path: Path, sha256: str | None) -> Path:
    """`path`, once its SHA-256 is seen to begin with `sha256`. Raises `RunError` with both otherwise."""
    found = file_sha256(path) if sha256 else ""
    if sha256 and not found.startswith(sha256.lower()):
        raise RunError(
            f"{path}: it is not the file that is meant: its SHA-256 is {found}, which should begin with {sha256}; "
            "delete it to download it again"
        )
    return path


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file in hex digits. Raises `RunError` when it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RunError(f"{path}: it cannot be read ({error.strerror})") from error


@dataclass
class _Download:
    """One file on its way."""

    url: str
    destination: Path
    sha256: str | None

    def __post_init__(self) -> None:
        self.part = self.destination.with_name(self.destination.name + ".part")
        self.record = self.destination.with_name(self.destination.name + ".part.json")

    def run(self) -> None:
        """Attempt until the part is whole, verify it, and give it its name. Raises `Refused` with the reason."""
        with Progress(self.destination.name, redacted(self.url)) as progress:
            self._attempts(progress)
        found = file_sha256(self.part)
        if self.sha256 and not found.startswith(self.sha256):
            self._forget()
            raise Refused(f"the SHA-256 of what came is {found}, which should begin with {self.sha256}")
        os.replace(self.part, self.destination)
        self.record.unlink(missing_ok=True)
        console.note(f"saved as {self.destination}")

    def _attempts(self, progress: Progress) -> None:
        failures = furthest = 0
        while True:
            try:
                return self._attempt(progress)
            except Dropped as error:
                failures = 1 if self._size() > furthest else failures + 1
                furthest = max(furthest, self._size())
                if failures >= ATTEMPTS:
                    raise Refused(f"{error}, {failures} times in a row") from error
                wait = min(max(BACKOFF_S * 2 ** (failures - 1), error.retry_after_s), MAX_WAIT_S)
                progress.say(f"{self.destination.name}: {error}; trying again in {wait:.0f} s")
                time.sleep(wait)

    def _attempt(self, progress: Progress) -> None:
        """Open the address where the part ends, or at its beginning, and append what comes."""
        validator = self._validator()
        start = self._size() if validator else 0
        with open_url(self.url, start, validator) as response:
            if response.unsatisfiable:  # the part has all of it already, or more
                if response.total == start:
                    return
                self._forget()
                raise Dropped("the part that is here does not fit what the server has")
            if response.start not in (0, start):
                raise Refused("the server sent another part of the file than was asked for")
            start = response.start
            if response.total is None and self.sha256 is None:
                raise Refused(
                    "neither its size nor its SHA-256 is known, so that nobody can tell when all of it is here"
                )
            self._check_room(response.total, start)
            if start == 0:
                self._forget()
                self._remember(response.validator)
            with open(self.part, "ab" if start else "wb") as file:
                self._append(file, response, start, progress)

    def _append(self, file: BinaryIO, response: Response, start: int, progress: Progress) -> None:
        size, total = start, response.total
        progress.begin(size, total)
        for chunk in response.chunks(CHUNK_BYTES):
            size += len(chunk)
            if size > MAX_BYTES:
                raise Refused(f"the server sends more than {MAX_BYTES:,} bytes, and no checkpoint has as many")
            file.write(chunk)
            progress.advance(size)
        file.flush()
        os.fsync(file.fileno())
        if size < (total or 1):
            raise Dropped(f"the connection ended after {size:,}{f' of {total:,}' if total else ''} bytes")

    def _check_room(self, total: int | None, start: int) -> None:
        if total is None:
            return
        if total > MAX_BYTES:
            raise Refused(f"it has {total:,} bytes, and no checkpoint has more than {MAX_BYTES:,}")
        free = shutil.disk_usage(self.part.parent).free
        if total - start + SPARE_BYTES > free:
            raise Refused(
                f"it needs {total - start:,} bytes and {self.part.parent} has {free:,} free; free some space or name "
                f"another folder in {CACHE_VARIABLE}"
            )

    def _size(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _validator(self) -> str | None:
        """What names the version of the file that the part is of; None: there is none, so it cannot be gone on with."""
        if not self._size():
            return None
        try:
            record = json.loads(self.record.read_text(encoding="utf-8"))
            return str(record["validator"]) if record["url"] == self.url else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _remember(self, validator: str | None) -> None:
        if validator:
            atomic_text(self.record, json.dumps({"url": self.url, "validator": validator}) + "\n")

    def _forget(self) -> None:
        self.record.unlink(missing_ok=True)
        self.part.unlink(missing_ok=True)


@contextmanager
def _locked(destination: Path) -> Iterator[None]:
    """Hold the lock of `destination`; the system lets go of it when a process ends, however it ends."""
    lock = FileLock(destination.with_name(f".{destination.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        console.note(f"{destination.name}: another process downloads it; waiting")
        lock.acquire()
    try:
        yield
    finally:
        with suppress(OSError):
            lock.release()


def _by_hand(url: str, destination: Path, reason: str) -> str:
    where = destination.absolute()
    return f"cannot download {redacted(url)}: {reason}; download it with a browser and save it as {where}"
