"""Our models in timm's registry, so that `timm.create_model("visformer_small_v2")` and timm's tools work on them.

Names that timm has itself (visformer_tiny and visformer_small) stay timm's own.
"""

from __future__ import annotations

import sys
from typing import Any

from timm.models import is_model, register_model

from visformer.config import IMAGENET_MEAN, IMAGENET_STD
from visformer.errors import UsageError
from visformer.models.variants import create_model, list_models
from visformer.models.visformer import Visformer


def _default_cfg(name: str) -> dict[str, Any]:
    return {
        "architecture": name,
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": tuple(value / 255 for value in IMAGENET_MEAN),
        "std": tuple(value / 255 for value in IMAGENET_STD),
        "first_conv": "stem.0",
        "classifier": "head",
    }


def _entry_point(name: str):
    def build(pretrained: bool = False, **kwargs: Any) -> Visformer:
        if pretrained:
            raise UsageError(f"{name}: timm knows no weights of it; use visformer.load(PATH)")
        for key in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
            kwargs.pop(key, None)
        options = {"image_size": kwargs.pop("img_size", 224), "in_channels": kwargs.pop("in_chans", 3)}
        model = create_model(name, **options, **kwargs)
        model.pretrained_cfg = model.default_cfg = _default_cfg(name)  # type: ignore[assignment]
        return model

    build.__name__ = build.__qualname__ = name
    build.__module__ = __name__
    build.__doc__ = f"{name} for timm: `img_size`, `in_chans` and `num_classes` as timm names them."
    return build


def register() -> None:
    """Add every model that timm lacks to its registry; doing it twice changes nothing."""
    module = sys.modules[__name__]
    for name in list_models():
        if not is_model(name):
            setattr(module, name, _entry_point(name))
            register_model(getattr(module, name))
