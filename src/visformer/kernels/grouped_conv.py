"""The grouped 3x3 convolution of spatial MLPs, as one matrix product that gathers its own input.

Stride 1, padding 1, as many channels out as in. A product's row is a patch of patch_height by patch_width output
positions of a bundle of groups; its inner dimension runs over the (patch_height + 2) by (patch_width + 2) input
positions that the patch sees and over their channels, (row, column, channel), its columns over (row, column, channel)
of the patch. The weight is laid out for that by `pack_weight`, with zeros where an output does not see an input: a
quarter of it for patches of 1x2, 7 sixteenths for 2x2. For that, 2x2 reads 4 inputs for an output position instead of
9, and groups of 12 or 24 channels make products of 48 or 96 columns, as wide as the tensor cores want them.

Bytes and FLOPs, bf16, batch 256, 224 pixels (roofline 790 TFLOP/s, 3.0 TB/s):
visformer_small 384 channels in groups of 48 on 28x28 moves 308 MB for 67 GFLOP, 103 us: memory and multiplication are
nearly in balance, so patches of more than two positions cost more than they bring;
visformer_tiny 192 in groups of 24 on 28x28 moves 154 MB for 17 GFLOP, 51 us: memory, with multiplication to spare.
All but the first of the taps of a position come from the first-level cache: pipelined copies to shared memory, which
pass it by as a rule (1.4 GB of taps from the second-level cache for the first example), are told to go through it.

Trained: the gradient of the input is the same product with each group's weight transposed and its taps reversed;
where there is an activation its argument is computed again, with the derivative in place of the activation, so
nothing but the input is kept. The gradient of the weight is summed over parts of the positions apart, then over the
parts: the same numbers at every run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from visformer.errors import UsageError
from visformer.kernels.grouped_conv_tiles import WEIGHT_GRAD_TILE, GroupedTile, tiles, weight_grad_tiles
from visformer.kernels.launch import runs_triton
from visformer.kernels.linear import (
    activate,
    channels_last,
    check_activation,
    check_map,
    check_shape,
    describe,
    new_map,
)

__all__ = ["grouped_conv", "grouped_conv_reference", "pack_weight", "tiles", "weight_grad_tiles"]

ACTIVATIONS = ("none", "gelu", "gelu_tanh")


def grouped_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    groups: int = 1,
    activation: str = "none",
    tile: Sequence[int] = (),
) -> Tensor:
    """activation(convolution of `x` by `weight` in `groups`, plus `bias`), differentiable once; follows autocast.

    Args:
        x: (B, C, H, W), made channels_last when it is not.
        weight: (C, C / groups, 3, 3) of x's dtype; or, for inference, what `pack_weight` made of it for `tile`.
        bias: (C), of any floating dtype.
        activation: one of `ACTIVATIONS`; gelu is the erf form.
        tile: one of `tiles(B, C, H, W, groups, dtype)`; empty: the first of them.

    Returns a new channels_last map (B, C, H, W). Raises `UsageError` for shapes or a tile that do not fit.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    return _operator(x, weight, bias, groups, activation, tile)


def grouped_conv_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, groups: int = 1, activation: str = "none"
) -> Tensor:
    """The same in plain PyTorch, with the plain weight."""
    bias = None if bias is None else bias.to(x.dtype)
    x = activate(F.conv2d(x, weight, bias, padding=1, groups=groups), activation)
    return x.contiguous(memory_format=torch.channels_last)


def pack_weight(weight: Tensor, groups: int, tile: Sequence[int]) -> Tensor:
    """(C, C / groups, 3, 3) -> the weight as the kernel reads it with `tile`: (bundles, inner, columns).

    inner is (patch_height + 2) * (patch_width + 2) * channels of a bundle, columns patch_height * patch_width * the
    same.
    """
    t, channels, width = GroupedTile.of(tile, groups), weight.shape[0], weight.shape[1]
    shape = (groups // t.bundle, t.patch_height + 2, t.patch_width + 2, t.bundle, width)
    packed = weight.new_zeros(*shape, t.patch_height, t.patch_width, t.bundle, width)
    plain = weight.reshape(groups // t.bundle, t.bundle, width, width, 3, 3)  # (bundles, group, out, in, 3, 3)
    _taps(packed).copy_(plain.permute(0, 1, 4, 5, 3, 2)[:, :, None, None])
    outputs = t.patch_height * t.patch_width * channels * t.bundle // groups
    return packed.view(groups // t.bundle, -1, outputs)


def _unpack_weight(packed: Tensor, groups: int, tile: GroupedTile) -> Tensor:
    """The inverse of `pack_weight`."""
    width = packed.shape[2] // (tile.patch_height * tile.patch_width * tile.bundle)
    return _plain(_taps(_unfold(packed, width, tile))[:, :, 0, 0], groups, width)


def _unfold(packed: Tensor, width: int, tile: GroupedTile) -> Tensor:
    """(bundles, inner, columns) -> (bundles, rows seen, columns seen, group, in, rows, columns, group, out)"""
    seen = (tile.patch_height + 2, tile.patch_width + 2, tile.bundle, width)
    return packed.view(packed.shape[0], *seen, tile.patch_height, tile.patch_width, tile.bundle, width)


def _taps(packed: Tensor) -> Tensor:
    """The places of a packed weight that are not zero, as a view: (bundles, group, rows, columns, 3, 3, in, out), the
    rows and columns those of the patch. Output row i sees input rows i, i + 1 and i + 2 of the patch's surroundings."""
    bundles, _, _, bundle, width, rows, columns = packed.shape[:7]
    whole, row_in, column_in, group_in, channel_in, row, column, group, channel = packed.stride()
    steps = (whole, group_in + group, row_in + row, column_in + column, row_in, column_in, channel_in, channel)
    return packed.as_strided((bundles, bundle, rows, columns, 3, 3, width, width), steps)


def _plain(taps: Tensor, groups: int, width: int) -> Tensor:
    """(bundles, group, 3, 3, in, out) -> (C, width, 3, 3)"""
    return taps.permute(0, 1, 5, 4, 2, 3).reshape(groups * width, width, 3, 3)


def _transposed(weight: Tensor, groups: int) -> Tensor:
    """The weight that takes a gradient of the output to one of the input, (C, width, 3, 3) both."""
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flip(3, 4).flatten(0, 1)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, activation: str, tile: Sequence[int]) -> None:
    check_map("grouped_conv", "x", x)
    channels = x.shape[1]
    if groups < 1 or channels % groups:
        raise UsageError(f"grouped_conv: {channels} channels do not make {groups} equal groups")
    width = channels // groups
    if weight.dim() == 3:
        t = GroupedTile.of(tile, groups)
        across = t.bundle * width
        inner, outputs = (t.patch_height + 2) * (t.patch_width + 2) * across, t.patch_height * t.patch_width * across
        check_shape(
            "grouped_conv", f"weight packed for tile {t}", weight, (groups // t.bundle, inner, outputs), x.dtype
        )
    else:
        check_shape("grouped_conv", "weight", weight, (channels, width, 3, 3), x.dtype)
    check_shape("grouped_conv", "bias", bias, (channels,), None)
    check_activation("grouped_conv", activation, ACTIVATIONS)


def _chosen(x: Tensor, groups: int, tile: Sequence[int]) -> GroupedTile:
    batch, channels, height, width = x.shape
    return GroupedTile.of(tile or tiles(batch, channels, height, width, groups, x.dtype)[0], groups)


@torch.library.custom_op(
    "visformer::grouped_conv",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, int groups, str activation, int[] tile=[]) -> Tensor",
)
def _operator(
    x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, activation: str, tile: Sequence[int] = ()
) -> Tensor:
    _check(x, weight, bias, groups, activation, tile)
    if not runs_triton(x) or x.numel() == 0:
        plain = _unpack_weight(weight, groups, GroupedTile(*tile)) if weight.dim() == 3 else weight
        return grouped_conv_reference(x, plain, bias, groups, activation)
    from visformer.kernels.grouped_conv_triton import launch_grouped_conv

    chosen = _chosen(x, groups, tile)
    packed = weight.contiguous() if weight.dim() == 3 else pack_weight(weight, groups, chosen)
    out = new_map(x, x.shape[1])
    with torch.cuda.device_of(x):
        launch_grouped_conv(channels_last(x), packed, bias, None, out, activation, chosen)
    return out


@_operator.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, activation: str, tile: Sequence[int] = ()) -> Tensor:
    _check(x, weight, bias, groups, activation, tile)
    return new_map(x, x.shape[1])


@torch.library.custom_op(
    "visformer::grouped_conv_activation_grad",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor weight, Tensor? bias, int groups, str activation, int[] tile=[]) -> Tensor",
)
def _activation_grad(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    activation: str,
    tile: Sequence[int] = (),
) -> Tensor:
    """`grad` times the activation's derivative at the convolution of `x`, which is computed again."""
    if not runs_triton(x) or x.numel() == 0:
        z = grouped_conv_reference(x, weight, bias, groups)
        form = "tanh" if activation == "gelu_tanh" else "none"
        return new_map(x, x.shape[1]).copy_(torch.ops.aten.gelu_backward(grad, z, approximate=form))
    from visformer.kernels.grouped_conv_triton import launch_grouped_conv

    chosen = _chosen(x, groups, tile)
    packed, out = pack_weight(weight, groups, chosen), new_map(x, x.shape[1])
    with torch.cuda.device_of(x):
        launch_grouped_conv(channels_last(x), packed, bias, channels_last(grad), out, activation, chosen)
    return out


@_activation_grad.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    activation: str,
    tile: Sequence[int] = (),
) -> Tensor:
    return new_map(x, x.shape[1])


@torch.library.custom_op(
    "visformer::grouped_conv_weight_grad",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, int groups, int[] tile=[]) -> Tensor",
)
def _weight_grad(grad: Tensor, x: Tensor, groups: int, tile: Sequence[int] = ()) -> Tensor:
    """The gradient of the plain weight, (C, C / groups, 3, 3) in x's dtype, summed in fp32."""
    batch, channels, height, across = x.shape
    if not runs_triton(x) or x.numel() == 0:
        shape = (channels, channels // groups, 3, 3)
        return conv2d_weight(x, shape, grad, padding=1, groups=groups).contiguous()
    from visformer.kernels.grouped_conv_triton import launch_weight_grad

    chosen = tuple(tile) or weight_grad_tiles(batch, channels, height, across, groups, x.dtype)[0]
    if len(chosen) != len(WEIGHT_GRAD_TILE):
        raise UsageError(f"grouped_conv_weight_grad: tile {chosen} is not of the form {WEIGHT_GRAD_TILE}")
    with torch.cuda.device_of(x):
        parts = launch_weight_grad(channels_last(grad), channels_last(x), groups, chosen)
    packed = parts.sum(0)  # (groups, inner, columns)
    patch = GroupedTile(0, 0, 0, chosen[3], chosen[4], 1, 0, 0)
    width = channels // groups
    return _plain(_taps(_unfold(packed, width, patch)).sum((2, 3)), groups, width).to(x.dtype).contiguous()


@_weight_grad.register_fake
def _(grad: Tensor, x: Tensor, groups: int, tile: Sequence[int] = ()) -> Tensor:
    return x.new_empty(x.shape[1], x.shape[1] // groups, 3, 3)


def _setup(ctx, inputs, output) -> None:
    x, weight, bias, ctx.groups, ctx.activation, ctx.tile = inputs
    if weight.dim() == 3 and (x.requires_grad or weight.requires_grad):
        raise UsageError(
            f"grouped_conv: weight is {describe(weight)}, packed for inference; train with the plain weight"
        )
    ctx.save_for_backward(x, weight, bias)


def _backward(ctx, grad: Tensor):
    x, weight, bias = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    if ctx.activation != "none":
        grad = _activation_grad(grad, x, weight, bias, ctx.groups, ctx.activation, ctx.tile)
    grad_x = _operator(grad, _transposed(weight, ctx.groups), None, ctx.groups, "none", ctx.tile) if needs_x else None
    grad_weight = _weight_grad(grad, x, ctx.groups) if needs_weight else None
    grad_bias = grad.sum((0, 2, 3), dtype=torch.float32).to(bias.dtype) if needs_bias else None
    return grad_x, grad_weight, grad_bias, None, None, None


def _no_second_derivative(ctx, grad: Tensor):
    raise UsageError(
        "grouped_conv: it has no second derivative; where one is needed, compute with grouped_conv_reference"
    )


_operator.register_autograd(_backward, setup_context=_setup)
for _first_derivative in (_activation_grad, _weight_grad):
    _first_derivative.register_autograd(_no_second_derivative)
