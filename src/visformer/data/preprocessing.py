"""What happens to an image before the model sees it at inference; it travels in the checkpoint.

Resize so that the short side is floor(size / crop_pct), cut the centre, normalise. The details that differ between the
published pipelines (antialiasing, the rounding of the crop's offset) are fields, because a checkpoint's accuracy
depends on them: torchvision and timm antialias and round half to even, MindCV does neither.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image

from visformer.config import IMAGENET_MEAN, IMAGENET_STD
from visformer.data.decode import MODES, Box, Resized, to_mode
from visformer.errors import UsageError, nearest

if TYPE_CHECKING:
    from visformer.config import TrainConfig

PIL_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_TORCH_MODES = {"nearest": "nearest-exact", "bilinear": "bilinear", "bicubic": "bicubic"}
_LONGEST = 16  # the resized image is at most this many crops long; a 1 x 10000 strip would need gigabytes


@dataclass(frozen=True)
class Preprocessing:
    """Image to model input. `image_size` is (height, width), pixels; `mean` and `std` are per channel, 0-255 scale."""

    image_size: tuple[int, int]
    crop_pct: float = 0.875
    interpolation: str = "bicubic"
    antialias: bool = True
    crop_rounding: Literal["round", "floor"] = "round"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    in_channels: int = 3

    def __post_init__(self) -> None:
        for name, problem in _problems(self):
            raise UsageError(f"preprocessing: {name}: {getattr(self, name)!r} {problem}")

    @classmethod
    def from_config(cls, config: TrainConfig) -> Preprocessing:
        """The preprocessing that goes with a training run: antialiased, `random` interpolation becoming bilinear."""
        height, width = config.image_size
        return cls(
            image_size=(height, width),
            crop_pct=config.crop_pct,
            interpolation="bilinear" if config.interpolation == "random" else config.interpolation,
            mean=for_channels(config.mean, config.in_channels, "mean"),
            std=for_channels(config.std, config.in_channels, "std"),
            in_channels=config.in_channels,
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocessing:
        """The inverse of `to_dict`. Raises `UsageError` on an unknown or missing key or a value out of range."""
        names = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in names:
                raise UsageError(
                    f"preprocessing: unknown key {key!r}{nearest(key, names)}; the keys are {', '.join(names)}"
                )
        for name in names:
            if name not in values:
                raise UsageError(f"preprocessing: key {name!r} is missing; the keys are {', '.join(names)}")
        fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """A dictionary of plain JSON values."""
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(self).items()
        }

    def __call__(self, image: Image.Image, box: Box | None = None) -> torch.Tensor:
        """PIL image of any mode and size -> uint8 (C, H, W) in [0, 255], a view of (H, W, C) memory.

        `box` is the part of it that is the picture, as `open_reduced` gives it.
        """
        image = to_mode(image, self.in_channels)
        if box is not None:
            return self._of_part(image, box)
        image = _at_most(image, self.image_size)
        size = self.resized(image.height, image.width)
        top, left = self._offset(size)
        height, width = self.image_size
        if not self.antialias:
            return _resize_tensor(image, size, self.interpolation)[:, top : top + height, left : left + width]
        if size != (image.height, image.width):
            image = image.resize((size[1], size[0]), PIL_RESAMPLING[self.interpolation])
        return image_to_tensor(image.crop((left, top, left + width, top + height)))

    def _of_part(self, image: Image.Image, box: Box) -> torch.Tensor:
        size = self.resized(box[3] - box[1], box[2] - box[0])
        (top, left), (height, width) = self._offset(size), self.image_size
        image = image.resize((size[1], size[0]), PIL_RESAMPLING[self.interpolation], box)
        return image_to_tensor(image.crop((left, top, left + width, top + height)))

    def resized(self, height: float, width: float) -> tuple[int, int]:
        """(height, width) to which an image of that size is resized: it just covers floor(image_size / crop_pct)."""
        cover_h, cover_w = (math.floor(side / self.crop_pct) for side in self.image_size)
        if cover_h * width >= cover_w * height:
            return cover_h, int(cover_h * width / height)
        return int(cover_w * height / width), cover_w

    @property
    def reduces(self) -> Resized | None:
        """`resized`, for `open_reduced`, where decoding a photograph at a fraction of its size gives nearly the same
        pixels; None where each pixel of the result is taken from few."""
        return self.resized if self.antialias and self.interpolation != "nearest" else None

    def normalize(self, batch: torch.Tensor) -> torch.Tensor:
        """uint8 (B, C, H, W) on any device -> float32 (B, C, H, W), (batch - mean) / std; the memory format is kept."""
        mean, std = _statistics(self.mean, self.std, batch.device)
        return torch.sub(batch, mean).div_(std)

    def _offset(self, size: tuple[int, int]) -> tuple[int, int]:
        spare = size[0] - self.image_size[0], size[1] - self.image_size[1]
        if self.crop_rounding == "floor":
            return spare[0] // 2, spare[1] // 2
        return round(spare[0] / 2), round(spare[1] / 2)


def image_to_tensor(image: Image.Image) -> torch.Tensor:
    """8-bit PIL image (L, RGB, RGBA) -> uint8 (C, H, W), a view of its own (H, W, C) memory."""
    array = np.array(image)
    return torch.from_numpy(array if array.ndim == 3 else array[:, :, None]).permute(2, 0, 1)


def for_channels(values: Sequence[float], channels: int, name: str) -> tuple[float, ...]:
    """Statistics fit for `channels`: one value is repeated, RGB's are averaged for grey, alpha gets half the scale.

    Raises `UsageError`, calling them `name`, when they can't be fitted.
    """
    values = tuple(float(value) for value in values)
    if len(values) == channels:
        return values
    if len(values) == 1:
        return values * channels
    if len(values) == 3 and channels == 1:
        return (sum(values) / 3,)
    if len(values) == 3 and channels == 4:
        return (*values, 127.5)
    raise UsageError(f"{name}: {len(values)} values do not fit {channels} channels; give {channels} or 1")


def _problems(p: Preprocessing):
    """(field, rule it breaks) for each field that is out of range."""
    sizes = isinstance(p.image_size, tuple) and len(p.image_size) == 2
    if not (sizes and all(isinstance(side, int) and side > 0 for side in p.image_size)):
        yield "image_size", "must be two whole numbers above 0, height and width"
    if not (isinstance(p.crop_pct, (int, float)) and 0 < p.crop_pct <= 1):
        yield "crop_pct", "must be above 0 and at most 1"
    if p.interpolation not in PIL_RESAMPLING:
        yield "interpolation", f"must be one of {', '.join(PIL_RESAMPLING)}"
    if not isinstance(p.antialias, bool):
        yield "antialias", "must be true or false"
    if not p.antialias and p.interpolation not in _TORCH_MODES:
        yield "interpolation", f"needs antialias; without it use one of {', '.join(_TORCH_MODES)}"
    if p.crop_rounding not in ("round", "floor"):
        yield "crop_rounding", "must be round or floor"
    if p.in_channels not in MODES:
        yield "in_channels", "must be 1, 3 or 4"
    for name in ("mean", "std"):
        values = getattr(p, name)
        if not (
            isinstance(values, tuple)
            and len(values) == p.in_channels
            and all(isinstance(v, (int, float)) for v in values)
        ):
            yield name, f"must be {p.in_channels} numbers on the 0-255 scale"
        elif name == "std" and min(values) <= 0:
            yield name, "must be above 0"


def _at_most(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The image, or the middle of a strip so long that resizing all of it would exhaust memory."""
    height, width = size
    longest_w = math.ceil(_LONGEST * image.height * width / height)
    longest_h = math.ceil(_LONGEST * image.width * height / width)
    if image.width <= longest_w and image.height <= longest_h:
        return image
    left, top = max(0, image.width - longest_w) // 2, max(0, image.height - longest_h) // 2
    return image.crop((left, top, image.width - left, image.height - top))  # as much off either end: same middle


def _resize_tensor(image: Image.Image, size: tuple[int, int], interpolation: str) -> torch.Tensor:
    """Resize without antialiasing, to within one level of MindSpore's: uint8 (C, H, W)."""
    pixels = image_to_tensor(image)
    if tuple(pixels.shape[1:]) == size:
        return pixels
    corners = None if interpolation == "nearest" else False
    resized = torch.nn.functional.interpolate(
        pixels[None].float(), size=size, mode=_TORCH_MODES[interpolation], align_corners=corners, antialias=False
    )
    return resized[0].round_().clamp_(0, 255).to(torch.uint8)


@functools.lru_cache(maxsize=64)
def _statistics(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation as (C, 1, 1) tensors, copied to the device once."""
    with torch.inference_mode(False):  # they outlive the caller's mode
        first, second = (
            torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1) for values in (mean, std)
        )
    return first, second
