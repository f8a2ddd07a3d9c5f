"""BatchNorm folded away: in evaluation mode it is x * scale + shift by channel, which the product beside it can take.

Computed in double precision. A norm over the channels of each position (`ChannelNorm`) keeps its division and gives
away its scale and shift. Shapes: weights are (out, in) or (out, in, kernel, kernel).
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visformer.models.layers import ChannelNorm


class Standardise(nn.Module):
    """`ChannelNorm` without its scale and shift, or nothing."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same, in channels_last memory"""
        return F.layer_norm(x.permute(0, 2, 3, 1), (self.channels,)).permute(0, 3, 1, 2)


def scale_and_shift(norm: nn.Module) -> tuple[Tensor, Tensor] | None:
    """What `norm` multiplies each channel by and then adds, double (C,); None for an identity."""
    if isinstance(norm, nn.BatchNorm2d):
        mean, variance = cast(Tensor, norm.running_mean).double(), cast(Tensor, norm.running_var).double()
        scale = norm.weight.detach().double() / (variance + norm.eps).sqrt()
        return scale, norm.bias.detach().double() - mean * scale
    if isinstance(norm, ChannelNorm):
        return norm.weight.detach().double(), norm.bias.detach().double()
    assert isinstance(norm, nn.Identity), f"a norm of type {type(norm).__name__} can't be folded"
    return None


def remainder(norm: nn.Module) -> nn.Module:
    """What is left of `norm` once its scale and shift are elsewhere."""
    return Standardise(norm.weight.shape[0]) if isinstance(norm, ChannelNorm) else nn.Identity()


def fold_after(weight: Tensor, bias: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor | None]:
    """(weight, bias), double, of the product before a norm: norm(W x + b) = (scale W) x + (scale b + shift).

    Not for `ChannelNorm`, whose division stands between.
    """
    assert not isinstance(norm, ChannelNorm)
    weight, bias = weight.detach().double(), None if bias is None else bias.detach().double()
    folded = scale_and_shift(norm)
    if folded is None:
        return weight, bias
    scale, shift = folded
    return weight * scale.view(-1, *[1] * (weight.ndim - 1)), (0 if bias is None else bias * scale) + shift


def fold_before(weight: Tensor, bias: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor | None]:
    """(weight, bias), double, of the product after a norm: W (scale x + shift) + b = (W scale) x + (W shift + b).

    `weight` is (out, in) or that of a 1x1 convolution; one that pads would see the shift in its padding.
    """
    weight, bias = weight.detach().double(), None if bias is None else bias.detach().double()
    folded = scale_and_shift(norm)
    if folded is None:
        return weight, bias
    scale, shift = folded
    moved = weight.flatten(1) @ shift
    return weight * scale.view(1, -1, *[1] * (weight.ndim - 2)), moved if bias is None else bias + moved


def fold_queries(weight: Tensor, bias: Tensor | None, rows: int, scale: float) -> tuple[Tensor, Tensor | None]:
    """The attention's scale in the weights of q, the first `rows` of qkv."""
    factors = torch.ones(weight.shape[0], dtype=weight.dtype, device=weight.device)
    factors[:rows] = scale
    return weight * factors.view(-1, *[1] * (weight.ndim - 1)), None if bias is None else bias * factors
