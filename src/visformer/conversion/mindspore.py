"""MindSpore's `.ckpt`, read and written without MindSpore.

The file is one protobuf message, `Checkpoint`, with one `Value` for each parameter:

    Checkpoint  1: Value, repeated
    Value       1: tag (the name)   2: TensorProto   3: MapTensorProto (a hash table, which is left alone)
    TensorProto 1: dims, repeated int64, packed or not   2: tensor_type ("Float32")   3: tensor_content, little-endian

A parameter of more than 512 MiB comes as consecutive Values with the same tag and the whole parameter's dims. A scalar
has no dims, in some versions a single 0. Texts have type "str" and UTF-32 content. A file saved with `crc_check` ends
in "crc_num" and ten bytes, the big-endian CRC-32 of what stands before. Source: MindSpore 2.10,
`mindspore/train/serialization.py` and `checkpoint.proto`.

Every length is held against the message that it is in, and the work against the number of fields, so that a damaged
or hostile file is refused soon, with next to no memory used.
"""

from __future__ import annotations

import math
import mmap
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from visformer.atomic import atomic_write
from visformer.conversion.containers import (
    MAX_DIMENSIONS,
    MAX_TENSORS,
    Foreign,
    check_count,
    check_name,
    check_shape,
    content_bytes,
    map_file,
    naming,
    shown,
    tensor_view,
)
from visformer.errors import UsageError

DTYPES = {
    "Float16": torch.float16,
    "Float32": torch.float32,
    "Float64": torch.float64,
    "BFloat16": torch.bfloat16,
    "Int8": torch.int8,
    "Int16": torch.int16,
    "Int32": torch.int32,
    "Int64": torch.int64,
    "UInt8": torch.uint8,
    "UInt16": torch.uint16,
    "UInt32": torch.uint32,
    "UInt64": torch.uint64,
    "Bool": torch.bool,
}
TYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

PIECE_BYTES = 512 << 20
MAX_FIELDS = 48 * MAX_TENSORS
MAX_TEXT_BYTES = 1 << 16

ENCRYPTED = tuple(bytes([kind, 0x5E, 0x3A, 0x7F]) for kind in (0xD8, 0xD9, 0xDA))
"""How MindSpore's encrypted files begin: AES-GCM, AES-CBC and SM4-CBC."""

CRC_MARK = b"crc_num"
CRC_BYTES = 10

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


def read_ckpt(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a MindSpore checkpoint by parameter name, in the file's order, as views of a memory map.

    Raises `UsageError` naming the file and what is wrong with it.
    """
    return read_mindspore(path).tensors


def read_mindspore(path: str | Path) -> Foreign:
    """The same with the texts, as `facts["texts"]`, and with what was ignored."""
    with naming(path):
        data = map_file(path)
        if data[:4] in ENCRYPTED:
            raise UsageError(
                "it is encrypted; load it in MindSpore with its key (`load_checkpoint(path, dec_key=...)`) "
                "and save it without one"
            )
        pieces, ignored = _parse(data, _message_end(data))
        tensors, texts = {}, {}
        for name, parts in pieces.items():
            if parts[0].type_name == "str":
                texts[name] = _text(name, data, parts)
            else:
                tensors[name] = _tensor(name, data, parts)
        if not tensors:
            raise UsageError("it holds no tensor, so it is not a MindSpore checkpoint of a model; fetch it again")
    return Foreign(tensors, "mindspore", {"texts": texts} if texts else {}, ignored)


def write_ckpt(path: str | Path, tensors: dict[str, Tensor], *, piece_bytes: int = PIECE_BYTES) -> None:
    """Write `tensors` as MindSpore does, whole or not at all, holding one parameter in memory at a time at most.

    A parameter of more than `piece_bytes` bytes is split. Raises `UsageError` for a type, a name or an empty tensor
    that the format cannot hold, `RunError` when the disk refuses.
    """
    with naming(path):
        check_count(len(tensors))
        for name, tensor in tensors.items():
            _check_writable(check_name(name), tensor)

    def write(file) -> None:
        for name, tensor in tensors.items():
            content = content_bytes(tensor)
            for start in range(0, len(content), piece_bytes):
                piece = content[start : start + piece_bytes]
                file.write(_value_head(name, tensor, len(piece)))
                file.write(piece)

    atomic_write(path, write)


@dataclass
class _Piece:
    """One `TensorProto`: what it says of itself, and where its content lies in the file."""

    dims: list[int] = field(default_factory=list)
    type_name: str | None = None
    start: int | None = None
    stop: int = 0


class _Field(NamedTuple):
    """One protobuf field: `value` when it is a number, else the bytes from `start` to `stop`."""

    number: int
    wire: int
    value: int
    start: int
    stop: int


class _Budget:
    """How many fields may still be read."""

    def __init__(self, fields: int):
        self.left = fields

    def spend(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise UsageError(
                f"it has more than {MAX_FIELDS} fields, so it is not a MindSpore checkpoint of a classifier"
            )


def _damaged(what: str, at: int) -> UsageError:
    return UsageError(f"not a whole MindSpore checkpoint ({what} at byte {at}); fetch it again or save it again")


def _message_end(data: mmap.mmap) -> int:
    """Where the message ends: before the CRC, which is checked, if there is one."""
    end = len(data) - len(CRC_MARK) - CRC_BYTES
    if end < 0 or data[end : end + len(CRC_MARK)] != CRC_MARK:
        return len(data)
    try:
        for _ in _fields(data, 0, end, _Budget(MAX_FIELDS)):
            pass
    except UsageError:  # no message ends there: the mark lies in a parameter's content
        return len(data)
    crc, step = 0, 1 << 24
    with memoryview(data) as view:
        for start in range(0, end, step):
            crc = zlib.crc32(view[start : min(start + step, end)], crc)
    if crc != int.from_bytes(data[-CRC_BYTES:], "big"):
        raise UsageError("the file is damaged: its content does not give the CRC that it ends in; fetch it again")
    return end


def _parse(data: mmap.mmap, end: int) -> tuple[dict[str, list[_Piece]], list[tuple[str, str]]]:
    """Each parameter's pieces in the file's order, and what is not a tensor."""
    budget = _Budget(MAX_FIELDS)
    pieces: dict[str, list[_Piece]] = {}
    ignored: dict[str, str] = {}
    last = None
    for count, value in enumerate(f for f in _fields(data, 0, end, budget) if f.number == 1):
        check_count(count + 1)
        name, piece = _parse_value(data, value, budget)
        if piece is None:
            ignored[name] = "a map parameter"
        elif name == last:
            pieces[name].append(piece)
        elif name in pieces:
            raise UsageError(f"it holds {shown(name)} twice; save it again")
        else:
            pieces[name] = [piece]
        last = None if piece is None else name
    return pieces, list(ignored.items())


def _parse_value(data: mmap.mmap, value: _Field, budget: _Budget) -> tuple[str, _Piece | None]:
    """A parameter's name, and its tensor if it is one."""
    name = piece = None
    holds_map = False
    for part in _message(data, value, budget):
        if part.number == 1 and name is None:
            name = check_name(_string(data, part))
        elif part.number == 2 and piece is None:
            piece = _parse_tensor(data, part, budget)
        elif part.number == 3:
            holds_map = True
        elif part.number in (1, 2):
            raise _damaged("a field that is there twice", part.start)
    if name is None or (piece is None) is not holds_map:
        raise _damaged("a parameter without a name or a tensor", value.start)
    return name, piece


def _parse_tensor(data: mmap.mmap, tensor: _Field, budget: _Budget) -> _Piece:
    piece = _Piece()
    for part in _message(data, tensor, budget):
        if part.number == 1:
            piece.dims.extend(_dims(data, part))
            if len(piece.dims) > MAX_DIMENSIONS:
                raise _damaged(f"a tensor of more than {MAX_DIMENSIONS} dimensions", part.start)
        elif part.number == 2 and piece.type_name is None:
            piece.type_name = _string(data, part)
        elif part.number == 3 and piece.start is None and part.wire == BYTES:
            piece.start, piece.stop = part.start, part.stop
        elif part.number in (2, 3):
            raise _damaged("a wrong or repeated field in a tensor", part.start)
    if piece.type_name is None or piece.start is None:
        raise _damaged("a tensor without a type or content", tensor.start)
    return piece


def _dims(data: mmap.mmap, part: _Field) -> Iterator[int]:
    """One size, or several packed ones, `MAX_DIMENSIONS` + 1 at most."""
    if part.wire == VARINT:
        yield _signed(part.value)
    elif part.wire == BYTES:
        at = part.start
        for _ in range(MAX_DIMENSIONS + 1):
            if at == part.stop:
                return
            value, at = _varint(data, at, part.stop)
            yield _signed(value)
    else:
        raise _damaged("a size of the wrong kind", part.start)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _string(data: mmap.mmap, part: _Field) -> str:
    if part.wire != BYTES or part.stop - part.start > 4096:
        raise _damaged("a name of the wrong kind or length", part.start)
    try:
        return data[part.start : part.stop].decode()
    except UnicodeDecodeError as error:
        raise _damaged("a name that is not UTF-8", part.start) from error


def _message(data: mmap.mmap, part: _Field, budget: _Budget) -> Iterator[_Field]:
    """The fields of a message within a message."""
    if part.wire != BYTES:
        raise _damaged("a number where a message belongs", part.start)
    return _fields(data, part.start, part.stop, budget)


def _fields(data: mmap.mmap, at: int, end: int, budget: _Budget) -> Iterator[_Field]:
    """The fields of the message that lies from `at` to `end`, unknown ones among them."""
    while at < end:
        budget.spend()
        key, start = _varint(data, at, end)
        number, wire, value = key >> 3, key & 7, 0
        if wire == VARINT:
            value, stop = _varint(data, start, end)
        elif wire == BYTES:
            length, start = _varint(data, start, end)
            stop = start + length
        elif wire in (FIXED32, FIXED64):
            stop = start + (4 if wire == FIXED32 else 8)
        else:
            raise _damaged(f"wire type {wire}", at)
        if stop > end or not 1 <= number < 1 << 29:
            raise _damaged("a field that reaches past its end" if stop > end else "an impossible field", at)
        yield _Field(number, wire, value, start, stop)
        at = stop


def _varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    """The number at `at` and where the next field begins: seven bits a byte, the lowest first, ten bytes at most."""
    value = 0
    for index in range(min(10, end - at)):
        byte = data[at + index]
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            if value >= 1 << 64:
                break
            return value, at + index + 1
    raise _damaged("a number that does not end", at)


def _tensor(name: str, data: mmap.mmap, parts: list[_Piece]) -> Tensor:
    """A view of the map; a parameter in several pieces is joined, the only copy."""
    first = parts[0]
    if any(part.dims != first.dims or part.type_name != first.type_name for part in parts):
        raise UsageError(f"the pieces of {shown(name)} disagree in shape or type; save it again")
    dtype = DTYPES.get(first.type_name or "")
    if dtype is None:
        raise UsageError(
            f"{shown(name)} is of type {shown(first.type_name or '')!r}, where {', '.join(DTYPES)} are known; "
            "convert it in MindSpore and save it again"
        )
    length = sum(part.stop - (part.start or 0) for part in parts)
    shape = [] if first.dims == [0] and length == dtype.itemsize else first.dims
    check_shape(name, shape)
    if math.prod(shape) * dtype.itemsize != length:
        raise UsageError(f"{shown(name)} of shape {shape} and {dtype} has {length} bytes; the file is damaged")
    if len(parts) == 1:
        return tensor_view(name, data, dtype, first.start or 0, shape)
    joined = bytearray(length)
    at = 0
    with memoryview(data) as view:
        for part in parts:
            size = part.stop - (part.start or 0)
            joined[at : at + size] = view[part.start : part.stop]
            at += size
    return tensor_view(name, joined, dtype, 0, shape)


def _text(name: str, data: mmap.mmap, parts: list[_Piece]) -> str:
    if sum(part.stop - (part.start or 0) for part in parts) > MAX_TEXT_BYTES:
        raise UsageError(f"{shown(name)} is a text of more than {MAX_TEXT_BYTES} bytes; save the file without it")
    try:
        return b"".join(data[part.start : part.stop] for part in parts).decode("utf-32-le").rstrip("\0")
    except UnicodeDecodeError as error:
        raise UsageError(f"{shown(name)} is not a readable text; the file is damaged") from error


def _check_writable(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in TYPE_NAMES or tensor.layout is not torch.strided:
        raise UsageError(f"{name} is of {tensor.dtype}, {tensor.layout}, which a MindSpore checkpoint cannot hold")
    if not tensor.numel():
        raise UsageError(
            f"{name} has no values (shape {list(tensor.shape)}), which MindSpore drops on saving; leave it out"
        )
    check_shape(name, tensor.shape)


def _value_head(name: str, tensor: Tensor, length: int) -> bytes:
    """All of a Value that comes before its `length` bytes of content."""
    dims = b"".join(b"\x08" + _to_varint(size) for size in tensor.shape)
    inner = dims + _framed(2, TYPE_NAMES[tensor.dtype].encode()) + b"\x1a" + _to_varint(length)
    body = _framed(1, name.encode()) + b"\x12" + _to_varint(len(inner) + length) + inner
    return b"\x0a" + _to_varint(len(body) + length) + body


def _framed(number: int, content: bytes) -> bytes:
    return _to_varint(number << 3 | BYTES) + _to_varint(len(content)) + content


def _to_varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
