"""A Visformer taken apart into the operations of a fused network.

What is folded: each BatchNorm into the product before it (stem, patch embeddings) or after it (blocks; the last one,
through the average over positions, into the head), position embeddings into the bias map of the patch embedding, the
attention's scale into the weights of q. What is left of a layer norm is the division by each position's deviation.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from visformer.fusion.convolutions import Convolution, PatchEmbed, Stem
from visformer.fusion.folding import fold_after, fold_before, fold_queries, remainder
from visformer.fusion.operation import Cost, Operation
from visformer.fusion.products import Attention, Linear, Mlp, PoolHead
from visformer.fusion.tuner import Tuner
from visformer.models import Visformer, layers
from visformer.models import attention as attentions
from visformer.models.visformer import Stage


class Builder:
    """Builds operations from a model's modules; `like` has the dtype and the device of the fused network, and `fp8`
    gives the products of its blocks eight bits."""

    def __init__(
        self,
        model: Visformer,
        tuner: Tuner,
        like: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        fp8: bool = False,
    ):
        self.model, self.tuner, self.like, self.fp8 = model, tuner, like, fp8
        self.normalisation = (mean, std)
        self.gelu = {"erf": "gelu", "tanh": "gelu_tanh"}[model.config.gelu]

    def steps(self) -> list[nn.Module]:
        """What a fused network does to an image, in order; the last step gives logits (B, num_classes)."""
        stages = [step for stage in self.model.stages for step in self._stage(cast(Stage, stage))]
        return [self._stem(self.model.stem), *stages, *self._head()]

    def _stem(self, stem: nn.Module) -> nn.Module:
        if not isinstance(stem, nn.Sequential):
            return Normalise(self.like, *self.normalisation)
        conv, norm = cast(nn.Conv2d, stem[0]), stem[1]
        weight, bias = fold_after(conv.weight, conv.bias, norm)
        return Stem(self.tuner, self.like, weight, cast(Tensor, bias), *self.normalisation)

    def _stage(self, stage: Stage) -> list[nn.Module]:
        embed = cast(layers.PatchEmbed, stage.embed)
        steps = self._embed(embed, stage.pos_embed)
        return steps + [step for block in stage.blocks for part in block.children() for step in self._residual(part)]

    def _embed(self, embed: layers.PatchEmbed, pos_embed: nn.Module) -> list[nn.Module]:
        """A BatchNorm is folded; a layer norm stays behind the projection, and positions are added after it."""
        after = embed.norm if isinstance(embed.norm, layers.ChannelNorm) else nn.Identity()
        folded = nn.Identity() if after is embed.norm else embed.norm
        weight, bias = fold_after(embed.proj.weight, embed.proj.bias, folded)
        if after is not embed.norm:
            return [PatchEmbed(self.tuner, self.like, weight, BiasMap(bias, pos_embed))]
        projection = PatchEmbed(self.tuner, self.like, weight, BiasMap(bias, nn.Identity()))
        rest = [copy.deepcopy(part) for part in (after, pos_embed) if not isinstance(part, nn.Identity)]
        return [projection, *(part.to(self.like) for part in rest)]

    def _residual(self, residual: nn.Module) -> list[nn.Module]:
        assert isinstance(residual, layers.Residual)
        branch, norm = residual.branch, residual.norm
        rest = remainder(norm)
        if isinstance(branch, (attentions.Attention, attentions.WindowAttention)):
            return [AttentionBlock(rest, *self._attention(branch, norm))]
        if isinstance(branch, layers.SpatialMlp):
            first = self._linear(*fold_before(branch.conv1.weight, None, norm), activation=self.gelu)
            weight = branch.conv2.weight.detach()
            middle = Convolution(self.tuner, self.like, weight, branch.conv2.groups, self.gelu)
            return [SpatialMlpBlock(rest, first, middle, self._linear(branch.conv3.weight.detach(), None))]
        assert isinstance(branch, layers.Mlp)
        first = self._linear(*fold_before(branch.conv1.weight, None, norm), activation=self.gelu)
        second = self._linear(branch.conv3.weight.detach(), None)
        if isinstance(rest, nn.Identity):
            return [Mlp(self.tuner, first, second)]
        return [MlpBlock(rest, first, second)]

    def _attention(
        self, attention: attentions.Attention | attentions.WindowAttention, norm: nn.Module
    ) -> tuple[Linear, nn.Module, Linear]:
        weight, bias = fold_before(attention.qkv.weight, None, norm)
        weight, bias = fold_queries(weight, bias, weight.shape[0] // 3, attention.scale)
        make: nn.Module = AttentionOverMap(self.tuner, self.like, attention)
        return self._linear(weight, bias), make, self._linear(attention.proj.weight.detach(), None)

    def _linear(self, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Linear:
        return Linear(self.tuner, self.like, weight, bias, activation, self.fp8)

    def _head(self) -> list[nn.Module]:
        model, rest = self.model, remainder(self.model.norm)
        if isinstance(model.head, nn.Linear):
            weight, bias = fold_before(model.head.weight, model.head.bias, model.norm)
        else:  # the pooled features come out: the norm alone is left, as a product with a diagonal
            identity = torch.eye(model.num_features, dtype=torch.float64, device=next(model.parameters()).device)
            weight, bias = fold_before(identity, None, model.norm)
        return [*([rest] if not isinstance(rest, nn.Identity) else []), PoolHead(self.tuner, self.like, weight, bias)]


class BiasMap:
    """The bias of a patch embedding at every position of a grid, with its position embedding; see `PatchEmbed`."""

    def __init__(self, bias: Tensor | None, pos_embed: nn.Module):
        self.bias, self.pos_embed = bias, pos_embed

    def __call__(self, grid: tuple[int, int]) -> Tensor | None:
        """Grid (height, width) -> (height * width, C), (1, C) or None"""
        bias = None if self.bias is None else self.bias[None]
        if isinstance(self.pos_embed, nn.Identity):
            return bias
        assert isinstance(self.pos_embed, layers.PositionEmbed)
        positions = self.pos_embed.fit(self.pos_embed.weight.detach(), grid)[0].flatten(1).T.double()
        return positions if bias is None else positions + bias.to(positions.device)


class Normalise(nn.Module):
    """Bytes as a normalised image; what is normalised already stays. For models that have no stem to do it."""

    mean: Tensor
    std: Tensor

    def __init__(self, like: Tensor, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1).to(like))

    def forward(self, x: Tensor) -> Tensor:
        """uint8, or normalised, (B, C, H, W) -> normalised"""
        return (x.to(self.mean.dtype) - self.mean) / self.std if x.dtype == torch.uint8 else x


class AttentionOverMap(nn.Module):
    """An `Attention` for each size of map, since that decides how it is cut into windows."""

    def __init__(self, tuner: Tuner, like: Tensor, attention: attentions.Attention | attentions.WindowAttention):
        super().__init__()
        self.tuner, self.like = tuner, like
        self.num_heads, self.windowed = attention.num_heads, isinstance(attention, attentions.WindowAttention)
        self.source = [attention]  # in a list, so that its parameters are not ours
        self.sizes: dict[tuple[int, int], Operation] = {}

    def forward(self, qkv: Tensor) -> Tensor:
        """(B, 3 * heads * d, H, W) -> (B, heads * d, H, W)"""
        return self.over(qkv)(qkv)

    def signature(self, qkv: Tensor) -> str:
        """See `Operation`."""
        return self.over(qkv).signature(qkv)

    def cost(self, qkv: Tensor) -> Cost:
        """See `Operation`."""
        return self.over(qkv).cost(qkv)

    def over(self, qkv: Tensor) -> Operation:
        """The attention for maps of this size."""
        grid = (qkv.shape[2], qkv.shape[3]) if self.windowed else (0, 0)
        return self.sizes.get(grid) or self._build(grid)

    def _build(self, grid: tuple[int, int]) -> Operation:
        windows, bias = None, None
        if self.windowed:
            source = cast(attentions.WindowAttention, self.source[0])
            windows = attentions.Windows.over(grid, source.window, source.shifted)
            bias = source.position_bias(windows.size).detach()
        self.sizes[grid] = Attention(self.tuner, self.num_heads, windows, self.like, bias)
        return self.sizes[grid]


class AttentionBlock(nn.Module):
    """x + proj(attention(qkv(norm(x))))"""

    def __init__(self, norm: nn.Module, qkv: Linear, attention: nn.Module, proj: Linear):
        super().__init__()
        self.norm, self.qkv, self.attention, self.proj = norm, qkv, attention, proj

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same"""
        return self.proj(self.attention(self.qkv(self.norm(x))), x)


class SpatialMlpBlock(nn.Module):
    """x + W3 gelu(W2 gelu(W1 norm(x))), W2 a 3x3 convolution"""

    def __init__(self, norm: nn.Module, first: Linear, middle: Convolution, last: Linear):
        super().__init__()
        self.norm, self.first, self.middle, self.last = norm, first, middle, last

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same"""
        return self.last(self.middle(self.first(self.norm(x))), x)


class MlpBlock(nn.Module):
    """x + W2 gelu(W1 norm(x)) where something of the norm is left"""

    def __init__(self, norm: nn.Module, first: Linear, second: Linear):
        super().__init__()
        self.norm, self.first, self.second = norm, first, second

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same"""
        return self.second(self.first(self.norm(x)), x)
