"""The kernels of `stem`: one reads a number at a time, of any dtype, the other 32-bit words of uint8 images.

Rows of the product are strips of output positions, numbered over (image, output row, strip). What a strip sees outside
of the image is masked, to zero; the bias is looked up for each position by how much of its window lies outside.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
# (it knows neither the options of a launch nor static_range)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from visformer.kernels.linear_triton import fp32_precision, must_widen, product
from visformer.kernels.stem import StemTile


@triton.jit
def finish(
    total,
    bias,
    out,
    present,
    image,
    row,
    column,
    height,
    width,
    rows,
    columns,
    span: tl.constexpr,
    channels: tl.constexpr,
    has_table: tl.constexpr,
    block_outputs: tl.constexpr,
):
    """Bias, ReLU and store of strips (image, row, column of the first position)."""
    n = tl.arange(0, block_outputs)
    place_across = column[:, None] + (n // channels)[None, :]
    if has_table:
        top = 3 - 2 * row
        of_row = 4 * tl.maximum(top, 0) + tl.minimum(height + top, 7) - 4
        left = 3 - 2 * place_across
        of_column = 4 * tl.maximum(left, 0) + tl.minimum(tl.maximum(width + left, 4), 7) - 4
        entry = 16 * of_row[:, None] + of_column
        total += tl.load(bias + entry * channels + (n % channels)[None, :]).to(tl.float32)
    else:
        total += tl.load(bias + n % channels).to(tl.float32)[None, :]
    total = tl.maximum(total, 0.0)
    first = ((image * rows + row).to(tl.int64) * columns + column) * channels
    stored = present[:, None] & (place_across < columns) & (n < span * channels)[None, :]
    tl.store(out + first[:, None] + n[None, :], total.to(out.dtype.element_ty), mask=stored)


@triton.jit
def stem_kernel(
    x,  # (B, H, W, in)
    weight,  # (1, inner, span * out)
    bias,  # (out), or (256, out)
    out,  # (B, rows, columns, out)
    strips,  # B * rows * across
    height,
    width,
    rows,
    columns,
    across,  # strips of an output row
    in_channels: tl.constexpr,
    channels: tl.constexpr,
    inner: tl.constexpr,
    span: tl.constexpr,
    has_table: tl.constexpr,
    precision: tl.constexpr,
    widen: tl.constexpr,
    block_strips: tl.constexpr,
    block_inputs: tl.constexpr,
    block_outputs: tl.constexpr,
):
    line: tl.constexpr = (2 * span + 5) * in_channels  # numbers of one image row that a strip sees
    strip = tl.program_id(0) * block_strips + tl.arange(0, block_strips)
    present = strip < strips
    strip = tl.minimum(strip, strips - 1)
    column = strip % across * span
    row = strip // across % rows
    image = strip // (across * rows)
    n = tl.arange(0, block_outputs)
    top = 2 * row - 3
    left = (2 * column - 3) * in_channels
    source = x + (image * height + top).to(tl.int64) * (width * in_channels) + left

    total = tl.zeros((block_strips, block_outputs), dtype=tl.float32)
    for start in range(0, inner, block_inputs):
        k = start + tl.arange(0, block_inputs)
        down, along = k // line, k % line
        seen_row = top[:, None] + down[None, :]
        seen = left[:, None] + along[None, :]
        inside = (seen_row >= 0) & (seen_row < height) & (seen >= 0) & (seen < width * in_channels)
        step = down * (width * in_channels) + along
        a = tl.load(source[:, None] + step[None, :], mask=inside & (k < inner)[None, :], other=0)
        b = tl.load(
            weight + k[:, None] * (span * channels) + n[None, :],
            mask=(k < inner)[:, None] & (n < span * channels)[None, :],
            other=0.0,
        )
        total = product(a.to(tl.float32).to(b.dtype), b, total, precision, widen)
    finish(
        total, bias, out, present, image, row, column, height, width, rows, columns, span, channels, has_table,
        block_outputs,
    )  # fmt: skip


@triton.jit
def stem_words_kernel(
    x,  # (B, H, line of words), the image's bytes as int32
    weight,  # (4, inner, span * out)
    bias,  # (out), or (256, out)
    out,  # (B, rows, columns, out)
    strips,  # B * rows * across
    height,
    width,
    rows,
    columns,
    across,  # strips of an output row
    in_channels: tl.constexpr,
    channels: tl.constexpr,
    inner: tl.constexpr,
    span: tl.constexpr,
    has_table: tl.constexpr,
    precision: tl.constexpr,
    widen: tl.constexpr,
    block_strips: tl.constexpr,
    block_inputs: tl.constexpr,
    block_outputs: tl.constexpr,
):
    line: tl.constexpr = inner // 7  # words of one image row that a strip sees
    words = width * in_channels // 4  # of a whole image row
    strip = tl.program_id(0) * block_strips + tl.arange(0, block_strips)
    present = strip < strips
    strip = tl.minimum(strip, strips - 1)
    column = strip % across * span
    row = strip // across % rows
    image = strip // (across * rows)
    n = tl.arange(0, block_outputs)
    top = 2 * row - 3
    left = (column // 2 - 1) * in_channels  # pixel 2 * column - 4, in words
    source = x + (image * height + top).to(tl.int64) * words + left

    total = tl.zeros((block_strips, block_outputs), dtype=tl.float32)
    for start in range(0, inner, block_inputs):
        k = start + tl.arange(0, block_inputs)
        down, along = k // line, k % line
        seen_row = top[:, None] + down[None, :]
        seen = left[:, None] + along[None, :]
        inside = (seen_row >= 0) & (seen_row < height) & (seen >= 0) & (seen < words) & (k < inner)[None, :]
        word = tl.load(source[:, None] + (down * words + along)[None, :], mask=inside, other=0)
        known = (k < inner)[:, None] & (n < span * channels)[None, :]
        for byte in tl.static_range(4):
            b = tl.load(weight + (byte * inner + k)[:, None] * (span * channels) + n[None, :], mask=known, other=0.0)
            a = ((word >> (8 * byte)) & 255).to(tl.float32)
            total = product(a.to(b.dtype), b, total, precision, widen)
    finish(
        total, bias, out, present, image, row, column, height, width, rows, columns, span, channels, has_table,
        block_outputs,
    )  # fmt: skip


def launch_stem(x: Tensor, packed: Tensor, bias: Tensor, out: Tensor, tile: StemTile) -> None:
    """Fill `out` (B, out, rows, columns); maps are channels_last, `packed` and `bias` contiguous."""
    batch, in_channels, height, width = x.shape
    channels, rows, columns = out.shape[1:]
    across = triton.cdiv(columns, tile.span)
    strips = batch * rows * across
    pixels = x.permute(0, 2, 3, 1).reshape(-1)
    kernel = stem_words_kernel if tile.words else stem_kernel
    kernel[(triton.cdiv(strips, tile.block_strips),)](
        pixels.view(torch.int32) if tile.words else pixels,
        packed,
        bias,
        out,
        strips,
        height,
        width,
        rows,
        columns,
        across,
        in_channels=in_channels,
        channels=channels,
        inner=packed.shape[1],
        span=tile.span,
        has_table=bias.dim() == 2,
        precision=fp32_precision(),
        widen=must_widen(packed.dtype),
        block_strips=tile.block_strips,
        block_inputs=tile.block_inputs,
        block_outputs=max(16, triton.next_power_of_2(tile.span * channels)),
        enable_fp_fusion=True,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
