"""What a Visformer is made of, as plain data.

A network is a stem and a tuple of stages; a stage is a patch embedding followed by `depth` equal blocks. Everything
that decides a tensor's shape or a number's value is here, travels in the checkpoint, and builds the same module again.
The defaults are those of the published Visformers; the ablation nets and the windowed models set the other fields.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from visformer.errors import UsageError, nearest

STEM_STRIDE = 2
MIN_IMAGE_SIZE = 32


@dataclass(frozen=True)
class StageConfig:
    """One resolution of the pyramid."""

    width: int  # channels
    depth: int  # number of blocks
    patch_size: int  # kernel and stride of the patch embedding that opens the stage
    num_heads: int = 1  # of the attention, where there is one
    attention: bool = False  # each block opens with self-attention
    spatial_mlp: bool = False  # the MLP has a grouped 3x3 convolution between its two products
    head_dim: int | None = None  # channels of a head of the attention; None: width // num_heads
    window: int | None = None  # attention within windows of so many positions a side, with relative position bias


@dataclass(frozen=True)
class Architecture:
    """A whole network; `image_size` is (height, width) in pixels."""

    stem_width: int  # channels of the 7x7 convolution of stride 2; 0: no stem, the first patches are cut from the image
    stages: tuple[StageConfig, ...]
    num_classes: int = 1000  # 0: the pooled features come out
    image_size: tuple[int, int] = (224, 224)
    in_channels: int = 3
    groups: int = 8  # of the 3x3 convolutions in spatial MLPs
    mlp_ratio: float = 4.0  # hidden width of an MLP without a spatial convolution
    norm: Literal["batch", "layer"] = "batch"  # of blocks and before pooling; layer: over channels at each position
    embed_norm: bool = True  # a norm after each patch embedding
    pos_embed: bool = True  # a learned map is added after each patch embedding
    gelu: Literal["erf", "tanh"] = "erf"  # MindSpore's GELU is the tanh form, PyTorch's the erf form
    qk_scale_power: float = -0.25  # q and k are each scaled by head_dim ** power: -0.25 in V1, -0.5 in V2
    drop_rate: float = 0.0  # after position embeddings, in MLPs and after attention's projection
    attn_drop_rate: float = 0.0  # of attention weights
    drop_path_rate: float = 0.0  # stochastic depth of the last block, rising linearly from 0

    def __post_init__(self) -> None:
        if min(self.image_size) < MIN_IMAGE_SIZE:
            raise UsageError(f"image_size: {self.image_size} is too small; at least {MIN_IMAGE_SIZE} pixels a side")
        if self.in_channels < 1 or self.num_classes < 0:
            raise UsageError(
                f"in_channels ({self.in_channels}) must be at least 1 and num_classes ({self.num_classes}) at least 0"
            )
        for name in ("drop_rate", "attn_drop_rate", "drop_path_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{name}: {getattr(self, name)} is out of range; it must be at least 0 and below 1")

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """Height and width of each stage's map; sizes that a patch does not divide are padded, so they round up."""
        height, width = (-(-side // self.stem_stride) for side in self.image_size)
        grids = []
        for stage in self.stages:
            height, width = -(-height // stage.patch_size), -(-width // stage.patch_size)
            grids.append((height, width))
        return tuple(grids)

    @property
    def stem_stride(self) -> int:
        """Pixels a side of the image for one position of the map that the first stage gets."""
        return STEM_STRIDE if self.stem_width else 1

    @property
    def num_features(self) -> int:
        """Channels of the last stage, and length of the pooled feature vector."""
        return self.stages[-1].width

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> Architecture:
        """Build from `to_dict`'s form. Raises `UsageError` naming a key that is unknown or missing."""
        values = dict(document)
        _check_keys("architecture", values, cls)
        values["stages"] = tuple(_stage(stage) for stage in values["stages"])
        if "image_size" in values:
            values["image_size"] = tuple(values["image_size"])
        return cls(**values)


def _stage(document: dict[str, Any]) -> StageConfig:
    _check_keys("stage", document, StageConfig)
    return StageConfig(**document)


def _check_keys(what: str, document: dict[str, Any], cls: type) -> None:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in document:
        if key not in fields:
            raise UsageError(f"{what} has an unknown key {key!r}{nearest(key, fields)}")
    for name, field in fields.items():
        if name not in document and field.default is dataclasses.MISSING:
            raise UsageError(f"{what} lacks {name!r}")
