"""Where the files of a packed set are: in a folder, or behind an address that fsspec can read.

    s3://bucket/set  gs://bucket/set  hf://datasets/owner/name/set  https://host/set  file:///mnt/set  memory://set

Shards from an address are fetched whole into a cache, verified by size and CRC-32, and read from there. The cache is
$VISFORMER_CACHE/shards ($XDG_CACHE_HOME/visformer/shards, ~/.cache/visformer/shards), shared by all processes of a
machine and bounded by $VISFORMER_SHARD_CACHE_GB: the shards that were not used for longest go first. A fetch that fails
is tried again after 1, 2, 4 and 8 seconds. Credentials come from where fsspec's packages look for them (environment,
configuration files), never from the address.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import re
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol
from urllib.parse import urlsplit

from filelock import FileLock

from visformer.data.packed_index import MARKER, Piece
from visformer.errors import RunError, UsageError, VisformerError
from visformer.machine import CACHE_VARIABLE, cache_folder

SIZE_VARIABLE = "VISFORMER_SHARD_CACHE_GB"
CACHE_GB = 16.0
ATTEMPTS = 5
BACKOFF_S = 1.0  # before the second attempt, doubled for each one after
FETCHERS = 4  # shards that are fetched at once, ahead of their use
_CHUNK = 2**20
_PART = ".part-"
_ABANDONED_S = 3600.0  # since a part was last written to
_FOR_GOOD = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError, ImportError)
_PACKAGES = {
    "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs", "abfss": "adlfs",
    "hf": "huggingface_hub", "http": "'visformer[stream]'", "https": "'visformer[stream]'", "sftp": "paramiko",
    "ssh": "paramiko", "hdfs": "pyarrow", "oss": "ossfs", "oci": "ocifs", "smb": "smbprotocol",
}  # fmt: skip


class Store(Protocol):
    """The files of a packed set by name. `local` says that they can be read anywhere at any time at little cost."""

    where: str
    local: bool

    def read(self, name: str, most: int) -> bytes:
        """All of a small file. Raises `UsageError` when it is not there or has more than `most` bytes."""
        ...

    def path(self, piece: Piece) -> Path:
        """A file on this machine with the bytes of a shard. Raises `RunError` when there can be none."""
        ...

    def fetch_later(self, pieces: Sequence[Piece]) -> None:
        """Let shards be on this machine soon; returns at once."""
        ...


def is_address(data_dir: str) -> bool:
    """True for an address such as s3://bucket/set, False for a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.:-]*://", data_dir) is not None


def shard_folder() -> Path:
    """Where shards are kept: below the folder of all that is downloaded."""
    return cache_folder() / "shards"


def cache_bytes() -> int:
    """How many bytes of shards are kept. Raises `UsageError` for a setting that is no number above 0."""
    text = os.environ.get(SIZE_VARIABLE) or str(CACHE_GB)
    try:
        gigabytes = float(text)
        if not 0 < gigabytes < 1e9:
            raise ValueError
    except ValueError:
        raise UsageError(f"{SIZE_VARIABLE}: {text!r} is not a number of gigabytes above 0") from None
    return int(gigabytes * 1e9)


class Folder:
    """A packed set on a disk."""

    local = True

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.where = str(root)

    def read(self, name: str, most: int) -> bytes:
        path = self.root / name
        try:
            size = path.stat().st_size
            if size > most:
                raise UsageError(f"{path}: {size:,} bytes are more than the {most:,} that it can have")
            return path.read_bytes()
        except OSError as error:
            raise UsageError(f"{path}: can't be read ({error.strerror}); copy the set again") from None

    def path(self, piece: Piece) -> Path:
        return self.root / piece.name

    def fetch_later(self, pieces: Sequence[Piece]) -> None:
        """Nothing to do: they are here."""


class Address:
    """A packed set behind an address, with the shards in the cache.

    Raises `UsageError` for an address that names no file system, lacks its package, or carries a secret.
    """

    local = False

    def __init__(self, url: str) -> None:
        self.where = check_address(url).rstrip("/")
        self.cache = shard_folder() / hashlib.sha256(self.where.encode()).hexdigest()[:16]
        self.most = cache_bytes()
        self._file_system()
        self._ahead: _Ahead | None = None

    def read(self, name: str, most: int) -> bytes:
        def fetch() -> bytes:
            system, root = self._file_system()
            with system.open(f"{root}/{name}", "rb") as file:
                return file.read(most + 1)

        data = self._attempts(name, fetch)
        if len(data) > most:
            raise UsageError(f"{self.where}/{name}: it has more than the {most:,} bytes that it can have")
        return data

    def path(self, piece: Piece) -> Path:
        """The shard in the cache, fetched unless it is there."""
        path = self.cache / f"{piece.crc32:08x}-{piece.size}-{piece.name}"
        if not _is_there(path, piece):
            try:
                self.cache.mkdir(parents=True, exist_ok=True)
                with FileLock(self.cache / f".{path.name}.lock"):
                    if not _is_there(path, piece):
                        self._attempts(piece.name, lambda: self._fetch(piece, path))
            except OSError as error:
                raise RunError(
                    f"{self.cache}: shards can't be kept there ({error.strerror or error}); name another folder in "
                    f"{CACHE_VARIABLE}"
                ) from None
        with suppress(OSError):
            os.utime(path)  # used just now
        return path

    def fetch_later(self, pieces: Sequence[Piece]) -> None:
        if self._ahead is None or self._ahead.process != os.getpid():
            self._ahead = _Ahead(self.path)
        for piece in pieces:
            self._ahead.queue.put(piece)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_ahead": None}

    def _file_system(self) -> tuple[Any, str]:
        """fsspec's file system and the path of the set in it, of this process: they don't outlive a fork."""
        protocol = self.where.partition("://")[0].lower()
        try:
            from fsspec.core import url_to_fs
        except ImportError:
            raise UsageError(f"data_dir: {protocol}:// needs fsspec; pip install 'visformer[stream]'") from None
        try:
            return url_to_fs(self.where)
        except ImportError:
            package = _PACKAGES.get(protocol.rpartition("::")[2], f"the package that fsspec names for {protocol}")
            raise UsageError(
                f"data_dir: {protocol}:// needs a package that is not installed; pip install {package}"
            ) from None
        except ValueError as error:
            raise UsageError(
                f"data_dir: {self.where}: no address that fsspec can read ({without_secrets(error)})"
            ) from None

    def _fetch(self, piece: Piece, path: Path) -> None:
        """Write the shard beside its place in the cache, verify it, and give it its name."""
        make_room(shard_folder(), self.most - piece.size)
        part = self.cache / f"{_PART}{os.getpid()}-{threading.get_ident()}-{piece.name}"
        system, root = self._file_system()
        try:
            system.get_file(f"{root}/{piece.name}", str(part))
            size, crc32 = part.stat().st_size, crc32_of(part)
            if (size, crc32) != (piece.size, piece.crc32):
                raise _OtherBytes(
                    f"{size:,} bytes with CRC-32 {crc32:08x} came, not {piece.size:,} with {piece.crc32:08x}"
                )
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)

    def _attempts(self, name: str, fetch: Callable[[], Any]) -> Any:
        """What `fetch` returns, after as many attempts as it takes. Raises `RunError`, or `UsageError` when the file is
        not there."""
        attempt = 0
        while True:
            attempt += 1
            try:
                return fetch()
            except VisformerError:
                raise
            except Exception as error:  # each of fsspec's packages has errors of its own
                if isinstance(error, FileNotFoundError):
                    raise UsageError(f"{self.where}/{name}: not there; is this the address of a packed set?") from None
                if isinstance(error, _FOR_GOOD) or attempt == ATTEMPTS:
                    times = f", {attempt} times" if attempt > 1 else ""
                    raise RunError(f"{self.where}/{name}: can't be fetched{times} ({without_secrets(error)})") from None
                time.sleep(BACKOFF_S * 2 ** (attempt - 1))


class _OtherBytes(Exception):  # noqa: N818 (it says what came)
    """A file arrived, and is not the one that the index speaks of."""


class _Ahead:
    """Threads of one process that fetch shards. What fails here is told by whoever needs the shard."""

    def __init__(self, fetch: Callable[[Piece], Path]) -> None:
        self.process = os.getpid()
        self.queue: SimpleQueue[Piece] = SimpleQueue()
        self.fetch = fetch
        for number in range(FETCHERS):
            threading.Thread(target=self._serve, name=f"shard fetcher {number}", daemon=True).start()

    def _serve(self) -> None:
        while True:
            piece = self.queue.get()
            with suppress(Exception):
                self.fetch(piece)


def check_address(url: str) -> str:
    """`url`, unless it carries a secret or is plain http to another machine: then a `UsageError`."""
    parts = urlsplit(url)
    bare = parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
    if parts.query or parts.fragment or "@" in parts.netloc:
        raise UsageError(
            f"data_dir: {bare}: an address with a user name, a password or a query is not taken, since it would be "
            "written into the run's records; put credentials where fsspec's package looks for them, as in its "
            "environment variables"
        )
    if parts.scheme.lower() == "http" and not _is_this_machine(parts.hostname or ""):
        raise UsageError(f"data_dir: {bare}: plain http can be changed by anybody on the way; use https://")
    return url


def _is_this_machine(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def without_secrets(error: Exception) -> str:
    """An error in one line, without what stands before @ or behind ? in the addresses that it quotes."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r"(://)[^\s/@'\"]*@", r"\1", text)
    return re.sub(r"(://[^\s?'\"]*)\?[^\s'\"]*", r"\1", text)[:300]


def crc32_of(path: Path) -> int:
    """The CRC-32 of a file."""
    crc32 = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            crc32 = zlib.crc32(chunk, crc32)
    return crc32


def make_room(folder: Path, most: int) -> None:
    """Remove the shards that were not used for longest until those in `folder` have at most `most` bytes.

    A process that reads one that is removed goes on reading it. What killed processes left behind goes as well.
    """
    shards = []
    for path in folder.glob("*/*"):
        with suppress(OSError):
            stat = path.stat()
            if not path.name.startswith("."):
                shards.append((stat.st_mtime, stat.st_size, path))
            elif path.name.startswith(_PART) and time.time() - stat.st_mtime > _ABANDONED_S:
                path.unlink()
    held = sum(size for _, size, _ in shards)
    for _, size, path in sorted(shards):
        if held <= most:
            return
        with suppress(OSError):
            path.unlink()
            held -= size


def _is_there(path: Path, piece: Piece) -> bool:
    try:
        return path.stat().st_size == piece.size
    except OSError:
        return False


def open_store(data_dir: str) -> Store | None:
    """The files of a packed set; None for a folder that holds none. An address is always taken for one."""
    if is_address(data_dir):
        return Address(data_dir)
    return Folder(data_dir) if (Path(data_dir) / MARKER).is_file() else None
