"""The kernel of `linear`, and what the other products' kernels share with it: activation and product.

One program computes a tile of block_rows by block_out outputs. Offsets to the tile's first row are 64 bits wide and
those within a tile 32. Rows past the end load the last row again and store nothing, so that the loop needs no mask; it
masks channels only where block_in does not divide them.
"""

# Triton's own annotations know neither launch options nor its loops.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from visformer.kernels.launch import interpreted


@triton.jit
def activate(x, activation: tl.constexpr):
    """One of `linear.ACTIVATIONS` of an fp32 block, or `for_output`'s form of it; NaN stays NaN."""
    if activation == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif activation == "gelu_half":
        x = gelu_half(x)
    elif activation == "gelu_tanh":  # x * sigmoid(2 u) is x * (1 + tanh(u)) / 2, with u = sqrt(2 / pi) (x + ...)
        x = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    elif activation == "gelu_tanh_half":
        x = gelu_tanh_half(x)
    elif activation == "relu":
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return x


@triton.jit
def gelu_half(x):
    """The erf form of GELU, exact to what half precision keeps, in half the instructions of `erf`.

    gelu(x) = max(x, 0) - |x| Q(|x|), Q the normal distribution's upper tail. With u = |x| sqrt(log2(e) / 2) the second
    term is u P(u) 2^(-u^2), where P, of degree 9, is our own fit for |x| up to 5.7: its largest relative error is 7e-5,
    an eighth of a bit of fp16. Beyond that the term is below fp16's smallest number.
    """
    u = tl.minimum(tl.abs(x) * 0.8493218002880191, 10.0)  # 2^-100: no denormal numbers
    p = -3.65753686e-06 * u + 9.71421868e-05
    p = p * u - 0.00113067633
    p = p * u + 0.00763271948
    p = p * u - 0.0334888809
    p = p * u + 0.102223867
    p = p * u - 0.229464821
    p = p * u + 0.398525579
    p = p * u - 0.551600574
    p = p * u + 0.588665302
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) - u * p * tl.exp2(-u * u)


@triton.jit
def gelu_tanh_half(x):
    """The tanh form of GELU, exact to what half precision keeps, without a division.

    It is max(x, 0) - |x| e / (1 + e), where e = exp(-2 sqrt(2 / pi) (|x| + 0.044715 |x|^3)) lies between 0 and 1, and
    1 / (1 + e) is our own fit of degree 5 there, its largest relative error 6e-5.
    """
    u = tl.minimum(tl.abs(x), 6.0)  # where e is 2^-36, and what it makes below fp16's smallest number
    e = tl.exp2(-u * (0.1029432395800235 * u * u + 2.302208198144325))
    p = -0.104484487 * e + 0.417937972
    p = p * e - 0.770573097
    p = p * e + 0.953420844
    p = p * e - 0.996275723
    p = p * e + 0.999948984
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) - u * e * p


@triton.jit
def product(a, b, total, precision: tl.constexpr, widen: tl.constexpr):
    """total + a b, accumulated in fp32; `widen` for the interpreter, which multiplies bf16's bit patterns."""
    if widen:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=precision)


@triton.jit
def linear_kernel(
    x,  # (rows, in)
    weight,  # (out, in)
    bias,  # (out)
    residual,  # (rows, out)
    out,  # (rows, out)
    rows,
    out_channels,
    in_channels,
    activation: tl.constexpr,
    has_bias: tl.constexpr,
    has_residual: tl.constexpr,
    even_in: tl.constexpr,
    precision: tl.constexpr,
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

    stored = (row < rows_left)[:, None] & (column < out_channels)[None, :]
    place = row[:, None] * out_channels + column[None, :]
    total = tl.zeros((block_rows, block_out), dtype=tl.float32)
    if has_residual and activation == "none":  # the sum starts from it: fewer registers than adding it at the end
        total += tl.load(residual + first_row * out_channels + place, mask=stored, other=0.0).to(tl.float32)
    for start in range(0, in_channels, block_in):
        if even_in:
            a = tl.load(x_block + start)
            b = tl.load(weight_block + start)
        else:
            inside = step < in_channels - start
            a = tl.load(x_block + start, mask=inside[None, :], other=0.0)
            b = tl.load(weight_block + start, mask=inside[:, None], other=0.0)
        total = product(a, b, total, precision, widen)

    if has_bias:
        total += tl.load(bias + column, mask=column < out_channels, other=0.0).to(tl.float32)[None, :]
    total = activate(total, activation)
    if has_residual and activation != "none":
        total += tl.load(residual + first_row * out_channels + place, mask=stored, other=0.0).to(tl.float32)
    tl.store(out + first_row * out_channels + place, total.to(out.dtype.element_ty), mask=stored)


def launch_linear(
    x: Tensor,
    weight: Tensor,
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
    grid = (triton.cdiv(rows, block_rows) * triton.cdiv(out_channels, block_out),)
    linear_kernel[grid](
        x,
        weight,
        weight if bias is None else bias,
        x if residual is None else residual,
        out,
        rows,
        out_channels,
        in_channels,
        activation=for_output(activation, out.dtype),
        has_bias=bias is not None,
        has_residual=residual is not None,
        even_in=in_channels % block_in == 0,
        precision=fp32_precision(),
        widen=must_widen(x.dtype),
        block_rows=block_rows,
        block_out=block_out,
        block_in=block_in,
        num_warps=num_warps,
        num_stages=num_stages,
        enable_fp_fusion=True,
    )


def fp32_precision() -> str:
    """How products of fp32 are done: as torch's own setting says, by default in full."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def must_widen(dtype: torch.dtype) -> bool:
    """Whether operands must become fp32 before a product: the interpreter knows no bf16."""
    return interpreted() and dtype == torch.bfloat16


def for_output(activation: str, dtype: torch.dtype) -> str:
    """The form of an activation that is exact for results stored in `dtype`."""
    return f"{activation}_half" if activation.startswith("gelu") and dtype.itemsize == 2 else activation
