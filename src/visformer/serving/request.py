"""An inference request of the Open Inference Protocol, once it is out of its wire format, and what it may ask for.

Inputs, one of them in a request:

    image    BYTES  [n, 1] or [n]    image files as they are
    images   FP32   [n, C, H, W]     preprocessed pixels

Outputs: `logits` and `probabilities`, FP32 [n, classes], both when none is named; `top_labels` (BYTES),
`top_probabilities` (FP32) and `top_indices` (INT64), [n, k], k being the parameter `top_k` of the output or of the
request; `error`, BYTES [n], empty for a good image. Where `error` is asked for, an image that can't be read does not
refuse the others: its numbers are 0 and its labels empty. Triton's `classification` parameter turns logits or
probabilities into BYTES [n, k], each `value:index:label`. The parameter `timeout` is in microseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from visformer.serving.model import ServedModel
from visformer.serving.refusals import Refusal, bad
from visformer.serving.scores import best, probabilities

INPUTS = ("image", "images")
OUTPUTS = {
    "logits": "FP32",
    "probabilities": "FP32",
    "top_labels": "BYTES",
    "top_probabilities": "FP32",
    "top_indices": "INT64",
    "error": "BYTES",
}
_DEFAULT = ("logits", "probabilities")
_TOP = ("top_labels", "top_probabilities", "top_indices")


@dataclass(frozen=True)
class Wanted:
    """An output that was asked for. `classification` and `top_k` are 0 where they were not given."""

    name: str
    binary: bool = False
    classification: int = 0
    top_k: int = 0


@dataclass(frozen=True)
class InferRequest:
    """Either `images`, the bytes of files, or `tensor`, float32 (n, C, H, W); `wanted` is never empty."""

    id: str
    images: list[bytes] | None
    tensor: np.ndarray | None
    wanted: list[Wanted]
    timeout_s: float | None


@dataclass(frozen=True)
class Output:
    """A tensor of the answer: float32 or int64, or for BYTES an object array of bytes."""

    name: str
    datatype: str
    data: np.ndarray
    binary: bool


@dataclass
class Tensor:
    """An input as the wire format gave it: its elements flat, BYTES as a list of bytes, or raw little-endian FP32."""

    name: str
    datatype: str
    shape: list[int]
    data: Any = field(repr=False)


def check_shape(name: str, shape: Any) -> list[int]:
    """A shape as a list. Raises `Refusal` 400 when it is none."""
    good = isinstance(shape, Sequence) and not isinstance(shape, str) and 0 < len(shape) <= 8
    if not good or not all(type(side) is int and 0 <= side < 2**31 for side in shape):
        raise bad(f"{name}: its shape must be a list of 1 to 8 numbers, none below 0")
    return list(shape)


def the_input(inputs: list[Tensor]) -> tuple[list[bytes] | None, np.ndarray | None]:
    """Check the inputs -> (images, None) or (None, tensor). Raises `Refusal` 400."""
    if len(inputs) != 1:
        raise bad(f"{len(inputs)} inputs; give one, image or images")
    (given,) = inputs
    if given.name not in INPUTS:
        raise bad(f"{given.name[:80]}: no such input; give image (BYTES) or images (FP32)")
    wanted = "BYTES" if given.name == "image" else "FP32"
    if given.datatype != wanted:
        raise bad(f"{given.name}: its datatype must be {wanted}")
    if given.name == "image":
        if len(given.shape) > 2 or given.shape[1:] not in ([], [1]):
            raise bad("image: its shape must be [n] or [n, 1]")
        if len(given.data) != given.shape[0]:
            raise bad(f"image: {len(given.data)} elements, where its shape says {given.shape[0]}")
        return given.data, None
    if isinstance(given.data, bytes):
        count, odd = divmod(len(given.data), 4)
        elements = np.frombuffer(given.data, dtype="<f4") if not odd else None
    else:
        elements = numbers(given.data)
        count = elements.size
    if elements is None or count != _elements(given.shape):
        raise bad(f"images: {count} elements, where its shape says {_elements(given.shape)}")
    return None, elements.astype(np.float32, copy=False).reshape(given.shape)


def numbers(data: Any) -> np.ndarray:
    """Numbers, flat or nested -> float32, flat. Raises `Refusal` 400."""
    try:
        array = np.asarray(data)
    except (ValueError, OverflowError, RecursionError):
        array = np.empty(0, dtype=object)
    if array.dtype.kind not in "iuf":
        raise bad("images: its data must be numbers, flat or nested by its shape")
    with np.errstate(over="ignore"):
        return array.astype(np.float32).reshape(-1)


def _elements(shape: list[int]) -> int:
    product = 1
    for side in shape:
        product *= side
    return product


def whole(value: Any, name: str, at_least: int = 1, at_most: int = 2**31) -> int:
    """A whole number within limits. Raises `Refusal` 400."""
    if type(value) is not int or not at_least <= value <= at_most:
        raise bad(f"{name}: must be a whole number from {at_least:,} to {at_most:,}")
    return value


def wanted_outputs(asked: list[tuple[str, dict[str, Any]]], parameters: dict[str, Any]) -> list[Wanted]:
    """(name, parameters) of each output that was asked for, and the request's parameters -> what to give.

    Raises `Refusal` 400.
    """
    everywhere = whole(parameters["top_k"], "top_k") if "top_k" in parameters else 0
    binary = parameters.get("binary_data_output", False) is True
    if not asked:
        return [Wanted(name, binary, 0, everywhere) for name in (*_DEFAULT, *(_TOP if everywhere else ()))]
    wanted = []
    for name, own in asked:
        if name not in OUTPUTS:
            raise bad(f"{name[:80]}: no such output; there are {', '.join(OUTPUTS)}")
        if "shared_memory_region" in own:
            raise bad("shared memory is not supported")
        classes = whole(own["classification"], "classification") if own.get("classification", 0) != 0 else 0
        if classes and name not in _DEFAULT:
            raise bad(f"{name}: classification goes with logits or probabilities")
        top_k = whole(own["top_k"], "top_k") if "top_k" in own else everywhere
        wanted.append(Wanted(name, own.get("binary_data", binary) is True, classes, top_k))
    if len({one.name for one in wanted}) < len(wanted):
        raise bad("an output is asked for twice")
    return wanted


def timeout_of(parameters: dict[str, Any]) -> float | None:
    """Seconds, from the parameter `timeout` in microseconds; 0 and none mean the server's own."""
    if parameters.get("timeout", 0) == 0:
        return None
    return whole(parameters["timeout"], "timeout", at_most=2**62) / 1e6


def outputs(
    model: ServedModel, results: Sequence[np.ndarray | Refusal], wanted: list[Wanted], top_k: int
) -> list[Output]:
    """What was wanted, of each image's logits or refusal. Raises a refusal where `error` was not asked for."""
    good = [index for index, result in enumerate(results) if not isinstance(result, Refusal)]
    refused = [(index, result) for index, result in enumerate(results) if isinstance(result, Refusal)]
    if refused and not any(one.name == "error" for one in wanted):
        index, refusal = refused[0]
        raise Refusal(refusal.status, f"image[{index}]: {refusal.message}" if len(results) > 1 else refusal.message)
    logits = np.zeros((len(results), len(model.labels)), dtype=np.float32)
    if good:
        logits[good] = np.stack([results[index] for index in good])  # type: ignore[arg-type]
    tables = {"logits": logits, "probabilities": np.zeros_like(logits)}
    tables["probabilities"][good] = probabilities(logits[good]) if good else 0
    errors = [r.message.encode() if isinstance(r, Refusal) else b"" for r in results]
    made = []
    for one in wanted:
        datatype, data = _output(one, tables, errors, model, min(one.top_k or top_k, len(model.labels)))
        made.append(Output(one.name, datatype, data, one.binary))
    return made


def _output(
    one: Wanted, tables: dict[str, np.ndarray], errors: list[bytes], model: ServedModel, top_k: int
) -> tuple[str, np.ndarray]:
    if one.name == "error":
        return "BYTES", np.array(errors, dtype=object)
    if one.classification:
        values = tables[one.name]
        order = best(values, min(one.classification, len(model.labels)))
        rows = [
            [f"{row[i]:f}:{i}:{model.labels[i]}".encode() for i in top] for row, top in zip(values, order, strict=True)
        ]
        return "BYTES", _objects(_cleared(rows, errors), order.shape)
    if one.name in tables:
        return "FP32", tables[one.name]
    order = best(tables["probabilities"], top_k)
    if one.name == "top_indices":
        order[[bool(error) for error in errors]] = 0
        return "INT64", order
    if one.name == "top_probabilities":
        return "FP32", np.take_along_axis(tables["probabilities"], order, axis=1)
    rows = [[model.labels[i].encode() for i in top] for top in order]
    return "BYTES", _objects(_cleared(rows, errors), order.shape)


def _cleared(rows: list[list[bytes]], errors: list[bytes]) -> list[list[bytes]]:
    return [[b""] * len(row) if error else row for row, error in zip(rows, errors, strict=True)]


def _objects(rows: list[list[bytes]], shape: tuple[int, ...]) -> np.ndarray:
    made = np.empty(shape, dtype=object)
    for index, row in enumerate(rows):
        made[index] = row
    return made
