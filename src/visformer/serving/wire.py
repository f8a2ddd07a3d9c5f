"""The REST wire format of the Open Inference Protocol, with the binary tensor extension.

A body is JSON, or JSON followed by raw tensors, in the order of the inputs that have a `binary_data_size`; the header
`Inference-Header-Content-Length` then says how long the JSON is. Numbers are little-endian; each element of a BYTES
tensor has its length before it, four bytes, little-endian. In JSON, which has no bytes, image files are in base64.
What comes in is believed no further than the bytes that are there.
"""

from __future__ import annotations

import base64
import binascii
import json
import struct
import zlib
from typing import Any

import numpy as np

from visformer.serving.refusals import bad, too_large
from visformer.serving.request import (
    InferRequest,
    Output,
    Tensor,
    check_shape,
    the_input,
    timeout_of,
    wanted_outputs,
    whole,
)

_WINDOW = {"gzip": 31, "x-gzip": 31, "deflate": 15}  # zlib's wbits
_WORTH_COMPRESSING = 1024  # bytes


def unpacked(body: bytes, encoding: str, max_bytes: int) -> bytes:
    """A body without its Content-Encoding. Raises `Refusal`: 400 for what is broken, 413 when it unfolds too far."""
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return body
    if encoding not in _WINDOW:
        raise bad("Content-Encoding: must be gzip or deflate")
    unpacking = zlib.decompressobj(_WINDOW[encoding])
    try:
        plain = unpacking.decompress(body, max_bytes + 1)
    except zlib.error:
        raise bad(f"Content-Encoding: the body is not {encoding}") from None
    if len(plain) > max_bytes:
        raise too_large(f"the body unfolds to more than {max_bytes:,} bytes")
    if not unpacking.eof:
        raise bad(f"Content-Encoding: the {encoding} body is cut short")
    return plain


def packed(body: bytes, accepted: str) -> tuple[bytes, str]:
    """A body, and the Content-Encoding that it has got: gzip or deflate where the client takes it and it pays."""
    offers = [part.split(";") for part in accepted.lower().split(",")]
    names = [words[0].strip() for words in offers if not any(w.strip() in ("q=0", "q=0.0") for w in words[1:])]
    for name in ("gzip", "deflate"):
        if name in names and len(body) >= _WORTH_COMPRESSING:
            packing = zlib.compressobj(1, wbits=_WINDOW[name])
            return packing.compress(body) + packing.flush(), name
    return body, ""


def read_json(text: bytes) -> Any:
    """Strict JSON: UTF-8, and no NaN or Infinity. Raises `Refusal` 400."""

    def no_constant(name: str) -> Any:
        raise ValueError(name)

    try:
        return json.loads(text.decode("utf-8"), parse_constant=no_constant)
    except (ValueError, RecursionError):
        raise bad("the request is not JSON") from None


def read_infer(body: bytes, header_length: str | None) -> InferRequest:
    """The body of an infer request. Raises `Refusal` 400."""
    length = len(body)
    if header_length is not None:
        if not header_length.isascii() or not header_length.isdecimal() or int(header_length[:12]) > len(body):
            raise bad("Inference-Header-Content-Length: must be a number of bytes within the body")
        length = int(header_length)
    document = read_json(body[:length])
    if not isinstance(document, dict):
        raise bad("the request must be a JSON object")
    parameters = _parameters(document, "the request")
    raw = _Raw(body, length)
    inputs = [_tensor(entry, raw) for entry in _entries(document, "inputs")]
    raw.finish()
    images, tensor = the_input(inputs)
    asked = [(_text(entry, "name"), _parameters(entry, "an output")) for entry in _entries(document, "outputs")]
    request_id = document.get("id", "")
    if not isinstance(request_id, str) or len(request_id) > 1000:
        raise bad("id: must be a string, of 1,000 characters at most")
    return InferRequest(request_id, images, tensor, wanted_outputs(asked, parameters), timeout_of(parameters))


class _Raw:
    """The bytes behind the JSON, taken from the front."""

    def __init__(self, body: bytes, start: int) -> None:
        self._body, self._place = body, start

    def take(self, size: int, name: str) -> bytes:
        if size > len(self._body) - self._place:
            raise bad(f"{name}: binary_data_size is {size}, but {len(self._body) - self._place} bytes are left")
        self._place += size
        return self._body[self._place - size : self._place]

    def finish(self) -> None:
        if self._place != len(self._body):
            raise bad(f"{len(self._body) - self._place} bytes more than the inputs' binary_data_size say")


def _entries(document: dict[str, Any], name: str) -> list[dict[str, Any]]:
    entries = document.get(name) or []
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries) or len(entries) > 16:
        raise bad(f"{name}: must be a list of objects, 16 at most")
    return entries


def _parameters(document: dict[str, Any], where: str) -> dict[str, Any]:
    parameters = document.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise bad(f"parameters of {where}: must be an object")
    return parameters


def _text(entry: dict[str, Any], name: str) -> str:
    value = entry.get(name)
    if not isinstance(value, str):
        raise bad(f"{name}: must be a string")
    return value


def _tensor(entry: dict[str, Any], raw: _Raw) -> Tensor:
    name, datatype = _text(entry, "name"), _text(entry, "datatype")
    parameters = _parameters(entry, "an input")
    if "shared_memory_region" in parameters:
        raise bad("shared memory is not supported")
    given = Tensor(name, datatype, check_shape(name[:80], entry.get("shape")), None)
    if "binary_data_size" in parameters:
        size = whole(parameters["binary_data_size"], "binary_data_size", at_least=0, at_most=2**40)
        given.data = raw.take(size, name[:80])
        if datatype == "BYTES":
            given.data = split_bytes(given.data)
    else:
        given.data = entry.get("data")
        if datatype == "BYTES":
            given.data = _from_base64(given.data)
        elif not isinstance(given.data, list):
            raise bad(f"{name[:80]}: its data must be a list")
    return given


def split_bytes(raw: bytes) -> list[bytes]:
    """A serialized BYTES tensor -> its elements. Raises `Refusal` 400."""
    elements, place = [], 0
    while place < len(raw):
        end = place + 4 + (struct.unpack_from("<I", raw, place)[0] if place + 4 <= len(raw) else len(raw))
        if end > len(raw):
            raise bad("a BYTES element is longer than the bytes that are there")
        elements.append(raw[place + 4 : end])
        place = end
    return elements


def join_bytes(elements: np.ndarray) -> bytes:
    """The opposite of `split_bytes`."""
    return b"".join(struct.pack("<I", len(one)) + one for one in elements.reshape(-1))


def _from_base64(data: Any) -> list[bytes]:
    flat: list[Any] = []
    for one in data if isinstance(data, list) else [None]:
        flat.extend(one if isinstance(one, list) else [one])
    try:
        return [base64.b64decode(one, validate=True) for one in flat]
    except (binascii.Error, TypeError, ValueError):
        raise bad("image: in JSON its data must be a list of strings, image files in base64") from None


def raw_bytes(output: Output) -> bytes:
    """A tensor's elements, as the binary extension and gRPC have them."""
    if output.datatype == "BYTES":
        return join_bytes(output.data)
    return np.ascontiguousarray(output.data, dtype="<f4" if output.datatype == "FP32" else "<i8").tobytes()


def write_infer(name: str, version: str, request_id: str, outputs: list[Output]) -> tuple[bytes, int | None]:
    """The body of an answer, and the length of its JSON where raw tensors follow it."""
    entries, tail = [], []
    for output in outputs:
        entry: dict[str, Any] = {"name": output.name, "datatype": output.datatype, "shape": list(output.data.shape)}
        if output.binary:
            tail.append(raw_bytes(output))
            entry["parameters"] = {"binary_data_size": len(tail[-1])}
        elif output.datatype == "BYTES":
            entry["data"] = [one.decode("utf-8", "replace") for one in output.data.reshape(-1)]
        else:
            entry["data"] = output.data.reshape(-1).tolist()
        entries.append(entry)
    document = {"model_name": name, "model_version": version, "outputs": entries}
    head = json.dumps({"id": request_id, **document} if request_id else document).encode()
    return (b"".join((head, *tail)), len(head)) if tail else (head, None)
