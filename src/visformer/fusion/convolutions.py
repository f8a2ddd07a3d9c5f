"""The convolutions of a fused network: stem, patch embeddings, and the 3x3 ones of the spatial MLPs.

Maps are (B, C, H, W) in channels_last memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visformer import kernels
from visformer.fusion.operation import Candidates, Cost, Operation, activate, compiled, cost_of, described, text
from visformer.fusion.tuner import Tuner
from visformer.kernels.launch import runs_triton
from visformer.models.layers import pad_to_multiple

BiasMap = Callable[[tuple[int, int]], Tensor | None]


class Stem(Operation):
    """relu(W x + b), 7x7 of stride 2, of a normalised float image or of one of bytes, which is then normalised.

    `mean` and `std` are those of bytes, on the scale 0 to 255, one for each channel.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    weight_of_bytes: Tensor

    def __init__(
        self, tuner: Tuner, like: Tensor, weight: Tensor, bias: Tensor, mean: Sequence[float], std: Sequence[float]
    ):
        super().__init__(tuner)
        self.keep("weight", weight, like)
        self.keep("bias", bias, like)
        column = torch.tensor(mean, dtype=torch.float64).view(1, -1, 1, 1)
        # Levels minus their mean are zero where the normalised image is padded, and the weight takes the division.
        self.keep("mean", column, like)
        divisor = torch.tensor(std, dtype=torch.float64, device=weight.device).view(1, -1, 1, 1)
        self.keep("weight_of_bytes", weight / divisor, like)
        self._normalisation = (tuple(mean), tuple(std))

    def signature(self, x: Tensor) -> str:
        """See `Operation`."""
        return f"stem {described(x.shape, self.weight.shape)} {'bytes' if x.dtype == torch.uint8 else 'normalised'}"

    def cost(self, x: Tensor) -> Cost:
        """See `Operation`."""
        result = (len(x), len(self.weight), -(-x.shape[2] // 2), -(-x.shape[3] // 2))
        return cost_of(_flops(result, self.weight), result, x, self.bias, self.weight)

    def candidates(self, x: Tensor) -> Candidates:
        """The library's convolution; compiled; our kernel."""
        weight, bias, mean, of_bytes = self.weight, self.bias, self.mean, self.weight_of_bytes

        def library(x: Tensor) -> Tensor:
            return F.relu(F.conv2d(x, weight, bias, stride=2, padding=3))

        def library_of_bytes(x: Tensor) -> Tensor:
            return F.relu(F.conv2d(x.to(weight.dtype) - mean, of_bytes, bias, stride=2, padding=3))

        first = library_of_bytes if x.dtype == torch.uint8 else library
        found: Candidates = {"library": lambda: first}
        if x.device.type == "cuda":
            found["compiled"] = compiled(first, self.signature(x))
        return found | self._kernels(x)

    def _kernels(self, x: Tensor) -> Candidates:
        if not runs_triton(x):
            return {}
        stem, weight, bias = kernels.stem, self.weight, self.bias
        if x.dtype == torch.uint8:
            weight, bias = stem.fold_normalisation(weight, bias, *self._normalisation)

        def build(tile: tuple[int, ...]) -> Any:
            packed = stem.pack_weight(weight, tile)
            return lambda x: stem.stem(x, packed, bias, tile)

        tiles = stem.tiles(*x.shape, weight.shape[0], x.dtype, weight.dtype)
        return {f"kernel {text(tile)}": lambda tile=tile: build(tile) for tile in tiles}


class PatchEmbed(Operation):
    """W x + b for patches of `patch_size` squared, zeros standing to the right of and below a map that they overhang.

    `bias_map` gives b for a grid of patches (height, width): (height * width, out), (1, out) or None; whatever depends
    on the position is in it.
    """

    weight: Tensor

    def __init__(self, tuner: Tuner, like: Tensor, weight: Tensor, bias_map: BiasMap):
        super().__init__(tuner)
        self.keep("weight", weight, like)  # (out, in, patch_size, patch_size)
        self.bias_map = bias_map

    def signature(self, x: Tensor) -> str:
        """See `Operation`."""
        return f"patch_embed {described(x.shape, self.weight.shape)}"

    def cost(self, x: Tensor) -> Cost:
        """See `Operation`."""
        size = self.weight.shape[-1]
        result = (len(x), len(self.weight), -(-x.shape[2] // size), -(-x.shape[3] // size))
        bias = self.bias_map((result[2], result[3]))
        return cost_of(_flops(result, self.weight), result, x, None if bias is None else bias.to(x), self.weight)

    def candidates(self, x: Tensor) -> Candidates:
        """A product over the pixels of each patch; the library's convolution; compiled; our kernel."""
        weight, size = self.weight, self.weight.shape[-1]
        flat = weight.permute(0, 2, 3, 1).flatten(1).contiguous()  # (out, patch_size * patch_size * in)
        grid = (-(-x.shape[2] // size), -(-x.shape[3] // size))
        bias = self.bias_map(grid)
        bias = None if bias is None else bias.to(weight)
        shaped = None if bias is None else bias.view(*(grid if len(bias) > 1 else (1, 1)), -1)

        def library(x: Tensor) -> Tensor:
            x = pad_to_multiple(x, size).permute(0, 2, 3, 1)
            x = x.unflatten(2, (-1, size)).unflatten(1, (-1, size)).transpose(2, 3).flatten(3)
            return _plus(F.linear(x, flat), shaped).permute(0, 3, 1, 2)

        def convolution(x: Tensor) -> Tensor:
            x = F.conv2d(pad_to_multiple(x, size), weight, stride=size)
            return _plus(x.permute(0, 2, 3, 1), shaped).permute(0, 3, 1, 2)

        found: Candidates = {"library": lambda: library, "convolution": lambda: convolution}
        if x.device.type == "cuda":
            found["compiled"] = compiled(library, self.signature(x))
        if not runs_triton(x):
            return found
        embed, shape = kernels.patch_embed, (*x.shape, weight.shape[0], size)
        return found | {
            f"kernel {text(tile)}": lambda tile=tile: lambda x: embed.patch_embed(x, flat, bias, size, tile)
            for tile in embed.tiles(*shape, x.dtype)
        }


class Convolution(Operation):
    """activation(W x), 3x3 with padding 1, in groups."""

    weight: Tensor

    def __init__(self, tuner: Tuner, like: Tensor, weight: Tensor, groups: int, activation: str):
        super().__init__(tuner)
        self.keep("weight", weight, like)  # (out, in / groups, 3, 3)
        self.groups, self.activation = groups, activation

    def signature(self, x: Tensor) -> str:
        """See `Operation`."""
        return f"convolution {described(x.shape, self.weight.shape)} {self.groups} groups {self.activation}"

    def cost(self, x: Tensor) -> Cost:
        """See `Operation`."""
        result = (len(x), len(self.weight), *x.shape[2:])
        return cost_of(_flops(result, self.weight), result, x, self.weight)

    def candidates(self, x: Tensor) -> Candidates:
        """The library's convolution; neighbouring groups as one, zero between them; compiled; our kernel."""
        weight, groups = self.weight, self.groups

        def library(x: Tensor) -> Tensor:
            return activate(F.conv2d(x, weight, padding=1, groups=groups), self.activation)

        found: Candidates = {"library": lambda: library}
        found |= {f"{n} groups as one": lambda n=n: self._merged(n) for n in (2, 4) if groups % n == 0 and groups > n}
        if x.device.type == "cuda":
            found["compiled"] = compiled(library, self.signature(x))
        return found | self._kernels(x)

    def _merged(self, count: int) -> Any:
        groups = self.groups // count
        weight = merge_groups(self.weight, self.groups, count)
        return lambda x: activate(F.conv2d(x, weight, padding=1, groups=groups), self.activation)

    def _kernels(self, x: Tensor) -> Candidates:
        if not runs_triton(x):
            return {}
        grouped, weight, groups = kernels.grouped_conv, self.weight, self.groups
        batch, channels, height, width = x.shape

        def build(tile: tuple[int, ...]) -> Any:
            packed = grouped.pack_weight(weight, groups, tile)
            return lambda x: grouped.grouped_conv(x, packed, None, groups, self.activation, tile)

        tiles = grouped.tiles(batch, channels, height, width, groups, x.dtype)
        return {f"kernel {text(tile)}": lambda tile=tile: build(tile) for tile in tiles}


def merge_groups(weight: Tensor, groups: int, count: int) -> Tensor:
    """The weight (out, in / groups, k, k) of a convolution in `groups` // `count` groups that is the same function:
    (out, count * in / groups, k, k), with zeros between the groups that became one."""
    out_channels, width = weight.shape[:2]
    parts = weight.unflatten(0, (groups // count, count, -1))  # (groups / count, count, out / groups, width, k, k)
    merged = parts.new_zeros(groups // count, count, out_channels // groups, count, width, *weight.shape[2:])
    for i in range(count):
        merged[:, i, :, i] = parts[:, i]
    return merged.flatten(3, 4).flatten(0, 2)


def _flops(result: tuple[int, ...], weight: Tensor) -> int:
    """Those of a convolution by `weight`, (out, in / groups, k, k), that gives a map of the shape `result`; what falls
    on padding counts."""
    return 2 * math.prod(result) * weight[0].numel()


def _plus(x: Tensor, bias: Tensor | None) -> Tensor:
    """x + bias, in x's memory."""
    return x if bias is None else x.add_(bias)
