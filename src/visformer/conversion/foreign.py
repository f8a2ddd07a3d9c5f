"""Any other project's checkpoint, told apart by its content, never by its suffix.

    zip archive, or pickles in a row     torch.save                 `pickles`
    length, then `{`                     safetensors                here
    protobuf                             MindSpore                  `mindspore`

What is none of these is answered with what it looks like and the way out. Names, shapes and types are the file's own;
which model they make is for others to say.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from visformer.conversion.archives import LEGACY_MAGIC, ZIP_MAGIC
from visformer.conversion.containers import (
    MAX_TENSORS,
    Foreign,
    check_count,
    check_name,
    check_regular,
    check_shape,
    naming,
)
from visformer.conversion.mindspore import ENCRYPTED, read_mindspore
from visformer.conversion.pickles import read_pth
from visformer.errors import UsageError

__all__ = ["MAX_TENSORS", "Foreign", "read_foreign"]

MAX_HEADER_BYTES = 16 << 20
HEAD_BYTES = 1024

LOOKS: list[tuple[tuple[bytes, ...], str]] = [
    (
        (b"version https://git-lfs",),
        "a git-lfs pointer, not the file itself; run `git lfs pull` or fetch it by its URL",
    ),
    (
        (b"<!doctype", b"<html", b"<?xml", b"<head"),
        "a web page, not the file that it offers; fetch it by its direct URL",
    ),
    ((b"\x1f\x8b",), "a gzip archive; unpack it (`tar xf` or `gunzip`) and name the checkpoint in it"),
    ((b"bzh",), "a bzip2 archive; unpack it and name the checkpoint in it"),
    ((b"\xfd7zxz",), "an xz archive; unpack it and name the checkpoint in it"),
    ((b"7z\xbc\xaf\x27\x1c",), "a 7z archive; unpack it and name the checkpoint in it"),
    ((b"\x28\xb5\x2f\xfd",), "a zstd archive; unpack it and name the checkpoint in it"),
    ((b"rar!",), "a RAR archive; unpack it and name the checkpoint in it"),
    ((b"pk\x05\x06", b"pk\x07\x08"), "an empty or split zip archive; fetch or save the checkpoint again"),
    ((b"\x89hdf",), "an HDF5 file (Keras), which is not read; publish it as .safetensors"),
    ((b"gguf",), "a GGUF file, which is not read; take the .safetensors that it was made from"),
    ((b"\x93numpy",), "a NumPy array, not a checkpoint; give the file that torch, MindSpore or timm wrote"),
    ((b"\x89png", b"\xff\xd8\xff", b"gif8", b"riff"), "an image, not a checkpoint"),
    ((b"\x7felf", b"mz\x90"), "a program, not a checkpoint"),
    ((b"{", b"["), "JSON text, not a checkpoint; name the file with the weights, not the one with their configuration"),
    ((b"\x08",), "perhaps an ONNX model, which is a program; give the checkpoint that it was exported from"),
    ((b"\x80",), "a pickle, but not one that torch.save wrote; save model.state_dict() with torch.save"),
]
"""How other files begin, in lower case, and what to do about it."""


def read_foreign(path: str | Path, *, ema: bool = True) -> Foreign:
    """The tensors of a checkpoint of another project, under its own names, as views of a memory map.

    `ema=False` takes the raw weights where a torch file also holds averaged ones. Raises `UsageError` naming the file
    when it is missing, of another kind, damaged, or not what a checkpoint should be; no code in a file is ever run.
    """
    with naming(path):
        size = check_regular(path)
        head = _head(path)
    if head.startswith((ZIP_MAGIC, LEGACY_MAGIC)):
        return read_pth(path, ema=ema)
    likely_protobuf = head.startswith((b"\x0a", *ENCRYPTED))
    if head[8:9] == b"{" and not (likely_protobuf and int.from_bytes(head[:8], "little") > size):
        return read_safetensors(path)
    if likely_protobuf:
        return read_mindspore(path)
    with naming(path):
        raise UsageError(_looks_like(head, size))


def read_safetensors(path: str | Path) -> Foreign:
    """The tensors of a .safetensors file, as views of the library's memory map, and its metadata as a fact.

    The header is bounded before the library sees it. Raises `UsageError` naming the file.
    """
    with naming(path):
        size = check_regular(path)
        header = int.from_bytes(_head(path)[:8], "little")
        if header > min(MAX_HEADER_BYTES, size - 8):
            raise UsageError(
                f"its header claims {header} bytes, in a file of {size} and with a limit of {MAX_HEADER_BYTES}; "
                "a .safetensors file that was cut off looks like this, so fetch it again"
            )
        try:
            return _open_safetensors(path)
        except (SafetensorError, OSError, ValueError, RuntimeError, TypeError) as error:
            if isinstance(error, UsageError):
                raise
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UsageError(f"not a whole .safetensors file ({reason}); fetch it again") from error


def _open_safetensors(path: str | Path) -> Foreign:
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        check_count(len(names))
        if not names:
            raise UsageError("it holds no tensors; fetch or save it again")
        for name in names:
            check_shape(check_name(name), file.get_slice(name).get_shape())
        metadata: dict[str, Any] = dict(file.metadata() or {})
        return Foreign({name: file.get_tensor(name) for name in names}, "safetensors", {"metadata": metadata})


def _head(path: str | Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(HEAD_BYTES)
    except OSError as error:
        raise UsageError(f"it cannot be read ({error.strerror or error})") from error


def _looks_like(head: bytes, size: int) -> str:
    """What a file that no reader takes may be, and the way out."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head[257:262] == b"ustar":
        return "a tar archive; unpack it and name the checkpoint in it"
    for beginnings, answer in LOOKS:
        if start.startswith(beginnings) or head.startswith(beginnings):
            return answer
    if not any(head):
        return f"{size} bytes that begin with nothing but zeros: a download that never came; fetch it again"
    kind = "text" if all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in head) else "a file of an unknown kind"
    return f"{kind}, where a checkpoint of torch (.pth), MindSpore (.ckpt) or safetensors is needed; fetch it again"
