"""The operations of the augmentation policies on arrays: what timm does with Pillow, in a fraction of the time.

Images are uint8 (H, W, C) arrays of 1 or 3 channels, and come back as new arrays of that shape. Colours come out as
Pillow's to the level, since a policy's strength was tuned on them. Pixels moved by less than a whole are interpolated
by torch, whose bicubic kernel is a little softer (a = -0.75 where Pillow's `transform` has -1): a mean difference of
about one level on photographs, for less than half of the time.

`for_timm` puts these operations into timm's policies, which draw what is done and how strongly.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch.nn.functional import grid_sample, interpolate

Pixels = np.ndarray

_TORCH_MODES = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}


def to_pillow(pixels: Pixels) -> Image.Image:
    """uint8 (H, W, C) as an image of mode L, RGB or RGBA."""
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def from_pillow(image: Image.Image) -> Pixels:
    """An 8-bit image as uint8 (H, W, C), its own memory."""
    pixels = np.array(image)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def resize(pixels: Pixels, size: tuple[int, int], resampling: Image.Resampling) -> Pixels:
    """Antialiased resizing to `size` (height, width).

    torch's kernel for bytes is four times as fast as Pillow and gives the same levels but for rounding; where Pillow
    clips an overshoot between its two passes, they may differ by more. Pillow does the other filters, and alpha.
    """
    if pixels.shape[:2] == size:
        return pixels
    if resampling not in _TORCH_MODES or pixels.shape[2] == 4:
        return from_pillow(to_pillow(pixels).resize((size[1], size[0]), resampling))
    # (1, C, H, W) without a copy; unsqueezed first, or torch does not see channels_last and gives planes back.
    channels_last = torch.from_numpy(pixels).unsqueeze(0).permute(0, 3, 1, 2)
    resized = interpolate(channels_last, size=size, mode=_TORCH_MODES[resampling], antialias=True)
    return resized[0].permute(1, 2, 0).contiguous().numpy()


def flip(pixels: Pixels, axis: int) -> Pixels:
    """Reversed along an axis: 0 upside down, 1 mirrored."""
    return torch.from_numpy(pixels).flip(axis).numpy()


# ---- colour


def invert(pixels: Pixels) -> Pixels:
    """255 minus each level."""
    return ~pixels


def posterize(pixels: Pixels, bits: int) -> Pixels:
    """Keep the highest `bits` of each level; all of them from 8 on, none at 0."""
    return pixels & np.uint8(0xFF << (8 - min(bits, 8)) & 0xFF)


def solarize(pixels: Pixels, threshold: int) -> Pixels:
    """Invert the levels from `threshold` on."""
    return pixels ^ ((pixels >= threshold).view(np.uint8) * np.uint8(255))


def solarize_add(pixels: Pixels, add: int) -> Pixels:
    """Add to the levels below 128, up to 255."""
    return pixels + (pixels < 128).view(np.uint8) * np.uint8(min(add, 128))


def brightness(pixels: Pixels, factor: float) -> Pixels:
    """Blend with black: 0 is black, 1 the image, more is brighter."""
    return _levels(pixels * np.float32(factor))


def contrast(pixels: Pixels, factor: float) -> Pixels:
    """Blend with the grey of the image's mean lightness."""
    mean = np.float32(int(_grey(pixels).mean() + 0.5))
    apart = pixels - mean
    apart *= np.float32(factor)
    apart += mean
    return _levels(apart)


def color(pixels: Pixels, factor: float) -> Pixels:
    """Blend with the image in grey: 0 is grey, 1 the image, more is more colourful."""
    return from_pillow(ImageEnhance.Color(to_pillow(pixels)).enhance(factor))


def sharpness(pixels: Pixels, factor: float) -> Pixels:
    """Blend with a blurred copy: 0 is blurred, 1 the image, more is sharper."""
    near = pixels.astype(np.uint16)
    across = near[:, :-2] + near[:, 1:-1] + near[:, 2:]
    total = across[:-2] + across[1:-1] + across[2:] + 4 * near[1:-1, 1:-1]  # weights 1, in the middle 5, in all 13
    blurred = pixels.astype(np.float32)  # the border stays
    blurred[1:-1, 1:-1] = (2 * total + 13) // 26
    return _levels(blurred + np.float32(factor) * (pixels - blurred))


def equalize(pixels: Pixels) -> Pixels:
    """Spread the levels of each channel so that each is about as frequent."""
    image = to_pillow(pixels)
    counts = np.array(image.histogram()).reshape(-1, 256)
    last = 255 - (counts[:, ::-1] > 0).argmax(axis=1)  # the highest level that there is
    steps = (pixels.shape[0] * pixels.shape[1] - counts[np.arange(len(counts)), last, None]) // 255
    below = counts.cumsum(axis=1) - counts
    tables = np.minimum((steps // 2 + below) // np.maximum(steps, 1), 255)
    return _look_up(image, np.where(steps > 0, tables, np.arange(256)))


def auto_contrast(pixels: Pixels) -> Pixels:
    """Stretch the levels of each channel to the full range."""
    image = to_pillow(pixels)
    there = np.array(image.histogram()).reshape(-1, 256) > 0
    low, high = there.argmax(axis=1), 255 - there[:, ::-1].argmax(axis=1)
    scale = 255.0 / np.maximum(high - low, 1)[:, None]
    stretched = np.clip((np.arange(256) * scale - low[:, None] * scale).astype(np.int64), 0, 255)
    return _look_up(image, np.where((high > low)[:, None], stretched, np.arange(256)))


def _look_up(image: Image.Image, tables: np.ndarray) -> Pixels:
    """Each level replaced by that in its channel's table, whole numbers (C, 256) in [0, 255].

    `Image.point` would first round the whole numbers one by one, which takes longer than looking up.
    """
    return from_pillow(image._new(image.im.point(tables.ravel().tolist(), None)))


def _grey(pixels: Pixels) -> np.ndarray:
    """Lightness by ITU-R 601, uint8 (H, W)."""
    return pixels[:, :, 0] if pixels.shape[2] == 1 else np.asarray(to_pillow(pixels).convert("L"))


def _levels(values: np.ndarray) -> Pixels:
    """Clip to [0, 255] and cut the fraction off, as Pillow does."""
    return np.clip(values, 0, 255, out=values).astype(np.uint8)


# ---- position


def affine(
    pixels: Pixels, matrix: tuple[float, float, float, float, float, float], fill: Any, resampling: Image.Resampling
) -> Pixels:
    """Pixel (x, y) of the result shows (a x + b y + c, d x + e y + f) of `pixels`; coordinates count from the corner.

    `matrix` is (a, b, c, d, e, f), in pixels; what shows no pixel is `fill`, a level or one for each channel.
    """
    if resampling not in _TORCH_MODES:
        moved = to_pillow(pixels).transform(
            (pixels.shape[1], pixels.shape[0]), Image.Transform.AFFINE, matrix, resampling, fillcolor=fill
        )
        return from_pillow(moved)
    height, width, channels = pixels.shape
    grid = _origins(matrix, height, width)
    source = torch.from_numpy(pixels).float().unsqueeze(0).permute(0, 3, 1, 2)  # channels_last
    moved = grid_sample(source, grid[None], _TORCH_MODES[resampling], "border", align_corners=False)
    # Fractions are cut off, as Pillow does; what is added keeps rounding errors from costing a whole level.
    planes = moved.add_(1 / 64).clamp_(0, 255).to(torch.uint8)[0].numpy()  # (C, H, W)
    outside = _outside(matrix, height, width).view(np.uint8) * np.uint8(255)  # as bits: cheaper than choosing
    inside, fills = ~outside, fill if isinstance(fill, (tuple, list)) else (fill,) * channels
    result = np.empty_like(pixels)
    for channel in range(channels):
        result[:, :, channel] = (planes[channel] & inside) | (outside & np.uint8(fills[channel]))
    return result


def _outside(matrix: tuple[float, float, float, float, float, float], height: int, width: int) -> np.ndarray:
    """Which pixels show nothing of the image, bool (H, W): in each row, those before and those after a stretch."""
    a, b, c, d, e, f = matrix
    rows = np.arange(height) + 0.5
    first, last = np.full(height, -np.inf), np.full(height, np.inf)
    for step, start, side in ((a, b * rows + c, width), (d, e * rows + f, height)):  # 0 <= step x + start < side
        if step:
            ends = -start / step, (side - start) / step
            first, last = np.maximum(first, np.minimum(*ends)), np.minimum(last, np.maximum(*ends))
        else:
            last = np.where((start >= 0) & (start < side), last, -np.inf)
    columns = np.arange(width, dtype=np.float32) + 0.5
    return (columns < first.astype(np.float32)[:, None]) | (columns >= last.astype(np.float32)[:, None])


def _origins(matrix: tuple[float, float, float, float, float, float], height: int, width: int) -> torch.Tensor:
    """Where each pixel comes from: float32 (H, W, 2) of x and y, -1 to 1 across the image.

    Each pair is one complex number here: rows and columns add up without a stride of two, at half of the time.
    """
    a, b, c, d, e, f = matrix
    columns, rows = np.arange(width) + 0.5, np.arange(height) + 0.5
    along = (a * columns + c) * (2 / width) - 1 + 1j * ((d * columns + f) * (2 / height) - 1)
    down = b * rows * (2 / width) + 1j * (e * rows * (2 / height))
    grid = along.astype(np.complex64)[None] + down.astype(np.complex64)[:, None]
    return torch.from_numpy(grid.view(np.float32).reshape(height, width, 2))


def rotate(pixels: Pixels, degrees: float, fill: Any, resampling: Image.Resampling) -> Pixels:
    """Turn counter-clockwise around the centre."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = pixels.shape[1] / 2, pixels.shape[0] / 2
    return affine(pixels, (cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y), fill, resampling)


# ---- in timm's policies


def for_timm(operation: Any) -> None:
    """Let a `timm.data.auto_augment.AugmentOp` work on arrays; what is drawn, and in which order, stays the same."""
    name = operation.name
    stem = name.removesuffix("Increasing").removesuffix("Original")
    if stem in _COLOUR:
        operation.aug_fn = functools.partial(_coloured, stem)
    elif stem in _MOVES or stem == "Rotate":
        operation.aug_fn = functools.partial(_moved, stem)
    else:
        operation.aug_fn = functools.partial(_by_pillow, operation.aug_fn)


_COLOUR: dict[str, Callable[..., Pixels]] = {
    "AutoContrast": auto_contrast,
    "Equalize": equalize,
    "Invert": invert,
    "Posterize": posterize,
    "Solarize": solarize,
    "SolarizeAdd": solarize_add,
    "Color": color,
    "Contrast": contrast,
    "Brightness": brightness,
    "Sharpness": sharpness,
}
_MOVES: dict[str, Callable[[float, int, int], tuple[float, float, float, float, float, float]]] = {
    "ShearX": lambda by, width, height: (1, by, 0, 0, 1, 0),
    "ShearY": lambda by, width, height: (1, 0, 0, by, 1, 0),
    "TranslateX": lambda by, width, height: (1, 0, by, 0, 1, 0),
    "TranslateY": lambda by, width, height: (1, 0, 0, 0, 1, by),
    "TranslateXRel": lambda by, width, height: (1, 0, by * width, 0, 1, 0),
    "TranslateYRel": lambda by, width, height: (1, 0, 0, 0, 1, by * height),
}


# What is put into a policy goes by name, so that the policy can be pickled for a worker process.
def _coloured(name: str, pixels: Pixels, *levels: Any, **_: Any) -> Pixels:
    return _COLOUR[name](pixels, *levels)


def _moved(name: str, pixels: Pixels, by: float, *, fillcolor: Any, resample: Any) -> Pixels:
    """timm draws the filter, where it is given several, before it moves anything."""
    resampling = random.choice(resample) if isinstance(resample, (list, tuple)) else resample
    if name == "Rotate":
        return rotate(pixels, by, fillcolor, resampling)
    return affine(pixels, _MOVES[name](by, pixels.shape[1], pixels.shape[0]), fillcolor, resampling)


def _by_pillow(operation: Callable[..., Image.Image], pixels: Pixels, *levels: Any, **settings: Any) -> Pixels:
    return from_pillow(operation(to_pillow(pixels), *levels, **settings))
