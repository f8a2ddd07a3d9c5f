"""Two products over the channels of every position with GELU between, without writing the hidden map.

    out = activation(x weight1^T + bias1) weight2^T + bias2 + residual

A program keeps a block of rows of `x` and of the result for all channels, and goes through the hidden width in steps:
each step's hidden values are made, activated, and multiplied into the result while they are in registers.

Why it can win, bf16, batch 256, 224 pixels (roofline 790 TFLOP/s, 3.0 TB/s): visformer_tiny's MLP of 192 channels on
14x14 is 29.6 GFLOP, 37 us of products. As two kernels it moves 212 MB, 71 us, of which the fused one keeps 58, 19 us.
Where it cannot: at 768 channels on 7x7 the products take 150 us and two kernels' bytes 71 us, so there is nothing to
save, and a block of 64 rows by 768 channels in fp32 would take all registers of a multiprocessor; `tiles` is empty.
At 384 channels the products take 150 us on 14x14 and the bytes of two kernels 141 us: the accumulator (64 rows: 96
registers of a thread over 8 warps) fits, the weights (1.2 MB each) are read from the second-level cache once for each
block of rows, and whether that beats two library products only a measurement says.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from visformer.errors import UsageError
from visformer.kernels.launch import runs_triton
from visformer.kernels.linear import (
    Tile,
    channels_last,
    check_activation,
    check_map,
    check_shape,
    chosen_tile,
    linear_reference,
    new_map,
    power_of_two,
    takes,
)

ACTIVATIONS = ("gelu", "gelu_tanh", "relu")
MAX_CHANNELS = 384  # of which a block of 64 rows is accumulated in registers
_MAX_CHUNKS = 4


def mlp(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    residual: Tensor | None = None,
    activation: str = "gelu",
    tile: Sequence[int] = (),
) -> Tensor:
    """activation(x weight1^T + bias1) weight2^T + bias2 + residual at every position of a map; inference only.

    Args:
        x: (B, C, H, W), made channels_last when it is not.
        weight1: (hidden, C), of x's dtype.
        bias1: (hidden), of any floating dtype.
        weight2: (C, hidden), of x's dtype.
        bias2: (C), of any floating dtype.
        residual: (B, C, H, W), of x's dtype; `x` itself where the norm before is folded into weight1.
        activation: one of `ACTIVATIONS`; gelu is the erf form.
        tile: one of `tiles(B * H * W, C, hidden, dtype)`; empty: the first of them.

    Hidden values are rounded to x's dtype, as between two products. Returns a new channels_last map (B, C, H, W).
    Raises `UsageError` for shapes that do not fit, and on a GPU where `tiles` is empty.
    """
    return _operator(x, weight1, bias1, weight2, bias2, residual, activation, tile)


def mlp_reference(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    residual: Tensor | None = None,
    activation: str = "gelu",
) -> Tensor:
    """The same in plain PyTorch."""
    return linear_reference(linear_reference(x, weight1, bias1, None, activation), weight2, bias2, residual)


def tiles(rows: int, channels: int, hidden: int, dtype: torch.dtype) -> list[Tile]:
    """Candidates (block_rows, block_hidden, chunk, num_warps, num_stages); empty where two products are better.

    `chunk`: channels are held as channels / chunk blocks, because 192 and 384 are no powers of two. Shared memory holds
    x's rows and, `num_stages` times, a step of both weights.
    """
    chunk = _chunk(channels)
    if dtype.itemsize != 2 or chunk is None or hidden % 64:
        return []
    wide = channels > 192
    shapes = (  # rows, hidden step, warps, stages
        ((64, 32, 8, 3), (64, 64, 8, 2), (64, 32, 8, 2), (32, 32, 4, 3))
        if wide
        else ((64, 32, 4, 2), (128, 64, 8, 3), (128, 64, 8, 2), (128, 32, 8, 3), (64, 64, 4, 2), (64, 32, 4, 3))
    )
    return [
        (block_rows, block_hidden, chunk, num_warps, num_stages)
        for block_rows, block_hidden, num_warps, num_stages in shapes
        if block_rows <= max(64, power_of_two(rows))
        and 2 * channels * (block_rows + 2 * num_stages * block_hidden) <= 227 * 1024
    ]


def _chunk(channels: int) -> int | None:
    """The widest power of two from 128 down to 16 that divides `channels` into at most four; None: there is none."""
    if channels > MAX_CHANNELS:
        return None
    fitting = [size for size in (128, 64, 32, 16) if channels % size == 0 and channels // size <= _MAX_CHUNKS]
    return fitting[0] if fitting else None


def _check(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    residual: Tensor | None,
    activation: str,
) -> None:
    check_map("mlp", "x", x)
    channels, hidden = x.shape[1], weight1.shape[0]
    check_shape("mlp", "weight1", weight1, (hidden, channels), x.dtype)
    check_shape("mlp", "bias1", bias1, (hidden,), None)
    check_shape("mlp", "weight2", weight2, (channels, hidden), x.dtype)
    check_shape("mlp", "bias2", bias2, (channels,), None)
    check_shape("mlp", "residual", residual, tuple(x.shape), x.dtype)
    check_activation("mlp", activation, ACTIVATIONS)


@torch.library.custom_op(
    "visformer::mlp",
    mutates_args=(),
    schema="(Tensor x, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2, Tensor? residual, str activation, "
    "int[] tile=[]) -> Tensor",
)
def _operator(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    residual: Tensor | None,
    activation: str,
    tile: Sequence[int] = (),
) -> Tensor:
    _check(x, weight1, bias1, weight2, bias2, residual, activation)
    if not (runs_triton(x) and takes(x)):
        return mlp_reference(x, weight1, bias1, weight2, bias2, residual, activation)
    from visformer.kernels.mlp_triton import launch_mlp

    hidden, channels = weight1.shape
    candidates = tiles(x.numel() // channels, channels, hidden, x.dtype)
    if not candidates:
        raise UsageError(
            f"mlp: no tile fits {channels} channels, {hidden} hidden, of {x.dtype}; use two `linear` products there"
        )
    out = new_map(x, channels)
    residual = None if residual is None else channels_last(residual)
    tile = chosen_tile("mlp", tile, candidates, 5)
    x, weight1, weight2 = channels_last(x), weight1.contiguous(), weight2.contiguous()
    with torch.cuda.device_of(x):
        launch_mlp(x, weight1, bias1, weight2, bias2, residual, out, activation, tile)
    return out


@_operator.register_fake
def _(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    residual: Tensor | None,
    activation: str,
    tile: Sequence[int] = (),
) -> Tensor:
    _check(x, weight1, bias1, weight2, bias2, residual, activation)
    return new_map(x, x.shape[1])
