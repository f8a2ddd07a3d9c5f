"""The kernels of `grouped_conv`: the product forward, which also gives the gradient of the input, and the gradient of
the weight.

Rows of the product are patches of the output, numbered over (image, patch row, patch column). An address is the 64-bit
place of the patch's first position plus a 32-bit step to the tap, so maps of any size fit. What a patch sees outside of
the map is masked, to zero.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
# (it knows neither the options of a launch nor static_range)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from visformer.kernels.grouped_conv_tiles import GroupedTile
from visformer.kernels.linear_triton import activate, fp32_precision, must_widen, product

_NEIGHBOURS = 8  # blocks of patches that are next to one another in time, for each bundle in turn


@triton.jit
def derivative(x, activation: tl.constexpr):
    """Of a GELU, at an fp32 block."""
    if activation == "gelu":
        slope = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:  # x s(v), where s is the logistic function and v = 2 sqrt(2 / pi) (x + 0.044715 x^3)
        logistic = 1.0 / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
        inner = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        slope = logistic + x * logistic * (1.0 - logistic) * inner
    return slope


@triton.jit
def place_of(
    block,
    patches,
    height,
    width,
    down,
    across,
    patch_height: tl.constexpr,
    patch_width: tl.constexpr,
    block_patches: tl.constexpr,
):
    """Of each patch of a block: whether it is there, its first row and column, and the place of its first position. One
    that is not there has the place of the last."""
    patch = block * block_patches + tl.arange(0, block_patches)
    present = patch < patches
    patch = tl.minimum(patch, patches - 1)
    left = patch % across * patch_width
    top = patch // across % down * patch_height
    return present, top, left, (patch // (across * down) * height + top).to(tl.int64) * width + left


@triton.jit
def inputs_of(
    source,
    present,
    top,
    left,
    k,
    height,
    width,
    channels: tl.constexpr,
    bundle_width: tl.constexpr,
    inner: tl.constexpr,
    patch_width: tl.constexpr,
):
    """Load what patches see, (patches, k): numbers k of the inner dimension, zeros outside of the map."""
    column = k // bundle_width % (patch_width + 2) - 1
    row = k // (bundle_width * (patch_width + 2)) - 1
    seen_row = top[:, None] + row[None, :]
    seen_column = left[:, None] + column[None, :]
    seen = (seen_row >= 0) & (seen_row < height) & (seen_column >= 0) & (seen_column < width)
    step = (row * width + column) * channels + k % bundle_width
    seen = seen & present[:, None] & (k < inner)[None, :]
    return tl.load(source[:, None] + step[None, :], mask=seen, other=0.0, cache_modifier=".ca")


@triton.jit
def outputs_of(
    present,
    top,
    left,
    n,
    height,
    width,
    channels: tl.constexpr,
    bundle_width: tl.constexpr,
    outputs: tl.constexpr,
    patch_width: tl.constexpr,
):
    """Which outputs of patches there are, (patches, n), and the step to each from its patch's first position, (n)."""
    row = n // (bundle_width * patch_width)
    column = n // bundle_width % patch_width
    inside = (top[:, None] + row[None, :] < height) & (left[:, None] + column[None, :] < width)
    return inside & present[:, None] & (n < outputs)[None, :], (row * width + column) * channels + n % bundle_width


@triton.jit
def grouped_conv_kernel(
    x,  # (B, H, W, channels)
    weight,  # (bundles, inner, outputs), packed
    bias,  # (channels)
    grad,  # as out
    out,  # (B, H, W, channels)
    patches,  # B * down * across
    height,
    width,
    down,  # patches from top to bottom of a map
    across,  # from left to right
    neighbours,
    channels: tl.constexpr,
    bundle_width: tl.constexpr,  # channels of a bundle
    inner: tl.constexpr,
    outputs: tl.constexpr,
    patch_height: tl.constexpr,
    patch_width: tl.constexpr,
    has_bias: tl.constexpr,
    activation: tl.constexpr,
    is_gradient: tl.constexpr,
    precision: tl.constexpr,
    widen: tl.constexpr,
    block_patches: tl.constexpr,
    block_outputs: tl.constexpr,
    block_inputs: tl.constexpr,
):
    # All bundles of a few blocks of patches run side by side, so that lines which bundles share are fetched once.
    lanes: tl.constexpr = (channels // bundle_width) * ((outputs + block_outputs - 1) // block_outputs)
    program = tl.program_id(0)
    turn = program % (neighbours * lanes)
    block = program // (neighbours * lanes) * neighbours + turn % neighbours
    bundle = (turn // neighbours) % (channels // bundle_width)
    n = (turn // neighbours) // (channels // bundle_width) * block_outputs + tl.arange(0, block_outputs)

    present, top, left, first = place_of(
        block, patches, height, width, down, across, patch_height, patch_width, block_patches
    )
    corner = first * channels + bundle * bundle_width
    weight_block = weight + bundle.to(tl.int64) * (inner * outputs)

    total = tl.zeros((block_patches, block_outputs), dtype=tl.float32)
    for start in range(0, inner, block_inputs):
        k = start + tl.arange(0, block_inputs)
        a = inputs_of(x + corner, present, top, left, k, height, width, channels, bundle_width, inner, patch_width)
        known = (k < inner)[:, None] & (n < outputs)[None, :]
        b = tl.load(weight_block + k[:, None] * outputs + n[None, :], mask=known, other=0.0)
        total = product(a, b, total, precision, widen)

    if has_bias:
        total += tl.load(bias + bundle * bundle_width + n % bundle_width).to(tl.float32)[None, :]
    stored, step = outputs_of(present, top, left, n, height, width, channels, bundle_width, outputs, patch_width)
    place = corner[:, None] + step[None, :]
    if is_gradient:
        total = derivative(total, activation) * tl.load(grad + place, mask=stored, other=0.0).to(tl.float32)
    else:
        total = activate(total, activation)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=stored)


@triton.jit
def weight_grad_kernel(
    grad,  # (B, H, W, channels)
    x,  # (B, H, W, channels)
    out,  # (parts, groups, inner, outputs), fp32
    patches,
    height,
    width,
    down,
    across,
    share,  # blocks of patches that a part sums
    channels: tl.constexpr,
    bundle_width: tl.constexpr,  # channels of a group
    inner: tl.constexpr,
    outputs: tl.constexpr,
    patch_height: tl.constexpr,
    patch_width: tl.constexpr,
    precision: tl.constexpr,
    widen: tl.constexpr,
    block_patches: tl.constexpr,
    block_outputs: tl.constexpr,
    block_inputs: tl.constexpr,
):
    blocks_in: tl.constexpr = (inner + block_inputs - 1) // block_inputs
    k = tl.program_id(0) % blocks_in * block_inputs + tl.arange(0, block_inputs)
    n = tl.program_id(0) // blocks_in * block_outputs + tl.arange(0, block_outputs)
    group = tl.program_id(1)
    part = tl.program_id(2)

    total = tl.zeros((block_inputs, block_outputs), dtype=tl.float32)
    for block in range(part * share, (part + 1) * share):
        present, top, left, first = place_of(
            block, patches, height, width, down, across, patch_height, patch_width, block_patches
        )
        corner = first * channels + group * bundle_width
        a = inputs_of(x + corner, present, top, left, k, height, width, channels, bundle_width, inner, patch_width)
        kept, step = outputs_of(present, top, left, n, height, width, channels, bundle_width, outputs, patch_width)
        b = tl.load((grad + corner)[:, None] + step[None, :], mask=kept, other=0.0)
        total = product(tl.trans(a), b, total, precision, widen)

    whole = (part * (channels // bundle_width) + group).to(tl.int64) * (inner * outputs)
    inside = (k < inner)[:, None] & (n < outputs)[None, :]
    tl.store(out + whole + k[:, None] * outputs + n[None, :], total, mask=inside)


def launch_grouped_conv(
    x: Tensor, packed: Tensor, bias: Tensor | None, grad: Tensor | None, out: Tensor, activation: str, tile: GroupedTile
) -> None:
    """Fill `out`; with `grad`, the derivative of the activation times `grad` instead of the activation. Maps are
    channels_last, `packed` is contiguous."""
    batch, channels, height, width = x.shape
    bundles, inner, outputs = packed.shape
    down, across = triton.cdiv(height, tile.patch_height), triton.cdiv(width, tile.patch_width)
    blocks = triton.cdiv(batch * down * across, tile.block_patches)
    neighbours = min(_NEIGHBOURS, blocks)
    lanes = bundles * triton.cdiv(outputs, tile.block_outputs)
    grouped_conv_kernel[(triton.cdiv(blocks, neighbours) * neighbours * lanes,)](
        x,
        packed,
        packed if bias is None else bias,
        x if grad is None else grad,
        out,
        batch * down * across,
        height,
        width,
        down,
        across,
        neighbours,
        channels=channels,
        bundle_width=channels // bundles,
        inner=inner,
        outputs=outputs,
        patch_height=tile.patch_height,
        patch_width=tile.patch_width,
        has_bias=bias is not None,
        activation=activation,
        is_gradient=grad is not None,
        precision=fp32_precision(),
        widen=must_widen(x.dtype),
        block_patches=tile.block_patches,
        block_outputs=tile.block_outputs,
        block_inputs=tile.block_inputs,
        enable_fp_fusion=True,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def launch_weight_grad(grad: Tensor, x: Tensor, groups: int, tile: tuple[int, ...]) -> Tensor:
    """Gradients of the packed weight, (parts, groups, inner, columns) in fp32, each summed over one part of the
    patches."""
    block_patches, block_inputs, block_outputs, patch_height, patch_width, parts, num_warps, num_stages = tile
    batch, channels, height, width = x.shape
    group = channels // groups
    inner, outputs = (patch_height + 2) * (patch_width + 2) * group, patch_height * patch_width * group
    down, across = triton.cdiv(height, patch_height), triton.cdiv(width, patch_width)
    blocks = triton.cdiv(batch * down * across, block_patches)
    out = torch.empty(parts, groups, inner, outputs, dtype=torch.float32, device=x.device)
    weight_grad_kernel[(triton.cdiv(inner, block_inputs) * triton.cdiv(outputs, block_outputs), groups, parts)](
        grad,
        x,
        out,
        batch * down * across,
        height,
        width,
        down,
        across,
        triton.cdiv(blocks, parts),
        channels=channels,
        bundle_width=group,
        inner=inner,
        outputs=outputs,
        patch_height=patch_height,
        patch_width=patch_width,
        precision=fp32_precision(),
        widen=must_widen(x.dtype),
        block_patches=block_patches,
        block_outputs=block_outputs,
        block_inputs=block_inputs,
        enable_fp_fusion=True,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return out
