"""The preprocessing as a graph: one decoded image of any size in, one normalised input of the model out.

The same numbers as `Preprocessing`, built from operations that every runtime computes alike. A resize is two matrix
products, one for each axis, whose weights are computed in the graph from the image's size: the kernel's value at each
distance, divided by their sum. Only the rows and columns that the centre crop keeps are computed. What Pillow does
between the lines is done here too (Pillow 13, `src/libImaging/Resample.c`): weights of 22 bits, and whole levels after
each of the two passes. Weights are in double precision, and the products of whole numbers without an error, so the
levels are Pillow's own; a runtime that computes doubles in fp32, as OpenVINO does, is one level off in some pixels of
ten thousand. Without antialiasing torch's fp32 is followed to the same extent.

The sides of an image may be up to 65,535 pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visformer.data.preprocessing import Preprocessing
from visformer.errors import UsageError

Whole = Any  # an int, or while the graph is traced what stands for one (torch.SymInt)
_STEPS = 2048.0  # Pillow's weights are whole numbers, of which 2048 ** 2 are 1
LONGEST = 16  # as in `Preprocessing`: of a longer strip, the middle
_GREY = (19595.0, 38470.0, 7471.0)  # of 65,536: ITU-R 601-2 as Pillow rounds it


@dataclass(frozen=True)
class Kernel:
    """A resampling kernel: zero from `radius` on, in samples of the coarser grid."""

    radius: int
    weigh: Callable[[Tensor], Tensor]


def _triangle(x: Tensor) -> Tensor:
    return (1 - x).clamp(min=0)


def _cubic(a: float) -> Callable[[Tensor], Tensor]:
    """Keys' kernel: Pillow antialiases with a = -0.5, torch interpolates with a = -0.75."""

    def weigh(x: Tensor) -> Tensor:
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
        return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))

    return weigh


def _lanczos(x: Tensor) -> Tensor:
    angle = math.pi * x.clamp(min=1e-6)
    value = 3 * torch.sin(angle) * torch.sin(angle / 3) / (angle * angle)
    return torch.where(x < 1e-6, torch.ones_like(x), torch.where(x < 3, value, torch.zeros_like(x)))


CUBIC = Kernel(2, _cubic(-0.5))
_ANTIALIASED = {"bilinear": Kernel(1, _triangle), "bicubic": CUBIC, "lanczos": Kernel(3, _lanczos)}
_POINTWISE = {"bilinear": Kernel(1, _triangle), "bicubic": Kernel(2, _cubic(-0.75))}


class ImageGraph(nn.Module):
    """uint8 (H, W, 1 to 4) of any size -> float32 (1, in_channels, height, width), normalised.

    One channel is grey, two grey and alpha, three RGB, four RGB and alpha; what is transparent shows white, as
    `open_image` gives it. Raises `UsageError` for a model of four channels.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, preprocessing: Preprocessing):
        super().__init__()
        if preprocessing.in_channels not in _CHANNELS:
            raise UsageError(f"input: a model of {preprocessing.in_channels} channels takes --input tensor, not image")
        self.size = preprocessing.image_size
        self.cover = tuple(math.floor(side / preprocessing.crop_pct) for side in self.size)
        self.round_offset = preprocessing.crop_rounding == "round"
        self.to_channels = _CHANNELS[preprocessing.in_channels]
        self.resize = _resize_of(preprocessing)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(getattr(preprocessing, name), dtype=torch.float32).view(-1, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        """uint8 (H, W, channels) -> float32 (1, in_channels, height, width)"""
        planes = self.to_channels(image.permute(2, 0, 1).float())  # (in_channels, H, W)
        rows, columns = self.axes(image.shape[0], image.shape[1])
        levels = self.resize(planes, rows, columns)  # (in_channels, height, width), whole numbers in [0, 255]
        return ((levels - self.mean) / self.std)[None]

    def axes(self, height: Whole, width: Whole) -> tuple[Axis, Axis]:
        """Which samples of an image of that size stand behind each row and column of the result."""
        (crop_h, crop_w), (cover_h, cover_w) = self.size, self.cover
        longest_h = (LONGEST * crop_h * width + crop_w - 1) // crop_w
        longest_w = (LONGEST * crop_w * height + crop_h - 1) // crop_h
        skip_h, skip_w = torch.sym_max(height - longest_h, 0) // 2, torch.sym_max(width - longest_w, 0) // 2
        height, width = height - 2 * skip_h, width - 2 * skip_w
        resized_h = torch.sym_max(cover_h, cover_w * height // width)
        resized_w = torch.sym_max(cover_w, cover_h * width // height)
        return (
            Axis(skip_h, height, resized_h, self._offset(resized_h - crop_h), crop_h),
            Axis(skip_w, width, resized_w, self._offset(resized_w - crop_w), crop_w),
        )

    def _offset(self, spare: Whole) -> Whole:
        half = spare // 2
        is_odd, half_is_odd = spare - 2 * half, half - 2 * (half // 2)
        return half + is_odd * half_is_odd if self.round_offset else half  # Python's round: half to even


@dataclass(frozen=True)
class Axis:
    """One axis of a resize: samples `skip` to `skip + length` become `resized`, of which `count` from `offset` on stay.

    All but `count` are known only when the graph runs, so there is no branching on them. The matrices are (count,
    samples), float64, for an image of `samples` along this axis; their rows sum to 1.
    """

    skip: Whole
    length: Whole
    resized: Whole
    offset: Whole
    count: int

    def antialiased(self, kernel: Kernel, samples: int) -> Tensor:
        """The kernel is as wide as the coarser of the two grids asks; samples beyond the ends count nothing."""
        inputs = torch.arange(samples)[None, :] - self.skip
        coarser: Whole = torch.sym_max(self.length, self.resized)
        weights = kernel.weigh(self._distances(inputs) / (2 * coarser))
        weights = _where((inputs >= 0) & (inputs < self.length), weights)
        return weights / weights.sum(1, keepdim=True)

    def pointwise(self, kernel: Kernel, samples: int) -> Tensor:
        """The kernel spans neighbouring samples; the first and the last also stand for those beyond them."""
        border = kernel.radius
        inputs = torch.arange(-border, samples + border)[None, :] - self.skip
        weights = kernel.weigh(self._distances(inputs) / (2 * self.resized))
        before = _where(inputs < 0, weights).sum(1, keepdim=True)
        after = _where(inputs >= self.length, weights).sum(1, keepdim=True)
        within = _where((inputs >= 0) & (inputs < self.length), weights)
        ends = _where(inputs == 0, before) + _where(inputs == self.length - 1, after)
        return (within + ends)[:, border:-border]

    def nearest(self, samples: int) -> Tensor:
        """The sample that holds each output's centre."""
        inputs = torch.arange(samples)[None, :] - self.skip
        return (inputs == (2 * self._outputs() + 1) * self.length // (2 * self.resized)).double()

    def _outputs(self) -> Tensor:
        return torch.arange(self.count)[:, None] + self.offset

    def _distances(self, inputs: Tensor) -> Tensor:
        """(count, inputs): how far the centres lie apart, in units of a sample / (2 * resized); exact where near."""
        return ((2 * inputs + 1) * self.resized - (2 * self._outputs() + 1) * self.length).abs().double()


Resize = Callable[[Tensor, Axis, Axis], Tensor]  # levels (C, H, W) -> levels (C, height, width)


def _resize_of(preprocessing: Preprocessing) -> Resize:
    if preprocessing.interpolation == "nearest":
        return _nearest
    kernels, resize = (_ANTIALIASED, _like_pillow) if preprocessing.antialias else (_POINTWISE, _like_torch)
    return partial(resize, kernels[preprocessing.interpolation])


def _like_pillow(kernel: Kernel, planes: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """Antialiased; along the columns first, and whole levels after each pass."""
    height, width = planes.shape[1:]
    planes = _exactly(lambda weights: planes @ weights.T, columns.antialiased(kernel, width))  # (C, H, width)
    return _exactly(lambda weights: weights @ planes, rows.antialiased(kernel, height))  # (C, height, width)


def _exactly(product: Callable[[Tensor], Tensor], weights: Tensor) -> Tensor:
    """Levels times weights that are rounded to 22 bits, rounded half up; without an error in fp32.

    The weights are split into high and low digits to the base 2048: either product is a whole number below 2 ** 24.
    """
    weights = (weights * _STEPS**2 + 0.5).floor().float()
    high_digits = (weights / _STEPS + 0.5).floor()
    high, low = product(high_digits), product(weights - high_digits * _STEPS)
    whole = (high / _STEPS).floor()
    rest = ((high - whole * _STEPS) * _STEPS + low) / _STEPS**2
    return (whole + (rest + 0.5).floor()).clamp(0, 255)


def _like_torch(kernel: Kernel, planes: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """Not antialiased; rounded once, at the end, half to even."""
    height, width = planes.shape[1:]
    planes = rows.pointwise(kernel, height).float() @ (planes @ columns.pointwise(kernel, width).float().T)
    return planes.round().clamp(0, 255)


def _nearest(planes: Tensor, rows: Axis, columns: Axis) -> Tensor:
    height, width = planes.shape[1:]
    return rows.nearest(height).float() @ (planes @ columns.nearest(width).float().T)


def _where(condition: Tensor, values: Tensor) -> Tensor:
    return torch.where(condition, values, torch.zeros_like(values))


# ---- channels: float (1 to 4, H, W) -> float (in_channels, H, W), whole numbers in [0, 255]


def _split(planes: Tensor) -> tuple[Tensor, Tensor]:
    """Colour (3, H, W) and alpha (1, H, W); three times the same for grey, and 255 where there is no alpha."""
    count = planes.shape[0]
    padded = F.pad(planes, (0, 0, 0, 0, 0, 1), value=255.0)  # one plane more, which is fully opaque
    colour = torch.arange(3) * ((count - 1) // 2)  # 0, 0, 0 for one and two planes, 0, 1, 2 for three and four
    alpha = torch.arange(1) + 2 * ((count + 1) // 2) - 1  # the last plane of two or four, else the one added
    return padded.index_select(0, colour), padded.index_select(0, alpha)


def _to_rgb(planes: Tensor) -> Tensor:
    colour, alpha = _split(planes)
    return ((colour * alpha + 255 * (255 - alpha)) / 255 + 0.5).floor()


def _to_grey(planes: Tensor) -> Tensor:
    weights = torch.tensor(_GREY).view(3, 1, 1)
    return ((weights * _to_rgb(planes)).sum(0, keepdim=True) + 32768).div(65536).floor()


_CHANNELS = {1: _to_grey, 3: _to_rgb}  # Pillow's resize of RGBA weighs colours by alpha, which this graph does not do
