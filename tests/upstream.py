"""The upstream implementations' facts, for tests: tensor lists, small checkpoints and what they must give.

The fixtures were written by the upstream code itself (MindCV on MindSpore, the authors' repository) with random
weights. `read_mindspore` is a reader of its own, small and trusting, to judge the package's by.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from visformer.checkpoint import Checkpoint
from visformer.conversion import read_any
from visformer.models import Architecture, Visformer

FIXTURES = Path(__file__).parent / "fixtures" / "upstream"


def tensor_shapes(source: str, model: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of an upstream model, in order."""
    rows = json.loads((FIXTURES / "keys" / f"{source}.{model}.json").read_text())
    return {name: tuple(shape) for name, shape in rows}


HEADS = {  # of each stage, which no tensor tells
    "mindcv_mini_v1": (2, 2, 2, 2),
    "mindcv_mini_v2": (1, 2, 4, 8),
    "orig_mini_v1": (2, 2, 2),
    "orig_mini_net1": (2,),
    "orig_mini_net6": (2, 2, 2),
    "orig_mini_swin_v2": None,
    "orig_mini_swin_v2_448_shift": None,
}
MINI = tuple(HEADS)


def mini_path(fixture: str) -> Path:
    """The checkpoint of a fixture, as upstream wrote it."""
    return FIXTURES / "mini" / (fixture + (".ckpt" if fixture.startswith("mindcv") else ".pth"))


def mini_checkpoint(fixture: str) -> Checkpoint:
    """A fixture as a checkpoint of ours."""
    return read_any(mini_path(fixture), num_heads=HEADS[fixture])


def mini_architecture(fixture: str, **changes) -> Architecture:
    """The architecture of a fixture in `mini/`."""
    return replace(mini_checkpoint(fixture).architecture, **changes)


def mini_model(fixture: str, **changes) -> Visformer:
    """A fixture's model with its weights, in evaluation mode."""
    checkpoint = mini_checkpoint(fixture)
    return replace(checkpoint, architecture=replace(checkpoint.architecture, **changes)).build()


def outputs(fixture: str) -> dict[str, np.ndarray]:
    """The fixture's input and everything that must come out."""
    return dict(np.load(FIXTURES / "mini" / f"{fixture}.npz"))


def read_mindspore(data: bytes) -> dict[str, Tensor]:
    """The tensors of a MindSpore checkpoint: a protobuf stream of (tag, dims, type, content)."""
    tensors = {}
    for _, value in _fields(data):
        parts = dict(_fields(value))
        inner = list(_fields(parts[2]))
        dims = [x for number, x in inner if number == 1]
        dims = [int(d) for d in dims] if all(isinstance(d, int) for d in dims) else list(_varints(dims[0]))
        content = next(x for number, x in inner if number == 3)
        array = np.frombuffer(content, dtype="<f4").reshape(dims)
        tensors[parts[1].decode()] = torch.from_numpy(array.copy())
    return tensors


def _varints(data: bytes):
    value = shift = 0
    for byte in data:
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            yield value
            value = shift = 0


def _fields(data: bytes):
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    while position < len(data):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
        else:
            length = varint()
            yield key >> 3, data[position : position + length]
            position += length
