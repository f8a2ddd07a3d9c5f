"""What a training image goes through before it is batched: random resized crop, flips, then a policy or colour jitter.

Everything stays an 8-bit PIL image until the end; normalisation, erasing and mixing are done batch-wise on the device
(mixing.py). The transform draws from `random` and, only where the policy does, from numpy's and torch's global
generators: `seed` sets just those, because seeding all three would cost more than cropping a small image.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageEnhance
from timm.data.transforms import RandomResizedCropAndInterpolation

from visformer.data.policies import build_policy
from visformer.data.preprocessing import PIL_RESAMPLING, for_channels, image_to_tensor

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


class TrainTransform:
    """PIL image of `in_channels` -> uint8 (C, H, W); with aug_splits, (splits, C, H, W), clean first."""

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
        # `none` switches the policy off and leaves the jitter, as no policy at all does.
        jitter = ColorJitter(config.color_jitter) if policy is None and config.color_jitter else None
        self.colour = policy.apply if policy else jitter
        self.uses_numpy = policy is not None and policy.numpy
        self.uses_torch = policy is not None and policy.torch

    def seed(self, seed: int) -> None:
        """Make the next call a function of `seed` (63 bits) and the image."""
        random.seed(seed)
        if self.uses_numpy:
            np.random.seed(seed & 0xFFFFFFFF)
        if self.uses_torch:
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the accelerators as well

    def __call__(self, image: Image.Image) -> torch.Tensor:
        image = self.crop_and_flip(image)
        if not self.splits:
            return image_to_tensor(self.colour(image) if self.colour else image)
        copies = [image, *(self.colour(image) if self.colour else image for _ in range(self.splits - 1))]
        return torch.stack([image_to_tensor(copy) for copy in copies])

    def crop_and_flip(self, image: Image.Image) -> Image.Image:
        """The part of the transform that moves pixels: PIL image -> PIL image of the model's size."""
        top, left, height, width = RandomResizedCropAndInterpolation.get_params(image, self.scale, self.ratio)
        resampling = self.resampling[0] if len(self.resampling) == 1 else random.choice(self.resampling)
        image = image.crop((left, top, left + width, top + height)).resize((self.size[1], self.size[0]), resampling)
        if self.hflip and random.random() < self.hflip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.vflip and random.random() < self.vflip:
            image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        return image


class ColorJitter:
    """torchvision's ColorJitter(strength, strength, strength) on PIL images, drawing from `random`.

    Brightness, contrast and saturation, in random order, each by a factor uniform in [max(0, 1 - strength), 1 +
    strength].
    """

    _KINDS: Sequence = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)

    def __init__(self, strength: float) -> None:
        self.low, self.high = max(0.0, 1 - strength), 1 + strength

    def __call__(self, image: Image.Image) -> Image.Image:
        for kind in random.sample(self._KINDS, 3):
            image = kind(image).enhance(random.uniform(self.low, self.high))
        return image


def train_transform(config: TrainConfig) -> TrainTransform:
    """The training transform of a configuration. Raises `UsageError` on a policy that does not exist."""
    return TrainTransform(config)
