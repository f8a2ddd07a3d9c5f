"""Deployment bundles: a folder with a model, its labels and preprocessing, and proof that it gives the right logits.

    bundle = Bundle.open("bundle")
    engine = bundle.engine(threads=1)
    logits = engine.run(bundle.preprocessing([image, image]))   # float32 (2, classes)

Writing a bundle (`build`) needs torch; opening and running one needs numpy, Pillow and the bundle's engine. So nothing
is imported here before it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from visformer.bundles.bundle import Bundle, is_bundle
    from visformer.bundles.engines import Engine
    from visformer.bundles.pixels import ImagePreprocessing

__all__ = ["Bundle", "Engine", "ImagePreprocessing", "is_bundle"]

_MODULES = {"Bundle": "bundle", "is_bundle": "bundle", "Engine": "engines", "ImagePreprocessing": "pixels"}


def __getattr__(name: str) -> Any:
    """Import what a name stands for, once (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module 'visformer.bundles' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"visformer.bundles.{_MODULES[name]}"), name)
    return value
