"""A product over the channels of every position, with bias, activation and residual in the same kernel.

    out = activation(x weight^T + bias) + residual

This is each 1x1 convolution of the models: `qkv` and `proj` of attention and both products of an MLP, once BatchNorm is
folded into them. What it saves against the library's product followed by other kernels is one reading and one writing
of the output map for each of bias, activation and residual that is not there.

Bytes and FLOPs, bf16, batch 256, 224 pixels (roofline 790 TFLOP/s, 3.0 TB/s, so 263 FLOP a byte are balanced):
visformer_tiny's first MLP 96 -> 192 on 28x28 moves 116 MB for 7.4 GFLOP, 64 FLOP a byte: memory, 39 us;
visformer_small's 384 -> 1536 on 14x14 moves 194 MB for 59 GFLOP, 305 FLOP a byte: balanced, 75 us.
The whole weight (at most 4.7 MB) stays in the 50 MB second-level cache, so programs run through a row of tiles first:
x then comes from memory once, whatever the tile's width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from visformer.errors import UsageError
from visformer.kernels.launch import runs_triton

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "relu")
Tile = tuple[int, ...]

_HALF_SHAPES = (  # rows, out, warps; from 64 rows up a product is Hopper's own (wgmma), by groups of four warps
    (128, 256, 8),
    (128, 128, 8),
    (256, 64, 8),
    (256, 128, 8),
    (128, 64, 4),
    (64, 256, 4),
    (64, 128, 4),
    (64, 64, 4),
    (64, 32, 4),
    (32, 64, 4),
    (16, 128, 4),
    (16, 64, 4),
    (16, 32, 2),
    (16, 16, 1),
)
_FP32_SHAPES = (
    (128, 64, 8),
    (64, 128, 8),
    (64, 64, 4),
    (64, 64, 8),
    (128, 32, 4),
    (64, 32, 4),
    (32, 64, 4),
    (32, 32, 4),
    (16, 64, 4),
    (16, 32, 2),
    (16, 16, 1),
)
_MULTIPROCESSORS = 132  # of an H100 or H200, and the same for what follows
_SHARED_BYTES = 227 * 1024


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    tile: Sequence[int] = (),
) -> Tensor:
    """activation(x weight^T + bias) + residual at every position of a map; inference only.

    Args:
        x: (B, in, H, W), made channels_last when it is not.
        weight: (out, in), of x's dtype.
        bias: (out), of any floating dtype.
        residual: (B, out, H, W), of x's dtype; added after the activation.
        activation: one of `ACTIVATIONS`; gelu is the erf form.
        tile: one of `tiles(B * H * W, in, out, dtype)`; empty: the first of them.

    Returns a new channels_last map (B, out, H, W). Raises `UsageError` for shapes that do not fit.
    """
    return _operator(x, weight, bias, residual, activation, tile)


def linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, activation: str = "none"
) -> Tensor:
    """The same in plain PyTorch."""
    if bias is not None:
        bias = bias.to(x.dtype)
    out = activate(F.linear(x.permute(0, 2, 3, 1), weight, bias), activation)  # (B, H, W, out)
    if residual is not None:
        out = out + residual.permute(0, 2, 3, 1)
    return out.contiguous().permute(0, 3, 1, 2)


def tiles(rows: int, in_channels: int, out_channels: int, dtype: torch.dtype) -> list[Tile]:
    """Candidates (block_rows, block_out, block_in, num_warps, num_stages) for a product of `rows` = B * H * W rows.

    Ordered by `_cycles`, a model of time that only decides who is tried first. A tile's accumulator takes
    block_rows * block_out / (32 * num_warps) registers of a thread. Compiled for compute capability 9.0 with GELU,
    128 by 128 by 64 (64 of them, three stages) takes 112 registers and 98 kB, so that two programs share a
    multiprocessor, and 128 by 256 by 64 takes 190 and 147 kB, one program; no candidate spills.
    """
    shapes = _FP32_SHAPES if dtype.itemsize >= 4 else _HALF_SHAPES
    block_in = _block_in(in_channels, dtype)
    found = {}
    for block_rows, block_out, num_warps in shapes:
        if block_rows > power_of_two(rows) or block_out > power_of_two(out_channels):
            continue
        stage_bytes = (block_rows + block_out) * block_in * dtype.itemsize
        num_stages = 4 if 8 * stage_bytes <= _SHARED_BYTES else 3
        tile = (block_rows, block_out, block_in, num_warps, num_stages)
        found[tile] = _cycles(tile, num_stages * stage_bytes, rows, in_channels, out_channels)
    return sorted(found, key=lambda tile: found[tile])[:12]


def _block_in(in_channels: int, dtype: torch.dtype) -> int:
    """The widest step of 64, 32 or 16 channels (half of it in fp32) that divides; else a masked one."""
    widest = 64 if dtype.itemsize < 4 else 32
    for step in (widest, widest // 2, 16):
        if in_channels % step == 0:
            return step
    return min(widest, power_of_two(in_channels))


def _cycles(tile: Tile, shared_bytes: int, rows: int, in_channels: int, out_channels: int) -> float:
    """Clocks that a product takes with `tile`, about: each program as long as the slower of its multiplications
    (2048 a clock and multiprocessor) and its loads from the second-level cache (32 values a clock), programs spread
    over the multiprocessors in whole rounds. Where two share one, the end of one hides behind the other's loop."""
    block_rows, block_out = tile[:2]
    resident = 2 if shared_bytes <= _SHARED_BYTES // 2 else 1
    programs = -(-rows // block_rows) * -(-out_channels // block_out)
    rounds = resident * -(-programs // (_MULTIPROCESSORS * resident))
    loop = in_channels * max(block_rows * block_out / 2048, (block_rows + block_out) / 32)
    return min(rounds, programs) * (loop + 1000 / resident)


def power_of_two(size: int) -> int:
    """The smallest power of two that holds `size`, at least 16: the least side of a block."""
    return max(16, 1 << (size - 1).bit_length())


def takes(x: Tensor) -> bool:
    """Whether a kernel takes `x`: there is something in it, in a dtype that it multiplies. Others get the reference."""
    return x.numel() > 0 and x.dtype in (torch.float32, torch.bfloat16, torch.float16)


def activate(x: Tensor, activation: str) -> Tensor:
    """One of `ACTIVATIONS` by name, in plain PyTorch."""
    if activation == "none":
        return x
    if activation == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def new_map(x: Tensor, channels: int) -> Tensor:
    """An empty channels_last map with x's batch, height and width, dtype and device."""
    batch, _, height, width = x.shape
    return x.new_empty(batch, height, width, channels).permute(0, 3, 1, 2)


def channels_last(x: Tensor) -> Tensor:
    """`x` (B, C, H, W) in (B, H, W, C) memory; itself when it is so already."""
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def check_map(operator: str, name: str, x: Tensor) -> None:
    """Raises `UsageError` for what is no map of floats."""
    if x.dim() != 4 or not x.is_floating_point():
        raise UsageError(f"{operator}: {name} is {describe(x)}; it must be a floating point map (B, C, H, W)")


def check_shape(operator: str, name: str, x: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype | None) -> None:
    """Raises `UsageError` for a tensor that is there and not of `shape` and, where one is given, `dtype`."""
    if x is None or (tuple(x.shape) == shape and dtype in (None, x.dtype)):
        return
    wanted = f"{shape}" + (f" of {dtype}" if dtype else "")
    raise UsageError(f"{operator}: {name} is {describe(x)}; it must be {wanted}")


def check_activation(operator: str, activation: str, known: tuple[str, ...] = ACTIVATIONS) -> None:
    """Raises `UsageError` for an activation that is not one of `known`."""
    if activation not in known:
        raise UsageError(f"{operator}: there is no activation {activation!r}; there are: {', '.join(known)}")


def chosen_tile(operator: str, tile: Sequence[int], candidates: list[Tile], length: int) -> Tile:
    """`tile`, or the first of `candidates` when it is empty. Raises `UsageError` for one of the wrong length."""
    if len(tile) not in (0, length):
        raise UsageError(
            f"{operator}: tile {tuple(tile)} is not possible; it has {length} numbers, see {operator}.tiles"
        )
    return tuple(tile) or candidates[0]


def describe(x: Tensor) -> str:
    """Shape and dtype, for a message."""
    return f"{tuple(x.shape)} of {x.dtype}"


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str) -> None:
    check_map("linear", "x", x)
    out_channels = weight.shape[0]
    check_shape("linear", "weight", weight, (out_channels, x.shape[1]), x.dtype)
    check_shape("linear", "bias", bias, (out_channels,), None)
    check_shape("linear", "residual", residual, (x.shape[0], out_channels, *x.shape[2:]), x.dtype)
    check_activation("linear", activation)


@torch.library.custom_op(
    "visformer::linear",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, str activation, int[] tile=[]) -> Tensor",
)
def _operator(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str, tile: Sequence[int] = ()
) -> Tensor:
    _check(x, weight, bias, residual, activation)
    if not (runs_triton(x) and takes(x)):
        return linear_reference(x, weight, bias, residual, activation)
    from visformer.kernels.linear_triton import launch_linear

    out_channels, in_channels = weight.shape
    rows = x.numel() // in_channels
    candidates = tiles(rows, in_channels, out_channels, x.dtype)
    out = new_map(x, out_channels)
    residual = None if residual is None else channels_last(residual)
    tile = chosen_tile("linear", tile, candidates, 5)
    with torch.cuda.device_of(x):
        launch_linear(channels_last(x), weight.contiguous(), bias, residual, out, activation, tile)
    return out


@_operator.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str, tile: Sequence[int] = ()
) -> Tensor:
    _check(x, weight, bias, residual, activation)
    return new_map(x, weight.shape[0])
