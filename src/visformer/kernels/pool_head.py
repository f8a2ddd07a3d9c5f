"""The end of the network: the average over all positions and the linear head.

    logits = mean(x) weight^T + bias

The last BatchNorm is an affine map for each channel, and a mean is linear, so the norm goes into weight and bias
exactly. Two ways, of which a tile says one: for large batches one kernel averages, a block of channels of an image for
each program, and `linear` multiplies; for small batches, where launching is what takes the time, one kernel does both,
each program averaging its image again for its block of classes.

Bytes, bf16, batch 256, 224 pixels: visformer_small's last map of 49 x 768 is 19.3 MB, 6 us at 3.0 TB/s; the head's
weight 1.5 MB. Averaging is in fp32; the one-kernel form does not round the averages at all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from visformer.kernels import linear
from visformer.kernels.launch import runs_triton
from visformer.kernels.linear import Tile, channels_last, check_map, check_shape, chosen_tile, power_of_two, takes

_SMALL_BATCH = 16  # up to which the one-kernel form is offered first


def pool_head(x: Tensor, weight: Tensor, bias: Tensor | None = None, tile: Sequence[int] = ()) -> Tensor:
    """The average of a map over its positions, times `weight`, plus `bias`; inference only.

    Args:
        x: (B, C, H, W), made channels_last when it is not.
        weight: (classes, C), of x's dtype.
        bias: (classes), of any floating dtype.
        tile: one of `tiles(B, C, H * W, classes, dtype)`; empty: the first of them.

    Returns logits (B, classes) of x's dtype. Raises `UsageError` for shapes that do not fit.
    """
    return _operator(x, weight, bias, tile)


def pool_head_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same in plain PyTorch."""
    pooled = x.mean((2, 3), dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)
    return F.linear(pooled, weight, None if bias is None else bias.to(x.dtype))


def tiles(batch: int, channels: int, positions: int, classes: int, dtype: torch.dtype) -> list[Tile]:
    """Candidates (block_positions, block_channels, block_classes, num_warps); block_classes 0: two kernels, the second
    being `linear` with its own first tile.

    The one-kernel form has classes / block_classes programs for each image, which read the image once each.
    """
    width = min(128, power_of_two(channels))
    height = min(64, power_of_two(positions))
    one = [(height, width, size, 4) for size in (16, 32, 64) if size <= power_of_two(classes)]
    two = [(height, width, 0, 4), (height, max(16, width // 2), 0, 4), (16, width, 0, 4), (height, width, 0, 8)]
    candidates = one + two if batch <= _SMALL_BATCH else two + one[-1:]
    return list(dict.fromkeys(candidates))


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_map("pool_head", "x", x)
    check_shape("pool_head", "weight", weight, (weight.shape[0], x.shape[1]), x.dtype)
    check_shape("pool_head", "bias", bias, (weight.shape[0],), None)


@torch.library.custom_op(
    "visformer::pool_head",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, int[] tile=[]) -> Tensor",
)
def _operator(x: Tensor, weight: Tensor, bias: Tensor | None, tile: Sequence[int] = ()) -> Tensor:
    _check(x, weight, bias)
    if not (runs_triton(x) and takes(x)):
        return pool_head_reference(x, weight, bias)
    from visformer.kernels.linear_triton import launch_linear
    from visformer.kernels.pool_head_triton import launch_pool, launch_pool_head

    (batch, channels, height, width), classes = x.shape, weight.shape[0]
    candidates = tiles(batch, channels, height * width, classes, x.dtype)
    tile = chosen_tile("pool_head", tile, candidates, 4)
    x, weight = channels_last(x), weight.contiguous()
    out = x.new_empty(batch, classes)
    with torch.cuda.device_of(x):
        if tile[2]:
            launch_pool_head(x, weight, bias, out, tile)
            return out
        pooled = x.new_empty(batch, channels)
        launch_pool(x, pooled, tile)
        product = linear.tiles(batch, channels, classes, x.dtype)[0]
        launch_linear(pooled[..., None, None], weight, bias, None, out[..., None, None], "none", product)
    return out


@_operator.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, tile: Sequence[int] = ()) -> Tensor:
    _check(x, weight, bias)
    return x.new_empty(x.shape[0], weight.shape[0])
