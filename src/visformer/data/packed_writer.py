"""Writing a packed set: each image made ready by a few threads, the shards written one after another.

The images of a training split lie in the shards in an order drawn once, always the same, so that a few shards hold some
of every class; the index keeps the source's order. Equal data gives equal files. What a packed set consists of is in
packed_index.py.
"""

from __future__ import annotations

import io
import os
import tarfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from visformer.data.decode import IMAGE_SUFFIXES, ImageError, open_image
from visformer.data.packed_index import Piece, Split, index_bytes, make_index, piece_of
from visformer.data.sources import ImageSource, Subset

_TAR_BLOCK = 512
_SHUFFLE_SEED = 0
_JPEG_SUFFIXES = frozenset({".jpeg", ".jpe", ".jfif"})  # which WebDataset's readers don't look for


class Sample(NamedTuple):
    """An image as it goes into a shard; the suffix of a file, height and width of pixels."""

    data: bytes
    suffix: str = ""
    height: int = 0
    width: int = 0


Ready = Callable[[ImageSource, int], Sample]  # raises `ImageError`


def as_file(source: ImageSource, index: int) -> Sample:
    """The image's file, byte for byte, once it is seen to decode; as PNG where there is no file."""
    data = _raw(source, index)
    if isinstance(data, bytes):
        open_image(data)
        suffix = os.path.splitext(source.key(index))[1].lower()
        if suffix not in IMAGE_SUFFIXES or suffix in _JPEG_SUFFIXES:
            suffix = ".jpg" if data[:3] == b"\xff\xd8\xff" else ".png"
        return Sample(data, suffix)
    file = io.BytesIO()
    source.load(index).save(file, "PNG")
    return Sample(file.getvalue(), ".png")


@dataclass(frozen=True)
class AsPixels:
    """The image's pixels, upright, with the short side reduced to `size` pixels where it is longer (bicubic,
    antialiased); a smaller image stays as it is."""

    size: int

    def __call__(self, source: ImageSource, index: int) -> Sample:
        image = source.load(index)
        short = min(image.size)
        if short > self.size:
            width, height = (max(round(side * self.size / short), 1) for side in image.size)
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        return Sample(image.tobytes(), height=image.height, width=image.width)


@dataclass
class Packed:
    """What became of a split."""

    split: Split
    skipped: list[tuple[str, str]]  # name and reason
    counts: np.ndarray  # images of each class
    lengths: list[int]  # images of each shard

    @property
    def size(self) -> int:
        """Bytes of the shards."""
        return sum(shard.size for shard in self.split.shards)


def write_split(
    source: ImageSource,
    name: str,
    out: Path,
    ready: Ready,
    *,
    shard_bytes: int,
    workers: int,
    shuffled: bool,
    folder: str = "",
    advance: Callable[[], object] = lambda: None,
) -> Packed:
    """Write the shards and the index of one split into the folder `out`; `advance` is called after each image.

    Images that can't be read are left out and named. Raises `OSError` when the disk refuses.
    """
    order = np.random.default_rng(_SHUFFLE_SEED).permutation(len(source)) if shuffled else np.arange(len(source))
    shards = _Shards(out, name, shard_bytes, tar=ready is as_file)
    rows: dict[int, tuple[int, int, int, int, int, int]] = {}
    skipped: dict[int, str] = {}
    try:
        for index, made in _made(source, order, ready, workers):
            if isinstance(made, ImageError):
                skipped[index] = made.reason
            else:
                target = source.target(index)
                rows[index] = (*shards.add(made, index, target), len(made.data), made.height, made.width, target)
            advance()
    finally:
        pieces = shards.close()
    kept = sorted(rows)
    index = make_index([rows[i] for i in kept], [source.key(i) for i in kept])
    path, data = out / f"{name}.index.safetensors", index_bytes(index)
    path.write_bytes(data)
    split = Split(len(kept), folder, shuffled, piece_of(path.name, data), pieces)
    names = [(source.name(i), skipped[i]) for i in sorted(skipped)]
    counts = np.bincount(index.target, minlength=len(source.class_names))
    return Packed(split, names, counts, np.bincount(index.shard, minlength=len(pieces)).tolist())


def _made(
    source: ImageSource, order: np.ndarray, ready: Ready, workers: int
) -> Iterator[tuple[int, Sample | ImageError]]:
    """Each image made ready, in `order`, by `workers` threads that are a little ahead."""

    def make(index: int) -> Sample | ImageError:
        try:
            return ready(source, index)
        except ImageError as error:
            return error

    waiting: deque[tuple[int, Future]] = deque()
    with ThreadPoolExecutor(max(workers, 1), thread_name_prefix="pack") as pool:
        try:
            for index in order.tolist():
                waiting.append((index, pool.submit(make, index)))
                if len(waiting) > 4 * workers:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class _Shards:
    """The shards of a split, one open at a time; each but the last is as full as it may be."""

    def __init__(self, out: Path, name: str, most: int, *, tar: bool) -> None:
        self.out, self.name, self.most, self.tar = out, name, most, tar
        self.pieces: list[Piece] = []
        self._file: _Summed | None = None

    def add(self, sample: Sample, index: int, target: int) -> tuple[int, int]:
        """Write one; the number of its shard and the offset of its data there."""
        file = self._file
        if file is None or (file.size and file.size + len(sample.data) > self.most):
            self._end()
            suffix = "tar" if self.tar else "bin"
            file = self._file = _Summed(self.out / f"{self.name}-{len(self.pieces):06}.{suffix}")
        number = len(self.pieces)
        if not self.tar:
            file.write(sample.data)
            return number, file.size - len(sample.data)
        key = f"{index:08}"
        file.write(_tar_header(f"{key}{sample.suffix}", len(sample.data)))
        offset = file.size
        file.write(_padded(sample.data))
        label = str(target).encode()
        file.write(_tar_header(f"{key}.cls", len(label)) + _padded(label))
        return number, offset

    def close(self) -> list[Piece]:
        """End the last one; the entries of all."""
        self._end()
        return self.pieces

    def _end(self) -> None:
        if self._file is None:
            return
        if self.tar:
            self._file.write(bytes(2 * _TAR_BLOCK))
        self.pieces.append(self._file.close())
        self._file = None


class _Summed:
    """A file that knows its size and CRC-32, and is on the disk once it is closed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = self.crc32 = 0
        self._file: BinaryIO = open(path, "wb")  # noqa: SIM115 (closed by close)

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self.crc32 = zlib.crc32(data, self.crc32)
        self.size += len(data)

    def close(self) -> Piece:
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        return Piece(self.path.name, self.size, self.crc32)


def _tar_header(name: str, size: int) -> bytes:
    """The header of a member, always the same for the same name and size."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    return member.tobuf(tarfile.USTAR_FORMAT)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % _TAR_BLOCK)


def _raw(source: ImageSource, index: int) -> object:
    """What the source has of the image besides a decoded picture, if anything."""
    while isinstance(source, Subset):
        index = int(source.indices[index])
        source = source.source
    raw = getattr(source, "raw", None)
    return raw(index) if raw is not None else None
