"""Multi-head attention straight from the map that the qkv product gives, over all positions or within windows.

    out = softmax(scale q k^T + bias) v

The library's attention wants q, k and v as tensors of their own, and windows cut out, rolled and padded: copies of the
whole map. Here a position's place in memory is computed, so the kernel reads the qkv map as it lies and writes the map
that `proj` takes; partition, cyclic shift, padding and the shift's mask are index arithmetic.

A program does a block of queries of one head and streams keys and values with a running softmax (Dao et al.,
"FlashAttention", arXiv 2205.14135) in fp32. Programs of an image's heads run side by side, so that the parts of a row
that they read share cache lines and the second-level cache holds an image while its blocks of queries are done.

Bytes and FLOPs, bf16, batch 256, 224 pixels: visformer_small on 14x14 (6 heads of 64) moves 154 MB, 51 us at 3.0 TB/s,
for 15.1 GFLOP, 19 us at 790 TFLOP/s, and 59 million exponentials, 16 us at 16 a clock and multiprocessor. With blocks
that do not divide 196 the products grow by 256 * 224 / 196^2, by half: memory still decides.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from visformer.errors import UsageError
from visformer.kernels.launch import runs_triton
from visformer.kernels.linear import (
    Tile,
    channels_last,
    check_map,
    check_shape,
    chosen_tile,
    new_map,
    power_of_two,
    takes,
)

MAX_HEAD_DIM = 128
Pair = tuple[int, int]  # along the rows, along the columns

_HALF_SHAPES = (  # queries, keys, warps, stages
    (64, 64, 4, 2),
    (64, 32, 4, 3),
    (128, 64, 8, 2),
    (128, 32, 8, 3),
    (64, 64, 8, 2),
    (64, 128, 4, 2),
    (64, 64, 4, 1),
    (64, 256, 8, 1),
    (32, 64, 4, 2),
    (32, 32, 2, 2),
    (16, 64, 2, 2),
    (16, 16, 2, 2),
)
_FP32_SHAPES = (
    (32, 32, 4, 2),
    (64, 32, 8, 2),
    (32, 16, 4, 2),
    (16, 32, 4, 2),
    (16, 16, 2, 2),
)


def attention(
    qkv: Tensor,
    num_heads: int,
    scale: float = 1.0,
    bias: Tensor | None = None,
    window: Sequence[int] = (),
    shift: Sequence[int] = (),
    tile: Sequence[int] = (),
) -> Tensor:
    """softmax(scale q k^T + bias) v for each head, over all positions of a map or within its windows; inference only.

    Args:
        qkv: (B, 3 * heads * d, H, W), channels ordered (3, heads, d), d up to 128; made channels_last when it is not.
        num_heads: heads.
        scale: of the products of queries and keys.
        bias: (heads, N, N), of any floating dtype; N positions attend to one another, H * W or those of a window.
            Packed by `pack_bias` at each call unless it is so already.
        window: (height, width) of a window, at most the map's; empty: the whole map. Windows that do not divide the map
            reach beyond it at the right and the bottom, where there is nothing to attend to.
        shift: how far the map is rolled up and left before windows are cut; empty: (0, 0). Positions of one window that
            came from opposite ends of an axis do not attend to one another.
        tile: one of `tiles(N, d, dtype)`; empty: the first of them.

    Returns a new channels_last map (B, heads * d, H, W). Raises `UsageError` for shapes that do not fit.
    """
    return _operator(qkv, num_heads, scale, bias, window, shift, tile)


def attention_reference(
    qkv: Tensor,
    num_heads: int,
    scale: float = 1.0,
    bias: Tensor | None = None,
    window: Sequence[int] = (),
    shift: Sequence[int] = (),
) -> Tensor:
    """The same in plain PyTorch: positions gathered into windows, and put back."""
    batch, channels, height, width = qkv.shape
    places, inside, region = window_places((height, width), window, shift, qkv.device)  # each (windows, N)
    rows = qkv.permute(0, 2, 3, 1).reshape(batch, height * width, 3, num_heads, channels // (3 * num_heads))
    q, k, v = rows[:, places].permute(3, 0, 1, 4, 2, 5).unbind(0)  # each (B, windows, heads, N, d)
    apart = (region[:, :, None] != region[:, None, :]) | ~inside[:, None, :]  # (windows, N of query, N of key)
    apart &= inside[:, :, None]  # what is no position is not put back, and must not be without a key
    mask = None if bias is None else bias.to(qkv.dtype)
    if apart.any():
        hidden = torch.zeros_like(apart, dtype=qkv.dtype).masked_fill(apart, float("-inf"))[:, None]
        mask = hidden if mask is None else mask + hidden  # (windows, heads, N, N)
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    out = qkv.new_empty(batch, height * width, channels // 3)
    out[:, places[inside]] = x.transpose(2, 3).flatten(3)[:, inside]
    return out.unflatten(1, (height, width)).permute(0, 3, 1, 2)


def pack_bias(bias: Tensor) -> Tensor:
    """`bias` (heads, N, N) as a view of rows rounded up to 16 values, which the kernel reads eight at a time; 196 are
    a multiple of 4 only. Once for all calls."""
    count = bias.shape[-1]
    return F.pad(bias, (0, -count % 16))[..., :count]


def window_places(
    grid: Pair, window: Sequence[int], shift: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Which positions of a map of `grid` each window holds.

    Returns, each (windows, N): the position's number row * width + column, 0 where there is none; whether there is one;
    and a number that is equal for positions that attend to one another: by axis, whether they came round in the roll.
    """
    size, shift = _pair(window, grid), _pair(shift, (0, 0))
    sources, insides, rounds = [], [], []
    for side, length, offset in zip(grid, size, shift, strict=True):
        place = torch.arange(_padded(side, length), device=device)
        source = (place + offset) % len(place)
        sources.append(source)
        insides.append(source < side)
        rounds.append((place >= len(place) - offset).long())
    inside = insides[0][:, None] & insides[1]
    places = torch.where(inside, sources[0][:, None] * grid[1] + sources[1], 0)
    region = 2 * rounds[0][:, None] + rounds[1]
    return tuple(_cut(x, size) for x in (places, inside, region))  # type: ignore[return-value]


def tiles(tokens: int, head_dim: int, dtype: torch.dtype) -> list[Tile]:
    """Candidates (block_queries, block_keys, num_warps, num_stages) for heads of `head_dim` over `tokens` positions.

    Best guess first: 64 queries for a group of four warps, the least that Hopper's own products take. Logits and the
    accumulator take block_queries * (block_keys + head_dim) / (32 * num_warps) registers of a thread, at most 96; with
    weights in half precision and addresses beside them that comes to about twice as many (82 to 186 for heads of 64).
    Shared memory holds the queries and `num_stages` blocks of keys and of values. For 64 by 64 by 64 that is 124
    registers and 41 kB: four programs share a multiprocessor, and one's exponentials hide behind another's products.
    """
    shapes = _FP32_SHAPES if dtype.itemsize >= 4 else _HALF_SHAPES
    width = power_of_two(head_dim)
    return [
        (queries, keys, num_warps, num_stages)
        for queries, keys, num_warps, num_stages in shapes
        if max(queries, keys) <= power_of_two(tokens)
        and queries * (keys + width) <= 96 * 32 * num_warps
        and (num_stages > 1 or keys >= tokens)
        and width * (queries + 2 * num_stages * keys) * dtype.itemsize <= 200 * 1024
    ]


def _packed(bias: Tensor) -> bool:
    """Whether `bias` lies as `pack_bias` leaves it."""
    by_head, by_row, by_key = bias.stride()
    return by_key == 1 and by_row >= bias.shape[2] and by_row % 16 == 0 and by_head == bias.shape[1] * by_row


def _padded(side: int, length: int) -> int:
    return -(-side // length) * length


def _pair(given: Sequence[int], default: Pair) -> Pair:
    return (given[0], given[1]) if given else default


def _cut(x: Tensor, size: Pair) -> Tensor:
    """(padded H, padded W) -> (windows, N)"""
    x = x.unflatten(1, (-1, size[1])).unflatten(0, (-1, size[0]))
    return x.transpose(1, 2).flatten(2).flatten(0, 1)


def _check(qkv: Tensor, num_heads: int, bias: Tensor | None, window: Sequence[int], shift: Sequence[int]) -> None:
    check_map("attention", "qkv", qkv)
    if num_heads < 1 or qkv.shape[1] % (3 * num_heads) or qkv.shape[1] > 3 * num_heads * MAX_HEAD_DIM:
        raise UsageError(
            f"attention: {qkv.shape[1]} channels of qkv do not fit {num_heads} heads; there must be "
            f"3 * {num_heads} * d of them, d from 1 to {MAX_HEAD_DIM}"
        )
    grid = (qkv.shape[2], qkv.shape[3])
    for name, given in (("window", window), ("shift", shift)):
        if len(given) not in (0, 2):
            raise UsageError(f"attention: {name} {tuple(given)} is not possible; it is (rows, columns), or empty")
    size, offset = _pair(window, grid), _pair(shift, (0, 0))
    for side, length, places in zip(grid, size, offset, strict=True):
        if not 1 <= length <= side or not 0 <= places < length:
            raise UsageError(
                f"attention: windows of {size} shifted by {offset} do not fit a map of {grid}; along each axis a "
                "window has at least one position and at most the map's, and the shift is below the window"
            )
    count = size[0] * size[1]
    check_shape("attention", "bias", bias, (num_heads, count, count), None)


@torch.library.custom_op(
    "visformer::attention",
    mutates_args=(),
    schema="(Tensor qkv, int num_heads, float scale, Tensor? bias, int[] window, int[] shift, int[] tile=[]) -> Tensor",
)
def _operator(
    qkv: Tensor,
    num_heads: int,
    scale: float,
    bias: Tensor | None,
    window: Sequence[int],
    shift: Sequence[int],
    tile: Sequence[int] = (),
) -> Tensor:
    _check(qkv, num_heads, bias, window, shift)
    if not (runs_triton(qkv) and takes(qkv)):
        return attention_reference(qkv, num_heads, scale, bias, window, shift)
    from visformer.kernels.attention_triton import launch_attention

    grid = (qkv.shape[2], qkv.shape[3])
    size = _pair(window, grid)
    candidates = tiles(size[0] * size[1], qkv.shape[1] // (3 * num_heads), qkv.dtype)
    out = new_map(qkv, qkv.shape[1] // 3)
    if bias is not None and not _packed(bias):
        bias = pack_bias(bias.contiguous())
    tile = chosen_tile("attention", tile, candidates, 4)
    with torch.cuda.device_of(qkv):
        launch_attention(channels_last(qkv), bias, out, num_heads, scale, size, _pair(shift, (0, 0)), tile)
    return out


@_operator.register_fake
def _(
    qkv: Tensor,
    num_heads: int,
    scale: float,
    bias: Tensor | None,
    window: Sequence[int],
    shift: Sequence[int],
    tile: Sequence[int] = (),
) -> Tensor:
    _check(qkv, num_heads, bias, window, shift)
    return new_map(qkv, qkv.shape[1] // 3)
