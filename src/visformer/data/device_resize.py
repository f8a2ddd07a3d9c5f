"""Resizing many crops of different sizes at once, with Pillow's antialiasing, on any device.

Resizing is linear along each axis: each row of the result is a weighted sum of rows. So a batch is two batched matrix
products, columns first and then rows, with weights of its own for each image and zeros where a smaller crop was padded.
Kernels, their widening when shrinking (antialiasing) and the rounding to levels after each of the two passes follow
Pillow's `ImagingResample`, so that the levels are those of `image_ops.resize` but for the last one now and then.

The same two products blur: `box_weights` are Pillow's extended box filter, of which three make its Gaussian.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

# Letters in shapes: N crops, C channels, H x W of the result, h x w of the largest crop.

AT_ONCE = 16_000_000  # pixels of padded crops that are resized together; as float32 RGB, 192 MB


def _triangle(x: Tensor) -> Tensor:
    return (1 - x).clamp_(min=0)


def _cubic(x: Tensor) -> Tensor:
    """Keys' kernel with a = -0.5."""
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def _lanczos(x: Tensor) -> Tensor:
    return torch.where(x < 3, torch.sinc(x) * torch.sinc(x / 3), 0.0)


# Name -> kernel of the distance in pixels, and how far it reaches.
_KERNELS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "bilinear": (_triangle, 1.0),
    "bicubic": (_cubic, 2.0),
    "lanczos": (_lanczos, 3.0),
}


def resize_crops(crops: Sequence[Tensor], size: tuple[int, int], filters: Sequence[str]) -> Tensor:
    """uint8 crops (C, any, any) on one device -> uint8 (N, C, H, W), each by the filter that `filters` names: nearest,
    bilinear, bicubic or lanczos, antialiased. `size` is (H, W)."""
    first = crops[0]
    resized = torch.empty((len(crops), first.shape[0], *size), dtype=torch.uint8, device=first.device)
    for name in sorted(set(filters)):
        for places in _together([i for i, f in enumerate(filters) if f == name], crops):
            index = torch.tensor(places).to(first.device, non_blocking=True)
            resized[index] = _resize([crops[place] for place in places], size, name)
    return resized


def _together(places: list[int], crops: Sequence[Tensor]) -> Iterator[list[int]]:
    """Places in groups of about equal size, which are not much larger when padded."""
    group: list[int] = []
    height = width = 0
    for place in sorted(places, key=lambda i: (crops[i].shape[1] * crops[i].shape[2], i)):
        height, width = max(height, crops[place].shape[1]), max(width, crops[place].shape[2])
        if group and (len(group) + 1) * height * width > AT_ONCE:
            yield group
            group, (height, width) = [], crops[place].shape[1:]
        group.append(place)
    if group:
        yield group


def _resize(crops: list[Tensor], size: tuple[int, int], filter: str) -> Tensor:
    sides = torch.tensor([crop.shape[1:] for crop in crops])  # (N, 2) of height and width
    height, width = sides.amax(0).tolist()
    padded = torch.zeros((len(crops), crops[0].shape[0], height, width), dtype=torch.uint8, device=crops[0].device)
    for row, crop in zip(padded, crops, strict=True):
        row[:, : crop.shape[1], : crop.shape[2]] = crop
    sides = sides.to(padded.device, non_blocking=True)
    down, across = (resize_weights(sides[:, axis], size[axis], (height, width)[axis], filter) for axis in (0, 1))
    return weighted(weighted(padded, across, axis=3), down, axis=2)


def weighted(images: Tensor, weights: Tensor, axis: int) -> Tensor:
    """uint8 (N, C, h, w) -> uint8 with one axis replaced: 3 by the columns, 2 by the rows, that `weights` (N, out, in)
    give. Sums are rounded, halves upwards, and clipped."""
    images = images.float()
    if axis == 3:
        batch, channels, height, width = images.shape
        sums = torch.bmm(images.reshape(batch, channels * height, width), weights.transpose(1, 2))
        sums = sums.view(batch, channels, height, -1)
    else:
        sums = torch.matmul(weights[:, None], images)
    return sums.add_(0.5).floor_().clamp_(0, 255).to(torch.uint8)


def resize_weights(sides: Tensor, out: int, longest: int, filter: str) -> Tensor:
    """float32 (N, out, longest): how much of each pixel along a side goes into each of `out`, rows that sum to 1.

    `sides` int64 (N,) are the crops' own lengths, at most `longest`; what lies beyond has weight 0.
    """
    scale = (sides.to(torch.float64) / out)[:, None, None]  # (N, 1, 1), float64 as places are in Pillow
    centres = (torch.arange(out, device=sides.device) + 0.5)[None, :, None] * scale  # (N, out, 1)
    pixels = torch.arange(longest, device=sides.device)  # (longest,)
    inside = pixels < sides[:, None, None]
    if filter == "nearest":
        return (pixels == centres.floor()).float()
    kernel, reach = _KERNELS[filter]
    wider = scale.clamp(min=1.0)
    distances = ((pixels + 0.5 - centres) / wider).abs_().float()
    weights = torch.where(inside & (distances < reach), kernel(distances), 0.0)
    return weights / weights.sum(2, keepdim=True)


@functools.lru_cache(maxsize=8)
def _offsets(side: int) -> Tensor:
    """int64 (side, side): how far column k lies from row i."""
    places = torch.arange(side)
    return (places[None] - places[:, None]).abs_()


def box_weights(radii: Tensor, side: int) -> Tensor:
    """float32 (N, side, side): a mean over the pixels within `radii` float64 (N,), of which the fraction counts for the
    outermost; beyond the edge lie copies of the edge."""
    whole = radii.floor()[:, None, None]
    part = radii[:, None, None] - whole
    away = _offsets(side).to(radii.device, non_blocking=True)[None]
    weights = torch.where(away <= whole, 1.0, torch.where(away == whole + 1, part, 0.0))
    before = torch.arange(side, device=radii.device)[None]  # pixels between a row's own and the one edge
    weights[:, :, 0] += _beyond(before, whole[:, :, 0], part[:, :, 0])
    weights[:, :, -1] += _beyond(side - 1 - before, whole[:, :, 0], part[:, :, 0])
    return (weights / (2 * radii + 1)[:, None, None]).float()


def _beyond(room: Tensor, whole: Tensor, part: Tensor) -> Tensor:
    """How many pixels of one side of a box lie further out than `room` of them."""
    return torch.where(room > whole, 0.0, (whole - room).clamp(min=0) + part)


def gaussian_radii(deviations: Sequence[float], passes: int = 3) -> list[float]:
    """Radii of the box filters of which `passes` make about a Gaussian of these standard deviations, in pixels.

    Gwosdek et al., Theoretical Foundations of Gaussian Convolution by Extended Box Filtering (SSVM 2011).
    """
    radii = []
    for deviation in deviations:
        variance = deviation * deviation / passes
        whole = math.floor((math.sqrt(12 * variance + 1) - 1) / 2)
        part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
        radii.append(whole + part)
    return radii
