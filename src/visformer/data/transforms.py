"""What a training image goes through before it is batched: random resized crop, flips, then a policy or colour jitter.

The crop is drawn from the image's size alone, so that an encoded image is decoded only as finely as its crop needs.
Everything stays 8-bit until the end; normalisation, erasing and mixing are done batch-wise on the device (mixing.py).
The transform draws from `random` and, only where the policy does, from numpy's and torch's global generators: `seed`
sets just those, because seeding all three would cost more than cropping a small image.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image

from visformer.data import image_ops
from visformer.data.encoded import Encoded
from visformer.data.policies import build_policy
from visformer.data.preprocessing import PIL_RESAMPLING, for_channels

if TYPE_CHECKING:
    from visformer.config import TrainConfig

_MASK = (1 << 64) - 1


def mix_seed(*parts: int) -> int:
    """A seed of 63 bits from whole numbers such as (seed, epoch, index); SplitMix64 makes neighbours unrelated."""
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


class Placing(NamedTuple):
    """Where a training image comes from: `box` (left, top, width, height) in pixels, how it is resampled, and then
    whether it is mirrored and turned upside down."""

    box: tuple[int, int, int, int]
    resampling: Image.Resampling
    mirrored: bool
    upside_down: bool


class TrainTransform:
    """An image of `in_channels` -> uint8 (C, H, W), a view of (H, W, C) memory; with aug_splits, (splits, C, H, W),
    clean first.

    The image is a PIL image, an `Encoded` file, or pixels as a uint8 (H, W, C) array.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.size = (config.image_size[0], config.image_size[1])
        self.scale = (config.scale[0], config.scale[1])
        self.ratio = (config.ratio[0], config.ratio[1])
        names = ("bilinear", "bicubic") if config.interpolation == "random" else (config.interpolation,)
        self.resampling = [PIL_RESAMPLING[name] for name in names]
        self.hflip = config.hflip
        self.vflip = config.vflip
        self.splits = config.aug_splits
        policy = build_policy(
            config.auto_augment,
            image_size=self.size,
            mean=for_channels(config.mean, config.in_channels, "mean"),
            interpolation=config.interpolation,
            channels=config.in_channels,
        )
        self.policy = policy
        # `none` switches the policy off and leaves the jitter, as no policy at all does.
        self.jitter = ColorJitter(config.color_jitter) if policy is None and config.color_jitter else None
        self.colour = policy.apply if policy else self.jitter
        self.uses_numpy = policy is not None and policy.numpy
        self.uses_torch = policy is not None and policy.torch

    def seed(self, seed: int) -> None:
        """Make the next call a function of `seed` (63 bits) and the image."""
        random.seed(seed)
        if self.uses_numpy:
            np.random.seed(seed & 0xFFFFFFFF)
        if self.uses_torch:
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the accelerators as well

    def __call__(self, image: Image.Image | Encoded | np.ndarray) -> torch.Tensor:
        pixels = self.crop_and_flip(image)
        if not self.splits:
            return _tensor(self.colour(pixels) if self.colour else pixels)
        copies = [pixels, *(self.colour(pixels) if self.colour else pixels for _ in range(self.splits - 1))]
        return torch.stack([_tensor(copy) for copy in copies])

    def crop_and_flip(self, image: Image.Image | Encoded | np.ndarray) -> np.ndarray:
        """The part of the transform that moves pixels: an image -> uint8 (H, W, C) of the model's size."""
        return self.placed(image, self.draw_placing(*size_of(image)))

    def draw_placing(self, width: int, height: int) -> Placing:
        """Draw where an image of that size is cropped, and how it is resized and flipped."""
        box = draw_crop(width, height, self.scale, self.ratio)
        resampling = self.resampling[0] if len(self.resampling) == 1 else random.choice(self.resampling)
        mirrored = bool(self.hflip) and random.random() < self.hflip
        return Placing(box, resampling, mirrored, bool(self.vflip) and random.random() < self.vflip)

    def placed(self, image: Image.Image | Encoded | np.ndarray, placing: Placing) -> np.ndarray:
        """An image -> uint8 (H, W, C) of the model's size, as `placing` says."""
        pixels = self._resized(image, placing.box, placing.resampling)
        if placing.mirrored:
            pixels = image_ops.flip(pixels, 1)
        return image_ops.flip(pixels, 0) if placing.upside_down else pixels

    def _resized(
        self, image: Image.Image | Encoded | np.ndarray, box: tuple[int, int, int, int], resampling: Image.Resampling
    ) -> np.ndarray:
        left, top, width, height = box
        if isinstance(image, Image.Image):
            cropped = image.crop((left, top, left + width, top + height))
            return image_ops.from_pillow(cropped.resize((self.size[1], self.size[0]), resampling))
        if isinstance(image, Encoded):
            pixels = image.crop(*box, reduction=image.reduction(width, height, self.size))
        else:
            pixels = image[top : top + height, left : left + width].copy()
        return image_ops.resize(pixels, self.size, resampling)


def size_of(image: Image.Image | Encoded | np.ndarray) -> tuple[int, int]:
    """Width and height of an image, pixels."""
    return (image.shape[1], image.shape[0]) if isinstance(image, np.ndarray) else (image.width, image.height)


def draw_crop(
    width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """(left, top, width, height) in pixels of a crop of a share of the area in `scale`, at an aspect ratio in `ratio`.

    Inception's (Szegedy et al., arXiv:1409.4842), drawn number by number as timm and torchvision do; the largest
    centred crop of an allowed ratio when ten tries do not fit.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = random.uniform(*scale) * (width * height)
        aspect = math.exp(random.uniform(low, high))
        crop_w, crop_h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if crop_w <= width and crop_h <= height:
            top = random.randint(0, height - crop_h)
            return random.randint(0, width - crop_w), top, crop_w, crop_h
    crop_w, crop_h = width, height
    if width / height < ratio[0]:
        crop_h = round(width / ratio[0])
    elif width / height > ratio[1]:
        crop_w = round(height * ratio[1])
    return (width - crop_w) // 2, (height - crop_h) // 2, crop_w, crop_h


def _tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)


class ColorJitter:
    """torchvision's ColorJitter(strength, strength, strength) on uint8 (H, W, C) arrays, drawing from `random`.

    Brightness, contrast and saturation, in random order, each by a factor uniform in [max(0, 1 - strength), 1 +
    strength]. Alpha stays.
    """

    _KINDS: Sequence[Callable[[np.ndarray, float], np.ndarray]] = (
        image_ops.brightness,
        image_ops.contrast,
        image_ops.color,
    )

    def __init__(self, strength: float) -> None:
        self.low, self.high = max(0.0, 1 - strength), 1 + strength

    def draw(self) -> list[tuple[Callable[[np.ndarray, float], np.ndarray], float]]:
        """Draw what is done, of `image_ops`, and by which factor."""
        return [(kind, random.uniform(self.low, self.high)) for kind in random.sample(self._KINDS, 3)]

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        colours = np.ascontiguousarray(pixels[:, :, :3])
        for kind, factor in self.draw():
            colours = kind(colours, factor)
        return colours if pixels.shape[2] < 4 else np.concatenate((colours, pixels[:, :, 3:]), axis=2)


def train_transform(config: TrainConfig) -> TrainTransform:
    """The training transform of a configuration. Raises `UsageError` on a policy that does not exist."""
    return TrainTransform(config)
