"""`linear` with both operands in eight bits: e4m3 values with a scale for each row of x and each output channel.

    out = activation((x / s)  (weight / t)^T  s t + bias) + residual

Hopper multiplies e4m3 twice as fast as bf16. Weights are quantised once, by `quantize_weight`; a row of x when it is
read, its scale being its largest magnitude over 448, e4m3's largest value. That costs a second reading of the rows,
from the second-level cache, so it can win only where the product itself is what takes the time. It is less exact
than bf16 (three bits of mantissa) and for whoever asks for it: nothing chooses it by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from visformer.kernels import linear
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
    takes,
)

LARGEST = 448.0  # of e4m3
FLOAT8 = torch.float8_e4m3fn
_LEAST_IN = 32  # channels that one product of eight-bit values takes at least


def linear_fp8(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    tile: Sequence[int] = (),
) -> Tensor:
    """activation(x (weight * weight_scale)^T + bias) + residual with x rounded to e4m3 by rows; inference only.

    Args:
        x: (B, in, H, W) of fp16, bf16 or fp32, made channels_last when it is not.
        weight: (out, in) float8_e4m3fn.
        weight_scale: (out) fp32; with `weight`, what `quantize_weight` gives.
        bias: (out), of any floating dtype.
        residual: (B, out, H, W), of x's dtype; added after the activation.
        activation: one of `linear.ACTIVATIONS`.
        tile: one of `tiles(B * H * W, in, out, dtype)`; empty: the first of them.

    Returns a new channels_last map (B, out, H, W) of x's dtype. Raises `UsageError` for shapes that do not fit.
    """
    return _operator(x, weight, weight_scale, bias, residual, activation, tile)


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(out, in) -> its values in float8_e4m3fn, and the fp32 scale (out) that brings each row back."""
    scale = row_scale(weight.float())
    return (weight.float() / scale[:, None]).to(FLOAT8), scale


def row_scale(rows: Tensor) -> Tensor:
    """The scale that takes each row's largest magnitude to e4m3's largest; 1 for a row of zeros."""
    highest = rows.abs().amax(-1)
    return torch.where(highest > 0, highest / LARGEST, 1.0)


def linear_fp8_reference(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """The same in plain PyTorch: rounded to e4m3, multiplied in fp32."""
    rows = x.permute(0, 2, 3, 1).float()
    scale = row_scale(rows)[..., None]
    rounded = (rows / scale).to(FLOAT8).float() * scale
    residual = None if residual is None else residual.float()
    out = linear_reference(
        rounded.permute(0, 3, 1, 2), weight.float() * weight_scale[:, None], bias, residual, activation
    )
    return out.to(x.dtype)


def tiles(rows: int, in_channels: int, out_channels: int, dtype: torch.dtype) -> list[Tile]:
    """Candidates (block_rows, block_out, block_in, num_warps, num_stages), those of `linear` in x's `dtype` with steps
    of at least 32 channels, the least that eight-bit products take."""
    half = torch.bfloat16 if dtype.itemsize > 2 else dtype
    return [
        (block_rows, block_out, max(_LEAST_IN, block_in), num_warps, num_stages)
        for block_rows, block_out, block_in, num_warps, num_stages in linear.tiles(
            rows, in_channels, out_channels, half
        )
    ]


def _check(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str
) -> None:
    check_map("linear_fp8", "x", x)
    out_channels = weight.shape[0]
    check_shape("linear_fp8", "weight", weight, (out_channels, x.shape[1]), FLOAT8)
    check_shape("linear_fp8", "weight_scale", weight_scale, (out_channels,), torch.float32)
    check_shape("linear_fp8", "bias", bias, (out_channels,), None)
    check_shape("linear_fp8", "residual", residual, (x.shape[0], out_channels, *x.shape[2:]), x.dtype)
    check_activation("linear_fp8", activation)


@torch.library.custom_op(
    "visformer::linear_fp8",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor? residual, str activation, "
    "int[] tile=[]) -> Tensor",
)
def _operator(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    tile: Sequence[int] = (),
) -> Tensor:
    _check(x, weight, weight_scale, bias, residual, activation)
    if not (runs_triton(x) and takes(x)):
        return linear_fp8_reference(x, weight, weight_scale, bias, residual, activation)
    from visformer.kernels.linear_fp8_triton import launch_linear_fp8

    out_channels, in_channels = weight.shape
    candidates = tiles(x.numel() // in_channels, in_channels, out_channels, x.dtype)
    out = new_map(x, out_channels)
    residual = None if residual is None else channels_last(residual)
    tile = chosen_tile("linear_fp8", tile, candidates, 5)
    with torch.cuda.device_of(x):
        launch_linear_fp8(channels_last(x), weight.contiguous(), weight_scale, bias, residual, out, activation, tile)
    return out


@_operator.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    tile: Sequence[int] = (),
) -> Tensor:
    _check(x, weight, weight_scale, bias, residual, activation)
    return new_map(x, weight.shape[0])
