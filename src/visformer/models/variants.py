"""The published Visformers: a table, and `create_model` that builds from it.

Widths, depths and heads are those of the authors' repository (danczs/Visformer) and of MindCV, whose tensors agree.
The two differ in the form of GELU: erf with the authors and in timm, tanh in MindCV. V2 without windows is MindCV's
alone, and its default is tanh; of all others it is erf.

Families: `v1` and `v2`, the two generations; `swin`, the authors' models with windows and relative position bias;
`ladder`, the paper's steps from a plain vision transformer (net1) to a residual convolutional network (net7).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from visformer.errors import UsageError, nearest
from visformer.models.architecture import Architecture, StageConfig
from visformer.models.visformer import Visformer


@dataclass(frozen=True)
class Published:
    """Accuracy on ImageNet-1k's validation set, in percent, and who says so."""

    top1: float
    top5: float | None
    source: str


@dataclass(frozen=True)
class Variant:
    """A named architecture with what its publishers report."""

    family: str
    architecture: Architecture
    published: tuple[Published, ...]


def _pyramid(
    stem_width: int, embed_dim: int, depths: tuple[int, ...], heads: tuple[int, ...], **options
) -> Architecture:
    """Stages of width embed_dim / 4, / 2, x 1, x 2; the last two attend. A first stage of depth 0 is merged into the
    next, whose patches are then 4x4."""
    widths = (embed_dim // 4, embed_dim // 2, embed_dim, embed_dim * 2)
    stages = tuple(
        StageConfig(width, depth, 2, num_heads=num_heads, attention=i >= 2, spatial_mlp=i < 2)
        for i, (width, depth, num_heads) in enumerate(zip(widths, depths, heads, strict=True))
    )
    if not depths[0]:
        stages = (replace(stages[1], patch_size=4), *stages[2:])
    return Architecture(stem_width, stages, **options)


def _windowed(base: Architecture) -> Architecture:
    """The authors' windowed form: four 2x2 embeddings always, and windows that just hold the map at 224 pixels."""
    first, *rest = base.stages
    if first.patch_size == 4:
        empty = replace(first, width=first.width // 2, depth=0, patch_size=2)
        rest = [replace(first, patch_size=2), *rest]
        first = empty
    windows = (56, 28, 14, 7)
    stages = tuple(
        replace(stage, window=window if stage.attention else None)
        for stage, window in zip((first, *rest), windows, strict=True)
    )
    return replace(base, stages=stages, gelu="erf")


def _ladder(depths: tuple[int, int, int], **options) -> Architecture:
    """net2 to net7: three stages after a stem; `attention` and `spatial_mlp` are options of every stage."""
    shape = {
        "num_heads": 6,
        "attention": options.pop("attention", True),
        "spatial_mlp": options.pop("spatial_mlp", False),
    }
    stages = tuple(
        StageConfig(width, depth, patch_size, **shape, head_dim=head_dim)
        for width, depth, patch_size, head_dim in zip((192, 384, 768), depths, (4, 2, 2), (16, None, None), strict=True)
    )
    return Architecture(32, stages, embed_norm=False, drop_path_rate=0.1, **options)


_V1 = {"gelu": "erf", "qk_scale_power": -0.25}
_V2 = {"gelu": "tanh", "qk_scale_power": -0.5}

VARIANTS: dict[str, Variant] = {
    "visformer_tiny": Variant(
        "v1",
        _pyramid(16, 192, (0, 7, 4, 4), (3, 3, 3, 3), drop_path_rate=0.03, **_V1),
        (Published(78.28, 94.15, "MindCV"), Published(78.6, None, "authors")),
    ),
    "visformer_tiny_v2": Variant(
        "v2",
        _pyramid(24, 192, (1, 4, 6, 3), (1, 3, 6, 12), drop_path_rate=0.03, **_V2),
        (Published(78.82, 94.41, "MindCV"),),
    ),
    "visformer_small": Variant(
        "v1",
        _pyramid(32, 384, (0, 7, 4, 4), (6, 6, 6, 6), drop_path_rate=0.1, **_V1),
        (Published(81.73, 95.88, "MindCV"), Published(82.21, None, "authors")),
    ),
    "visformer_small_v2": Variant(
        "v2",
        _pyramid(32, 256, (1, 10, 14, 3), (2, 4, 8, 16), drop_path_rate=0.1, **_V2),
        (Published(82.17, 95.90, "MindCV"),),
    ),
}

VARIANTS |= {
    f"swin_{name}": Variant("swin", _windowed(VARIANTS[name].architecture), published)
    for name, published in {
        "visformer_tiny_v2": (Published(79.6, None, "authors"),),
        "visformer_small": (Published(82.34, None, "authors"),),
        "visformer_small_v2": (Published(83.00, None, "authors"),),
    }.items()
}
VARIANTS["swin_visformer_medium_v2"] = Variant(
    "swin",
    _windowed(_pyramid(32, 384, (1, 8, 14, 2), (2, 4, 8, 16), drop_path_rate=0.1, **_V2)),
    (Published(83.62, None, "authors"),),
)

_PLAIN = StageConfig(384, 12, 16, num_heads=6, attention=True)
VARIANTS |= {
    name: Variant("ladder", architecture, ())
    for name, architecture in {
        "net1": Architecture(0, (_PLAIN,), norm="layer", embed_norm=False, drop_path_rate=0.1),
        "net2": _ladder((0, 12, 0), norm="layer"),
        "net3": _ladder((4, 4, 4), norm="layer"),
        "net4": _ladder((4, 4, 4)),
        "net5": _ladder((4, 4, 4), spatial_mlp=True, groups=1),
        "net6": _ladder((4, 4, 4), spatial_mlp=True, groups=1, pos_embed=False),
        "net7": _ladder((6, 7, 7), spatial_mlp=True, groups=1, pos_embed=False, attention=False),
    }.items()
}


def list_models() -> list[str]:
    """Names that `create_model` takes."""
    return list(VARIANTS)


def variant(name: str) -> Variant:
    """The table's row of `name`. Raises `UsageError` with the nearest names for one that is not there."""
    if name not in VARIANTS:
        raise UsageError(f"there is no model {name!r}{nearest(name, VARIANTS)}; there are: {', '.join(VARIANTS)}")
    return VARIANTS[name]


def architecture(name: str, **changes) -> Architecture:
    """The architecture of `name` with fields replaced; a change that is None leaves the variant's own value."""
    return change(variant(name).architecture, **changes)


def change(base: Architecture, **changes) -> Architecture:
    """`base` with fields replaced; None leaves its own value. Raises `UsageError` for a field that is not there."""
    given = {key: value for key, value in changes.items() if value is not None}
    if isinstance(given.get("image_size"), int):
        given["image_size"] = (given["image_size"], given["image_size"])
    for key in given:
        if key not in base.to_dict():
            raise UsageError(f"the model has no option {key!r}{nearest(key, base.to_dict())}")
    return replace(base, **given)


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    image_size: int | tuple[int, int] = 224,
    in_channels: int = 3,
    dynamic_image_size: bool = False,
    **changes,
) -> Visformer:
    """A freshly initialised model that gives logits.

    Args:
        name: one of `list_models()`.
        num_classes: number of logits; 0: the pooled features come out.
        image_size: side, or (height, width), of the input in pixels; from 32 up, any.
        in_channels: channels of the input.
        dynamic_image_size: take any size at call, with position embeddings resampled to it.
        changes: any other field of `Architecture`: drop_rate, attn_drop_rate, drop_path_rate, gelu, qk_scale_power, ...

    Raises `UsageError` for an unknown name or option.
    """
    changes |= {"num_classes": num_classes, "image_size": image_size, "in_channels": in_channels}
    return Visformer(architecture(name, **changes), dynamic_image_size=dynamic_image_size)
