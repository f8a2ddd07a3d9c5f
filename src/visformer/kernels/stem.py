"""The stem, a 7x7 convolution of stride 2 with bias and ReLU, straight from the pixels.

A product's row is a strip of `span` neighbouring output positions. It reads 7 rows of 2 * span + 5 pixels, and its
columns are (position in the strip, output channel); a position's weights stand where it sees pixels, zeros elsewhere.
A strip of 4 reads 91 pixels where 4 single positions read 196, and makes 16 or 32 channels a product of 64 or 128
columns.

Images come as uint8 in [0, 255], never normalised in memory. A byte is exact in bf16, so the product runs on bytes,
with the weight divided by the standard deviation; what the mean would have taken away is a bias of its own: the sum
of weight times mean over the taps that lie inside the image, since the zeros around an image are zeros after
normalisation. Which taps do depends on the position only through how many rows and columns of the 7x7 window lie
outside at each side; from 0 to 3 at each, so `fold_normalisation` makes a table of 16 x 16 biases, exact at every
border.

Where the bytes of an image row are a multiple of 4, a strip is read as 32-bit words, each of which gives 4 numbers:
words begin at the fourth pixel to the left of the strip, so they are aligned and never hold both sides of the image's
edge. The inner dimension is then (byte of the word, row, word).

Bytes and FLOPs, bf16, batch 256, 224 pixels: visformer_small, 32 channels, reads 39 MB, writes 206 MB, for 30 GFLOP:
81 us at 3.0 TB/s, of which the map is nearly all; visformer_tiny, 16 channels, half the map, 47 us. In fp32
normalised input would be another 154 MB to write and to read. As strips of 4 in words, visformer_small's product is
79 GFLOP with its zeros, 100 us at 790 TFLOP/s; strips of 2 in words make it 53, and read 28 words for an output
position instead of 19.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from visformer.errors import UsageError
from visformer.kernels.launch import kept, runs_triton
from visformer.kernels.linear import channels_last, check_shape, describe, power_of_two

KERNEL, STRIDE, PADDING = 7, 2, 3
_WORD = 4  # bytes, and the pixels by which a strip's first word lies to the left of its first output's middle


class StemTile(NamedTuple):
    """How a program's work is cut; `words` is 1 where 32-bit words are read, 0 for a number at a time."""

    block_strips: int
    block_inputs: int  # words or numbers
    span: int
    words: int
    num_warps: int
    num_stages: int


def stem(x: Tensor, weight: Tensor, bias: Tensor, tile: Sequence[int] = ()) -> Tensor:
    """ReLU(7x7 convolution of stride 2, padded by 3, plus bias); inference only.

    Args:
        x: (B, C, H, W), made channels_last when it is not: floating and normalised, or uint8 in [0, 255].
        weight: (out, C, 7, 7), or what `pack_weight` made of it for `tile`. Its dtype is the output's and floating x's.
        bias: (out), of any floating dtype; for uint8 the table (256, out) of `fold_normalisation`.
        tile: one of `tiles(B, C, H, W, out, x.dtype, weight.dtype)`; empty: the first of them.

    Returns a new channels_last map (B, out, ceil(H / 2), ceil(W / 2)). Raises `UsageError` for what does not fit.
    """
    return _operator(x, weight, bias, tile)


def stem_reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same in plain PyTorch, with the plain weight."""
    if bias.dim() == 1:
        out = F.conv2d(x.to(weight.dtype), weight, bias.to(weight.dtype), stride=STRIDE, padding=PADDING)
    else:  # in the table's precision, since what it takes away is several times what is left
        rows, columns = (_border(side, x.device) for side in x.shape[2:])
        table = bias[(16 * rows[:, None] + columns).flatten()].unflatten(0, (len(rows), len(columns)))  # (h, w, out)
        out = F.conv2d(x.to(bias.dtype), weight.to(bias.dtype), stride=STRIDE, padding=PADDING)  # (B, out, h, w)
        out = (out + table.permute(2, 0, 1)).to(weight.dtype)
    return F.relu(out).contiguous(memory_format=torch.channels_last)


def fold_normalisation(
    weight: Tensor, bias: Tensor, mean: Sequence[float], std: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Weight and bias for pixels in [0, 255] of a stem that was made for (pixels - mean) / std.

    Args:
        weight: (out, C, 7, 7), BatchNorm folded in, of the dtype to compute in.
        bias: (out).
        mean, std: for each channel, on the scale of 0 to 255.

    Returns the weight in its dtype, and the biases (256, out) in fp32. Entry 16 r + c is for r = 4 * (window rows above
    the image) + 3 - (window rows below it), and c the same of columns.
    """
    if len(mean) != weight.shape[1] or len(std) != weight.shape[1]:
        raise UsageError(f"stem: {len(mean)} means and {len(std)} deviations for {weight.shape[1]} channels")
    scale = torch.tensor(list(std), dtype=torch.float64, device=weight.device)[:, None, None]
    folded = (weight.double() / scale).to(weight.dtype)
    shift = torch.tensor(list(mean), dtype=torch.float64, device=weight.device)[:, None, None]
    taken = (folded.double() * shift).sum(1)  # (out, 7, 7)
    sides = torch.arange(KERNEL, device=weight.device)
    first, end = torch.arange(4, device=weight.device), torch.arange(4, KERNEL + 1, device=weight.device)
    inside = (sides >= first[:, None, None]) & (sides < end[:, None])  # (4, 4, 7): by first and end of what is inside
    inside = inside.flatten(0, 1).double()  # (16, 7)
    table = bias.double() - torch.einsum("ri,cj,oij->rco", inside, inside, taken).flatten(0, 1)
    return folded, table.float()


def pack_weight(weight: Tensor, tile: Sequence[int]) -> Tensor:
    """(out, C, 7, 7) -> the weight as the kernel reads it with `tile`: (1 or 4 bytes of a word, inner, span * out)."""
    t = _tile_of(tile)
    out_channels, channels = weight.shape[:2]
    line = weight.permute(2, 3, 1, 0).reshape(KERNEL, KERNEL * channels, out_channels)  # (row, (column, channel), out)
    length = _WORD * _words(channels, t.span) if t.words else (2 * t.span + 5) * channels
    first = channels * (_WORD - PADDING) if t.words else 0
    packed = weight.new_zeros(KERNEL, length, t.span, out_channels)
    for position in range(t.span):
        start = first + STRIDE * channels * position
        packed[:, start : start + KERNEL * channels, position] = line
    if not t.words:
        return packed.reshape(1, KERNEL * length, t.span * out_channels)
    return (
        packed.unflatten(1, (-1, _WORD)).permute(2, 0, 1, 3, 4).reshape(_WORD, -1, t.span * out_channels).contiguous()
    )


@kept
def tiles(
    batch: int,
    in_channels: int,
    height: int,
    width: int,
    out_channels: int,
    x_dtype: torch.dtype,
    dtype: torch.dtype,
) -> list[tuple[int, ...]]:
    """Candidates (`StemTile`) for images of `x_dtype` and a weight of `dtype`, the best guess first.

    Words come first, then strips that make the product 64 columns wide. Of a thread's registers the accumulator takes
    block_strips * span * out_channels / (32 * num_warps) and what it has just loaded block_inputs / (span *
    out_channels) times as many; at more than 80 together programs begin to spill.
    """
    half, across = dtype.itemsize < 4, -(-width // STRIDE)
    found = []
    for words in (1, 0) if x_dtype == torch.uint8 and width * in_channels % _WORD == 0 else (0,):
        for span in (4, 2, 8, 1):
            columns = power_of_two(span * out_channels)
            if span > across or (words and span % 2) or columns > (256 if span == 1 else 128):
                continue
            strips = batch * -(-height // STRIDE) * -(-across // span)
            for block_strips, num_warps in ((128, 8), (64, 4), (128, 4)) if half else ((32, 4), (16, 4)):
                if block_strips > max(power_of_two(strips), 64 if half else 16):
                    continue
                for block_inputs, num_stages in ((32, 3), (64, 2)) if half else ((16, 1), (32, 1)):
                    if block_strips * (columns + block_inputs) <= 32 * num_warps * 80:
                        found.append(StemTile(block_strips, block_inputs, span, words, num_warps, num_stages))
    found.sort(key=lambda t: (-t.words, abs(t.span * out_channels - 64)))  # stable: the order above decides the rest
    return [tuple(t) for t in found[:12]]


def _words(channels: int, span: int) -> int:
    """Words that hold the pixels from the fourth to the left of a strip to the last that it sees."""
    return -(-channels * (2 * span + 5 + _WORD - PADDING) // _WORD)


def _border(side: int, device: torch.device) -> Tensor:
    """For each output position along a side of so many pixels, its 4 * first + end - 4 as `fold_normalisation` has
    it."""
    start = torch.arange(-(-side // STRIDE), device=device) * STRIDE - PADDING
    return 4 * (-start).clamp(min=0) + (side - start).clamp(max=KERNEL) - 4


def _tile_of(tile: Sequence[int]) -> StemTile:
    if len(tile) != len(StemTile._fields):
        raise UsageError(f"stem: tile {tuple(tile)} is not of the form ({', '.join(StemTile._fields)})")
    t = StemTile(*tile)
    if any(side < 16 or side & (side - 1) for side in t[:2]) or min(t.span, t.num_warps, t.num_stages) < 1:
        raise UsageError(f"stem: tile {tuple(tile)} is not possible: its first two are powers of two from 16 up")
    if t.words not in (0, 1) or (t.words and t.span % 2):
        raise UsageError(f"stem: tile {tuple(tile)} is not possible: strips are read as words (1) when span is even")
    return t


def _check_tile(x: Tensor, tile: Sequence[int]) -> StemTile:
    t = _tile_of(tile)
    if t.words and (x.dtype != torch.uint8 or x.shape[3] * x.shape[1] % _WORD):
        raise UsageError(
            f"stem: tile {tuple(t)} reads words; x, {describe(x)}, must be uint8, its rows a multiple of {_WORD} bytes"
        )
    return t


def _check(x: Tensor, weight: Tensor, bias: Tensor, tile: Sequence[int]) -> None:
    if x.dim() != 4 or (x.dtype != torch.uint8 and x.dtype != weight.dtype):
        raise UsageError(f"stem: x is {describe(x)}; it must be (B, C, H, W), uint8 or {weight.dtype} as the weight")
    out_channels, channels = bias.shape[-1], x.shape[1]
    check_shape("stem", "bias", bias, (256, out_channels) if x.dtype == torch.uint8 else (out_channels,), None)
    if weight.dim() == 3:
        t = _check_tile(x, tile)
        inner = _words(channels, t.span) if t.words else (2 * t.span + 5) * channels
        shape = (_WORD if t.words else 1, KERNEL * inner, t.span * out_channels)
        check_shape("stem", f"weight packed for tile {tuple(t)}", weight, shape, None)
    else:
        check_shape("stem", "weight", weight, (out_channels, channels, KERNEL, KERNEL), None)
    if tile:
        _check_tile(x, tile)


def _new_map(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    batch, _, height, width = x.shape
    shape = (batch, -(-height // STRIDE), -(-width // STRIDE), bias.shape[-1])
    return x.new_empty(shape, dtype=weight.dtype).permute(0, 3, 1, 2)


def _unpack_weight(packed: Tensor, channels: int, tile: StemTile) -> Tensor:
    """The inverse of `pack_weight`."""
    out_channels = packed.shape[2] // tile.span
    line = (
        packed.view(packed.shape[0], KERNEL, -1, tile.span, out_channels)[..., 0, :].permute(1, 2, 0, 3).flatten(1, 2)
    )
    first = channels * (_WORD - PADDING) if tile.words else 0
    line = line[:, first : first + KERNEL * channels].unflatten(1, (KERNEL, channels))  # (row, column, channel, out)
    return line.permute(3, 2, 0, 1).contiguous()


@torch.library.custom_op(
    "visformer::stem", mutates_args=(), schema="(Tensor x, Tensor weight, Tensor bias, int[] tile=[]) -> Tensor"
)
def _operator(x: Tensor, weight: Tensor, bias: Tensor, tile: Sequence[int] = ()) -> Tensor:
    _check(x, weight, bias, tile)
    if not runs_triton(x) or x.numel() == 0:
        plain = _unpack_weight(weight, x.shape[1], StemTile(*tile)) if weight.dim() == 3 else weight
        return stem_reference(x, plain, bias)
    from visformer.kernels.stem_triton import launch_stem

    batch, channels, height, width = x.shape
    shape = (batch, channels, height, width, bias.shape[-1])
    t = StemTile(*(tile or tiles(*shape, x.dtype, weight.dtype)[0]))
    packed = weight.contiguous() if weight.dim() == 3 else pack_weight(weight, t)
    out = _new_map(x, weight, bias)
    with torch.cuda.device_of(x):
        launch_stem(channels_last(x), packed, bias.contiguous(), out, t)
    return out


@_operator.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, tile: Sequence[int] = ()) -> Tensor:
    _check(x, weight, bias, tile)
    return _new_map(x, weight, bias)
