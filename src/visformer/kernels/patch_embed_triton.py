"""The kernel of `patch_embed`.

One program computes a tile of block_rows positions by block_outputs channels; programs run through a row of tiles
first, so that the input comes from memory once. Addresses are the 64-bit place of a patch's first pixel plus a 32-bit
step.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
# (it knows neither the options of a launch nor static_range)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from visformer.kernels.linear_triton import fp32_precision, must_widen, product


@triton.jit
def patch_embed_kernel(
    x,  # (B, H, W, in)
    weight,  # (out, inner)
    bias,  # (bias_rows, out)
    out,  # (B * down * across, out)
    rows,  # B * down * across
    height,
    width,
    down,
    across,
    bias_rows,
    in_channels: tl.constexpr,
    channels: tl.constexpr,
    patch_size: tl.constexpr,
    has_bias: tl.constexpr,
    is_padded: tl.constexpr,  # a patch may reach over the map's edge
    precision: tl.constexpr,
    widen: tl.constexpr,
    block_rows: tl.constexpr,
    block_outputs: tl.constexpr,
    block_inputs: tl.constexpr,
):
    line: tl.constexpr = patch_size * in_channels
    inner: tl.constexpr = patch_size * line
    blocks: tl.constexpr = (channels + block_outputs - 1) // block_outputs
    n = tl.program_id(0) % blocks * block_outputs + tl.arange(0, block_outputs)
    row = tl.program_id(0) // blocks * block_rows + tl.arange(0, block_rows)
    present = row < rows
    row = tl.minimum(row, rows - 1)
    left = row % across * patch_size
    top = row // across % down * patch_size
    first = (row // (across * down) * height + top).to(tl.int64) * width + left
    source = x + first * in_channels

    total = tl.zeros((block_rows, block_outputs), dtype=tl.float32)
    for start in range(0, inner, block_inputs):
        k = start + tl.arange(0, block_inputs)
        step = k // line * (width * in_channels) + k % line
        known = k < inner
        if is_padded:
            seen = (top[:, None] + (k // line)[None, :] < height) & (known[None, :])
            seen = seen & (left[:, None] + (k % line // in_channels)[None, :] < width)
            a = tl.load(source[:, None] + step[None, :], mask=seen, other=0.0)
        else:
            a = tl.load(source[:, None] + step[None, :], mask=known[None, :], other=0.0)
        b = tl.load(weight + n[None, :] * inner + k[:, None], mask=known[:, None] & (n < channels)[None, :], other=0.0)
        total = product(a, b, total, precision, widen)

    stored = present[:, None] & (n < channels)[None, :]
    if has_bias:
        place = (row % bias_rows)[:, None] * channels + n[None, :]
        total += tl.load(bias + place, mask=stored, other=0.0).to(tl.float32)
    tl.store(out + (row.to(tl.int64) * channels)[:, None] + n[None, :], total.to(out.dtype.element_ty), mask=stored)


def launch_patch_embed(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, patch_size: int, tile: tuple[int, ...]
) -> None:
    """Fill `out` (B, out, h, w); maps are channels_last, `weight` and `bias` contiguous."""
    block_rows, block_outputs, block_inputs, num_warps, num_stages = tile
    batch, in_channels, height, width = x.shape
    channels, down, across = out.shape[1:]
    rows = batch * down * across
    patch_embed_kernel[(triton.cdiv(rows, block_rows) * triton.cdiv(channels, block_outputs),)](
        x,
        weight,
        weight if bias is None else bias,
        out,
        rows,
        height,
        width,
        down,
        across,
        1 if bias is None else bias.shape[0],
        in_channels=in_channels,
        channels=channels,
        patch_size=patch_size,
        has_bias=bias is not None,
        is_padded=height % patch_size != 0 or width % patch_size != 0,
        precision=fp32_precision(),
        widen=must_widen(x.dtype),
        block_rows=block_rows,
        block_outputs=block_outputs,
        block_inputs=block_inputs,
        enable_fp_fusion=True,
        num_warps=num_warps,
        num_stages=num_stages,
    )
