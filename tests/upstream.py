"""The upstream implementations' facts, for tests: tensor lists, small checkpoints and what they must give.

The fixtures were written by the upstream code itself (MindCV on MindSpore, the authors' repository) with random
weights. `load_state_dict` gives a fixture's tensors under our key names.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from visformer.models import Architecture, Visformer
from visformer.models.variants import _pyramid

FIXTURES = Path(__file__).parent / "fixtures" / "upstream"


def tensor_shapes(source: str, model: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of an upstream model, in order."""
    rows = json.loads((FIXTURES / "keys" / f"{source}.{model}.json").read_text())
    return {name: tuple(shape) for name, shape in rows}


def mini_architecture(fixture: str, **changes) -> Architecture:
    """The architecture of a fixture in `mini/`."""
    shapes = {
        "mindcv_mini_v1": {"depths": (0, 2, 2, 2), "heads": (2, 2, 2, 2), "gelu": "tanh", "qk_scale_power": -0.25},
        "mindcv_mini_v2": {"depths": (1, 1, 2, 2), "heads": (1, 2, 4, 8), "gelu": "tanh", "qk_scale_power": -0.5},
        "orig_mini_v1": {"depths": (0, 2, 2, 2), "heads": (2, 2, 2, 2), "gelu": "erf", "qk_scale_power": -0.25},
    }[fixture]
    return _pyramid(8, 64, **(shapes | {"num_classes": 10, "image_size": (64, 64)} | changes))


def mini_model(fixture: str, **changes) -> Visformer:
    """A fixture's model with its weights, in evaluation mode."""
    model = Visformer(mini_architecture(fixture, **changes))
    model.load_state_dict(load_state_dict(fixture, len(model.stages)))
    return model.eval()


def outputs(fixture: str) -> dict[str, np.ndarray]:
    """The fixture's input and everything that must come out."""
    return dict(np.load(FIXTURES / "mini" / f"{fixture}.npz"))


def load_state_dict(fixture: str, stages: int) -> dict[str, Tensor]:
    """A fixture's tensors under our key names."""
    checkpoint, pickled = (FIXTURES / "mini" / f"{fixture}{suffix}" for suffix in (".ckpt", ".pth"))
    tensors = read_mindspore(checkpoint.read_bytes()) if checkpoint.exists() else torch.load(pickled, weights_only=True)
    renamed = {rename(name, offset=4 - stages): tensor for name, tensor in tensors.items()}
    for name in [n for n in renamed if n.endswith(".running_var")]:
        renamed.setdefault(name.replace("running_var", "num_batches_tracked"), torch.tensor(0))
    return renamed


def rename(name: str, offset: int) -> str:
    """An upstream name as ours; `offset` is 1 where upstream's stage 0 is empty."""
    for old, new in [(".bn.", "."), (".gamma", ".weight"), (".beta", ".bias"), (".moving_mean", ".running_mean")]:
        name = name.replace(old, new)
    name = name.replace(".moving_variance", ".running_var")
    stage = re.match(r"(pos_embed|patch_embed|stage)(\d)(.*)", name)
    if not stage:
        return name
    kind, number, rest = stage[1], int(stage[2]) - offset, stage[3]
    if kind == "pos_embed":
        return f"stages.{number}.pos_embed.weight"
    if kind == "patch_embed":
        return f"stages.{number}.embed{rest}"
    rest = re.sub(r"^\.(\d+)\.norm1", r".\1.attn.norm", rest)
    rest = re.sub(r"^\.(\d+)\.norm2", r".\1.mlp.norm", rest)
    rest = re.sub(r"^\.(\d+)\.(attn|mlp)\.(?!norm)", r".\1.\2.branch.", rest)
    return f"stages.{number}.blocks{rest}"


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
