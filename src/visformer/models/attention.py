"""Self-attention over the positions of a map: all of them at once, or within windows.

Shapes: B batch, C channels, H and W of the map, N positions that attend to one another, d = head_dim. The channels of
`qkv` are ordered (3, heads, d). q and k are each scaled by d ** qk_scale_power; the product's scale is the square of
that, and `scaled_dot_product_attention` applies it where half precision cannot overflow.

Windows and relative position bias follow the Swin Transformer (Liu et al., ICCV 2021, arXiv 2103.14030) as the authors'
windowed Visformers use them. A window is never larger than the map, along each axis by itself; a map that windows do
not divide is padded, and what is padding takes part in nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visformer.models.initial import small_normal_
from visformer.models.layers import PointwiseConv

Pair = tuple[int, int]  # along the rows, along the columns


class Attention(nn.Module):
    """Every position attends to every other."""

    def __init__(
        self,
        channels: int,
        num_heads: int,
        head_dim: int,
        qk_scale_power: float,
        attn_drop_rate: float,
        drop_rate: float,
    ):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.scale = head_dim ** (2 * qk_scale_power)
        self.qkv = PointwiseConv(channels, 3 * num_heads * head_dim)
        self.attend = ScaledDotProduct(self.scale, attn_drop_rate)
        self.proj = PointwiseConv(num_heads * head_dim, channels)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same"""
        batch, _, height, width = x.shape
        qkv = self.qkv(x).permute(0, 2, 3, 1)  # (B, H, W, 3 * heads * d)
        qkv = qkv.reshape(batch, height * width, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, N, d)
        x = self.attend(q, k, v)  # (B, heads, N, d)
        x = x.transpose(1, 2).reshape(batch, height, width, -1).permute(0, 3, 1, 2)
        return self.drop(self.proj(x))


class ScaledDotProduct(nn.Module):
    """softmax(scale q k^T) v, a share `drop_rate` of the softmax dropped in training.

    A module of its own, without parameters, so that it can be computed in another way (see fusion/training.py).
    """

    def __init__(self, scale: float, drop_rate: float):
        super().__init__()
        self.scale, self.drop_rate = scale, drop_rate

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Three of (B, heads, N, d) -> one"""
        drop = self.drop_rate if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, dropout_p=drop, scale=self.scale)


class WindowAttention(nn.Module):
    """Every position attends to those of its window, with a learned bias by relative position.

    With `shifted` the windows are cut half a window further down and right, so that neighbours of other blocks'
    windows meet; along an axis where one window holds the whole map there is nothing to shift.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        head_dim: int,
        window: int,
        shifted: bool,
        qk_scale_power: float,
        attn_drop_rate: float,
        drop_rate: float,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.window, self.shifted = window, shifted
        self.scale = head_dim ** (2 * qk_scale_power)
        self.attn_drop_rate = attn_drop_rate
        self.position_bias = RelativePositionBias(window, num_heads)
        self.qkv = PointwiseConv(channels, 3 * num_heads * head_dim)
        self.proj = PointwiseConv(num_heads * head_dim, channels)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same"""
        windows = Windows.over((x.shape[-2], x.shape[-1]), self.window, self.shifted)
        q, k, v = windows.split(self.qkv(x), self.num_heads)  # each (B, windows * heads, N, d)
        bias = windows.mask(self.position_bias(windows.size)).to(q.dtype)  # (1, windows * heads, N, N)
        drop = self.attn_drop_rate if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=drop, scale=self.scale)
        return self.drop(self.proj(windows.join(x, self.num_heads)))


class RelativePositionBias(nn.Module):
    """What is added to the attention's logits for each pair of positions, by head and by how far they lie apart.

    `table` is ((2 * window - 1) ** 2, heads), its rows ordered by (row of query - row of key, column of query - column
    of key), each from 1 - window up. A smaller window uses the middle of it.
    """

    def __init__(self, window: int, num_heads: int):
        super().__init__()
        self.window = window
        self.table = nn.Parameter(torch.empty((2 * window - 1) ** 2, num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal, standard deviation 0.02."""
        small_normal_(self.table)

    def forward(self, size: Pair) -> Tensor:
        """Window of (height, width) positions -> (heads, N, N)"""
        height, width = size
        table = self.table.unflatten(0, (2 * self.window - 1, -1)).permute(2, 0, 1)  # (heads, 2 * window - 1, the same)
        first_row, first_column = self.window - height, self.window - width
        table = table[:, first_row : first_row + 2 * height - 1, first_column : first_column + 2 * width - 1]
        # Entry (i, j, k, l) of the unfolded table is table[i + k, j + l]; keys count backwards.
        bias = table.unfold(1, height, 1).unfold(2, width, 1).flip(3, 4)  # (heads, H, W of query, H, W of key)
        return bias.reshape(-1, height * width, height * width)


@dataclass(frozen=True)
class Windows:
    """How a map of `grid` positions is cut into windows of `size`, after a roll by `shift`."""

    grid: Pair
    size: Pair
    shift: Pair

    @classmethod
    def over(cls, grid: Pair, window: int, shifted: bool) -> Windows:
        """Windows of `window` a side at most, shifted by half along an axis that has several."""
        shift = window // 2 if shifted else 0
        return cls(
            grid=grid,
            size=(min(grid[0], window), min(grid[1], window)),
            shift=(shift if grid[0] > window else 0, shift if grid[1] > window else 0),
        )

    @property
    def padded(self) -> Pair:
        """The grid rounded up to whole windows."""
        return tuple(side + -side % window for side, window in zip(self.grid, self.size, strict=True))  # type: ignore[return-value]

    def split(self, qkv: Tensor, num_heads: int) -> tuple[Tensor, ...]:
        """(B, 3 * heads * d, H, W) -> q, k and v, each (B, windows * heads, N, d)"""
        x = qkv.permute(0, 2, 3, 1)  # (B, H, W, 3 * heads * d)
        (height, width), (padded_height, padded_width) = self.grid, self.padded
        if (padded_height, padded_width) != (height, width):
            x = F.pad(x, (0, 0, 0, padded_width - width, 0, padded_height - height))
        if self.shift != (0, 0):
            x = x.roll((-self.shift[0], -self.shift[1]), (1, 2))
        x = x.unflatten(3, (3, num_heads, -1)).unflatten(2, (-1, self.size[1])).unflatten(1, (-1, self.size[0]))
        x = x.permute(5, 0, 1, 3, 6, 2, 4, 7)  # (3, B, rows, columns of windows, heads, height, width of one, d)
        return x.flatten(5, 6).flatten(2, 4).unbind(0)

    def join(self, x: Tensor, num_heads: int) -> Tensor:
        """(B, windows * heads, N, d) -> (B, heads * d, H, W)"""
        (height, width), (window_height, window_width) = self.grid, self.size
        rows = self.padded[0] // window_height
        x = x.unflatten(2, (window_height, window_width)).unflatten(1, (rows, -1, num_heads))
        x = x.permute(0, 1, 4, 2, 5, 3, 6)  # (B, rows, height, columns, width, heads, d)
        x = x.flatten(5, 6).flatten(3, 4).flatten(1, 2)  # (B, padded H, padded W, heads * d)
        if self.shift != (0, 0):
            x = x.roll(self.shift, (1, 2))
        return x[:, :height, :width].permute(0, 3, 1, 2)

    def mask(self, bias: Tensor) -> Tensor:
        """(heads, N, N) -> (1, windows * heads, N, N), minus infinity for pairs that are not neighbours in the map."""
        if self.shift == (0, 0) and self.padded == self.grid:
            count = (self.grid[0] // self.size[0]) * (self.grid[1] // self.size[1])
            return bias.repeat(count, 1, 1)[None]
        rows, columns = (
            _regions(side, padded, shift, bias.device)
            for side, padded, shift in zip(self.grid, self.padded, self.shift, strict=True)
        )
        region = 3 * rows[:, None] + columns  # (padded H, padded W)
        region = region.unflatten(1, (-1, self.size[1])).unflatten(0, (-1, self.size[0]))
        region = region.transpose(1, 2).flatten(2).flatten(0, 1)  # (windows, N)
        together = region[:, None, :, None] == region[:, None, None, :]  # (windows, 1, N, N)
        return torch.where(together, bias, float("-inf")).flatten(0, 1)[None]


def _regions(side: int, padded: int, shift: int, device: torch.device) -> Tensor:
    """For each place along a rolled axis: 0, 1 if it came round from the axis' other end, 2 if it is padding.

    Only places of one region are neighbours. Padding attends to padding, so that no row of the softmax is empty.
    """
    places = torch.arange(padded, device=device)
    came_round = (places >= padded - shift).long()
    return torch.where((places + shift) % padded < side, came_round, 2)
