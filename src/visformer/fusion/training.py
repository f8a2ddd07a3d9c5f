"""A model made faster to train, in place: `accelerate`.

    ways = ways_to_train(model, batch_size=128, dtype=torch.bfloat16)   # measured here, once
    accelerate(model, ways)

The parameters stay the same objects under the same names, and so do the numbers, to within rounding: checkpoints,
moving averages, optimizers, DistributedDataParallel and torch.compile see the model that they saw before.

What changes. GELU looks at the map as (B, H, W, C), which is how it lies in memory: PyTorch hands only what it calls
contiguous to oneDNN, whose GELU takes half the time forward and two thirds backward (fp32 and bf16, Sapphire Rapids).
The grouped 3x3 convolutions of the spatial MLPs, with the GELU behind them, are computed in one of several `ways`.
Attention over a whole map is computed in fp32 on a CPU where the rest is in half precision, see `SinglePrecision`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visformer import console, kernels
from visformer.fusion.convolutions import merge_groups
from visformer.fusion.operation import compiled, described, map_gelu, text
from visformer.fusion.tuner import Tuner
from visformer.kernels.launch import runs_triton
from visformer.models import Visformer
from visformer.models.attention import ScaledDotProduct
from visformer.models.layers import SpatialMlp

LIBRARY = "library"
_TILES = 4  # of our kernel's tiles, the best guesses, that are tried
_NAME = re.compile(r"(library|contiguous|compiled)|merged (\d+)|kernel (\d+(?:,\d+)*)")

Way = Callable[[Tensor, Tensor], Tensor]  # (x, weight) -> gelu(convolution of x by weight)


class MapGelu(nn.Module):
    """GELU of a channels_last map, by the error function (`approximate` none) or by tanh."""

    def __init__(self, approximate: str):
        super().__init__()
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same"""
        return map_gelu(x, self.approximate)


class SinglePrecision(nn.Module):
    """`attend` of an attention layer, on a CPU in fp32 whatever half precision q, k and v have.

    PyTorch's attention for CPUs takes longer in bf16 than in fp32, up to five times for the few positions of small
    images, most of it backward (`python benchmarks/attention_precision.py`). It is the more exact of the two besides.
    """

    def __init__(self, attend: ScaledDotProduct):
        super().__init__()
        self.attend = attend

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Three of (B, heads, N, d) -> one"""
        if q.device.type != "cpu" or q.dtype not in (torch.bfloat16, torch.float16):
            return self.attend(q, k, v)
        with torch.autocast("cpu", enabled=False):
            return self.attend(q.float(), k.float(), v.float()).to(q.dtype)


class GroupedConvolution(nn.Module):
    """gelu(W x), 3x3 with padding 1, in groups; `weight` (out, in / groups, 3, 3) is that of the convolution whose
    place it takes."""

    def __init__(self, weight: Tensor, groups: int, way: Way):
        super().__init__()
        self.weight = cast(nn.Parameter, weight)
        self.groups, self.way = groups, way

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same"""
        return self.way(x, self.weight)


def accelerate(model: Visformer, ways: Mapping[str, str] | None = None) -> None:
    """Change how `model` computes, for training and for evaluation; see above.

    `ways` is what `ways_to_train` gave: by the name of each spatial MLP, how its convolution is computed. One that is
    not named, or whose way is not possible on the model's device, takes the library's, the latter with a warning.
    """
    for name, mlp in spatial_mlps(model).items():
        wanted = (ways or {}).get(name, LIBRARY)
        if wanted == LIBRARY:
            continue
        conv, gelu = _convolution(mlp)
        if not _is_possible(wanted, conv.weight, conv.groups):
            console.warn(f"speed: {wanted!r} is not possible here; the library computes the convolutions", once=True)
            continue
        mlp.register_module("conv2", GroupedConvolution(conv.weight, conv.groups, _build(wanted, conv, gelu)))
        mlp.register_module("act2", nn.Identity())
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.GELU):
                setattr(module, name, MapGelu(child.approximate))
            elif isinstance(child, ScaledDotProduct) and not isinstance(module, SinglePrecision):
                setattr(module, name, SinglePrecision(child))


def ways_to_train(
    model: Visformer, batch_size: int, *, dtype: torch.dtype = torch.float32, choose: str = "fastest"
) -> dict[str, str]:
    """How to compute the convolution of each spatial MLP, by the MLP's name.

    Args:
        model: on the device that it will be trained on, not accelerated yet.
        batch_size: images of a training step.
        dtype: of the computation; the weights' own, or that of autocast.
        choose: `fastest` measures forward and backward passes on noise of the shape at hand, and remembers on disk
            (see tuner.py); `library` takes PyTorch's way, `kernels` ours, both without measuring.
    """
    device = next(model.parameters()).device
    tuner = Tuner(choose, device, dtype, graphs=False)
    chosen = {}
    for name, mlp in spatial_mlps(model).items():
        conv, gelu = _convolution(mlp)
        shape = (batch_size, conv.weight.shape[0], *model.config.grids[int(name.split(".")[1])])  # stages.N.blocks...
        chosen[name] = _choose(tuner, conv, gelu, shape, dtype)
    return chosen


def spatial_mlps(model: Visformer) -> dict[str, SpatialMlp]:
    """The MLPs of `model` with a 3x3 convolution, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SpatialMlp)}


def _convolution(mlp: SpatialMlp) -> tuple[nn.Conv2d, str]:
    """The 3x3 convolution, and the form of GELU behind it."""
    assert isinstance(mlp.conv2, nn.Conv2d) and isinstance(mlp.act2, nn.GELU), "the model is accelerated already"
    return mlp.conv2, mlp.act2.approximate


def _choose(tuner: Tuner, conv: nn.Conv2d, gelu: str, shape: tuple[int, ...], dtype: torch.dtype) -> str:
    """The name of the way that is taken for maps of `shape`."""
    weight = conv.weight
    generator = torch.Generator().manual_seed(0)
    x, gradient = (
        torch.randn(shape, generator=generator).to(weight.device, dtype, memory_format=torch.channels_last)
        for _ in range(2)
    )
    trials = {
        name: lambda name=name: Trial(name, _build(name, conv, gelu), dtype) for name in _names(weight, conv.groups, x)
    }
    signature = f"training {described(x.shape, weight.shape)} {conv.groups} groups gelu {gelu}"
    inputs = (x.requires_grad_(), weight.detach().clone().requires_grad_(), gradient)
    return tuner.choose(signature, trials, inputs).name  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Trial:
    """A forward and a backward pass by `way`, in `dtype` under autocast."""

    name: str
    way: Way
    dtype: torch.dtype

    def __call__(self, x: Tensor, weight: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
        """The result, and the gradients of x and of the weight."""
        with torch.enable_grad(), torch.autocast(x.device.type, self.dtype, enabled=self.dtype != weight.dtype):
            y = self.way(x, weight)
        return (y.detach(), *torch.autograd.grad(y, (x, weight), gradient))


def _names(weight: Tensor, groups: int, x: Tensor) -> list[str]:
    """The ways to try for the map `x`, the library's first: its convolution; in a contiguous copy; neighbouring groups
    as one, zero between them; compiled; our kernel, in the tiles that suit the map."""
    counts = {n for n in ((2, 4, groups) if weight.is_cuda else (2,)) if 1 < n <= groups and groups % n == 0}
    names = [LIBRARY, "compiled" if weight.is_cuda else "contiguous", *(f"merged {n}" for n in sorted(counts))]
    batch, channels, height, width = x.shape
    tiles = kernels.grouped_conv.tiles(batch, channels, height, width, groups, x.dtype) if runs_triton(x) else []
    return names + [f"kernel {text(tile)}" for tile in tiles[:_TILES]]


def _is_possible(name: str, weight: Tensor, groups: int) -> bool:
    """Whether there is a way of this name for a convolution by `weight`, where that lies."""
    found = _NAME.fullmatch(name)
    if found is None or (found[1] == "compiled" and not weight.is_cuda) or (found[3] and not runs_triton(weight)):
        return False
    return found[2] is None or (int(found[2]) > 0 and groups % int(found[2]) == 0)


def _build(name: str, conv: nn.Conv2d, gelu: str) -> Way:
    """The way of this name for such a convolution; its numbers are the groups that become one, or the kernel's tile."""
    groups = conv.groups
    kind, _, numbers = name.partition(" ")
    given = tuple(int(number) for number in numbers.split(",") if number)

    def library(x: Tensor, weight: Tensor) -> Tensor:
        return map_gelu(F.conv2d(x, weight, padding=1, groups=groups), gelu)

    def contiguous(x: Tensor, weight: Tensor) -> Tensor:
        x = F.conv2d(x.contiguous(), weight.contiguous(), padding=1, groups=groups)
        return F.gelu(x, approximate=gelu).contiguous(memory_format=torch.channels_last)

    def merged(x: Tensor, weight: Tensor) -> Tensor:
        weight = merge_groups(weight, groups, given[0])
        return map_gelu(F.conv2d(x, weight, padding=1, groups=groups // given[0]), gelu)

    def kernel(x: Tensor, weight: Tensor) -> Tensor:
        activation = "gelu_tanh" if gelu == "tanh" else "gelu"
        return kernels.grouped_conv.grouped_conv(x, weight, None, groups, activation, given)

    if kind == "compiled":
        return compiled(library, f"training {described(conv.weight.shape)} {groups} groups gelu {gelu}")()
    return {LIBRARY: library, "contiguous": contiguous, "merged": merged, "kernel": kernel}[kind]
