"""The Visformer: one class over a tuple of stages.

    image -> stem (7x7 convolution, stride 2) -> stages -> norm -> average over positions -> linear head -> logits

A stage opens with a patch embedding and a position embedding and goes on with equal blocks; a block is an optional
attention and an MLP, each a residual. `Architecture` says which, `variants.py` holds the published ones.
Key names in a state dict are those of this module tree. Source: arXiv 2104.12533 and its three public implementations.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.init import zeros_
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from visformer.models.architecture import STEM_STRIDE, Architecture, StageConfig
from visformer.models.attention import Attention, RelativePositionBias, WindowAttention
from visformer.models.initial import he_normal_, small_normal_
from visformer.models.layers import (
    NORMS,
    ChannelNorm,
    Mlp,
    PatchEmbed,
    PatchProjection,
    PointwiseConv,
    PositionEmbed,
    Residual,
    SpatialMlp,
    resample,
)


class Stage(nn.Module):
    """Patch embedding, position embedding, blocks."""

    def __init__(self, embed: nn.Module, pos_embed: nn.Module, drop_rate: float, blocks: list[nn.Module]):
        super().__init__()
        self.embed = embed
        self.pos_embed = pos_embed
        self.drop = nn.Dropout(drop_rate)
        self.blocks = nn.Sequential(*blocks)
        self.run_block: Callable[[nn.Module, Tensor], Tensor] = _call

    def forward(self, x: Tensor) -> Tensor:
        """(B, C of the stage before, H, W) -> (B, C, ceil(H / patch_size), ceil(W / patch_size))"""
        x = self.drop(self.pos_embed(self.embed(x)))
        for block in self.blocks:
            x = self.run_block(block, x)
        return x


class Visformer(nn.Module):
    """An image classifier: float (B, in_channels, H, W), normalised, to logits (B, num_classes).

    With `num_classes` 0 the pooled features (B, num_features) come out. `dynamic_image_size` resamples position
    embeddings at each call, so that any size from 32 pixels up is taken; without it the size is that of the
    architecture until `set_image_size`. `config` is the architecture as it stands.
    """

    def __init__(self, architecture: Architecture, *, dynamic_image_size: bool = False):
        super().__init__()
        self.config = architecture
        self.num_features = self.head_hidden_size = architecture.num_features
        self.stem = _build_stem(architecture)
        self.stages = nn.Sequential(*_build_stages(architecture, dynamic_image_size))
        self.norm = NORMS[architecture.norm](self.num_features)
        self.head = _head(self.num_features, architecture.num_classes)
        self.feature_info = _feature_info(architecture)
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> logits (B, num_classes)"""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> the last stage's map after its norm, (B, num_features, H / 32, W / 32)"""
        x = x.contiguous(memory_format=torch.channels_last)
        return self.norm(self.stages(self.stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map -> logits (B, num_classes), or with `pre_logits` the pooled features (B, num_features)"""
        x = x.mean((2, 3))
        return x if pre_logits else self.head(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | tuple[int, ...] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Feature maps of the stages, in timm's form.

        `indices`: stage numbers, or the last so many; None: all. `norm` applies the last norm to the last stage's map.
        Returns the maps, each (B, C, H, W); without `intermediates_only`, what `forward_features` gives and then them.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt: {output_fmt!r} is not possible; the maps are 'NCHW'")
        wanted = self._stage_numbers(indices)
        last = len(self.stages) - 1
        maps = []
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        for i, stage in enumerate(self.stages[: max(wanted) + 1] if stop_early else self.stages):
            x = stage(x)
            if i in wanted:
                maps.append(self.norm(x) if norm and i == last else x)
        return maps if intermediates_only else (self.norm(x), maps)

    def _stage_numbers(self, indices: int | list[int] | tuple[int, ...] | None) -> set[int]:
        count = len(self.stages)
        if indices is None:
            return set(range(count))
        numbers = list(range(-indices, 0)) if isinstance(indices, int) else list(indices)
        if not numbers or not all(-count <= i < count for i in numbers):
            raise ValueError(f"indices: {indices} does not fit a model of {count} stages")
        return {i % count for i in numbers}

    def set_image_size(self, image_size: int | tuple[int, int]) -> None:
        """Resample the position embeddings, once and for good, to an input of `image_size` pixels, (height, width)."""
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        self.config = replace(self.config, image_size=size)
        for stage, grid in zip(self.stages, self.config.grids, strict=True):
            pos_embed = cast(Stage, stage).pos_embed
            if isinstance(pos_embed, PositionEmbed):
                pos_embed.set_grid(grid)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a fresh one for `num_classes` (0: none). Only average pooling is possible."""
        if global_pool not in (None, "avg"):
            raise ValueError(f"global_pool: {global_pool!r} is not possible; Visformer pools by 'avg'")
        weight = cast(Tensor, self.norm.weight)
        self.config = replace(self.config, num_classes=num_classes)
        self.head = _head(self.num_features, num_classes).to(device=weight.device, dtype=weight.dtype)
        self.head.apply(_reset)

    def get_classifier(self) -> nn.Module:
        """The linear head, or an identity when `num_classes` is 0."""
        return self.head

    @property
    def num_classes(self) -> int:
        """Number of logits; 0: features."""
        return self.config.num_classes

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        run = _checkpointed if enable else _call
        for stage in self.stages:
            cast(Stage, stage).run_block = run

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that recipes like DeiT's and Swin's spare from weight decay: those of positions."""
        return {name for name, _ in self.named_parameters() if ".pos_embed." in name or ".position_bias." in name}

    def group_matcher(self, coarse: bool = False) -> dict:
        """Patterns that put parameters into layers from the input on, in timm's form; `coarse`: one group a stage."""
        embed = (r"^stages\.(\d+)\.(?:embed|pos_embed)", (0,))
        block = r"^stages\.(\d+)" if coarse else [embed, (r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^stem", "blocks": block}

    def reset_parameters(self) -> None:
        """Initialise as upstream: convolutions He normal over fan out, head and positions normal, norms 1 and 0."""
        self.apply(_reset)

    def resample_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """`state_dict` with its position embeddings resampled to this model's grids; the rest as it is."""
        grids = {f"stages.{i}.pos_embed.weight": grid for i, grid in enumerate(self.config.grids)}
        return {key: resample(value, grids[key]) if key in grids else value for key, value in state_dict.items()}


def _build_stem(architecture: Architecture) -> nn.Module:
    if not architecture.stem_width:
        return nn.Identity()
    return nn.Sequential(
        nn.Conv2d(architecture.in_channels, architecture.stem_width, 7, stride=STEM_STRIDE, padding=3, bias=False),
        nn.BatchNorm2d(architecture.stem_width),
        nn.ReLU(inplace=True),
    )


def _build_stages(architecture: Architecture, dynamic_image_size: bool) -> list[Stage]:
    depth = sum(stage.depth for stage in architecture.stages)
    drop_paths = torch.linspace(0, architecture.drop_path_rate, depth, device="cpu").tolist()
    blocks = iter(enumerate(drop_paths))  # a block's number counts through the whole network
    before, stages = architecture.stem_width or architecture.in_channels, []
    for stage, grid in zip(architecture.stages, architecture.grids, strict=True):
        norm = NORMS[architecture.norm](stage.width) if architecture.embed_norm else nn.Identity()
        pos_embed = PositionEmbed(stage.width, grid, dynamic_image_size) if architecture.pos_embed else nn.Identity()
        stages.append(
            Stage(
                PatchEmbed(before, stage.width, stage.patch_size, norm),
                pos_embed,
                architecture.drop_rate,
                [_build_block(stage, architecture, *next(blocks)) for _ in range(stage.depth)],
            )
        )
        before = stage.width
    return stages


def _build_block(stage: StageConfig, architecture: Architecture, number: int, drop_path_rate: float) -> nn.Sequential:
    norm, residual = NORMS[architecture.norm], partial(Residual, drop_path_rate=drop_path_rate)
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    if stage.attention:
        parts["attn"] = residual(norm(stage.width), _build_attention(stage, architecture, number))
    parts["mlp"] = residual(norm(stage.width), _build_mlp(stage, architecture))
    return nn.Sequential(parts)


def _build_attention(stage: StageConfig, architecture: Architecture, number: int) -> nn.Module:
    shape = (stage.width, stage.num_heads, stage.head_dim or stage.width // stage.num_heads)
    options = (architecture.qk_scale_power, architecture.attn_drop_rate, architecture.drop_rate)
    if stage.window is None:
        return Attention(*shape, *options)
    return WindowAttention(*shape, stage.window, number % 2 == 1, *options)


def _build_mlp(stage: StageConfig, architecture: Architecture) -> nn.Module:
    width, drop_rate, gelu = stage.width, architecture.drop_rate, architecture.gelu
    if not stage.spatial_mlp:
        return Mlp(width, int(width * architecture.mlp_ratio), gelu, drop_rate)
    # Upstream: twice the width when the 3x3 convolution is grouped, 5/6 of it when it is dense.
    hidden = 2 * width if architecture.groups > 1 else width * 5 // 6
    return SpatialMlp(width, hidden, architecture.groups, gelu, drop_rate)


def _head(num_features: int, num_classes: int) -> nn.Module:
    return nn.Linear(num_features, num_classes) if num_classes else nn.Identity()


def _feature_info(architecture: Architecture) -> list[dict]:
    reduction, info = architecture.stem_stride, []
    for i, stage in enumerate(architecture.stages):
        reduction *= stage.patch_size
        info.append({"num_chs": stage.width, "reduction": reduction, "module": f"stages.{i}"})
    return info


def _reset(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        small_normal_(module.weight)
        zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        he_normal_(module.weight)
        if module.bias is not None:
            zeros_(module.bias)
    elif isinstance(
        module, (nn.BatchNorm2d, ChannelNorm, PatchProjection, PointwiseConv, PositionEmbed, RelativePositionBias)
    ):
        module.reset_parameters()


def _call(block: nn.Module, x: Tensor) -> Tensor:
    return block(x)


def _checkpointed(block: nn.Module, x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return block(x)
    return checkpoint(block, x, use_reentrant=False, context_fn=lambda: (nullcontext(), _frozen_statistics(block)))


@contextmanager
def _frozen_statistics(block: nn.Module) -> Iterator[None]:
    """While a block is recomputed, its norms do not count the same batch into their running statistics again."""
    norms = [m for m in block.modules() if isinstance(m, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked -= 1  # pyright: ignore[reportOperatorIssue]
