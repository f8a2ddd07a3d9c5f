"""The part of augmentation that works on whole batches, on the device: normalise, erase, then mixup or cutmix.

Random erasing is Zhong et al. (arXiv:1708.04896), mixup Zhang et al. (arXiv:1710.09412), cutmix Yun et al.
(arXiv:1905.04899), in the form that MindCV gives them: each image's partner is the one that faces it in the reversed
batch. timm's own classes draw from global generators; here every draw is a function of the `seed` handed in, so that a
resumed run sees what the first one would have. No value is read back from the device.
"""

from __future__ import annotations

import math
import random
import weakref
from typing import TYPE_CHECKING

import numpy as np
import torch

from visformer.data.preprocessing import Preprocessing

if TYPE_CHECKING:
    from visformer.config import TrainConfig

_AT_ONCE = 2  # pairs that a CPU mixes together

Box = tuple[int, int, int, int]  # top, bottom, left, right

# Letters in shapes: B images in a batch, C channels, H height, W width, K classes, E erased images.


class DeviceTransform:
    """uint8 batch -> what the model is trained on.

    `__call__(images, targets, seed=...)`: images uint8 (B, C, H, W) and targets int64 (B,) on one device -> images
    float32 (B, C, H, W) channels_last, and targets: int64 (B,) as given, or float32 (B, K) rows that sum to 1, without
    label smoothing, when mixup or cutmix is on (also for a batch that the draw leaves unmixed). With aug_splits the
    images are (3B, C, H, W), of which the first B stay unerased.
    """

    def __init__(self, config: TrainConfig, num_classes: int) -> None:
        self.preprocessing = Preprocessing.from_config(config)
        self.num_classes = num_classes
        self.erasing = RandomErasing(config, self.preprocessing) if config.re_prob else None
        self.splits = max(config.aug_splits, 1)
        self.mixup = config.mixup
        self.cutmix = config.cutmix
        self.mix_prob = config.cutmix_prob
        self.soft = bool(config.mixup or config.cutmix)
        self._memory = _Memory()

    def __call__(self, images: torch.Tensor, targets: torch.Tensor, *, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        images = self._normalize(images)
        rng = random.Random(seed)
        if self.erasing is not None:
            first = len(images) // self.splits if self.splits > 1 else 0
            self.erasing(images, rng, first)
        if not self.soft:
            return images, targets
        return self._mix(images, targets, rng)

    def _normalize(self, images: torch.Tensor) -> torch.Tensor:
        """`Preprocessing.normalize` to channels_last, bit for bit.

        Pixels lie side by side as (B, H, W * C), so that the statistics broadcast over whole rows and not over the
        innermost three numbers, which a CPU is five times slower at.
        """
        batch, channels, height, width = images.shape
        rows = images.permute(0, 2, 3, 1).reshape(batch, height, width * channels)
        mean, std = (
            torch.tensor(values).repeat(width).to(images.device, non_blocking=True)  # (W * C,)
            for values in (self.preprocessing.mean, self.preprocessing.std)
        )
        normalized = self._memory.empty(rows.shape, images.device).copy_(rows).sub_(mean).div_(std)
        return normalized.view(batch, height, width, channels).permute(0, 3, 1, 2)

    def _mix(
        self, images: torch.Tensor, targets: torch.Tensor, rng: random.Random
    ) -> tuple[torch.Tensor, torch.Tensor]:
        share = 1.0  # of each image itself; its partner has the rest
        if rng.random() < self.mix_prob:
            cut = bool(self.cutmix) and (not self.mixup or rng.random() < 0.5)
            alpha = self.cutmix if cut else self.mixup
            share = rng.betavariate(alpha, alpha)
            if cut:
                top, bottom, left, right = cutmix_box(images.shape[-2], images.shape[-1], share, rng)
                images[:, :, top:bottom, left:right] = images[:, :, top:bottom, left:right].flip(0)
                share = 1 - (bottom - top) * (right - left) / (images.shape[-2] * images.shape[-1])
            else:
                mix_reversed(images, share)
        rows = torch.zeros(len(targets), self.num_classes, device=targets.device)  # (B, K)
        rows.scatter_(1, targets[:, None], 1.0)
        return images, torch.lerp(rows.flip(0), rows, share)


class _Memory:
    """Float batches on a CPU, in memory that is used again once the last tensor on it is gone.

    A batch is tens of megabytes; from the allocator it would be fresh pages each time, and the kernel takes longer to
    hand out those than it takes to normalise the images.
    """

    _KEPT = 2  # free blocks

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []

    def empty(self, shape: torch.Size, device: torch.device) -> torch.Tensor:
        """Uninitialised float32."""
        if device.type != "cpu":
            return torch.empty(shape, device=device)
        size = shape.numel()
        block = next((block for block in self._free if len(block) == size), None)
        if block is None:
            self._free.clear()  # of another size
            block = np.empty(size, np.float32)
        else:
            self._free = [other for other in self._free if other is not block]
        view = block.reshape(shape)  # torch keeps this array as long as any tensor shows its memory
        weakref.finalize(view, self._take_back, block).atexit = False
        return torch.from_numpy(view)

    def _take_back(self, block: np.ndarray) -> None:
        if len(self._free) < self._KEPT:
            self._free.append(block)


def mix_reversed(images: torch.Tensor, share: float) -> None:
    """Mix each image, in place, with 1 - `share` of the one that faces it in the reversed batch.

    From both ends at once, so that half a batch more is all that is needed; on a CPU a few pairs at a time, which its
    caches can hold.
    """
    count = len(images)
    step = _AT_ONCE if images.device.type == "cpu" else max(count, 1)
    for begin in range(0, count // 2, step):
        end = min(begin + step, count // 2)
        front, back = images[begin:end], images[count - end : count - begin]
        pull = (back.flip(0) - front).mul_(1 - share)
        front.add_(pull)
        back.sub_(pull.flip(0))


def cutmix_box(height: int, width: int, share: float, rng: random.Random) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of a box of 1 - `share` of the area around a uniform centre.

    It is cut off at the border, and may be empty.
    """
    side = math.sqrt(1 - share)
    box_h, box_w = int(height * side), int(width * side)
    y, x = rng.randrange(height), rng.randrange(width)
    top, left = max(y - box_h // 2, 0), max(x - box_w // 2, 0)
    return top, min(y + (box_h + 1) // 2, height), left, min(x + (box_w + 1) // 2, width)


class RandomErasing:
    """Fill a random box of each image with probability `re_prob`, in place.

    The box takes `re_scale` of the area at an aspect ratio in `re_ratio`; when no box fits in `re_max_attempts` tries
    the image stays whole.
    """

    def __init__(self, config: TrainConfig, preprocessing: Preprocessing) -> None:
        self.prob = config.re_prob
        self.scale = config.re_scale
        self.log_ratio = (math.log(config.re_ratio[0]), math.log(config.re_ratio[1]))
        self.attempts = config.re_max_attempts
        self.noise = config.re_value if isinstance(config.re_value, str) else None
        level = 0 if self.noise else int(config.re_value)
        # 0 is the mean colour, as in MindCV, which fills after normalising; other levels are pixel values.
        self.fill = [
            (level - m) / s if level else 0.0 for m, s in zip(preprocessing.mean, preprocessing.std, strict=True)
        ]

    def __call__(self, images: torch.Tensor, rng: random.Random, first: int = 0) -> None:
        """Erase in `images`, float32 (B, C, H, W), from image `first` on."""
        height, width = images.shape[2:]
        boxes: dict[int, Box] = {}
        for index in range(first, len(images)):
            box = self.box(height, width, rng) if rng.random() < self.prob else None
            if box is not None:
                boxes[index] = box
        generator = torch.Generator(images.device).manual_seed(rng.getrandbits(63))
        if images.device.type == "cpu":
            self.fill_boxes(images, boxes, generator)
        elif boxes:
            self.fill_together(images, boxes, generator)

    def fill_boxes(self, images: torch.Tensor, boxes: dict[int, Box], generator: torch.Generator) -> None:
        """Fill the box of each image that has one: as little memory as there is to be written, as suits a CPU."""
        colour = torch.tensor(self.fill)[:, None, None]
        for index, (top, bottom, left, right) in boxes.items():
            if self.noise is not None:
                sides = (bottom - top, right - left) if self.noise == "random" else (1, 1)
                colour = torch.randn((images.shape[1], *sides), generator=generator)
            images[index, :, top:bottom, left:right] = colour

    def fill_together(self, images: torch.Tensor, boxes: dict[int, Box], generator: torch.Generator) -> None:
        """The same in a few kernels, however many boxes there are; noise is drawn for whole images."""
        device, (_, channels, height, width) = images.device, images.shape
        index = torch.tensor(list(boxes)).to(device, non_blocking=True)  # (E,)
        sides = torch.tensor(list(boxes.values())).to(device, non_blocking=True)
        top, bottom, left, right = sides[:, :, None].unbind(1)  # (E, 1) each
        rows, columns = (torch.arange(side, device=device) for side in (height, width))
        inside = ((rows >= top) & (rows < bottom))[:, :, None] & ((columns >= left) & (columns < right))[:, None]
        colour = torch.tensor(self.fill).to(device, non_blocking=True)[:, None, None]
        if self.noise is not None:
            size = (height, width) if self.noise == "random" else (1, 1)
            colour = torch.randn((len(boxes), channels, *size), generator=generator, device=device)
        images[index] = torch.where(inside[:, None], colour, images[index])

    def box(self, height: int, width: int, rng: random.Random) -> tuple[int, int, int, int] | None:
        """(top, bottom, left, right) of a box smaller than the image on both sides, or None when no try fits."""
        for _ in range(self.attempts):
            area = rng.uniform(*self.scale) * height * width
            ratio = math.exp(rng.uniform(*self.log_ratio))
            box_h, box_w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < box_h < height and 0 < box_w < width:
                top, left = rng.randint(0, height - box_h), rng.randint(0, width - box_w)
                return top, top + box_h, left, left + box_w
        return None
