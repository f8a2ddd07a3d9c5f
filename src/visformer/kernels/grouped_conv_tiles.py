"""Which tiles `grouped_conv` tries for a shape, and why.

A tile is (block_patches, block_outputs, block_inputs, patch_height, patch_width, bundle, num_warps, num_stages): a
program computes block_patches rows by block_outputs columns of the product, block_inputs of the inner dimension at a
time; patch and bundle say what a row is (see `grouped_conv`). Blocks are powers of two from 16 up.

The accumulator takes block_patches * block_outputs / (32 * num_warps) of a thread's 255 registers, at most 64.
Compiled for compute capability 9.0, a thread takes about three times that (97 at 32, 190 to 238 at 64 with the exact
GELU, 112 without), and none of the candidates of the models' shapes spills in bf16; with the GELU's derivative some
spill up to 80 bytes. So at 64 one program of eight warps fills a multiprocessor, at 32 two do. Input and weight blocks
lie in shared memory num_stages times: 33 to 98 kB of 227.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from visformer.errors import UsageError
from visformer.kernels.launch import kept
from visformer.kernels.linear import power_of_two

WEIGHT_GRAD_TILE = (
    "block_patches",
    "block_inputs",
    "block_outputs",
    "patch_height",
    "patch_width",
    "parts",
    "num_warps",
    "num_stages",
)
_MULTIPROCESSORS = 132  # of an H100 or H200
_SHARED_BYTES = 227 * 1024
_CANDIDATES = 12


class GroupedTile(NamedTuple):
    """A tile by name."""

    block_patches: int
    block_outputs: int
    block_inputs: int
    patch_height: int
    patch_width: int
    bundle: int
    num_warps: int
    num_stages: int

    @classmethod
    def of(cls, tile: Sequence[int], groups: int) -> GroupedTile:
        """Raises `UsageError` for what is no tile, or one whose bundle does not divide the groups."""
        if len(tile) != len(cls._fields):
            raise UsageError(f"grouped_conv: tile {tuple(tile)} is not of the form ({', '.join(cls._fields)})")
        t = cls(*tile)
        if any(side < 16 or side & (side - 1) for side in t[:3]) or min(t[3:]) < 1 or groups % t.bundle:
            raise UsageError(
                f"grouped_conv: tile {tuple(tile)} is not possible: the first three are powers of two from 16 up, the "
                f"others at least 1, and the bundle (the sixth) divides the {groups} groups"
            )
        return t


def tiles(batch: int, channels: int, height: int, width: int, groups: int, dtype: torch.dtype) -> list[tuple[int, ...]]:
    """Candidates for `grouped_conv` of a (batch, channels, height, width) map, the best guess first, at most twelve.

    Ordered by `_cycles`, a model of time that only decides who is tried first.
    """
    half = dtype.itemsize < 4
    shapes = ((128, 4), (128, 8), (64, 4), (256, 8)) if half else ((64, 4), (32, 4), (16, 4))
    ranked = []
    for patch_height, patch_width, bundle in _rows(channels // groups, groups, height, width):
        outputs = patch_height * patch_width * bundle * channels // groups
        patches = batch * -(-height // patch_height) * -(-width // patch_width)
        for block_patches, num_warps in shapes:
            if block_patches > max(power_of_two(patches), 64 if half else 16):
                continue
            accumulator = 32 * num_warps * (64 if half else 32)
            block_outputs = min(power_of_two(outputs), max(16, accumulator // block_patches))
            if half and block_outputs < 64 and num_warps * 16 > block_patches:
                continue  # more warps than the product has rows for
            for num_stages in (3, 2, 1) if half else (1,):
                block = (block_patches, block_outputs, 64 if half else 16)
                t = GroupedTile(*block, patch_height, patch_width, bundle, num_warps, num_stages)
                if num_stages * (block_patches + block_outputs) * t.block_inputs * dtype.itemsize <= _SHARED_BYTES // 2:
                    ranked.append((_cycles(t, patches, channels // groups, groups, dtype), t))
    return [tuple(t) for _, t in sorted(ranked)[:_CANDIDATES]]


@kept
def weight_grad_tiles(
    batch: int, channels: int, height: int, width: int, groups: int, dtype: torch.dtype
) -> list[tuple[int, ...]]:
    """Candidates for the gradient of the weight: `WEIGHT_GRAD_TILE`, the best guess first.

    A program sums block_inputs by block_outputs numbers of one group's packed weight over its share of the patches;
    parts is the number of shares, enough for two programs on each multiprocessor. Programs of other inputs read the
    same output gradients and neighbouring taps again, from the second-level cache; large patches and many inputs a
    program make that less, so they come first.
    """
    group, half = channels // groups, dtype.itemsize < 4
    found = []
    for patch_height, patch_width, bundle in reversed(_rows(group, groups, height, width)):
        if bundle > 1:
            continue
        inputs, outputs = (patch_height + 2) * (patch_width + 2) * group, patch_height * patch_width * group
        patches = batch * -(-height // patch_height) * -(-width // patch_width)
        for block_inputs, num_warps in ((128, 8), (256, 8), (64, 4)) if half else ((64, 4), (32, 4)):
            block_outputs = min(power_of_two(outputs), 32 * num_warps * (64 if half else 32) // block_inputs)
            block_patches = min(64 if half else 16, power_of_two(patches))
            programs = groups * -(-inputs // block_inputs) * -(-outputs // block_outputs)
            parts = max(1, min(-(-2 * _MULTIPROCESSORS // programs), -(-patches // (4 * block_patches))))
            blocks = (block_patches, block_inputs, block_outputs)
            stages = (2 if block_inputs == 256 else 3) if half else 1
            found.append((*blocks, patch_height, patch_width, parts, num_warps, stages))
    return found[:_CANDIDATES]


def _rows(group: int, groups: int, height: int, width: int) -> list[tuple[int, int, int]]:
    """Kinds of a product's row, (patch_height, patch_width, bundle): one position of one group, patches of at most 128
    columns that the map holds, and for narrow groups two of them together, whose loads are twice as wide."""
    rows = [(1, 1, 1)]
    for high, wide in ((1, 2), (2, 2), (2, 4)):
        if high <= height and wide <= width and power_of_two(high * wide * group) <= 128:
            rows.append((high, wide, 1))
    if groups % 2 == 0 and group <= 24:
        rows.append((1, min(2, width), 2))
    return rows


def _cycles(t: GroupedTile, patches: int, group: int, groups: int, dtype: torch.dtype) -> float:
    """Clocks that the convolution takes with a tile, about.

    Of one multiprocessor in a clock: 2048 multiplications of halves by the tensor cores (128 in fp32), 128 bytes to
    and from shared memory and the first-level cache, 26 bytes from the second-level cache. A program waits 1500
    clocks at its start and end, and at each step of the loop 400 where it is not pipelined, 100 with two stages, 40
    with more; programs that share a multiprocessor, as its registers and shared memory let them, fill one another's
    waits.
    """
    size = dtype.itemsize
    around, inside = (t.patch_height + 2) * (t.patch_width + 2), t.patch_height * t.patch_width
    width = t.bundle * group
    steps, blocks = -(-around * width // t.block_inputs), -(-inside * width // t.block_outputs)
    inner, rows, columns = steps * t.block_inputs, t.block_patches, t.block_outputs
    multiply = rows * inner * max(columns, 32) / (2048 if size < 4 else 128)
    near = inner * size * (3 * rows + 2 * columns + columns * rows / 64) / 128 + rows * columns * 6 / 128
    far = (inner * min(columns, inside * width) + rows * 1.5 * inside * width) * size / 26
    wait = 1500 + steps * {1: 400, 2: 100}.get(t.num_stages, 40)
    registers = 32 * t.num_warps * max(96, 3 * rows * columns // (32 * t.num_warps))
    shared = t.num_stages * (rows + columns) * t.block_inputs * size
    resident = max(1, min(65536 // registers, _SHARED_BYTES // shared))
    programs = -(-patches // rows) * blocks * groups // t.bundle
    return max(programs / _MULTIPROCESSORS, 1.0) * (max(multiply, near, far) + wait / resident)
