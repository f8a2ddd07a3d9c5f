"""The kernel of `linear_fp8`: each program finds the scales of its rows, then multiplies them in e4m3.

Like `linear_kernel` otherwise. The quantised rows go into the product from registers, so they are never written.
"""

# Triton's own annotations know neither launch options nor its loops.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from visformer.kernels.launch import interpreted
from visformer.kernels.linear_triton import activate, for_output, product


@triton.jit
def linear_fp8_kernel(
    x,  # (rows, in)
    weight,  # (out, in) e4m3
    weight_scale,  # (out)
    bias,  # (out)
    residual,  # (rows, out)
    out,  # (rows, out)
    rows,
    out_channels,
    in_channels,
    activation: tl.constexpr,
    has_bias: tl.constexpr,
    has_residual: tl.constexpr,
    widen: tl.constexpr,
    block_rows: tl.constexpr,
    block_out: tl.constexpr,
    block_in: tl.constexpr,
):
    program = tl.program_id(0)
    across = tl.cdiv(out_channels, block_out)
    first_row = (program // across).to(tl.int64) * block_rows
    row = tl.arange(0, block_rows)
    column = (program % across) * block_out + tl.arange(0, block_out)
    step = tl.arange(0, block_in)
    rows_left = (rows - first_row).to(tl.int32)
    x_block = x + first_row * in_channels + tl.minimum(row, rows_left - 1)[:, None] * in_channels + step[None, :]
    weight_block = weight + tl.minimum(column, out_channels - 1)[None, :] * in_channels + step[:, None]

    highest = tl.zeros((block_rows,), dtype=tl.float32)
    for start in range(0, in_channels, block_in):
        a = tl.load(x_block + start, mask=(step < in_channels - start)[None, :], other=0.0).to(tl.float32)
        highest = tl.maximum(highest, tl.max(tl.abs(a), 1))
    scale = tl.where(highest > 0, highest / 448.0, 1.0)
    total = tl.zeros((block_rows, block_out), dtype=tl.float32)
    for start in range(0, in_channels, block_in):
        inside = step < in_channels - start
        a = tl.load(x_block + start, mask=inside[None, :], other=0.0).to(tl.float32) / scale[:, None]
        b = tl.load(weight_block + start, mask=inside[:, None], other=0.0)
        total = product(a.to(tl.float8e4nv), b, total, "ieee", widen)

    total *= scale[:, None] * tl.load(weight_scale + column, mask=column < out_channels, other=0.0)[None, :]
    if has_bias:
        total += tl.load(bias + column, mask=column < out_channels, other=0.0).to(tl.float32)[None, :]
    total = activate(total, activation)
    stored = (row < rows_left)[:, None] & (column < out_channels)[None, :]
    place = row[:, None] * out_channels + column[None, :]
    if has_residual:
        total += tl.load(residual + first_row * out_channels + place, mask=stored, other=0.0).to(tl.float32)
    tl.store(out + first_row * out_channels + place, total.to(out.dtype.element_ty), mask=stored)


def launch_linear_fp8(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    activation: str,
    tile: tuple[int, ...],
) -> None:
    """Fill `out` (B, out, H, W) from `x` (B, in, H, W); all maps channels_last, `weight` contiguous."""
    block_rows, block_out, block_in, num_warps, num_stages = tile
    out_channels, in_channels = weight.shape
    rows = x.numel() // in_channels
    linear_fp8_kernel[(triton.cdiv(rows, block_rows) * triton.cdiv(out_channels, block_out),)](
        x,
        weight,
        weight_scale,
        weight_scale if bias is None else bias,
        x if residual is None else residual,
        out,
        rows,
        out_channels,
        in_channels,
        activation=for_output(activation, out.dtype),
        has_bias=bias is not None,
        has_residual=residual is not None,
        widen=interpreted(),
        block_rows=block_rows,
        block_out=block_out,
        block_in=block_in,
        num_warps=num_warps,
        num_stages=num_stages,
        enable_fp_fusion=True,
    )
