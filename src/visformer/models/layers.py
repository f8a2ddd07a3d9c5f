"""The parts of a Visformer. Each `forward` is its equation.

Shapes: B batch, C channels, H and W height and width of the map, N = H * W tokens. Maps are (B, C, H, W) tensors in
channels_last memory throughout, so that what reads them as (B, H, W, C) or (B, N, C) is a view, never a copy.
Source: Chen et al., "Visformer: The Vision-friendly Transformer", ICCV 2021, arXiv 2104.12533.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.init import ones_, zeros_

from visformer.errors import UsageError
from visformer.models.initial import he_normal_, small_normal_


class PointwiseConv(nn.Module):
    """A 1x1 convolution without bias, done as the matrix product that it is.

    On small maps a product over (B * H * W, C) is several times faster than the library's convolution, forward and
    backward. The weight keeps a convolution's shape, (out_channels, in_channels, 1, 1).
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, 1, 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He normal over fan out."""
        he_normal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H, W)"""
        return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1)).permute(0, 3, 1, 2)


class PatchProjection(nn.Module):
    """A convolution whose kernel is its stride, done as one matrix product over the pixels of each patch.

    Beside being as fast, it is right: oneDNN's bf16 convolution of 16 channels in 4x4 patches, visformer_tiny's first
    embedding, gives wrong numbers on CPUs with AMX (torch 2.14). The weight is (out, in, patch_size, patch_size).
    """

    def __init__(self, in_channels: int, out_channels: int, patch_size: int):
        super().__init__()
        self.patch_size = patch_size
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, patch_size, patch_size))
        self.bias = nn.Parameter(torch.empty(out_channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He normal over fan out; bias 0."""
        he_normal_(self.weight)
        zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H / patch_size, W / patch_size); the sides must be multiples"""
        x = x.permute(0, 2, 3, 1)  # (B, H, W, C)
        x = x.unflatten(2, (-1, self.patch_size)).unflatten(1, (-1, self.patch_size))  # (B, h, p, w, p, C)
        x = x.transpose(2, 3).flatten(3)  # (B, h, w, p * p * C)
        return F.linear(x, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias).permute(0, 3, 1, 2)


class ChannelNorm(nn.Module):
    """Layer normalisation over the channels of each position: biased variance, eps 1e-5."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Scale 1, shift 0."""
        ones_(self.weight)
        zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same"""
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias)
        return x.permute(0, 3, 1, 2)


NORMS: dict[str, type[nn.Module]] = {"batch": nn.BatchNorm2d, "layer": ChannelNorm}


class PatchEmbed(nn.Module):
    """Patches of `patch_size` squared, each projected to one position, then `norm`; a map that does not divide is
    padded with zeros at the right and the bottom, so no pixel is lost."""

    def __init__(self, in_channels: int, out_channels: int, patch_size: int, norm: nn.Module):
        super().__init__()
        self.patch_size = patch_size
        self.proj = PatchProjection(in_channels, out_channels, patch_size)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, ceil(H / patch_size), ceil(W / patch_size))"""
        return self.norm(self.proj(pad_to_multiple(x, self.patch_size)))


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Zeros at the right and the bottom until both sides of (B, C, H, W) are multiples; `x` itself when they are."""
    bottom, right = -x.shape[-2] % multiple, -x.shape[-1] % multiple
    return F.pad(x, (0, right, 0, bottom)) if bottom or right else x


def resample(weight: Tensor, grid: tuple[int, int]) -> Tensor:
    """A position embedding (1, C, H, W) at another grid: bicubic, antialiased, computed in fp32.

    The same numbers as `F.interpolate(mode="bicubic", antialias=True)`, as two small matrix products, which compile
    and export at any size.
    """
    height, width = weight.shape[-2:]
    if (height, width) == tuple(grid):
        return weight
    rows, columns = (_bicubic(n, m, weight.device) for n, m in ((height, grid[0]), (width, grid[1])))
    return (rows @ weight.float() @ columns.T).to(weight.dtype)


def _bicubic(old: int, new: int, device: torch.device) -> Tensor:
    """The (new, old) matrix that resamples a line of `old` samples to `new`: Keys' kernel with a = -0.5."""
    scale = old / new
    centers = (torch.arange(new, device=device) + 0.5) * scale
    distances = torch.arange(old, device=device) + 0.5 - centers[:, None]
    x = (distances / max(scale, 1.0)).abs()
    near = (1.5 * x - 2.5) * x * x + 1  # for x up to 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2  # from 1 to 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    return weights / weights.sum(1, keepdim=True)


class PositionEmbed(nn.Module):
    """A learned map added to the stage's input: for one grid, or with `dynamic` resampled to each input's grid."""

    def __init__(self, channels: int, grid: tuple[int, int], dynamic: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, channels, *grid))
        self.fit = resample if dynamic else _same_grid
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal, standard deviation 0.02."""
        small_normal_(self.weight)

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Resample the map to `grid` for good."""
        self.weight = nn.Parameter(resample(self.weight.detach(), grid), requires_grad=self.weight.requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same"""
        return x + self.fit(self.weight, (x.shape[-2], x.shape[-1])).to(x.dtype)


def _same_grid(weight: Tensor, grid: tuple[int, int]) -> Tensor:
    height, width = weight.shape[-2:]
    if grid != (height, width):
        raise UsageError(
            f"the input gives a {grid[0]}x{grid[1]} map where the model is set to {height}x{width}; call "
            "model.set_image_size((height, width)), or create the model with dynamic_image_size=True"
        )
    return weight


class Mlp(nn.Module):
    """Two products with GELU between, at every position by itself."""

    def __init__(self, channels: int, hidden: int, gelu: str, drop_rate: float):
        super().__init__()
        self.conv1 = PointwiseConv(channels, hidden)
        self.act1 = nn.GELU(approximate=_approximate(gelu))
        self.drop1 = nn.Dropout(drop_rate)
        self.conv3 = PointwiseConv(hidden, channels)
        self.drop3 = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same"""
        return self.drop3(self.conv3(self.drop1(self.act1(self.conv1(x)))))


class SpatialMlp(nn.Module):
    """An MLP with a grouped 3x3 convolution in its hidden width: what stands for attention at high resolution."""

    def __init__(self, channels: int, hidden: int, groups: int, gelu: str, drop_rate: float):
        super().__init__()
        self.conv1 = PointwiseConv(channels, hidden)
        self.act1 = nn.GELU(approximate=_approximate(gelu))
        self.drop1 = nn.Dropout(drop_rate)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, padding=1, groups=groups, bias=False)
        self.act2 = nn.GELU(approximate=_approximate(gelu))
        self.conv3 = PointwiseConv(hidden, channels)
        self.drop3 = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same"""
        x = self.drop1(self.act1(self.conv1(x)))
        x = self.act2(self.conv2(x))
        return self.drop3(self.conv3(x))


def _approximate(gelu: str) -> str:
    return {"erf": "none", "tanh": "tanh"}[gelu]


class DropPath(nn.Module):
    """Stochastic depth: in training, a sample's branch is left out with probability `rate`, the rest scaled up."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same"""
        if not self.training:
            return x
        keep = torch.empty(x.shape[0], 1, 1, 1, dtype=x.dtype, device=x.device).bernoulli_(1 - self.rate)
        return x * (keep / (1 - self.rate))


class Residual(nn.Module):
    """x + drop_path(branch(norm(x)))"""

    def __init__(self, norm: nn.Module, branch: nn.Module, drop_path_rate: float):
        super().__init__()
        self.norm = norm
        self.branch = branch
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same"""
        return x + self.drop_path(self.branch(self.norm(x)))
