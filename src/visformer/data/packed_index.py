"""What a packed set is on a disk: a marker, and for each split an index and shards.

    packed.json                  format, version, classes, and of each split the shards with their sizes and CRC-32
    train.index.safetensors      of each image, in the source's order: shard, offset, size, height, width, target, key
    train-000000.bin, ...        pixels, uint8 (H, W, C), one image after another (format uint8)
    train-000000.tar, ...        the files themselves beside their class, as WebDataset has it (format webdataset)

Nothing in it can run code, and every number is checked when the set is opened: a damaged or hostile set is an error
that names the file, and never a read beyond a shard.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from visformer.data.decode import MAX_PIXELS, MODES
from visformer.errors import UsageError

MARKER = "packed.json"
VERSION = 1
FORMATS = ("webdataset", "uint8")
MAX_MARKER_BYTES = 64 * 2**20
_TITLE = "visformer packed images"
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_COLUMNS = ("shard", "offset", "size", "height", "width", "target", "key_end")


@dataclass(frozen=True)
class Piece:
    """A file of a packed set: its name, bytes, and CRC-32."""

    name: str
    size: int
    crc32: int


@dataclass(frozen=True)
class Split:
    """One split: the number of its images, its index and its shards. `folder` is what the source's folder was called,
    or empty; `shuffled` says that images lie in the shards in an order of their own."""

    images: int
    folder: str
    shuffled: bool
    index: Piece
    shards: list[Piece]


@dataclass(frozen=True)
class Manifest:
    """What `packed.json` says. `image_size` is the short side that larger images were reduced to, in pixels; None where
    the files are kept as they are. `channels` are those of the pixels."""

    format: str
    image_size: int | None
    channels: int
    class_names: list[str]
    splits: dict[str, Split]
    source: dict[str, Any]


@dataclass(frozen=True)
class Index:
    """Where each image lies, in the source's order: int64 arrays of one number an image. `height` and `width` are those
    of the pixels, 0 for files; `key_end` is where its key ends among `keys`, the bytes of all of them."""

    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    height: np.ndarray
    width: np.ndarray
    target: np.ndarray
    key_end: np.ndarray
    keys: np.ndarray

    def __len__(self) -> int:
        return len(self.shard)

    def key(self, index: int) -> str:
        """What the source called the image."""
        start = self.key_end[index - 1] if index else 0
        return os.fsdecode(self.keys[start : self.key_end[index]].tobytes())


def piece_of(name: str, data: bytes) -> Piece:
    """The entry of a file that holds `data`."""
    return Piece(name, len(data), zlib.crc32(data))


# ---- packed.json


def marker_text(manifest: Manifest) -> str:
    """The text of `packed.json`."""
    return json.dumps({"title": _TITLE, "version": VERSION, **asdict(manifest)}, indent=1) + "\n"


def read_marker(text: bytes, where: str) -> Manifest:
    """The manifest in the bytes of `packed.json`. Raises `UsageError` that names the file, `where`."""
    try:
        found = json.loads(text)
        if not isinstance(found, dict) or found.get("title") != _TITLE:
            raise ValueError(f'it has no "title": "{_TITLE}"')
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: not the marker of a packed set ({error}); pack the set again") from None
    if found.get("version") != VERSION:
        raise UsageError(
            f"{where}: packed in version {found.get('version')!r} of the format, and this visformer reads version "
            f"{VERSION}; update visformer or pack the set again"
        )
    try:
        return _manifest(found)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{where}: damaged ({_reason(error)}); copy it again or pack the set again") from None


def _manifest(found: dict[str, Any]) -> Manifest:
    names = found["class_names"]
    _check(isinstance(names, list) and all(isinstance(name, str) for name in names) and names, "class_names")
    _check(found["format"] in FORMATS, f"format {found['format']!r}")
    _check(found["channels"] in MODES, f"channels {found['channels']!r}")
    side = found["image_size"]
    _check(side is None or _is_count(side), f"image_size {side!r}")
    splits = {str(name): _split(name, split) for name, split in found["splits"].items()}
    _check("train" in splits and set(splits) <= {"train", "val"}, f"splits {sorted(splits)}")
    source = found.get("source")
    return Manifest(found["format"], side, found["channels"], names, splits, source if isinstance(source, dict) else {})


def _split(name: str, found: dict[str, Any]) -> Split:
    shards = [_piece(shard) for shard in found["shards"]]
    index = _piece(found["index"])
    _check(_is_count(found["images"]), f"images of {name}: {found['images']!r}")
    _check(len({shard.name for shard in shards} | {index.name}) == len(shards) + 1, f"{name} has a shard twice")
    _check(isinstance(found["folder"], str) and "/" not in found["folder"], f"folder of {name}")
    return Split(found["images"], found["folder"], bool(found["shuffled"]), index, shards)


def _piece(found: dict[str, Any]) -> Piece:
    name = found["name"]
    _check(isinstance(name, str) and _FILE_NAME.fullmatch(name), f"file name {name!r}")
    for number in ("size", "crc32"):
        _check(_is_count(found[number]), f"{number} of {name}: {found[number]!r}")
    return Piece(name, found["size"], found["crc32"])


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _check(good: Any, what: str) -> None:
    if not good:
        raise ValueError(what)


def _reason(error: Exception) -> str:
    return f"it lacks {error}" if isinstance(error, KeyError) else f"wrong: {error}"


# ---- an index


def index_bytes(index: Index) -> bytes:
    """The file of an index."""
    columns = {name: np.ascontiguousarray(getattr(index, name)) for name in _COLUMNS}
    return save(columns | {"keys": index.keys})


def make_index(rows: Sequence[tuple[int, int, int, int, int, int]] | np.ndarray, keys: Sequence[str]) -> Index:
    """An index of `rows` (shard, offset, size, height, width, target) and as many keys."""
    table = np.asarray(rows, dtype=np.int64).reshape(-1, 6)
    encoded = [os.fsencode(key) for key in keys]
    ends = np.cumsum([len(key) for key in encoded], dtype=np.int64)
    columns = dict(zip(_COLUMNS, (*table.T, ends), strict=True))
    return Index(**columns, keys=np.frombuffer(b"".join(encoded), np.uint8))


def read_index(data: bytes, split: Split, manifest: Manifest, where: str) -> Index:
    """The index in the bytes of its file. Raises `UsageError` that names the file, `where`, for one that is damaged or
    does not fit the shards."""
    try:
        _check(len(data) == split.index.size and zlib.crc32(data) == split.index.crc32, "its size or CRC-32")
        found = load(data)
        columns = {name: found[name] for name in _COLUMNS}
        _check(found["keys"].dtype == np.uint8 and found["keys"].ndim == 1, "keys")
        for name, column in columns.items():
            _check(column.dtype == np.int64 and column.shape == (split.images,), name)
        index = Index(**columns, keys=found["keys"])
        _check_places(index, split, manifest)
        return index
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise UsageError(f"{where}: damaged ({_reason(error)}); copy it again or pack the set again") from None


def _check_places(index: Index, split: Split, manifest: Manifest) -> None:
    """Each image lies within its shard, and each number means something. Raises `ValueError` with its name."""
    sizes = np.array([shard.size for shard in split.shards], dtype=np.int64)
    _check(((index.shard >= 0) & (index.shard < len(sizes))).all(), "shard")
    room = sizes[index.shard]
    _check(((index.size > 0) & (index.size <= room)).all(), "size")
    _check(((index.offset >= 0) & (index.offset <= room - index.size)).all(), "offset")
    _check(((index.target >= 0) & (index.target < len(manifest.class_names))).all(), "target")
    ends = np.concatenate(([0], index.key_end))
    _check((np.diff(ends) >= 0).all() and ends[-1] == len(index.keys), "key_end")
    if manifest.format == "uint8":
        for name in ("height", "width"):
            side = getattr(index, name)
            _check(((side > 0) & (side <= MAX_PIXELS)).all(), name)
        _check((index.height * index.width * manifest.channels == index.size).all(), "height or width")
