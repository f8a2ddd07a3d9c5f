"""The kernels of `pool_head`: the average alone, and average and head in one."""

# Triton's own annotations know neither launch options nor its loops.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def average(x, channel, positions, channels, block_positions: tl.constexpr, block_channels: tl.constexpr):
    """The mean over positions of a block of channels of the image at `x`, in fp32."""
    total = tl.zeros((block_positions, block_channels), dtype=tl.float32)
    for start in range(0, positions, block_positions):
        position = start + tl.arange(0, block_positions)
        inside = (position < positions)[:, None] & (channel < channels)[None, :]
        place = position[:, None] * channels + channel[None, :]
        total += tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    return tl.sum(total, 0) / positions


@triton.jit
def pool_kernel(
    x,  # (images, positions, channels)
    pooled,  # (images, channels)
    positions,
    channels,
    block_positions: tl.constexpr,
    block_channels: tl.constexpr,
):
    blocks = tl.cdiv(channels, block_channels)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    channel = (tl.program_id(0) % blocks) * block_channels + tl.arange(0, block_channels)
    mean = average(x + image * positions * channels, channel, positions, channels, block_positions, block_channels)
    tl.store(pooled + image * channels + channel, mean.to(pooled.dtype.element_ty), mask=channel < channels)


@triton.jit
def pool_head_kernel(
    x,  # (images, positions, channels)
    weight,  # (classes, channels)
    bias,  # (classes)
    out,  # (images, classes)
    positions,
    channels,
    classes,
    has_bias: tl.constexpr,
    block_positions: tl.constexpr,
    block_channels: tl.constexpr,
    block_classes: tl.constexpr,
):
    blocks = tl.cdiv(classes, block_classes)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    label = (tl.program_id(0) % blocks) * block_classes + tl.arange(0, block_classes)
    shares = tl.zeros((block_classes, block_channels), dtype=tl.float32)
    for start in range(0, channels, block_channels):
        channel = start + tl.arange(0, block_channels)
        mean = average(x + image * positions * channels, channel, positions, channels, block_positions, block_channels)
        inside = (label < classes)[:, None] & (channel < channels)[None, :]
        w = tl.load(weight + label[:, None] * channels + channel[None, :], mask=inside, other=0.0)
        shares += w.to(tl.float32) * mean[None, :]
    logits = tl.sum(shares, 1)
    if has_bias:
        logits += tl.load(bias + label, mask=label < classes, other=0.0).to(tl.float32)
    tl.store(out + image * classes + label, logits.to(out.dtype.element_ty), mask=label < classes)


def launch_pool(x: Tensor, pooled: Tensor, tile: tuple[int, ...]) -> None:
    """Fill `pooled` (B, C) from `x` (B, C, H, W), channels_last."""
    block_positions, block_channels, _, num_warps = tile
    batch, channels, height, width = x.shape
    pool_kernel[(batch * triton.cdiv(channels, block_channels),)](
        x,
        pooled,
        height * width,
        channels,
        block_positions=block_positions,
        block_channels=block_channels,
        num_warps=num_warps,
        enable_fp_fusion=True,
    )


def launch_pool_head(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, tile: tuple[int, ...]) -> None:
    """Fill `out` (B, classes) from `x` (B, C, H, W), channels_last; `weight` contiguous."""
    block_positions, block_channels, block_classes, num_warps = tile
    batch, channels, height, width = x.shape
    classes = weight.shape[0]
    pool_head_kernel[(batch * triton.cdiv(classes, block_classes),)](
        x,
        weight,
        weight if bias is None else bias,
        out,
        height * width,
        channels,
        classes,
        has_bias=bias is not None,
        block_positions=block_positions,
        block_channels=block_channels,
        block_classes=block_classes,
        num_warps=num_warps,
        enable_fp_fusion=True,
    )
