"""The operations of `image_ops` on batches: each image of a batch with a magnitude of its own, on any device.

Images are uint8 (N, C, H, W) with 1 or 3 channels, and come back as new tensors of that shape. Arithmetic follows
`image_ops` step by step, so that the levels are the same, or differ by one where the order of a sum does. No value is
read back from the device.

Letters in shapes: N images, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from visformer.data.device_resize import box_weights, gaussian_radii, weighted


def levels(images: Tensor, tables: Tensor) -> Tensor:
    """Look up each level in its image's table, uint8 (N, 256)."""
    return _looked_up(images, tables[:, None].expand(-1, images.shape[1], -1))


def contrast(images: Tensor, factors: Tensor) -> Tensor:
    """Blend with the grey of each image's mean lightness; `factors` (N,)."""
    mean = grey(images).flatten(1).double().mean(1).add_(0.5).floor_().float()
    return _blended(mean[:, None, None, None], images, factors)


def color(images: Tensor, factors: Tensor) -> Tensor:
    """Blend with the image in grey; `factors` (N,)."""
    return _blended(grey(images).float(), images, factors) if images.shape[1] > 1 else images.clone()


def sharpness(images: Tensor, factors: Tensor) -> Tensor:
    """Blend with a blurred copy; `factors` (N,)."""
    near = images.float()
    across = near[..., :-2] + near[..., 1:-1] + near[..., 2:]
    total = across[:, :, :-2] + across[:, :, 1:-1] + across[:, :, 2:] + 4 * near[:, :, 1:-1, 1:-1]
    blurred = near.clone()  # the border stays
    blurred[:, :, 1:-1, 1:-1] = ((2 * total + 13) / 26).floor_()
    return _blended(blurred, images, factors)


def blur(images: Tensor, deviations: Sequence[float]) -> Tensor:
    """Gaussian blur as Pillow has it: three box filters along each axis; standard deviations in pixels."""
    radii = torch.tensor(gaussian_radii(deviations), dtype=torch.float64).to(images.device, non_blocking=True)
    for axis in (3, 2):
        weights = box_weights(radii, images.shape[axis])
        for _ in range(3):
            images = weighted(images, weights, axis)
    return images


def auto_contrast(images: Tensor) -> Tensor:
    """Stretch the levels of each channel to the full range."""
    flat = images.flatten(2)
    low, high = (extreme.double()[:, :, None] for extreme in (flat.amin(2), flat.amax(2)))
    ramp = torch.arange(256, device=images.device, dtype=torch.float64)
    scale = torch.full_like(low, 255.0) / (high - low)  # a plain number would be multiplied by the rounded reciprocal
    stretched = (ramp * scale + -low * scale).trunc_().clamp_(0, 255)  # (N, C, 256)
    return _looked_up(images, torch.where(high > low, stretched, ramp).to(torch.uint8))


def equalize(images: Tensor) -> Tensor:
    """Spread the levels of each channel so that each is about as frequent."""
    index = images.flatten(2).long()
    counts = torch.zeros((*images.shape[:2], 256), dtype=torch.int64, device=images.device)
    counts.scatter_add_(2, index, torch.ones_like(index))
    ramp = torch.arange(256, device=images.device)
    top = torch.where(counts > 0, ramp, 0).amax(2, keepdim=True)  # the highest level that there is
    upto = counts.cumsum(2)
    step = (upto[:, :, -1:] - counts.gather(2, top)) // 255
    spread = ((step // 2 + upto - counts) // step.clamp(min=1)).clamp_(max=255)
    return _looked_up(images, torch.where(step > 0, spread, ramp).to(torch.uint8))


def affine(images: Tensor, matrices: Tensor, fill: Tensor, filter: str) -> Tensor:
    """Pixel (x, y) of the result shows (a x + b y + c, d x + e y + f) of its image; see `image_ops.affine`.

    `matrices` float64 (N, 6), `fill` uint8 (C,) for what shows no pixel, `filter` nearest, bilinear or bicubic.
    """
    height, width = images.shape[2:]
    source = images.float()
    if filter != "nearest":
        source.add_(1 / 64)  # fractions are cut off below; this keeps rounding errors from costing a whole level
    grid = _origins(matrices, height, width)
    moved = grid_sample(source, grid, filter, "border", align_corners=False).clamp_(0, 255).to(torch.uint8)
    outside = _outside(matrices, height, width)[:, None]
    return torch.where(outside, fill[None, :, None, None], moved)


def grey(images: Tensor) -> Tensor:
    """Lightness by ITU-R 601 as Pillow rounds it, int32 (N, 1, H, W)."""
    if images.shape[1] == 1:
        return images.int()
    red, green, blue = images.int().split(1, dim=1)
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


def mixed(images: Tensor, branches: list[Tensor], weights: Tensor, shares: Tensor) -> Tensor:
    """AugMix: the branches' weighted sum, of which `shares` (N,) goes into the image; `weights` (N, branches)."""
    total = torch.zeros(images.shape, device=images.device)
    for branch, weight in zip(branches, weights.unbind(1), strict=True):
        total += weight[:, None, None, None] * branch.float()
    return _blended(images.float(), total.clamp_(0, 255).to(torch.uint8), shares)


def overlaid(images: Tensor, branches: list[Tensor], weights: Tensor) -> Tensor:
    """AugMix as timm blends it: one branch after another over the image; `weights` (N, branches)."""
    for branch, weight in zip(branches, weights.unbind(1), strict=True):
        images = _blended(images.float(), branch, weight)
    return images


def _blended(base: Tensor, images: Tensor, factors: Tensor) -> Tensor:
    """base + factor * (image - base), clipped, the fraction cut off as Pillow does."""
    pull = (images.float() - base).mul_(factors[:, None, None, None])
    return pull.add_(base).clamp_(0, 255).to(torch.uint8)


def _looked_up(images: Tensor, tables: Tensor) -> Tensor:
    """Levels through `tables`, uint8 (N, C, 256)."""
    return tables.gather(2, images.flatten(2).long()).view(images.shape)


def _origins(matrices: Tensor, height: int, width: int) -> Tensor:
    """Where each pixel comes from: float32 (N, H, W, 2) of x and y, -1 to 1 across the image."""
    a, b, c, d, e, f = (number[:, None] for number in matrices.unbind(1))  # (N, 1)
    columns, rows = (torch.arange(side, device=matrices.device) + 0.5 for side in (width, height))
    along = torch.stack(((a * columns + c) * (2 / width) - 1, (d * columns + f) * (2 / height) - 1), 2)  # (N, W, 2)
    down = torch.stack((b * rows * (2 / width), e * rows * (2 / height)), 2)  # (N, H, 2)
    return along.float()[:, None] + down.float()[:, :, None]


def _outside(matrices: Tensor, height: int, width: int) -> Tensor:
    """Which pixels show nothing of their image, bool (N, H, W): in each row, those before and after a stretch."""
    a, b, c, d, e, f = (number[:, None] for number in matrices.unbind(1))  # (N, 1)
    rows = torch.arange(height, device=matrices.device) + 0.5
    first = torch.full((len(matrices), height), -torch.inf, dtype=torch.float64, device=matrices.device)
    last = -first
    for step, start, side in ((a, b * rows + c, width), (d, e * rows + f, height)):  # 0 <= step x + start < side
        begin, end = -start / step, (side - start) / step
        still = torch.where((start >= 0) & (start < side), last, -torch.inf)
        first = torch.where(step == 0, first, first.maximum(begin.minimum(end)))
        last = torch.where(step == 0, still, last.minimum(begin.maximum(end)))
    columns = torch.arange(width, dtype=torch.float32, device=matrices.device) + 0.5
    return (columns < first.float()[:, :, None]) | (columns >= last.float()[:, :, None])
