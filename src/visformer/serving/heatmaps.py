"""Where a model looked: a small grid of numbers over the part of the image that it saw.

Three ways, each of which says something else:

    activation   what each place gave to a class's logit. A Visformer ends in norm, average and linear head, so a logit
                 is a sum over places: exact, no gradient, no guess (class activation mapping, Zhou et al., CVPR 2016,
                 arXiv 1512.04150). Needs the last map and the head.
    attention    how much the places of the last stage were looked at: the attention they receive, averaged over
                 queries, heads and blocks. The same for every class. Needs the torch model.
    occlusion    how far the odds of a class fall when a place is covered with the mean colour (Zeiler and Fergus, ECCV
                 2014, arXiv 1311.2901). Needs nothing but logits, so it works for every engine, at some fifty images.

Shapes: B batch, C channels, H and W of an input, h and w of the last stage's map.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor, nn

    from visformer.bundles.pixels import ImagePreprocessing
    from visformer.models import Visformer

ACTIVATION, ATTENTION, OCCLUSION = METHODS = ("activation", "attention", "occlusion")
UNITS = {ACTIVATION: "logit", ATTENTION: "share", OCCLUSION: "log-odds"}
_CELLS = 7  # of the occlusion's grid along each axis, at most
_LEAST_CELL = 4  # pixels
_LONGEST = 16  # as in `ImagePreprocessing`: of a longer strip, the middle


@dataclass(frozen=True)
class Box:
    """A rectangle within an image, in its pixels; edges may fall between them."""

    left: float
    top: float
    width: float
    height: float

    def to_dict(self) -> dict[str, float]:
        return {"left": self.left, "top": self.top, "width": self.width, "height": self.height}


@dataclass(frozen=True)
class LastMap:
    """What a torch model gives beside its logits: all float32, of one image."""

    logits: np.ndarray  # (classes,)
    features: np.ndarray  # (C, h, w), after the last norm
    attention: np.ndarray | None  # (h, w), summing to 1; None where the last stage has no attention


def crop_box(preprocessing: ImagePreprocessing, height: int, width: int) -> Box:
    """The part of an upright image of that size, in pixels, that the model sees after resize and centre crop."""
    crop_h, crop_w = preprocessing.image_size
    left = max(0, width - math.ceil(_LONGEST * height * crop_w / crop_h)) // 2
    top = max(0, height - math.ceil(_LONGEST * width * crop_h / crop_w)) // 2
    height, width = height - 2 * top, width - 2 * left
    resized_h, resized_w = preprocessing._resized(height, width)
    down, right = preprocessing._offset(resized_h - crop_h), preprocessing._offset(resized_w - crop_w)
    rows, columns = height / resized_h, width / resized_w  # pixels of the image in one of the resized
    return Box(left + right * columns, top + down * rows, crop_w * columns, crop_h * rows)


# ---- class activation


def class_activation(features: np.ndarray, weight: np.ndarray, bias: float) -> np.ndarray:
    """What each place gives to a class's logit, float32 (h, w); their sum is the logit.

    `features` (C, h, w) is the map that is averaged, `weight` (C,) the head's row of the class. Each place carries an
    equal part of the bias: so it does not matter whether a norm's shift stands in the features or in the bias.
    """
    height, width = features.shape[1:]
    places = np.tensordot(weight.astype(np.float64), features.astype(np.float64), axes=1) + bias
    return (places / (height * width)).astype(np.float32)


def head(model: Visformer, index: int) -> tuple[np.ndarray, float]:
    """The head's weights of one class, float32 (C,), and its bias"""
    weight, bias = model.get_parameter("head.weight")[index], model.get_parameter("head.bias")[index]
    return weight.detach().float().cpu().numpy(), bias.item()


def last_map(model: Visformer, image: np.ndarray) -> LastMap:
    """One pass of a torch model, in fp32, over an input, float32 (C, H, W).

    The model is only read, so that others may use it meanwhile.
    """
    import torch

    device = model.get_parameter("head.weight").device
    with torch.inference_mode():
        x = torch.from_numpy(image)[None].to(device).contiguous(memory_format=torch.channels_last)
        x = model.stages[:-1](model.stem(x))
        x, rows = _last_stage(model.stages[-1], x)
        features = model.norm(x)
        logits = model.forward_head(features)
        received = torch.stack(rows).mean(0).float().cpu().numpy() if rows else None
        return LastMap(logits[0].float().cpu().numpy(), features[0].float().cpu().numpy(), received)


# ---- attention


def _last_stage(stage: Any, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The stage's output, and for each of its attentions what the places receive, (h, w)"""
    x = stage.drop(stage.pos_embed(stage.embed(x)))
    rows = []
    for block in stage.blocks:
        attention = getattr(block, "attn", None)
        if attention is not None:
            rows.append(received(attention.branch, attention.norm(x))[0])
        x = block(x)
    return x, rows


def attention_rows(attention: nn.Module, x: Tensor) -> Tensor:
    """The weights with which places look at one another: (B, C, h, w) -> (B, heads, N, N), each row summing to 1.

    With windows it is (B, windows * heads, N, N), N being the places of one; what is padding looks at padding.
    """
    from visformer.models.attention import Windows

    height, width = x.shape[-2:]
    module: Any = attention
    bias: Tensor | float = 0.0
    if hasattr(module, "window"):
        windows = Windows.over((height, width), module.window, module.shifted)
        q, k, _ = windows.split(module.qkv(x), module.num_heads)
        bias = windows.mask(module.position_bias(windows.size)).to(q.dtype)
    else:
        qkv = module.qkv(x).flatten(2).unflatten(1, (3, module.num_heads, -1))  # (B, 3, heads, d, N)
        q, k, _ = qkv.transpose(3, 4).unbind(1)  # each (B, heads, N, d)
    return (q @ k.transpose(2, 3) * module.scale + bias).softmax(3)


def received(attention: nn.Module, x: Tensor) -> Tensor:
    """How much each place is looked at, averaged over queries and heads: (B, C, h, w) -> (B, h, w), summing to 1"""
    from visformer.models.attention import Windows

    height, width = x.shape[-2:]
    module: Any = attention
    keys = attention_rows(attention, x).sum(2, keepdim=True).transpose(2, 3)  # (B, windows * heads, N, 1)
    if hasattr(module, "window"):
        windows = Windows.over((height, width), module.window, module.shifted)
        heads = windows.join(keys, module.num_heads)  # (B, heads, h, w)
    else:
        heads = keys.unflatten(2, (height, width)).squeeze(4)
    return heads.mean(1) / (height * width)


# ---- occlusion


def occlusion_grid(height: int, width: int) -> tuple[int, int]:
    """Rows and columns of the grid for an input of that size, in pixels: 7 x 7, or fewer where cells would get tiny."""
    return max(1, min(_CELLS, height // _LEAST_CELL)), max(1, min(_CELLS, width // _LEAST_CELL))


def occluded(image: np.ndarray, grid: tuple[int, int]) -> Iterator[np.ndarray]:
    """Copies of a normalised input, float32 (C, H, W), row by row: in each, one cell and half a cell around it is 0.

    0 is the mean colour. A cell alone hides too little for the odds to move.
    """
    _, height, width = image.shape
    rows, columns = grid
    for row in range(rows):
        top, bottom = (row - 0.5) * height / rows, (row + 1.5) * height / rows
        for column in range(columns):
            left, right = (column - 0.5) * width / columns, (column + 1.5) * width / columns
            covered = image.copy()
            covered[:, max(0, round(top)) : round(bottom), max(0, round(left)) : round(right)] = 0
            yield covered


def log_odds(logits: np.ndarray, index: int) -> np.ndarray:
    """float (..., classes) -> float64 (...): the log of p / (1 - p) of a class; of a model of one class, its logit"""
    logits = logits.astype(np.float64)
    others = np.delete(logits, index, axis=-1)
    if not others.shape[-1]:
        return logits[..., index]
    most = others.max(axis=-1)
    return logits[..., index] - most - np.log(np.exp(others - most[..., None]).sum(axis=-1))


def occlusion(whole: np.ndarray, covered: np.ndarray, index: int, grid: tuple[int, int]) -> np.ndarray:
    """How far the class's log odds fall with each cell covered, float32 (rows, columns); below 0 they rise.

    `whole` are the image's logits (classes,), `covered` those of `occluded`, (rows * columns, classes).
    """
    fall = log_odds(whole, index) - log_odds(covered, index)
    return fall.reshape(grid).astype(np.float32)


# ---- for sending


def scaled(values: np.ndarray) -> tuple[list[list[float]], float]:
    """(h, w) -> the same in [-1, 1] as lists, and what 1 stands for: the largest magnitude (1 where all are 0)."""
    scale = float(np.abs(values).max()) or 1.0
    return [[round(float(value), 4) for value in row] for row in values / scale], scale
