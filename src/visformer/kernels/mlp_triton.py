"""The kernel of `mlp`: both products over a block of rows, the hidden values in registers.

Channels are held as a tuple of `chunks` blocks of `chunk`, in x and in the accumulator. Each step of the hidden width
loads block_hidden rows of weight1 and columns of weight2, chunk by chunk. The activated values go into the second
product from registers, like the weights of attention.
"""

# Triton's own annotations know neither launch options nor its loops.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from visformer.kernels.linear_triton import activate, for_output, fp32_precision, must_widen, product


@triton.jit
def mlp_kernel(
    x,  # (rows, channels)
    weight1,  # (hidden, channels)
    bias1,  # (hidden)
    weight2,  # (channels, hidden)
    bias2,  # (channels)
    residual,  # (rows, channels)
    out,  # (rows, channels)
    rows,
    hidden,
    activation: tl.constexpr,
    has_residual: tl.constexpr,
    precision: tl.constexpr,
    widen: tl.constexpr,
    chunks: tl.constexpr,
    chunk: tl.constexpr,
    block_rows: tl.constexpr,
    block_hidden: tl.constexpr,
):
    channels: tl.constexpr = chunks * chunk
    first = tl.program_id(0).to(tl.int64) * block_rows
    row = tl.arange(0, block_rows)
    step = tl.arange(0, block_hidden)
    channel = tl.arange(0, chunk)
    rows_left = (rows - first).to(tl.int32)
    loaded = tl.minimum(row, rows_left - 1)[:, None] * channels + channel[None, :]

    x_blocks = ()
    totals = ()
    for i in tl.static_range(chunks):
        x_blocks += (tl.load(x + first * channels + loaded + i * chunk),)
        totals += (tl.zeros((block_rows, chunk), dtype=tl.float32),)
    for start in range(0, hidden, block_hidden):
        values = tl.zeros((block_rows, block_hidden), dtype=tl.float32)
        for i in tl.static_range(chunks):
            w1 = tl.load(weight1 + (start + step)[None, :] * channels + (i * chunk + channel)[:, None])
            values = product(x_blocks[i], w1, values, precision, widen)
        values += tl.load(bias1 + start + step).to(tl.float32)[None, :]
        values = activate(values, activation).to(x.dtype.element_ty)
        sums = ()
        for i in tl.static_range(chunks):
            w2 = tl.load(weight2 + (i * chunk + channel)[None, :] * hidden + (start + step)[:, None])
            sums += (product(values, w2, totals[i], precision, widen),)
        totals = sums

    stored = (row < rows_left)[:, None]
    for i in tl.static_range(chunks):
        place = row[:, None] * channels + (i * chunk + channel)[None, :]
        result = totals[i] + tl.load(bias2 + i * chunk + channel).to(tl.float32)[None, :]
        if has_residual:
            result += tl.load(residual + first * channels + place, mask=stored, other=0.0).to(tl.float32)
        tl.store(out + first * channels + place, result.to(out.dtype.element_ty), mask=stored)


def launch_mlp(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    residual: Tensor | None,
    out: Tensor,
    activation: str,
    tile: tuple[int, ...],
) -> None:
    """Fill `out` from `x`, both (B, C, H, W); all maps channels_last, weights contiguous."""
    block_rows, block_hidden, chunk, num_warps, num_stages = tile
    hidden, channels = weight1.shape
    rows = x.numel() // channels
    mlp_kernel[(triton.cdiv(rows, block_rows),)](
        x,
        weight1,
        bias1,
        weight2,
        bias2,
        x if residual is None else residual,
        out,
        rows,
        hidden,
        activation=for_output(activation, out.dtype),
        has_residual=residual is not None,
        precision=fp32_precision(),
        widen=must_widen(x.dtype),
        chunks=channels // chunk,
        chunk=chunk,
        block_rows=block_rows,
        block_hidden=block_hidden,
        num_warps=num_warps,
        num_stages=num_stages,
        enable_fp_fusion=True,
    )
