"""What the readers of other projects' files share: the result, the limits, the memory map and the checks on a tensor.

A file from elsewhere is not trusted. A reader takes names, shapes and positions from it, holds each against the limits
here and against the size of the file, and only then makes tensors, which are views of a private memory map: nothing is
copied, and pages that nobody looks at are never read.

Functions below the readers raise `UsageError` without the file's name; `naming` puts it in front.
"""

from __future__ import annotations

import math
import mmap
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from visformer.errors import UsageError

MAX_TENSORS = 4096
"""More tensors than this are in no file of an image classifier, training state included."""

MAX_NAME_LENGTH = 512
MAX_DIMENSIONS = 8
MAX_ELEMENTS = 1 << 48
"""A bound on shapes with a zero in them, whose other sizes no content backs."""


@dataclass(frozen=True)
class Foreign:
    """What a file from elsewhere holds, under the names that it uses.

    `tensors` are views of a memory map of the file, safe to write to (the file does not change), and may begin at any
    byte (see `aligned`). `facts` are plain values found beside them: for torch `{"args": {...}, "epoch": 299, ...}`,
    for safetensors `{"metadata": {...}}`, for MindSpore `{"texts": {...}}` when the file holds texts. `ignored` says
    what was left where it is, and why: (name, reason).
    """

    tensors: dict[str, Tensor]
    container: Literal["mindspore", "torch", "safetensors"]
    facts: dict[str, Any] = field(default_factory=dict)
    ignored: list[tuple[str, str]] = field(default_factory=list)


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Put the file's name in front of a `UsageError` that comes from within."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def map_file(path: str | Path) -> mmap.mmap:
    """The file's bytes, mapped privately: reading is lazy, and writing stays in this process.

    Raises `UsageError` (without the name) for anything but a regular file with something in it.
    """
    check_regular(path)
    try:
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except ValueError as error:  # it shrank to nothing since it was looked at
        raise UsageError("the file is empty; fetch or save it again") from error
    except OSError as error:
        raise UsageError(f"it cannot be read ({error.strerror or error})") from error


def check_regular(path: str | Path) -> int:
    """The size, in bytes, of the regular file at `path`, with links followed. Raises `UsageError` for anything else."""
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError):
            raise UsageError("there is no such file") from error
        raise UsageError(f"it cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if stat.S_ISDIR(found.st_mode):
        raise UsageError("this is a folder; name the checkpoint file in it")
    if not stat.S_ISREG(found.st_mode):
        raise UsageError("this is a device, a pipe or a socket, where a regular file is needed; copy it to a file")
    if not found.st_size:
        raise UsageError("the file is empty; fetch or save it again")
    return found.st_size


def shown(text: str) -> str:
    """A name out of a file, fit for one line of an error."""
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_name(name: str) -> str:
    """`name` itself, when it can be a tensor's."""
    if not name or len(name) > MAX_NAME_LENGTH or not name.isprintable():
        raise UsageError(f"{shown(name)!r} cannot be a tensor's name (1 to {MAX_NAME_LENGTH} printable characters)")
    return name


def check_count(count: int) -> None:
    """Raise `UsageError` for more tensors than a classifier can have."""
    if count > MAX_TENSORS:
        raise UsageError(f"it holds more than {MAX_TENSORS} tensors, so it is no image classifier's checkpoint")


def check_shape(name: str, shape: Sequence[int]) -> None:
    """Raise `UsageError` for a shape that no tensor of ours has; for what content must be there see the caller."""
    if len(shape) > MAX_DIMENSIONS:
        raise UsageError(f"{shown(name)} has more than {MAX_DIMENSIONS} dimensions")
    if any(size < 0 for size in shape) or math.prod(max(size, 1) for size in shape) > MAX_ELEMENTS:
        raise UsageError(f"{shown(name)} has an impossible shape; the file is damaged")


def tensor_view(
    name: str, buffer: mmap.mmap | bytearray, dtype: torch.dtype, start: int, shape: Sequence[int]
) -> Tensor:
    """The tensor whose little-endian content begins at byte `start` of `buffer`: a view, which keeps the buffer alive.

    The caller has checked that the content lies within. Raises `UsageError` when a boolean is neither 0 nor 1.
    """
    count = math.prod(shape)
    if not count:
        return torch.empty(tuple(shape), dtype=dtype)
    if dtype is torch.bool and torch.frombuffer(buffer, dtype=torch.uint8, offset=start, count=count).max() > 1:
        raise UsageError(f"{shown(name)} is of booleans and holds something else; the file is damaged")
    return torch.frombuffer(buffer, dtype=dtype, offset=start, count=count).reshape(tuple(shape))


def aligned(tensor: Tensor) -> Tensor:
    """`tensor`, copied if its memory begins where a value of its type should not.

    Content in a file begins at any byte. Storing and copying such views is fine; arithmetic on them is slower, and not
    promised on every processor, so a model that is to compute is given aligned tensors.
    """
    if tensor.data_ptr() % max(tensor.element_size(), 1) == 0:
        return tensor
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return flat.clone().view(tensor.dtype).reshape(tensor.shape)


def content_bytes(tensor: Tensor) -> memoryview:
    """The tensor's values as little-endian bytes in row-major order, without a copy where it is contiguous."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
