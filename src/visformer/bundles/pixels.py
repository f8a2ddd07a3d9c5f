"""Image to model input with numpy and Pillow alone: what `Preprocessing` does, where there is no torch.

The resize is Pillow's own, so the numbers are the same; without antialiasing, as MindCV's models want it, they are
within one level of torch's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from visformer.data.decode import MODES, Box, Resized, to_mode
from visformer.errors import UsageError

_PIL = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_LONGEST = 16  # the resized image is at most this many crops long; of a longer strip, the middle is taken
_LARGEST = 4096  # pixels a side of the model's input


@dataclass(frozen=True)
class ImagePreprocessing:
    """The fields of `visformer.data.Preprocessing`: `image_size` is (height, width), pixels; `mean` and `std` are per
    channel on the 0-255 scale."""

    image_size: tuple[int, int]
    crop_pct: float
    interpolation: str
    antialias: bool
    crop_rounding: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    in_channels: int

    @classmethod
    def from_dict(cls, values: Any) -> ImagePreprocessing:
        """Raises `UsageError` for a key that is missing or unknown, and for a value out of range."""
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(values, dict) or set(values) != set(names):
            raise UsageError(f"preprocessing: must have the keys {', '.join(names)}, and no others")
        fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        made = cls(**fields)
        for name, good in made._rules().items():
            if not good:
                raise UsageError(f"preprocessing: {name}: {getattr(made, name)!r} is out of range")
        return made

    def __call__(self, images: Iterable[Image.Image]) -> np.ndarray:
        """PIL images of any mode and size -> float32 (B, C, height, width), the model's input."""
        return self.normalize(np.stack([self.pixels(image) for image in images]))

    def pixels(self, image: Image.Image, box: Box | None = None) -> np.ndarray:
        """PIL image of any mode and size -> uint8 (height, width, C): resized and cropped. `box` is the part of it that
        is the picture, as `open_reduced` gives it."""
        image = to_mode(image, self.in_channels)
        image = self._at_most(image) if box is None else image
        whole = (image.height, image.width) if box is None else (box[3] - box[1], box[2] - box[0])
        (height, width), size = self.image_size, self._resized(*whole)
        top, left = (self._offset(whole - part) for whole, part in zip(size, self.image_size, strict=True))
        if box is not None:
            image = image.resize((size[1], size[0]), _PIL[self.interpolation], box)
        elif size != (image.height, image.width):
            if not self.antialias:
                return _interpolated(np.asarray(image), size, self.interpolation)[
                    top : top + height, left : left + width
                ]
            image = image.resize((size[1], size[0]), _PIL[self.interpolation])
        return _three_axes(np.array(image.crop((left, top, left + width, top + height))))

    @property
    def reduces(self) -> Resized | None:
        """For `open_reduced`; see `visformer.data.Preprocessing`."""
        return self._resized if self.antialias and self.interpolation != "nearest" else None

    def normalize(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 (B, height, width, C) -> float32 (B, C, height, width), (pixels - mean) / std"""
        batch, height, width, channels = pixels.shape
        images = np.empty((batch, channels, height, width), dtype=np.float32)
        for channel, (mean, std) in enumerate(zip(self.mean, self.std, strict=True)):
            plane = images[:, channel]  # one at a time, as numpy is slow along an axis of three
            plane[:] = pixels[..., channel]
            plane -= np.float32(mean)
            plane /= np.float32(std)
        return images

    def _resized(self, height: float, width: float) -> tuple[int, int]:
        cover_h, cover_w = (math.floor(side / self.crop_pct) for side in self.image_size)
        return max(cover_h, int(cover_w * height // width)), max(cover_w, int(cover_h * width // height))

    def _offset(self, spare: int) -> int:
        return round(spare / 2) if self.crop_rounding == "round" else spare // 2

    def _at_most(self, image: Image.Image) -> Image.Image:
        height, width = self.image_size
        longest_w = math.ceil(_LONGEST * image.height * width / height)
        longest_h = math.ceil(_LONGEST * image.width * height / width)
        if image.width <= longest_w and image.height <= longest_h:
            return image
        left, top = max(0, image.width - longest_w) // 2, max(0, image.height - longest_h) // 2
        return image.crop((left, top, image.width - left, image.height - top))

    def _rules(self) -> dict[str, bool]:
        """Field -> whether its value is possible."""
        sizes = isinstance(self.image_size, tuple) and len(self.image_size) == 2
        return {
            "image_size": sizes and all(type(side) is int and 0 < side <= _LARGEST for side in self.image_size),
            "crop_pct": _is_number(self.crop_pct) and 0.01 <= self.crop_pct <= 1,
            "interpolation": self.interpolation in _PIL and (self.antialias or self.interpolation in _TAPS),
            "antialias": type(self.antialias) is bool,
            "crop_rounding": self.crop_rounding in ("round", "floor"),
            "in_channels": type(self.in_channels) is int and self.in_channels in MODES,
            "mean": self._is_per_channel(self.mean),
            "std": self._is_per_channel(self.std) and min(self.std) > 0,
        }

    def _is_per_channel(self, values: Any) -> bool:
        return isinstance(values, tuple) and len(values) == self.in_channels and all(map(_is_number, values))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _three_axes(array: np.ndarray) -> np.ndarray:
    return array if array.ndim == 3 else array[:, :, None]


# ---- resizing without antialiasing


def _linear(x: np.ndarray) -> np.ndarray:
    return np.clip(1 - np.abs(x), 0, None)


def _cubic(x: np.ndarray) -> np.ndarray:
    """Keys' kernel with a = -0.75, which torch and OpenCV interpolate with."""
    x = np.abs(x)
    return np.where(x < 1, (1.25 * x - 2.25) * x * x + 1, ((-0.75 * x + 3.75) * x - 6) * x + 3)


_TAPS = {"nearest": (), "bilinear": ((0, 1), _linear), "bicubic": ((-1, 0, 1, 2), _cubic)}


def _interpolated(array: np.ndarray, size: tuple[int, int], interpolation: str) -> np.ndarray:
    """uint8 (H, W) or (H, W, C) -> uint8 (*size, C)"""
    levels = _three_axes(array).astype(np.float64)
    for axis, new in enumerate(size):
        levels = _along(levels, axis, new, interpolation)
    return levels.round().clip(0, 255).astype(np.uint8)


def _along(levels: np.ndarray, axis: int, new: int, interpolation: str) -> np.ndarray:
    old = levels.shape[axis]
    if interpolation == "nearest":
        return levels.take((2 * np.arange(new) + 1) * old // (2 * new), axis)
    taps, kernel = _TAPS[interpolation]
    centers = (np.arange(new) + 0.5) * (old / new) - 0.5
    first = np.floor(centers).astype(np.int64)
    shape = [1] * levels.ndim
    shape[axis] = new
    parts = [
        levels.take(np.clip(first + tap, 0, old - 1), axis) * kernel(centers - first - tap).reshape(shape)
        for tap in taps
    ]
    return np.sum(parts, axis=0)
