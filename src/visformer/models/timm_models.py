"""Our models in timm's registry, so that `timm.create_model("visformer_small_v2")` and timm's tools work on them.

    timm.create_model("visformer_small_v2", num_classes=10, img_size=256)
    timm.create_model("visformer_small_v2", features_only=True, out_indices=(1, 3))

Names that timm has itself (visformer_tiny and visformer_small) stay timm's own. Options have timm's names; one that
means nothing here is an error, never ignored.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from timm.models import build_model_with_cfg, is_model, register_model
from torch import nn

from visformer.config import IMAGENET_MEAN, IMAGENET_STD
from visformer.errors import UsageError
from visformer.models.architecture import Architecture
from visformer.models.variants import VARIANTS, architecture, change, list_models
from visformer.models.visformer import Visformer

FEATURE_CLASSES = ("getter", "list", "dict", "hook")


class TimmVisformer(Visformer):
    """A Visformer with the methods that timm's tools look for beyond those it has."""

    @property
    def in_chans(self) -> int:
        """Channels of the input, as timm calls them."""
        return self.config.in_channels

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last of `indices` (stage numbers, or the last so many), and with them, or if
        asked, the norm and the head. Returns the stage numbers, all from 0 up."""
        wanted = sorted(self._stage_numbers(indices if isinstance(indices, int) else list(indices)))
        last = wanted[-1]
        ends_early = last + 1 < len(self.stages)
        if prune_head or ends_early:
            self.reset_classifier(0)
        if prune_norm or ends_early:
            self.norm = nn.Identity()
        self.stages = self.stages[: last + 1]
        self.config = replace(self.config, stages=self.config.stages[: last + 1])
        self.num_features = self.head_hidden_size = self.config.num_features
        return wanted


def register() -> None:
    """Add every model that timm lacks to its registry; doing it twice changes nothing."""
    module = sys.modules[__name__]
    for name in list_models():
        if not is_model(name):
            setattr(module, name, _entry_point(name))
            register_model(getattr(module, name))


def _entry_point(name: str):
    def build(pretrained: bool = False, **options: Any) -> nn.Module:
        if pretrained:
            raise UsageError(
                f"{name}: timm knows no weights of it; visformer.create_model({name!r}, pretrained=...) takes a file, "
                "a hub's repository or a published name, and checkpoint_path= a file with the tensors' names here"
            )
        _check_features(name, options)
        stages = len(VARIANTS[name].architecture.stages)
        return build_model_with_cfg(
            partial(_build, name),  # type: ignore[arg-type]
            name,
            False,
            pretrained_cfg_overlay=_input_of(name, options) | (options.pop("pretrained_cfg_overlay", None) or {}),
            # flatten_sequential is for the feature classes other than timm's getter
            feature_cfg={"out_indices": tuple(range(stages)), "feature_cls": "getter", "flatten_sequential": True},
            **options,
        )

    build.__name__ = build.__qualname__ = name
    build.__module__ = __name__
    build.__doc__ = f"{name} for timm: `img_size`, `in_chans`, `num_classes` and `features_only` as timm names them."
    return build


def _build(name: str, **options: Any) -> TimmVisformer:
    """The model from timm's names for options."""
    pool = options.pop("global_pool", "avg")
    if pool != "avg":
        raise UsageError(
            f"global_pool: {pool!r} is not possible, Visformer pools by 'avg'; forward_features gives the map unpooled"
        )
    for theirs, ours in (("img_size", "image_size"), ("in_chans", "in_channels")):
        if theirs in options:
            options[ours] = options.pop(theirs)
    dynamic = options.pop("dynamic_img_size", False)
    place = {key: options.pop(key) for key in ("device", "dtype") if key in options}
    return TimmVisformer(architecture(name, **options), dynamic_image_size=dynamic).to(**place)


def _check_features(name: str, options: dict[str, Any]) -> None:
    """Refuse wrong options of the feature network in plain words; timm answers them with an assertion or not at all."""
    stages = VARIANTS[name].architecture.stages
    strides = _strides(VARIANTS[name].architecture)
    if not options.get("features_only"):
        for key in ("out_indices", "feature_cls"):
            if key in options:
                raise UsageError(f"{key}: it is for features_only=True; without that the model gives logits")
    stride = options.pop("output_stride", strides[-1])
    if stride != strides[-1]:
        raise UsageError(
            f"output_stride: {stride} is not possible; the maps of {name} have strides of "
            f"{', '.join(map(str, strides))} pixels, and out_indices chooses among them"
        )
    kind = options.get("feature_cls", "getter")
    if isinstance(kind, str) and kind not in FEATURE_CLASSES:
        raise UsageError(f"feature_cls: {kind!r} is not possible; choose from {', '.join(FEATURE_CLASSES)}")
    indices = options.get("out_indices")
    if indices is not None:
        last = len(stages) - 1
        numbers = list(range(-indices, 0)) if isinstance(indices, int) else list(indices)
        known = all(-last - 1 <= number <= last for number in numbers)
        numbers = [number % len(stages) for number in numbers]
        if not numbers or not known or numbers != sorted(set(numbers)):
            raise UsageError(
                f"out_indices: {indices} is not possible; give numbers of stages, 0 to {last}, in rising order"
            )
        options["out_indices"] = tuple(numbers)


def _strides(network: Architecture) -> list[int]:
    """Pixels a side of the image for one position of each stage's map."""
    stride, strides = network.stem_stride, []
    for stage in network.stages:
        stride *= stage.patch_size
        strides.append(stride)
    return strides


def _input_of(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """What timm's configuration says of the input, where the options differ from the model's own."""
    given = {"image_size": options.get("img_size"), "in_channels": options.get("in_chans")}
    if given["image_size"] is None and given["in_channels"] is None:
        return {}
    network = change(VARIANTS[name].architecture, **given)
    return {"input_size": (network.in_channels, *network.image_size), "pool_size": network.grids[-1]}


def _default_cfg(name: str) -> dict[str, Any]:
    network = VARIANTS[name].architecture
    return {
        "url": "",
        "num_classes": network.num_classes,
        "input_size": (network.in_channels, *network.image_size),
        "fixed_input_size": network.pos_embed,
        "pool_size": network.grids[-1],
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": tuple(round(value / 255, 6) for value in IMAGENET_MEAN),
        "std": tuple(round(value / 255, 6) for value in IMAGENET_STD),
        "first_conv": "stem.0" if network.stem_width else "stages.0.embed.proj",
        "classifier": "head",
    }


default_cfgs = {name: _default_cfg(name) for name in VARIANTS}  # by this name timm's registry finds them
