"""The architecture that a file's tensors have, as far as their shapes tell it, whichever project named them."""

from __future__ import annotations

import re
from dataclasses import replace
from math import isqrt

from torch import Tensor

from visformer.errors import UsageError, nearest
from visformer.models import Architecture, StageConfig

DEFAULT_SIDE = 224  # pixels, where neither position embeddings nor windows tell the image's size

_EMBED = re.compile(r"(?:patch_embed(\d+)|stages\.(\d+)\.embed)\.proj\.weight")
_POSITIONS = re.compile(r"(?:pos_embed(\d+)|stages\.(\d+)\.pos_embed\.weight)")
_BLOCK = re.compile(r"(?:stage(\d+)|stages\.(\d+)\.blocks)\.(\d+)\.(.+)")
_LAST_NORM = ("norm.weight", "norm.bn.weight", "norm.ln.weight", "norm.gamma")
_LAST_MEAN = ("norm.running_mean", "norm.bn.running_mean", "norm.moving_mean")
_MAX_STAGES, _MAX_DEPTH = 8, 256


def read_shape(tensors: dict[str, Tensor]) -> Architecture:
    """The architecture as far as shapes tell it.

    In an attending stage `head_dim` is the width of all heads together, and `num_heads` is 1 unless a table of position
    biases tells it. Raises `UsageError` naming the tensor that is missing or has no sensible shape.
    """
    reader = _Reader(tensors)
    numbers = sorted({_number(match) for name in tensors if (match := _EMBED.fullmatch(name))})
    if not numbers or len(numbers) > _MAX_STAGES:
        raise UsageError(f"its tensors are not a Visformer's: it has {len(numbers)} patch embeddings")
    if not any(name in tensors for name in _LAST_NORM):
        raise UsageError("its tensors are not a whole Visformer: the norm before the head is missing")
    if "stem.0.weight" in tensors:
        stem_width, in_channels, *_ = reader.shape("stem.0.weight", 4)
    else:
        stem_width, in_channels = 0, reader.shape(reader.embed(numbers[0]), 4)[1]
    blocks = reader.blocks(numbers)
    stages = tuple(reader.stage(number, blocks.get(number, {})) for number in numbers)
    architecture = Architecture(
        stem_width=stem_width,
        stages=stages,
        num_classes=reader.shape("head.weight", 2)[0] if "head.weight" in tensors else 0,
        in_channels=in_channels,
        groups=reader.groups(),
        mlp_ratio=reader.mlp_ratio(stages, blocks, numbers),
        norm="batch" if any(name in tensors for name in _LAST_MEAN) else "layer",
        embed_norm=any(".norm." in name for name in tensors if "embed" in name),
        pos_embed=any(_POSITIONS.fullmatch(name) for name in tensors),
    )
    return replace(architecture, image_size=reader.image_size(architecture, numbers))


def _number(match: re.Match) -> int:
    return int(match[1] or match[2])


class _Reader:
    """Shapes of tensors by name, each checked before it is believed."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = tensors

    def shape(self, name: str, axes: int) -> tuple[int, ...]:
        """The shape of a tensor that must be there and have so many axes."""
        if name not in self.tensors:
            raise UsageError(f"the tensor {name!r} is missing{nearest(name, self.tensors)}")
        shape = tuple(self.tensors[name].shape)
        if len(shape) != axes or min(shape) < 1:
            raise UsageError(f"the tensor {name!r} has shape {shape}, where {axes} axes are expected")
        return shape

    def embed(self, number: int) -> str:
        """Name of the weight of a patch embedding."""
        old, new = f"patch_embed{number}.proj.weight", f"stages.{number}.embed.proj.weight"
        return old if old in self.tensors else new

    def blocks(self, numbers: list[int]) -> dict[int, dict[int, dict[str, str]]]:
        """Stage -> block -> what (`attn.qkv.weight`) -> name. Blocks of a stage without an embedding of its own, as in
        net1, belong to the embedding before."""
        found: dict[int, dict[int, dict[str, str]]] = {}
        for name in self.tensors:
            match = _BLOCK.fullmatch(name)
            if match:
                stage = max((n for n in numbers if n <= _number(match)), default=numbers[0])
                found.setdefault(stage, {}).setdefault(int(match[3]), {})[match[4].replace(".branch", "")] = name
        return found

    def stage(self, number: int, blocks: dict[int, dict[str, str]]) -> StageConfig:
        """A stage by the shapes of its embedding and its first block."""
        width, _, patch_size, _ = self.shape(self.embed(number), 4)
        depth = len(blocks)
        if depth > _MAX_DEPTH or sorted(blocks) != list(range(depth)):
            raise UsageError(
                f"the blocks of stage {number} are not numbered from 0 on; the file has {sorted(blocks)[:9]}"
            )
        first = blocks.get(0, {})
        attention, spatial = "attn.qkv.weight" in first, "mlp.conv2.weight" in first
        heads, inner, window = 1, None, None
        if attention:
            inner = self.shape(first["attn.qkv.weight"], 4)[0] // 3
        table = first.get("attn.relative_position_bias_table") or first.get("attn.position_bias.table")
        if table:
            rows, heads = self.shape(table, 2)
            window = (isqrt(rows) + 1) // 2
            if (2 * window - 1) ** 2 != rows:
                raise UsageError(f"the tensor {table!r} has {rows} rows, which is no odd number squared")
        return StageConfig(width, depth, patch_size, heads, attention, spatial, head_dim=inner, window=window)

    def groups(self) -> int:
        """Of the 3x3 convolutions; 8, the usual number, where there is none."""
        for name in self.tensors:
            if name.endswith(".conv2.weight"):
                hidden, channels, *_ = self.shape(name, 4)
                return max(1, hidden // channels)
        return 8

    def mlp_ratio(self, stages: tuple[StageConfig, ...], blocks: dict, numbers: list[int]) -> float:
        """Hidden width of the first MLP without a 3x3 convolution, over its stage's; 4 where there is none."""
        for stage, number in zip(stages, numbers, strict=True):
            if stage.depth and not stage.spatial_mlp:
                name = blocks[number][0].get("mlp.conv1.weight")
                return self.shape(name or f"stage{number}.0.mlp.conv1.weight", 4)[0] / stage.width
        return 4.0

    def image_size(self, architecture: Architecture, numbers: list[int]) -> tuple[int, int]:
        """Pixels, from the first position embedding, else from the first windows and their mask, else 224."""
        stride = architecture.stem_stride
        for stage, number in zip(architecture.stages, numbers, strict=True):
            stride *= stage.patch_size
            for name in (f"pos_embed{number}", f"stages.{number}.pos_embed.weight"):
                if name in self.tensors:
                    _, _, height, width = self.shape(name, 4)
                    return height * stride, width * stride
            if stage.window:  # one holds the whole map, unless there is a mask, which has a plane for each
                mask = next((n for n in self.tensors if re.fullmatch(rf"stage{number}\.\d+\.attn_mask", n)), None)
                side = (isqrt(self.shape(mask, 3)[0]) if mask else 1) * stage.window * stride
                return side, side
        return DEFAULT_SIDE, DEFAULT_SIDE
