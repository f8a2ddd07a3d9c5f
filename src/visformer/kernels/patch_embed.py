"""A patch embedding as one matrix product over the map as it lies in memory, with everything that is added folded in.

A convolution whose kernel is its stride k. In channels_last memory the k pixels of one row of a patch are k * C
numbers one after the other, so the product's inner dimension, k rows of k * C, is read without the copy that a
library's product needs. The epilogue adds a map of biases, (h * w, out): convolution bias, norm and position
embedding in one. Maps that k does not divide count as zeros at the right and the bottom.

Bytes and FLOPs, bf16, batch 256, 224 pixels (roofline 790 TFLOP/s, 3.0 TB/s): visformer_small's first, 32 -> 192 on
112x112 with k 4, moves 283 MB for 39 GFLOP, 94 us: memory; its second, 192 -> 384 on 28x28 with k 2, 116 MB for 30
GFLOP, 39 us: nearly balanced; visformer_tiny's first, 16 -> 96, 141 MB for 10 GFLOP, 47 us: memory. The copy that is
not made would write and read each input once more: 411 MB, 137 us for the first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from visformer.errors import UsageError
from visformer.kernels.launch import kept, runs_triton
from visformer.kernels.linear import channels_last, check_map, check_shape, describe, power_of_two

TILE = ("block_rows", "block_outputs", "block_inputs", "num_warps", "num_stages")
_HALF_SHAPES = (  # rows, outputs, warps
    (128, 128, 8),
    (128, 64, 8),
    (64, 128, 4),
    (64, 64, 4),
    (128, 64, 4),
    (128, 32, 4),
    (64, 32, 4),
    (64, 16, 4),
)
_FP32_SHAPES = ((64, 64, 4), (64, 32, 4), (32, 64, 4), (32, 32, 4), (16, 32, 4), (16, 16, 4))
_SHARED_BYTES = 227 * 1024
_MULTIPROCESSORS = 132  # of an H100 or H200


def patch_embed(x: Tensor, weight: Tensor, bias: Tensor | None, patch_size: int, tile: Sequence[int] = ()) -> Tensor:
    """Each patch of `patch_size` squared projected to one position, plus `bias`; inference only.

    Args:
        x: (B, C, H, W), made channels_last when it is not.
        weight: (out, patch_size * patch_size * C) of x's dtype, ordered (row, column, channel): `pack_weight`.
        bias: (1, out), or for each position (h * w, out), row by row; of any floating dtype.
        tile: one of `tiles(B, C, H, W, out, patch_size, dtype)`; empty: the first of them.

    Returns a new channels_last map (B, out, h, w) with h = ceil(H / patch_size), w = ceil(W / patch_size). Raises
    `UsageError` for what does not fit.
    """
    return _operator(x, weight, bias, patch_size, tile)


def patch_embed_reference(x: Tensor, weight: Tensor, bias: Tensor | None, patch_size: int) -> Tensor:
    """The same in plain PyTorch."""
    bottom, right = -x.shape[2] % patch_size, -x.shape[3] % patch_size
    x = F.pad(x, (0, right, 0, bottom)).permute(0, 2, 3, 1)  # (B, H, W, C)
    x = x.unflatten(2, (-1, patch_size)).unflatten(1, (-1, patch_size))  # (B, h, p, w, p, C)
    out = F.linear(x.transpose(2, 3).flatten(3), weight)  # (B, h, w, out)
    if bias is not None:  # (1, out) or (h * w, out)
        out = (out + bias.reshape(-1, out.shape[2] if len(bias) > 1 else 1, out.shape[3])).to(x.dtype)
    return out.contiguous().permute(0, 3, 1, 2)


def pack_weight(weight: Tensor) -> Tensor:
    """(out, C, patch_size, patch_size) -> (out, patch_size * patch_size * C), ordered (row, column, channel)."""
    return weight.permute(0, 2, 3, 1).flatten(1).contiguous()


@kept
def tiles(
    batch: int, in_channels: int, height: int, width: int, out_channels: int, patch_size: int, dtype: torch.dtype
) -> list[tuple[int, ...]]:
    """Candidates `TILE` for a (batch, in_channels, height, width) map, the best guess first.

    A tile's accumulator takes block_rows * block_outputs / (32 * num_warps) of a thread's registers, at most 64 (32 in
    fp32). Ordered by `_cycles`, a model of time that only decides who is tried first.
    """
    rows = batch * -(-height // patch_size) * -(-width // patch_size)
    inner, half = patch_size * patch_size * in_channels, dtype.itemsize < 4
    shapes = _HALF_SHAPES if half else _FP32_SHAPES
    block_inputs = min(64 if half else 16, power_of_two(inner))
    found = []
    for block_rows, block_outputs, num_warps in shapes:
        if block_rows > max(power_of_two(rows), shapes[-1][0]) or block_outputs > power_of_two(out_channels):
            continue
        for num_stages in (3, 2) if half else (1,):
            shared = num_stages * (block_rows + block_outputs) * block_inputs * dtype.itemsize
            if shared <= _SHARED_BYTES // 2:
                found.append((block_rows, block_outputs, block_inputs, num_warps, num_stages))
    return sorted(found, key=lambda tile: _cycles(tile, rows, inner, out_channels, dtype))[:12]


def _cycles(tile: tuple[int, ...], rows: int, inner: int, out_channels: int, dtype: torch.dtype) -> float:
    """Clocks that the product takes with `tile`, about: 2048 multiplications of halves (128 in fp32) and 26 bytes
    from the second-level cache in a clock of one multiprocessor, and 1500 clocks of waiting that the programs share
    which the registers leave room for."""
    block_rows, block_outputs, _, num_warps, num_stages = tile
    multiply = block_rows * inner * max(block_outputs, 32) / (2048 if dtype.itemsize < 4 else 128)
    read = (block_rows + block_outputs) * inner * dtype.itemsize / 26
    registers = 32 * num_warps * max(96, 3 * block_rows * block_outputs // (32 * num_warps))
    wait = 1500 / (65536 // registers) + (100 if num_stages == 2 else 0)
    programs = -(-rows // block_rows) * -(-out_channels // block_outputs)
    return max(programs / _MULTIPROCESSORS, 1.0) * (max(multiply, read) + wait)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, patch_size: int, tile: Sequence[int]) -> None:
    check_map("patch_embed", "x", x)
    if patch_size < 1 or weight.dim() != 2:
        raise UsageError(
            f"patch_embed: patch_size is {patch_size}, weight {describe(weight)}; weight must be (out, inner)"
        )
    out_channels = weight.shape[0]
    check_shape("patch_embed", "weight", weight, (out_channels, patch_size * patch_size * x.shape[1]), x.dtype)
    if bias is not None:
        positions = -(-x.shape[2] // patch_size) * -(-x.shape[3] // patch_size)
        if tuple(bias.shape) != (1, out_channels):
            check_shape("patch_embed", "bias", bias, (positions, out_channels), None)
    if len(tile) and (len(tile) != len(TILE) or any(side < 16 or side & (side - 1) for side in tile[:3])):
        raise UsageError(
            f"patch_embed: tile {tuple(tile)} is not of the form ({', '.join(TILE)}), with powers of two from 16 up "
            "in the first three places"
        )


def _new_map(x: Tensor, weight: Tensor, patch_size: int) -> Tensor:
    batch, _, height, width = x.shape
    shape = (batch, -(-height // patch_size), -(-width // patch_size), weight.shape[0])
    return x.new_empty(shape).permute(0, 3, 1, 2)


@torch.library.custom_op(
    "visformer::patch_embed",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, int patch_size, int[] tile=[]) -> Tensor",
)
def _operator(x: Tensor, weight: Tensor, bias: Tensor | None, patch_size: int, tile: Sequence[int] = ()) -> Tensor:
    _check(x, weight, bias, patch_size, tile)
    if not runs_triton(x) or x.numel() == 0:
        return patch_embed_reference(x, weight, bias, patch_size)
    from visformer.kernels.patch_embed_triton import launch_patch_embed

    batch, channels, height, width = x.shape
    chosen = tuple(tile) or tiles(batch, channels, height, width, weight.shape[0], patch_size, x.dtype)[0]
    out = _new_map(x, weight, patch_size)
    bias = None if bias is None else bias.contiguous()
    with torch.cuda.device_of(x):
        launch_patch_embed(channels_last(x), weight.contiguous(), bias, out, patch_size, chosen)
    return out


@_operator.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, patch_size: int, tile: Sequence[int] = ()) -> Tensor:
    _check(x, weight, bias, patch_size, tile)
    return _new_map(x, weight, patch_size)
