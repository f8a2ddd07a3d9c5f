"""What is to be labelled, cut into pieces: each is read by one worker and becomes one file of the output.

    photos  photos/*.jpg  list.txt  -     image files: so many of them a piece
    shard-000.tar                         a tar file of images, as WebDataset has them: a piece
    set (from visformer pack)             so many of its images a piece
    table.parquet                         so many rows, in whole row groups, a piece; a column has files or paths
    s3://bucket/photos  gs://...          any of these behind an address that fsspec can read

A folder is searched at every depth. Only names and footers are read here.
"""

from __future__ import annotations

import glob
import itertools
import os
import posixpath
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from visformer.cluster.places import file_system, with_patience
from visformer.data.decode import IMAGE_SUFFIXES
from visformer.data.packed import PackedSet
from visformer.data.packed_index import MARKER
from visformer.data.streams import is_address, open_store
from visformer.errors import RunError, UsageError

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
PARQUET_SUFFIXES = (".parquet",)
LIST_SUFFIXES = (".txt",)


@dataclass(frozen=True)
class Piece:
    """Images that belong together. `kind` says what `paths` are:

    images   the images, which `start` and `stop` count not
    tar      one tar file
    parquet  one file, of which the row groups from `start` to `stop`; `row` is the first one's first row
    packed   one packed set, of which the images of `split` from `start` to `stop`
    """

    kind: str
    paths: list[str]
    start: int = 0
    stop: int = 0
    split: str = ""
    row: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def cut(inputs: Iterable[str], local_images: Any, images: int, column: str) -> Iterator[Piece]:
    """The pieces of the inputs, in order, of about `images` images each.

    `local_images` gives the image files that a local entry (file, folder, glob, -) stands for. Raises `UsageError` for
    what is not there, and for Parquet without the `column`.
    """
    paths: list[str] = []
    for entry in inputs:
        for kind, path in _of_entry(entry, local_images):
            if kind == "images":
                paths.append(path)
                if len(paths) == images:
                    yield Piece("images", paths)
                    paths = []
                continue
            if paths:
                yield Piece("images", paths)
                paths = []
            if kind == "tar":
                yield Piece("tar", [path])
            else:
                yield from _packed(path, images) if kind == "packed" else _parquet(path, images, column)
    if paths:
        yield Piece("images", paths)


def _of_entry(entry: str, local_images: Any) -> Iterator[tuple[str, str]]:
    if is_address(entry):
        yield from _of_address(entry)
    elif (Path(entry) / MARKER).is_file():
        yield "packed", os.path.abspath(entry)
    elif entry.lower().endswith(LIST_SUFFIXES) and not os.path.isdir(entry):
        for listing in _matching(entry):
            for line in _lines(listing):
                yield from _of_line(line)
    elif kind := _kind(entry):
        for path in _matching(entry):
            yield kind, os.path.abspath(path)
    else:
        for path in local_images(entry):
            yield from _of_line(path)
        if os.path.isdir(entry):
            for path in sorted(_shards_below(entry)):
                yield _kind(path), os.path.abspath(path)


def _lines(path: str) -> Iterator[str]:
    with open(path, "rb") as file:
        yield from filter(None, (os.fsdecode(line.rstrip(b"\r\n")) for line in file))


def _of_line(path: str) -> Iterator[tuple[str, str]]:
    """A path from a list, or an image: workers have other current folders, so it becomes absolute."""
    path = path if is_address(path) else os.path.abspath(path)
    yield _kind(path) or "images", path


def _kind(path: str) -> str:
    lower = path.lower()
    return "tar" if lower.endswith(TAR_SUFFIXES) else "parquet" if lower.endswith(PARQUET_SUFFIXES) else ""


def _matching(entry: str) -> list[str]:
    if glob.has_magic(entry) and not os.path.lexists(entry):
        return sorted(glob.glob(entry, recursive=True))
    if not os.path.isfile(entry):
        raise UsageError(f"{entry}: no such file")
    return [entry]


def _shards_below(folder: str) -> Iterator[str]:
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.join(root, name) for name in names if _kind(name) and not name.startswith("."))


def _of_address(entry: str) -> Iterator[tuple[str, str]]:
    system, root = file_system(entry)

    def found() -> tuple[str, list[str]]:
        if glob.has_magic(root):
            return "several", sorted(system.glob(root))
        if _kind(root) or posixpath.splitext(root)[1].lower() in IMAGE_SUFFIXES:
            return "one", [root]
        if system.exists(f"{root.rstrip('/')}/{MARKER}"):
            return "packed", [root]
        if system.isfile(root):
            return "one", [root]
        return "several", sorted(system.find(root))

    what, paths = with_patience(entry, found)
    if what == "packed":
        yield "packed", entry
        return
    before = 0
    for path in paths:
        kind = _kind(path)
        hidden = posixpath.basename(path).startswith(".")
        if kind or what == "one" or (posixpath.splitext(path)[1].lower() in IMAGE_SUFFIXES and not hidden):
            before += 1
            yield kind or "images", entry if what == "one" else system.unstrip_protocol(path)
    if not before:
        raise UsageError(f"{entry}: no image, tar or Parquet file there")


def _packed(path: str, images: int) -> Iterator[Piece]:
    store = open_store(path)
    assert store is not None
    packed = PackedSet(store)
    for split, about in packed.manifest.splits.items():
        for start in range(0, about.images, images):
            yield Piece("packed", [path], start, min(start + images, about.images), split)


def _parquet(path: str, images: int, column: str) -> Iterator[Piece]:
    with open_parquet(path) as file:
        names = file.schema_arrow.names
        if column not in names:
            raise UsageError(f"image_column: {path} has no column {column}; it has {', '.join(names[:20]) or 'none'}")
        rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    starts = [0, *itertools.accumulate(rows)]
    start = 0
    for stop in range(1, len(rows) + 1):
        if stop == len(rows) or starts[stop + 1] - starts[start] > images:
            yield Piece("parquet", [path], start, stop, row=starts[start])
            start = stop


def open_parquet(path: str) -> Any:
    """A `pyarrow.parquet.ParquetFile` at a path or an address. Raises `UsageError` when it is none."""
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise UsageError("Parquet needs pyarrow, which is not there: pip install 'visformer[cluster]'") from None
    try:
        if is_address(path):
            system, inner = file_system(path)
            return with_patience(path, lambda: parquet.ParquetFile(system.open(inner, "rb")))
        return parquet.ParquetFile(path)
    except (OSError, arrow.ArrowInvalid, RunError) as error:
        raise UsageError(
            f"{path}: not a Parquet file that can be read ({' '.join(str(error).split())[:200]})"
        ) from None
