"""A model in the form that a graph compiler likes: the same function, fewer and plainer operations.

Training keeps maps in channels_last and does 1x1 convolutions as matrix products; exported as it stands, each becomes
a product between two transposes. Here they are convolutions again, attention moves its positions once each way, and
every BatchNorm is folded into the convolution beside it: into that before it (stem and patch embeddings), that after it
(blocks; exact, as a 1x1 convolution pads nothing) or the head.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from visformer.bundles.image_graph import CUBIC, Axis
from visformer.errors import UsageError
from visformer.fusion.convolutions import merge_groups
from visformer.fusion.folding import fold_after, fold_before, fold_queries
from visformer.models import Visformer
from visformer.models.attention import Attention, WindowAttention
from visformer.models.layers import PatchEmbed, PatchProjection, PointwiseConv, PositionEmbed, Residual, pad_to_multiple


@dataclass(frozen=True)
class Form:
    """What suits one engine and not another.

    `split_first`: see `PlainAttention`. `wide_groups`: groups of fewer than 16 channels, what a register holds, are
    merged until they fill registers, with zeros between them. In int8 OpenVINO 2026.4 takes longer for
    groups of 12 than for groups of 48, with four times the multiplications.
    """

    split_first: bool = False
    wide_groups: bool = False


BASIC = Form()


def plain(model: Visformer, form: Form = BASIC, *, dynamic_size: bool = False) -> nn.Module:
    """A copy of `model`, in evaluation mode, that gives the same logits to within rounding; `model` stays as it is.

    With `dynamic_size` it takes any size whose sides are multiples of 32. Raises `UsageError` for a model of windows,
    whose number is part of its shape.
    """
    if dynamic_size and any(stage.window for stage in model.config.stages):
        raise UsageError("dynamic_image_size: a model with windowed attention is exported at one size only")
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for module in list(model.modules()):
        if isinstance(module, PatchEmbed):
            _fold_after(module, "proj", "norm")
        elif isinstance(module, Residual):
            _fold_before(module)
    if isinstance(model.stem, nn.Sequential):
        _fold_after(model.stem, "0", "1")
    _replace(model, dynamic_size, form)
    return PlainModel(model)


class PlainModel(nn.Module):
    """The stages and the head of a model whose parts are plain."""

    def __init__(self, model: Visformer):
        super().__init__()
        self.stem, self.stages, self.norm, self.head = model.stem, model.stages, model.norm, model.head
        if isinstance(self.norm, nn.BatchNorm2d) and isinstance(self.head, nn.Linear):
            self.norm, self.head = nn.Identity(), _folded_head(self.norm, self.head)

    def forward(self, images: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> logits (B, num_classes)"""
        return self.head(self.norm(self.stages(self.stem(images))).mean((2, 3)))


class PlainPatchEmbed(nn.Module):
    """`PatchEmbed` as a convolution whose kernel is its stride."""

    def __init__(self, embed: PatchEmbed):
        super().__init__()
        self.patch_size, self.norm = embed.patch_size, embed.norm
        self.proj = _conv(cast(PatchProjection, embed.proj).weight, embed.proj.bias, stride=embed.patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, ceil(H / patch_size), ceil(W / patch_size))"""
        return self.norm(self.proj(pad_to_multiple(x, self.patch_size)))


class PlainAttention(nn.Module):
    """`Attention` with a convolution each for q, k and v, and the scale of q and k in the weights of q.

    (B, heads, N, head_dim) is the form in which runtimes know attention and fuse it. Where maps lie in channels_last
    memory, as int8 convolutions have them, it is no more than a view of what each convolution gives; with one
    convolution for all three OpenVINO took a tenth of the whole network's time to move things about.

    `split_first` splits the channels into heads before positions and channels change places, which moves less where
    maps lie channel by channel. In bf16 OpenVINO 2026.4 gives wrong numbers for the other order where there are as many
    heads as positions.
    """

    def __init__(self, attention: Attention, split_first: bool):
        super().__init__()
        self.heads = (attention.num_heads, attention.head_dim)
        width = attention.num_heads * attention.head_dim
        bias = getattr(attention.qkv, "bias", None)  # where a norm was folded in
        weight, bias = fold_queries(attention.qkv.weight, bias, width, attention.scale)
        biases = (None, None, None) if bias is None else bias.split(width)
        self.q, self.k, self.v = (_conv(*pair) for pair in zip(weight.split(width), biases, strict=True))
        self.proj = attention.proj
        self.split, self.join = (_split_first, _join_last) if split_first else (_split_last, _join_first)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same"""
        q, k, v = (self.split(part(x), self.heads) for part in (self.q, self.k, self.v))  # each (B, heads, N, d)
        return self.proj(self.join((q @ k.transpose(2, 3)).softmax(3) @ v).unflatten(2, x.shape[-2:]))


# (B, heads * d, H, W) -> (B, heads, N, d), and from there to (B, heads * d, N), in either order


def _split_last(x: Tensor, heads: tuple[int, int]) -> Tensor:
    return x.flatten(2).transpose(1, 2).unflatten(2, heads).transpose(1, 2)


def _join_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2).transpose(1, 2)


def _split_first(x: Tensor, heads: tuple[int, int]) -> Tensor:
    return x.unflatten(1, heads).flatten(3).transpose(2, 3)


def _join_last(x: Tensor) -> Tensor:
    return x.transpose(2, 3).flatten(1, 2)


class DynamicPositionEmbed(nn.Module):
    """`PositionEmbed` that resamples its map to each input's grid, without branching on it."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same"""
        rows, columns = (
            Axis(0, old, new, 0, new).antialiased(CUBIC, old).float()
            for old, new in zip(self.weight.shape[2:], x.shape[2:], strict=True)
        )
        return x + (rows @ self.weight.float() @ columns.T).to(x.dtype)


def _replace(parent: nn.Module, dynamic_size: bool, form: Form) -> None:
    """Replace what has a plainer form, at every depth."""
    for name, child in list(parent.named_children()):
        _replace(child, dynamic_size, form)
        if isinstance(child, PointwiseConv):
            setattr(parent, name, _conv(child.weight, getattr(child, "bias", None)))
        elif isinstance(child, PatchEmbed):
            setattr(parent, name, PlainPatchEmbed(child))
        elif isinstance(child, Attention):
            setattr(parent, name, PlainAttention(child, form.split_first))
        elif isinstance(child, PositionEmbed) and dynamic_size:
            setattr(parent, name, DynamicPositionEmbed(child.weight))
        elif isinstance(child, nn.Conv2d) and child.groups > 1 and form.wide_groups:
            _widen_groups(child)


def _widen_groups(conv: nn.Conv2d) -> None:
    """Merge groups of `conv` of fewer than 16 channels, where their number allows it, to a multiple of 16."""
    width = conv.weight.shape[1]
    count = math.lcm(width, 16) // width
    if width < 16 and conv.groups % count == 0:
        conv.weight.data, conv.groups = merge_groups(conv.weight.data, conv.groups, count), conv.groups // count


def _conv(weight: Tensor, bias: Tensor | None, stride: int = 1) -> nn.Conv2d:
    out_channels, in_channels, *kernel = weight.shape
    conv = nn.Conv2d(in_channels, out_channels, tuple(kernel), stride=stride, bias=bias is not None)  # type: ignore[arg-type]
    conv.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=False)
    conv.bias = None if bias is None else nn.Parameter(bias.detach().contiguous(), requires_grad=False)
    return conv.eval()


# ---- folding


def _parameter(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.float(), requires_grad=False)


def _fold_after(parent: nn.Module, conv_name: str, norm_name: str) -> None:
    """Fold a BatchNorm into the convolution before it."""
    conv, norm = getattr(parent, conv_name), getattr(parent, norm_name)
    if not isinstance(norm, nn.BatchNorm2d):
        return
    weight, bias = fold_after(conv.weight, conv.bias, norm)
    conv.weight.data, conv.bias = weight.float(), _parameter(cast(Tensor, bias))
    setattr(parent, norm_name, nn.Identity())


def _fold_before(residual: Residual) -> None:
    """Fold the BatchNorm that opens a branch into its first product."""
    if not isinstance(residual.norm, nn.BatchNorm2d):
        return
    is_attention = isinstance(residual.branch, (Attention, WindowAttention))
    first = cast(PointwiseConv, residual.branch.qkv if is_attention else residual.branch.conv1)
    weight, bias = fold_before(first.weight, None, residual.norm)
    first.weight.data, first.bias = weight.float(), _parameter(cast(Tensor, bias))
    residual.norm = nn.Identity()


def _folded_head(norm: nn.BatchNorm2d, head: nn.Linear) -> nn.Linear:
    """The head behind a BatchNorm and an average, which change places."""
    weight, bias = fold_before(head.weight, head.bias, norm)
    folded = nn.Linear(head.in_features, head.out_features)
    folded.weight, folded.bias = _parameter(weight), _parameter(cast(Tensor, bias))
    return folded.eval()
