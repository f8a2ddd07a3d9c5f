"""The two containers of `torch.save`: a zip archive (since torch 1.6) and, before, pickles in a row.

zip      <name>/data.pkl holds the structure, <name>/data/<key> each storage's bytes, all stored, not compressed. Only
         the directory at the end of the file says what there is; here it must be the very end, and its entries lie
         within the file and apart from one another, so that no two readers can see different archives in one file.
before   five pickles (a magic number, 1001, facts of the machine, the structure, the storages' keys), then each
         storage: the number of values, 8 bytes, and the values.

Either way the structure is read by `unpickling`, and storages stay where they are: tensors are views of a memory map.
Source: torch 2.15, `torch/serialization.py`; PKWARE's APPNOTE 6.3.10 for zip.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from visformer.conversion.containers import map_file, shown, tensor_view
from visformer.conversion.unpickling import MAX_PICKLE_BYTES, Namespace, Storage, TensorSpec, Window, read_pickle
from visformer.errors import UsageError

ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""The first of the five pickles, whole: protocol 2, and the number below."""

LEGACY_NUMBER, LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001
MAX_ENTRIES = 65_536
SEE_EXTRA = 0xFFFFFFFF
"""In place of a number that stands in the zip64 field."""

AGAIN = "save it again with torch.save"


@dataclass(frozen=True)
class Archive:
    """A torch file: its structure, with a `TensorSpec` in place of each tensor, and where the storages lie."""

    document: Any
    data: mmap.mmap
    storages: dict[str, tuple[int, int]]
    """Where each storage's bytes start and how many there are, by key."""

    def tensor(self, name: str, spec: TensorSpec) -> Tensor:
        """The tensor itself, a view of the file's memory map. Raises `UsageError` when its values are not all there."""
        start = self._start(name, spec.storage)
        if not all(spec.shape):
            return tensor_view(name, self.data, spec.dtype, start, spec.shape)
        extent = 1 + sum((size - 1) * step for size, step in zip(spec.shape, spec.stride, strict=True))
        first = start + spec.offset * spec.dtype.itemsize
        return tensor_view(name, self.data, spec.dtype, first, [extent]).as_strided(spec.shape, spec.stride)

    def _start(self, name: str, storage: Storage) -> int:
        if storage.key not in self.storages:
            raise UsageError(f"the values of {shown(name)} are not in the file; fetch it again")
        start, length = self.storages[storage.key]
        if length != storage.numel * storage.dtype.itemsize:
            raise UsageError(f"the values of {shown(name)} are {length} bytes, not what its type needs; fetch it again")
        return start


def open_archive(path: str | Path) -> Archive:
    """What `torch.save` wrote to `path`, told apart by its first bytes. Raises `UsageError` without the file's name."""
    data = map_file(path)
    if data[: len(ZIP_MAGIC)] == ZIP_MAGIC:
        return _open_zip(data)
    if data[: len(LEGACY_MAGIC)] == LEGACY_MAGIC:
        return _open_legacy(data)
    raise UsageError("not a file that torch.save wrote (it begins like neither its zip archive nor its older pickles)")


class _Entry(NamedTuple):
    """One stored file of a zip archive: where its header and its content start, and where its content stops."""

    header: int
    start: int
    stop: int


def _open_zip(data: mmap.mmap) -> Archive:
    entries = _entries(data)
    roots = [name.removesuffix("/data.pkl") for name in entries if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise UsageError(f"a zip archive, but not one that torch.save wrote (it has no single data.pkl); {AGAIN}")
    (root,) = roots
    if f"{root}/constants.pkl" in entries:
        raise UsageError("a TorchScript program, which holds code, where tensors are needed; save model.state_dict()")
    order = entries.get(f"{root}/byteorder")
    if order and data[order.start : min(order.stop, order.start + 8)] != b"little":
        raise UsageError(f"its values are not little-endian; {AGAIN} on a machine of this kind")
    pickled = entries[f"{root}/data.pkl"]
    if pickled.stop - pickled.start > MAX_PICKLE_BYTES:
        raise UsageError(f"its data.pkl has more than {MAX_PICKLE_BYTES} bytes; save model.state_dict() alone")
    document = read_pickle(Window(data, pickled.start, pickled.stop))
    folder = f"{root}/data/"
    storages = {
        name.removeprefix(folder): (entry.start, entry.stop - entry.start)
        for name, entry in entries.items()
        if name.startswith(folder)
    }
    return Archive(document, data, storages)


def _broken(what: str) -> UsageError:
    return UsageError(f"a damaged zip archive ({what}); fetch it again or {AGAIN}")


def _entries(data: mmap.mmap) -> dict[str, _Entry]:
    """The archive's files by name, each checked to be stored as it is and to share no byte with another."""
    directory, end, count = _directory(data)
    at = directory
    entries: dict[str, _Entry] = {}
    for _ in range(count):
        if at + 46 > end or data[at : at + 4] != b"PK\x01\x02":
            raise _broken("its directory is cut off")
        flags, method = struct.unpack_from("<HH", data, at + 8)
        packed, size, name_length, extra_length, comment_length = struct.unpack_from("<IIHHH", data, at + 20)
        (header,) = struct.unpack_from("<I", data, at + 42)
        extra_at = at + 46 + name_length
        if extra_at + extra_length + comment_length > end:
            raise _broken("its directory is cut off")
        name = _entry_name(data[at + 46 : extra_at])
        extra = data[extra_at : extra_at + extra_length]
        size, packed, header = _long_numbers(extra, size, packed, header)
        if method or flags & 1 or size != packed:
            raise UsageError(f"{shown(name)} in it is compressed or encrypted, which torch.save never does; {AGAIN}")
        if name in entries:
            raise _broken(f"{shown(name)} is there twice")
        start = _content_start(data, header, name)
        entries[name] = _Entry(header, start, start + size)
        at = extra_at + extra_length + comment_length
    _check_apart(entries, directory)
    return entries


def _directory(data: mmap.mmap) -> tuple[int, int, int]:
    """Where the archive's directory starts and stops, and how many entries it has."""
    tail = len(data) - 22
    if tail < 0 or data[tail : tail + 4] != b"PK\x05\x06" or data[-2:] != b"\0\0":
        raise _broken("it does not end in a directory; a download that was cut off looks like this")
    disks, count, size, start = struct.unpack_from("<I2xHII", data, tail + 4)
    stop = tail
    if data[tail - 20 : tail - 16] == b"PK\x06\x07" and tail >= 76:
        (stop,) = struct.unpack_from("<Q", data, tail - 12)
        if stop + 56 > tail - 20 or data[stop : stop + 4] != b"PK\x06\x06":
            raise _broken("its directory is not where it says")
        count, size, start = struct.unpack_from("<QQQ", data, stop + 32)
    if disks or start + size != stop:
        raise _broken("its directory is not where it says")
    if count > MAX_ENTRIES or count * 46 > size:
        raise _broken(f"its directory claims {count} entries")
    return start, stop, count


def _entry_name(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise _broken("a name in it is not UTF-8") from error


def _long_numbers(extra: bytes, *numbers: int) -> list[int]:
    """The entry's numbers, those that did not fit into 32 bits taken from its zip64 field."""
    at, long = 0, b""
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            long = extra[at + 4 : at + 4 + length]
        at += 4 + length
    out = []
    for number in numbers:
        if number == SEE_EXTRA:
            if len(long) < 8:
                raise _broken("a size in it is missing")
            number, long = int.from_bytes(long[:8], "little"), long[8:]
        out.append(number)
    return out


def _content_start(data: mmap.mmap, header: int, name: str) -> int:
    """Where the content of the entry whose header is at `header` starts; the header must name the same file."""
    if header + 30 > len(data) or data[header : header + 4] != ZIP_MAGIC:
        raise _broken(f"{shown(name)} is not where it says")
    method, name_length, extra_length = struct.unpack_from("<2xH16xHH", data, header + 6)
    named = data[header + 30 : header + 30 + name_length]
    if method or named != name.encode():
        raise _broken(f"{shown(name)} is not where it says")
    return header + 30 + name_length + extra_length


def _check_apart(entries: dict[str, _Entry], directory: int) -> None:
    """Raise `UsageError` when entries overlap or reach into the directory."""
    free = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].header):
        if entry.header < free or entry.stop > directory:
            raise _broken(f"{shown(name)} overlaps what is beside it")
        free = entry.stop


def _open_legacy(data: mmap.mmap) -> Archive:
    head = Window(data, 0, MAX_PICKLE_BYTES)
    number, version, _machine, document, keys = (read_pickle(head) for _ in range(5))
    if (number, version) != (LEGACY_NUMBER, LEGACY_VERSION) or not isinstance(keys, list):
        raise UsageError(f"a torch file of an unknown version; {AGAIN} in any current torch")
    return Archive(document, data, _legacy_storages(data, head.tell(), document, keys))


def _legacy_storages(data: mmap.mmap, at: int, document: Any, keys: list[Any]) -> dict[str, tuple[int, int]]:
    """Where each storage lies: only the pickle knows how long a value is, so its storages are looked up by key."""
    sizes = _item_sizes(document)
    storages: dict[str, tuple[int, int]] = {}
    for key in keys:
        if type(key) is not str or key not in sizes or key in storages:
            raise UsageError("its list of storages does not fit its tensors; fetch it again")
        length = int.from_bytes(data[at : at + 8], "little") * sizes[key]
        if at + 8 + length > len(data):
            raise UsageError("the file is cut off; fetch it again")
        storages[key] = (at + 8, length)
        at += 8 + length
    return storages


def _item_sizes(document: Any) -> dict[str, int]:
    """Bytes of one value of each storage that a tensor of the document is in, by key."""
    sizes: dict[str, int] = {}
    seen, waiting = set(), [document]
    while waiting:
        value = waiting.pop()
        if isinstance(value, TensorSpec):
            size = value.storage.dtype.itemsize
            if sizes.setdefault(value.storage.key, size) != size:
                raise UsageError("two of its tensors see one storage as different types; save them apart")
        elif isinstance(value, Namespace):
            waiting.append(value.attributes)
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            waiting.extend(value.values() if isinstance(value, dict) else value)
    return sizes
