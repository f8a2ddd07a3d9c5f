"""What a worker does to read a piece: keys and images, in the piece's order, a few ahead of their use.

What is wrong with one image is a reason beside its key (`Unreadable`). What is wrong with the way to it, an object
store that does not answer, is a `RunError` after five attempts: the piece is then tried again by the next run.
"""

from __future__ import annotations

import itertools
import os
import posixpath
import tarfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from visformer.cluster.pieces import Piece, open_parquet
from visformer.cluster.places import file_system, with_patience
from visformer.data.decode import IMAGE_SUFFIXES, ImageError
from visformer.data.packed import PackedSet
from visformer.data.streams import is_address, open_store
from visformer.errors import RunError

FETCHERS = 16  # images that a worker fetches from an address at once
_ROWS = 64  # of a Parquet file that are held at once
_LARGEST_MEMBER = 2**30  # bytes of an image in a tar file


@dataclass(frozen=True)
class Unreadable:
    """Why there is no image."""

    reason: str


Image = str | bytes | np.ndarray | Unreadable


def read(piece: Piece, column: str = "", key_column: str = "") -> Iterator[tuple[str, Image]]:
    """(key, image) of each image of a piece: a path, the bytes of a file, or pixels, uint8 (H, W) or (H, W, C).

    `column` of a Parquet file has the images, `key_column` their keys (empty: the path, or FILE#ROW).
    """
    if piece.kind == "images":
        return _fetched((path, path) for path in piece.paths)
    if piece.kind == "tar":
        return _members(piece.paths[0])
    if piece.kind == "packed":
        return _packed(piece)
    return _fetched(_rows(piece, column, key_column))


def _fetched(items: Iterator[tuple[str, Image]]) -> Iterator[tuple[str, Image]]:
    """The same, with the bytes in the place of addresses; local paths stay."""
    waiting: deque[tuple[str, Image | Future[Image]]] = deque()
    pool = ThreadPoolExecutor(FETCHERS, thread_name_prefix="fetch")
    try:
        while True:
            for key, image in itertools.islice(items, 2 * FETCHERS - len(waiting)):
                if isinstance(image, str) and is_address(image):
                    waiting.append((key, pool.submit(_fetch, image)))
                else:
                    waiting.append((key, image))
            if not waiting:
                return
            key, ready = waiting.popleft()
            yield key, ready.result() if isinstance(ready, Future) else ready
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _fetch(address: str) -> Image:
    system, path = file_system(address)
    try:
        return with_patience(address, lambda: system.cat_file(path))
    except OSError as error:
        return Unreadable(f"can't be read: {error.strerror or type(error).__name__}")


def _members(path: str) -> Iterator[tuple[str, Image]]:
    """The images of a tar file, read from its beginning to its end; keys are FILE/MEMBER."""
    with _opened(path) as file:
        try:
            with tarfile.open(fileobj=file, mode="r|*", tarinfo=_Whole) as tar:
                for member in tar:
                    hidden = posixpath.basename(member.name).startswith(".")
                    if not member.isfile() or hidden or os.path.splitext(member.name)[1].lower() not in IMAGE_SUFFIXES:
                        continue
                    key = f"{path}/{member.name}"
                    if member.size > _LARGEST_MEMBER:
                        yield key, Unreadable(f"can't be read: {member.size:,} bytes are too many for an image")
                        continue
                    content = tar.extractfile(member)
                    assert content is not None
                    yield key, content.read()
        except (tarfile.TarError, EOFError, OSError) as error:
            raise RunError(
                f"{path}: breaks off, or is no tar file ({' '.join(str(error).split())}); mend it or leave it out"
            ) from None


class _Whole(tarfile.TarInfo):
    """Headers of members; one that is cut off is an error, where `tarfile` takes it for the end."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.TruncatedHeaderError as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(str(error)) from None


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    try:
        if is_address(path):
            system, inner = file_system(path)
            file = with_patience(path, lambda: system.open(inner, "rb"))
        else:
            file = open(path, "rb")  # noqa: SIM115
    except OSError as error:
        raise RunError(f"{path}: can't be read on this worker ({error.strerror or error})") from None
    with file:
        yield file


def _packed(piece: Piece) -> Iterator[tuple[str, Image]]:
    store = open_store(piece.paths[0])
    if store is None:
        raise RunError(f"{piece.paths[0]}: not there on this worker; put the set where every node sees it")
    packed = PackedSet(store)
    source = packed.open(piece.split, packed.manifest.channels)
    for index in range(piece.start, piece.stop):
        try:
            image = source.raw(index)
        except ImageError as error:
            yield source.name(index), Unreadable(error.reason)
        else:
            assert image is not None  # the channels are the set's own
            yield source.name(index), np.array(image) if isinstance(image, np.ndarray) else image


def _rows(piece: Piece, column: str, key_column: str) -> Iterator[tuple[str, Image]]:
    (path,) = piece.paths
    row = piece.row
    wanted = [column, key_column] if key_column and key_column != column else [column]
    with open_parquet(path) as file:
        batches = file.iter_batches(_ROWS, row_groups=list(range(piece.start, piece.stop)), columns=wanted)
        for batch in batches:
            keys = batch.column(key_column).to_pylist() if key_column else [None] * len(batch)
            for key, cell in zip(keys, batch.column(column).to_pylist(), strict=True):
                image = _image_of(cell, path)
                named = image if isinstance(image, str) else f"{path}#{row}"
                yield named if key is None else str(key), image
                row += 1


def _image_of(cell: Any, table: str) -> Image:
    """Bytes, a path, or both in a struct, as Hugging Face's datasets have it. Paths begin where the table is."""
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, str) and cell:
        return cell if is_address(cell) else posixpath.join(posixpath.dirname(table), cell)
    if isinstance(cell, bytes) and cell:
        return cell
    return Unreadable("can't be read: the cell is empty" if not cell else "can't be read: neither bytes nor a path")
